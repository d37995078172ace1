"""What finished trials say, as one table with a row for each trial and round."""

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

import numpy as np
import pandas

from federated import algorithms, trial
from federated.files import read_regular
from federated.metrics import over_clients
from federated.options import UsageError, shown
from federated.settings import SWEEP as SWEEP_FILE
from federated.settings import Settings, stored_settings
from federated.trial import Trial, hparams_hash


@dataclasses.dataclass(frozen=True)
class Kind:
    """What tables have to know of an algorithm, as its results say it."""

    personal: bool  # whether each client ends up with a model of its own
    has_global_model: bool  # whether the weights on the server are a model to be used


@dataclasses.dataclass
class Collected:
    """What the trials of the output directories say.

    rounds      one row a trial and round, see COLUMNS; the sweeps in the order of the algorithms' registry
    of_clients  {(model, dataset, algorithm, hash, trial_seed): float32 [clients, rounds]}: each client's accuracy on its share
                of the test set, NaN if it has none or nothing was evaluated
    settings    {(model, dataset, algorithm): Settings}
    kinds       {algorithm: Kind}
    data_dirs   {(model, dataset, algorithm): where the data lay}, if the results say so
    extensions  {(model, dataset, algorithm): the files of own code that computed it}, if there were any
    not_done    directories of trials that are not done
    diverged    those of them whose loss was no longer finite
    mixed       directories of trials that more than one version of the code computed
    computed_on {processors and devices, as a text: how many trials they computed}, if the results say so
    broken      what could not be read, with the reason
    """

    rounds: pandas.DataFrame
    of_clients: dict
    settings: dict
    kinds: dict
    data_dirs: dict
    extensions: dict
    not_done: list
    diverged: list
    mixed: list
    computed_on: collections.Counter
    broken: list

    def diverged_sets(self, sweep: tuple[str, str, str]) -> set[str]:
        """The hashes of the hyper-parameter sets of a sweep that have a trial that diverged."""
        name = self.settings[sweep].name
        return {directory.parent.name for directory in self.diverged if directory.parent.parent.name == name}


SWEEP = ["model", "dataset", "algorithm"]  # the columns that identify a sweep
TRIAL = [*SWEEP, "hash", "trial_seed"]  # those that identify a trial

# Of each row; the hyper-parameters follow, each in a column of its own, whose name keeps them apart from these and from what
# statistics adds
HPARAM = "hparams."
COLUMNS = {
    "model": "as in results.json, like dataset",
    "dataset": "",
    "algorithm": "in the registered spelling",
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
    "accuracy": "local_acc_weighted if clients have models of their own, else test_acc; a report has the one that it judges by",
    "round_seconds": "",
    "seconds": "so far",
    "bytes_sent": "so far, between server and clients, both ways",
}


