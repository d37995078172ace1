"""Results as text tables, in each of the formats."""

import html
import itertools
import math
import typing
from collections.abc import Callable, Collection, Hashable, Sequence

import pandas
from tabulate import tabulate

from federated import privacy
from federated.reporting.collect import HPARAM, SWEEP, TRIAL
from federated.reporting.selection import DEFAULT_SELECTION, ENOUGH_PAIRS, RESAMPLES, SELECTIONS, SHARES, TEST_SET, detectable
from federated.settings import Settings

if typing.TYPE_CHECKING:
    from federated.reporting.report import Report

FORMATS = ("github", "latex", "csv", "json", "html")
NONE = "–"  # stands for a number that does not exist

HEADINGS = {
    "validation": "Best Test Accuracy",
    "last": "Test Accuracy (last round)",
    "oracle": "Test Accuracy (oracle)",
    "original": "Test Accuracy (original)",
}


# The accuracy by which rows are judged, as pictures name it
ACCURACY = {TEST_SET: "test accuracy", SHARES: "test accuracy on clients' shares"}


def heading(selection: str, judged_by: str) -> str:
    """The heading of the accuracy that all rows of a table report."""
    return HEADINGS[selection] + " on Clients' Shares" * (judged_by == SHARES)


def with_deviation(mean: float, deviation: float, digits: int = 4) -> str:
    """Mean ± sample standard deviation; the mean alone if there is one value."""
    return f"{mean:.{digits}f}" if pandas.isna(deviation) else f"{mean:.{digits}f} ± {deviation:.{digits}f}"


def number(value: float, spec: str = ".4f") -> str:
    return NONE if pandas.isna(value) else format(value, spec)


def interval(low: float, high: float) -> str:
    return NONE if pandas.isna(low) else f"{low:.4f} to {high:.4f}"


def epsilon(value: float) -> str:
    return "∞" if value == math.inf else number(value, ".2f")


def p_value(p: float) -> str:
    return NONE if pandas.isna(p) else "< 0.0001" if p < 0.0001 else f"{p:.4f}"


NAMED = {"model_arch": "Model", "dataset": "Dataset", "algorithm": "Algorithm"}  # settings that each table has, and their heads


def names(report: "Report", sweep: str) -> dict[str, str]:
    """The cells that identify a sweep: model, data set, the algorithm as the user wrote it, and each setting that varies."""
    settings = report.settings[sweep]
    return {NAMED.get(name, name): value_of(settings, name) for name in (*NAMED, *report.varying)}


def value_of(settings: Settings, name: str) -> str:
    """The value of a setting as tables show it."""
    value = getattr(settings, name)
    return NONE if value is None else str(value)


def summary(report: "Report") -> pandas.DataFrame:
    """The table of the best settings, a row a sweep, with the accuracy that they are judged by."""
    rows = []
    for _, row in report.best.iterrows():
        shown = {
            **names(report, row[SWEEP]),
            report.heading: with_deviation(row["accuracy"], row["accuracy_std"]),
            "n": _of(row["n"], row["num_trials_done"]) if row["n"] == row["num_trials"] else str(row["n"]),
            "95 % Interval": interval(row["accuracy_low"], row["accuracy_high"]),
            "Global": number(row["test_acc"]),
            "Clients (weighted)": number(row["local_acc_weighted"]),
            "Clients (mean)": number(row["local_acc_mean"]),
            "Worst Client": number(row["local_acc_worst"]),
            "Spread": number(row["local_acc_std"]),
        }
        if "epsilon" in row:
            shown["Epsilon"] = epsilon(row["epsilon"])
        if report.target is not None:
            some = f" ({row['target_reached']} of {row['target_trials']})" * (0 < row["target_reached"] < row["target_trials"])
            shown[f"Rounds to {report.target:g}"] = number(row["target_round"], ".1f") + some
            shown[f"Seconds to {report.target:g}"] = number(row["target_seconds"], ".1f")
        rows.append(shown)
    return pandas.DataFrame(rows)


def _of(number: int, all_there: int) -> str:
    return str(number) if number == all_there else f"{number} of {all_there}"


def notes(report: "Report") -> list[str]:
    """Notes that explain the accuracies."""
    lines = []
    if report.selection != DEFAULT_SELECTION:
        lines.append(f"Selection {report.selection!r}: {SELECTIONS[report.selection]}.")
    if report.personal:
        trials = pandas.concat(report.chosen.values())[TRIAL].itertuples(index=False, name=None)
        sizes = {report.collected.in_shares[trial] for trial in trials}
        size = f"{min(sizes)} to {max(sizes)}" if len(sizes) > 1 else str(min(sizes))
        lines.append(
            f"As clients have models of their own with {', '.join(report.personal)}, all rows are judged on the clients' "
            f"shares of the test set, {size} samples in a trial: each test sample by the model of the client whose share it "
            "lies in, or by the global model if that client has none of its own. A test sample that is in no client's share "
            "counts in Global only."
        )
    return lines


