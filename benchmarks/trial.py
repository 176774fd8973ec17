"""A filter that is tried: does agreement with unseen labels tell whether leaving the contradicted pairs out helps?

    python benchmarks/trial.py [FILM_REVIEWS]    # fill in the missing cells of trial.csv; without the data no sentiment
    python benchmarks/trial.py --table           # the table of docs/noise.md

The tasks and kinds of noise of `ropo bench`, 6,000 pairs, seed 100, which no results are reported on. All five folds
are trained on both sides, also where `ropo audit` would stop at the first. "Gain" is what the audit sees: agreement
with the labels as they are. "Gain in truth" is what it cannot see: agreement with the right ones. Several processes
share the work (`--scratch=FOLDER`).
"""

import csv
import logging
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from ropo import ROPOConfig
from ropo.audit import FIRST_PASS_BETA
from ropo.bench.cell import make_task, plant
from ropo.bench.grid_config import BenchConfig
from ropo.bench.rows import read_rows
from ropo.crossfit import crossfit_margins
from ropo.data.tokenize import tokenize_pairs
from ropo.logps.cache import reference_logps
from ropo.noise.estimate import estimate_flips
from ropo.noise.trial import compare
from ropo.pair_dataset import PairDataset
from ropo.policy import PolicySource
from ropo.trainer import batching
from ropo.weighing import training_set

RESULTS = Path(__file__).with_suffix(".csv")
SEED, NUM_PAIRS = 100, 6000
CELLS = (
    ("reviews", "symmetric", 0.0), ("support", "symmetric", 0.0), ("sentiment", "symmetric", 0.0),
    ("reviews", "symmetric", 0.3), ("sentiment", "symmetric", 0.2),
    ("reviews", "larger_model", 0.3), ("support", "larger_model", 0.3),
    ("reviews", "weak_annotator", 0.3),
)  # fmt: skip
COLUMNS = (
    "task", "kind", "flip_rate", "seed", "low", "high", "left_out", "wrong_among_them", "gain", "gain_low", "helps",
    "gain_in_truth",
)  # fmt: skip


def measure(task_name: str, kind: str, rate: float, scratch: Path, folder: Path, source: str) -> dict[str, Any]:
    """One cell."""
    config = BenchConfig(
        task=task_name, num_pairs=NUM_PAIRS, methods=["ropo"], seeds=[1], tuning_seed=SEED, noise={kind: [rate]},
        source=source if task_name == "sentiment" else None,
    )  # fmt: skip
    task, spare = make_task(config, scratch, SEED)
    pairs, is_flipped = plant(task, kind, rate, SEED, spare)
    tokenizer, model = AutoTokenizer.from_pretrained(task.model), PolicySource(str(task.model))
    options: dict[str, Any] = {
        "output_dir": str(folder), "seed": SEED, "learning_rate": 2e-4, "per_device_train_batch_size": 16,
        "max_length": task.max_length, "save_strategy": "no", "disable_tqdm": True, "loss": "dpo", "num_folds": 5,
    }  # fmt: skip
    tokenized = tokenize_pairs(pairs, tokenizer, max_length=task.max_length)
    how = batching(ROPOConfig(**options), tokenizer)
    reference = reference_logps(model.load(), tokenized.tokens, cache_dir=folder / "reference_cache", **how)
    data = PairDataset(tokenized.pairs, tokenized.tokens, reference=reference)

    def judge(name: str, beta: float, stays: np.ndarray) -> np.ndarray:
        training = training_set(data, stays.astype(np.float64), np.zeros(len(stays), dtype=bool))
        args = ROPOConfig(beta=beta, num_train_epochs=len(stays) / len(training), **options)
        return crossfit_margins(
            data, training, args,
            folder=folder / name, source=model, tokenizer=tokenizer, peft_config=None, digest=name,
        )[-1]  # fmt: skip

    everything = np.ones(len(data), dtype=bool)
    first = judge("first", FIRST_PASS_BETA, everything)
    suspects = first < 0
    with_all, without = judge("all", 1.0, everything), judge("without", 1.0, ~suspects)
    truth = np.where(is_flipped, -1.0, 1.0)
    found, estimate = compare(without, with_all), estimate_flips(first)
    in_truth = compare(truth * without, truth * with_all).gain
    return {
        "task": task_name, "kind": kind, "flip_rate": rate, "seed": SEED, "low": estimate.low, "high": estimate.high,
        "left_out": suspects.mean(), "wrong_among_them": is_flipped[suspects].mean(), "gain": found.gain,
        "gain_low": found.low, "helps": int(found.helps), "gain_in_truth": in_truth,
    }  # fmt: skip


def table() -> str:
    """The rows as Markdown."""
    lines = [
        "| task | noise | first reading | left out | wrong among them | gain | surely above | used | gain in truth |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    order = {cell: place for place, cell in enumerate(CELLS)}
    rows = sorted(read_rows(RESULTS), key=lambda row: order[row["task"], row["kind"], float(row["flip_rate"])])
    for row in rows:
        value = {name: float(row[name]) for name in COLUMNS[2:]}
        lines.append(
            f"| {row['task']} | {row['kind']} {value['flip_rate']:.0%} | {value['low']:.3f}-{value['high']:.3f} "
            f"| {value['left_out']:.1%} | {value['wrong_among_them']:.1%} | {100 * value['gain']:+.1f} "
            f"| {100 * value['gain_low']:+.1f} | {'yes' if value['helps'] else 'no'} "
            f"| {100 * value['gain_in_truth']:+.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Fill in the missing cells, or print them."""
    if "--table" in sys.argv:
        print(table())
        return
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    kept = [word.removeprefix("--scratch=") for word in sys.argv[1:] if word.startswith("--scratch=")]
    source = next((word for word in sys.argv[1:] if not word.startswith("--")), "")
    done = {(row["task"], row["kind"], float(row["flip_rate"])) for row in read_rows(RESULTS)}
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(kept[0] if kept else name)
        for number, cell in enumerate(CELLS):
            if cell in done or (cell[0] == "sentiment" and not source):
                continue
            try:
                (scratch / f"claimed_{number}").mkdir(parents=True)
            except FileExistsError:
                continue  # another process has it
            with tempfile.TemporaryDirectory(dir=scratch) as own:
                row = measure(*cell, scratch, Path(own), source)
            is_new = not RESULTS.exists()
            with RESULTS.open("a", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS)
                if is_new:
                    writer.writeheader()
                writer.writerow({key: f"{x:.4f}" if isinstance(x, float) else x for key, x in row.items()})
            print(row, flush=True)


if __name__ == "__main__":
    main()
