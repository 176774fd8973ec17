"""The summary of a run -> the parts of the report that restate it.

In: what `summary.json` holds; missing keys read as unknown. Out: plain values, one function for each key of
`tables.build_tables`.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.special import expit

from ropo.data.problems import PROBLEMS
from ropo.noise.shares import wilson_interval
from ropo.provenance import Json
from ropo.report.statistics import number, numbers
from ropo.report.texts import clean

NUM_ANNOTATORS = 30
NUM_CURVE_POINTS = 150
WEIGHT_MARGINS = (-8.0, -5.0, -2.0, 0.0, 2.0, 5.0)  # nats
ALPHA_LOSSES = ("ropo", "dpo", "")  # the losses that α tells apart; an unknown one is ropo's default
LENGTH_KEYS = ("max_length", "median", "p90", "p99", "longest", "num_truncated", "suggested")
SEVERITIES = ("error", "left_out", "warning")

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

Summary = Mapping[str, Any]


def loss(summary: Summary) -> Json:
    """The loss of training, and α with why."""
    config = summary.get("config") or {}
    name = clean(str(config.get("loss") or ""))
    return {
        "name": name,
        "has_alpha": name in ALPHA_LOSSES,
        "alpha": number(summary.get("alpha")),
        "alpha_why": clean(str(summary.get("alpha_why") or "")),
        "noise_left": number(summary.get("noise_left")),
    }


def calibration(summary: Summary) -> Json | None:
    """What became of labels that were flipped on purpose, with an interval for each bin."""
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


def _calibration_bin(entry: Mapping[str, Any]) -> Json:
    low, high = wilson_interval(entry["observed"], entry["num_pairs"])
    return {
        "num_pairs": int(entry["num_pairs"]),
        "predicted": number(entry["predicted"]),
        "observed": number(entry["observed"]),
        "low": number(low),
        "high": number(high),
    }


def scorers(summary: Summary) -> list[Json]:
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


def filter_(summary: Summary) -> Json | None:
    """Whether linear models get better without the pairs that they contradict."""
    found = summary.get("filter")
    return found and {"gain": number(found["gain"]), "error": number(found["error"]), "helps": bool(found["helps"])}


def with_length(summary: Summary) -> Json | None:
    """The flip rate if lengths were evidence, too; None where that is not told apart or cannot be told."""
    found = summary.get("flip_rate_with_length") or {}
    if found.get("low") is None or found.get("high") is None:
        return None
    return {"rate": number(found["estimate"]), "low": number(found["low"]), "high": number(found["high"])}


def annotators(summary: Summary, estimate: Json) -> Json:
    """Rates by annotator, the worst first; beyond the first ones they are only counted. None without an estimate."""
    found = (summary.get("annotators") or []) if estimate["is_informative"] else []
    return {"num": len(found), "rows": [_annotator(entry, estimate) for entry in found[:NUM_ANNOTATORS]]}


def _annotator(entry: Mapping[str, Any], estimate: Json) -> Json:
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


def weight_curve(summary: Summary) -> Json | None:
    """How hard a pair pulls by its margin, beside DPO."""
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


def problems(summary: Summary) -> list[Json]:
    """Problems of the data, the gravest first."""
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


def token_lengths(summary: Summary) -> Json | None:
    """Tokens of prompt and longer response, where they were counted."""
    found = summary.get("token_lengths")
    return {key: number(found.get(key)) for key in LENGTH_KEYS} if found else None


def provenance(summary: Summary) -> Json:
    """What makes the run repeatable."""
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