def notes_on_clients(report: "Report") -> list[str]:
    lines = [
        "Clients: accuracy on their own shares of the test set, the mean by their samples (weighted) and with each client "
        "counting the same (mean), the worst, and the standard deviation over clients (spread)."
    ]
    if report.varying:
        lines.append("Rows are compared if their settings and their numbers of hyper-parameter sets are equal.")
    return lines


def notes_on_trials(report: "Report") -> list[str]:
    """Notes on sweeps that are not compared, trials that do not count, and the search spaces."""
    lines = []
    rows_of = {row[SWEEP]: row for _, row in report.best.iterrows()}
    if "epsilon" in report.best:
        lines += _notes_on_privacy(report)
    for cell, sweeps in report.cells.items():
        if unlike := [sweep for sweep in sweeps if rows_of[sweep]["differs"]]:
            listed, reference = ", ".join(map(report.label, unlike)), rows_of[unlike[0]]["reference"]
            lines.append(f"Not compared with {reference} on {cell}, as settings or budgets differ: {listed}.")
    for _, rows in report.best.groupby("group", sort=False):
        if rows["trial_seeds"].nunique() > 1:
            seeds = ", ".join(f"{report.algorithm(row[SWEEP])} {row['trial_seeds']}" for _, row in rows.iterrows())
            lines.append(f"Means are over unlike trial seeds: {seeds}. Tests are over those that both have.")
        lines += [line for line in _unlike_domains(report, rows[SWEEP].tolist()) if line not in lines]
    lines += _certainty(report)
    for sweep, row in rows_of.items():
        title = report.title(sweep)
        if sweep in report.stopped:
            rounds = " or ".join(map(str, sorted(report.stopped[sweep]["rounds_run"].unique())))
            lines.append(
                f"{title}: halving stopped {len(report.stopped[sweep])} of {row['num_hparams']} hyper-parameter sets after "
                f"{rounds} of {report.settings[sweep].rounds} rounds of one trial. The others are ranked."
            )
        if row["trials_left_out"]:
            lines.append(
                f"{title} is judged on the trial seeds that all its sets have, {row['trial_seeds'].replace(' ', ', ')}; "
                f"{row['trials_left_out']} more finished trials are left out."
            )
        reasons = {"that lack trials which others have": "sets_unfinished", "with trials that diverged": "sets_diverged"}
        if left_out := [f"{row[column]} {reason}" for reason, column in reasons.items() if row[column]]:
            lines.append(f"{title}: hyper-parameter sets left out: {', '.join(left_out)}.")
        if len(report.spaces[sweep]) > 1:
            counts = [f"{len(rows)} from {space}" for space, rows in report.by_space(sweep)]
            lines.append(f"{title} has hyper-parameter sets of several search spaces: {'; '.join(counts)}.")
    return lines


NOISE = 0.05  # a setting is within noise of the best one if it is at least as good in this share of resamples


def _certainty(report: "Report") -> list[str]:
    """How sure the choice of each sweep's best setting is, if that can be said; one line for all whose choice is sure."""
    lines, sure, fewest = [], [], RESAMPLES
    for sweep, ranking in report.rankings.items():
        if len(ranking) < 2 or "best_in" not in ranking or pandas.isna(ranking["best_in"][0]):
            continue
        best, near = ranking.iloc[0], ranking[1:][ranking["as_good_in"][1:] >= NOISE]
        times = round(best["best_in"] * RESAMPLES)
        sets = (
            f"within noise of it: set {', '.join(map(str, near['hparams_seed']))}" if len(near) else "no other is within noise"
        )
        line = (
            f"{report.title(sweep)}: the best setting, set {best['hparams_seed']}, stays the best in {times} of {RESAMPLES} "
            f"bootstrap resamples of trial seeds and clients; {sets}."
        )
        if len(near):
            lines.append(line)
        else:
            sure.append(line)
            fewest = min(fewest, times)
    if len(sure) < 2:
        return lines + sure
    return [
        *lines,
        f"In {len(sure)} sweeps the best setting stays the best in at least {fewest} of {RESAMPLES} bootstrap resamples of "
        "trial seeds and clients; no other is within noise.",
    ]


