"""Reads finished trials into one table with a row for each trial and round."""

import collections
import dataclasses
import functools
import io
import json
import math
import pathlib
import typing
import zipfile
import zlib
from collections.abc import Iterable

import numpy as np
import pandas

from federated import algorithms, trial
from federated.files import read_regular
from federated.halving import Standing, standings_there
from federated.metrics import over_clients
from federated.options import UsageError, names_of, shown
from federated.search import Space
from federated.settings import SWEEP as SWEEP_FILE
from federated.settings import Settings, read_sweep_file
from federated.study import Conditions, check_conditions, meets
from federated.trial import Trial, hparams_hash


@dataclasses.dataclass(frozen=True)
class Kind:
    """The properties of an algorithm that tables depend on, from its results."""

    personal: bool  # whether each client ends up with a model of its own
    has_global_model: bool  # whether the weights on the server are a model to be used


@dataclasses.dataclass
class Collected:
    """The results of all trials in the output directories. A sweep's name is that of its directory, followed by the settings in
    which it differs from sweeps of the same name in other output directories.

    rounds      one row a trial and round, see COLUMNS, sweep by sweep
    directories {(sweep, hash, trial_seed): the directory of the trial}
    of_clients  {(sweep, hash, trial_seed): float32 [clients, rounds]}: each client's accuracy on its share of the test set,
                NaN if it has none or nothing was evaluated
    held_out    {(sweep, hash, trial_seed): (float32 [clients, rounds], [clients])}: each client's accuracy on what it holds
                out, NaN like the others, and the number of these samples
    in_shares   {(sweep, hash, trial_seed): how many samples all clients' shares of the test set have}
    stopped     {sweep: rows like those of `rounds`} of the first trials of sets that halving stopped, up to that round
    first_rungs {sweep: the rounds that all sets had before any was stopped}
    settings    {sweep: Settings}, in the order of tables: equal settings side by side, then as algorithms are registered
    spaces      {sweep: the search spaces of its hyper-parameter sets, the first one first}
    kinds       {algorithm: Kind}
    data_dirs   {sweep: the directory of the data}, if the results say so
    extensions  {sweep: the files of own code that computed it}, if there were any
    not_done    directories of trials that are not done
    shorter     those of them that have results, but of fewer rounds than others of their sweep
    unextended  {sweep: the rounds that it is to have}, if none of its trials has them yet
    diverged    those that are not done whose loss was no longer finite
    mixed       directories of trials that more than one version of the code computed
    failed      {directory of one that is not done: why its last attempt failed}, if it did
    computed_on {processors and devices, as a text: how many trials they computed}, if the results say so
    computed_by {version, code and packages, as a text: how many trials they computed}, likewise
    dates       the days on which a process of a trial began, likewise
    broken      what could not be read, with the reason
    """

    rounds: pandas.DataFrame = dataclasses.field(default_factory=pandas.DataFrame)
    directories: dict[tuple[str, str, int], pathlib.Path] = dataclasses.field(default_factory=dict)
    of_clients: dict[tuple[str, str, int], np.ndarray] = dataclasses.field(default_factory=dict)
    held_out: dict[tuple[str, str, int], tuple[np.ndarray, np.ndarray]] = dataclasses.field(default_factory=dict)
    in_shares: dict[tuple[str, str, int], int] = dataclasses.field(default_factory=dict)
    stopped: dict[str, pandas.DataFrame] = dataclasses.field(default_factory=dict)
    first_rungs: dict[str, int] = dataclasses.field(default_factory=dict)
    settings: dict[str, Settings] = dataclasses.field(default_factory=dict)
    spaces: dict[str, list[Space]] = dataclasses.field(default_factory=dict)
    kinds: dict[str, Kind] = dataclasses.field(default_factory=dict)
    data_dirs: dict[str, str] = dataclasses.field(default_factory=dict)
    extensions: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    not_done: list[pathlib.Path] = dataclasses.field(default_factory=list)
    shorter: list[pathlib.Path] = dataclasses.field(default_factory=list)
    unextended: dict[str, int] = dataclasses.field(default_factory=dict)
    diverged: list[pathlib.Path] = dataclasses.field(default_factory=list)
    mixed: list[pathlib.Path] = dataclasses.field(default_factory=list)
    failed: dict[pathlib.Path, str] = dataclasses.field(default_factory=dict)
    computed_on: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    computed_by: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    dates: set[str] = dataclasses.field(default_factory=set)
    broken: list[str] = dataclasses.field(default_factory=list)

    def frame(self) -> pandas.DataFrame:
        """`rounds` with a column for each setting."""
        return with_settings(self.rounds, self.settings)

    def clients(self) -> pandas.DataFrame:
        """One row a trial, client and round: train_loss, train_acc, val_loss, val_acc, local_loss, local_acc, NaN if the
        client was not trained or evaluated, and its numbers of samples. Raises BrokenError or OSError if a trial's files have
        changed since they were read."""
        frames = []
        for (sweep, hash, seed), directory in self.directories.items():
            _, arrays = read_trial(directory, self.settings[sweep])
            clients, rounds = arrays["train_loss"].shape
            places = {"client": np.repeat(np.arange(clients), rounds), "round": np.tile(np.arange(1, rounds + 1), clients)}
            values = {name: each.ravel() if each.ndim == 2 else np.repeat(each, rounds) for name, each in arrays.items()}
            frames.append(pandas.DataFrame({SWEEP: sweep, "hash": hash, "trial_seed": seed, **places, **values}))
        return pandas.concat(frames, ignore_index=True) if frames else pandas.DataFrame(columns=[*TRIAL, "client", "round"])

    def diverged_sets(self, sweep: str) -> set[str]:
        """The hashes of the hyper-parameter sets of a sweep that have a trial that diverged."""
        name = self.settings[sweep].name
        return {directory.parent.name for directory in self.diverged if directory.parent.parent.name == name}


