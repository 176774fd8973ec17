"""Which margins tell the flip rate: of models that have seen the pair, of two folds, of five?

    python benchmarks/margins.py            # fill in the missing cells of margins.csv
    python benchmarks/margins.py --table    # the table of docs/noise.md

The embedded task, 6,000 pairs, the options of `benchmarks/noise.py`. "in-sample" is a DPO model trained on all pairs
for one or two epochs; "folds" are audits with so many folds. Adapters: rank 16 on all linear layers, ten times the
learning rate.
"""

import logging
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig
from safetensors.numpy import load_file

from ropo import ROPOConfig, estimate_flips, flip_labels, run_audit, run_rounds
from ropo.evaluate.measures import auroc
from ropo.run.ledger import read_ledger
from ropo_bench.rows import append_row, read_rows
from ropo_bench.toy import make_pairs, save_toy

RESULTS = Path(__file__).with_suffix(".csv")
RATES, SEEDS, NUM_PAIRS = (0.0, 0.3), (1, 2), 6000
COMMON: dict[str, Any] = {
    "per_device_train_batch_size": 16,
    "max_length": 128,
    "save_strategy": "no",
    "disable_tqdm": True,
    "learning_rate": 4e-4,
}
IN_SAMPLE = {"loss": "dpo", "rho": "0", "num_folds": 0, "beta": 0.1}
VARIANTS: dict[str, dict[str, Any]] = {
    "in-sample, 1 epoch": {**IN_SAMPLE, "num_train_epochs": 1},
    "in-sample, 2 epochs": {**IN_SAMPLE, "num_train_epochs": 2},
    "2 folds": {"beta": 1.0, "num_folds": 2},
    "5 folds": {"beta": 1.0, "num_folds": 5},
    "5 folds, mean over checks": {"beta": 1.0, "num_folds": 5},
    "5 folds with adapters": {"beta": 1.0, "num_folds": 5, "learning_rate": 4e-3},
}
COLUMNS = ("variant", "flip_rate", "seed", "estimate", "low", "high", "auroc")


def measure(variant: str, rate: float, seed: int, base: Path, folder: Path) -> dict[str, Any]:
    """One cell."""
    pairs = make_pairs(NUM_PAIRS, seed=1000 * seed, min_gap=1.5)
    noisy, is_flipped = flip_labels(pairs, rate=rate, seed=1000 * seed + 1)
    args = ROPOConfig(output_dir=str(folder), seed=seed, **{**COMMON, **VARIANTS[variant]})
    if args.num_folds:
        adapter = LoraConfig(r=16, lora_alpha=16, target_modules="all-linear") if "adapters" in variant else None
        found = run_audit(base, noisy, args, peft_config=adapter).summary["flip_rate"]
        found = {name: found[name] for name in ("estimate", "low", "high")}
        column = "held_out_margin"
    else:
        run_rounds(base, noisy, args)
        column = "margin"
    ledger = read_ledger(folder / "ledger.parquet").to_pandas().sort_values("row")
    margins = ledger[column].to_numpy()
    if "checks" in variant:  # area under the margin (arXiv:2001.10528)
        margins = load_file(folder / "audit" / "margins.safetensors")["views"].mean(axis=0, dtype=np.float64)
    if not args.num_folds or "checks" in variant:
        estimate = estimate_flips(margins)
        found = {"estimate": estimate.rate, "low": estimate.low, "high": estimate.high}
    score = auroc(-margins, is_flipped) if rate else np.nan
    cell = {"variant": variant, "flip_rate": rate, "seed": seed}
    values = {**found, "auroc": score}
    return {**cell, **{name: "" if value is None else f"{value:.4f}" for name, value in values.items()}}


def table() -> str:
    """One line per variant: estimates with intervals by seed, mean AUROC."""
    lines = [
        f"| margins | {' | '.join(f'estimate at {rate:.0%}' for rate in RATES)} | AUROC at 30% |",
        "|---|---|---|---|",
    ]
    for variant in VARIANTS:
        shown = []
        for rate in RATES:
            cells = [row for row in read_rows(RESULTS) if row["variant"] == variant and float(row["flip_rate"]) == rate]
            shown.append(
                ", ".join(
                    f"{float(c['estimate']):.3f} ({float(c['low']):.3f}-{float(c['high']):.3f})"
                    for c in cells
                    if c["estimate"]  # empty where it cannot be told
                )
                or "-"
            )
        found = [float(c["auroc"]) for c in cells]
        lines.append(
            f"| {variant} | {' | '.join(shown)} | {np.mean(found):.3f} |" if found else f"| {variant} | - | - | - |"
        )
    return "\n".join(lines)


def main() -> None:
    """Fill in the missing cells."""
    if "--table" in sys.argv:
        print(table())
        return
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch) / "model"
        save_toy(base, seed=0)
        for seed in SEEDS:
            for rate in reversed(RATES):
                for variant in VARIANTS:
                    if (variant, rate, seed) in {
                        (r["variant"], float(r["flip_rate"]), int(r["seed"])) for r in read_rows(RESULTS)
                    }:
                        continue
                    name = f"{list(VARIANTS).index(variant)}_{rate}_{seed}"
                    row = measure(variant, rate, seed, base, Path(scratch) / name)
                    append_row(RESULTS, row, COLUMNS)
                    print(row, flush=True)


if __name__ == "__main__":
    main()
