"""Pictures of results for a paper, each at two widths: one column and the full page. They have no titles: a paper has captions.

Lines and points differ by style and marker as well as by colour. The same results give the same bytes.
"""

import functools
import pathlib
import typing

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator, NullFormatter

from federated.files import write_atomically
from federated.reporting import selection, tables
from federated.reporting.charts import COLOURS, log_ticks
from federated.reporting.collect import HPARAM
from federated.settings import short_name

if typing.TYPE_CHECKING:
    from federated.reporting.report import Report

LINES = ("-", "--", ":", "-.")
MARKERS = "osD^vPX<>*"
WIDTHS = {"column": 3.3, "full": 6.9}  # inches, by the directory of the pictures
METADATA = {"png": None, "svg": {"Date": None}, "pdf": {"CreationDate": None}}  # by format, without dates

STYLE: typing.Any = {
    "font.size": 8, "axes.labelsize": 9, "figure.labelsize": 9,
    "xtick.labelsize": 8, "ytick.labelsize": 8, "legend.fontsize": 8,
    "axes.linewidth": 0.6, "lines.linewidth": 1.2, "lines.markersize": 3.5, "grid.linewidth": 0.5, "grid.alpha": 0.3,
    "xtick.major.width": 0.6, "ytick.major.width": 0.6, "legend.handlelength": 2.8, "savefig.dpi": 300,
    "pdf.fonttype": 42,  # TrueType: many publishers refuse Type 3
    "svg.hashsalt": "federated",  # makes the ids of elements the same each time
}  # fmt: skip


def save_all(report: "Report", directory: pathlib.Path) -> None:
    """Write all pictures into `directory`/column and `directory`/full, in each format of METADATA."""
    for width_name, width in WIDTHS.items():
        (directory / width_name).mkdir(parents=True, exist_ok=True)
        with matplotlib.rc_context(STYLE):
            for name, figure in pictures(report, width):
                figure.draw_without_rendering()
                figure.set_layout_engine("none")  # all formats get this layout
                for suffix in METADATA:
                    write_atomically(directory / width_name / f"{name}.{suffix}", functools.partial(_save, figure, suffix))


def _save(figure: Figure, suffix: str, file: typing.BinaryIO) -> None:
    figure.savefig(file, format=suffix, metadata=METADATA[suffix])


def pictures(report: "Report", width: float) -> typing.Iterator[tuple[str, Figure]]:
    """(name, figure) of all pictures of a federated.reporting.report.Report, `width` inches wide."""
    for cell, sweeps in report.cells.items():
        for name, draw in OF_CELL.items():
            figure = Figure(figsize=(width, 2.2 if width < 5 else 2.8), layout="constrained")
            if draw(figure.add_subplot(), report, sweeps):
                yield _file_name(name, cell), figure
    for sweep in report.chosen:
        if (by_hparam := hparams(report, sweep, width)) is not None:
            yield _file_name("hparams", report.title(sweep)), by_hparam


def _file_name(what: str, of: str) -> str:
    return short_name(f"{what}_{of}".replace(", ", ",").replace(" ", "_"))


