"""What a training log says over all rounds: curves on one axis of steps, and a row for each round.

In: entries of the trainer's log, the ledger, the summary. Out: plain values.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from ropo.provenance import Json
from ropo.report.from_summary import NUM_CURVE_POINTS
from ropo.report.statistics import mean, median, number, numbers

# key of the training log: (title, unit, reference value to draw or None, how to read it)
CURVES: Mapping[str, tuple[str, str, float | None, str]] = {
    "loss": ("Loss", "nats per pair", None, "Comparable within one run only; other losses start elsewhere."),
    "rewards/accuracies": (
        "Training accuracy",
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


def rounds(ledger: pa.Table, summary: Mapping[str, Any]) -> list[Json]:
    """What each round has decided, and how its margins lie."""
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


def training(log: Sequence[Json]) -> Json:
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


def _line(log: Sequence[Json], key: str, name: int, offset: int) -> Json:
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