def collect(output_dirs: list[pathlib.Path]) -> Collected:
    """Read the finished trials of all sweeps. Raises UsageError if a directory is missing."""
    trials, of_clients, kinds, data_dirs, extensions, seen = [], {}, {}, {}, {}, set()
    not_done, diverged, mixed, broken = [], [], [], []
    found: list[tuple[list[pathlib.Path], Settings]] = []  # the trials' directories of each sweep
    computed_on: collections.Counter = collections.Counter()
    for output_dir in output_dirs:
        if not output_dir.is_dir():
            raise UsageError(f"{str(output_dir)!r} is not a directory")
        for sweep_dir in sorted(path for path in output_dir.iterdir() if path.is_dir()):
            directories = sorted(sweep_dir.glob("*/trial_*"))
            try:
                stored = stored_settings(sweep_dir)
            except UsageError as error:
                broken.append(str(error))
                continue
            if stored is not None and stored.name == sweep_dir.name:
                found.append((directories, stored))
            elif directories or stored is not None:
                why = "is missing" if stored is None else f"is that of {stored.name}"
                broken.append(f"{str(sweep_dir / SWEEP_FILE)!r} {why}")
    keys = _keys([stored for _, stored in found])
    settings = dict(zip(keys, [stored for _, stored in found]))
    for sweep, (directories, stored) in zip(keys, found):
        for directory in directories:
            key = (sweep, directory.parent.name, directory.name)
            try:
                if not directory.is_dir():
                    raise BrokenError(f"{str(directory)!r} is no directory")
                if not (directory / trial.DONE).is_file():
                    not_done.append(directory)
                    if Trial(stored, {}, 0, 0, directory).has_failed():
                        diverged.append(directory)
                    continue
                if key in seen:
                    continue
                results = _read_results(directory, stored)
                once, by_round = _columns(sweep, directory, results)
                clients = _read_clients(directory / trial.CLIENTS, stored)
                _check_clients(directory, by_round, clients, results["personal"])
                trials.append((once, by_round | _totals(by_round)))
                of_clients[tuple(once[name] for name in TRIAL)] = clients["local_acc"]
                kinds[sweep[2]] = Kind(results["personal"], results["has_global_model"])
                seen.add(key)
                if (data_dir := _provenance(results).get("data_dir")) is not None:
                    data_dirs[sweep] = str(data_dir)
                if files := _extensions(results):
                    extensions[sweep] = files
                computed_on.update(_places(results))
                if len(_codes(results)) > 1:
                    mixed.append(directory)
            except BrokenError as error:
                broken.append(str(error))
            except OSError as error:
                broken.append(f"{str(error.filename or directory)!r}: {error.strerror}")
    return Collected(
        _frame(trials), of_clients, settings, kinds, data_dirs, extensions, not_done, diverged, mixed, computed_on, broken
    )


def _keys(sweeps: list[Settings]) -> list[tuple[str, str, str]]:
    """The key of each sweep in the frame: model, data set and algorithm. If an algorithm was run on a data set with unlike
    settings, what differs is part of the data set's name, so that only sweeps that are equal in it are compared."""
    values: dict[tuple[str, str, str], dict[str, set]] = {}  # of each setting of the sweeps that have the same key so far
    for sweep in sweeps:
        known = values.setdefault(_key(sweep), {})
        for name, value in vars(sweep).items():
            known.setdefault(name, set()).add(value)
    keys = []
    for sweep in sweeps:
        model, dataset, algorithm = _key(sweep)
        beside = [known for key, known in values.items() if key[:2] == (model, dataset)]
        differing = [name for name in vars(sweep) if name not in _KEY and any(len(known[name]) > 1 for known in beside)]
        named = [f"{name}={getattr(sweep, name)}" for name in differing if getattr(sweep, name) is not None]
        keys.append((model, ", ".join([dataset, *named]), algorithm))
    return keys


_KEY = ("model_arch", "dataset", "algorithm")


def _key(sweep: Settings) -> tuple[str, str, str]:
    return sweep.model_arch, sweep.dataset, sweep.registered_algorithm


def _frame(trials: list[tuple[dict, dict]]) -> pandas.DataFrame:
    """One row a trial and round, from the columns of each trial that have one value and those that have one a round."""
    if not trials:
        return pandas.DataFrame(columns=list(COLUMNS))
    order = {name: place for place, name in enumerate(algorithms.REGISTRY)}
    trials = sorted(trials, key=lambda trial: [(order.get(trial[0][name], len(order)), trial[0][name]) for name in SWEEP])
    constant = pandas.DataFrame([once for once, _ in trials])
    lengths = [len(by_round["round"]) for _, by_round in trials]
    frame = constant.loc[constant.index.repeat(lengths)].reset_index(drop=True)
    varying = {name: np.concatenate([by_round[name] for _, by_round in trials]) for name in trials[0][1]}
    frame = pandas.concat([frame, pandas.DataFrame(varying)], axis=1)
    hparams = [name for name in constant if name not in COLUMNS]
    return frame[[*COLUMNS, *hparams]]


