"""One small run with everything in it, and a way to change parts of it."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from ropo.pairs import Pair
from ropo.run.ledger import ledger_table

COLUMNS = ("pair_id", "row", "round", "margin", "loss", "weight", "p_flip", "decision", "origin")
TYPES = (pa.string(), pa.int64(), pa.int32(), *[pa.float64()] * 4, pa.string(), pa.string())

# Sixteen right labels, four wrong ones (rows 3, 7, 12 and 18).
MARGINS = [2.1, 0.4, 3.3, -2.6, 1.2, 0.9, 2.8, -3.1, 1.7, 0.2, 2.2, 4.5, -1.4, 1.1, 0.7, 2.0, 1.9, 3.0, -0.3, 1.3]
P_FLIP = [0.01, 0.31, 0.002, 0.97, 0.09, 0.14, 0.004, 0.99, 0.04, 0.4, 0.01, 0.0004, 0.91, 0.1, 0.2, 0.01, 0.02, 0.003]
P_FLIP += [0.62, 0.08]
DECISIONS = {3: "drop", 7: "flip", 12: "resample", 18: "drop"}


def example_pairs() -> list[Pair]:
    pairs = [
        Pair(
            prompt=f"Human: was dish {row} good? Assistant:",
            chosen=f"Dish {row} was warm and the waiter was kind.",
            rejected=f"Dish {row} was cold." if row % 3 else f"Dish {row} was cold and the waiter, alas, was unkind.",
            row=row,
            annotator="a2" if row == 7 else None,
        )
        for row in range(20)
    ]
    pairs[3] = Pair(
        prompt=[
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Yes?"},
            {"role": "user", "content": "?"},
        ],
        chosen=[{"role": "assistant", "content": "No."}],
        rejected=[{"role": "assistant", "content": "No, not now."}],
        row=3,
    )
    return pairs


def ledger_of(rows: list[tuple[Any, ...]]) -> pa.Table:
    columns = zip(*rows, strict=True) if rows else [[] for _ in COLUMNS]
    arrays = [pa.array(list(column), kind) for column, kind in zip(columns, TYPES, strict=True)]
    return pa.table(arrays, names=list(COLUMNS))


@pytest.fixture
def make_run() -> Callable[..., dict[str, Any]]:
    """The arguments of `write_report` after the folder; `summary` given here is laid over the example's."""

    def build(pairs: list[Pair] | None = None, summary: dict[str, Any] | None = None, **other: Any) -> dict[str, Any]:
        pairs = pairs or example_pairs()
        first, last = [], []  # a run resamples but after its last training
        for pair, margin, p_flip in zip(pairs, MARGINS, P_FLIP, strict=True):
            decision = DECISIONS.get(pair.row, "keep")
            weight = float(decision in ("keep", "flip"))
            first.append((pair.id, pair.row, 0, margin / 2, 1.0, weight, 0.5, decision, "data"))
            last.append((pair.id, pair.row, 1, margin, 1.0, 1.0, p_flip, "keep", "data"))
        new = Pair(prompt=pairs[12].prompt, chosen="Yes.", rejected=pairs[12].chosen, row=12, origin="resampled")
        run = {
            "ledger": ledger_of([*first, *last, (new.id, 12, 1, 1.5, 0.2, 1.0, 0.05, "keep", "resampled")]),
            "summary": example_summary() | (summary or {}),
            "pairs": [*pairs, new],
            "training_log": example_log(),
        }
        return run | other

    return build


def example_summary() -> dict[str, Any]:
    before = {"round": 0, "rho": 0.25, "flip_rate": {"estimate": 0.25, "low": 0.1, "high": 0.4}}
    after = {"round": 1, "rho": 0.2, "flip_rate": {"estimate": 0.21, "low": 0.08, "high": 0.36}}
    counts = {"num_kept": 16, "num_dropped": 2, "num_flipped": 1, "num_resampled": 1}
    counts |= {"num_judged": 1, "refused": {"empty response": 1, "another candidate was better": 3}}
    return {
        "flip_rate": after["flip_rate"],
        "is_informative": True,
        "reason": "",
        "rho": 0.2,
        "num_pairs": 20,
        **counts,
        "problems": {"truncated": 3, "identical": 2, "duplicate": 0},
        "seconds": {"train": 12.25, "score": 1.5},
        "versions": {"python": "3.11.7", "ropo": "0.1.0"},
        "rounds": [before | counts, after | counts],
        "config": {"loss": "ropo", "rho": "auto", "alpha": 14.0, "beta": 0.3, "hub_token": "hf_secret"},
        "command": "ropo train --dataset_name pairs.jsonl",
        "data_sha256": "d" * 64,
        "model": "some/model",
        "model_fingerprint": "e" * 16,
        "weight_curve": {"loss": "ropo", "margin": [-8.0, -2.0, 0.0, 2.0, 8.0], "weight": [0.25, 0.6, 1.0, 0.4, 0.0]},
    }


