"""Print the best setting of every sweep: picked on held-out validation data, reported on the test set.

For each trial the round with the best validation accuracy counts. The best setting is the one whose mean validation
accuracy over its trials is highest; its test accuracy is given as mean ± sample standard deviation over the trials.
"""

import dataclasses
import json
import math
import pathlib
import sys

import numpy as np
import pandas
from tabulate import tabulate

from federated import algorithms, options, trial
from federated.options import USAGE_ERROR, Parser, UsageError, shown
from hparams_registry import default_hparams

NOTHING_DONE = 1


def parse(argv):
    parser = Parser(prog="collect_results.py", description=__doc__)
    parser.add_argument(
        "--output_dir", nargs="+", type=options.directory, default=["sweep_logs"], metavar="DIR", help="of the sweeps"
    )
    return parser.parse_args(argv)


@dataclasses.dataclass
class Collected:
    """What the trials of the output directories say.

    rounds   one row a trial and round: model, dataset, algorithm, hash, trial_seed, round, and the metrics of that round,
             those of clients averaged by their samples
    settings {(model, dataset, algorithm): Settings}
    not_done directories of trials that are not done
    broken   what could not be read, with the reason
    """

    rounds: pandas.DataFrame
    settings: dict
    not_done: list
    broken: list


def collect(output_dirs: list[pathlib.Path]) -> Collected:
    """Read the finished trials of all sweeps. Raises UsageError where a directory is missing or sweeps do not fit together."""
    rows, settings, not_done, broken, seen = [], {}, [], [], set()
    for output_dir in output_dirs:
        if not output_dir.is_dir():
            raise UsageError(f"{str(output_dir)!r} is not a directory")
        for sweep_dir in sorted(path for path in output_dir.iterdir() if path.is_dir()):
            trials = sorted(sweep_dir.glob("*/trial_*"))
            try:
                stored = trial.stored_settings(sweep_dir)
            except UsageError as error:
                broken.append(str(error))
                continue
            if stored is None or stored.name != sweep_dir.name:
                if trials or stored is not None:
                    why = "is missing" if stored is None else f"is that of {stored.name}"
                    broken.append(f"{str(sweep_dir / trial.SWEEP)!r} {why}")
                continue
            sweep = (stored.model_arch, stored.dataset, algorithms.canonical(stored.algorithm))
            trial.check_same_settings(sweep_dir, settings.setdefault(sweep, stored), stored)
            for directory in trials:
                key = (sweep, directory.parent.name, directory.name)
                clients = [directory / f"client_{client}" for client in range(stored.num_clients)]
                try:
                    if not directory.is_dir():
                        raise Broken(f"{str(directory)!r} is no directory")
                    if not all((client / trial.DONE).exists() for client in clients):
                        not_done.append(directory)
                        continue
                    if key not in seen:
                        rows += rounds_of(sweep, stored, directory, [_read(client / trial.RESULTS) for client in clients])
                        seen.add(key)
                except Broken as error:
                    broken.append(str(error))
                except OSError as error:
                    broken.append(f"{str(error.filename or directory)!r}: {error.strerror}")
    return Collected(pandas.DataFrame(rows), settings, not_done, broken)


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


def rounds_of(sweep, settings, directory: pathlib.Path, clients: list[dict]) -> list[dict]:
    """The rows of one trial, from what its clients recorded. Raises Broken where that is not what they can have recorded."""
    model, dataset, algorithm = sweep
    names = list(default_hparams(algorithm, dataset, settings.local_optimizer))

    def require(holds, client, name):
        if not holds:
            path = directory / f"client_{client}" / trial.RESULTS
            raise Broken(f"{str(path)!r}: {name} {shown(clients[client].get(name))} cannot be")

    for number, client in enumerate(clients):
        for name, value in {"client_id": number, "model_arch": model, "dataset": dataset}.items():
            require(type(client.get(name)) is type(value) and client[name] == value, number, name)
        seed = client.get("trial_seed")
        require(type(seed) is int and f"trial_{seed}" == directory.name, number, "trial_seed")
        require(str(client.get("algorithm")).lower() == algorithm.lower(), number, "algorithm")
        for name in names:
            require(type(client.get(name)) in (int, float), number, name)
        for name, most in (("val_acc", 1), ("test_acc", 1), ("train_loss", math.inf), ("step_time", math.inf)):
            values = client.get(name)
            fit = isinstance(values, list) and len(values) == settings.rounds
            fit = fit and all(value is None or (type(value) in (int, float) and 0 <= value <= most) for value in values)
            require(fit, number, name)
        require(type(client.get("val_samples")) is int and client["val_samples"] >= 0, number, "val_samples")
        require(isinstance(client.get("train_indices"), list), number, "train_indices")
        require(client["test_acc"] == clients[0]["test_acc"], number, "test_acc")
        hparams = {name: client[name] for name in names}
        if trial.hparams_hash(hparams) != directory.parent.name:
            raise Broken(f"{str(directory / f'client_{number}' / trial.RESULTS)!r} is of other hyper-parameters: {hparams}")

    first = clients[0]
    val = _weighted([client["val_acc"] for client in clients], [client["val_samples"] for client in clients])
    train = _weighted([client["train_loss"] for client in clients], [len(client["train_indices"]) for client in clients])
    return [
        {
            "model": model,
            "dataset": dataset,
            "algorithm": algorithm,
            "hash": directory.parent.name,
            "hparams": hparams,
            "trial_seed": first["trial_seed"],
            "round": round + 1,
            "train_loss": train[round],
            "val_acc": val[round],
            "test_acc": first["test_acc"][round],
            "step_time": first["step_time"][round],
        }
        for round in range(settings.rounds)
    ]


