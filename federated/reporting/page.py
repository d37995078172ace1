"""Results as one HTML page to show to others: it loads no other file, and fits a phone.

Tables and pictures are HTML and SVG (charts.py), so that the page can be read and printed without a script, too. page.js, of
6 kB, makes it interactive. No library draws it. plotly.js basic has 1.2 MB (MIT), Vega-Lite with Vega 0.8 MB (BSD),
Observable Plot with D3 0.5 MB (ISC), and all of them draw nothing without a script. uPlot has 50 kB (MIT), but draws on a
canvas, which has nothing for a keyboard or a screen reader.
"""

import base64
import hashlib
import html
import pathlib
import typing

import numpy as np
import pandas

from federated.options import names_of
from federated.reporting import charts, pivot, selection, tables
from federated.reporting.collect import HPARAM
from federated.settings import Settings
from federated.version import CODE, VERSION

if typing.TYPE_CHECKING:
    from federated.reporting.report import Report

HERE = pathlib.Path(__file__).parent
OPEN = 4  # sweeps; if there are more, their hyper-parameters are folded away
FAILURES = 200  # failed trials that are listed
# Limits that keep a page of 100 sweeps below 2 MB: (at least and at most for each sweep, for all together)
POINTS, LINES, CLIENTS, SETTINGS = (40, 200, 4000), (20, 100, 3000), (0, 300, 6000), (5, 10, 500)