# Held-out margins at three checks, or by three linear models. Row 9 is learned late or divides them, and so does row 1;
# both are kept.
CHECKS = {row: [0.3 * margin, 0.6 * margin, margin] for row, margin in enumerate(MARGINS)}
CHECKS |= {1: [0.3, -1.2, 0.4], 9: [-1.5, -0.5, 0.2]}


@pytest.fixture
def make_audit() -> Callable[..., dict[str, Any]]:
    """The arguments of `write_report` for an audit of the same pairs; `summary` is laid over the example's."""

    def build(pairs: list[Pair] | None = None, summary: dict[str, Any] | None = None, **other: Any) -> dict[str, Any]:
        pairs = pairs or example_pairs()
        decisions = [DECISIONS.get(pair.row, "keep").replace("resample", "drop") for pair in pairs]
        run = {
            "ledger": ledger_table(
                pairs,
                round_number=0,
                margins=np.array(MARGINS) + 9.0,
                losses=np.ones(20),
                weights=np.array([float(decision != "drop") for decision in decisions]),
                p_flip=np.array(P_FLIP),
                decisions=decisions,
                held_out_margins=np.array(MARGINS),
            ),
            "summary": example_summary() | audit_summary() | (summary or {}),
            "pairs": pairs,
            "training_log": [],
            "checks": CHECKS,
        }
        return run | other

    return build


def audit_summary() -> dict[str, Any]:
    rates = {"a3": (30, 0.7, 0.6, 0.8), "a2": (12, 0.45, 0.37, 0.5), "a1": (200, 0.1, 0.05, 0.2)}
    return {
        "task": "audit",
        "rho_why": "estimated",
        "alpha": 5.4,
        "alpha_why": "given",
        "beta": 0.75,
        "beta_why": "same_distance",
        "noise_left": 0.1,
        "num_trusted": 0,
        "scorers": [
            {"name": "length", "agreement": 0.62, "low": 0.6, "high": 0.64, "is_taken": False},
            {"name": "hidden states", "agreement": 0.68, "low": 0.66, "high": 0.7, "is_taken": False},
            {"name": "gradients", "agreement": 0.71, "low": 0.69, "high": 0.73, "is_taken": True},
        ],
        "refit": {"gain": 0.021, "error": 0.004, "helps": True, "rests_on_covariates": False},
        "filter": {"gain": 0.014, "error": 0.003, "helps": True, "rests_on_covariates": False},
        "flip_rate_with_length": {"estimate": 0.15, "low": 0.05, "high": 0.25},
        "annotators": [
            {"name": name, "num_pairs": num, "rate": rate, "low": low, "high": high}
            for name, (num, rate, low, high) in rates.items()
        ],
        "calibration": {
            "num_injected": 10,
            "num_turned": 100,
            "share_found": 0.85,
            "share_others": 0.2,
            "recall": 0.9,
            "precision": 0.7,
            "recall_range": [0.8, 0.95],
            "precision_range": [0.55, 0.9],
            "bins": [
                {"num_pairs": 100, "predicted": 0.02, "observed": 0.01},
                {"num_pairs": 100, "predicted": 0.3, "observed": 0.5},
            ],
        },
        "token_lengths": {
            "max_length": 1024,
            "median": 410.0,
            "p90": 800.0,
            "p99": 1500.0,
            "longest": 2048,
            "num_truncated": 3,
            "suggested": 1500,
        },
        "rounds": [],
        "weight_curve": None,
        "config": {"beta": 0.3, "loss": "ropo", "rho": "auto", "num_folds": 5},
        "command": "ropo audit --dataset_name pairs.jsonl",
    }


def example_log() -> list[dict[str, Any]]:
    log: list[dict[str, Any]] = []
    for name in (0, 1):
        for step in (10, 20, 30):
            line = {"round": name, "step": step, "epoch": step / 30, "loss": 2.0 - step / 20 - name / 10}
            log.append(line | {"rewards/margins": step / 20, "rewards/accuracies": 0.5 + step / 100, "grad_norm": 1.0})
        log.append({"round": name, "step": 30, "train_runtime": 4.0, "train_loss": 1.2})
    return log