def _notes_on_privacy(report: "Report") -> list[str]:
    """What epsilon means, and which it is where the table has no column for it."""
    deltas = " or ".join(f"{delta:.2g}" for delta in report.best["delta"].unique())
    values = [f"{report.title(row[SWEEP])} {epsilon(row['epsilon'])}" for _, row in report.best.iterrows()]
    listed = "" if report.columns is None else f" {'; '.join(values)}."
    lines = [
        f"Epsilon at delta {deltas}, of all global models of a trial together, by {privacy.PACKAGE}'s RDP accountant.{listed} "
        f"Sampling: {privacy.SAMPLING}; neighbours: {privacy.NEIGHBOURS}. The choice of rounds and hyper-parameters, what is "
        "printed of validation and test, and clients' own models are not private."
    ]
    if report.best["epsilon"].isna().any():
        lines.append(f"No epsilon, as {privacy.PACKAGE} is not installed: pip install {privacy.PACKAGE}, and collect again.")
    return lines


def _unlike_domains(report: "Report", sweeps: list[str]) -> list[str]:
    """Of sweeps that are compared, a line for each hyper-parameter that they share and did not tune over the same values."""
    domains: dict[str, dict[str, list[str]]] = {}
    for sweep in sweeps:
        for name in dict.fromkeys(name for space in report.spaces[sweep] for name in space.domains):
            of_sweep = dict.fromkeys(str(space.domains[name]) for space in report.spaces[sweep] if name in space.domains)
            domains.setdefault(name, {}).setdefault(" and ".join(of_sweep), []).append(report.algorithm(sweep))
    return [
        f"{name} was tuned over unlike domains: "
        + "; ".join(f"{', '.join(names)} over {text}" for text, names in tuned.items())
        + "."
        for name, tuned in domains.items()
        if len(tuned) > 1
    ]


def comparison(report: "Report") -> pandas.DataFrame:
    """The table of the paired tests."""
    return pandas.DataFrame(
        {
            **names(report, test[SWEEP]),
            "Against": test["against"],
            "Difference": NONE if not test["n"] else with_deviation(test["difference"], test["difference_std"]),
            "95 % Interval": interval(test["difference_low"], test["difference_high"]),
            "n": str(test["n"]),
            "p": p_value(test["p"]),
            "p (Holm)": p_value(test["p_holm"]),
        }
        for _, test in report.comparison.iterrows()
    )


def comparison_notes(tests: pandas.DataFrame) -> list[str]:
    """A note on the tests, and a warning if they have too few pairs to decide."""
    lines = [
        "Paired, two-sided t-tests of the best settings over trial seeds, corrected by Holm's method within equal settings."
    ]
    fewest = tests["n"].min()
    if fewest < 2:
        lines.append("Too few trials to tell: a test needs at least 2 seeds that both have.")
    elif fewest < ENOUGH_PAIRS:
        lines.append(
            f"n = {fewest} is too small to tell small differences: such a test finds, in 80 % of cases, one of at least "
            f"{detectable(fewest):.1f} times the ± of the differences. A large p does not say that algorithms are equal."
        )
    if tests["p"].isna().any():
        lines.append(f"{NONE}: no test, as the differences do not vary.")
    return lines


def ranking(best_settings: pandas.DataFrame, hparams: list[str]) -> pandas.DataFrame:
    """The table of one sweep's settings, the best first, with a column for each hyper-parameter."""
    return pandas.DataFrame(
        {
            "Rank": str(row["rank"]),
            **{name.removeprefix(HPARAM): f"{row[name]:.6g}" for name in hparams},
            "Validation Accuracy": number(row["val_acc"]),
            "Test Accuracy": with_deviation(row["accuracy"], row["accuracy_std"]),
            "Trials": str(row["n"]),
            **({"Rounds": str(row["rounds_run"])} if best_settings["rounds_run"].nunique() > 1 else {}),
            **({"Best in": number(row["best_in"], ".1%")} if "best_in" in row else {}),
        }
        for _, row in best_settings.iterrows()
    )


def importance(values: pandas.DataFrame) -> pandas.DataFrame:
    return pandas.DataFrame(
        {"Hyper-parameter": row["hparam"], "Importance": number(row["importance"], ".2f"), "Sign": _sign(row["correlation"])}
        for _, row in values.iterrows()
    )


def _sign(correlation):
    return NONE if pandas.isna(correlation) else "+" if correlation > 0 else "-"


def expected_best(curve: pandas.Series) -> pandas.DataFrame:
    """The curve at budgets that double, and at the largest."""
    budgets = [k for k in curve.index if k & (k - 1) == 0 or k == curve.index[-1]]
    return pandas.DataFrame({"Random Draws": str(k), "Expected Best Validation Accuracy": f"{curve[k]:.4f}"} for k in budgets)


