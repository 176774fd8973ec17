"""Arrays -> SVG strings that live inside the page: text stays text, colours come from the page's style sheet.

In: sections of the dict that `tables.build_tables` makes. Out: one `<svg>` per figure.

The one idea: a figure only names what its parts are (`class="drop"`); `templates/report.css` gives them colours for
light, dark and print. Kinds of bars differ by pattern as well as by colour, lines by dashes and by a label at their
end. A figure has two widths where it is too wide for a phone, because scaled-down text cannot be read.

Add a figure: one function here, one call in `html.figures`, one caption in the template.
"""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from ropo.report import svg
from ropo.report.statistics import round_step
from ropo.report.tables import DECISIONS
from ropo.report.wording import count, decimal, percent, percent_range

Table = Mapping[str, Any]

NAME_CHARACTERS = 16  # that fit beside a figure

# The order in which bars are stacked, from the axis upwards.
STACK = ("keep", "drop", "resample", "flip")


def patterns() -> str:
    """Fills that tell decisions apart without colour; the page holds them once and all figures refer to them."""
    return (
        '<svg class="patterns" width="0" height="0" aria-hidden="true"><defs>'
        '<pattern id="fill-flip" width="5" height="5" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
        '<rect class="paper" width="5" height="5"/><rect class="accent" width="2.4" height="5"/></pattern>'
        '<pattern id="fill-resample" width="5" height="5" patternUnits="userSpaceOnUse">'
        '<rect class="paper" width="5" height="5"/><circle class="accent" cx="2.5" cy="2.5" r="1.4"/></pattern>'
        "</defs></svg>"
    )


def decision_bar(counts: Table) -> str:
    """One bar of all pairs, split by decision; as wide as its place, so in percent and without a view box."""
    height, x = 18, 0.0
    body = []
    for decision in STACK:
        share = 100 * counts[decision] / counts["num_pairs"]
        fill = _fill(decision)
        if share > 0:
            box = f'x="{x:.2f}%" y="1" width="{share:.2f}%" height="{height - 2}"'
            body.append(f'<rect class="{decision}" {box}{fill}/>')
            x += share
    parts = [f"{count(counts[decision])} {DECISIONS[decision][0]}" for decision in STACK if counts[decision]]
    label = escape("All pairs by decision: " + ", ".join(parts), quote=True)
    return f'<svg class="bar" width="100%" height="{height}" role="img" aria-label="{label}">{"".join(body)}</svg>'


def interval_gauge(estimate: Table, *, width: float = 320.0) -> str:
    """The estimated flip rate with its interval on the scale from 0 to one half, where labels carry nothing."""
    frame = svg.Frame(
        width=width, height=46, x_range=(0.0, 0.5), y_range=(0.0, 1.0), left=10, right=10, top=6, bottom=24
    )
    y = frame.y(0.5)
    body = [svg.line(frame.x(0), y, frame.x(0.5), y, "axis")]
    for tick in (0.0, 0.1, 0.2, 0.3, 0.4, 0.5):
        body.append(svg.line(frame.x(tick), y - 3, frame.x(tick), y + 3, "axis"))
        name = percent(tick) if tick == 0.5 else f"{100 * tick:.0f}"
        body.append(svg.text(frame.x(tick), frame.height - 4, name, "middle"))
    label = "Flip rate: unknown"
    if estimate["is_informative"]:
        low, high = frame.x(min(estimate["low"], 0.5)), frame.x(min(estimate["high"], 0.5))
        box = f'x="{low:.1f}" y="{y - 6:.1f}" width="{max(high - low, 2):.1f}" height="12"'
        body.append(f'<rect class="accent soft" {box} rx="2"/>')
        body.append(svg.dot(frame.x(min(estimate["rate"], 0.5)), y, 5))
        shown = percent_range(estimate["low"], estimate["high"])
        label = f"Flip rate {percent(estimate['rate'])}, interval {shown}"
    return svg.drawing("".join(body), width, frame.height, label=label)


