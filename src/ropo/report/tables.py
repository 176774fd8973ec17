"""Ledger, summary and texts -> everything the report says, as one dict of plain values.

In: the ledger of a run, its summary, its pairs and its training log. Out: a JSON-able dict with one key per section;
HTML, Markdown and JSON are three ways of printing it. Numbers are rounded to six digits, unknown ones are None.

The one idea: nothing is computed after this file. A sentence, a figure or a table of the report can be traced to a key.

Add a section: one function here, one line in `build_tables`, one block in each template.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy.special import expit

from ropo.data.problems import PROBLEMS
from ropo.noise.review_order import WIDE_INTERVAL, has_suspects
from ropo.noise.shares import wilson_interval
from ropo.pairs import Pair
from ropo.report import pair_tables, sentences
from ropo.report.biases import file_parts, response_biases
from ropo.report.statistics import Floats, mean, median, number, numbers, round_step
from ropo.report.texts import clean

NUM_ANNOTATORS = 30
RANGE = 1.0  # a histogram reaches this far beyond the middle four fifths, in multiples of their width
NUM_BINS = 44  # about; the width of a bin is a round number
NUM_CURVE_POINTS = 150
WEIGHT_MARGINS = (-8.0, -5.0, -2.0, 0.0, 2.0, 5.0)  # nats
REVIEW_DEPTHS = (10, 20, 50, 100, 200, 500, 1000, 5000, 20000)  # pairs that somebody may have time to read

# decision: (name in the report, what it means for training)
DECISIONS: Mapping[str, tuple[str, str]] = {
    "keep": ("kept", "Trained on as labelled."),
    "drop": ("dropped", "Left out: the label speaks against what the other pairs teach."),
    "flip": ("flipped", "Trained on with chosen and rejected swapped."),
    "resample": ("won back", "Left out; its prompt is back with a newly sampled pair."),
}

ALPHA_LOSSES = ("ropo", "dpo", "")  # the losses that α tells apart; an unknown one is ropo's default
SURELY_FLIPPED = 0.005  # an interval that begins below this reaches 0 as far as anybody can tell

SURFACE: Mapping[str, str] = {
    "length": "the lengths of the two responses",
    "n-grams": "the tokens of the two responses, single and in pairs",
}
"""What knows nothing but the surface of the texts, by name: judges no label, and is there to compare with."""

MEANINGS: Mapping[str, str] = {
    "gradients": "linear models on the gradient of each pair by the head's weights",
    "hidden states": "linear models on the hidden states of each pair, halfway and at the end",
    "models": "models trained on the other folds",
    **SURFACE,
}
"""What judges labels, or is compared with what does, by the names of `scorers.json`."""

LENGTH_KEYS = ("max_length", "median", "p90", "p99", "longest", "num_truncated", "suggested")

# key of the training log: (title, unit, reference value to draw or None, how to read it)
CURVES: Mapping[str, tuple[str, str, float | None, str]] = {
    "loss": ("Loss", "nats per pair", None, "Comparable within one run only; other losses start elsewhere."),
    "rewards/accuracies": (
        "Pairs ordered as labelled",
        "share of a batch",
        0.5,
        "0.5 is a coin toss. Near 1 on noisy labels, the wrong ones are being learned by heart.",
    ),
    "rewards/margins": ("Margin", "nats, mean of a batch", 0.0, "How clearly the policy agrees with the labels."),
    "gradient_weight": (
        "Gradient weight",
        "mean of a batch",
        None,
        "How hard the pairs of a batch still pull; falls as they are learned or given up.",
    ),
}

SEVERITIES = ("error", "left_out", "warning")

Table = dict[str, Any]
Columns = Mapping[str, NDArray[Any]]


def build_tables(
    ledger: pa.Table,
    summary: Mapping[str, Any],
    pairs: Sequence[Pair],
    training_log: Sequence[Table],
    checks: Mapping[int, Sequence[float]] | None = None,
) -> Table:
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
    scores = last_round(ledger)
    originals = {pair.row: pair for pair in pairs if pair.origin == "data"}
    missing = [int(row) for row in scores["row"] if int(row) not in originals]
    if missing:
        raise ValueError(
            f"write_report needs the pair of every ledger row; got none for row {missing[0]} "
            f"({len(missing)} missing). Pass the pairs that the ledger was made from."
        )
    in_order = [originals[int(row)] for row in scores["row"]]
    estimate = _estimate(summary, len(scores["row"]))
    is_informative = estimate["is_informative"]
    is_open = np.array([pair.verdict is None for pair in in_order])  # nobody has said yet whether the label is right
    by_margin = not has_suspects(scores["p_flip"].astype(np.float64), is_open, is_informative=is_informative)
    suspects = pair_tables.suspects(scores, originals, is_open=is_open, by_margin=by_margin)
    # What is to be read first is not called merely hard as well.
    is_other = is_open & ~np.isin(scores["row"], [pair["row"] for pair in suspects] if by_margin else [])
    scorers = _scorers(summary)
    are_moments = all(row["name"] == "models" for row in scorers if row["is_taken"])
    tables: Table = {
        "task": "audit" if summary.get("task") == "audit" else "train",
        "estimate": estimate,
        "loss": _loss(summary),
        "counts": _counts(scores, pairs, is_open),
        "review": _review(scores["p_flip"][is_open], is_informative=is_informative),
        "contradicted": _contradicted(scores, is_open),
        "calibration": _calibration(summary),
        "scorers": scorers,
        "filter": _filter(summary),
        "with_length": _with_length(summary),
        "suspects": suspects,
        "hard": pair_tables.hard(
            scores, originals, checks or {}, is_open=is_other, is_informative=is_informative, are_moments=are_moments
        ),
        "margins": _margins(scores),
        "annotators": _annotators(summary, estimate),
        "rounds": _rounds(ledger, summary),
        "training": _training(training_log),
        "evaluation": summary.get("evaluation"),
        "weight_curve": _weight_curve(summary),
        "problems": _problems(summary),
        "num_left_out": summary.get("num_left_out"),
        "decisions": _decisions(scores),
        "dropped": pair_tables.dropped(scores, originals),
        "resampled": pair_tables.resampled(ledger, scores, originals, pairs, summary.get("rounds") or []),
        "biases": response_biases(
            in_order, p_flip=scores["p_flip"], is_kept=scores["decision"] == "keep", is_informative=is_informative
        ),
        "file_parts": file_parts(scores["row"], p_flip=scores["p_flip"], is_informative=is_informative),
        "token_lengths": _token_lengths(summary),
        "provenance": _provenance(summary),
    }
    tables["sentences"] = sentences.write_sentences(tables)
    return tables


def last_round(ledger: pa.Table) -> dict[str, NDArray[Any]]:
    """Columns of the ledger for the original pairs in the last round, in the order of the input.

    `margin` is the held-out margin where the ledger has it, since P(flipped) comes from that; `is_held_out` says so.
    """
    columns = {name: ledger[name].to_numpy(zero_copy_only=False) for name in ledger.column_names}
    is_data = columns["origin"] == "data"
    if not is_data.any():
        raise ValueError("write_report needs a ledger with an original pair; got none. Score the pairs first.")
    is_last = is_data & (columns["round"] == columns["round"][is_data].max())
    positions = np.flatnonzero(is_last)
    positions = positions[np.argsort(columns["row"][positions], kind="stable")]
    found = {name: column[positions] for name, column in columns.items()}
    held_out = np.asarray(found.pop("held_out_margin", np.full(len(positions), np.nan)), dtype=np.float64)
    is_held_out = bool(np.isfinite(held_out).any())
    margin = held_out if is_held_out else found["margin"]
    return found | {"margin": margin, "is_held_out": np.full(len(positions), is_held_out)}


def _estimate(summary: Mapping[str, Any], num_pairs: int) -> Table:
    rate = summary.get("flip_rate") or {}
    values = {key: number(rate.get(source)) for key, source in (("rate", "estimate"), ("low", "low"), ("high", "high"))}
    low, high = values["low"], values["high"]
    is_informative = bool(summary.get("is_informative")) and None not in values.values()
    return {
        **values,
        "level": number(rate.get("level", 0.9)),
        "may_be_clean": low is not None and low < SURELY_FLIPPED,
        "is_informative": is_informative,
        "is_vague": not is_informative or (low is not None and high is not None and high - low > WIDE_INTERVAL),
        "reason": clean(str(summary.get("reason") or "")),
        "rho": number(summary.get("rho")),
        "rho_why": clean(str(summary.get("rho_why") or "")),
        "num_pairs": num_pairs,
        "num_trusted": summary.get("num_trusted"),
    }


def _loss(summary: Mapping[str, Any]) -> Table:
    config = summary.get("config") or {}
    name = clean(str(config.get("loss") or ""))
    return {
        "name": name,
        "has_alpha": name in ALPHA_LOSSES,
        "alpha": number(summary.get("alpha")),
        "alpha_why": clean(str(summary.get("alpha_why") or "")),
        "noise_left": number(summary.get("noise_left")),
    }


def _counts(scores: Columns, pairs: Sequence[Pair], is_open: NDArray[np.bool_]) -> Table:
    counts = {decision: int((scores["decision"] == decision).sum()) for decision in DECISIONS}
    return {
        "num_pairs": len(scores["row"]),
        **counts,
        "num_judged": int((~is_open).sum()),
        "new_pairs": sum(pair.origin == "resampled" for pair in pairs),
        "weight_kept_mean": mean(scores["weight"][scores["decision"] == "keep"]),
    }


def _review(p_flip: Floats, *, is_informative: bool) -> Table | None:
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


def _contradicted(scores: Columns, is_open: NDArray[np.bool_]) -> Table | None:
    """How many labels that nobody has judged are contradicted by models that have not seen them.

    None where there are no such models.
    """
    margin = scores["margin"][is_open & np.isfinite(scores["margin"])]
    if not scores["is_held_out"].all() or not len(margin):
        return None
    return {"num": int((margin < 0).sum()), "share": mean(margin < 0)}


def _calibration(summary: Mapping[str, Any]) -> Table | None:
    """What became of labels that were turned round on purpose, with an interval for each bin."""
    found = summary.get("calibration")
    if not found:
        return None
    names = ("share_found", "share_others", "recall", "precision")
    low, high = wilson_interval(found["share_found"], found["num_turned"])
    return {
        "num_injected": int(found["num_injected"]),
        "num_turned": int(found["num_turned"]),
        **{name: number(found.get(name)) for name in names},
        **{name: numbers(found[name]) for name in ("recall_range", "precision_range")},
        "found_low": number(low),
        "found_high": number(high),
        "bins": [_calibration_bin(entry) for entry in found.get("bins") or []],
    }


def _calibration_bin(entry: Mapping[str, Any]) -> Table:
    low, high = wilson_interval(entry["observed"], entry["num_pairs"])
    return {
        "num_pairs": int(entry["num_pairs"]),
        "predicted": number(entry["predicted"]),
        "observed": number(entry["observed"]),
        "low": number(low),
        "high": number(high),
    }


def _scorers(summary: Mapping[str, Any]) -> list[Table]:
    """How often each scorer agrees with labels that it has not seen, the one that judges first."""
    found = [
        {
            "name": (name := clean(str(entry["name"]))),
            "meaning": MEANINGS.get(name, ""),
            "is_surface": name in SURFACE,
            **{key: number(entry.get(key)) for key in ("agreement", "low", "high")},
            "is_taken": bool(entry.get("is_taken")),
        }
        for entry in summary.get("scorers") or []
    ]
    return sorted(found, key=lambda entry: (not entry["is_taken"], -(entry["agreement"] or 0.0)))


def _filter(summary: Mapping[str, Any]) -> Table | None:
    """Whether linear models get better without the pairs that they contradict."""
    found = summary.get("filter")
    return found and {"gain": number(found["gain"]), "error": number(found["error"]), "helps": bool(found["helps"])}


def _with_length(summary: Mapping[str, Any]) -> Table | None:
    """The flip rate if lengths were evidence, too; None where that is not told apart or cannot be told."""
    found = summary.get("flip_rate_with_length") or {}
    if found.get("low") is None or found.get("high") is None:
        return None
    return {"rate": number(found["estimate"]), "low": number(found["low"]), "high": number(found["high"])}


def _annotators(summary: Mapping[str, Any], estimate: Table) -> Table:
    """Rates by annotator, the worst first; beyond the first ones they are only counted. None without an estimate."""
    found = (summary.get("annotators") or []) if estimate["is_informative"] else []
    return {"num": len(found), "rows": [_annotator(entry, estimate) for entry in found[:NUM_ANNOTATORS]]}


def _annotator(entry: Mapping[str, Any], estimate: Table) -> Table:
    rate, low, high = (number(entry.get(key)) for key in ("rate", "low", "high"))
    return {
        "name": clean(str(entry.get("name"))),
        "num_pairs": int(entry.get("num_pairs") or 0),
        "rate": rate,
        "low": low,
        "high": high,
        "is_worse": bool(low is not None and low > estimate["high"]),
        "is_opposite": bool(rate is not None and rate > 0.5),
    }


def _margins(scores: Columns) -> Table:
    margin = scores["margin"].astype(np.float64)
    is_finite = np.isfinite(margin)
    finite = margin[is_finite]
    table: Table = {
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


def _rounds(ledger: pa.Table, summary: Mapping[str, Any]) -> list[Table]:
    is_data = ledger["origin"].to_numpy(zero_copy_only=False) == "data"
    in_round, margin = ledger["round"].to_numpy()[is_data], ledger["margin"].to_numpy()[is_data]
    found = []
    for index, entry in enumerate(summary.get("rounds") or []):
        name = int(entry.get("round", index))
        margins = margin[in_round == name]
        found.append(
            {
                "round": name,
                "rho": number(entry.get("rho")),
                **{key: entry.get(key) for key in ("num_kept", "num_dropped", "num_flipped", "num_resampled")},
                "median_margin": median(margins),
                "share_negative": mean(margins < 0),
            }
        )
    return found


def _training(log: Sequence[Table]) -> Table:
    """Curves by metric; the steps of the rounds follow one another on one axis."""
    rounds = sorted({int(entry.get("round", 0)) for entry in log if "step" in entry})
    offsets, end = {}, 0
    for name in rounds:
        steps = [int(entry["step"]) for entry in log if entry.get("round", 0) == name and "step" in entry]
        offsets[name] = end if min(steps) <= end else 0  # a trainer that is carried on counts on by itself
        end = offsets[name] + max(steps)
    curves = []
    for key, (title, unit, reference, meaning) in CURVES.items():
        lines = [_line(log, key, name, offsets[name]) for name in rounds]
        if any(line["x"] for line in lines):
            texts = {"key": key, "title": title, "unit": unit, "reference": reference, "meaning": meaning}
            curves.append({**texts, "lines": lines})
    return {"num_steps": end, "starts": [offsets[name] for name in rounds], "curves": curves}


def _line(log: Sequence[Table], key: str, name: int, offset: int) -> Table:
    points = [
        (offset + int(entry["step"]), float(entry[key]))
        for entry in log
        if entry.get("round", 0) == name and "step" in entry and isinstance(entry.get(key), int | float)
    ]
    points = [point for point in points if np.isfinite(point[1])]
    # A long log is averaged in equal pieces: a line of more points than the figure has pixels shows nothing more.
    pieces = np.array_split(np.array(points), min(len(points), NUM_CURVE_POINTS)) if points else []
    means = [piece.mean(axis=0) for piece in pieces]
    x, y = numbers(mean[0] for mean in means), numbers(mean[1] for mean in means)
    return {"round": name, "num_logged": len(points), "x": x, "y": y}


def _weight_curve(summary: Mapping[str, Any]) -> Table | None:
    curve = summary.get("weight_curve")
    if not curve or not len(curve["margin"]):
        return None
    step = max(1, len(curve["margin"]) // NUM_CURVE_POINTS)
    margin = np.asarray(curve["margin"], dtype=np.float64)[::step]
    weight = np.asarray(curve["weight"], dtype=np.float64)[::step]
    return {
        "loss": clean(str(curve["loss"])),
        "margin": numbers(margin),
        "weight": numbers(weight),
        "dpo": numbers(expit(-margin)),  # w(h) = σ(−h), arXiv:2305.18290, eq. 7
        "at": [
            {"margin": at, "weight": number(np.interp(at, margin, weight)), "dpo": number(expit(-at))}
            for at in WEIGHT_MARGINS
            if margin[0] <= at <= margin[-1]
        ],
    }


def _problems(summary: Mapping[str, Any]) -> list[Table]:
    found = []
    for kind, count in (summary.get("problems") or {}).items():
        spec = PROBLEMS.get(kind)
        found.append(
            {
                "kind": clean(str(kind)),
                "count": int(count),
                "severity": spec.severity if spec else "",
                "meaning": spec.meaning if spec else "",
                "remedy": spec.remedy if spec else "",
            }
        )
    rank = {severity: index for index, severity in enumerate(SEVERITIES)}
    found = [problem for problem in found if problem["count"]]
    return sorted(found, key=lambda one: (rank.get(one["severity"], len(rank)), -one["count"], one["kind"]))


def _decisions(scores: Columns) -> list[Table]:
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


def _token_lengths(summary: Mapping[str, Any]) -> Table | None:
    """Tokens of prompt and longer response, where they were counted."""
    found = summary.get("token_lengths")
    return {key: number(found.get(key)) for key in LENGTH_KEYS} if found else None


def _provenance(summary: Mapping[str, Any]) -> Table:
    config = summary.get("config") or {}
    return {
        "command": clean(str(summary.get("command") or "")),
        "data_sha256": str(summary.get("data_sha256") or ""),
        "model": clean(str(summary.get("model") or "")),
        "model_fingerprint": str(summary.get("model_fingerprint") or ""),
        "versions": {clean(str(key)): clean(str(value)) for key, value in (summary.get("versions") or {}).items()},
        "seconds": {clean(str(key)): number(value) for key, value in (summary.get("seconds") or {}).items()},
        "config": {clean(str(k)): _shown_option(str(k), v) for k, v in config.items()},
    }


def _shown_option(name: str, value: object) -> str:
    """A report is passed on; whatever grants access to an account stays out of it."""
    return "…" if name.endswith("_token") and value else clean(str(value))
