"""How should a round begin, and does resampling pay? The measurement behind the defaults of `ropo train`.

    python benchmarks/rounds.py           # one row of benchmarks/rounds.csv per cell; finished cells are skipped
    python benchmarks/rounds.py --seed=1  # the cells of one seed, so that two cores can share the work
    python benchmarks/rounds.py --table   # the mean over seeds, from the rows

The embedded task: 4,000 pairs, 30 % or none of the labels flipped, 2 passes over the pairs a round, one learning rate
for all (the best of DPO's three on another seed). Accuracy on 500 held-out pairs with right labels; gold reward and
distance to the start (nats) on 500 samples.
"""

import csv
import logging
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer

from ropo import ROPOConfig, __version__, flip_labels, run_rounds
from ropo.data.toy import make_pairs, save_toy
from ropo.demo import COMMON, MIN_GAP, NUM_HELD_OUT, detection, score_toy_policy

RESULTS = Path(__file__).with_suffix(".csv")
NUM_PAIRS = 4000
SEEDS = (1, 2, 3)
ONE_ROUND = {"rho": "0", "rounds": 1}
VARIANTS = {
    "dpo, one round": {"loss": "dpo", **ONE_ROUND},
    "dpo, one round, twice the passes": {"loss": "dpo", **ONE_ROUND, "num_train_epochs": 4},
    "ropo, one round": {"loss": "ropo", **ONE_ROUND},
    "ropo then dpo, restart": {"round_start": "restart", "num_candidates": 0},
    "ropo then dpo, restart, resampling": {"round_start": "restart", "num_candidates": 4},
    "ropo then dpo, carry on": {"round_start": "carry_on", "num_candidates": 0},
    "ropo then dpo, carry on, resampling": {"round_start": "carry_on", "num_candidates": 4},
    "ropo then ropo, carry on, resampling": {"round_start": "carry_on", "num_candidates": 4, "last_loss": "ropo"},
    "ropo then dpo, restart, soft weights": {
        "round_start": "restart",
        "num_candidates": 0,
        "decision_rule": "posterior",
    },
    "dpo then dpo, restart": {"loss": "dpo", "round_start": "restart", "num_candidates": 0},
    "dpo then dpo, carry on": {"loss": "dpo", "round_start": "carry_on", "num_candidates": 0},
}
COLUMNS = (
    *(
        "variant",
        "flip_rate",
        "seed",
        "accuracy",
        "gold",
        "kl",
        "estimate",
        "low",
        "high",
        "auroc",
        "precision",
        "recall",
    ),
    *("num_resampled", "seconds", "version"),
)


def measure(variant: str, flip_rate: float, seed: int, folder: Path, base: Path) -> dict[str, object]:
    """Run one cell and return its row."""
    pairs = make_pairs(NUM_PAIRS + NUM_HELD_OUT, seed=1000 * seed, min_gap=MIN_GAP)
    noisy, is_flipped = flip_labels(pairs[:NUM_PAIRS], rate=flip_rate, seed=1000 * seed + 1)
    out = folder / f"{list(VARIANTS).index(variant)}_{flip_rate}_{seed}"
    options = {**COMMON, "learning_rate": 2e-4, **VARIANTS[variant]}
    start = time.monotonic()
    summary = run_rounds(base, noisy, ROPOConfig(output_dir=str(out), seed=seed, **options))
    seconds = time.monotonic() - start
    tokenizer = AutoTokenizer.from_pretrained(base)
    score = score_toy_policy(out, base, tokenizer, pairs[NUM_PAIRS:], seed=seed)
    rate = (
        summary["flip_rate"] if summary["is_informative"] else dict.fromkeys(("estimate", "low", "high"), float("nan"))
    )
    values = {
        "accuracy": score.accuracy.value,
        "gold": score.gold.value,
        "kl": score.kl.value,
        **rate,
        **detection(out, is_flipped),
    }
    return {
        "variant": variant,
        "flip_rate": flip_rate,
        "seed": seed,
        **{name: f"{value:.4f}" for name, value in values.items()},
        "num_resampled": summary["num_resampled"],
        "seconds": f"{seconds:.0f}",
        "version": __version__,
    }


def show() -> None:
    """Print the mean over seeds with its standard error."""
    with RESULTS.open() as file:
        rows = list(csv.DictReader(file))
    print(f"{'':38}{'seeds':>6}{'accuracy':>16}{'gold reward':>16}{'distance':>10}{'estimate':>10}{'AUROC':>8}")
    for flip_rate in sorted({row["flip_rate"] for row in rows}, reverse=True):
        print(f"{float(flip_rate):.0%} flipped")
        for variant in VARIANTS:
            cells = [row for row in rows if (row["variant"], row["flip_rate"]) == (variant, flip_rate)]
            if not cells:
                continue
            column = {name: np.array([float(row[name]) for row in cells]) for name in COLUMNS[3:12]}
            print(
                f"  {variant:36}{len(cells):6}{_with_error(column['accuracy'], 3):>16}"
                f"{_with_error(column['gold'], 2):>16}"
                f"{column['kl'].mean():10.1f}{column['estimate'].mean():10.3f}{column['auroc'].mean():8.3f}"
            )


def _with_error(values: np.ndarray, digits: int) -> str:
    error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else float("nan")
    return f"{values.mean():.{digits}f}" + ("" if np.isnan(error) else f" ±{error:.{digits}f}")


def main() -> None:
    """Fill in the missing cells, seed by seed."""
    if "--table" in sys.argv:
        show()
        return
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    wanted = [argument for argument in sys.argv[1:] if argument.startswith("--seed=")]
    seeds = [int(word.removeprefix("--seed=")) for word in wanted] or SEEDS
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch) / "toy_model"
        save_toy(base, seed=0)
        for seed in seeds:
            for flip_rate in (0.3, 0.0):
                for variant in VARIANTS:
                    done = set()
                    if RESULTS.exists():
                        with RESULTS.open() as file:
                            done = {
                                (row["variant"], float(row["flip_rate"]), int(row["seed"]))
                                for row in csv.DictReader(file)
                            }
                    if (variant, flip_rate, seed) in done:
                        continue
                    row = measure(variant, flip_rate, seed, Path(scratch), base)
                    is_new = not RESULTS.exists()
                    with RESULTS.open("a", newline="") as file:
                        writer = csv.DictWriter(file, COLUMNS)
                        if is_new:
                            writer.writeheader()
                        writer.writerow(row)


if __name__ == "__main__":
    main()