def margin_histogram(margins: Table, *, width: float = 940.0, height: float = 280.0) -> str:
    """Stacked histogram of the margins by decision, with a line at 0 where the model stops agreeing with the label."""
    edges = [float(edge) for edge in margins["edges"]]
    stacked = np.cumsum([margins["counts"][decision] for decision in STACK], axis=0)
    frame = svg.Frame(
        width=width,
        height=height,
        x_range=(edges[0], edges[-1]),
        y_range=(0.0, float(stacked[-1].max()) * 1.04 or 1.0),
        left=8 + 8.0 * len(count(float(stacked[-1].max()))),
        top=26,
    )
    body = [svg.axes(frame, x_label="margin, nats", y_label="pairs", num_x=10 if width > 600 else 5)]
    for layer, decision in enumerate(STACK):
        below = stacked[layer - 1] if layer else np.zeros(len(edges) - 1)
        for i in np.flatnonzero(stacked[layer] > below):
            left, top, base = frame.x(edges[i]), frame.y(float(stacked[layer][i])), frame.y(float(below[i]))
            body.append(_rect(left + 0.5, top, frame.x(edges[i + 1]) - left - 1, base - top, decision))
    zero = frame.x(0.0)
    body.append(svg.line(zero, frame.top - 10, zero, frame.y(0), "zero"))
    if width > 600:
        body.append(svg.text(zero - 6, frame.top - 8, "← model contradicts the label", "end", "strong"))
        body.append(svg.text(zero + 6, frame.top - 8, "agrees →", "start", "strong"))
    else:
        body.append(svg.text(zero - 5, frame.top - 8, "← contradicts", "end", "strong"))
        body.append(svg.text(zero + 5, frame.top - 8, "agrees →", "start", "strong"))
    label = f"Histogram of {count(margins['num_pairs'])} margins, {percent(margins['share_negative'])} of them below 0"
    return svg.drawing("".join(body), width, height, label=label)


def review_curve(review: Table) -> str:
    """Flips expected to be found over pairs read, the most suspect first."""
    read, found = review["num_read"], review["num_found"]
    left = 14 + 8.0 * len(count(found[-1]))
    frame = svg.Frame(x_range=(0, read[-1]), y_range=(0, max(found[-1] * 1.05, 1)), left=left, right=20)
    body = [
        svg.axes(frame, x_label="pairs read, most suspect first", y_label="flips found (expected)"),
        svg.path(frame, [0, read[-1]], [0, found[-1]], "reference"),
        svg.path(frame, read, found, "accent"),
        svg.text(frame.x(read[-1] * 0.7) + 8, frame.y(found[-1] * 0.7) + 12, "in any order", "start"),
    ]
    if review["num_likely"]:
        x, y = frame.x(review["num_likely"]), frame.y(review["found_likely"])
        body.append(svg.line(x, y, x, frame.y(0), "zero"))
        body.append(svg.dot(x, y, 4))
        # To the right of the line when there is room under the curve, else to the left.
        side, anchor = (6, "start") if review["num_likely"] < 0.6 * read[-1] else (-6, "end")
        body.append(svg.text(x + side, frame.y(0) - 8, f"P(flipped) = 0.5 after {count(review['num_likely'])}", anchor))
    first = f"the first {count(review['num_likely'])} pairs of {count(read[-1])}"
    label = f"{count(review['found_likely'])} flips expected in {first}"
    return svg.drawing("".join(body), frame.width, frame.height, label=label)


def calibration_curve(bins: Sequence[Table]) -> str:
    """Predicted against observed share of labels that were flipped on purpose, by bin, with intervals."""
    # Most bins lie near 0; a square of the range in use shows them, and its diagonal is where they should lie.
    most = max(max(entry["predicted"], entry["high"]) for entry in bins)
    high = min(1.0, round_step(1.02 * most / 5) * 5)
    frame = svg.Frame(width=380, height=340, x_range=(0.0, high), y_range=(0.0, high), left=54, right=20, top=22)
    ticks = svg.ticks(0.0, high, 5, percent)
    body = [
        svg.axes(frame, x_label="predicted share", y_label="observed share", x_ticks=ticks, y_format=percent),
        svg.line(frame.x(0), frame.y(0), frame.x(high), frame.y(high), "reference"),
    ]
    for entry in bins:
        x = frame.x(min(entry["predicted"], high))
        body.append(
            svg.line(x, frame.y(min(entry["low"], high)), x, frame.y(min(entry["high"], high)), "accent whisker")
        )
        body.append(svg.dot(x, frame.y(min(entry["observed"], high)), 4))
    pairs = ", ".join(f"{percent(entry['predicted'])} and {percent(entry['observed'])}" for entry in bins)
    return svg.drawing("".join(body), frame.width, frame.height, label=f"Predicted and observed share by bin: {pairs}")


