"""Pictures of results. Lines and points differ by style and marker as well as by colour: the eight colours of Okabe and Ito
(2008), which colour-blind readers tell apart, in an order in which neighbours differ in lightness too."""

import functools
import io
import pathlib

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from federated import statistics
from federated.trial import write_atomically

COLOURS = ("#0072B2", "#E69F00", "#000000", "#CC79A7", "#009E73", "#D55E00", "#56B4E9", "#F0E442")
LINES = ("-", "--", ":", "-.")
MARKERS = "osD^vPX<>*"
FORMATS = ("png", "svg")

matplotlib.rcParams["svg.hashsalt"] = "federated"  # so that the same results give the same file


def pictures(report) -> dict[str, tuple[str, Figure]]:
    """{name: (what it shows, figure)} of all pictures of a federated.report.Report."""
    drawn = {}
    data = list(dict.fromkeys((model, dataset) for model, dataset, _ in report.chosen))
    for model, dataset in data:
        sweeps = [sweep for sweep in report.chosen if sweep[:2] == (model, dataset)]
        title = f"{model} on {dataset}"
        for name, (what, draw) in OF_DATA.items():
            figure = Figure(figsize=(6.4, 4), layout="constrained")
            axes = figure.add_subplot(title=title)
            if draw(axes, report, sweeps):
                drawn[f"{name}_{model}_{dataset}"] = f"{what}: {title}", figure
    for sweep in report.chosen:
        if (figure := hparams(report, sweep)) is not None:
            drawn[f"hparams_{'_'.join(sweep)}"] = f"Validation accuracy by hyper-parameter: {' '.join(sweep)}", figure
    return drawn


