"""Statistics of finished trials for tables and pictures: the choice of rounds and settings, means and intervals, comparisons.

scipy.stats, which takes two seconds to import, is imported where it is used.
"""

import json

import numpy as np
import pandas

from federated.reporting.collect import HPARAM, SWEEP, TRIAL, hparams_of
from federated.search import Space

# Which rounds of a trial count, and which setting is the best; the first selection uses no test data
SELECTIONS = {
    "validation": "the round, and then the setting, with the best validation accuracy",
    "last": "the last round; the setting with the best validation accuracy in it",
    "oracle": "the round and the setting with the best accuracy on the test set itself, which nobody has in practice",
    "original": "all rounds pooled, and the setting with the best mean of them on the test set, which is what the port's "
    "original printed; ± is over rounds, not over trials",
}
DEFAULT_SELECTION = "validation"


# Columns of the rounds; all rows of a table report the same one as accuracy
TEST_SET, SHARES = "test_acc", "local_acc_weighted"


def judged_by(any_personal: bool) -> str:
    """The column of an accuracy that all sweeps have on the same samples. If clients of some sweep have models of their own, a
    test sample can only be classified by the model of the client whose share it lies in."""
    return SHARES if any_personal else TEST_SET


def judged(rounds: pandas.DataFrame, diverged: set[str]) -> pandas.DataFrame:
    """The rows of one sweep's rounds that were evaluated, for the trial seeds that all sets have: means over different seeds
    cannot be compared. Leaves out sets with a diverged trial, unless all sets have one, and sets that lack the most common
    seed."""
    evaluated = rounds.dropna(subset=["val_acc", "accuracy"])
    seeds = evaluated.groupby("hash", sort=False)["trial_seed"].agg(set)
    seeds = seeds[~seeds.index.isin(diverged)] if not set(seeds.index) <= diverged else seeds
    if seeds.empty:
        return evaluated
    most_common = seeds.explode().value_counts(sort=False).sort_index().idxmax()
    seeds = seeds[[most_common in each for each in seeds]]
    return evaluated[evaluated["hash"].isin(seeds.index) & evaluated["trial_seed"].isin(set.intersection(*seeds))]


def chosen(evaluated: pandas.DataFrame, selection: str = DEFAULT_SELECTION) -> pandas.DataFrame:
    """The rows that count of one sweep's `judged` rows: one for each trial, or all with `original`. Their column `score` ranks
    the settings."""
    trials = evaluated.groupby(["hash", "trial_seed"], sort=False)
    if selection == "original":
        rows = evaluated
    elif selection == "last":
        rows = trials.tail(1)
    else:
        rows = evaluated.loc[trials["val_acc" if selection == "validation" else "accuracy"].idxmax()]
    return rows.assign(score=rows["val_acc" if selection in ("validation", "last") else "accuracy"])


def ranked(rows: pandas.DataFrame, selection: str = DEFAULT_SELECTION, has_global_model: bool = True) -> pandas.DataFrame:
    """A row for each setting of one sweep's `chosen` rows, the best first, with means over trials. `has_global_model`: see
    federated.reporting.collect.Kind."""
    settings = []
    for _, group in rows.groupby("hash", sort=False):
        first = group.iloc[0]
        mean, deviation, low, high = mean_and_interval(group["accuracy"], independent=selection != "original")
        settings.append(
            {
                **{name: first[name] for name in (SWEEP, "hash", "hparams", "hparams_seed")},
                "accuracy": mean,
                "accuracy_std": deviation,
                "n": len(group),
                "accuracy_low": low,
                "accuracy_high": high,
                "score": group["score"].mean(),
                "val_acc": group["val_acc"].mean(),
                "test_acc": group["test_acc"].mean() if has_global_model else np.nan,
                **{name: group[name].mean() for name in rows if name.startswith("local_acc_")},
                **{name: first[name] for name in hparams_of(rows)},
            }
        )
    ranking = pandas.DataFrame(settings).sort_values("score", ascending=False, kind="stable", ignore_index=True)
    ranking.insert(1, "rank", ranking.index + 1)
    return ranking


RESAMPLES = 1000


