"""Audits and trainings, as shipped, of files whose flips are known: a task that no default was chosen on.

    python benchmarks/known_flips.py MODEL FOLDER [FOLDER ...] [--num_pairs=1500]            # audits
    python benchmarks/known_flips.py MODEL FOLDER [FOLDER ...] [--num_pairs=1500] --train    # trainings
    python benchmarks/known_flips.py --table

A FOLDER holds train.jsonl or train.jsonl.gz, key.json with `flipped`, a list of booleans by row, and for trainings
test.jsonl with right labels. Three seeds of the folds and of the training. Nothing but the learning rate is given to
"dpo" and "ropo", in batches of 16; "dpo, right labels" is what DPO makes of the same pairs without flips. Rows go to
known_flips.csv and known_flips_trained.csv beside this file; what is there is not made again.
"""

import itertools
import json
import logging
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ropo import Pair, ROPOConfig, run_audit, run_rounds
from ropo.data.load import load_pairs
from ropo.evaluate.measures import auroc, precision_recall
from ropo.models.source import Model, load_tokenizer
from ropo.run.ledger import read_ledger
from ropo_bench.policy_score import score_policy
from ropo_bench.results import interval_of
from ropo_bench.rows import append_row, key_of, read_rows
from ropo_bench.task import GoldStandard

ROWS = Path(__file__).with_suffix(".csv")
TRAINED = ROWS.with_name("known_flips_trained.csv")
SEEDS = (1, 2, 3)
NAMED = ("data", "num_pairs", "seed")
COLUMNS = (
    *NAMED, "flip_rate", "estimate", "low", "high", "auroc", "precision", "claimed_precision", "recall",
    "claimed_recall", "seconds",
)  # fmt: skip
LEARNING_RATES, BATCH, NUM_SAMPLES = (1e-4, 2e-4, 4e-4), 16, 400
DPO, RIGHT, ROPO = "dpo", "dpo, right labels", "ropo"
METHODS = (DPO, RIGHT, ROPO)
TRAINED_NAMED = ("data", "num_pairs", "learning_rate", "seed", "method")
TRAINED_COLUMNS = (*TRAINED_NAMED, "flip_rate", "kept", "beta", "accuracy", "kl", "finished", "seconds")


def read_pairs(folder: Path, num_pairs: int | None) -> tuple[list[Pair], np.ndarray]:
    """The pairs of a folder, and which of them are flipped."""
    [train] = folder.glob("train.jsonl*")
    pairs = load_pairs(str(train)).pairs[:num_pairs]
    return pairs, np.array(json.loads((folder / "key.json").read_text())["flipped"])[: len(pairs)]


def measured(model: str, folder: Path, num_pairs: int | None) -> Iterator[dict[str, Any]]:
    """Rows of one folder that are not there yet."""
    pairs, is_flipped = read_pairs(folder, num_pairs)
    for seed in SEEDS:
        cell = {"data": folder.name, "num_pairs": len(pairs), "seed": seed}
        if [str(cell[name]) for name in NAMED] in [[row[name] for name in NAMED] for row in read_rows(ROWS)]:
            continue
        with tempfile.TemporaryDirectory() as scratch:
            start = time.process_time()
            summary = run_audit(model, pairs, ROPOConfig(output_dir=scratch, seed=seed, disable_tqdm=True)).summary
            seconds = time.process_time() - start
            rows = read_ledger(Path(scratch) / "ledger.parquet").to_pandas().sort_values("row")
        truth = is_flipped[rows["row"].to_numpy()]
        precision, recall = precision_recall((rows["decision"] != "keep").to_numpy(), truth)
        claimed = summary["calibration"] or {}
        yield {
            **cell,
            **summary["flip_rate"],
            "flip_rate": float(truth.mean()),
            "auroc": auroc(-rows["held_out_margin"].to_numpy(), truth),
            "precision": precision,
            "recall": recall,
            "claimed_precision": claimed.get("precision"),
            "claimed_recall": claimed.get("recall"),
            "seconds": seconds,
        }


def trained(cell: dict[str, Any], *, model: str, folder: Path, scratch: Path) -> dict[str, Any]:
    """One training and its scores."""
    pairs, is_flipped = read_pairs(folder, cell["num_pairs"])
    if cell["method"] == RIGHT:
        pairs = [
            replace(pair, chosen=pair.rejected, rejected=pair.chosen) if is_wrong else pair
            for pair, is_wrong in zip(pairs, is_flipped, strict=True)
        ]
    out = scratch / "_".join(map(str, cell.values()))
    args = ROPOConfig(
        output_dir=str(out), learning_rate=cell["learning_rate"], seed=cell["seed"], per_device_train_batch_size=BATCH,
        save_strategy="no", logging_strategy="no", disable_tqdm=True,
        **({} if cell["method"] == ROPO else {"loss": "dpo", "rho": "0", "num_folds": 0}),
    )  # fmt: skip
    start = time.process_time()
    summary = run_rounds(model, pairs, args).summary
    seconds = time.process_time() - start
    gold = GoldStandard(
        pairs=load_pairs(str(folder / "test.jsonl")).pairs, rewards=lambda prompts, _: [np.nan] * len(prompts),
    )  # fmt: skip
    score = score_policy(
        Model(str(out)).load(), Model(model).load(), load_tokenizer(model), gold,
        num_samples=min(NUM_SAMPLES, len(gold.pairs)), seed=cell["seed"],
    )  # fmt: skip
    shutil.rmtree(out)
    found = {name: getattr(score, name).value for name in ("accuracy", "kl", "finished")}
    kept = summary["num_kept"] / len(pairs)
    found |= {"flip_rate": float(is_flipped.mean()), "kept": kept, "beta": summary["beta"], "seconds": seconds}
    return {**cell, **found}


