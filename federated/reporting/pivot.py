"""The table of a paper: algorithms down, settings across."""

import typing

import pandas

from federated.reporting.collect import SWEEP
from federated.reporting.tables import NAMED, NONE, best_rows, value_of, with_deviation

if typing.TYPE_CHECKING:
    from federated.reporting.report import Report

LEVEL = 0.05  # of the tests
MARK = "†"


def table(report: "Report", columns: list[str]) -> tuple[pandas.DataFrame, set[tuple[int, tuple]]]:
    """The accuracies in % of the best settings, with a column for each combination of the values of the settings `columns`; and
    the (row, column) of each cell that is the best of its comparison."""
    down = _down(report, columns)
    cells, best = {}, set()
    is_best, is_close = _marks(report)
    for (sweep, settings), (_, row) in zip(report.settings.items(), report.best.iterrows()):
        head = tuple(value_of(settings, name) for name in down)
        across = tuple(value_of(settings, name) for name in columns)
        percent = with_deviation(100 * row["accuracy"], 100 * row["accuracy_std"], 2)
        cells[head, across] = percent + MARK * (sweep in is_close)
        if sweep in is_best:
            best.add((head, across))
    heads = list(dict.fromkeys(head for head, _ in cells))
    places = sorted({across for _, across in cells}, key=lambda values: [_order(value) for value in values])
    rows = pandas.MultiIndex.from_tuples(heads, names=[NAMED.get(name, name) for name in down])
    across_all = pandas.MultiIndex.from_tuples(places, names=columns)
    texts = [[cells.get((head, across), NONE) for across in places] for head in heads]
    return pandas.DataFrame(texts, rows, across_all), {(heads.index(head), across) for head, across in best}


def _down(report: "Report", columns: list[str]) -> list[str]:
    """The settings that distinguish rows: the algorithm, and settings whose values do not follow from `columns`."""
    values = [each.values() for each in report.settings.values()]

    def number_of(*names: str) -> int:
        return len({tuple(each[name] for name in names) for each in values})

    def follows(name: str, *others: str) -> bool:
        return number_of(*others, name) == number_of(*others)

    varying = [name for name in (*NAMED, *report.varying) if name not in columns and number_of(name) > 1]
    down = [name for name in varying if follows(name, "algorithm") or not follows(name, "algorithm", *columns)]
    return down or [name for name in ("algorithm", "model_arch") if name not in columns][:1]


def _marks(report: "Report") -> tuple[set[str], set[str]]:
    """The sweeps that are the best of their comparison, and those that tests cannot distinguish from the best."""
    best, sweeps = report.best, list(report.settings)
    is_best = {sweeps[row] for row in best_rows(best)}
    references = best.loc[best.groupby("group")["accuracy"].idxmax()]
    tests = report.compare(dict(zip(references["group"], references[SWEEP])))
    is_close = set() if tests.empty else set(tests[SWEEP][~(tests["p_holm"] < LEVEL)])
    return is_best, is_close - is_best


def _order(text: str) -> tuple[bool, float, str]:
    """Sort key for the values of a setting: none, then numbers, then names."""
    try:
        return text != NONE, 0.0 if text == NONE else float(text), ""
    except ValueError:
        return True, float("inf"), text


def notes(report: "Report") -> list[str]:
    fewest, most = report.best["n"].min(), report.best["n"].max()
    seeds = str(most) if fewest == most else f"{fewest} to {most}"
    return [
        f"{report.heading} in % of each sweep's best setting, mean ± sample standard deviation over {seeds} trials. Bold: the "
        f"best of those with equal settings and numbers of hyper-parameter sets. {MARK}: a paired, two-sided t-test over trial "
        f"seeds, with Holm's correction at level {LEVEL}, does not distinguish it from the best, or cannot be made."
    ]
