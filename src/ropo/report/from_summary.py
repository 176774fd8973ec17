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
"""What knows nothing but the surface of the texts, by name."""

MEANINGS: Mapping[str, str] = {
    "together": "gradients, hidden states and n-grams, weighted by how well each predicts labels it has not seen",
    "gradients": "linear models on the gradient of each pair by the head's weights",
    "hidden states": "linear models on the hidden states of each pair, halfway and at the end",
    "models": "models trained on the other folds",
    **SURFACE,
}
"""What judges labels, or is compared with what does, by the names of `scorers.json`."""

Summary = Mapping[str, Any]


def loss(summary: Summary) -> Json:
    """The loss of training, with α and β and why."""
    config = summary.get("config") or {}
    name = clean(str(config.get("loss") or ""))
    return {
        "name": name,
        "has_alpha": name in ALPHA_LOSSES,
        "alpha": number(summary.get("alpha")),
        "alpha_why": clean(str(summary.get("alpha_why") or "")),
        "beta": number(summary.get("beta")),
        "given_beta": number(config.get("beta")),
        "beta_why": clean(str(summary.get("beta_why") or "")),
        "noise_left": number(summary.get("noise_left")),
        "has_terms": bool(config.get("sft_weight") or config.get("router_aux_loss_coef")),
    }


def calibration(summary: Summary) -> Json | None:
    """What became of labels that were flipped on purpose, with an interval for each bin."""
    if not (found := summary.get("calibration")):
        return None
    low, high = wilson_interval(found["share_found"], found["num_turned"])
    bins = [
        entry | dict(zip(("low", "high"), wilson_interval(entry["observed"], entry["num_pairs"]), strict=True))
        for entry in found.get("bins") or []
    ]
    plain: Json = _plain({**found, "found_low": low, "found_high": high, "bins": bins})
    return plain


def scorers(summary: Summary) -> list[Json]:
    """How often each scorer agrees with labels that it has not seen, the one that judges first."""
    found = [
        {"is_taken": False, **entry, "meaning": MEANINGS.get(entry["name"], ""), "is_surface": entry["name"] in SURFACE}
        for entry in map(_plain, summary.get("scorers") or [])
    ]
    return sorted(found, key=lambda entry: (not entry["is_taken"], -(entry["agreement"] or 0.0)))


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
    is_worse, is_opposite = entry["low"] > estimate["high"], entry["rate"] > 0.5
    plain: Json = _plain({**entry, "is_worse": is_worse, "is_opposite": is_opposite})
    return plain


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
    found = [
        {"kind": clean(kind), "count": int(count)}
        | {name: getattr(PROBLEMS.get(kind), name, "") for name in ("severity", "meaning", "remedy")}
        for kind, count in (summary.get("problems") or {}).items()
        if count
    ]
    rank = {severity: index for index, severity in enumerate(SEVERITIES)}
    return sorted(found, key=lambda one: (rank.get(one["severity"], len(rank)), -one["count"], one["kind"]))


def token_lengths(summary: Summary) -> Json | None:
    """Tokens of prompt and longer response, where they were counted."""
    found = summary.get("token_lengths")
    return {key: number(found.get(key)) for key in LENGTH_KEYS} if found else None


def provenance(summary: Summary) -> Json:
    """What makes the run repeatable."""
    texts = {name: summary.get(name) or "" for name in ("command", "data_sha256", "model", "model_fingerprint")}
    config = summary.get("config") or {}
    plain: Json = _plain(texts | {name: summary.get(name) or {} for name in ("versions", "seconds")})
    return plain | {"config": {clean(str(k)): _shown_option(str(k), v) for k, v in config.items()}}


def _shown_option(name: str, value: object) -> str:
    """A report is passed on; whatever grants access to an account stays out of it."""
    return "…" if name.endswith("_token") and value else clean(str(value))


def _plain(value: Any) -> Any:
    """Numbers rounded and texts made safe to show, wherever they stand in a value of JSON."""
    if isinstance(value, Mapping):
        return {clean(str(key)): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, str):
        return clean(value)
    return number(value) if isinstance(value, float) else value
