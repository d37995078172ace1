"""What a trial computes: every setting, and the file that keeps those of a sweep.

OUTPUT_DIR/<model>_<dataset>_<algorithm>/sweep.json        the settings that all trials share
"""

import argparse
import dataclasses
import importlib.util
import json
import pathlib
import shlex

from federated import algorithms, models
from federated.data import augmentation, datasets, partition
from federated.files import read_regular, write_atomically
from federated.options import (
    UsageError,
    command_words,
    directory,
    host_and_port,
    integer,
    number,
    one_of,
    option,
    shown,
)

SWEEP = "sweep.json"
_MAX_BYTES = 1 << 20  # of sweep.json


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a trial computes, besides its hyper-parameters and seeds. Each setting stands here once: its name is the
    option's, the original's field's and the key in sweep.json."""

    model_arch: str = option(None, models.known_name, f"the model: {models.NAMES}; default: mlp for images, else logistic")
    dataset: str = option("digits", one_of(datasets.REGISTRY), f"the data: {', '.join(datasets.REGISTRY)}")
    algorithm: str = option(
        "Fedavg", one_of(algorithms.REGISTRY, ignore_case=True), f"in any case: {', '.join(algorithms.REGISTRY)}"
    )
    num_clients: int = option(None, integer(1, 100_000), "clients of the federation; default: the data's owners, else 2")
    rounds: int = option(50, integer(1, 1_000_000), "communication rounds")
    local_epochs: int = option(1, integer(1), "passes over its data that a client makes a round")
    samples_per_client: int = option(None, integer(2), "training samples of each client, held-out ones included; default: all")
    participation: float = option(1.0, number(0, 1, above=True), "fraction of the clients that train in a round")
    partition: str = option(
        None,
        one_of(partition.REGISTRY),
        f"how samples go to clients: {', '.join(partition.REGISTRY)}; default: natural if the data have owners, else iid",
    )
    partition_alpha: float = option(
        0.5, number(0, 1e6, above=True), "concentration of dirichlet and quantity; less is more skewed"
    )
    labels_per_client: int = option(2, integer(1), "labels each client holds under --partition labels")
    holdout_fraction: float = option(0.1, number(0, 0.9, above=True), "share of its samples a client validates on")
    augmentation: str = option("none", one_of(augmentation.REGISTRY), f"of training images: {', '.join(augmentation.REGISTRY)}")
    local_optimizer: str = option(
        None, one_of(("adam", "sgd")), "the clients' optimizer: adam, sgd; default: adam if the algorithm allows it"
    )
    optimizer_state: str = option(
        None,
        one_of(("keep", "reset")),
        "keep a client's optimizer moments over rounds or reset them; default: keep if all clients train each round",
    )
    precision: str = option("fp32", one_of(("fp32", "bf16")), "arithmetic of the forward pass: fp32, bf16 (autocast)")
    eval_every: int = option(1, integer(1), "rounds between evaluations; the first and the last model always are")
    device: str = option("auto", one_of(("auto", "cpu", "cuda")), "cpu, cuda, or auto: cuda if there is one")
    threads: int = option(1, integer(1, 1024), "threads of each process; it changes the last bits of results")

    def __post_init__(self):
        """What was not given is resolved, so that sweep.json says what was run."""
        if None in (self.model_arch, self.num_clients, self.partition):
            spec = datasets.REGISTRY[self.dataset]
            self._default("model_arch", "mlp" if spec.is_image else "logistic")
            self._default("num_clients", spec.num_owners or 2)
            self._default("partition", "natural" if spec.num_owners else "iid")
        algorithm = algorithms.load(self.algorithm)
        self._default("local_optimizer", algorithm.local_optimizers[0])
        self._default("optimizer_state", "keep" if self.participation == 1 and algorithm.keeps_moments else "reset")
        if self.local_optimizer not in algorithm.local_optimizers:
            raise UsageError(
                f"--local_optimizer {self.local_optimizer}: {self.algorithm} is defined for "
                f"{' and '.join(algorithm.local_optimizers)} only"
            )
        if self.optimizer_state == "keep" and not algorithm.keeps_moments:
            raise UsageError(
                f"--optimizer_state keep: {self.algorithm} is defined for moments that start at zero in each round"
            )

    def _default(self, name, value) -> None:
        if getattr(self, name) is None:
            object.__setattr__(self, name, value)

    @property
    def participants(self) -> int:
        """Clients that train in a round."""
        return max(1, round(self.num_clients * self.participation))

    @property
    def hparams_key(self) -> tuple[str, str, str]:
        """What decides which hyper-parameters there are, as hparams_registry.py takes it."""
        return self.algorithm, self.dataset, self.local_optimizer

    @property
    def name(self) -> str:
        """The directory of the sweep below the output directory."""
        return f"{self.model_arch}_{self.dataset}_{algorithms.canonical(self.algorithm)}"


MAX_PROCESSES = 1024  # of one trial


@dataclasses.dataclass(frozen=True)
class ProcessOptions:
    """How each process of a trial is run, its server and its client processes."""

    data_dir: str = option("data", directory, "where data sets are stored or downloaded to", metavar="DIR")
    timeout: float = option(
        600.0, number(0, 1e6, above=True), "a process that is silent for this long has failed", metavar="SECONDS"
    )