SWEEP = "sweep"  # the column that identifies a sweep
TRIAL = [SWEEP, "hash", "trial_seed"]  # those that identify a trial

# The columns of each row. Each hyper-parameter has one more, whose prefix distinguishes it from these and from the columns of
# statistics
HPARAM = "hparams."
COLUMNS = {
    "sweep": "its name",
    "hash": "of the hyper-parameters: the directory of their trials",
    "hparams": "the hyper-parameters as JSON",
    "hparams_seed": "0 for the defaults, else that of the draw",
    "trial_seed": "",
    "round": "from 1; what follows is of the model after that many rounds",
    "train_loss": "mean over those that trained, by their training samples, like train_acc",
    "train_acc": "",
    "val_loss": "mean over clients, by what they hold out, like val_acc",
    "val_acc": "",
    "test_loss": "of the global model on the test set, like test_acc",
    "test_acc": "",
    "local_loss": "on the clients' shares of the test set, by their samples",
    "local_acc_weighted": "accuracy on the clients' shares of the test set, mean by their samples",
    "local_acc_mean": "the same, each client counting the same",
    "local_acc_worst": "of the worst client",
    "local_acc_std": "standard deviation over clients",
    "accuracy": "local_acc_weighted if clients have models of their own, else test_acc; in a report the one of all sweeps",
    "round_seconds": "",
    "seconds": "so far",
    "bytes_sent": "so far, between server and clients, both ways",
}