def style(index: int) -> dict:
    """The look of curve number `index` of a picture. 40 looks differ in more than colour."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": LINES[index % len(LINES)],
        "marker": MARKERS[index % len(MARKERS)],
    }


def _curve(axes: Axes, x: typing.Any, y: typing.Any, label: str, index: int) -> None:
    """Draw a curve with about eight markers, staggered between curves."""
    every = max(1, len(x) // 8)
    axes.plot(x, y, label=label, markevery=(index % every, every), **style(index))


def _curves(axes: Axes, report: "Report", sweeps: list[str], value: str, band: bool) -> None:
    """Draw the reported accuracy of each sweep's best setting against the column `value` of its rounds: the mean over trials,
    and with `band` also ± one sample standard deviation."""
    for index, sweep in enumerate(sweeps):
        rounds = selection.by_round(report.of_best[sweep]).reset_index()
        x, mean, deviation = (rounds[name] for name in (value, "accuracy", "deviation"))
        _curve(axes, x, mean, report.label(sweep), index)
        if band:
            colour = style(index)["color"]
            axes.fill_between(x, mean - deviation, mean + deviation, color=colour, alpha=0.15, linewidth=0)
    axes.set_ylabel(tables.ACCURACY[report.judged_by])
    axes.grid()
    _legend(axes)


def _legend(axes: Axes) -> None:
    """Put the legend above the axes, in as many columns as fit. The figure grows by its height."""
    handles, labels = axes.get_legend_handles_labels()
    figure = typing.cast(Figure, axes.figure)
    width, height = figure.get_size_inches()
    columns = min(len(labels), max(1, int(width / (0.55 + 0.065 * max(map(len, labels))))))
    figure.set_size_inches(width, height + 0.16 * -(-len(labels) // columns))
    figure.legend(handles, labels, loc="outside upper center", ncols=columns, frameon=False, borderpad=0, columnspacing=1)


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
    """Draw a point for each client of each trial of the best settings, with clients side by side in the order of their numbers,
    and a box of their quartiles, with whiskers to the worst and the best. Draws nothing if no client has test samples."""
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
            "markersize": 3 if number <= 20 else 1.5,
            "markeredgewidth": 0,
        }
        axes.plot(len(drawn) + 0.8 * beside[has_samples], accuracies[has_samples], "o", **points)
        axes.boxplot(
            accuracies[has_samples], positions=[len(drawn)], widths=0.84, whis=(0, 100), manage_ticks=False,
            medianprops={"color": "k", "linewidth": 1.5},
        )  # fmt: skip
        drawn.append(report.label(sweep))
    slanted: dict[str, typing.Any] = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if len(drawn) > 4 else {}
    axes.set_xticks(range(len(drawn)), drawn, **slanted)
    middle, half = (len(drawn) - 1) / 2, max(len(drawn), 3) / 2 + 0.1
    axes.set_xlim(middle - half, middle + half)
    axes.set_ylabel("accuracy of each client")
    axes.grid(axis="y")
    return bool(drawn)


def expected_best(axes: Axes, report: "Report", sweeps: list[str]) -> bool:
    """See Report.expected_best. Draws nothing if no sweep has two random draws."""
    curves = {sweep: report.expected_best(sweep) for sweep in sweeps}
    curves = {sweep: curve for sweep, curve in curves.items() if len(curve) > 1}
    for index, (sweep, curve) in enumerate(curves.items()):
        _curve(axes, curve.index, curve, report.label(sweep), index)
    axes.set_xlabel("random draws of hyper-parameters")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("expected best val. accuracy")
    axes.grid()
    if curves:
        _legend(axes)
    return bool(curves)


# {name of the file: the function that draws it}
OF_CELL = {
    "learning_curves": learning_curves,
    "accuracy_by_bytes": accuracy_by_bytes,
    "clients": clients,
    "expected_best": expected_best,
}


def hparams(report: "Report", sweep: str, width: float) -> Figure | None:
    """Draw the validation accuracy of a sweep's settings against each varied hyper-parameter. None if none varies."""
    ranking, best = report.comparable[sweep], report.rankings[sweep]["hash"][0]
    varied = [name for name in report.hparams[sweep] if ranking[name].nunique() > 1]
    if not varied:
        return None
    columns = min(2 if width < 5 else 4, len(varied))
    lines = -(-len(varied) // columns)
    figure = Figure(figsize=(width, 0.3 + 1.5 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, sharey=True, squeeze=False)
    for axes, name in zip(grid.flat, varied):
        values = ranking[name]
        axes.plot(values, ranking["val_acc"], "o", color=COLOURS[0], alpha=0.7, label="a setting")
        look: dict[str, typing.Any] = {"color": COLOURS[5], "markersize": 9, "markeredgecolor": "k", "markeredgewidth": 0.5}
        star = ranking[ranking["hash"] == best]
        axes.plot(star[name], star["val_acc"], "*", label="the best", **look)
        if base := report.log_base(sweep, name):
            axes.set_xscale("log", base=base)
            axes.xaxis.set_major_locator(log_ticks(base, values.min(), values.max()))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(name.removeprefix(HPARAM))
        axes.grid()
    for axes in grid.flat[len(varied) :]:
        axes.set_axis_off()
    after = f" after {report.first_rungs[sweep]} rounds" if sweep in report.stopped else ""
    figure.supylabel(f"validation accuracy{after}")
    _legend(grid.flat[0])
    return figure