@dataclasses.dataclass(frozen=True)
class ServerOptions(ProcessOptions):
    """How a trial's server is run."""

    checkpoint_seconds: float = option(
        10.0,
        number(0, 1e6),
        "least time between checkpoints, which are made at round ends; 0: after each round",
        metavar="SECONDS",
    )
    save_model: bool = option(
        False, None, "keep the global model of the best validation accuracy as model.pt, a state_dict, in the trial's directory"
    )
    tensorboard: bool = option(
        False, None, "write event files, by which `tensorboard --logdir DIR` shows trials as they run (needs tensorboard)"
    )


@dataclasses.dataclass(frozen=True)
class RunOptions(ServerOptions):
    """How trials are run. None of these changes a result."""

    trials_per_device: int = option(1, integer(1, 1024), "trials at once on each GPU")
    client_processes: int | None = option(
        None,
        integer(1, MAX_PROCESSES),
        "client processes of a trial; default: one a participant up to the trial's share of the cores",
        metavar="INT",
    )
    retries: int = option(0, integer(0, 1000), "further attempts at a trial that failed by accident")
    host: str | None = option(
        None,
        host_and_port,
        "servers listen here, with the key in FEDERATED_KEY, one trial at a time; default: private Unix sockets",
        metavar="HOST:PORT",
    )
    jobs: int | None = option(
        None, integer(1, 1024), "trials at once; default: as many as the cores hold; slurm: jobs at once", metavar="INT"
    )


def comparable(settings: Settings) -> dict[str, object]:
    """{name: value} of what has to be equal for the accuracies of two sweeps to be compared: all settings that take effect, but
    for the algorithm, and for where it is computed, which changes the last bits only."""
    values = dataclasses.asdict(settings)
    unused = {"algorithm", "device", "threads"}
    if settings.partition not in ("dirichlet", "quantity"):
        unused.add("partition_alpha")
    if settings.partition != "labels":
        unused.add("labels_per_client")
    return {name: value for name, value in values.items() if name not in unused}


def check_same_settings(directory: pathlib.Path, settings: Settings, stored: Settings | None) -> None:
    """Raises UsageError if the sweep in `directory` was made with settings other than `settings`."""
    if stored is None:
        return
    ours, theirs = (dataclasses.asdict(s) | {"algorithm": algorithms.canonical(s.algorithm)} for s in (settings, stored))
    for name, value in ours.items():
        if value != theirs[name]:
            raise UsageError(
                f"--{name} is {value} here and {theirs[name]} in the sweep that {str(directory)!r} holds: "
                f"give {shlex.join(command_words({name: theirs[name]}))} to resume it, or another --output_dir for a new one"
            )


def check_has_model(settings: Settings) -> None:
    """Raises UsageError if trials with `settings` have no global model that could be kept."""
    if not algorithms.load(settings.algorithm).has_global_model:
        raise UsageError(f"--save_model: {settings.algorithm} has no global model to keep, only those of its clients")


def check_tensorboard() -> None:
    """Raises UsageError if --tensorboard cannot be had."""
    if importlib.util.find_spec("tensorboard") is None:
        raise UsageError("--tensorboard needs tensorboard, which is not installed: pip install tensorboard")


def write_sweep_file(directory: pathlib.Path, settings: Settings) -> None:
    """Note the settings that all trials in `directory` share."""
    if not (directory / SWEEP).exists():
        directory.mkdir(parents=True, exist_ok=True)
        write_atomically(directory / SWEEP, json.dumps(dataclasses.asdict(settings), indent=1) + "\n")


def remove_sweep_file(directory: pathlib.Path) -> None:
    """Forget the settings once no job is left, so that the next sweep here may have others. Raises OSError if one is."""
    if [path.name for path in directory.iterdir()] == [SWEEP]:
        (directory / SWEEP).unlink()
        directory.rmdir()


def stored_settings(directory: pathlib.Path) -> Settings | None:
    """The settings of the sweep in `directory`, None if there is no sweep. Raises UsageError if it can't be read."""
    path = directory / SWEEP
    try:
        return _checked_settings(json.loads(read_regular(path, _MAX_BYTES)))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(
            f"{str(path)!r} cannot be read as a sweep's settings ({reason}): restore it or use another --output_dir"
        ) from error


def _checked_settings(values: object) -> Settings:
    """The settings that a file names, each as its option would take it. Raises ValueError that names a wrong one."""
    fields = {field.name: field for field in dataclasses.fields(Settings)}
    if not isinstance(values, dict):
        raise ValueError("it holds no JSON object")
    for name, value in values.items():
        if name not in fields:
            raise ValueError(f"it has an unknown setting {shown(name)}")
        if value is None and fields[name].default is None:
            continue
        try:
            fits = fields[name].metadata["parse"](str(value)) == value
        except argparse.ArgumentTypeError as error:
            raise ValueError(f"{name}: {error}") from error
        if not fits:
            raise ValueError(f"{name} {shown(value)} has the wrong type")
    return Settings(**values)
