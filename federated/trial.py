"""A trial: its settings, and its directory, which is all that is known of it.

OUTPUT_DIR/<model>_<dataset>_<algorithm>/sweep.json        the settings that all trials share
…/<md5 of hparams>/trial_<seed>/                           one trial: logs, lock, checkpoint, failed.json, events
…/trial_<seed>/client_<i>/results.json, done               one client's results; done is written last
"""

import argparse
import contextlib
import dataclasses
import fcntl
import fnmatch
import hashlib
import importlib.util
import json
import os
import pathlib
import re
import socket
import subprocess
import time

from federated import algorithms, augmentation, datasets, models, partition, slurm
from federated.options import UsageError, one_of, real, shown, whole


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


def hparams_hash(hparams: dict) -> str:
    return hashlib.md5(json.dumps(hparams, sort_keys=True).encode()).hexdigest()


# Files of a trial's directory
RESULTS, DONE, LOCK, FAILED, SWEEP, MODEL = "results.json", "done", "lock", "failed.json", "sweep.json", "model.pt"
CHECKPOINTS = CHECKPOINT, PREVIOUS, DAMAGED = "checkpoint.npz", "checkpoint.previous.npz", "checkpoint.damaged.npz"
EVENTS = "events.out.tfevents.*.trial"  # TensorBoard looks for names that begin so
# All that a trial writes there: nothing else is ever deleted
_OWN_FILES = re.compile(
    "|".join(map(re.escape, (RESULTS, DONE, FAILED, MODEL, *CHECKPOINTS)))
    + f"|{fnmatch.translate(EVENTS)}"
    + r"|(server|client_process_\d+)\.log|\.[a-z.]+\.[0-9a-f]+\.tmp"
)


