"""The pictures of the page: compact SVG that needs no script. page.js lets a reader hide curves and read off points.

Each picture is a <figure>. Its JSON has the values that the script shows for a point, as the SVG has pixels only.
"""

import dataclasses
import html
import json
import typing
from collections.abc import Sequence

import numpy as np
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator

WIDTH, HEIGHT = 420, 280  # of a picture, in its own units; a page shows them at 0.8 to 1.4 pixels each
LEFT, RIGHT, TOP, BOTTOM = 50, 410, 8, 240  # of the area where curves are
ROW = 46  # the height of a row of `parallel` and `boxes`

# The eight colours of Okabe and Ito (2008), which colour-blind readers can distinguish, in an order in which neighbours differ
# in lightness, too
COLOURS = ("#0072B2", "#E69F00", "#000000", "#CC79A7", "#009E73", "#D55E00", "#56B4E9", "#F0E442")
DASHES = ("", "7 3", "2 3", "7 3 2 3")
# Marks that distinguish curves besides, centred at 0, 0
MARKS = (
    "M-3 0a3 3 0 1 0 6 0a3 3 0 1 0-6 0", "M-3-3h6v6h-6z", "M0-4L4 0L0 4L-4 0z", "M-4-3h8L0 4z", "M-4 3h8L0-4z",
    "M-1-4h2v3h3v2h-3v3h-2v-3h-3v-2h3z", "M-3-4v8L4 0z", "M3-4v8L-4 0z", "M-4-1h8v2h-8z", "M-1-4h2v8h-2z",
)  # fmt: skip
DEFINITIONS = (
    '<svg class="definitions" aria-hidden="true"><defs>'
    + "".join(f'<path id="mark{index}" d="{path}"/>' for index, path in enumerate(MARKS))
    + "</defs></svg>"
)


