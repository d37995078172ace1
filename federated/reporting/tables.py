"""Results as text: the columns that people read, in each of the formats."""

import html
from collections.abc import Callable

import pandas
from tabulate import tabulate

from federated.reporting.collect import HPARAM, SWEEP
from federated.reporting.selection import DEFAULT_SELECTION, ENOUGH_PAIRS, SELECTIONS, SHARES, detectable

FORMATS = ("github", "latex", "csv", "json", "html")
NONE = "–"  # stands for a number that does not exist

HEADINGS = {
    "validation": "Best Test Accuracy",
    "last": "Test Accuracy (last round)",
    "oracle": "Test Accuracy (oracle)",
    "original": "Test Accuracy (original)",
}


def heading(selection: str, judged_by: str) -> str:
    """That of the accuracy by which all rows of a table are judged."""
    return HEADINGS[selection] + " on Clients' Shares" * (judged_by == SHARES)


def with_deviation(mean: float, deviation: float) -> str:
    """Mean ± sample standard deviation; the mean alone if there is one value."""
    return f"{mean:.4f}" if pandas.isna(deviation) else f"{mean:.4f} ± {deviation:.4f}"


def number(value: float, form: str = ".4f") -> str:
    return NONE if pandas.isna(value) else format(value, form)


def interval(low: float, high: float) -> str:
    return NONE if pandas.isna(low) else f"{low:.4f} to {high:.4f}"


def p_value(p: float) -> str:
    return NONE if pandas.isna(p) else "< 0.0001" if p < 0.0001 else f"{p:.4f}"


def summary(results: pandas.DataFrame, settings: dict, heading: str, target: float | None) -> pandas.DataFrame:
    """The table of the best settings, a row a sweep, with the accuracy that they are judged by under `heading`."""
    rows = []
    for _, row in results.iterrows():
        shown = {
            "Model": row["model"],
            "Dataset": row["dataset"],
            "Algorithm": settings[tuple(row[SWEEP])].algorithm,
            heading: with_deviation(row["accuracy"], row["accuracy_std"]),
            "n": _of(row["n"], row["num_trials_done"]) if row["n"] == row["num_trials"] else str(row["n"]),
            "95 % Interval": interval(row["accuracy_low"], row["accuracy_high"]),
            "Global": number(row["test_acc"]),
            "Clients (weighted)": number(row["local_acc_weighted"]),
            "Clients (mean)": number(row["local_acc_mean"]),
            "Worst Client": number(row["local_acc_worst"]),
            "Spread": number(row["local_acc_std"]),
        }
        if target is not None:
            some = f" ({row['target_reached']} of {row['target_trials']})" * (0 < row["target_reached"] < row["target_trials"])
            shown[f"Rounds to {target:g}"] = number(row["target_round"], ".1f") + some
            shown[f"Seconds to {target:g}"] = number(row["target_seconds"], ".1f")
        rows.append(shown)
    return pandas.DataFrame(rows)


def _of(number: int, all_there: int) -> str:
    return str(number) if number == all_there else f"{number} of {all_there}"


def notes(personal: list[str], selection: str) -> list[str]:
    """What has to be known to read the table, in which clients have models of their own under the algorithms `personal`."""
    lines = []
    if selection != DEFAULT_SELECTION:
        lines.append(f"Selection {selection!r}: {SELECTIONS[selection]}.")
    if personal:
        lines.append(
            f"As clients have models of their own with {', '.join(personal)}, all rows are judged on the clients' shares of "
            "the test set: each test sample by the model of the client whose share it lies in, or by the global model where "
            "clients have no other. A test sample that is in no client's share counts in Global only."
        )
    lines.append(
        "Clients: accuracy on their own shares of the test set, the mean by their samples (weighted) and with each client "
        "counting the same (mean), the worst, and the standard deviation over clients (spread)."
    )
    return lines


def notes_on_trials(results: pandas.DataFrame, chosen: dict) -> list[str]:
    """What is not compared with what, and which trials are not judged, of the best settings of the sweeps in `chosen`."""
    lines, names = [], [" ".join(sweep) for sweep in chosen]
    for (model, dataset, reference), rows in results[results["differs"] != ""].groupby(
        ["model", "dataset", "reference"], sort=False
    ):
        unlike = ", ".join(f"{row['algorithm']} ({row['differs']})" for _, row in rows.iterrows())
        lines.append(f"Not compared with {reference} on {model} {dataset}, as settings or budgets differ: {unlike}.")
    for _, rows in results.groupby("group", sort=False):
        if rows["trial_seeds"].nunique() > 1:
            seeds = ", ".join(f"{row['algorithm']} {row['trial_seeds']}" for _, row in rows.iterrows())
            lines.append(f"Means are over unlike trial seeds: {seeds}. Tests are over those that both have.")
    for name, (_, row) in zip(names, results.iterrows()):
        if row["trials_left_out"]:
            lines.append(
                f"{name} is judged on the trial seeds that all its sets have, {row['trial_seeds'].replace(' ', ', ')}; "
                f"{row['trials_left_out']} more finished trials are left out."
            )
        if row["sets_unfinished"] or row["sets_diverged"]:
            lines.append(
                f"{name}: left out are {row['sets_unfinished']} hyper-parameter sets that lack trials which others have, and "
                f"{row['sets_diverged']} with trials that diverged."
            )
    return lines


