"""Ledger, summary and texts -> everything the report says, as one dict of plain values.

In: the ledger of a run, its summary, its pairs and its training log. Out: a JSON-able dict with one key per section;
HTML, Markdown and JSON are three ways of printing it. Numbers are rounded to six digits, unknown ones are None.

The one idea: nothing is computed after this file. A sentence, a figure or a table of the report can be traced to a key.

Add a section: one function here (or in `from_summary`, `training`, `pair_tables`, `biases`), one line in
`build_tables`, one block in each template.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ropo.noise.review_order import WIDE_INTERVAL, has_suspects
from ropo.pairs import Pair
from ropo.provenance import Json
from ropo.report import from_summary, pair_tables, sentences
from ropo.report.biases import file_parts, response_biases
from ropo.report.from_summary import NUM_CURVE_POINTS
from ropo.report.statistics import Floats, mean, median, number, numbers, round_step
from ropo.report.texts import clean
from ropo.report.training import rounds, training

RANGE = 1.0  # a histogram reaches this far beyond the middle four fifths, in multiples of their width
NUM_BINS = 44  # about; the width of a bin is a round number
REVIEW_DEPTHS = (10, 20, 50, 100, 200, 500, 1000, 5000, 20000)  # pairs that somebody may have time to read
REACHES_ZERO = 0.005  # an interval that begins below this reaches 0 as far as anybody can tell

# decision: (name in the report, what it means for training)
DECISIONS: Mapping[str, tuple[str, str]] = {
    "keep": ("kept", "Trained on as labelled."),
    "drop": ("dropped", "Left out: the label speaks against what the other pairs teach."),
    "flip": ("flipped", "Trained on with chosen and rejected swapped."),
    "resample": ("resampled", "Left out; a newly sampled pair takes its place."),
}

Columns = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seen:
    """The pairs of the data beside what the last round says of them.

    Attributes:
        scores: Columns of the last round.
        originals: The pairs by row.
        in_order: The same in the order of `scores`.
        is_open: Whether nobody has said yet if the label is right, shape (pairs,).
        is_informative: Whether the flip rate can be told.
    """

    scores: Columns
    originals: Mapping[int, Pair]
    in_order: Sequence[Pair]
    is_open: NDArray[np.bool_]
    is_informative: bool

    def to_read(self, checks: Mapping[int, Sequence[float]], scorers: Sequence[Json]) -> tuple[list[Json], list[Json]]:
        """Suspects, and pairs that are merely hard."""
        scores, originals, is_open = self.scores, self.originals, self.is_open
        p_flip = scores["p_flip"].astype(np.float64)
        by_margin = not has_suspects(p_flip, is_open, is_informative=self.is_informative)
        suspects = pair_tables.suspects(scores, originals, is_open=is_open, by_margin=by_margin)
        # What is to be read first is not called merely hard as well.
        is_other = is_open & ~np.isin(scores["row"], [pair["row"] for pair in suspects] if by_margin else [])
        are_moments = all(row["name"] == "models" for row in scorers if row["is_taken"])
        hard = pair_tables.hard(
            scores, originals, checks, is_open=is_other, is_informative=self.is_informative, are_moments=are_moments
        )
        return suspects, hard


def build_tables(
    ledger: pa.Table,
    summary: Mapping[str, Any],
    pairs: Sequence[Pair],
    training_log: Sequence[Json],
    checks: Mapping[int, Sequence[float]] | None = None,
) -> Json:
    """Compute everything the report says.

    Args:
        ledger: One row per pair and round.
        summary: What `summary.json` holds; missing keys read as unknown.
        pairs: All original pairs, and the resampled ones (origin "resampled").
        training_log: Entries of the trainer's log with their round under "round".
        checks: Held-out margins of each row at the checks of the training that judged it.

    Returns:
        Plain values, one key per section of the report.

    Raises:
        ValueError: If the ledger is empty or names a row that `pairs` lacks.
    """
    seen = _seen(ledger, summary, pairs)
    scores, is_told = seen.scores, seen.is_informative
    estimate, scorers = _estimate(summary, len(seen.in_order)), from_summary.scorers(summary)
    suspects, hard = seen.to_read(checks or {}, scorers)
    is_kept = scores["decision"] == "keep"
    tables: Json = {
        "task": "audit" if summary.get("task") == "audit" else "train",
        "estimate": estimate,
        "loss": from_summary.loss(summary),
        "counts": _counts(scores, pairs, seen.in_order),
        "review": _review(scores["p_flip"][seen.is_open], is_informative=is_told),
        "contradicted": _contradicted(scores, seen.is_open),
        "calibration": from_summary.calibration(summary),
        "scorers": scorers,
        "refit": summary.get("refit"),
        "filter": summary.get("filter"),
        "with_length": from_summary.with_length(summary),
        "suspects": suspects,
        "hard": hard,
        "margins": _margins(scores),
        "annotators": from_summary.annotators(summary, estimate),
        "rounds": rounds(ledger, summary),
        "training": training(training_log),
        "evaluation": summary.get("evaluation"),
        "weight_curve": from_summary.weight_curve(summary),
        "problems": from_summary.problems(summary),
        "num_left_out": summary.get("num_left_out"),
        "decisions": _decisions(scores),
        "dropped": pair_tables.dropped(scores, seen.originals),
        "resampled": pair_tables.resampled(ledger, scores, seen.originals, pairs, summary.get("rounds") or []),
        "biases": response_biases(seen.in_order, p_flip=scores["p_flip"], is_kept=is_kept, is_informative=is_told),
        "file_parts": file_parts(scores["row"], p_flip=scores["p_flip"], is_informative=is_told),
        "token_lengths": from_summary.token_lengths(summary),
        "provenance": from_summary.provenance(summary),
    }
    return tables | {"sentences": sentences.write_sentences(tables)}


def _seen(ledger: pa.Table, summary: Mapping[str, Any], pairs: Sequence[Pair]) -> _Seen:
    scores, is_told = last_round(ledger), bool(_estimate(summary, 0)["is_informative"])
    if not is_told:  # P(flipped) without a rate is no probability
        scores["p_flip"] = np.full(len(scores["row"]), np.nan)
    originals = {pair.row: pair for pair in pairs if pair.origin == "data"}
    missing = [int(row) for row in scores["row"] if int(row) not in originals]
    if missing:
        raise ValueError(
            f"write_report needs the pair of every ledger row; got none for row {missing[0]} "
            f"({len(missing)} missing). Pass the pairs that the ledger was made from."
        )
    in_order = [originals[int(row)] for row in scores["row"]]
    return _Seen(
        scores=scores,
        originals=originals,
        in_order=in_order,
        is_open=np.array([pair.verdict is None for pair in in_order]),
        is_informative=is_told,
    )


def last_round(ledger: pa.Table) -> dict[str, NDArray[Any]]:
    """Columns of the ledger for the original pairs in the last round, in the order of the input.

    Decision and weight are those that the last training has had, of the round before if there is one. `margin` is the
    held-out margin where the ledger has it, since P(flipped) comes from that; `is_held_out` says so.
    """
    columns = {name: ledger[name].to_numpy(zero_copy_only=False) for name in ledger.column_names}
    is_data = columns["origin"] == "data"
    if not is_data.any():
        raise ValueError("write_report needs a ledger with an original pair; got none. Score the pairs first.")
    is_last = is_data & (columns["round"] == columns["round"][is_data].max())
    positions = np.flatnonzero(is_last)
    positions = positions[np.argsort(columns["row"][positions], kind="stable")]
    found = {name: column[positions] for name, column in columns.items()}
    if (rounds := np.unique(columns["round"][is_data])).size > 1:
        before = np.flatnonzero(is_data & (columns["round"] == rounds[-2]))
        before = before[np.argsort(columns["row"][before], kind="stable")]
        found |= {name: columns[name][before] for name in ("decision", "weight")}
    held_out = np.asarray(found.pop("held_out_margin", np.full(len(positions), np.nan)), dtype=np.float64)
    is_held_out = bool(np.isfinite(held_out).any())
    margin = held_out if is_held_out else found["margin"]
    return found | {"margin": margin, "is_held_out": np.full(len(positions), is_held_out)}


def _estimate(summary: Mapping[str, Any], num_pairs: int) -> Json:
    rate = summary.get("flip_rate") or {}
    values = {key: number(rate.get(source)) for key, source in (("rate", "estimate"), ("low", "low"), ("high", "high"))}
    low, high = values["low"], values["high"]
    is_informative = bool(summary.get("is_informative")) and None not in values.values()
    return {
        **values,
        "level": number(rate.get("level", 0.9)),
        "may_be_clean": low is not None and low < REACHES_ZERO,
        "is_informative": is_informative,
        "is_vague": not is_informative or (low is not None and high is not None and high - low > WIDE_INTERVAL),
        "reason": clean(str(summary.get("reason") or "")),
        "rho": number(summary.get("rho")),
        "rho_why": clean(str(summary.get("rho_why") or "")),
        "num_pairs": num_pairs,
        "num_trusted": summary.get("num_trusted"),
    }


def _counts(scores: Columns, pairs: Sequence[Pair], in_order: Sequence[Pair]) -> Json:
    verdicts = Counter(pair.verdict for pair in in_order)
    counts = {decision: int((scores["decision"] == decision).sum()) for decision in DECISIONS}
    return {
        "num_pairs": len(scores["row"]),
        **counts,
        "num_judged": len(in_order) - verdicts[None],
        "num_judged_wrong": verdicts["wrong"],
        "num_left_out": verdicts["drop"],
        "new_pairs": sum(pair.origin == "resampled" for pair in pairs),
        "weight_kept_mean": mean(scores["weight"][scores["decision"] == "keep"]),
    }


def _review(p_flip: Floats, *, is_informative: bool) -> Json | None:
    """How many flips a reader finds who goes through the pairs from the most suspect downwards."""
    finite = p_flip[np.isfinite(p_flip)]
    if not is_informative or not len(finite):
        return None
    falling = np.sort(finite)[::-1]
    found = np.concatenate([[0.0], np.cumsum(falling)])
    num_likely = int((falling >= 0.5).sum())
    read = np.unique(np.linspace(0, len(falling), NUM_CURVE_POINTS).round().astype(int))
    return {
        "num_likely": num_likely,
        "found_likely": number(found[num_likely]),
        "found_all": number(found[-1]),
        "num_read": [int(value) for value in read],
        "num_found": numbers(found[read]),
        "depths": [
            {"num_read": depth, "num_found": number(found[depth]), "share": number(found[depth] / (found[-1] or 1.0))}
            for depth in REVIEW_DEPTHS
            if depth < len(falling)
        ],
    }


def _contradicted(scores: Columns, is_open: NDArray[np.bool_]) -> Json | None:
    """How many labels that nobody has judged are contradicted by models that have not seen them.

    None where there are no such models.
    """
    margin = scores["margin"][is_open & np.isfinite(scores["margin"])]
    if not scores["is_held_out"].all() or not len(margin):
        return None
    return {"num": int((margin < 0).sum()), "share": mean(margin < 0)}


def _margins(scores: Columns) -> Json:
    margin = scores["margin"].astype(np.float64)
    is_finite = np.isfinite(margin)
    finite = margin[is_finite]
    table: Json = {
        "is_held_out": bool(scores["is_held_out"].all()),
        "num_pairs": len(finite),
        "num_not_finite": int((~is_finite).sum()),
        "edges": [],
        "counts": {},
    }
    if not len(finite):
        return table
    # Single far margins would squeeze all others into one bar; they join the outermost bars, and the caption says so.
    most_low, most_high = np.quantile(finite, [0.1, 0.9])
    reach = RANGE * (most_high - most_low)
    low, high = max(finite.min(), most_low - reach), min(finite.max(), most_high + reach)
    width = round_step((max(high, 0) - min(low, 0)) / NUM_BINS or 1.0)
    first, last = int(np.floor(min(low, 0) / width)), int(np.ceil(max(high, 0) / width))
    last = max(last, first + 1)
    edges = np.arange(first, last + 1) * width  # multiples of the width, so 0 is an edge and no bar hides a sign
    inside = np.clip(finite, edges[0], np.nextafter(edges[-1], -np.inf))
    for decision in DECISIONS:
        values = inside[scores["decision"][is_finite] == decision]
        table["counts"][decision] = [int(count) for count in np.histogram(values, edges)[0]]
    return {
        **table,
        "edges": numbers(edges),
        "num_below": int((finite < edges[0]).sum()),
        "num_above": int((finite > edges[-1]).sum()),
        "median": median(finite),
        "share_negative": mean(finite < 0),
    }


def _decisions(scores: Columns) -> list[Json]:
    found = []
    for decision, (name, meaning) in DECISIONS.items():
        of_kind = scores["decision"] == decision
        margin = scores["margin"][of_kind]
        margin = margin[np.isfinite(margin)]
        found.append(
            {
                "decision": decision,
                "name": name,
                "meaning": meaning,
                "count": int(of_kind.sum()),
                "share": number(of_kind.mean()),
                "margin_median": median(margin),
                "margin_low": number(margin.min()) if len(margin) else None,
                "margin_high": number(margin.max()) if len(margin) else None,
                "p_flip_mean": mean(scores["p_flip"][of_kind]),
                "weight_mean": mean(scores["weight"][of_kind]),
            }
        )
    return found
