"""`summary.json`: what a run or an audit found and did, as plain values.

In: finished rounds or a finished audit, and what was read. Out: JSON. Where a value has a reason, its name stands
there (`obstacle`, `rho_why`, ...), for programs, and for `obstacle` the sentence (`reason`), for people.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from ropo.audit import Audit
from ropo.audit.options import AuditOptions
from ropo.audit.weights import CHOICES, Choice
from ropo.data.problems import rows_left_out, summarise
from ropo.losses import BoundLoss, gradient_weight
from ropo.noise.estimate import FlipEstimate, Obstacle
from ropo.noise.linear import Gain
from ropo.provenance import Json, command, machine, read_json, versions
from ropo.report.clauses import reason
from ropo.run.evaluation import Evaluation
from ropo.run.prepare import Prepared
from ropo.run.rounds import Round
from ropo.stages import Stages

_CURVE_MARGINS = np.linspace(-6, 6, 121)


def train_summary(rounds: Sequence[Round], made: Prepared, evaluation: Evaluation | None) -> Json:
    """What `summary.json` holds after training.

    Args:
        rounds: Finished rounds, in order.
        made: What the run was given.
        evaluation: What the models make of the evaluation set; None without.
    """
    audit = rounds[0].audit
    per_round = [_round_summary(this) for this in rounds]
    final, trained_by = per_round[-1], per_round[-2:][0]  # what the last training was decided by
    seconds = _audit_seconds(made.folder, audit)
    for this in rounds:
        seconds |= {f"round {this.number} {name}": value for name, value in this.stages.seconds.items()}
    chosen = (f"{name}{end}" for name in CHOICES for end in ("", "_why"))
    names = ("flip_rate", "is_informative", "obstacle", "reason", *chosen)
    return {
        "task": "train",
        **{name: final[name] for name in names},
        **{name: trained_by[name] for name in ("num_pairs", "num_kept", "num_dropped", "num_flipped")},
        "num_resampled": final["num_resampled_trained_on"],
        **_about_labels(audit, num_trusted=rounds[0].num_read - rounds[0].num_data),
        **_about_run(rounds[0].args, made, seconds, rounds[0].loss),
        "rounds": per_round,
        "model": made.model.name_or_path,
        "datasets": made.datasets,
        "model_fingerprint": _fingerprint(made.folder),
        "weight_curve": _weight_curve(rounds[0].loss),
        "evaluation": None if evaluation is None else asdict(evaluation),
    }


def audit_summary(audit: Audit, made: Prepared) -> Json:
    """What `summary.json` holds after an audit.

    Args:
        audit: A finished one.
        made: What it was given.
    """
    judged = audit.judgement
    is_data = [pair.origin == "data" for pair in audit.data.pairs]
    counts = Counter(what for what, own in zip(judged.decisions, is_data, strict=True) if own)
    return {
        "task": "audit",
        **_about_rate(judged.estimate),
        **_chosen({name: getattr(judged, name) for name in CHOICES}),
        "num_pairs": sum(is_data),
        "num_kept": counts["keep"],
        "num_dropped": counts["drop"],
        "num_flipped": counts["flip"],
        "num_resampled": 0,
        **_about_labels(audit),
        **_about_run(audit.args, made, _audit_seconds(made.folder, audit)),
        "rounds": [],
        "model": made.model.name_or_path,
        "model_fingerprint": _fingerprint(made.folder),
        "weight_curve": None,
    }


def _round_summary(this: Round) -> Json:
    found = this.decided()
    counts = Counter(found.decisions[: this.num_data])
    told = this.resampling()
    return {
        "round": this.number,
        **_about_rate(this.estimate()),
        **_chosen({name: getattr(found, name) for name in CHOICES}),
        "num_pairs": this.num_data,
        "num_kept": counts["keep"],
        "num_dropped": counts["drop"] + counts["resample"],
        "num_flipped": counts["flip"],
        "num_resampled": len(this.new_pairs()),
        "num_resampled_trained_on": sum(weight > 0 for weight in this.data.weights[this.num_read :]),
        **{name: told.get(name, default) for name, default in (("num_judged", 0), ("refused", {}))},
    }


def _chosen(choices: Mapping[str, Choice]) -> Json:
    """Each value, and under `..._why` why it is so."""
    return {key: value for name, one in choices.items() for key, value in ((name, one.value), (f"{name}_why", one.why))}


def _about_rate(estimate: FlipEstimate) -> Json:
    return {
        "flip_rate": _flip_rate(estimate),
        "is_informative": estimate.is_informative,
        "obstacle": estimate.obstacle,
        "reason": reason(estimate),
    }


def _flip_rate(estimate: FlipEstimate) -> Json:
    """The rate with its interval.

    No rate where it cannot be told, and no interval where the margins are those of a model that has seen the labels:
    nobody should read 0 % there.
    """
    is_held_out = estimate.obstacle is not Obstacle.IN_SAMPLE
    return {
        "estimate": estimate.rate if estimate.is_informative else None,
        "low": estimate.low if is_held_out else None,
        "high": estimate.high if is_held_out and estimate.obstacle is not Obstacle.REVERSED else None,
    }


def _weight_curve(loss: BoundLoss) -> Json | None:
    """How hard a pair pulls by its margin; None for losses of a whole batch."""
    if loss.spec.needs_whole_batch or "moments" in loss.spec.inputs:
        return None
    curve = gradient_weight(loss, torch.from_numpy(_CURVE_MARGINS))
    return {"loss": loss.name, "margin": _CURVE_MARGINS.tolist(), "weight": curve.tolist()}


def _audit_seconds(folder: Path, audit: Audit | None) -> dict[str, float]:
    return {**Stages(folder / "reference").seconds, **(audit.seconds if audit else {})}


def _fingerprint(folder: Path) -> str:
    """Of the initial model; the run has written it before any work."""
    fingerprint: str = read_json(folder / "ropo_config.json")["model"][0]
    return fingerprint


def _about_run(args: AuditOptions, made: Prepared, seconds: dict[str, float], loss: BoundLoss | None = None) -> Json:
    """What was read, how long it took, and the options: with the loss that was trained, where one was."""
    problems = summarise(made.problems)
    config = {name: value for name, value in args.to_dict().items() if not name.endswith("_token")}
    if loss is not None:
        config |= {"loss": loss.name, "alpha": str(loss.options["alpha"]) if "alpha" in loss.options else None}
    return {
        "num_rows": made.loaded.num_rows,
        "num_left_out": len(rows_left_out(made.problems) - {None}),
        "problems": problems,
        "token_lengths": _token_lengths(made.lengths, args.max_length, problems.get("truncated", 0)),
        "seconds": seconds,
        "versions": versions(),
        "machine": machine(),
        "config": config,
        "command": command(),
        "data_sha256": made.loaded.sha256,
    }


def _token_lengths(lengths: Sequence[int], max_length: int, num_truncated: int) -> dict[str, int]:
    """Quantiles of the lengths, and the `max_length` (a multiple of 64) that leaves 99 of 100 pairs whole."""
    median, p90, p99 = (int(np.quantile(lengths, share, method="higher")) for share in (0.5, 0.9, 0.99))
    return {
        "max_length": max_length,
        "median": median,
        "p90": p90,
        "p99": p99,
        "longest": max(lengths),
        "num_truncated": num_truncated,
        "suggested": 64 * -(-p99 // 64),
    }


def _about_gain(gain: Gain) -> Json:
    return {**asdict(gain), "helps": gain.helps, "rests_on_covariates": gain.rests_on_covariates}


def _about_labels(audit: Audit | None, *, num_trusted: int = 0) -> Json:
    """What only an audit knows; empty values without one."""
    if audit is None:
        names = ("num_contradicted", "calibration", "noise_left", "refit", "filter", "flip_rate_with_length")
        nothing = dict.fromkeys(names)
        return {"annotators": [], "scorers": [], "num_trusted": num_trusted, **nothing}
    judged, calibration, scores = audit.judgement, audit.calibration(), audit.scores
    return {
        "annotators": [asdict(one) for one in judged.estimate.annotators],
        "scorers": [asdict(row) for row in scores.rows],
        "refit": scores.refit and _about_gain(scores.refit),
        "filter": scores.filter and _about_gain(scores.filter),
        "flip_rate_with_length": None if judged.with_length is None else _flip_rate(judged.with_length),
        "num_trusted": judged.estimate.num_trusted,
        "num_contradicted": audit.num_contradicted,
        "calibration": None if calibration is None else asdict(calibration),
        "noise_left": judged.noise_left,
    }