def comparison(tests: pandas.DataFrame, settings: dict) -> pandas.DataFrame:
    """The table of the paired tests."""
    return pandas.DataFrame(
        {
            "Model": test["model"],
            "Dataset": test["dataset"],
            "Algorithm": settings[tuple(test[SWEEP])].algorithm,
            "Against": test["against"],
            "Difference": NONE if not test["n"] else with_deviation(test["difference"], test["difference_std"]),
            "95 % Interval": interval(test["difference_low"], test["difference_high"]),
            "n": str(test["n"]),
            "p": p_value(test["p"]),
            "p (Holm)": p_value(test["p_holm"]),
        }
        for _, test in tests.iterrows()
    )


def comparison_notes(tests: pandas.DataFrame) -> list[str]:
    """What the tests are, and a warning if they have too few pairs to decide."""
    lines = [
        "Paired, two-sided t-tests of the best settings over trial seeds, corrected by Holm's method where settings are equal."
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
    """The curve at budgets that double, and at the last."""
    budgets = [k for k in curve.index if k & (k - 1) == 0 or k == curve.index[-1]]
    return pandas.DataFrame({"Random Draws": str(k), "Expected Best Validation Accuracy": f"{curve[k]:.4f}"} for k in budgets)


def job_statistics(results: pandas.DataFrame, settings: dict) -> pandas.DataFrame:
    """The table of each sweep's jobs and what they took."""
    return pandas.DataFrame(
        {
            "Model": row["model"],
            "Dataset": row["dataset"],
            "Algorithm": settings[tuple(row[SWEEP])].algorithm,
            "Hyper-parameter Sets": str(row["num_hparams"]),
            "Trials": str(row["num_trials"]),
            "Clients": str(row["num_clients"]),
            "Training Time (s)": number(row["seconds_total"], ".1f"),
            "Training Time a Trial (s)": number(row["seconds_mean"], ".1f"),
            "MB Sent a Trial": number(row["bytes_sent"] / 1e6, ".1f"),
        }
        for _, row in results.iterrows()
    )


BOLD = {"github": "**{}**", "latex": r"\textbf{{{}}}", "html": "<b>{}</b>"}
_IN_LATEX = str.maketrans({"_": r"\_", "%": r"\%", "&": r"\&", "#": r"\#", "±": r"$\pm$", "–": "--", "|": "$|$", "<": "$<$"})
ESCAPE: dict[str, Callable[[str], str]] = {"github": str, "latex": lambda text: text.translate(_IN_LATEX), "html": html.escape}


def render(table: pandas.DataFrame, form: str, bold: frozenset[tuple[int, str]] = frozenset()) -> str:
    """A table of texts in github, latex or html; `bold` are the cells that stand out, as (row, column)."""
    escape = ESCAPE[form]
    rows = [
        [BOLD[form].format(escape(cell)) if (number, name) in bold else escape(cell) for name, cell in zip(table, row)]
        for number, row in enumerate(table.itertuples(index=False))
    ]
    if form == "html":
        return _html(list(map(escape, table)), rows)
    return tabulate(
        rows, headers=list(map(escape, table)), tablefmt={"latex": "latex_raw"}.get(form, form), disable_numparse=True
    )


def _html(headings, rows) -> str:
    """Cells name their column, so that a narrow page can show each row as a list."""
    head = "".join(f"<th>{heading}</th>" for heading in headings)
    body = "\n".join(
        "<tr>" + "".join(f'<td data-label="{heading}">{cell}</td>' for heading, cell in zip(headings, row)) + "</tr>"
        for row in rows
    )
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"


def bold_cells(results: pandas.DataFrame, heading: str) -> frozenset[tuple[int, str]]:
    """The best accuracies, as they read, among those of several that are compared."""
    accuracy = results["accuracy"].round(4)
    compared = accuracy.groupby(results["group"])
    is_best = (accuracy == compared.transform("max")) & (compared.transform("size") > 1)
    return frozenset((row, heading) for row in results.index[is_best])