def write_atomically(path: pathlib.Path, content):
    """Write a file that is whole or absent, whatever happens meanwhile. `content` is a text, or a function that is given the
    file to write to and called before the file gets its name."""
    temporary = path.with_name(f".{path.name}.{os.urandom(8).hex()}.tmp")  # a pid may be one on another host too
    try:
        with open(temporary, "wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content.encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


class Diverged(Exception):
    """A loss is no longer a finite number."""


NOT_LAUNCHED, INCOMPLETE, RUNNING, COMPLETE = "Not launched", "Incomplete", "Running", "Done"
QUEUED = "Queued"  # a launcher's queue tells; there is nothing on disk


@dataclasses.dataclass(frozen=True)
class Trial:
    """One trial: what it computes and where."""

    settings: Settings
    hparams: dict
    hparams_seed: int
    trial_seed: int
    directory: pathlib.Path

    def client_directory(self, client: int) -> pathlib.Path:
        return self.directory / f"client_{client}"

    def log(self, role: str) -> pathlib.Path:
        return self.directory / f"{role}.log"

    def is_done(self) -> bool:
        return all(path.with_name(DONE).exists() and path.exists() for path in self._results())

    def cut_results(self) -> list[pathlib.Path]:
        """The results.json of a trial that is done which are not whole, by their first and last byte: all of them are read
        where they are collected."""
        return [path for path in self._results() if not _is_braced(path)]

    def _results(self):
        return [self.client_directory(client) / RESULTS for client in range(self.settings.num_clients)]

    def state(self) -> str:
        """NOT_LAUNCHED, INCOMPLETE, RUNNING or COMPLETE, by what is on disk now."""
        if not self.directory.exists():
            return NOT_LAUNCHED
        if self.is_done():
            return COMPLETE
        owner = read_lock(self.directory)
        return RUNNING if owner is not None and owner.may_live() else INCOMPLETE

    def server_arguments(self) -> list[str]:
        """The command line of the trial's server, but for how it is run (address, processes, data)."""
        options = {
            **{name: value for name, value in dataclasses.asdict(self.settings).items() if value is not None},
            "hparams": json.dumps(self.hparams),
            "hparams_seed": self.hparams_seed,
            "output_dir": self.directory,
            "trial_seed": self.trial_seed,
        }
        return [part for name, value in sorted(options.items()) for part in (f"--{name}", str(value))]

    def description(self) -> dict:
        """How results.json tells which trial it is of."""
        shown = ("dataset", "model_arch", "algorithm")
        return {
            **{name: getattr(self.settings, name) for name in shown},
            "hparams_seed": self.hparams_seed,
            "trial_seed": self.trial_seed,
            **self.hparams,
        }

    def identity(self) -> dict:
        """All that its results are a function of."""
        return {
            **dataclasses.asdict(self.settings),
            "algorithm": algorithms.canonical(self.settings.algorithm),
            "hparams": self.hparams,
            "hparams_seed": self.hparams_seed,
            "trial_seed": self.trial_seed,
        }

    def prepare(self):
        """Make the directories of the trial and note its sweep's settings."""
        write_sweep_file(self.directory.parent.parent, self.settings)
        for client in range(self.settings.num_clients):
            self.client_directory(client).mkdir(parents=True, exist_ok=True)

    def delete(self):
        """Delete the files this trial made, and its directories where nothing else is left in them. Raises Locked."""
        if self.directory.is_symlink() or not self.directory.is_dir():
            return
        lock = Lock(self.directory)
        directories = self._directories()
        for directory in directories:
            for path in directory.iterdir():
                if _OWN_FILES.fullmatch(path.name) and not path.is_dir():
                    path.unlink()
        lock.release()
        for directory in reversed(directories):
            with contextlib.suppress(OSError):
                directory.rmdir()

    def _directories(self):
        """The trial's own directories that exist: no link is followed."""
        below = [path for path in self.directory.glob("client_*") if path.is_dir() and not path.is_symlink()]
        return [self.directory, *below]

    def remove_half_written(self):
        """Remove what a process that was killed had not finished writing."""
        for directory in self._directories():
            for path in directory.glob(".*.tmp"):
                path.unlink(missing_ok=True)

    def record_failure(self, role: str, reason: str, log_lines: list[str] = ()):
        """Write failed.json: which process ended the trial, why, the last lines of its log, and the earlier failures."""
        record = {
            "role": role,
            "reason": reason,
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "log": list(log_lines),
            "earlier": self.failures(),
        }
        write_atomically(self.directory / FAILED, json.dumps(record, indent=1) + "\n")

    def failures(self) -> list[dict]:
        """How the attempts at this trial failed so far, the first one first."""
        try:
            last = json.loads((self.directory / FAILED).read_text())
            return [*last.pop("earlier"), last]
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return []

    def check_not_taken_over(self):
        """Raises Locked where another process has taken over the lock that this one held."""
        owner = read_lock(self.directory)
        if owner is not None and owner != Owner.this_process():
            raise Locked(f"{str(self.directory)!r} was taken over by {owner}")

    def forget_attempts(self):
        """Once the trial is done: remove what only unfinished ones need. Their history is in the results."""
        for name in (FAILED, *CHECKPOINTS):
            (self.directory / name).unlink(missing_ok=True)

    def write_results(self, client: int, results: dict):
        """Write results.json of one client, whole, and then its done."""
        directory = self.client_directory(client)
        directory.mkdir(parents=True, exist_ok=True)
        write_atomically(directory / RESULTS, json.dumps(results, allow_nan=False) + "\n")
        write_atomically(directory / DONE, "")


def _is_braced(path: pathlib.Path) -> bool:
    try:
        with open(path, "rb") as file:
            first = file.read(1)
            file.seek(-2, os.SEEK_END)
            return (first, file.read()) == (b"{", b"}\n")
    except OSError:
        return False


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


# The lock of a trial, so that a live one is neither run twice nor deleted: its server holds it, which gets it from who
# starts the server.


@dataclasses.dataclass(frozen=True)
class Owner:
    """The process that holds a lock."""

    host: str  # and its Slurm job, as slurm.here() tells
    pid: int
    started: str  # tells it from a later process with the same pid

    @classmethod
    def this_process(cls):
        return cls(slurm.here(), os.getpid(), process_start(os.getpid()))

    def is_remote(self) -> bool:
        return slurm.host_of(self.host) != socket.gethostname()

    def may_live(self) -> bool:
        """False only where the owner is known to be dead: on another host, that is only known of Slurm jobs that ended."""
        if self.is_remote():
            return not slurm.is_over(self.host)
        return process_start(self.pid) == self.started

    def __str__(self):
        return f"process {self.pid} on {self.host}"


class Locked(Exception):
    """Another process holds the trial."""


def read_lock(directory: pathlib.Path) -> Owner | None:
    try:
        with open(directory / LOCK) as file:
            return _owner_in(file)
    except OSError:
        return None


def process_start(pid: int) -> str | None:
    """When the process `pid` of this host was started, in the system's own words; None where there is none."""
    try:
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
        state, start = re.match(r".*\) (\S)(?: \S+){18} (\d+)", stat, re.DOTALL).groups()
        return None if state in "ZX" else start
    except FileNotFoundError:
        if os.path.exists("/proc/self/stat"):
            return None
    except ProcessLookupError:
        return None
    listed = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return listed.stdout.strip() or None


class Lock:
    """Holds the lock of a trial's directory. Raises Locked where a process that may live holds it, unless that is `giver`,
    which has taken it to hand it on to this process."""

    def __init__(self, directory: pathlib.Path, giver: int | None = None):
        self._directory, self._owner = directory, Owner.this_process()
        with _open_lock(directory) as file:
            owner = _owner_in(file)
            given = owner is not None and (owner.host, owner.pid) == (self._owner.host, giver)
            if owner is not None and owner.may_live() and not given:
                raise Locked(f"{str(directory)!r} is being run by {owner}")
            file.truncate(0)
            file.write(json.dumps(dataclasses.asdict(self._owner)))

    def release(self, clean_up=lambda: None):
        """Call `clean_up` and remove the lock, if it was not handed on or who it was handed to is dead."""
        if not (self._directory / LOCK).exists():
            clean_up()
            return
        with _open_lock(self._directory) as file:
            owner = _owner_in(file)
            if owner is None or owner == self._owner or not owner.may_live():
                clean_up()
                (self._directory / LOCK).unlink(missing_ok=True)


def take_over(directory: pathlib.Path):
    """Remove the lock of a process on another host, of which only the user can know that it is dead."""
    owner = read_lock(directory)
    if owner is not None and owner.is_remote():
        with _open_lock(directory) as file:
            if _owner_in(file) == owner:
                (directory / LOCK).unlink()


@contextlib.contextmanager
def _open_lock(directory):
    """The lock file, made where it is missing, held so that one process at a time looks at it and changes it. POSIX record
    locks work on network file systems too."""
    while True:
        with open(directory / LOCK, "a+") as file:
            fcntl.lockf(file, fcntl.LOCK_EX)
            with contextlib.suppress(FileNotFoundError):  # removed while this process waited
                if os.path.samestat(os.fstat(file.fileno()), os.stat(directory / LOCK)):
                    yield file
                    return


def _owner_in(file) -> Owner | None:
    file.seek(0)
    try:
        return Owner(**json.load(file))
    except (ValueError, TypeError):
        return None
