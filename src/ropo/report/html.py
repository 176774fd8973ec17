"""The dict of the report -> report.html, report.md and report.json.

In: what `tables.build_tables` takes. Out: three files, each whole or absent.

The one idea: responses are untrusted text. Whatever a template prints is escaped unless this file made it markup, and
it makes markup of four things only: figures (`plots`, which escapes its labels), the package's own style sheet and
script, commands in its own sentences, and fenced blocks. The page also forbids itself, by a content security policy, to
load anything or to run any other script.
"""

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import pyarrow as pa
from markupsafe import Markup, escape

from ropo.pairs import Pair
from ropo.provenance import Json, write_aside
from ropo.report import plots
from ropo.report.tables import DECISIONS, build_tables
from ropo.report.wording import count, counted, decimal, percent, percent_range, probability

Table = Mapping[str, Any]

SHOWN_CONFIG_CHARACTERS = 300


def write_report(
    output_dir: Path,
    *,
    ledger: pa.Table,
    summary: Mapping[str, Any],
    pairs: Sequence[Pair],
    training_log: Sequence[Json],
    checks: Mapping[int, Sequence[float]] | None = None,
) -> None:
    """Write report.html, report.md and report.json, all from the same numbers.

    Args:
        output_dir: Folder to write to; made if it does not exist.
        ledger: One row per pair and round, with the columns of `ledger.parquet`.
        summary: What `summary.json` holds, and optionally "weight_curve": {"margin", "weight", "loss"}.
        pairs: All original pairs, and the resampled ones (origin "resampled").
        training_log: Entries of the trainer's log with their round under "round"; may be empty.
        checks: Held-out margins of each row at the checks of the training that judged it, if there was one.

    Raises:
        ValueError: If the ledger is empty or names a row that `pairs` lacks.
    """
    tables = build_tables(ledger, summary, pairs, training_log, checks or {})
    pages = {
        "report.html": render_html(tables),
        "report.md": render_markdown(tables),
        "report.json": json.dumps(tables, indent=1, ensure_ascii=False, allow_nan=False) + "\n",
    }
    for name, page in pages.items():
        with write_aside(output_dir / name) as aside:
            aside.write_text(page, encoding="utf-8")


def render_html(tables: Table) -> str:
    """The report as one self-contained page."""
    script = _source("report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    template = _environment(is_html=True).get_template("report.html.jinja")
    return template.render(
        tables,
        figures={name: Markup(svg) for name, svg in figures(tables).items()},
        style=Markup(_source("report.css")),
        script=Markup(script),
        script_hash=digest,
    )


def render_markdown(tables: Table) -> str:
    """The report as Markdown: the same numbers, texts in fenced blocks, no figures."""
    return _environment(is_html=False).get_template("report.md.jinja").render(tables)


def figures(tables: Table) -> dict[str, str]:
    """All figures of the page as SVG, by name; a figure without data is absent."""
    found = {f"swatch_{decision}": plots.swatch(decision) for decision in DECISIONS}
    found["patterns"] = plots.patterns()
    found["gauge"] = plots.interval_gauge(tables["estimate"])
    found["bar"] = plots.decision_bar(tables["counts"])
    if tables["margins"]["num_pairs"]:
        found["margins_wide"] = plots.margin_histogram(tables["margins"])
        found["margins_narrow"] = plots.margin_histogram(tables["margins"], width=380.0, height=260.0)
    if tables["review"]:
        found["review"] = plots.review_curve(tables["review"])
    if tables["calibration"] and tables["calibration"]["bins"]:
        found["calibration"] = plots.calibration_curve(tables["calibration"]["bins"])
    if any(entry["rate"] is not None for entry in tables["annotators"]["rows"]):
        found["annotators"] = plots.annotator_rates(tables["annotators"]["rows"], tables["estimate"])
    training = tables["training"]
    for curve in training["curves"]:
        found[f"training_{curve['key']}"] = plots.training_curve(curve, training["starts"], training["num_steps"])
    if tables["weight_curve"]:
        found["weight"] = plots.weight_curve(tables["weight_curve"])
    if shown := [entry for entry in tables["biases"]["features"] if entry["all"]["num_pairs"]]:
        found["biases"] = plots.bias_shares(shown)
    if tables["file_parts"]:
        found["file_parts"] = plots.part_means(tables["file_parts"])
    return found


@cache
def _environment(*, is_html: bool) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ropo.report"),
        # Autoescape knows HTML only; for Markdown `finalize` escapes whatever an expression prints.
        autoescape=is_html,
        finalize=None if is_html else _markdown,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "count": count,
        "counted": counted,
        "decimal": decimal,
        "percent": percent,
        "probability": probability,
        "decision": lambda decision: DECISIONS[decision][0],
        "prose": _html_prose if is_html else _markdown_prose,
        "fenced": _fenced,
        "markup": Markup,  # for what a macro of Markdown has printed, which is escaped already
        "clipped": lambda text: text if len(text) <= SHOWN_CONFIG_CHARACTERS else text[:SHOWN_CONFIG_CHARACTERS] + " …",
    }
    environment.globals["percent_range"] = percent_range
    return environment


def _source(name: str) -> str:
    return (Path(__file__).parent / "templates" / name).read_text(encoding="utf-8")


def _html_prose(text: str) -> Markup:
    """Escape a sentence, then set what stands between backticks as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _markdown(value: object) -> str:
    """Escape what is not markup already, and join its lines: a line end would close a table row or a sentence."""
    return value if isinstance(value, Markup) else _escape_markdown(re.sub(r"\s*\n\s*", " ", str(value)))


def _escape_markdown(text: str) -> str:
    return re.sub(r"([\\`*_{}\[\]<>#|~$&])", r"\\\1", text)


def _markdown_prose(text: str) -> Markup:
    pieces = re.split(r"(`[^`\n]+`)", text)  # every second piece is a command
    return Markup("".join(piece if i % 2 else _escape_markdown(piece) for i, piece in enumerate(pieces)))


def _fenced(shown: Table) -> Markup:
    """A text in a fence longer than any row of backticks inside it."""
    turns = [(turn["role"], "".join(part for part, _ in turn["parts"])) for turn in shown["turns"]]
    text = "\n\n".join(f"{role}: {content}" if role else content for role, content in turns)
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    return Markup(f"{fence}text\n{text}\n{fence}")
