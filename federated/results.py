"""What finished trials say, as one table with a row for each trial and round."""

import dataclasses
import functools
import json
import math
import pathlib

import numpy as np
import pandas

from federated import algorithms, trial
from federated.evaluation import over_clients
from federated.options import UsageError, shown
from federated.settings import SWEEP as SWEEP_FILE
from federated.settings import Settings, check_same_settings, stored_settings
from federated.trial import Trial
from hparams_registry import default_hparams


@dataclasses.dataclass
class Collected:
    """What the trials of the output directories say.

    rounds      one row a trial and round, see COLUMNS; the sweeps in the order of the algorithms' registry
    of_clients  {(model, dataset, algorithm, hash, trial_seed): float32 [clients, rounds]}: each client's accuracy on its share
                of the test set, NaN where it has none or nothing was evaluated
    settings    {(model, dataset, algorithm): Settings}
    data_dirs   {(model, dataset, algorithm): where the data lay}, of those that tell
    not_done    directories of trials that are not done
    diverged    those of them whose loss was no longer finite
    mixed       directories of trials that more than one version of the code computed
    broken      what could not be read, with the reason
    """

    rounds: pandas.DataFrame
    of_clients: dict
    settings: dict
    data_dirs: dict
    not_done: list
    diverged: list
    mixed: list
    broken: list


SWEEP = ["model", "dataset", "algorithm"]  # the columns that tell sweeps apart
TRIAL = [*SWEEP, "hash", "trial_seed"]  # those that tell trials apart

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
    "round": "from 1; what follows is of the model after so many rounds",
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
    "accuracy": "the one that tables report: local_acc_weighted where clients have models of their own, else test_acc",
    "round_seconds": "",
    "seconds": "so far",
    "bytes_sent": "so far, between server and clients, both ways",
}


def collect(output_dirs: list[pathlib.Path]) -> Collected:
    """Read the finished trials of all sweeps. Raises UsageError where a directory is missing or sweeps do not fit together."""
    trials, of_clients, settings, data_dirs, seen = [], {}, {}, {}, set()
    not_done, diverged, mixed, broken = [], [], [], []
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
            if stored is None or stored.name != sweep_dir.name:
                if directories or stored is not None:
                    why = "is missing" if stored is None else f"is that of {stored.name}"
                    broken.append(f"{str(sweep_dir / SWEEP_FILE)!r} {why}")
                continue
            sweep = (stored.model_arch, stored.dataset, algorithms.canonical(stored.algorithm))
            check_same_settings(sweep_dir, settings.setdefault(sweep, stored), stored)
            for directory in directories:
                key = (sweep, directory.parent.name, directory.name)
                clients = [directory / f"client_{client}" for client in range(stored.num_clients)]
                try:
                    if not directory.is_dir():
                        raise Broken(f"{str(directory)!r} is no directory")
                    if not all((client / trial.DONE).exists() for client in clients):
                        not_done.append(directory)
                        failures = Trial(stored, {}, 0, 0, directory).failures()
                        if failures and str(failures[-1].get("reason")).startswith("diverged"):
                            diverged.append(directory)
                        continue
                    if key in seen:
                        continue
                    read = [_read(client / trial.RESULTS) for client in clients]
                    once, by_round, accuracies = _columns(sweep, stored, directory, read)
                    trials.append((once, by_round))
                    of_clients[tuple(once[name] for name in TRIAL)] = accuracies
                    seen.add(key)
                    if (data_dir := _provenance(read[0]).get("data_dir")) is not None:
                        data_dirs[sweep] = str(data_dir)
                    if len(set().union(*map(_codes, read))) > 1:
                        mixed.append(directory)
                except Broken as error:
                    broken.append(str(error))
                except OSError as error:
                    broken.append(f"{str(error.filename or directory)!r}: {error.strerror}")
    return Collected(_frame(trials), of_clients, settings, data_dirs, not_done, diverged, mixed, broken)


def _frame(trials: list[tuple[dict, dict]]) -> pandas.DataFrame:
    """One row a trial and round, from what _columns gave of each."""
    if not trials:
        return pandas.DataFrame(columns=list(COLUMNS))
    constant = pandas.DataFrame([once for once, _ in trials])
    lengths = [len(by_round["round"]) for _, by_round in trials]
    frame = constant.loc[constant.index.repeat(lengths)].reset_index(drop=True)
    varying = {name: np.concatenate([by_round[name] for _, by_round in trials]) for name in trials[0][1]}
    frame = pandas.concat([frame, pandas.DataFrame(varying)], axis=1)
    order = {name: place for place, name in enumerate(algorithms.REGISTRY)}
    frame = frame.sort_values(SWEEP, kind="stable", key=lambda column: column.map(lambda name: order.get(name, name)))
    hparams = [name for name in constant if name not in COLUMNS]
    return frame[[*COLUMNS, *hparams]].reset_index(drop=True)


def hparams_of(rounds: pandas.DataFrame) -> list[str]:
    """The columns of the hyper-parameters that a sweep's rows have."""
    return [name for name in rounds if name.startswith(HPARAM) and rounds[name].notna().any()]


MOST_BYTES = 1 << 28  # of a results.json


class Broken(Exception):
    """What a results.json holds is not what a trial writes; the text names the file."""