def _start() -> None:
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)


def train(model: str, folder: Path, num_pairs: int | None) -> None:
    """Fill in the missing trainings of a folder, one process per core."""
    size = len(read_pairs(folder, num_pairs)[0])
    known = {key_of(row, TRAINED_NAMED) for row in read_rows(TRAINED)}
    cells = [
        dict(zip(TRAINED_NAMED, (folder.name, size, learning_rate, seed, method), strict=True))
        for seed, learning_rate, method in itertools.product(SEEDS, LEARNING_RATES, METHODS)
    ]
    wanted = [cell for cell in cells if key_of(cell, TRAINED_NAMED) not in known]
    with (
        tempfile.TemporaryDirectory() as scratch,
        multiprocessing.get_context("spawn").Pool(os.cpu_count(), _start) as pool,
    ):
        one = partial(trained, model=model, folder=folder, scratch=Path(scratch))
        for row in pool.imap_unordered(one, wanted):
            append_row(TRAINED, row, TRAINED_COLUMNS)
            print(row, flush=True)


def table() -> str:
    """One line per data set: means over seeds, and how many of the intervals hold the truth."""
    rows = read_rows(ROWS)
    names = (
        "data", "pairs", "flipped", "estimate", "intervals", "covered", "AUROC", "precision", "claimed", "recall",
        "claimed", "CPU seconds",
    )  # fmt: skip
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for data, num_pairs in sorted({(row["data"], int(row["num_pairs"])) for row in rows}):
        cells = [row for row in rows if (row["data"], int(row["num_pairs"])) == (data, num_pairs)]
        covered = sum(float(row["low"]) <= float(row["flip_rate"]) <= float(row["high"]) for row in cells)
        ends = ", ".join(f"{float(row['low']):.3f}-{float(row['high']):.3f}" for row in cells)
        scores = ("auroc", "precision", "claimed_precision", "recall", "claimed_recall")
        lines.append(
            f"| {data} | {num_pairs:,} | {_mean(cells, 'flip_rate')} | {_mean(cells, 'estimate')} | {ends} "
            f"| {covered} of {len(cells)} | {' | '.join(_mean(cells, name) for name in scores)} "
            f"| {_mean(cells, 'seconds', 0)} |"
        )
    return "\n".join(lines)


def training_table() -> str:
    """One line per data set and learning rate: accuracy and KL of each method, means over seeds with 90 % intervals."""
    found: dict[tuple[str, int, float], dict[str, list[dict[str, str]]]] = {}
    for row in sorted(read_rows(TRAINED), key=lambda row: int(row["seed"])):
        cell = found.setdefault((row["data"], int(row["num_pairs"]), float(row["learning_rate"])), {})
        cell.setdefault(row["method"], []).append(row)
    names = ("data", "pairs", "learning rate", *METHODS, "ropo - dpo", *(f"KL, {name}" for name in METHODS), "cost")
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for (data, num_pairs, learning_rate), cell in sorted(found.items()):
        dpo, ropo = (np.array([float(row["accuracy"]) for row in cell[method]]) for method in (DPO, ROPO))
        theirs, ours = (sum(float(row["seconds"]) for row in cell[method]) for method in (DPO, ROPO))
        shown = [
            data, f"{num_pairs:,}", f"{learning_rate:g}", *(_mean(cell[method], "accuracy") for method in METHODS),
            interval_of(ropo - dpo).write(3, signed=True), *(_mean(cell[method], "kl", 2) for method in METHODS),
            f"{ours / theirs:.1f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(shown)} |")
    return "\n".join(lines)


def _mean(rows: list[dict[str, str]], name: str, digits: int = 3) -> str:
    values = [float(row[name]) for row in rows if row[name] not in ("", "nan")]
    return f"{np.mean(values):.{digits}f}" if values else "cannot tell"


if __name__ == "__main__":
    if "--table" in sys.argv:
        print(table(), training_table(), sep="\n\n")
    else:
        _start()
        most = [int(word.removeprefix("--num_pairs=")) for word in sys.argv if word.startswith("--num_pairs=")]
        model, *folders = [word for word in sys.argv[1:] if not word.startswith("--")]
        num_pairs = most[0] if most else None
        for folder in folders:
            if "--train" in sys.argv:
                train(model, Path(folder), num_pairs)
                continue
            for row in measured(model, Path(folder), num_pairs):
                append_row(ROWS, row, COLUMNS)
                print(row, flush=True)
