"""What a trial computes: every setting, and the file that keeps those of a sweep.

OUTPUT_DIR/<model>_<dataset>_<algorithm>/sweep.json        the settings that all trials share
"""

import argparse
import dataclasses
import importlib.util
import json
import pathlib

from federated import algorithms, augmentation, datasets, models, partition
from federated.files import write_atomically
from federated.options import UsageError, one_of, real, shown, whole

SWEEP = "sweep.json"


def _setting(default, parse, help):
    return dataclasses.field(default=default, metadata={"parse": parse, "help": help})


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a trial computes, besides its hyper-parameters and seeds. Each setting stands here once: its name is the
    option's, the original's field's and the key in sweep.json."""

    model_arch: str = _setting(None, models.known_name, f"the model: {models.NAMES}; default: mlp for images, else logistic")
    dataset: str = _setting("digits", one_of(datasets.REGISTRY), f"the data: {', '.join(datasets.REGISTRY)}")
    algorithm: str = _setting(
        "Fedavg", one_of(algorithms.REGISTRY, ignore_case=True), f"in any case: {', '.join(algorithms.REGISTRY)}"
    )
    num_clients: int = _setting(None, whole(1, 100_000), "clients of the federation; default: the data's owners, else 2")
    rounds: int = _setting(50, whole(1, 1_000_000), "communication rounds")
    local_epochs: int = _setting(1, whole(1), "passes over its data that a client makes a round")
    samples_per_client: int = _setting(None, whole(2), "training samples of each client, held-out ones included; default: all")
    participation: float = _setting(1.0, real(0, 1, above=True), "fraction of the clients that train in a round")
    partition: str = _setting(
        None,
        one_of(partition.REGISTRY),
        f"how samples go to clients: {', '.join(partition.REGISTRY)}; default: natural where the data have owners, else iid",
    )
    partition_alpha: float = _setting(
        0.5, real(0, 1e6, above=True), "concentration of dirichlet and quantity; less is more skewed"
    )
    labels_per_client: int = _setting(2, whole(1), "labels each client holds under --partition labels")
    holdout_fraction: float = _setting(0.1, real(0, 0.9, above=True), "share of its samples a client validates on")
    augmentation: str = _setting(
        "none", one_of(augmentation.REGISTRY), f"of training images: {', '.join(augmentation.REGISTRY)}"
    )
    local_optimizer: str = _setting(
        None, one_of(("adam", "sgd")), "the clients' optimizer: adam, sgd; default: adam where the algorithm allows it"
    )
    optimizer_state: str = _setting(
        None,
        one_of(("keep", "reset")),
        "keep a client's optimizer moments over rounds or reset them; default: keep where all clients train each round",
    )
    precision: str = _setting("fp32", one_of(("fp32", "bf16")), "arithmetic of the forward pass: fp32, bf16 (autocast)")
    eval_every: int = _setting(1, whole(1), "rounds between evaluations; the first and the last model always are")
    device: str = _setting("auto", one_of(("auto", "cpu", "cuda")), "cpu, cuda, or auto: cuda where there is one")
    threads: int = _setting(1, whole(1, 1024), "threads of each process; it changes the last bits of results")

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
            raise UsageError(f"--optimizer_state keep: {self.algorithm} is defined for moments that start anew each round")

    def _default(self, name, value):
        if getattr(self, name) is None:
            object.__setattr__(self, name, value)

    @property
    def participants(self) -> int:
        """Clients that train in a round."""
        return max(1, round(self.num_clients * self.participation))

    @property
    def name(self) -> str:
        """The directory of the sweep below the output directory."""
        return f"{self.model_arch}_{self.dataset}_{algorithms.canonical(self.algorithm)}"


def add_arguments(parser: argparse.ArgumentParser, given_only: bool = False, several=()):
    """An option for every setting; with `given_only` the namespace holds just those that the user gave. Those in `several`
    take one value or more."""
    group = parser.add_argument_group("what a trial trains", "Fixed once for a sweep and kept in its sweep.json.")
    for field in dataclasses.fields(Settings):
        group.add_argument(
            f"--{field.name}",
            type=field.metadata["parse"],
            default=argparse.SUPPRESS if given_only else field.default,
            nargs="+" if field.name in several else None,
            metavar=getattr(field.type, "__name__", field.type).upper(),
            help=field.metadata["help"] + ("" if field.default is None or not given_only else f" (default: {field.default})"),
        )


def settings_from(namespace: argparse.Namespace) -> Settings:
    known = {field.name for field in dataclasses.fields(Settings)}
    return Settings(**{name: value for name, value in vars(namespace).items() if name in known})


def check_same_settings(directory: pathlib.Path, settings: Settings, stored: Settings | None):
    """Raises UsageError where the sweep in `directory` was made with settings other than `settings`."""
    if stored is None:
        return
    ours, theirs = (dataclasses.asdict(s) | {"algorithm": algorithms.canonical(s.algorithm)} for s in (settings, stored))
    for name, value in ours.items():
        if value != theirs[name]:
            raise UsageError(
                f"--{name} is {value} here and {theirs[name]} in the sweep that {str(directory)!r} holds: "
                f"give --{name} {theirs[name]} to go on with it, or another --output_dir for a new one"
            )


def check_has_model(settings: Settings):
    """Raises UsageError where trials with `settings` have no global model that could be kept."""
    if not algorithms.load(settings.algorithm).has_global_model:
        raise UsageError(f"--save_model: {settings.algorithm} has no global model to keep, only those of its clients")


def check_tensorboard():
    """Raises UsageError where --tensorboard cannot be had."""
    if importlib.util.find_spec("tensorboard") is None:
        raise UsageError("--tensorboard needs tensorboard, which is not installed: pip install tensorboard")


def write_sweep_file(directory: pathlib.Path, settings: Settings):
    """Note the settings that all trials in `directory` share."""
    if not (directory / SWEEP).exists():
        directory.mkdir(parents=True, exist_ok=True)
        write_atomically(directory / SWEEP, json.dumps(dataclasses.asdict(settings), indent=1) + "\n")


def remove_sweep_file(directory: pathlib.Path):
    """Forget the settings once no job is left, so that the next sweep here may have others. Raises OSError where one is."""
    if [path.name for path in directory.iterdir()] == [SWEEP]:
        (directory / SWEEP).unlink()
        directory.rmdir()


def stored_settings(directory: pathlib.Path) -> Settings | None:
    """The settings of the sweep in `directory`, None where there is no sweep. Raises UsageError where it can't be read."""
    path = directory / SWEEP
    try:
        return _checked_settings(json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(
            f"{str(path)!r} cannot be read as a sweep's settings ({reason}): restore it or use another --output_dir"
        ) from error


def _checked_settings(values) -> Settings:
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