def job_statistics(report: "Report") -> pandas.DataFrame:
    """The table of each sweep's jobs and their cost."""
    return pandas.DataFrame(
        {
            **names(report, row[SWEEP]),
            "Hyper-parameter Sets": str(row["num_hparams"]),
            "Trials": str(row["num_trials"]),
            "Clients": str(report.settings[row[SWEEP]].num_clients),
            "Training Time (s)": number(row["seconds_total"], ".1f"),
            "Training Time a Trial (s)": number(row["seconds_mean"], ".1f"),
            "MB Sent a Trial": number(row["bytes_sent"] / 1e6, ".1f"),
        }
        for _, row in report.best.iterrows()
    )


BOLD = {"github": "**{}**", "latex": r"\textbf{{{}}}", "html": "<b>{}</b>"}
_IN_LATEX = str.maketrans({
    "_": r"\_", "%": r"\%", "&": r"\&", "#": r"\#", "±": r"$\pm$", "–": "--", "|": "$|$", "<": "$<$", "†": r"$^\dagger$",
    "∞": r"$\infty$",
})  # fmt: skip
ESCAPE: dict[str, Callable[[str], str]] = {"github": str, "latex": lambda text: text.translate(_IN_LATEX), "html": html.escape}


def render(table: pandas.DataFrame, bold: Collection[tuple[int, Hashable]], table_format: str) -> str:
    """A table of texts in github, latex (with booktabs) or html. `bold` are the cells that stand out, as (row, column). If the
    columns are a MultiIndex, the table's index has the heads of its rows."""
    escape = ESCAPE[table_format]
    cells = [
        [
            BOLD[table_format].format(escape(cell)) if (row, column) in bold else escape(cell)
            for column, cell in zip(table, values)
        ]
        for row, values in enumerate(table.itertuples(index=False))
    ]
    if not isinstance(table.columns, pandas.MultiIndex):
        table, head = pandas.DataFrame(cells, columns=list(map(escape, table))), None
    else:
        table = pandas.DataFrame(cells, _escaped(table.index, escape), _escaped(table.columns, escape))
        head = _grouped_head(table)
    if table_format == "latex":
        options = {"escape": False, "index": head is not None, "multirow": False, "multicolumn_format": "c"}
        return table.to_latex(**options).rstrip("\n")
    if head is not None:
        table = table.set_axis([_flat(table.columns.names, values) for values in table], axis="columns").reset_index()
    if table_format == "html":
        return _html(table, head or "<tr>" + "".join(f"<th>{heading}</th>" for heading in table) + "</tr>")
    return tabulate(table.values.tolist(), headers=list(table), tablefmt=table_format, disable_numparse=True)


def _escaped(labels: pandas.Index, escape: Callable[[str], str]) -> pandas.Index:
    levels = [list(map(escape, labels.get_level_values(level))) for level in range(labels.nlevels)]
    names = list(map(escape, labels.names))
    return pandas.MultiIndex.from_arrays(levels, names=names) if len(levels) > 1 else pandas.Index(levels[0], name=names[0])


def _flat(names: Sequence[str], values: str | tuple[str, ...]) -> str:
    """The head of a column in one line."""
    pairs = list(zip(names, [values] if isinstance(values, str) else values))
    return ", ".join(f"{name}={value}" for name, value in pairs if value != NONE) or f"{pairs[0][0]}={NONE}"


def _grouped_head(table: pandas.DataFrame) -> str:
    """The rows of an HTML head in which equal values side by side share a cell."""
    lines = []
    columns = [(values,) if isinstance(values, str) else values for values in table]
    for level, name in enumerate(table.columns.names):
        groups = [(values[-1], len(list(same))) for values, same in itertools.groupby(each[: level + 1] for each in columns)]
        cells = "".join(f'<th colspan="{width}">{value}</th>' for value, width in groups)
        lines.append(f'<tr><th colspan="{table.index.nlevels}">{name}</th>{cells}</tr>')
    names = "".join(f"<th>{name}</th>" for name in table.index.names)
    return "".join([*lines, f'<tr>{names}<th colspan="{len(columns)}"></th></tr>'])


def _html(table: pandas.DataFrame, head: str) -> str:
    """Cells name their column, so that a narrow page can show each row as a list."""
    body = "\n".join(
        "<tr>" + "".join(f'<td data-label="{heading}">{cell}</td>' for heading, cell in zip(table, row)) + "</tr>"
        for row in table.itertuples(index=False)
    )
    return f"<table>\n<thead>{head}</thead>\n<tbody>\n{body}\n</tbody>\n</table>"


def best_rows(best: pandas.DataFrame) -> pandas.Index:
    """The rows of a report's `best` with the highest accuracy, as it reads, among those of several that are compared."""
    accuracy = best["accuracy"].round(4)
    compared = accuracy.groupby(best["group"])
    return best.index[(accuracy == compared.transform("max")) & (compared.transform("size") > 1)]
