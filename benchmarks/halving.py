"""Replay halving on recorded sweeps: the share of the rounds that it takes, and the test accuracy that it loses.

    python collect_results.py --output_dir DIR --export FILE
    python benchmarks/halving.py FILE …

Each file has full sweeps, every set with all trials and rounds. Each of --resamples sweeps has --sets of the recorded sets,
drawn without replacement, with their trials in a random order. Regret is the test accuracy of the set that the full sweep
picks minus that of the set that halving picks, both over all trials. The next column has the regret that 5 % of the resampled
sweeps exceed. Random search at the same cost picks the best of as many full sets, at least one, as halving's rounds pay for.
Sets that lack a trial which others have count as diverged. Sets without any trial are not in such a file.
"""

import argparse
import pathlib
import sys
from collections.abc import Iterator

import numpy as np
import pandas
from tabulate import tabulate

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from federated.halving import Candidate, Halving, cost, standings
from federated.reporting.collect import SWEEP


class Recorded:
    """A sweep of an exported file: curves of validation and test accuracy [sets, trials, rounds], NaN if not evaluated or not
    there."""

    def __init__(self, name: str, rows: pandas.DataFrame) -> None:
        self.name, self.eval_every = name, int(rows["eval_every"].iloc[0])
        self.rounds = int(rows["round"].max())
        index = pandas.MultiIndex.from_product(
            [rows["hash"].unique(), sorted(rows["trial_seed"].unique()), range(1, self.rounds + 1)]
        )
        shape = tuple(map(len, index.levels))
        curves = rows.set_index(["hash", "trial_seed", "round"])[["val_acc", "accuracy"]].reindex(index)
        self.val_acc, accuracy = (curves[name].to_numpy().reshape(shape) for name in ("val_acc", "accuracy"))
        self.has_diverged = np.isnan(self.val_acc[:, :, -1])  # [sets, trials]
        best = np.nan_to_num(self.val_acc, nan=-1).argmax(axis=2)[:, :, None]
        self.score = np.take_along_axis(self.val_acc, best, 2).mean(axis=(1, 2))  # NaN if a trial is missing
        self.accuracy = np.take_along_axis(accuracy, best, 2).mean(axis=(1, 2))

    def accuracy_of_best(self, sets: np.ndarray) -> float:
        """The accuracy of the best of these sets over all trials; 0 if all diverged."""
        sets = sets[~np.isnan(self.score[sets])]
        return float(self.accuracy[sets[self.score[sets].argmax()]]) if len(sets) else 0.0

    def halved(self, plan: Halving, sets: np.ndarray, first: int) -> np.ndarray:
        """The sets that reach the last rung, if trial `first` is the one that all rungs have."""
        candidates = {
            str(each): Candidate(
                number,
                () if self.has_diverged[each, first] else self.val_acc[each, first],
                bool(self.has_diverged[each].any()),
            )
            for number, each in enumerate(sets)
        }
        found = standings(plan.ladder(len(sets), self.rounds, self.eval_every), candidates)
        last = [int(name) for name, standing in found.items() if standing.rounds == self.rounds and not standing.is_stopped]
        return np.array(last, dtype=int)


def replay(recorded: Recorded, plan: Halving, sets: int, resamples: int) -> tuple[float, np.ndarray, np.ndarray]:
    """Share of the rounds, and the regrets of halving and of random search, one for each resampled sweep."""
    rng = np.random.default_rng(0)
    there, trials = recorded.val_acc.shape[:2]
    ladder = plan.ladder(sets, recorded.rounds, recorded.eval_every)
    share = cost(ladder, trials) / (sets * trials * recorded.rounds)
    affordable = max(1, round(share * sets))
    regrets, of_random = [], []
    for _ in range(resamples):
        drawn = rng.choice(there, sets, replace=False)
        best = recorded.accuracy_of_best(drawn)
        finalists = recorded.halved(plan, drawn, int(rng.integers(trials)))
        regrets.append(best - recorded.accuracy_of_best(finalists))
        of_random.append(best - recorded.accuracy_of_best(rng.choice(drawn, affordable, replace=False)))
    return share, np.array(regrets), np.array(of_random)


def recorded_in(files: list[pathlib.Path]) -> Iterator[Recorded]:
    for path in files:
        readers = {".csv": pandas.read_csv, ".json": pandas.read_json, ".parquet": pandas.read_parquet}
        for _, rows in readers[path.suffix](path).groupby(SWEEP, sort=False):
            yield Recorded(f"{rows['dataset'].iloc[0]} {rows['algorithm'].iloc[0]}", rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=pathlib.Path, metavar="FILE")
    parser.add_argument("--sets", type=int, default=20)
    parser.add_argument("--resamples", type=int, default=500)
    parser.add_argument("--eta", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--min_rounds", type=int, nargs="+", default=[2, 3, 4, 6])
    parser.add_argument("--finalists", type=int, nargs="+", default=[2])
    args = parser.parse_args()
    recorded = list(recorded_in(args.files))
    rows = []
    for eta in args.eta:
        for min_rounds in args.min_rounds:
            for finalists in args.finalists:
                plan = Halving(eta, min_rounds, finalists)
                for each in recorded:
                    share, regrets, of_random = replay(each, plan, args.sets, args.resamples)
                    rungs = " ".join(str(rounds) for rounds, _ in plan.ladder(args.sets, each.rounds, each.eval_every))
                    worst = np.quantile(regrets, 0.95)
                    cells = [each.name, len(each.score), share, regrets.mean(), worst, of_random.mean()]
                    rows.append([eta, rungs, finalists, *cells])
    heads = ["eta", "rungs", "finalists", "study", "recorded sets", "share", "regret", "worst 5 %", "random search"]
    forms = ("", "", "", "", "", ".3f", ".4f", ".4f", ".4f")
    print(f"{args.sets} sets, {args.resamples} resampled sweeps\n")
    print(tabulate(rows, heads, tablefmt="github", floatfmt=forms))


if __name__ == "__main__":
    main()
