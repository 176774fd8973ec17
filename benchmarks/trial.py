"""What is tried: does agreement with unseen labels tell whether a filter, or the robust loss, makes better models?

    python benchmarks/trial.py [FILM_REVIEWS]    # fill in the missing cells of trial.csv; without the data no sentiment
    python benchmarks/trial.py --table           # the tables of docs/noise.md

The tasks and kinds of noise of `ropo bench`, 6,000 pairs, seeds from 100 on, which no results are reported on. All five
folds are trained on both sides, also where `ropo audit` would not try or would stop sooner. "Gain" is what the audit
sees: agreement with the labels as they are. "Gain in truth" is what it cannot see: agreement with the right ones.
Several processes share the work (`--scratch=FOLDER`).
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
from ropo.audit import FIRST_PASS_BETA, MOST_LOST
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
from ropo.weighing import alpha_for, training_set

RESULTS = Path(__file__).with_suffix(".csv")
NUM_PAIRS = 6000
CELLS = (
    ("filter", "reviews", "symmetric", 0.0, 100), ("filter", "support", "symmetric", 0.0, 100),
    ("filter", "sentiment", "symmetric", 0.0, 100), ("filter", "reviews", "symmetric", 0.3, 100),
    ("filter", "sentiment", "symmetric", 0.2, 100), ("filter", "reviews", "larger_model", 0.3, 100),
    ("filter", "support", "larger_model", 0.3, 100), ("filter", "reviews", "weak_annotator", 0.3, 100),
    ("loss", "reviews", "symmetric", 0.0, 100), ("loss", "sentiment", "symmetric", 0.0, 100),
    ("loss", "reviews", "weak_annotator", 0.3, 100), ("loss", "reviews", "weak_annotator", 0.3, 101),
    ("loss", "reviews", "weak_annotator", 0.3, 102), ("loss", "support", "weak_annotator", 0.3, 100),
    ("loss", "reviews", "length", 0.3, 100),
)  # fmt: skip
NAMES = ("tried", "task", "kind", "flip_rate", "seed")
COLUMNS = (
    *NAMES, "low", "high", "contradicted", "wrong_among_them", "gain", "gain_low", "is_used", "gain_in_truth",
)  # fmt: skip


def measure(
    tried: str, task_name: str, kind: str, rate: float, seed: int, *, scratch: Path, folder: Path, source: str
) -> dict[str, Any]:
    """One cell."""
    config = BenchConfig(
        task=task_name, num_pairs=NUM_PAIRS, methods=["ropo"], seeds=[1], tuning_seed=seed, noise={kind: [rate]},
        source=source if task_name == "sentiment" else None,
    )  # fmt: skip
    task, spare = make_task(config, scratch, seed)
    pairs, is_flipped = plant(task, kind, rate, seed, spare)
    tokenizer, model = AutoTokenizer.from_pretrained(task.model), PolicySource(str(task.model))
    options: dict[str, Any] = {
        "output_dir": str(folder), "seed": seed, "learning_rate": 2e-4, "per_device_train_batch_size": 16,
        "max_length": task.max_length, "save_strategy": "no", "disable_tqdm": True, "num_folds": 5,
    }  # fmt: skip
    tokenized = tokenize_pairs(pairs, tokenizer, max_length=task.max_length)
    how = batching(ROPOConfig(loss="dpo", **options), tokenizer)
    reference = reference_logps(model.load(), tokenized.tokens, cache_dir=folder / "reference_cache", **how)
    data = PairDataset(tokenized.pairs, tokenized.tokens, reference=reference)

    everything = np.ones(len(data), dtype=bool)

    def judge(name: str, beta: float, stays: np.ndarray = everything, **loss: str) -> np.ndarray:
        training = training_set(data, stays.astype(np.float64), np.zeros(len(stays), dtype=bool))
        args = ROPOConfig(
            beta=beta, num_train_epochs=len(stays) / len(training), **{"loss": "dpo", **loss}, **options
        )  # fmt: skip
        return crossfit_margins(
            data, training, args,
            folder=folder / name, source=model, tokenizer=tokenizer, peft_config=None, digest=name,
        )[-1]  # fmt: skip

    first = judge("first", FIRST_PASS_BETA)
    suspects, as_is = first < 0, judge("all", 1.0)
    if tried == "filter":
        other = judge("without", 1.0, ~suspects)
    else:
        other = judge("robust", 1.0, loss="ropo", alpha=str(alpha_for(float(suspects.mean()))))
    truth = np.where(is_flipped, -1.0, 1.0)
    found, estimate = compare(other, as_is), estimate_flips(first)
    return {
        **dict(zip(NAMES, (tried, task_name, kind, rate, seed), strict=True)),
        "low": estimate.low, "high": estimate.high, "contradicted": suspects.mean(),
        "wrong_among_them": is_flipped[suspects].mean(), "gain": found.gain, "gain_low": found.low,
        "is_used": int(found.helps if tried == "filter" else found.low > -MOST_LOST),
        "gain_in_truth": compare(truth * other, truth * as_is).gain,
    }  # fmt: skip


def cell_of(row: dict[str, str]) -> tuple[str, str, str, float, int]:
    """What names a row, as in `CELLS`."""
    return row["tried"], row["task"], row["kind"], float(row["flip_rate"]), int(row["seed"])


def table() -> str:
    """The rows as Markdown, a table for the filter and one for the loss."""
    rows = {cell_of(row): row for row in read_rows(RESULTS)}
    tables = []
    for tried in ("filter", "loss"):
        lines = [
            "| task | noise | seed | first reading | contradicted | wrong among them | gain | surely above | used "
            "| gain in truth |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        for cell in CELLS:
            if cell[0] != tried or cell not in rows:
                continue
            _, task, kind, rate, seed = cell
            value = {name: float(rows[cell][name]) for name in COLUMNS[len(NAMES) :]}
            lines.append(
                f"| {task} | {kind} {rate:.0%} | {seed} | {value['low']:.3f}-{value['high']:.3f} "
                f"| {value['contradicted']:.1%} | {value['wrong_among_them']:.1%} | {100 * value['gain']:+.1f} "
                f"| {100 * value['gain_low']:+.1f} | {'yes' if value['is_used'] else 'no'} "
                f"| {100 * value['gain_in_truth']:+.1f} |"
            )
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def main() -> None:
    """Fill in the missing cells, or print them."""
    if "--table" in sys.argv:
        print(table())
        return
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    kept = [word.removeprefix("--scratch=") for word in sys.argv[1:] if word.startswith("--scratch=")]
    source = next((word for word in sys.argv[1:] if not word.startswith("--")), "")
    done = {cell_of(row) for row in read_rows(RESULTS)}
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(kept[0] if kept else name)
        for number, cell in enumerate(CELLS):
            if cell in done or (cell[1] == "sentiment" and not source):
                continue
            try:
                (scratch / f"claimed_{number}").mkdir(parents=True)
            except FileExistsError:
                continue  # another process has it
            with tempfile.TemporaryDirectory(dir=scratch) as own:
                row = measure(*cell, scratch=scratch, folder=Path(own), source=source)
            is_new = not RESULTS.exists()
            with RESULTS.open("a", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS)
                if is_new:
                    writer.writeheader()
                writer.writerow({key: f"{x:.4f}" if isinstance(x, float) else x for key, x in row.items()})
            print(row, flush=True)


if __name__ == "__main__":
    main()