def save_all(report, directory: pathlib.Path):
    """Write all pictures into `directory`, in each of FORMATS."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, (_, figure) in pictures(report).items():
        for form in FORMATS:
            write_atomically(directory / f"{name}.{form}", functools.partial(_save, figure, form))


def svg_of(figure: Figure) -> bytes:
    file = io.BytesIO()
    _save(figure, "svg", file)
    return file.getvalue()


def _save(figure, form, file):
    figure.savefig(file, format=form, dpi=150, metadata={"Date": None} if form == "svg" else None)


def style(place: int) -> dict:
    """Of the curve or points number `place` of a picture; 40 are different in more than colour."""
    return {
        "color": COLOURS[place % len(COLOURS)],
        "linestyle": LINES[place % len(LINES)],
        "marker": MARKERS[place % len(MARKERS)],
    }


def _curves(axes, report, sweeps, value, band):
    """Draw the reported accuracy of each sweep's best setting against the column `value`, by round: mean over trials, with a
    band of ± one sample deviation if asked for."""
    of_sweep = dict(iter(report.sweeps()))
    for place, sweep in enumerate(sweeps):
        rounds = of_sweep[sweep].dropna(subset=["accuracy"])
        rounds = rounds[rounds["hash"] == report.rankings[sweep]["hash"][0]]
        by_round = rounds.groupby("round")
        mean, deviation, x = by_round["accuracy"].mean(), by_round["accuracy"].std(ddof=1).fillna(0), by_round[value].mean()
        look = style(place)
        every = max(1, len(x) // 8)
        axes.plot(x, mean, label=sweep[2], markersize=5, markevery=(place % every, every), linewidth=1.5, **look)
        if band:
            axes.fill_between(x, mean - deviation, mean + deviation, color=look["color"], alpha=0.15, linewidth=0)
    axes.set_ylabel("test accuracy")
    axes.grid(alpha=0.3)
    _legend(axes, len(sweeps))


def _legend(axes, entries):
    if entries > 10:
        axes.figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize="small", handlelength=3)
    else:
        axes.legend(fontsize="small", handlelength=3)


def learning_curves(axes, report, sweeps):
    _curves(axes, report, sweeps, "round", band=True)
    axes.set_xlabel("round")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return True


def accuracy_by_bytes(axes, report, sweeps):
    _curves(axes, report, sweeps, "bytes_sent", band=False)
    axes.set_xlabel("bytes sent between server and clients")
    axes.xaxis.set_major_formatter(EngFormatter("B"))
    return True


def clients(axes, report, sweeps):
    """The mean over clients, ± the deviation over them, and the worst one, of the best settings; means over trials."""
    for place, sweep in enumerate(sweeps):
        means = report.chosen[sweep][["local_acc_mean", "local_acc_std", "local_acc_worst"]].mean()
        colour = {"color": COLOURS[place % len(COLOURS)]}
        axes.errorbar(place, means["local_acc_mean"], means["local_acc_std"], fmt="o", capsize=5, markersize=7, **colour)
        axes.plot(place, means["local_acc_worst"], "v", markerfacecolor="none", markersize=8, **colour)
    axes.plot([], [], "ko", label="mean ± deviation over clients")
    axes.plot([], [], "kv", markerfacecolor="none", label="worst client")
    axes.set_xticks(range(len(sweeps)), [sweep[2] for sweep in sweeps], rotation=45 if len(sweeps) > 4 else 0, ha="center")
    axes.set_xlim(-0.6, len(sweeps) - 0.4)
    axes.set_ylabel("accuracy on the client's test samples")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize="small")
    return True


def expected_best(axes, report, sweeps):
    """See federated.statistics.expected_best. Draws nothing where no sweep has two random draws."""
    curves = {sweep: statistics.expected_best(report.rankings[sweep]) for sweep in sweeps}
    curves = {sweep: curve for sweep, curve in curves.items() if len(curve) > 1}
    for place, (sweep, curve) in enumerate(curves.items()):
        every = max(1, len(curve) // 8)
        axes.plot(curve.index, curve, label=sweep[2], markevery=(place % every, every), markersize=5, **style(place))
    axes.set_xlabel("random draws of hyper-parameters")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("expected best validation accuracy")
    axes.grid(alpha=0.3)
    if curves:
        _legend(axes, len(curves))
    return bool(curves)


# {name of the file: (what it shows, the function that draws it)}
OF_DATA = {
    "learning_curves": ("Learning curves, mean ± sample deviation over trials", learning_curves),
    "accuracy_by_bytes": ("Accuracy against bytes sent", accuracy_by_bytes),
    "clients": ("Spread over clients", clients),
    "expected_best": ("Expected best of k random draws", expected_best),
}


def hparams(report, sweep) -> Figure | None:
    """Each varied hyper-parameter of a sweep against the validation accuracy of its settings; None where none varies."""
    ranking = report.rankings[sweep]
    varied = [name for name in report.hparams[sweep] if ranking[name].nunique() > 1]
    if not varied:
        return None
    columns = min(3, len(varied))
    lines = -(-len(varied) // columns)
    figure = Figure(figsize=(6.4 if columns < 3 else 9, 0.6 + 2.6 * lines), layout="constrained")
    figure.suptitle(" ".join(sweep))
    grid = figure.subplots(lines, columns, sharey=True, squeeze=False)
    for axes, name in zip(grid.flat, varied):
        values = ranking[name]
        axes.plot(values, ranking["val_acc"], "o", color=COLOURS[0], alpha=0.7, label="a setting")
        axes.plot(values[0], ranking["val_acc"][0], "*", color=COLOURS[5], markersize=14, markeredgecolor="k", label="the best")
        if values.min() > 0 and values.max() / values.min() > 10:
            axes.set_xscale("log")
        axes.set_xlabel(name)
        axes.grid(alpha=0.3)
    for axes in grid.flat[len(varied) :]:
        axes.set_axis_off()
    for axes in grid[:, 0]:
        axes.set_ylabel("validation accuracy")
    grid.flat[0].legend(fontsize="small")
    return figure