def hparams_of(rounds: pandas.DataFrame) -> list[str]:
    """The columns of the hyper-parameters that a sweep's rows have."""
    return [name for name in rounds if name.startswith(HPARAM) and rounds[name].notna().any()]


class BrokenError(Exception):
    """A result file does not hold what a trial writes; the text names the file."""


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
    """The object in a trial's results.json, with its curves as float64 [curves, rounds]. Raises BrokenError or OSError."""
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
        raise BrokenError(f"{str(path)!r} is of other hyper-parameters than its directory: {shown(hparams)}")
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
        if np.fmin.reduce(values, axis=None) < 0 or np.fmax.reduce(values, axis=None) > largest:  # both pass over NaN
            raise BrokenError(f"{str(path)!r}: {name} has values that cannot be")
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
    """What numpy's format has before the values of such an array."""
    file = io.BytesIO()
    fields = {"descr": np.lib.format.dtype_to_descr(np.dtype(kind)), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, fields)
    return file.getvalue()


def _check_clients(directory, by_round, clients, personal: bool) -> None:
    """Raises BrokenError if the curves are not those of these clients, as if one of the files came from another trial."""
    train, val, local = (np.stack([clients[f"{name}_loss"], clients[f"{name}_acc"]], 1) for name in ("train", "val", "local"))
    test = np.stack([by_round["test_loss"], by_round["test_acc"]])
    samples = [clients[f"{name}_samples"] for name in ("train", "val", "local")]
    columns = over_clients(train, val, test, local, samples, personal)
    theirs, ours = np.stack(list(columns.values())), np.stack([by_round[name] for name in columns])
    with np.errstate(invalid="ignore"):  # float32 here, float64 there
        is_near = (np.abs(theirs - ours) <= 1e-5 + 1e-4 * np.abs(ours)) | (np.isnan(theirs) & np.isnan(ours))
    if not is_near.all():
        name = list(columns)[int(np.flatnonzero(~is_near.all(axis=1))[0])]
        raise BrokenError(f"{str(directory / trial.CLIENTS)!r} is not of the trial in {trial.RESULTS} beside it: {name}")


def _columns(sweep, directory: pathlib.Path, results: dict) -> tuple[dict, dict]:
    """The columns of a trial that have one value, and those that have one a round."""
    once = dict(zip(SWEEP, sweep)) | {
        "hash": directory.parent.name,
        "hparams": json.dumps(results["hparams"], sort_keys=True),
        "hparams_seed": results["hparams_seed"],
        "trial_seed": results["trial_seed"],
        **{f"{HPARAM}{name}": value for name, value in results["hparams"].items()},
    }
    rounds = len(results["curves"]["accuracy"])
    return once, {"round": np.arange(1, rounds + 1), **results["curves"]}


def _totals(by_round: dict) -> dict:
    """The columns of the frame that count up."""
    return {"seconds": np.cumsum(by_round["round_seconds"]), "bytes_sent": np.cumsum(by_round["bytes_sent"])}


def _provenance(results) -> dict:
    provenance = results.get("provenance")
    return provenance if isinstance(provenance, dict) else {}


def _extensions(results) -> tuple[str, ...]:
    """The paths of the extensions that the process which computed a trial last had loaded."""
    try:
        return tuple(str(each["path"]) for each in _provenance(results).get("extensions", []))
    except (KeyError, TypeError):
        return ()


def _codes(results) -> set:
    """The versions of the code that computed a trial."""
    try:
        return {str(run["code"]) for run in _provenance(results)["runs"]}
    except (KeyError, TypeError):
        return set()


def _places(results) -> list[str]:
    """One text that names the processors and devices that computed a trial, in their order; none if its results do not say."""
    try:
        runs = [f"{run['processor']}, {', '.join(map(str, run['devices']))}" for run in _provenance(results)["runs"]]
    except (KeyError, TypeError):
        return []
    return [" and then ".join(dict.fromkeys(runs))]
