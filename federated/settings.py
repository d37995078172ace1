"""What a trial computes: every setting, and the file that keeps those of a sweep.

OUTPUT_DIR/<sweep>/sweep.json        the settings that all trials share, and the search spaces of their hyper-parameters
"""

import argparse
import contextlib
import dataclasses
import fcntl
import hashlib
import importlib.util
import json
import os
import pathlib
import shlex
import typing

from federated import algorithms, models, version
from federated.data import augmentation, datasets, partition
from federated.extension import Registry, is_name
from federated.files import read_regular, write_atomically
from federated.options import (
    ExtensionOptions,
    UsageError,
    command_words,
    directory,
    host_and_port,
    integer,
    names_of,
    number,
    one_of,
    option,
    shown,
)
from federated.search import Space

SWEEP, HALVING = "sweep.json", "halving.json"
_MAX_BYTES = 1 << 24  # of sweep.json


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a trial computes, besides its hyper-parameters and seeds. Each setting stands here once: its name is the
    option's, the original's field's and the key in sweep.json."""

    model_arch: str = option(
        None,
        models.known_name,
        lambda: f"the model: {models.names()}; default: mlp for images, lstm for sequences, else logistic",
    )
    dataset: str = option("digits", one_of(datasets.REGISTRY), lambda: f"the data: {', '.join(datasets.REGISTRY)}")
    algorithm: str = option(
        "Fedavg",
        one_of(algorithms.REGISTRY, ignore_case=True),
        lambda: f"the algorithm, in any case: {', '.join(algorithms.REGISTRY)}",
    )
    num_clients: int = option(
        None, integer(1, 100_000), "clients of the federation; default: the data's owners, or 100 of many, else 2"
    )
    rounds: int = option(50, integer(1, 1_000_000), "communication rounds")
    local_epochs: int = option(1, integer(1), "passes over its data that a client makes a round")
    samples_per_client: int = option(None, integer(2), "training samples of each client, held-out ones included; default: all")
    participation: float = option(1.0, number(0, 1, above=True), "fraction of the clients that train in a round")
    straggler_fraction: float = option(
        0.0, number(0, 1), "fraction of a round's clients that do a random part of their local epochs"
    )
    dropout_fraction: float = option(0.0, number(0, 0.99), "fraction of a round's clients whose update never arrives")
    partition: str = option(
        None,
        one_of(partition.REGISTRY),
        lambda: (
            f"how samples go to clients: {', '.join(partition.REGISTRY)}; default: natural if the data have owners, else iid"
        ),
    )
    partition_alpha: float = option(
        None, number(0, 1e6, above=True), "concentration of dirichlet and quantity; less is more skewed; default: 0.5"
    )
    labels_per_client: int = option(None, integer(1), "labels each client holds under --partition labels; default: 2")
    holdout_fraction: float = option(0.1, number(0, 0.9, above=True), "share of its samples a client validates on")
    augmentation: str = option(
        "none", one_of(augmentation.REGISTRY), lambda: f"changes to training images: {', '.join(augmentation.REGISTRY)}"
    )
    local_optimizer: str = option(
        None, one_of(("adam", "sgd")), "the clients' optimizer: adam, sgd; default: adam if the algorithm allows it"
    )
    optimizer_state: str = option(
        None,
        one_of(("keep", "reset")),
        "keep a client's optimizer moments over rounds or reset them; default: keep if all clients train each round",
    )
    precision: str = option("fp32", one_of(("fp32", "bf16")), "arithmetic of the forward pass: fp32, bf16 (autocast)")
    compression: str = option(
        "none",
        one_of(("none", "topk", "quantize")),
        "how clients shorten updates: none; topk: send the largest entries, with error feedback; quantize: a few bits of each",
    )
    compression_ratio: float = option(
        None, number(0, 1, above=True), "share of the entries that are sent under --compression topk; default: 0.1"
    )
    bits: int = option(None, integer(2, 32), "bits of an entry that is sent under --compression quantize; default: 8")
    dp_clip: float = option(
        None,
        number(0, 1e6, above=True),
        "privacy by user: clip each client's update to this norm, and add noise to the sum of updates; default: no privacy",
    )
    dp_noise_multiplier: float = option(
        None, number(0, 1e6), "standard deviation of that noise, as a multiple of --dp_clip; default: 1 with --dp_clip"
    )
    eval_every: int = option(1, integer(1), "rounds between evaluations; the first and the last model are always evaluated")
    device: str = option("auto", one_of(("auto", "cpu", "cuda")), "cpu, cuda, or auto: cuda if there is one")
    threads: int = option(1, integer(1, 1024), "threads of each process; it changes the last bits of results")

    def __post_init__(self) -> None:
        """Resolve what was not given, so that sweep.json says what was run. Raises UsageError if values do not fit together."""
        for field in dataclasses.fields(self):
            if getattr(self, field.name) is None:
                object.__setattr__(self, field.name, self.default_of(field.name))
        for name, (other, values, _) in USED_UNDER.items():
            if getattr(self, name) is not None and getattr(self, other) not in values:
                raise UsageError(
                    f"--{name} {getattr(self, name)} has no effect under --{other} {getattr(self, other)}, "
                    f"only under {' and '.join(values)}"
                )
        algorithm = algorithms.load(self.algorithm)
        if self.local_optimizer not in algorithm.local_optimizers:
            raise UsageError(
                f"--local_optimizer {self.local_optimizer}: {self.algorithm} is defined for "
                f"{' and '.join(algorithm.local_optimizers)} only"
            )
        if self.optimizer_state == "keep" and not algorithm.keeps_moments:
            raise UsageError(
                f"--optimizer_state keep: {self.algorithm} is defined for moments that start at zero in each round"
            )
        if self.dp_clip is None and self.dp_noise_multiplier is not None:
            raise UsageError(f"--dp_noise_multiplier {self.dp_noise_multiplier} has no effect without --dp_clip")
        if self.compression != "none":
            self._check_updates(f"--compression {self.compression}", algorithm)
            if algorithm.uploads > 1:
                others = ", ".join(name for name in algorithms.REGISTRY if algorithms.load(name).uploads == 1)
                raise UsageError(
                    f"--compression {self.compression}: {self.algorithm} sends {algorithm.uploads} vectors; it is for those "
                    f"that send one: {others}"
                )
        if self.dp_clip is not None:
            self._check_updates(f"--dp_clip {self.dp_clip}", algorithm)
            if not algorithms.can_be_private(algorithm):
                others = ", ".join(name for name in algorithms.REGISTRY if algorithms.can_be_private(algorithms.load(name)))
                raise UsageError(
                    f"--dp_clip {self.dp_clip}: {self.algorithm} is not among the algorithms whose server takes no more from "
                    f"clients than the average of whole models: {others}"
                )

    def _check_updates(self, option: str, algorithm: type) -> None:
        """Raises UsageError if nothing says what the clients of an algorithm of one's own send."""
        if algorithms.does_not_say_what_it_sends(algorithm):
            raise UsageError(
                f"{option}: {self.algorithm} has an upload() of its own: say by sends_change = True or False beside it whether "
                "it sends the change of the weights or the weights"
            )

    def default_of(self, name: str) -> typing.Any:
        """The value of a setting that is not given, beside these others."""
        if name in USED_UNDER:
            other, values, default = USED_UNDER[name]
            return default if getattr(self, other) in values else None
        spec, algorithm = datasets.REGISTRY[self.dataset], algorithms.load(self.algorithm)
        match name:
            case "model_arch":
                return spec.default_model
            case "num_clients":
                return spec.default_clients
            case "partition":
                return "natural" if spec.has_owners else "iid"
            case "dp_noise_multiplier":
                return None if self.dp_clip is None else 1.0
            case "local_optimizer":
                return algorithm.local_optimizers[0]
            case "optimizer_state":
                all_train = self.participation == 1 and self.dropout_fraction == 0
                return "keep" if all_train and algorithm.keeps_moments else "reset"
        return Settings.__dataclass_fields__[name].default

    def values(self) -> dict[str, typing.Any]:
        """{setting: value}, the algorithm as the registry spells it. What has equal values computes the same."""
        return dataclasses.asdict(self) | {"algorithm": self.registered_algorithm}

    @property
    def registered_algorithm(self) -> str:
        """The algorithm as the registry spells it."""
        return algorithms.canonical(self.algorithm)

    def with_rounds(self, rounds: int) -> "Settings":
        """The same settings with another number of rounds."""
        return dataclasses.replace(self, rounds=rounds)

    @property
    def participants(self) -> int:
        """Clients that are to train in a round; with privacy, how many are expected to."""
        return max(1, round(self.num_clients * self.participation))

    @property
    def hparams_key(self) -> tuple[str, str, str]:
        """The settings on which the hyper-parameters depend, as arguments for hparams_registry.py."""
        return self.algorithm, self.dataset, self.local_optimizer

    @property
    def name(self) -> str:
        """The directory of the sweep below the output directory: model, data set and algorithm, and each further setting that
        shapes what is learned and is not at its default."""
        parts = [f"{self.model_arch}_{self.dataset}_{self.registered_algorithm}"]
        for name in names_of(Settings):
            value = getattr(self, name)
            if name not in NOT_IN_NAME and value != self.default_of(name):
                parts.append(f"{name}={value}")
        return short_name(",".join(parts))


