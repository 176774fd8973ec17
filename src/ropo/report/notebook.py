"""A result in a few lines: as text for a terminal, as a small table for a notebook.

In: what `summary.json` holds. Out: names with values, then one string of them. Whatever comes from data or from the
user is escaped where it becomes HTML.
"""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from ropo.report.clauses import OBSTACLES
from ropo.report.wording import NB_SPACE, count, percent, percent_range

Rows = Sequence[tuple[str, str]]


def summary_rows(summary: Mapping[str, Any]) -> Rows:
    """What a reader wants to know first of a run or an audit."""
    names = ("kept", "dropped", "flipped", *(("resampled",) if summary["num_resampled"] else ()))
    done = ", ".join(f"{count(summary[f'num_{name}'])} {name}" for name in names)
    rows = [("flipped labels", _rate(summary)), ("pairs", f"{count(summary['num_pairs'])} ({done})")]
    if found := summary.get("evaluation"):
        last = found["rounds"][-1]
        interval = percent_range(last["low"], last["high"])
        rows.append(("evaluation accuracy", f"{percent(last['accuracy'])} (90 % interval {interval})"))
    return rows


def _rate(summary: Mapping[str, Any]) -> str:
    rate = summary["flip_rate"]
    if summary["is_informative"]:
        return f"{percent(rate['estimate'])} (90 % interval {percent_range(rate['low'], rate['high'])})"
    bound = "" if rate["high"] is None else f", at most {percent(rate['high'])}"
    obstacle = summary["obstacle"]
    return f"cannot tell ({OBSTACLES.get(obstacle, (obstacle,))[0]}){bound}"


def as_text(title: str, rows: Rows) -> str:
    """Title and rows as lines.

    Examples:
        >>> print(as_text("Result", [("pairs", "20")]))
        Result
          pairs: 20
    """
    return "\n".join([title, *(f"  {name}: {value}" for name, value in rows)]).replace(NB_SPACE, " ")


def as_html(title: str, rows: Rows) -> str:
    """The same as a table, escaped.

    Examples:
        >>> as_html("<b>", [("pairs", "20")])
        '<table><caption>&lt;b&gt;</caption><tr><th>pairs</th><td>20</td></tr></table>'
    """
    body = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows)
    return f"<table><caption>{escape(title)}</caption>{body}</table>"