def certainty(ranking: pandas.DataFrame, rows: pandas.DataFrame, held_out: dict) -> pandas.DataFrame:
    """How certain the choice of the best setting is. For each of a sweep's `ranked` settings: the share of bootstrap resamples
    in which it is `best`, and the share in which it is `as_good` as the setting of rank 1. A resample draws trial seeds, and in
    each of them clients, with replacement, the same for all settings. It keeps the rounds of the `chosen` rows. `held_out`: see
    Collected. NaN if there is one seed."""
    seeds = sorted(rows["trial_seed"].unique())
    if len(seeds) < 2:
        return pandas.DataFrame({"best": np.nan, "as_good": np.nan}, index=ranking.index)
    sweep, rounds = rows[SWEEP].iloc[0], rows.set_index(["hash", "trial_seed"])["round"]
    samples = [held_out[sweep, ranking["hash"][0], seed][1] for seed in seeds]  # a trial's split is the same for all settings
    of_seeds = [  # of each seed, [settings, clients]
        np.nan_to_num([held_out[sweep, each, seed][0][:, rounds[each, seed] - 1] for each in ranking["hash"]]).astype(float)
        for seed in seeds
    ]
    accuracies, weights = np.concatenate(of_seeds, axis=1).T, np.concatenate(samples)  # of all clients of all seeds
    counts = np.array([np.count_nonzero(each) for each in samples])
    clients, first = np.flatnonzero(weights), np.cumsum(counts) - counts  # those that can be drawn, and each seed's first
    rng = np.random.default_rng(0)
    scores = np.zeros((RESAMPLES, len(ranking)))
    for score in scores:
        chosen = rng.integers(len(seeds), size=len(seeds))
        repeats = counts[chosen]  # each seed's clients are drawn at once, for it each time that it was
        drawn = clients[np.repeat(first[chosen], repeats) + rng.integers(np.repeat(repeats, repeats))]
        totals = np.add.reduceat(weights[drawn], np.cumsum(repeats) - repeats)
        shares = np.bincount(drawn, weights[drawn] / np.repeat(totals, repeats), len(weights))
        score[:] = shares @ accuracies
    scores = scores.round(12)  # so that sums of the same values in another order are equal
    best = np.bincount(scores.argmax(axis=1), minlength=len(ranking)) / RESAMPLES
    return pandas.DataFrame({"best": best, "as_good": (scores >= scores[:, :1]).mean(axis=0)}, index=ranking.index)


def of_space(ranking: pandas.DataFrame, space: Space) -> pandas.DataFrame:
    """The rows of a ranking whose settings come from a search space."""
    comes = [
        list(space.sets(number, 1)) == [(number, json.loads(hparams))]
        for number, hparams in zip(ranking["hparams_seed"], ranking["hparams"])
    ]
    return ranking[comes].reset_index(drop=True)


def by_round(of_best: pandas.DataFrame) -> pandas.DataFrame:
    """The curve of one setting's rounds, a row for each that was evaluated: mean accuracy over trials, its sample standard
    deviation as `deviation`, 0 for one trial, and the mean `bytes_sent`."""
    rounds = of_best.dropna(subset=["accuracy"]).groupby("round")
    deviation = rounds["accuracy"].std(ddof=1).fillna(0)
    return pandas.DataFrame(
        {"accuracy": rounds["accuracy"].mean(), "deviation": deviation, "bytes_sent": rounds["bytes_sent"].mean()}
    )


def of_clients(rows: pandas.DataFrame, accuracies: dict) -> np.ndarray:
    """[trials, clients]: each client's accuracy in the trials of one setting's `chosen` rows, from Collected.of_clients. It is
    the mean over the rounds that count, of which only `original` has several. NaN if a client has no test samples."""
    trials = rows.groupby(TRIAL, sort=False)["round"]
    return np.array([accuracies[trial][:, rounds.to_numpy() - 1].mean(axis=1, dtype=float) for trial, rounds in trials])


def mean_and_interval(values: pandas.Series, independent: bool = True) -> tuple[float, float, float, float]:
    """Mean, sample standard deviation, and the bounds of the 95 % interval of the mean by Student's t. For one value all but
    the mean are NaN; if values are not `independent` of each other, the bounds are."""
    from scipy.special import stdtrit  # the quantiles of t, without the rest of scipy.stats

    n, mean, deviation = len(values), values.mean(), values.std(ddof=1)
    half = stdtrit(n - 1, 0.975) * deviation / np.sqrt(n) if n > 1 and independent else np.nan
    return mean, deviation, mean - half, mean + half


def cost(rounds: pandas.DataFrame, of_best: pandas.DataFrame, target: float | None = None) -> dict:
    """The cost of one sweep: seconds of training, of all trials and the mean of one. For the best setting, with the judged
    rounds `of_best`: bytes sent by a trial, and the rounds, seconds and bytes until the reported accuracy first reached
    `target`, as means over the trials that reached it."""
    ends = rounds.groupby(["hash", "trial_seed"])["seconds"].max()
    spent = {
        "seconds_total": ends.sum(),
        "seconds_mean": ends.mean(),
        "bytes_sent": of_best.groupby("trial_seed")["bytes_sent"].max().mean(),
    }
    if target is not None:
        reached = of_best[of_best["accuracy"] >= target].groupby("trial_seed").first()
        spent |= {f"target_{name}": reached[name].mean() for name in ("round", "seconds", "bytes_sent")}
        spent |= {"target_reached": len(reached), "target_trials": of_best["trial_seed"].nunique()}
    return spent