def annotator_rates(annotators: Sequence[Table], estimate: Table) -> str:
    """The rate of each annotator with its interval, and the interval of all as a band."""
    known = [entry for entry in annotators if None not in (entry["rate"], entry["low"], entry["high"])]
    high = min(1.0, 1.05 * max(max(entry["high"] for entry in known), estimate["high"], 0.1))
    height = 52.0 + 24 * len(known)
    frame = svg.Frame(height=height, x_range=(0, high), y_range=(len(known), 0), left=134, right=20, top=10, bottom=42)
    ticks = svg.ticks(0.0, high, 4, percent)
    left, right = frame.x(estimate["low"]), frame.x(estimate["high"])
    box = f'x="{left:.1f}" y="{frame.top:.1f}" width="{max(right - left, 1):.1f}"'
    body = [
        f'<rect class="band" {box} height="{height - frame.top - frame.bottom:.1f}"/>',
        svg.axes(frame, x_label="share of labels that look flipped", y_label="", x_ticks=ticks, has_y=False),
    ]
    for index, entry in enumerate(known):
        y = frame.y(index + 0.5)
        body.append(svg.whisker(frame, entry["rate"], entry["low"], entry["high"], y))
        body.append(svg.text(frame.left - 10, y + 4, _clipped(entry["name"]), "end"))
    label = "Rate by annotator: " + ", ".join(f"{entry['name']} {percent(entry['rate'])}" for entry in known)
    return svg.drawing("".join(body), frame.width, height, label=label)


