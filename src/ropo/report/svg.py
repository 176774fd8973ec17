"""The parts that every figure is made of: a frame with axes, lines, dots, words. All are strings of SVG.

In: numbers in data units. Out: elements whose looks are left to a style sheet, by `class`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from ropo.report.statistics import round_step


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """The rectangle that data is drawn in, and the range of data that fills it; all in SVG units or data units."""

    x_range: tuple[float, float]
    y_range: tuple[float, float]
    width: float = 460.0
    height: float = 250.0
    left: float = 44.0
    right: float = 14.0
    top: float = 14.0
    bottom: float = 40.0

    def x(self, value: float) -> float:
        """Where a value stands on the level axis."""
        low, high = self.x_range
        return self.left + (value - low) / (high - low) * (self.width - self.left - self.right)

    def y(self, value: float) -> float:
        """Where a value stands on the upright axis."""
        low, high = self.y_range
        return self.height - self.bottom - (value - low) / (high - low) * (self.height - self.top - self.bottom)


def axes(
    frame: Frame,
    *,
    x_label: str,
    y_label: str,
    num_x: int = 5,
    x_ticks: Sequence[tuple[float, str]] | None = None,
    y_format: Callable[[float], str] | None = None,
    has_y: bool = True,
) -> str:
    """Both axes with ticks, names and a level grid.

    Args:
        frame: Where.
        x_label: Name of the level axis.
        y_label: Name of the upright axis; empty for none.
        num_x: About how many ticks the level axis gets.
        x_ticks: Values and names of those ticks, instead.
        y_format: How values of the upright axis are written.
        has_y: Whether there is an upright axis.
    """
    bottom, right = frame.height - frame.bottom, frame.width - frame.right
    parts = []
    if has_y:
        for tick, name in ticks(*frame.y_range, 4, y_format):
            y = frame.y(tick)
            parts.append(line(frame.left, y, right, y, "grid"))
            parts.append(text(frame.left - 6, y + 4, name, "end"))
        if y_label:
            parts.append(text(frame.left, frame.top - 2 if frame.top < 20 else 10, y_label, "start"))
    for tick, name in x_ticks if x_ticks is not None else ticks(*frame.x_range, num_x, None):
        parts.append(line(frame.x(tick), bottom, frame.x(tick), bottom + 4, "axis"))
        parts.append(text(frame.x(tick), bottom + 17, name, "middle"))
    parts.append(line(frame.left, bottom, right, bottom, "axis"))
    if x_label:
        parts.append(text((frame.left + right) / 2, frame.height - 4, x_label, "middle"))
    return "".join(parts)


def ticks(low: float, high: float, wanted: int, form: Callable[[float], str] | None) -> list[tuple[float, str]]:
    """Round numbers inside a range, with their names."""
    step = round_step((high - low) / wanted)
    places = len(f"{step:.9f}".rstrip("0").split(".")[1])
    first, last = np.ceil(low / step - 1e-9), np.floor(high / step + 1e-9)
    values = [float(value) for value in np.arange(first, last + 1) * step + 0.0]  # + 0.0 turns −0 into 0
    return [(value, form(value) if form else _tick_name(value, places)) for value in values]


def _tick_name(value: float, places: int) -> str:
    return f"{value:,.{places}f}".replace("-", "−")


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    """A straight line, in SVG units."""
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def dot(x: float, y: float, radius: int, kind: str = "accent") -> str:
    """A filled circle, in SVG units."""
    return f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}"/>'


def whisker(frame: Frame, value: float, low: float, high: float, y: float, kind: str = "accent") -> str:
    """A dot with its interval, on a level line."""
    return line(frame.x(low), y, frame.x(high), y, f"{kind} whisker") + dot(frame.x(value), y, 4, kind)


def path(frame: Frame, xs: Sequence[float], ys: Sequence[float], kind: str) -> str:
    """A line through points, in data units."""
    points = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in zip(xs, ys, strict=True))
    return f'<polyline class="{kind}" points="{points}"/>'


def text(x: float, y: float, words: str, anchor: str, kind: str = "") -> str:
    """Words at a place, in SVG units; they may be anything."""
    style = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{style}>{escape(words)}</text>'


def drawing(body: str, width: float, height: float, *, label: str | None, name: str = "plot") -> str:
    """The outer element; without a label it is decoration and hidden from screen readers."""
    reading = 'aria-hidden="true"' if label is None else f'role="img" aria-label="{escape(label, quote=True)}"'
    size = f'width="{width:.0f}" height="{height:.0f}"'
    return f'<svg class="{name}" viewBox="0 0 {width:.0f} {height:.0f}" {size} {reading}>{body}</svg>'