def html_of(report: "Report") -> str:
    """The page of a federated.reporting.report.Report."""
    sections = {
        "Results": _results(report),
        "Curves": "".join(_cell(report, cell, sweeps) for cell, sweeps in report.cells.items()),
        "Hyper-parameters": "".join(_sweep(report, sweep) for sweep in report.settings),
        "Failed trials": _failed(report),
        "Job statistics": _table(report.jobs_section("html")[1]),
        "Provenance": _provenance(report),
    }
    sections = {heading: content for heading, content in sections.items() if content}
    links = "".join(f'<li><a href="#{_id(heading)}">{heading}</a></li>' for heading in sections)
    body = "\n".join(f'<h2 id="{_id(heading)}">{heading}</h2>\n{content}' for heading, content in sections.items())
    script, style = ((HERE / name).read_text("utf-8") for name in ("page.js", "page.css"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    page = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{html.escape(_title(report))}</title>
<style>{style}</style>
</head>
<body>
{charts.DEFINITIONS}
<header>
<h1>{html.escape(_title(report))}</h1>
{_settings(report)}
</header>
<nav aria-label="Sections"><ul>{links}</ul></nav>
<main>
{body}
</main>
<script>{script}</script>
</body>
</html>
"""
    return page.encode(errors="replace").decode()  # JSON may hold half a surrogate pair, which UTF-8 cannot


def _share(report: "Report", least: int, most: int, together: int) -> int:
    return max(least, min(most, together // len(report.settings)))


def _id(heading: str) -> str:
    return heading.lower().replace(" ", "-")


def _title(report: "Report") -> str:
    """The algorithms, and the data sets on which they were compared."""
    of_all = {name: dict.fromkeys(tables.value_of(each, name) for each in report.settings.values()) for name in tables.NAMED}
    return f"{_several(of_all['algorithm'], 'algorithms')} on {_several(of_all['dataset'], 'data sets')}"


def _several(names: typing.Collection[str], what: str) -> str:
    return ", ".join(names) if len(names) <= 6 else f"{len(names)} {what}"


def _settings(report: "Report") -> str:
    """The number of sweeps, sets and trials, and every setting with its value or, if it was varied, its values."""
    rows = []
    for name in names_of(Settings):
        values = list(dict.fromkeys(tables.value_of(each, name) for each in report.settings.values()))
        if values != [tables.NONE]:
            varied = ' class="varied"' * (len(values) > 1)
            rows.append(f"<div><dt>{name}</dt><dd{varied}>{html.escape(', '.join(values))}</dd></div>")
    trials = report.rounds.groupby(["sweep", "hash"])["trial_seed"].nunique()
    counts = f"{len(report.settings)} sweeps, {len(trials)} hyper-parameter sets, {trials.sum()} finished trials."
    chosen = f"Selection ({report.selection}): {selection.SELECTIONS[report.selection]}."
    return f'<p>{html.escape(f"{counts} {chosen}")}</p>\n<dl class="settings">{"".join(rows)}</dl>'


def _results(report: "Report") -> str:
    parts = []
    if columns := report.columns or _columns(report):
        parts += [_table(report.pivoted("html", columns)), _paragraphs(pivot.notes(report))]
    notes = [*tables.notes(report), *tables.notes_on_clients(report), *tables.notes_on_trials(report)]
    parts += ["<h3>Best settings</h3>", _table(report.summary("html")), _paragraphs(notes)]
    for heading, table, notes in report.comparison_section("html"):
        parts += [f"<h3>{heading}</h3>", _table(table), _paragraphs(notes)]
    if report.ignored:
        parts.append("<h3>Left out</h3><ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in report.ignored) + "</ul>")
    return "\n".join(parts)


def _columns(report: "Report") -> list[str]:
    """The settings that distinguish the cells of the report, for the columns of its table. Empty if it has one cell."""
    firsts = [report.settings[sweeps[0]] for sweeps in report.cells.values()]
    found: list[str] = []
    for name in ("dataset", "model_arch", *report.varying):
        with_it = {tuple(getattr(each, known) for known in (*found, name)) for each in firsts}
        if len(with_it) > len({tuple(getattr(each, known) for known in found) for each in firsts}):
            found.append(name)
    return found


def _table(table: str) -> str:
    """A table with its own scroll bar if it is wider than the page."""
    return f'<div class="table">{table}</div>'


def _paragraphs(notes: list[str]) -> str:
    return "\n".join(f"<p>{html.escape(note)}</p>" for note in notes)


def _cell(report: "Report", cell: str, sweeps: list[str]) -> str:
    """The curves of sweeps that are compared with each other, and the accuracies of their clients."""
    most = _share(report, *POINTS)
    accuracy = tables.ACCURACY[report.judged_by]
    by_round = {sweep: selection.by_round(report.of_best[sweep]) for sweep in sweeps}
    drawn: list[list[charts.Curve]] = [[], [], []]
    for index, (sweep, rounds) in enumerate(by_round.items()):
        name, mean = report.label(sweep), rounds["accuracy"].to_numpy()
        drawn[0].append(charts.Curve(name, index, rounds.index.to_numpy(), mean, rounds["deviation"].to_numpy()))
        drawn[1].append(charts.Curve(name, index, rounds["bytes_sent"].to_numpy(), mean))
        best = report.expected_best(sweep)
        if len(best) > 1:
            drawn[2].append(charts.Curve(name, index, best.index.to_numpy(), best.to_numpy()))
    curves, by_bytes, draws = [[curve.thinned(most) for curve in each] for each in drawn]
    trials = "means over the trials of the best settings"
    parts = [
        f"<h3>{html.escape(cell)}</h3>",
        charts.lines(curves, f"Learning curves: {trials}, ± sample standard deviation.", "round", accuracy),
        charts.lines(by_bytes, f"Accuracy against communication: {trials}.", "bytes sent", accuracy, "B"),
    ]
    clients = [(report.label(sweep), report.of_clients[sweep]) for sweep in sweeps]
    clients = [(name, values) for name, values in clients if not np.isnan(values).all()]
    if clients:
        caption = "Each client of each trial of the best settings: quartiles, worst and best."
        parts.append(charts.boxes(clients, caption, "accuracy on the client's test samples", _share(report, *CLIENTS)))
    if draws:
        caption = "The expected best of k random hyper-parameter sets (Dodge et al., EMNLP 2019)."
        parts.append(charts.lines(draws, caption, "random draws", "validation accuracy"))
    return "\n".join(parts)


def _sweep(report: "Report", sweep: str) -> str:
    """The hyper-parameters of a sweep, as a picture and in tables."""
    first, *more = report.of_sweep(sweep, "html", _share(report, *SETTINGS))
    parts = [_parallel(report, sweep), _table(first[1]), _paragraphs(first[2])]
    for heading, table, notes in more:
        parts += [f"<h3>{html.escape(heading)}</h3>", _table(table), _paragraphs(notes)]
    is_open = " open" * (len(report.settings) <= OPEN)
    return f"<details{is_open}><summary>{html.escape(report.title(sweep))}</summary>\n" + "\n".join(parts) + "\n</details>\n"


def _parallel(report: "Report", sweep: str) -> str:
    ranking, best = report.comparable[sweep], report.rankings[sweep]["hash"][0]
    axes = []
    for name in [name for name in report.hparams[sweep] if ranking[name].nunique() > 1]:
        scale = charts.Scale(ranking[name], 14, charts.WIDTH - 14, report.log_base(sweep, name))
        axes.append((name.removeprefix(HPARAM), scale, [f"{value:.6g}" for value in ranking[name]]))
    if not axes:
        return ""
    accuracy = charts.Scale(ranking["val_acc"], 14, charts.WIDTH - 14)
    axes.append(("validation accuracy", accuracy, [f"{value:.4f}" for value in ranking["val_acc"]]))
    after = f" after {report.first_rungs[sweep]} rounds" if sweep in report.stopped else ""
    caption = f"Hyper-parameters of each setting and its validation accuracy{after}; the best setting stands out."
    return charts.parallel(axes, caption, ranking["hash"].tolist().index(best), _share(report, *LINES))


def _failed(report: "Report") -> str:
    failed = report.collected.failed
    if not failed:
        return ""
    shown = list(failed.items())[:FAILURES]
    table = pandas.DataFrame(
        {
            "Sweep": directory.parent.parent.name,
            "Set": directory.parent.name[:8],
            "Trial": directory.name.removeprefix("trial_"),
            "Reason": reason,
        }
        for directory, reason in shown
    )
    more = [f"And {len(failed) - FAILURES} more."] if len(failed) > FAILURES else []
    note = "Trials that are not done, and why the last attempt at each failed. Their logs are in their directories."
    return _paragraphs([note]) + _table(tables.render(table, (), "html")) + _paragraphs(more)


def _provenance(report: "Report") -> str:
    """The code and the machines that computed the trials, and the code that made the page."""
    collected = report.collected
    lines = [f"{trials} trials computed by {what}." for what, trials in collected.computed_by.items()]
    lines += [f"{trials} trials computed on {what}." for what, trials in collected.computed_on.items()]
    if collected.dates:
        lines.append(f"Computed from {min(collected.dates)} to {max(collected.dates)}.")
    lines += [f"Data from {data_dir}." for data_dir in dict.fromkeys(collected.data_dirs.values())]
    lines.append(f"Page made by FedSweep {VERSION}, code {CODE}.")
    return "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>"