def collect(output_dirs: Iterable[str | pathlib.Path], where: Conditions | None = None) -> Collected:
    """Read the finished trials of all sweeps, or of those that meet `where`. Raises UsageError if a directory is missing, no
    sweep meets a condition, or two directories hold the same trial with different results."""
    collected = Collected()
    found = _sweeps(list(map(pathlib.Path, output_dirs)), collected.broken)
    if where:
        check_conditions([each.settings for each in found], where)
        found = [each for each in found if meets(each.settings, where)]
    names = _names([each.settings for each in found])
    trials, stopped = [], collections.defaultdict[str, list](list)
    for sweep, each in sorted(zip(names, found), key=lambda pair: _sort_key(pair[1].settings)):
        settings = collected.settings.setdefault(sweep, each.settings)
        known = collected.spaces.setdefault(sweep, [])
        known += [space for space in each.spaces if space not in known]
        if settings.rounds < each.asked:
            collected.unextended[sweep] = each.asked
        for directory, rounds in each.trials.items():
            standing = each.standings.get(directory.parent.name)
            try:
                if rounds < settings.rounds and standing is not None and standing.is_stopped and rounds == standing.rounds:
                    results, _ = read_trial(directory, settings.with_rounds(int(rounds)))
                    stopped[sweep].append(_columns(sweep, directory, results))
                    continue
                if not _is_done(directory, rounds, settings, collected):
                    continue
                results, clients = read_trial(directory, settings)
            except BrokenError as error:
                collected.broken.append(str(error))
                continue
            except OSError as error:
                collected.broken.append(f"{str(error.filename or directory)!r}: {error.strerror}")
                continue
            key = (sweep, directory.parent.name, results["trial_seed"])
            if key in collected.directories:
                _check_equal(collected.directories[key], directory, settings, numbers_of(results, clients))
                continue
            collected.directories[key] = directory
            trials.append(_columns(sweep, directory, results))
            collected.of_clients[key] = clients["local_acc"]
            collected.held_out[key] = clients["val_acc"], clients["val_samples"]
            collected.in_shares[key] = int(clients["local_samples"].sum())
            _note(collected, sweep, directory, results)
        if sweep in stopped:
            collected.stopped[sweep] = _frame(stopped[sweep]).drop_duplicates(["hash", "round"])
            collected.first_rungs[sweep] = min(each.rounds for each in each.standings.values())
    collected.rounds = _frame(trials)
    return collected


@dataclasses.dataclass
class _Sweep:
    """A sweep as it lies on disk."""

    trials: dict[pathlib.Path, float]  # by their directories, how many rounds they have results of
    settings: Settings  # with the rounds that its longest trials have
    spaces: list[Space]
    asked: int  # the rounds that it is to have
    standings: dict[str, Standing]  # of its sets, by their directories' names, if it is halved


def _sweeps(output_dirs: list[pathlib.Path], broken: list[str]) -> list[_Sweep]:
    """All sweeps. Adds a line to `broken` for each that cannot be read."""
    found = []
    for output_dir in output_dirs:
        if not output_dir.is_dir():
            raise UsageError(f"{str(output_dir)!r} is not a directory")
        for sweep_dir in sorted(path for path in output_dir.iterdir() if path.is_dir()):
            try:
                settings, spaces = read_sweep_file(sweep_dir)
                standings = standings_there(sweep_dir, settings)
            except UsageError as error:
                broken.append(str(error))
                continue
            except FileNotFoundError:
                if any(sweep_dir.glob("*/trial_*")):
                    broken.append(f"{str(sweep_dir / SWEEP_FILE)!r} is missing")
                continue
            if settings.name != sweep_dir.name:
                broken.append(f"{str(sweep_dir / SWEEP_FILE)!r} belongs to the sweep {settings.name}")
                continue
            trials = {directory: trial.rounds_done(directory) for directory in sorted(sweep_dir.glob("*/trial_*"))}
            there = max((int(each) for each in trials.values() if 0 < each <= settings.rounds), default=settings.rounds)
            found.append(_Sweep(trials, settings.with_rounds(there), spaces, settings.rounds, standings))
    return found