def short_name(name: str) -> str:
    """A name of at most MAX_NAME_BYTES; a digest takes the place of the rest."""
    if len(name) <= MAX_NAME_BYTES:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:16]
    return f"{name[: MAX_NAME_BYTES - len(digest) - 1]},{digest}"


# Settings that name a sweep's directory in front, and those that another sweep in the same place cannot differ in
NOT_IN_NAME = ("model_arch", "dataset", "algorithm", "rounds", "eval_every", "device", "threads")
MAX_NAME_BYTES = 199
# Settings that have an effect under some values of another one only: that one, these values, and the default there
USED_UNDER: dict[str, tuple[str, tuple[str, ...], typing.Any]] = {
    "partition_alpha": ("partition", ("dirichlet", "quantity"), 0.5),
    "labels_per_client": ("partition", ("labels",), 2),
    "compression_ratio": ("compression", ("topk",), 0.1),
    "bits": ("compression", ("quantize",), 8),
}


MAX_PROCESSES = 1024  # of one trial


@dataclasses.dataclass(frozen=True)
class ProcessOptions(ExtensionOptions):
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
    keep_checkpoints: bool = option(
        False, None, "keep the checkpoints of done trials, so that a launch with more --rounds resumes from them"
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
    unused = ("algorithm", "device", "threads")
    return {name: value for name, value in dataclasses.asdict(settings).items() if name not in unused}


def check_same_settings(directory: pathlib.Path, settings: Settings, stored: Settings | None, may_extend: bool) -> None:
    """Raises UsageError if the sweep in `directory` was made with settings other than `settings`. With `may_extend` these may
    have more rounds."""
    if stored is None:
        return
    theirs = stored.values()
    for name, value in settings.values().items():
        is_more = name == "rounds" and value > theirs[name]
        if value != theirs[name] and not (is_more and may_extend):
            ways = [f"give {shlex.join(command_words({name: theirs[name]}))} to resume it"]
            ways += [f"--rounds={value} to extend it"] if is_more else []
            raise UsageError(
                f"--{name} is {value} here and {theirs[name]} in the sweep that {str(directory)!r} holds: "
                f"{', '.join(ways)}, or another --output_dir for a new one"
            )


def check_has_model(settings: Settings) -> None:
    """Raises UsageError if trials with `settings` have no global model that could be kept."""
    if not algorithms.load(settings.algorithm).has_global_model:
        raise UsageError(f"--save_model: {settings.algorithm} has no global model to keep, only those of its clients")


def check_tensorboard() -> None:
    """Raises UsageError if tensorboard is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        raise UsageError("--tensorboard needs tensorboard, which is not installed: pip install tensorboard")


def write_sweep_file(directory: pathlib.Path, settings: Settings, space: Space | None = None) -> None:
    """Note the settings that all trials in `directory` share, and a search space from which their hyper-parameters come. Of
    settings that stand there only the rounds change, which may grow."""
    if space is None and (directory / SWEEP).exists():  # as each trial begins
        return
    directory.mkdir(parents=True, exist_ok=True)
    with _alone(directory):
        spaces: list[Space] = []
        if (directory / SWEEP).exists():
            stored, spaces = read_sweep_file(directory)
            settings = stored.with_rounds(max(settings.rounds, stored.rounds))
            if space in spaces and settings == stored:
                return
        if space is not None and space not in spaces:
            spaces.append(space)
        known = {"settings": dataclasses.asdict(settings), "spaces": [each.as_json() for each in spaces]}
        if names := extension_names(settings):
            known["extension"] = {
                "files": [each.origin for each in version.LOADED.values()],
                "names": names,
                "defaults": {name: settings.default_of(name) for name in names_of(Settings)},
            }
        write_atomically(directory / SWEEP, json.dumps(known, indent=1) + "\n")


@contextlib.contextmanager
def _alone(directory: pathlib.Path) -> typing.Iterator[None]:
    """Context that one process at a time enters for a directory, if its file system can lock directories."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def remove_sweep_file(directory: pathlib.Path) -> None:
    """Forget the settings once no job is left, so that the next sweep here may have others. Raises OSError if one is."""
    there = {path.name for path in directory.iterdir()}
    if SWEEP in there <= {SWEEP, HALVING}:
        for name in there:
            (directory / name).unlink()
        directory.rmdir()


def stored_settings(directory: pathlib.Path) -> Settings | None:
    """The settings of the sweep in `directory`, None if there is no sweep. Raises UsageError if it can't be read."""
    try:
        return read_sweep_file(directory)[0]
    except FileNotFoundError:
        return None


def read_sweep_file(directory: pathlib.Path) -> tuple[Settings, list[Space]]:
    """The settings of the sweep in `directory`, and the search spaces of its hyper-parameter sets, the first one first. Raises
    UsageError if they can't be read, and FileNotFoundError if there is no sweep."""
    path = directory / SWEEP
    try:
        known = json.loads(read_regular(path, _MAX_BYTES))
        if not isinstance(known, dict) or known.keys() - {"extension"} != {"settings", "spaces"}:
            raise ValueError("it holds no JSON object of settings and spaces")
        spaces = list(map(Space.from_json, known["spaces"]))
        if "extension" in known:
            foreign = ForeignSettings.of(known["settings"], spaces, **known["extension"])
            if foreign is not None:
                return foreign, spaces
        return _checked_settings(known["settings"]), spaces
    except FileNotFoundError:
        raise
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, UsageError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(
            f"{str(path)!r} cannot be read as a sweep's settings ({reason}): restore it or use another --output_dir"
        ) from error


def _checked_settings(values: object) -> Settings:
    """The settings that a file names, each as its option would take it. Raises ValueError that names a wrong one."""
    return Settings(**_checked_values(values))


def _checked_values(values: object, unknown: typing.Collection[str] = ()) -> dict[str, typing.Any]:
    """The values of settings that a file names, each as its option would take it; of those in `unknown` any that could be a
    name. Raises ValueError that names a wrong one."""
    fields = {field.name: field for field in dataclasses.fields(Settings)}
    if not isinstance(values, dict):
        raise ValueError("it holds no JSON object")
    for name, value in values.items():
        if name not in fields:
            raise ValueError(f"it has an unknown setting {shown(name)}")
        if value is None and fields[name].default is None:
            continue
        try:
            parse = is_name if name in unknown else fields[name].metadata["parse"]
            fits = parse(str(value)) == value
        except argparse.ArgumentTypeError as error:
            raise ValueError(f"{name}: {error}") from error
        if not fits:
            raise ValueError(f"{name} {shown(value)} has the wrong type")
    return values


# Sweeps of one's own code

# What each setting can name
_REGISTRIES: dict[str, Registry] = {
    "model_arch": models.REGISTRY,
    "dataset": datasets.REGISTRY,
    "algorithm": algorithms.REGISTRY,
    "partition": partition.REGISTRY,
    "augmentation": augmentation.REGISTRY,
}


def extension_names(settings: Settings) -> dict[str, str]:
    """{setting: name} of what `settings` name and an extension has added."""
    values = settings.values()
    return {name: values[name] for name, registry in _REGISTRIES.items() if values[name] in registry.owners}


class ForeignSettings(Settings):
    """The settings of a sweep that was made with extensions which this process has not loaded, as the sweep's file describes
    them. They can be shown, compared and deleted, not run.

    files   the extensions
    space   the search space that was used last, if any
    """

    files: list[str]
    space: Space | None
    _defaults: dict[str, typing.Any]
    _registered_algorithm: str
    __slots__ = ("_defaults", "_registered_algorithm", "files", "space")  # so that vars() has nothing but settings

    @classmethod
    def of(
        cls, settings: object, spaces: list[Space], files: object, names: dict, defaults: object
    ) -> "ForeignSettings | None":
        """None if this process knows all `names`. Raises ValueError if a value is wrong."""
        if not (isinstance(names, dict) and names.keys() <= _REGISTRIES.keys() and all(map(is_name, names.values()))):
            raise ValueError(f"it has unknown names {shown(names)}")
        if all(value in _REGISTRIES[name] for name, value in names.items()):
            return None
        if not (isinstance(files, list) and all(isinstance(file, str) for file in files)):
            raise ValueError(f"it has unknown files {shown(files)}")
        values, theirs = _checked_values(settings, names), _checked_values(defaults, names)
        if values.keys() != theirs.keys():
            raise ValueError("it lacks settings")
        new = {field.name: field.default for field in dataclasses.fields(Settings) if field.name not in values}
        values, theirs = values | new, theirs | new  # a version before may not have had each setting
        this = object.__new__(cls)
        more = {"files": files, "space": spaces[-1] if spaces else None, "_defaults": theirs}
        registered = names["algorithm"] if "algorithm" in names else algorithms.canonical(values["algorithm"])
        for name, value in (values | more | {"_registered_algorithm": registered}).items():
            object.__setattr__(this, name, value)
        return this

    def default_of(self, name: str) -> typing.Any:
        return self._defaults[name]

    def with_rounds(self, rounds: int) -> "ForeignSettings":
        this = object.__new__(ForeignSettings)
        for name in (*names_of(Settings), *self.__slots__):
            object.__setattr__(this, name, getattr(self, name))
        object.__setattr__(this, "rounds", rounds)
        return this

    @property
    def registered_algorithm(self) -> str:
        return self._registered_algorithm

    @property
    def needed(self) -> str:
        """The options that load the extensions."""
        return shlex.join(command_words({"extension": tuple(self.files)}))