def differences(ours: dict, theirs: dict) -> list[str]:
    """How two sweeps differ in the values that have to be equal for a comparison. A value that only one of them has follows
    from another difference."""
    both = [name for name in ours if name in theirs]
    return [f"{name} {ours[name]} instead of {theirs[name]}" for name in both if ours[name] != theirs[name]]


def compare(chosen: dict[str, pandas.DataFrame], groups: list[int], references: dict[int, str]) -> pandas.DataFrame:
    """Paired t-tests of the chosen rows of each sweep's best setting against those of the reference of its group, over the
    trial seeds that both have. `groups` has a number for each sweep; sweeps with the same number are compared if their
    group has a reference. p_holm is corrected for the tests of the group (Holm, 1979)."""
    tests = []
    accuracies = {sweep: rows.set_index("trial_seed")["accuracy"] for sweep, rows in chosen.items()}
    for (sweep, accuracy), group in zip(accuracies.items(), groups):
        reference = references.get(group, sweep)
        if reference == sweep:
            continue
        both = pandas.concat([accuracy, accuracies[reference]], axis=1, join="inner", keys=("ours", "theirs"))
        mean, deviation, low, high = mean_and_interval(both["ours"] - both["theirs"])
        tests.append(
            {
                SWEEP: sweep,
                "group": group,
                "against": reference,
                "difference": mean,
                "difference_std": deviation,
                "n": len(both),
                "difference_low": low,
                "difference_high": high,
                "p": _paired_p(both["ours"], both["theirs"]),
            }
        )
    comparison = pandas.DataFrame(tests)
    if tests:
        comparison["p_holm"] = comparison.groupby("group")["p"].transform(holm)
    return comparison.drop(columns="group", errors="ignore")


def _paired_p(ours, theirs) -> float:
    """The p-value of the two-sided test; NaN if the differences do not vary, as t is undefined then."""
    from scipy.stats import ttest_rel

    if (ours - theirs).nunique() < 2:
        return np.nan
    return float(ttest_rel(ours, theirs).pvalue)


def holm(p: pandas.Series) -> pandas.Series:
    """p-values corrected for their number (Holm, Scandinavian Journal of Statistics 1979). NaN does not count as a test."""
    ascending = p.dropna().sort_values()
    factors = np.arange(len(ascending), 0, -1)
    return (ascending * factors).cummax().clip(upper=1).reindex(p.index)


def detectable(n: int) -> float:
    """The least difference that a two-sided paired t-test of n pairs at level 0.05 finds in 80 % of cases, in standard
    deviations of the differences."""
    from scipy.optimize import brentq
    from scipy.stats import nct, t

    bound = t.ppf(0.975, n - 1)
    return brentq(lambda size: nct.sf(bound, n - 1, size * np.sqrt(n)) - 0.8, 0.01, 100)


ENOUGH_PAIRS = 10  # so many let a paired t-test find a difference as large as its deviation in 80 % of cases


def importance(ranking: pandas.DataFrame, hparams: list[str]) -> pandas.DataFrame:
    """How much each of `hparams` mattered in one sweep's `ranked` settings: the absolute value of Spearman's rank
    correlation with the validation accuracy. It sees what rises or falls with a hyper-parameter, not an optimum within its
    range. NaN if a hyper-parameter has one value only."""
    from scipy.stats import spearmanr

    rows = []
    for name in hparams:
        varies = ranking[name].nunique() > 1 and ranking["val_acc"].nunique() > 1
        correlation = spearmanr(ranking[name], ranking["val_acc"]).statistic if varies else np.nan
        rows.append(
            {
                "hparam": name.removeprefix(HPARAM),
                "importance": abs(correlation),
                "correlation": correlation,
                "settings": len(ranking),
            }
        )
    return pandas.DataFrame(rows).sort_values("importance", ascending=False, kind="stable", ignore_index=True)


def expected_best(ranking: pandas.DataFrame) -> pandas.Series:
    """The expected best validation accuracy of k random draws, for k from 1 to their number n (Dodge et al., EMNLP 2019,
    section 3.1, equation 8): with V(1) <= … <= V(n) the draws' accuracies, the sum of V(i) ((i/n)^k - ((i-1)/n)^k). The
    defaults are no draw and do not count."""
    values = np.sort(ranking.loc[ranking["hparams_seed"] > 0, "val_acc"].to_numpy())
    n = len(values)
    below = np.arange(n + 1)[None, :] / max(n, 1)
    budgets = np.arange(1, n + 1)
    probabilities = np.diff(below ** budgets[:, None], axis=1)
    return pandas.Series(probabilities @ values, index=pandas.Index(budgets, name="draws"), name="val_acc")