def _names(sweeps: list[Settings]) -> list[str]:
    """The names of sweeps. Sweeps of one directory name in several output directories get their differing settings added."""
    alike = collections.defaultdict(list)
    for sweep in sweeps:
        alike[sweep.name].append(sweep.values())
    return [
        ",".join(
            [sweep.name]
            + [
                f"{name}={value}"
                for name, value in sweep.values().items()
                if any(value != each[name] for each in alike[sweep.name])
            ]
        )
        for sweep in sweeps
    ]


# Settings that may follow from the algorithm
OF_ALGORITHM = ("algorithm", "local_optimizer", "optimizer_state")


def _sort_key(settings: Settings) -> list:
    """Sort key of sweeps."""
    values = settings.values()
    order = list(algorithms.REGISTRY)
    algorithm = values["algorithm"]
    position = order.index(algorithm) if algorithm in order else len(order)
    last = [position, *(values.pop(name) for name in OF_ALGORITHM)]
    return [*((value is not None, value) for value in values.values()), *last]


def _is_done(directory: pathlib.Path, rounds: float, settings: Settings, collected: Collected) -> bool:
    """True if a trial has results of all rounds; else lists it as not done. Raises BrokenError."""
    if not directory.is_dir():
        raise BrokenError(f"{str(directory)!r} is no directory")
    if rounds >= settings.rounds:
        return True
    collected.not_done.append(directory)
    if rounds:
        collected.shorter.append(directory)
    unfinished = Trial(settings, {}, 0, 0, directory)
    if unfinished.has_failed():
        collected.diverged.append(directory)
    if failures := unfinished.failures():
        collected.failed[directory] = trial.failure_line(failures[-1])
    return False


