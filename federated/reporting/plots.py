"""Pictures of results. Lines and points differ by style and marker as well as by colour: the eight colours of Okabe and Ito
(2008), which colour-blind readers can distinguish, in an order in which neighbours differ in lightness too."""

import functools
import io
import pathlib
import typing

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, NullFormatter

from federated.files import write_atomically
from federated.reporting import selection
from federated.reporting.collect import HPARAM
from federated.settings import short_name

if typing.TYPE_CHECKING:
    from federated.reporting.report import Report

COLOURS = ("#0072B2", "#E69F00", "#000000", "#CC79A7", "#009E73", "#D55E00", "#56B4E9", "#F0E442")
LINES = ("-", "--", ":", "-.")
MARKERS = "osD^vPX<>*"
FORMATS = ("png", "svg")

matplotlib.rcParams["svg.hashsalt"] = "federated"  # so that the same results give the same file


def pictures(report: "Report") -> dict[str, tuple[str, Figure]]:
    """{name: (what it shows, figure)} of all pictures of a federated.reporting.report.Report."""
    drawn = {}
    for cell, sweeps in report.cells.items():
        for name, (what, draw) in OF_CELL.items():
            figure = Figure(figsize=(6.4, 4), layout="constrained")
            axes = figure.add_subplot(title=cell)
            if draw(axes, report, sweeps):
                drawn[_file_name(name, cell)] = f"{what}: {cell}", figure
    for sweep in report.chosen:
        if (by_hparam := hparams(report, sweep)) is not None:
            title = report.title(sweep)
            drawn[_file_name("hparams", title)] = f"Validation accuracy by hyper-parameter: {title}", by_hparam
    return drawn


def _file_name(what: str, of: str) -> str:
    return short_name(f"{what}_{of}".replace(", ", ",").replace(" ", "_"))


