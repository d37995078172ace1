"""Results as text: the columns that people read, in each of the formats."""

import html
from collections.abc import Callable

import pandas
from tabulate import tabulate

from federated.reporting.collect import HPARAM, SWEEP
from federated.reporting.selection import DEFAULT_SELECTION, ENOUGH_PAIRS, SELECTIONS, detectable

FORMATS = ("github", "latex", "csv", "json", "html")
NONE = "–"  # stands for a number that does not exist

HEADINGS = {
    "validation": "Best Test Accuracy",
    "last": "Test Accuracy (last round)",
    "oracle": "Test Accuracy (oracle)",
    "original": "Test Accuracy (original)",
}


def with_deviation(mean: float, deviation: float) -> str:
    """Mean ± sample standard deviation; the mean alone if there is one value."""
    return f"{mean:.4f}" if pandas.isna(deviation) else f"{mean:.4f} ± {deviation:.4f}"


def number(value: float, form: str = ".4f") -> str:
    return NONE if pandas.isna(value) else format(value, form)


def interval(low: float, high: float) -> str:
    return NONE if pandas.isna(low) else f"{low:.4f} to {high:.4f}"


def p_value(p: float) -> str:
    return NONE if pandas.isna(p) else "< 0.0001" if p < 0.0001 else f"{p:.4f}"


def summary(results: pandas.DataFrame, settings: dict, selection: str, target: float | None) -> pandas.DataFrame:
    """The table of the best settings, a row a sweep."""
    rows = []
    for _, row in results.iterrows():
        shown = {
            "Model": row["model"],
            "Dataset": row["dataset"],
            "Algorithm": settings[tuple(row[SWEEP])].algorithm,
            HEADINGS[selection]: with_deviation(row["accuracy"], row["accuracy_std"]),
            "n": str(row["n"]),
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


def notes(personal: list[str], selection: str) -> list[str]:
    """What has to be known to read the table, in which clients have models of their own under the algorithms `personal`."""
    lines = []
    if selection != DEFAULT_SELECTION:
        lines.append(f"Selection {selection!r}: {SELECTIONS[selection]}.")
    if personal:
        lines.append(
            f"The accuracy of {', '.join(personal)} is that of the clients' own models: each test sample is judged by the "
            "model of the client whose share it lies in."
        )
    lines.append(
        "Clients: accuracy on their own shares of the test set, the mean by their samples (weighted) and with each client "
        "counting the same (mean), the worst, and the standard deviation over clients (spread)."
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
    lines = ["Paired t-tests over trial seeds, two-sided, of the best settings; corrected by Holm's method on each data set."]
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


def bold_cells(results: pandas.DataFrame, selection: str) -> frozenset[tuple[int, str]]:
    """The best accuracies, as they read, among those of several on the same data."""
    accuracy = results["accuracy"].round(4)
    by_data = accuracy.groupby(results["dataset"])
    is_best = (accuracy == by_data.transform("max")) & (by_data.transform("size") > 1)
    return frozenset((row, HEADINGS[selection]) for row in results.index[is_best])
