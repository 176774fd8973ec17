"""Audits, as shipped, of files whose flips are known: a task that no default was chosen on.

    python benchmarks/known_flips.py MODEL FOLDER [FOLDER ...] [--num_pairs=1500]
    python benchmarks/known_flips.py --table

A FOLDER holds train.jsonl or train.jsonl.gz, and key.json with `flipped`, a list of booleans by row. Three seeds of the
folds. Rows go to known_flips.csv beside this file; what is there is not made again.
"""

import json
import logging
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ropo import ROPOConfig, run_audit
from ropo.data.load import load_pairs
from ropo.evaluate.measures import auroc, precision_recall
from ropo.run.ledger import read_ledger
from ropo_bench.rows import append_row, read_rows

ROWS = Path(__file__).with_suffix(".csv")
SEEDS = (1, 2, 3)
NAMED = ("data", "num_pairs", "seed")
COLUMNS = (
    *NAMED, "flip_rate", "estimate", "low", "high", "auroc", "precision", "claimed_precision", "recall",
    "claimed_recall", "seconds",
)  # fmt: skip


def measured(model: str, folder: Path, num_pairs: int | None) -> Iterator[dict[str, Any]]:
    """Rows of one folder that are not there yet."""
    [train] = folder.glob("train.jsonl*")
    pairs = load_pairs(str(train)).pairs[:num_pairs]
    is_flipped = np.array(json.loads((folder / "key.json").read_text())["flipped"])[: len(pairs)]
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


def _mean(rows: list[dict[str, str]], name: str, digits: int = 3) -> str:
    values = [float(row[name]) for row in rows if row[name] not in ("", "nan")]
    return f"{np.mean(values):.{digits}f}" if values else "cannot tell"


if __name__ == "__main__":
    if "--table" in sys.argv:
        print(table())
    else:
        torch.set_num_threads(1)
        logging.disable(logging.WARNING)
        most = [int(word.removeprefix("--num_pairs=")) for word in sys.argv if word.startswith("--num_pairs=")]
        model, *folders = [word for word in sys.argv[1:] if not word.startswith("--")]
        for folder in folders:
            for row in measured(model, Path(folder), most[0] if most else None):
                append_row(ROWS, row, COLUMNS)
                print(row, flush=True)