def save_all(report: "Report", directory: pathlib.Path) -> None:
    """Write all pictures into `directory`, in each of FORMATS."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, (_, figure) in pictures(report).items():
        for form in FORMATS:
            write_atomically(directory / f"{name}.{form}", functools.partial(_save, figure, form))


def svg_of(figure: Figure) -> bytes:
    file = io.BytesIO()
    _save(figure, "svg", file)
    return file.getvalue()


def _save(figure, form, file) -> None:
    figure.savefig(file, format=form, dpi=150, metadata={"Date": None} if form == "svg" else None)


def style(place: int) -> dict:
    """Of the curve or points number `place` of a picture; 40 are different in more than colour."""
    return {
        "color": COLOURS[place % len(COLOURS)],
        "linestyle": LINES[place % len(LINES)],
        "marker": MARKERS[place % len(MARKERS)],
    }


def _curves(axes: Axes, report: "Report", sweeps: list[str], value: str, band: bool) -> None:
    """Draw the reported accuracy of each sweep's best setting against the column `value`, by round: mean over trials, with a
    band of ± one sample deviation if asked for."""
    for place, sweep in enumerate(sweeps):
        rounds = report.of_best[sweep].dropna(subset=["accuracy"])
        by_round = rounds.groupby("round")
        mean, deviation, x = by_round["accuracy"].mean(), by_round["accuracy"].std(ddof=1).fillna(0), by_round[value].mean()
        look = style(place)
        every = max(1, len(x) // 8)
        axes.plot(x, mean, label=report.label(sweep), markersize=5, markevery=(place % every, every), linewidth=1.5, **look)
        if band:
            axes.fill_between(x, mean - deviation, mean + deviation, color=look["color"], alpha=0.15, linewidth=0)
    axes.set_ylabel("test accuracy" + " on clients' shares" * (report.judged_by == selection.SHARES))
    axes.grid(alpha=0.3)
    _legend(axes, len(sweeps))


def _legend(axes, entries) -> None:
    if entries > 10:
        axes.figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize="small", handlelength=3)
    else:
        axes.legend(fontsize="small", handlelength=3)


def learning_curves(axes: Axes, report: "Report", sweeps: list[str]) -> bool:
    _curves(axes, report, sweeps, "round", band=True)
    axes.set_xlabel("round")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return True


def accuracy_by_bytes(axes: Axes, report: "Report", sweeps: list[str]) -> bool:
    _curves(axes, report, sweeps, "bytes_sent", band=False)
    axes.set_xlabel("bytes sent between server and clients")
    axes.xaxis.set_major_formatter(EngFormatter("B"))
    return True


def clients(axes: Axes, report: "Report", sweeps: list[str]) -> bool:
    """A point for each client of each trial of the best settings, the clients side by side in the order of their numbers, and
    a box of them. Draws nothing if no client has test samples."""
    drawn: list[str] = []
    for sweep in sweeps:
        accuracies = report.of_clients[sweep]
        has_samples = ~np.isnan(accuracies)
        if not has_samples.any():
            continue
        trials, number = accuracies.shape
        beside = np.tile((np.arange(number) + 0.5) / number - 0.5, (trials, 1))
        points: dict[str, typing.Any] = {
            "color": COLOURS[0],
            "alpha": 0.6,
            "markersize": 5 if number <= 20 else 2.5,
            "markeredgewidth": 0,
        }
        axes.plot(len(drawn) + 0.8 * beside[has_samples], accuracies[has_samples], "o", **points)
        axes.boxplot(
            accuracies[has_samples], positions=[len(drawn)], widths=0.84, whis=(0, 100), manage_ticks=False,
            medianprops={"color": "k", "linewidth": 2},
        )  # fmt: skip
        drawn.append(report.label(sweep))
    slanted: dict[str, typing.Any] = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if len(drawn) > 4 else {}
    axes.set_xticks(range(len(drawn)), drawn, **slanted)
    middle, half = (len(drawn) - 1) / 2, max(len(drawn), 3) / 2 + 0.1
    axes.set_xlim(middle - half, middle + half)
    over_rounds = ", means over rounds" * (report.selection == "original")
    axes.set_xlabel(f"points: clients of all trials{over_rounds}; box: quartiles; whiskers: worst and best", fontsize="small")
    axes.set_ylabel("accuracy on the client's test samples")
    axes.grid(axis="y", alpha=0.3)
    return bool(drawn)


def expected_best(axes: Axes, report: "Report", sweeps: list[str]) -> bool:
    """See federated.reporting.selection.expected_best. Draws nothing if no sweep has two random draws."""
    curves = {sweep: selection.expected_best(report.comparable[sweep]) for sweep in sweeps}
    curves = {sweep: curve for sweep, curve in curves.items() if len(curve) > 1}
    for place, (sweep, curve) in enumerate(curves.items()):
        every = max(1, len(curve) // 8)
        axes.plot(curve.index, curve, label=report.label(sweep), markevery=(place % every, every), markersize=5, **style(place))
    axes.set_xlabel("random draws of hyper-parameters")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("expected best validation accuracy")
    axes.grid(alpha=0.3)
    if curves:
        _legend(axes, len(curves))
    return bool(curves)


# {name of the file: (what it shows, the function that draws it)}
OF_CELL = {
    "learning_curves": ("Learning curves, mean ± sample deviation over trials", learning_curves),
    "accuracy_by_bytes": ("Accuracy against bytes sent", accuracy_by_bytes),
    "clients": ("Accuracy of each client, and its distribution", clients),
    "expected_best": ("Expected best of k random draws", expected_best),
}


def hparams(report: "Report", sweep: str) -> Figure | None:
    """Each varied hyper-parameter of a sweep against the validation accuracy of its settings; None if none varies."""
    ranking, best = report.comparable[sweep], report.rankings[sweep]["hash"][0]
    varied = [name for name in report.hparams[sweep] if ranking[name].nunique() > 1]
    if not varied:
        return None
    columns = min(3, len(varied))
    lines = -(-len(varied) // columns)
    figure = Figure(figsize=(6.4 if columns < 3 else 9, 0.6 + 2.6 * lines), layout="constrained")
    figure.suptitle(report.title(sweep))
    grid = figure.subplots(lines, columns, sharey=True, squeeze=False)
    for axes, name in zip(grid.flat, varied):
        values = ranking[name]
        axes.plot(values, ranking["val_acc"], "o", color=COLOURS[0], alpha=0.7, label="a setting")
        star = ranking[ranking["hash"] == best]
        axes.plot(star[name], star["val_acc"], "*", color=COLOURS[5], markersize=14, markeredgecolor="k", label="the best")
        if values.min() > 0 and values.max() / values.min() > 10:
            axes.set_xscale("log")
            axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(name.removeprefix(HPARAM))
        axes.grid(alpha=0.3)
    for axes in grid.flat[len(varied) :]:
        axes.set_axis_off()
    for axes in grid[:, 0]:
        axes.set_ylabel("validation accuracy" + f" after {report.first_rungs[sweep]} rounds" * (sweep in report.stopped))
    grid.flat[0].legend(fontsize="small")
    return figure
