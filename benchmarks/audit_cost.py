"""What an audit costs beside an epoch of DPO: seconds and memory from 500 to 60,000 pairs.

    python benchmarks/audit_cost.py            # on an idle machine; what is in audit_cost.csv is not measured again
    python benchmarks/audit_cost.py --table    # the table of docs/performance.md

Model and pairs of the task `reviews`, 20 % flipped at random, one thread, every run in a process of its own. "Audit" is
all of `run_audit`: the reference pass, which DPO needs as well, with features; linear models; report and tables. "DPO"
is the training stage of `run_rounds` alone, one epoch in batches of 16. Memory is the most that a process ever held.
"""

import logging
import os
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from ropo import Pair, ROPOConfig, flip_labels, run_audit, run_rounds
from ropo_bench.rows import append_row, read_rows
from ropo_bench.task import TaskOptions
from ropo_bench.tasks import TASKS

ROWS = Path(__file__).with_suffix(".csv")
SIZES = (500, 1_500, 6_000, 20_000, 60_000)
COLUMNS = ("pairs", "reference_s", "linear_s", "audit_s", "audit_gib", "dpo_s", "dpo_gib", "torch")


def run(model: Path, given: list[Pair], scratch: Path, options: dict[str, Any]) -> dict[str, float]:
    """One audit, or one training if options say so: seconds in all and of its stages, GiB."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    pairs, _ = flip_labels(given, rate=0.2, seed=1)
    args = ROPOConfig(
        output_dir=str(scratch / f"{len(pairs)}{options.get('loss', '')}"), per_device_train_batch_size=16,
        max_length=128, save_strategy="no", logging_strategy="no", disable_tqdm=True, use_cpu=True,
        **options,
    )  # fmt: skip
    start = time.monotonic()
    found = (run_rounds if options else run_audit)(model, pairs, args).summary["seconds"]
    seconds = time.monotonic() - start
    gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (30 if sys.platform == "darwin" else 20)
    return {"all": seconds, "gib": gib, **found}


def measure(model: Path, pairs: list[Pair], scratch: Path) -> dict[str, Any]:
    """A row."""
    found = []
    for options in ({}, {"loss": "dpo", "num_folds": 0, "learning_rate": 2e-4}):
        with get_context("spawn").Pool(1) as pool:  # memory is that of a process
            found.append(pool.apply(run, (model, pairs, scratch, options)))
    audit, dpo = found
    return {
        "pairs": len(pairs), "reference_s": audit["reference"], "linear_s": audit["audit linear"],
        "audit_s": audit["all"], "audit_gib": audit["gib"], "dpo_s": dpo["round 0 train"], "dpo_gib": dpo["gib"],
        "torch": torch.__version__,
    }  # fmt: skip


def table(rows: Sequence[dict[str, str]] | None = None) -> str:
    """One line per size."""
    names = (
        "pairs", "audit, s", "of that reference with features, s", "linear models, s", "one epoch of DPO, s",
        "audit / epoch", "audit, GiB", "DPO, GiB",
    )  # fmt: skip
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for row in sorted(read_rows(ROWS) if rows is None else rows, key=lambda row: int(row["pairs"])):
        seconds = [float(row[name]) for name in ("audit_s", "reference_s", "linear_s", "dpo_s")]
        shown = [f"{value:.1f}" for value in seconds] + [f"{seconds[0] / seconds[3]:.2f}"]
        shown += [f"{float(row[name]):.2f}" for name in ("audit_gib", "dpo_gib")]
        lines.append(f"| {int(row['pairs']):,} | {' | '.join(shown)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    if "--table" in sys.argv:
        print(table())
    else:
        os.environ["OMP_NUM_THREADS"] = "1"  # of numpy and scipy, in the processes that are measured
        with tempfile.TemporaryDirectory() as made:
            task = TASKS["reviews"](Path(made), TaskOptions(num_pairs=max(SIZES), num_held_out=10, seed=1))
            for size in SIZES:
                if str(size) not in [row["pairs"] for row in read_rows(ROWS)]:
                    row = measure(task.model, task.pairs[:size], Path(made))
                    append_row(ROWS, row, COLUMNS)
                    print(row, flush=True)