def _read(path):
    """The JSON object in a file. Raises Broken or OSError."""

    def refuse(constant):
        raise ValueError(f"it holds {constant}")

    if path.stat().st_size > MOST_BYTES:
        raise Broken(f"{str(path)!r} is larger than {MOST_BYTES >> 20} MB")
    try:
        results = json.loads(path.read_text(), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise Broken(f"{str(path)!r}: {error}") from error
    if not isinstance(results, dict):
        raise Broken(f"{str(path)!r} holds no JSON object")
    return results


# What results.json has for each round, and the most it can be
BY_ROUND = {
    "train_loss": math.inf, "train_acc": 1, "val_loss": math.inf, "val_acc": 1, "test_loss": math.inf, "test_acc": 1,
    "local_test_loss": math.inf, "local_test_acc": 1, "step_time": math.inf, "bytes_sent": math.inf,
}  # fmt: skip

# Those that results of earlier versions do not have
ADDED = ("local_test_loss", "local_test_acc", "bytes_sent")

_hparam_names = functools.cache(lambda *draw: list(default_hparams(*draw)))


def _columns(sweep, settings: Settings, directory: pathlib.Path, clients: list[dict]) -> tuple[dict, dict, np.ndarray]:
    """Of one trial, from what its clients recorded: the columns with one value, those with one a round, and what Collected
    has of_clients. Raises Broken where that is not what they can have recorded."""
    model, dataset, algorithm = sweep
    absent = {name: [None] * settings.rounds for name in ADDED} | {"local_test_samples": 0}
    clients = [absent | client for client in clients]
    names = _hparam_names(algorithm, dataset, settings.local_optimizer)
    values = np.empty((len(clients), len(BY_ROUND), settings.rounds))  # null is NaN

    def require(holds, client, name):
        if not holds:
            path = directory / f"client_{client}" / trial.RESULTS
            raise Broken(f"{str(path)!r}: {name} {shown(clients[client].get(name))} cannot be")

    for number, client in enumerate(clients):
        for name, value in {"client_id": number, "model_arch": model, "dataset": dataset}.items():
            require(type(client.get(name)) is type(value) and client[name] == value, number, name)
        seed = client.get("trial_seed")
        require(type(seed) is int and f"trial_{seed}" == directory.name, number, "trial_seed")
        require(type(client.get("hparams_seed")) is int, number, "hparams_seed")
        require(str(client.get("algorithm")).lower() == algorithm.lower(), number, "algorithm")
        for name in names:
            require(type(client.get(name)) in (int, float), number, name)
        for name in BY_ROUND:
            listed = client.get(name)
            is_list = isinstance(listed, list) and len(listed) == settings.rounds
            require(is_list and set(map(type, listed)) <= _NUMBER_OR_NULL, number, name)
        try:
            values[number] = [client[name] for name in BY_ROUND]
        except OverflowError as error:
            raise Broken(f"{str(directory / f'client_{number}' / trial.RESULTS)!r}: {error}") from error
        for name in np.array(list(BY_ROUND))[_outside(values[number])]:
            require(False, number, name)
        for name in ("val_samples", "local_test_samples"):
            require(type(client.get(name)) is int and client[name] >= 0, number, name)
        require(isinstance(client.get("train_indices"), list), number, "train_indices")
        require(client["test_acc"] == clients[0]["test_acc"], number, "test_acc")
        hparams = {name: client[name] for name in names}
        if trial.hparams_hash(hparams) != directory.parent.name:
            raise Broken(f"{str(directory / f'client_{number}' / trial.RESULTS)!r} is of other hyper-parameters: {hparams}")

    first = clients[0]
    samples = [
        [len(client["train_indices"]) for client in clients],
        [client["val_samples"] for client in clients],
        [client["local_test_samples"] for client in clients],
    ]
    place = {name: place for place, name in enumerate(BY_ROUND)}
    losses = (place[f"{name}_loss"] for name in ("train", "val", "test", "local_test"))
    train, val, test, local_test = (values[:, loss : loss + 2] for loss in losses)  # the accuracy is next to the loss
    step_time, bytes_sent = values[0, place["step_time"]], values[0, place["bytes_sent"]]
    by_round = {
        "round": np.arange(1, settings.rounds + 1),
        **over_clients(train, val, test[0], local_test, samples, algorithms.load(algorithm).personal),
        "round_seconds": step_time,
        "seconds": np.cumsum(step_time),
        "bytes_sent": np.cumsum(bytes_sent),
    }
    for name, column in (("val_acc", by_round["val_acc"]), ("local_test_acc", by_round["accuracy"])):
        require(not np.isnan(column[-1]), 0, name)  # the last model always is evaluated
    once = dict(zip(SWEEP, sweep)) | {
        "hash": directory.parent.name,
        "hparams": json.dumps(hparams, sort_keys=True),
        "hparams_seed": first["hparams_seed"],
        "trial_seed": first["trial_seed"],
    }
    return once | {f"{HPARAM}{name}": value for name, value in hparams.items()}, by_round, local_test[:, 1].astype(np.float32)


_NUMBER_OR_NULL = {int, float, type(None)}
_MOST = np.array(list(BY_ROUND.values()))[:, None]


def _outside(values) -> np.ndarray:
    """Which of BY_ROUND have a number that cannot be, bool [metrics], in values [metrics, rounds], NaN aside."""
    return ((values < 0) | (values > _MOST) | np.isinf(values)).any(axis=1)


def _provenance(results) -> dict:
    provenance = results.get("provenance")
    return provenance if isinstance(provenance, dict) else {}


def _codes(results) -> set:
    """The versions of the code that computed a client's results."""
    try:
        return {str(run["code"]) for run in _provenance(results)["runs"]}
    except (KeyError, TypeError):
        return set()
