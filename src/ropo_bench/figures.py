"""Rows of a benchmark to pictures: score over flip rate, gold reward over distance, cost against quality, detection.

In: rows as `grid` writes them. Out: SVG files that stand alone, for light and dark pages.

The one idea: a line has its name at its end, and methods differ by dash and mark as well as by colour.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ropo.report import svg
from ropo_bench.results import Interval, Row, cells_of, mean_gap_closed, methods_of, relative_cost

# Okabe and Ito's colours, which most colour-blind eyes tell apart; ropo is the strongest.
COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1", "#7f7f7f")
DASHES = ("", "7 3", "2 3", "9 3 2 3")
STYLE = """
text { font: 13px system-ui, sans-serif; fill: #57534e; font-variant-numeric: tabular-nums; }
text.strong { fill: #1c1917; font-weight: 600; }
.axis { stroke: #78716c; } .grid { stroke: #e7e5e4; }
polyline { fill: none; stroke-width: 1.75; stroke-linejoin: round; } polyline.ropo { stroke-width: 3; }
.whisker { stroke-width: 1.5; } .line { stroke-dasharray: 3 3; opacity: .75; }
.paper { fill: #fff; }
@media (prefers-color-scheme: dark) {
  text { fill: #a8a29e; } text.strong { fill: #f5f5f4; } .axis { stroke: #a8a29e; } .grid { stroke: #44403c; }
  .paper { fill: #0d1117; }
}
"""
LABEL_HEIGHT, WIDTH = 15.0, 760.0


@dataclass(frozen=True, slots=True)
class Look:
    """How a method's line looks."""

    colour: str
    dash: str

    @property
    def stroke(self) -> str:
        """As a style of SVG."""
        dash = f"; stroke-dasharray: {self.dash}" if self.dash else ""
        return f"stroke: {self.colour}{dash}"


def looks_of(names: Sequence[str]) -> dict[str, Look]:
    """A colour and a dash for each method; ropo has its own colour."""
    looks = {"ropo": Look(COLOURS[0], "")}
    for place, name in enumerate(name for name in names if name != "ropo"):
        looks[name] = Look(COLOURS[1 + place % (len(COLOURS) - 1)], DASHES[(place + 1) // 2 % len(DASHES)])
    return looks


def score_over_rate(rows: Sequence[Row], key: str, *, methods: Sequence[str], y_label: str) -> str:
    """A score over the share of symmetric flips, one line per method, with 90 % intervals over seeds."""
    cells = [cell for cell in cells_of(rows) if cell.kind == "symmetric"]
    lines: dict[str, list[tuple[float, Interval]]] = {}
    for name in methods:
        found = [(cell.flip_rate, cell.mean(name, key)) for cell in cells]
        if points := [(rate, one) for rate, one in found if one.count]:
            lines[name] = points
    shown = [
        one.mean + sign * np.nan_to_num(one.half) for line in lines.values() for _, one in line for sign in (-1, 1)
    ]
    frame = svg.Frame(
        width=WIDTH,
        height=400.0,
        x_range=(min(cell.flip_rate for cell in cells) - 0.01, max(cell.flip_rate for cell in cells) + 0.01),
        y_range=_range(shown),
        left=52.0,
        right=190.0,
        top=26.0,
    )
    ticks = [(cell.flip_rate, f"{cell.flip_rate:.0%}") for cell in cells]
    body = [svg.axes(frame, x_label="labels flipped", y_label=y_label, x_ticks=ticks)]
    looks = looks_of(list(lines))
    ends: dict[str, float] = {}
    for number, (name, points) in enumerate(lines.items()):
        look = looks[name]
        kind = "ropo" if name == "ropo" else "line" if name in ("ceiling", "information_line") else "method"
        shift = (number - len(lines) / 2) * 0.0006  # whiskers of one rate stand beside each other
        xs, ys = [rate + shift for rate, _ in points], [one.mean for _, one in points]
        body.append(svg.path(frame, xs, ys, kind).replace("<polyline", f'<polyline style="{look.stroke}"'))
        for x, (_, one) in zip(xs, points, strict=True):
            body.append(f'<circle cx="{frame.x(x):.1f}" cy="{frame.y(one.mean):.1f}" r="3" fill="{look.colour}"/>')
            if np.isfinite(one.half):
                at = (frame.x(x), frame.y(one.mean - one.half), frame.x(x), frame.y(one.mean + one.half))
                body.append(svg.line(*at, "whisker").replace("<line", f'<line style="stroke: {look.colour}"'))
        ends[name] = frame.y(ys[-1])
    body.append(names_at_ends(frame, ends, looks))
    return stand_alone("".join(body), frame, f"{y_label} over the share of flipped labels for {', '.join(lines)}")


def gold_over_distance(rows: Sequence[Row], *, methods: Sequence[str]) -> str:
    """Gold reward over the distance to the start, one mark per method and cell: a reward is worth what it costs."""
    points = {
        name: [
            (cell.mean(name, "kl").mean, cell.mean(name, "gold").mean)
            for cell in cells_of(rows)
            if cell.mean(name, "gold").count
        ]
        for name in methods
    }
    points = {name: found for name, found in points.items() if found}
    xs, ys = ([point[i] for found in points.values() for point in found] for i in (0, 1))
    frame = svg.Frame(
        width=WIDTH, height=380.0, x_range=(0.0, max([*xs, 1e-3]) * 1.05), y_range=_range(ys),
        left=52.0, right=190.0, top=26.0,
    )  # fmt: skip
    body = [svg.axes(frame, x_label="distance to the start, nats", y_label="gold reward")]
    looks = looks_of(list(points))
    for number, (name, found) in enumerate(points.items()):
        shape = _MARKS[number % len(_MARKS)]
        body += [shape(frame.x(x), frame.y(y), looks[name].colour) for x, y in found]
        at = frame.top + LABEL_HEIGHT * number
        body.append(shape(frame.width - frame.right + 14, at, looks[name].colour))
        body.append(_name_at(frame.width - frame.right + 24, at, name))
    return stand_alone("".join(body), frame, "Gold reward over the distance to the start, by method and kind of noise")


def cost_and_quality(rows: Sequence[Row]) -> str:
    """Mean gap closed in accuracy over the cost of a run, one mark per method."""
    cells, (_, names) = cells_of(rows), methods_of(rows)
    found = {name: (relative_cost(cells, name), mean_gap_closed(cells, name, "accuracy")) for name in names}
    found = {name: both for name, both in found.items() if both[1].count and np.isfinite(both[0])}
    low = max(min(one.mean - _half(one) for _, one in found.values()), -1.5)
    high = max(one.mean + _half(one) for _, one in found.values())
    costs = [cost for cost, _ in found.values()]
    frame = svg.Frame(
        width=WIDTH, height=400.0, x_range=(min(np.log10(min(costs)), 0) - 0.05, np.log10(max(costs)) + 0.25),
        y_range=(low - 0.05, high + 0.05), left=52.0, right=20.0, top=26.0,
    )  # fmt: skip
    ticks = [
        (float(np.log10(value)), f"{value:g}×")
        for value in (0.5, 1, 2, 5, 10, 20)
        if 0.8 * min(costs) <= value <= 2 * max(costs)
    ]
    body = [svg.axes(frame, x_label="cost, as a multiple of DPO's", y_label="gap closed, accuracy", x_ticks=ticks)]
    looks = looks_of(list(found))
    wanted = {name: frame.y(max(one.mean, low)) for name, (_, one) in found.items()}
    heights = spread(wanted, low=frame.top, high=frame.height - frame.bottom)
    marks = [(frame.x(float(np.log10(cost))), frame.y(max(one.mean, low))) for cost, one in found.values()]
    for name, (cost, one) in found.items():
        x, y, colour = frame.x(float(np.log10(cost))), frame.y(max(one.mean, low)), looks[name].colour
        if np.isfinite(one.half):
            at = (x, frame.y(max(one.mean - one.half, low)), x, frame.y(one.mean + one.half))
            body.append(svg.line(*at, "whisker").replace("<line", f'<line style="stroke: {colour}"'))
        body.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>')
        # Names of marks that stand close together begin behind the last of them.
        beside = max(ox for ox, oy in marks if ox - x < (48 if abs(oy - y) < 50 else 24)) + 20
        lead = svg.line(x + 5, y, beside - 4, heights[name], "end")
        body.append(lead.replace("<line", f'<line style="stroke: {colour}"'))
        body.append(_name_at(beside, heights[name], name))
    return stand_alone("".join(body), frame, "Gap closed over cost, by method")


def spread(wanted: Mapping[str, float], *, low: float, high: float) -> dict[str, float]:
    """Heights for labels, as near as possible to those wanted and far enough from each other.

    Examples:
        >>> spread({"a": 10.0, "b": 12.0}, low=0.0, high=100.0)
        {'a': 3.5, 'b': 18.5}
    """
    order = sorted(wanted, key=lambda name: wanted[name])
    groups: list[tuple[list[str], float]] = []  # names and the height of their middle
    for name in order:
        groups.append(([name], wanted[name]))
        while len(groups) > 1 and _top(groups[-1]) < _top(groups[-2]) + LABEL_HEIGHT * len(groups[-2][0]):
            (first, one), (second, two) = groups[-2:]
            middle = (one * len(first) + two * len(second)) / (len(first) + len(second))
            groups[-2:] = [([*first, *second], middle)]
    found: dict[str, float] = {}
    for names, middle in groups:
        top = min(max(middle - LABEL_HEIGHT * (len(names) - 1) / 2, low), high - LABEL_HEIGHT * (len(names) - 1))
        found |= {name: top + LABEL_HEIGHT * number for number, name in enumerate(names)}
    return {name: found[name] for name in order}


def _top(group: tuple[list[str], float]) -> float:
    return group[1] - LABEL_HEIGHT * (len(group[0]) - 1) / 2


def _range(values: Sequence[float]) -> tuple[float, float]:
    """From the smallest to the largest, with some room, and never nothing."""
    low, high = min(values), max(values)
    room = 0.05 * (high - low) or 0.05
    return low - room, high + room


def _half(one: Interval) -> float:
    return float(np.nan_to_num(one.half))


def names_at_ends(frame: svg.Frame, ends: Mapping[str, float], looks: Mapping[str, Look]) -> str:
    """Names to the right of the frame, each led to by the end of its line, whose height is given in SVG units."""
    right, parts = frame.width - frame.right, []
    for name, y in spread(ends, low=frame.top, high=frame.height - frame.bottom).items():
        lead = svg.line(right + 2, ends[name], right + 16, y, "end")
        parts += [lead.replace("<line", f'<line style="{looks[name].stroke}"'), _name_at(right + 20, y, name)]
    return "".join(parts)


def _name_at(x: float, y: float, name: str) -> str:
    return svg.text(x, y + 4, name.replace("_", " "), "start", "strong" if name == "ropo" else "")


_MARKS: tuple[Callable[[float, float, str], str], ...] = (
    lambda x, y, colour: f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{colour}"/>',
    lambda x, y, colour: f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8" fill="{colour}"/>',
    lambda x, y, colour: f'<path d="M{x:.1f} {y - 5:.1f} l5 9 h-10 z" fill="{colour}"/>',
    lambda x, y, colour: f'<path d="M{x:.1f} {y - 5.5:.1f} l5.5 5.5 l-5.5 5.5 l-5.5 -5.5 z" fill="{colour}"/>',
    lambda x, y, colour: f'<circle class="paper" cx="{x:.1f}" cy="{y:.1f}" r="4" stroke="{colour}" stroke-width="2"/>',
    lambda x, y, colour: f'<path d="M{x - 4:.1f} {y - 4:.1f} l8 8 m0 -8 l-8 8" stroke="{colour}" stroke-width="2"/>',
)


def stand_alone(body: str, frame: svg.Frame, label: str) -> str:
    """A drawing with its style as a file, for light and dark pages."""
    drawing = svg.drawing(f"<style>{STYLE}</style>{body}", frame.width, frame.height, label=label)
    return drawing.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1) + "\n"
