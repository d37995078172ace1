"""Results as one self-contained HTML page: it asks for no other file, and fits a phone."""

import base64
import html
import typing

from federated.reporting import plots

if typing.TYPE_CHECKING:
    from federated.reporting.report import Report

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #111; background: #fff; max-width: 76rem; margin: auto; padding: 0 1rem }
h1, h2 { line-height: 1.2; overflow-wrap: anywhere }
table { display: block; overflow-x: auto; border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: 0.3rem 0.55rem; border-bottom: 1px solid #ccc }
th { vertical-align: bottom }
p { max-width: 45rem; overflow-wrap: anywhere }
ul { overflow-wrap: anywhere }
figure { display: inline-block; margin: 1rem 0; width: min(100%, 37rem); vertical-align: top }
img { width: 100%; height: auto }
figcaption { font-size: 0.85rem }
@media (max-width: 60rem) {
  thead { display: none }
  tr { display: block; border-bottom: 2px solid #888; padding: 0.4rem 0 }
  tbody { display: block }
  td { display: flex; justify-content: space-between; gap: 1rem; border-bottom: 1px solid #eee; overflow-wrap: anywhere }
  td::before { content: attr(data-label); font-weight: 600 }
}
"""
SETTINGS = 10  # of each sweep


def html_of(report: "Report") -> str:
    """The page of a federated.reporting.report.Report: tables, pictures, and the best settings of each sweep."""
    sections = [("Best settings", report.table("html"), report.notes()), *report.sections("html", SETTINGS)]
    first, more = sections[: 1 + bool(len(report.comparison))], sections[1 + bool(len(report.comparison)) :]
    parts = [_section(*section) for section in first]
    if report.ignored:
        parts.append(f"<h2>Left out</h2>\n{_list(report.ignored)}")
    parts.append("<h2>Pictures</h2>")
    for what, figure in plots.pictures(report).values():
        data = base64.b64encode(plots.svg_of(figure)).decode()
        what = html.escape(what)
        image = f'<img alt="{what}" src="data:image/svg+xml;base64,{data}">'
        parts.append(f"<figure>{image}<figcaption>{what}</figcaption></figure>")
    parts += [_section(*section) for section in more]
    body = "\n".join(parts)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>Federated sweeps</title>
<style>{STYLE}</style>
</head>
<body>
<h1>Federated sweeps</h1>
{body}
</body>
</html>
"""


def _section(heading, table, notes):
    return "\n".join([f"<h2>{html.escape(heading)}</h2>", table, *(f"<p>{html.escape(note)}</p>" for note in notes)])


def _list(lines):
    return "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>"
