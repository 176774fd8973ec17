"""`ropo demo`: the whole way on the embedded task, with the truth at hand to judge it.

In: a folder, a flip rate. Out: a toy model, the same model aligned with DPO and with ROPO on the same noisy labels, a
table of what was measured, and ROPO's report.
"""

import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from ropo.config import ROPOConfig
from ropo.data.inject import flip_labels
from ropo.evaluate.measures import Mean
from ropo.models.source import Model, load_tokenizer
from ropo.pairs import Pair
from ropo.progress import Progress
from ropo.provenance import typed, write_json
from ropo.run.align import run_rounds
from ropo_bench.detection import detection
from ropo_bench.policy_score import PolicyScore, score_policy
from ropo_bench.task import GoldStandard, each
from ropo_bench.tasks import MIN_GAP
from ropo_bench.toy import gold_reward, make_pairs, save_toy

NUM_HELD_OUT = 500
# Shared by both methods: same start, same pairs, same passes over them.
COMMON: dict[str, Any] = {
    "per_device_train_batch_size": 16,
    "num_train_epochs": 1,
    # The best of nine settings for DPO, and then found to be that of ROPO, too, on a seed that the demo does not use:
    # learning rate 2e-4, 4e-4 or 8e-4 (ROPO: up to 4e-4), beta 0.1, 0.3 or 1, at 30 % flips.
    "learning_rate": 2e-4,
    "max_length": 128,
    "max_new_tokens": 48,
    "logging_steps": 20,
    "save_strategy": "no",
}
# The last column shows what a second round with resampling adds to ROPO.
METHODS: dict[str, dict[str, Any]] = {
    "DPO": {"loss": "dpo", "rho": "0", "num_folds": 0},
    "ROPO": {},
    "ROPO, resampling": {"rounds": 2, "num_candidates": 4},
}


def run_demo(folder: Path, *, flip_rate: float, num_pairs: int, seed: int, console: Console) -> dict[str, Any]:
    """Align a tiny model on labels of which a known share is flipped, with DPO and with ROPO, and compare.

    Returns:
        What the table shows, as written to `demo.json`.
    """
    start = time.monotonic()
    base = folder / "toy_model"
    _make_model(base, seed=seed)
    tokenizer = load_tokenizer(str(base))
    pairs = make_pairs(num_pairs + NUM_HELD_OUT, seed=seed + 1, min_gap=MIN_GAP)
    held_out = pairs[num_pairs:]
    noisy, is_flipped = flip_labels(pairs[:num_pairs], rate=flip_rate, seed=seed + 2)
    scores = {"before": score_toy_policy(base, base, tokenizer, held_out, seed=seed)}
    found: dict[str, Any] = {}
    for name, options in METHODS.items():
        console.print(
            f"[bold]{name}[/] on {num_pairs} pairs, {is_flipped.mean():.0%} of the labels flipped", highlight=False
        )
        path = folder / name.lower().replace(", ", "_")
        args = ROPOConfig(output_dir=str(path), seed=seed, **COMMON, **options)
        with typed(f"ropo demo --output_dir {folder}"):
            summary = run_rounds(base, noisy, args).summary
        scores[name] = score_toy_policy(path, base, tokenizer, held_out, seed=seed)
        found[name] = {
            "flip_rate": summary["flip_rate"],
            "is_informative": summary["is_informative"],
            # Without suspects there is no precision, and JSON knows no NaN.
            **{key: None if np.isnan(value) else value for key, value in detection(path, is_flipped).items()},
        }
    result = {
        "flip_rate": float(is_flipped.mean()),
        "num_pairs": num_pairs,
        "scores": {name: _plain(score) for name, score in scores.items()},
        "detection": found,
        "seconds": round(time.monotonic() - start, 1),
    }
    write_json(folder / "demo.json", result)
    _show(result, scores, held_out, folder, console)
    return result


def _make_model(path: Path, *, seed: int) -> None:
    if (path / "tokenizer.json").exists():
        return
    with Progress("Pre-training a tiny language model", 100, unit=" %") as progress:
        save_toy(path, seed=seed, on_step=lambda _, steps, __: progress.advance(100 / steps))


def score_toy_policy(
    path: Path, base: Path, tokenizer: PreTrainedTokenizerBase, held_out: list[Pair], *, seed: int
) -> PolicyScore:
    """Score a model folder on held-out toy pairs; the model in `base` is the reference."""
    policy, reference = (Model(str(folder)).load() for folder in (path, base))
    gold = GoldStandard(pairs=held_out, rewards=each(gold_reward), max_length=128, max_new_tokens=48)
    return score_policy(policy, reference, tokenizer, gold, num_samples=NUM_HELD_OUT, seed=seed)


def _plain(score: PolicyScore) -> dict[str, Any]:
    return {
        name: {"value": mean.value, "low": mean.low, "high": mean.high, "count": mean.count}
        for name in ("accuracy", "gold", "kl")
        for mean in [getattr(score, name)]
    }


def _show(
    result: dict[str, Any], scores: dict[str, PolicyScore], held_out: list[Pair], folder: Path, console: Console
) -> None:
    rate = result["flip_rate"]
    table = Table(
        title=f"\n{result['num_pairs']} pairs, {rate:.0%} of the labels flipped; 90 % intervals over pairs and samples"
    )
    table.add_column("")
    for name in scores:
        table.add_column(name, justify="right")

    def row(title: str, cell: Any) -> None:
        table.add_row(title, *(cell(name) for name in scores))

    def found(name: str, key: str) -> str:
        value = result["detection"].get(name, {}).get(key)
        return "-" if value is None else f"{value:.3f}"

    def estimate(name: str) -> str:
        known = result["detection"].get(name)
        if known is None:
            return "-"
        if not known["is_informative"]:
            return "cannot tell"
        rate = {key: 100 * value for key, value in known["flip_rate"].items()}
        return "{estimate:.1f}% ({low:.1f}-{high:.1f})".format(**rate)

    row("held-out accuracy, clean labels", lambda name: _interval(scores[name].accuracy, "{:.1%}"))
    row("gold reward of samples", lambda name: _interval(scores[name].gold, "{:.2f}"))
    row("distance to the start, nats", lambda name: f"{scores[name].kl.value:.1f}")
    row(f"estimated flip rate (true {rate:.1%})", estimate)
    row("flips found: AUROC", lambda name: found(name, "auroc"))
    row("flips found: precision", lambda name: found(name, "precision"))
    row("flips found: recall", lambda name: found(name, "recall"))
    console.print(table)
    console.print(f"\n{held_out[0].prompt}", style="bold", highlight=False)
    for name, score in scores.items():
        console.print(f"  {name:>6} ({score.rewards[0]:+.2f}): {score.samples[0].text}", highlight=False)
    console.print(
        f"\nMeasured in {result['seconds']:.0f} s and written to {folder / 'demo.json'}.\n"
        f"Report: {folder / 'ropo' / 'report.html'}   <- open it in a browser\n"
        "Next:   ropo train --model_name_or_path M --dataset_name D --output_dir O",
        highlight=False,
    )


def _interval(mean: Mean, form: str) -> str:
    return f"{form} ±{form}".format(mean.value, (mean.high - mean.low) / 2)