def escaped_json(value: object) -> str:
    """JSON that is safe in an HTML script element, whatever strings it has."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def log_ticks(base: int, low: float, high: float) -> LogLocator:
    """Puts ticks at the powers of `base`, for base 10 also at 2 and 5 times these if there are few."""
    return LogLocator(base, subs=(1, 2, 5) if base == 10 and high < 30 * low else (1,), numticks=6)


class Scale:
    """Maps values onto an axis: low to the pixel `start`, high to `end`; logarithmic if `log_base` is given."""

    def __init__(self, values: typing.Any, start: float, end: float, log_base: int | None = None) -> None:
        self.values = np.asarray(values, dtype=float)
        self.low, self.high, self.start, self.end, self.log_base = self.values.min(), self.values.max(), start, end, log_base

    def __call__(self, values: typing.Any) -> np.ndarray:
        low, high, values = map(self._straight, (self.low, self.high, np.asarray(values, dtype=float)))
        share = (values - low) / (high - low) if high > low else np.full(values.shape, 0.5)
        return self.start + (self.end - self.start) * share

    def _straight(self, values: typing.Any) -> typing.Any:
        return values if self.log_base is None else np.log(values)

    def ticks(self, most: int = 6) -> np.ndarray:
        """The values themselves if they are few, else round numbers in their range."""
        unique = np.unique(self.values)
        if len(unique) <= most:
            return unique
        base = self.log_base
        locator = MaxNLocator(most - 1) if base is None else log_ticks(base, self.low, self.high)
        found = np.array([tick for tick in locator.tick_values(self.low, self.high) if self.low <= tick <= self.high])
        return found if len(found) > 1 else np.array([self.low, self.high])


@dataclasses.dataclass
class Curve:
    """One curve: `x`, `y` and, if it has a band, `deviation`, arrays of the same length. `index` decides its style."""

    name: str
    index: int
    x: np.ndarray
    y: np.ndarray
    deviation: np.ndarray | None = None

    def thinned(self, most: int) -> "Curve":
        """The curve with at most `most` of its points, the first and the last among them."""
        kept = _spread(len(self.x), most)
        deviation = None if self.deviation is None else self.deviation[kept]
        return Curve(self.name, self.index, self.x[kept], self.y[kept], deviation)


def _spread(number: int, most: int) -> np.ndarray:
    """At most `most` of the indices below `number`, spread evenly, both ends among them."""
    return np.unique(np.linspace(0, number - 1, min(number, most)).round().astype(int))


def lines(curves: list[Curve], caption: str, x_label: str, y_label: str, unit: str | None = None) -> str:
    """Curves that share their axes. With `unit` the ticks of x have prefixes such as k and M."""
    lows = [curve.y - (0 if curve.deviation is None else curve.deviation) for curve in curves]
    highs = [curve.y + (0 if curve.deviation is None else curve.deviation) for curve in curves]
    x = Scale(np.concatenate([curve.x for curve in curves]), LEFT, RIGHT)
    y = Scale(np.concatenate([*lows, *highs]), BOTTOM, TOP)
    x_texts = [EngFormatter(unit)(tick) if unit else f"{tick:g}" for tick in x.ticks()]
    grid = "".join(f"M{at:.1f} {TOP}V{BOTTOM}" for at in x(x.ticks()))
    grid += "".join(f"M{LEFT} {at:.1f}H{RIGHT}" for at in y(y.ticks()))
    parts = [f'<path class="grid" d="{grid}"/><path class="frame" d="M{LEFT} {TOP}V{BOTTOM}H{RIGHT}"/>']
    parts += [_text(at, BOTTOM + 15, text) for at, text in zip(x(x.ticks()), x_texts)]
    parts += [_text(LEFT - 5, at + 4, f"{tick:.4g}", "end") for at, tick in zip(y(y.ticks()), y.ticks())]
    parts.append(_text((LEFT + RIGHT) / 2, HEIGHT - 6, x_label))
    parts.append(f'<text transform="translate(11 {(TOP + BOTTOM) / 2})rotate(-90)">{html.escape(y_label)}</text>')
    parts += [_curve(curve, x, y, low, high) for curve, low, high in zip(curves, lows, highs)]
    data: dict[str, typing.Any] = {"x": x_label, "curves": [_data_of(curve) for curve in curves]}
    return _figure("".join(parts), HEIGHT, caption, data, _legend(curves))


def _text(x: float, y: float, text: str, css_class: str = "") -> str:
    """A text centred at x; with the `css_class` "end" it ends there, with "name" it starts there."""
    return f'<text x="{x:.4g}" y="{y:.4g}"' + f' class="{css_class}"' * bool(css_class) + f">{html.escape(text)}</text>"


def _curve(curve: Curve, x: Scale, y: Scale, low: np.ndarray, high: np.ndarray) -> str:
    across, up = x(curve.x), y(curve.y)
    band = ""
    if curve.deviation is not None and curve.deviation.any():
        around = _points(np.append(across, across[::-1]), np.append(y(high), y(low)[::-1]))
        band = f'<polygon points="{around}"/>'
    marked = _spread(len(across), 8)
    marks = "".join(f'<use href="#mark{curve.index % len(MARKS)}" x="{across[k]:.1f}" y="{up[k]:.1f}"/>' for k in marked)
    return f'<g class="curve" {_style(curve.index)}>{band}<polyline points="{_points(across, up)}"/>{marks}</g>'


def _points(across: np.ndarray, down: np.ndarray) -> str:
    return " ".join(f"{x:.4g},{y:.4g}" for x, y in zip(across, down))


def _style(index: int) -> str:
    """The attributes of curve number `index`. With their marks, 40 curves differ in more than colour."""
    colour = COLOURS[index % len(COLOURS)]
    dashes = DASHES[(index + index // len(COLOURS)) % len(DASHES)]
    colour = "var(--ink)" if colour == "#000000" else colour  # white on a dark page
    return f'style="color:{colour}" stroke-dasharray="{dashes}"' if dashes else f'style="color:{colour}"'


def _data_of(curve: Curve) -> dict:
    data = {"name": curve.name, "x": [round(float(value)) for value in curve.x], "y": _rounded(curve.y)}
    return data if curve.deviation is None else data | {"deviation": _rounded(curve.deviation)}


def _rounded(values: np.ndarray) -> list[float]:
    return [round(float(value), 4) for value in values]


def _legend(curves: list[Curve]) -> str:
    entries = []
    for curve in curves:
        mark = f'<use href="#mark{curve.index % len(MARKS)}" x="16" y="6"/>'
        key = f'<svg viewBox="0 0 32 12" aria-hidden="true"><path d="M0 6H32"/>{mark}</svg>'
        entries.append(f"<li><span {_style(curve.index)}>{key}</span>{html.escape(curve.name)}</li>")
    return f'<ul class="legend">{"".join(entries)}</ul>'


def parallel(axes: Sequence[tuple[str, Scale, Sequence[str]]], caption: str, best: int, most: int) -> str:
    """Parallel coordinates, with horizontal axes so that long names fit. An axis, (name, Scale of its values, these as texts),
    is a row. A line through the rows joins values with the same index: line `best`, which stands out, and at most `most`
    others, spread evenly."""
    parts, heights = [], [ROW * row + 26 for row in range(len(axes))]
    for height, (name, scale, _) in zip(heights, axes):
        ticks = "".join(f"M{at:.4g} {height - 3}v6" for at in scale(scale.ticks()))
        parts.append(
            f'<path class="frame" d="M{scale.start} {height}H{scale.end}{ticks}"/>{_text(4, height - 10, name, "name")}'
        )
        parts += [_text(at, height + 14, f"{tick:.4g}") for at, tick in zip(scale(scale.ticks()), scale.ticks())]
    across = np.array([scale(scale.values) for _, scale, _ in axes])
    number = across.shape[1]
    kept = [best, *(line for line in _spread(number, most) if line != best)]
    for line in kept[::-1]:  # the best one on top
        style = 'class="curve best"' if line == best else f'class="curve" style="opacity:{0.75 - 0.5 * line / number:.2f}"'
        parts.append(f'<g {style}><polyline points="{_points(across[:, line], np.array(heights))}"/></g>')
    data = {
        "axes": [name for name, _, _ in axes],
        "curves": [{"name": f"Rank {line + 1}", "y": [texts[line] for _, _, texts in axes]} for line in kept[::-1]],
    }
    shown = f" {len(kept)} of {number} settings, evenly by rank." if len(kept) < number else ""
    return _figure("".join(parts), heights[-1] + 24, caption + shown, data)


def boxes(rows: list[tuple[str, np.ndarray]], caption: str, x_label: str, most: int) -> str:
    """A row for each (name, values [trials, clients]): quartiles as a box, the extremes as whiskers, and, if there are at most
    `most` values, a point for each, the clients one below another. NaN is left out."""
    x = Scale(np.concatenate([values[~np.isnan(values)] for _, values in rows]), 14, WIDTH - 14)
    bottom = ROW * len(rows) + 4
    grid = "".join(f"M{at:.1f} 4V{bottom}" for at in x(x.ticks()))
    parts = [f'<path class="grid" d="{grid}"/>', _text(WIDTH / 2, bottom + 32, x_label)]
    parts += [_text(at, bottom + 14, f"{tick:.4g}") for at, tick in zip(x(x.ticks()), x.ticks())]
    for row, (name, values) in enumerate(rows):
        is_there = ~np.isnan(values)
        five = np.quantile(values[is_there], (0, 0.25, 0.5, 0.75, 1))
        worst, lower, median, upper, best = x(five)
        middle = ROW * row + 33
        text = f"{name}: worst {five[0]:.4f}, quartiles {five[1]:.4f}, {five[2]:.4f} and {five[3]:.4f}, best {five[4]:.4f}"
        dots = ""
        if is_there.sum() <= most:
            down = np.broadcast_to(middle - 9 + 18 * (np.arange(values.shape[1]) + 0.5) / values.shape[1], values.shape)
            path = "".join(f"M{at:.1f} {y:.1f}h0" for at, y in zip(x(values[is_there]), down[is_there]))
            dots = f'<path class="dots" d="{path}"/>'
        parts.append(
            f'<g><title>{html.escape(text)}</title>{dots}<path class="box" d="M{worst:.1f} {middle}H{lower:.1f}'
            f'M{upper:.1f} {middle}H{best:.1f}M{lower:.1f} {middle - 9}H{upper:.1f}v18H{lower:.1f}z"/>'
            f'<path class="median" d="M{median:.1f} {middle - 9}v18"/></g>' + _text(4, middle - 14, name, "name")
        )
    return _figure("".join(parts), bottom + 40, caption)


def _figure(drawn: str, height: int, caption: str, data: object = None, legend: str = "") -> str:
    caption = html.escape(caption)
    script = "" if data is None else f'<script type="application/json">{escaped_json(data)}</script>'
    svg = f'<svg class="chart" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{caption}">{drawn}</svg>'
    return f"<figure>{svg}{legend}<figcaption>{caption}</figcaption>{script}</figure>"