def _weighted(lists, weights):
    """The mean over clients of each round, over those that have a value in it."""
    values = np.array(lists, dtype=float)
    weights = np.where(np.isnan(values), 0, np.array(weights, dtype=float)[:, None])
    with np.errstate(invalid="ignore"):
        return (np.nan_to_num(values) * weights).sum(axis=0) / weights.sum(axis=0)


def select(rounds: pandas.DataFrame) -> tuple[pandas.DataFrame, list[str]]:
    """The trials of one sweep, a row each, at their best validation round; and the settings left out, since they have
    fewer finished trials than others and a mean over fewer would not compare."""
    evaluated = rounds.dropna(subset=["val_acc"])
    trials = evaluated.loc[evaluated.groupby(["hash", "trial_seed"])["val_acc"].idxmax()]
    counts = trials.groupby("hash")["trial_seed"].count()
    left_out = counts[counts < counts.max()].index.tolist()
    return trials[~trials["hash"].isin(left_out)], left_out


def with_deviation(values: pandas.Series) -> str:
    """Mean ± sample standard deviation; the mean alone where there is one value."""
    mean = f"{values.mean():.4f}"
    return mean if len(values) == 1 else f"{mean} ± {values.std(ddof=1):.4f}"


def main(argv=None) -> int:
    args = parse(argv)
    try:
        collected = collect([pathlib.Path(directory) for directory in args.output_dir])
    except UsageError as error:
        print(f"collect_results.py: error: {error}", file=sys.stderr)
        return USAGE_ERROR
    for line in collected.broken:
        print(f"Ignored, cannot be read: {line}", file=sys.stderr)
    if collected.not_done:
        print(f"Ignored: {len(collected.not_done)} trials that are not done.", file=sys.stderr)
    if collected.rounds.empty:
        print(f"No finished trials in {', '.join(map(str, args.output_dir))}.", file=sys.stderr)
        return NOTHING_DONE

    table, statistics = [], []
    for sweep, rounds in collected.rounds.groupby(["model", "dataset", "algorithm"]):
        trials, left_out = select(rounds)
        if left_out:
            print(f"Ignored: {len(left_out)} settings with fewer finished trials than others.", file=sys.stderr)
        best = trials.groupby("hash", sort=False)["val_acc"].mean().idxmax()
        accuracy = trials[trials["hash"] == best]["test_acc"]
        settings = collected.settings[sweep]
        row = [settings.model_arch, settings.dataset, settings.algorithm, with_deviation(accuracy)]
        print(f"Best hyperparameter setting: {best} with mean test accuracy: {accuracy.mean():.4f}")
        for name, value in zip(("Model", "Dataset", "Algorithm", "Best Test Accuracy"), row):
            print(f"{name}: {value}")
        print()
        table.append(row)
        statistics.append((row[:3], trials["hash"].nunique(), len(accuracy), settings.num_clients))

    print("Table:\n")
    print(
        tabulate(
            table, headers=["Model", "Dataset", "Algorithm", "Best Test Accuracy"], tablefmt="github", disable_numparse=True
        )
    )
    print("\nJob Statistics:\n")
    for names, settings, trials, clients in statistics:
        if len(statistics) > 1:
            print(f"{' '.join(names)}:")
        print(f"Number of hyperparameter sets: {settings}")
        print(f"Number of trials: {trials}")
        print(f"Number of clients: {clients}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