def numbers_of(results: dict, clients: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """{name: [..., 1 + rounds]}: every curve of a trial but times, and every array of its clients. Entry 0 is of the initial
    model; constants have no other."""
    numbers = {name: curve for name, curve in results["curves"].items() if name != "round_seconds"}
    for name, curve in numbers.items():
        initial = results.get(f"initial_{name}")
        numbers[name] = np.insert(curve, 0, initial if isinstance(initial, float) else math.nan)
    for name, values in clients.items():
        is_constant = name.endswith("_samples")
        numbers[f"{name} of clients"] = values[:, None] if is_constant else np.insert(values, 0, math.nan, axis=1)
    return numbers


def _check_equal(first: pathlib.Path, second: pathlib.Path, settings: Settings, theirs: dict[str, np.ndarray]) -> None:
    """Raises UsageError if two directories of the same trial have different numbers; `theirs` are those of the second."""
    ours = numbers_of(*read_trial(first, settings))
    if not all(np.array_equal(ours[name], theirs[name], equal_nan=True) for name in ours):
        raise UsageError(f"{str(first)!r} and {str(second)!r} hold the same trial with different results: collect one of them")


def _note(collected: Collected, sweep: str, directory: pathlib.Path, results: dict) -> None:
    """Add a trial's kind of algorithm and provenance to `collected`."""
    collected.kinds[collected.settings[sweep].registered_algorithm] = Kind(results["personal"], results["has_global_model"])
    if (data_dir := provenance_of(results).get("data_dir")) is not None:
        collected.data_dirs[sweep] = str(data_dir)
    if files := _extensions(results):
        collected.extensions[sweep] = files
    collected.computed_on.update(places_of(results))
    collected.computed_by[environment_of(results)] += 1
    collected.dates |= dates_of(results)
    if len(codes_of(results)) > 1:
        collected.mixed.append(directory)


def _frame(trials: list[tuple[dict, dict]]) -> pandas.DataFrame:
    """One row a trial and round, from the columns of each trial that have one value and those that have one a round."""
    if not trials:
        return pandas.DataFrame(columns=list(COLUMNS))
    constant = pandas.DataFrame([once for once, _ in trials])
    lengths = [len(by_round["round"]) for _, by_round in trials]
    frame = constant.loc[constant.index.repeat(lengths)].reset_index(drop=True)
    varying = {name: np.concatenate([by_round[name] for _, by_round in trials]) for name in trials[0][1]}
    frame = pandas.concat([frame, pandas.DataFrame(varying)], axis=1)
    hparams = [name for name in constant if name not in COLUMNS]
    return frame[[*COLUMNS, *hparams]]


def with_settings(rows: pandas.DataFrame, settings: dict[str, Settings]) -> pandas.DataFrame:
    """The rows, with a column for each setting after that of the sweep. The algorithm has its registered name."""
    of_each = pandas.DataFrame([each.values() for each in settings.values()], columns=names_of(Settings), dtype=object)
    places = pandas.Index(settings).get_indexer(rows[SWEEP])
    columns = {name: of_each[name].infer_objects().to_numpy()[places] for name in of_each}
    return pandas.concat([rows[[SWEEP]], pandas.DataFrame(columns, index=rows.index), rows.drop(columns=SWEEP)], axis=1)


def hparams_of(rounds: pandas.DataFrame) -> list[str]:
    """The columns of the hyper-parameters that a sweep's rows have."""
    return [name for name in rounds if name.startswith(HPARAM) and rounds[name].notna().any()]


class BrokenError(Exception):
    """A result file is not as a trial writes it; the text names the file."""


def read_trial(directory: pathlib.Path, settings: Settings) -> tuple[dict, dict[str, np.ndarray]]:
    """The object in results.json of a done trial with these `settings`, with its curves as float64 [rounds], and the arrays of
    its clients.npz. Raises BrokenError or OSError."""
    results = _read_results(directory, settings)
    clients = _read_clients(trial.clients_path(directory, settings.rounds), settings)
    _check_clients(directory, results["curves"], clients, results["personal"])
    return results, clients


MAX_BYTES = 1 << 28  # of results.json
MAX_CLIENTS_BYTES = 1 << 30  # of clients.npz, and of each array in it

# The curves of results.json, and the largest value of each
CURVES = {
    "train_loss": math.inf, "train_acc": 1, "val_loss": math.inf, "val_acc": 1, "test_loss": math.inf, "test_acc": 1,
    "local_loss": math.inf, "local_acc_weighted": 1, "local_acc_mean": 1, "local_acc_worst": 1, "local_acc_std": 1,
    "accuracy": 1, "round_seconds": math.inf, "bytes_sent": math.inf,
}  # fmt: skip
_LARGEST = np.array(list(CURVES.values()))[:, None]


def _read_results(directory: pathlib.Path, settings: Settings) -> dict:
    """The object in a trial's results.json, with its curves as float64 [rounds]. Raises BrokenError or OSError."""
    path = directory / trial.RESULTS

    def refuse(constant) -> typing.Never:
        raise ValueError(f"it holds {constant}")

    try:
        results: typing.Any = json.loads(read_regular(path, MAX_BYTES), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise BrokenError(f"{str(path)!r}: {error}") from error
    if not isinstance(results, dict):
        raise BrokenError(f"{str(path)!r} holds no JSON object")

    def require(holds, name, value) -> None:
        if not holds:
            raise BrokenError(f"{str(path)!r}: {name} has no valid value: {shown(value)}")

    ours: dict = vars(settings)
    theirs: typing.Any = results.get("settings")
    require(isinstance(theirs, dict) and theirs.keys() <= ours.keys(), "settings", theirs)
    for name, value in theirs.items():
        same = str(value).lower() == ours[name].lower() if name == "algorithm" else value == ours[name]
        require(same and type(value) is type(ours[name]), f"settings.{name}", value)
    seed = results.get("trial_seed")
    require(type(seed) is int and f"trial_{seed}" == directory.name, "trial_seed", seed)
    require(type(results.get("hparams_seed")) is int, "hparams_seed", results.get("hparams_seed"))
    for name in ("personal", "has_global_model"):
        require(type(results.get(name)) is bool, name, results.get(name))
    hparams: typing.Any = results.get("hparams")
    require(isinstance(hparams, dict), "hparams", hparams)
    for name, value in hparams.items():
        require(type(value) in (int, float), f"hparams.{name}", value)
    if hparams_hash(hparams) != directory.parent.name:
        raise BrokenError(f"{str(path)!r} has hyper-parameters that do not fit its directory's name: {shown(hparams)}")
    curves: typing.Any = results.get("curves")
    require(isinstance(curves, dict), "curves", curves)
    for name in CURVES:
        listed = curves.get(name)
        is_curve = isinstance(listed, list) and len(listed) == settings.rounds and set(map(type, listed)) <= _NUMBER_OR_NULL
        require(is_curve, f"curves.{name}", listed)
    try:
        values = np.array([curves[name] for name in CURVES], dtype=np.float64)  # null is NaN
    except OverflowError as error:
        raise BrokenError(f"{str(path)!r}: {error}") from error
    is_wrong = ((values < 0) | (values > _LARGEST) | np.isinf(values)).any(axis=1)
    for name in np.array(list(CURVES))[is_wrong]:
        require(False, f"curves.{name}", curves[name])
    for name in ("val_acc", "accuracy"):
        require(curves[name][-1] is not None, f"curves.{name}", curves[name])  # the last model is always evaluated
    return results | {"curves": dict(zip(CURVES, values))}


_NUMBER_OR_NULL = {int, float, type(None)}


def _read_clients(path: pathlib.Path, settings: Settings) -> dict[str, np.ndarray]:
    """The arrays of a trial's clients.npz. Allocates no more than these settings need, whatever the file promises. Raises
    BrokenError or OSError."""
    metrics = [f"{samples}_{what}" for samples in ("train", "val", "local") for what in ("loss", "acc")]
    shapes: dict[str, tuple[type, tuple[int, ...]]] = {
        **dict.fromkeys(metrics, (np.float32, (settings.num_clients, settings.rounds))),
        **dict.fromkeys(("train_samples", "val_samples", "local_samples"), (np.int64, (settings.num_clients,))),
    }
    try:
        with zipfile.ZipFile(io.BytesIO(read_regular(path, MAX_CLIENTS_BYTES))) as archive:
            if sorted(archive.namelist()) != sorted(f"{name}.npy" for name in shapes):
                raise BrokenError(f"{str(path)!r} holds the arrays {shown(archive.namelist())} instead of {list(shapes)}")
            arrays = {name: _read_array(archive, name, *shape) for name, shape in shapes.items()}
    except (ValueError, EOFError, NotImplementedError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise BrokenError(f"{str(path)!r}: {error}") from error
    for name, values in arrays.items():
        largest = 1 if name.endswith("_acc") else np.finfo(np.float32).max
        if np.fmin.reduce(values, axis=None) < 0 or np.fmax.reduce(values, axis=None) > largest:  # both ignore NaN
            raise BrokenError(f"{str(path)!r}: {name} has impossible values")
    return arrays


def _read_array(archive: zipfile.ZipFile, name: str, kind: type, shape: tuple[int, ...]) -> np.ndarray:
    """An array of `archive`. Raises ValueError if it is not of this kind and shape."""
    header, size = _header(kind, shape), math.prod(shape) * np.dtype(kind).itemsize
    if size > MAX_CLIENTS_BYTES:
        raise ValueError(f"{name} is larger than {MAX_CLIENTS_BYTES >> 20} MB")
    with archive.open(f"{name}.npy") as member:
        content = member.read(len(header) + size + 1)
    if not content.startswith(header):
        raise ValueError(f"{name} is not an array of {np.dtype(kind)} {list(shape)}")
    if len(content) != len(header) + size:
        raise ValueError(f"{name} has another length than its header says")
    return np.frombuffer(content, kind, offset=len(header)).reshape(shape)


@functools.cache
def _header(kind: type, shape: tuple[int, ...]) -> bytes:
    """The bytes that numpy's format puts before the values of such an array."""
    file = io.BytesIO()
    fields = {"descr": np.lib.format.dtype_to_descr(np.dtype(kind)), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, fields)
    return file.getvalue()


def _check_clients(directory: pathlib.Path, curves: dict, clients: dict[str, np.ndarray], personal: bool) -> None:
    """Raises BrokenError if the curves do not follow from these clients' metrics, as if a file came from another trial."""
    train, val, local = (np.stack([clients[f"{name}_loss"], clients[f"{name}_acc"]], 1) for name in ("train", "val", "local"))
    test = np.stack([curves["test_loss"], curves["test_acc"]])
    samples = [clients[f"{name}_samples"] for name in ("train", "val", "local")]
    columns = over_clients(train, val, test, local, samples, personal)
    theirs, ours = np.stack(list(columns.values())), np.stack([curves[name] for name in columns])
    with np.errstate(invalid="ignore"):  # float32 here, float64 there
        is_near = (np.abs(theirs - ours) <= 1e-5 + 1e-4 * np.abs(ours)) | (np.isnan(theirs) & np.isnan(ours))
    if not is_near.all():
        name = list(columns)[int(np.flatnonzero(~is_near.all(axis=1))[0])]
        raise BrokenError(f"{str(directory / trial.CLIENTS)!r} belongs to another trial than {trial.RESULTS} beside it: {name}")


def _columns(sweep: str, directory: pathlib.Path, results: dict) -> tuple[dict, dict]:
    """The columns of a trial that have one value, and those that have one a round."""
    once = {
        SWEEP: sweep,
        "hash": directory.parent.name,
        "hparams": json.dumps(results["hparams"], sort_keys=True),
        "hparams_seed": results["hparams_seed"],
        "trial_seed": results["trial_seed"],
        **{f"{HPARAM}{name}": value for name, value in results["hparams"].items()},
    }
    curves = results["curves"]
    so_far = {"seconds": np.cumsum(curves["round_seconds"]), "bytes_sent": np.cumsum(curves["bytes_sent"])}
    return once, {"round": np.arange(1, len(curves["accuracy"]) + 1), **curves, **so_far}


def provenance_of(results) -> dict:
    provenance = results.get("provenance")
    return provenance if isinstance(provenance, dict) else {}


def _extensions(results) -> tuple[str, ...]:
    """The paths of the extensions that a trial's last server process had loaded."""
    try:
        return tuple(str(each["path"]) for each in provenance_of(results).get("extensions", []))
    except (KeyError, TypeError):
        return ()


def codes_of(results) -> set:
    """The versions of the code that computed a trial."""
    try:
        return {str(run["code"]) for run in provenance_of(results)["runs"]}
    except (KeyError, TypeError):
        return set()


def environment_of(results) -> str:
    """One text that names the versions of the code and the packages that computed a trial, as far as its results say so."""
    provenance, names = provenance_of(results), ("version", "python", "torch", "numpy", "platform")
    parts = [f"{name} {provenance[name]}" for name in names if name in provenance]
    return ", ".join([f"code {' and '.join(sorted(codes_of(results)))}", *parts])


def dates_of(results) -> set[str]:
    """The days on which processes of a trial began, as YYYY-MM-DD."""
    try:
        return {str(run["time"])[:10] for run in provenance_of(results)["runs"]}
    except (KeyError, TypeError):
        return set()


def places_of(results) -> list[str]:
    """One text that names the processors and devices that computed a trial, in their order; none if its results do not say."""
    try:
        runs = [f"{run['processor']}, {', '.join(map(str, run['devices']))}" for run in provenance_of(results)["runs"]]
    except (KeyError, TypeError):
        return []
    return [" and then ".join(dict.fromkeys(runs))]