def bias_shares(features: Sequence[Table]) -> str:
    """How often chosen has more of each feature: a full dot for kept pairs, a hollow one for the others."""
    height = 52.0 + 34 * len(features)
    frame = svg.Frame(height=height, x_range=(0, 1), y_range=(len(features), 0), left=188, right=20, top=10, bottom=42)
    ticks = [(share, percent(share)) for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
    body = [
        svg.axes(frame, x_label="pairs whose chosen has more", y_label="", x_ticks=ticks, has_y=False),
        svg.line(frame.x(0.5), frame.top, frame.x(0.5), height - frame.bottom, "zero"),
    ]
    for index, entry in enumerate(features):
        y = frame.y(index + 0.5)
        body.append(svg.text(frame.left - 10, y + 4, entry["name"], "end", "strong" if entry["is_clear"] else ""))
        for group, shift, kind in (("kept", -5, "accent"), ("not_kept", 6, "hollow")):
            shown = entry[group]
            if shown["num_pairs"]:
                body.append(svg.whisker(frame, shown["share"], shown["low"], shown["high"], y + shift, kind))
    label = "Share whose chosen response has more: " + ", ".join(
        f"{entry['name']} {percent(entry['all']['share'])}" for entry in features
    )
    return svg.drawing("".join(body), frame.width, height, label=label)


def part_means(parts: Sequence[Table]) -> str:
    """Mean P(flipped) of each tenth of the file, in the order of the rows."""
    high = 1.15 * max(max(entry["p_flip_mean"] for entry in parts), 0.05)
    frame = svg.Frame(x_range=(0, len(parts)), y_range=(0.0, min(high, 1.0)), left=44, top=22, height=230)
    ticks = [(float(i), count(entry["first_row"])) for i, entry in enumerate(parts) if i % 2 == 0]
    body = [svg.axes(frame, x_label="row", y_label="mean P(flipped)", x_ticks=ticks)]
    for index, entry in enumerate(parts):
        left, right, y = frame.x(index) + 2, frame.x(index + 1) - 2, frame.y(entry["p_flip_mean"])
        body.append(_rect(left, y, right - left, frame.y(0) - y, "drop" if entry["is_high"] else "keep"))
    means = ", ".join(decimal(entry["p_flip_mean"]) for entry in parts)
    return svg.drawing("".join(body), frame.width, frame.height, label=f"Mean P(flipped) by tenth of the file: {means}")


def training_curve(curve: Table, starts: Sequence[int], num_steps: int) -> str:
    """One metric over the steps of all rounds, rounds one after another."""
    values = [value for line in curve["lines"] for value in line["y"]]
    reference = curve["reference"]
    shown = values + ([reference] if reference is not None else [])
    low, high = min(shown), max(shown)
    room = 0.08 * (high - low) or 0.5
    low, high = (0.0 if low == 0 else low - room), high + room
    frame = svg.Frame(height=220, x_range=(0, max(num_steps, 1)), y_range=(low, high), left=52, top=22)
    body = [svg.axes(frame, x_label="training step", y_label="")]
    if reference is not None:
        body.append(
            svg.line(frame.left, frame.y(reference), frame.width - frame.right, frame.y(reference), "reference")
        )
    for line, start in zip(curve["lines"], starts, strict=True):
        if len(starts) > 1:
            body.append(svg.line(frame.x(start), frame.top - 12, frame.x(start), frame.y(low), "zero"))
            body.append(svg.text(frame.x(start) + 4, frame.top - 6, f"round {line['round']}", "start"))
        if len(line["x"]) == 1:
            body.append(svg.dot(frame.x(line["x"][0]), frame.y(line["y"][0]), 3))
        body.append(svg.path(frame, line["x"], line["y"], "accent"))
    ends = [decimal(line["y"][-1], 3) for line in curve["lines"] if line["y"]]
    label = f"{curve['title']} over {count(num_steps)} steps; at the end of each round: {', '.join(ends)}"
    return svg.drawing("".join(body), frame.width, frame.height, label=label)


def weight_curve(curve: Table) -> str:
    """How hard a pair pulls, by its margin, under the loss used and under DPO."""
    margin, weight, dpo = curve["margin"], curve["weight"], curve["dpo"]
    shown = [value for value in [*weight, *dpo, 0.0] if value is not None]
    frame = svg.Frame(x_range=(margin[0], margin[-1]), y_range=(min(shown), max(shown) * 1.15))
    body = [
        svg.axes(frame, x_label="margin, nats", y_label="gradient weight"),
        svg.line(frame.x(0), frame.top, frame.x(0), frame.y(min(shown)), "zero"),
    ]
    if curve["loss"] != "dpo":
        body.append(svg.path(frame, margin, dpo, "reference"))
        body.append(svg.text(frame.x(margin[0]) + 6, frame.y(dpo[0]) + 16, "dpo", "start"))
    body.append(svg.path(frame, margin, weight, "accent"))
    body.append(svg.text(frame.x(margin[0]) + 6, frame.y(weight[0]) - 8, curve["loss"], "start", "strong"))
    label = f"Gradient weight of {curve['loss']} by margin, {decimal(weight[0])} at {decimal(margin[0], 0)} nats"
    return svg.drawing("".join(body), frame.width, frame.height, label=label)


def swatch(decision: str) -> str:
    """A small square in the look that bars of a decision have, for legends."""
    return svg.drawing(_rect(0.5, 0.5, 13, 13, decision), 14, 14, label=None, name="swatch")


def _rect(x: float, y: float, width: float, height: float, decision: str) -> str:
    box = f'x="{x:.1f}" y="{y:.1f}" width="{max(width, 0.5):.1f}" height="{height:.1f}"'
    return f'<rect class="{decision}" {box}{_fill(decision)}/>'


def _fill(decision: str) -> str:
    return f' fill="url(#fill-{decision})"' if decision in ("flip", "resample") else ""


def _clipped(name: str) -> str:
    """A name of the data, short enough for the margin of a figure."""
    return name if len(name) <= NAME_CHARACTERS else name[: NAME_CHARACTERS - 1] + "…"
