"""Which beta, for DPO and ROPO alike, with no other option but the learning rate? The measurement behind the default.

    python benchmarks/beta.py                      # fill in the missing cells of beta.csv
    python benchmarks/beta.py --files=DATA,MODEL   # a task of files: train.jsonl, test.jsonl with right labels
    python benchmarks/beta.py --table              # the tables of docs/results.md

Two embedded tasks, 1,500 pairs, right labels and 25 % symmetric flips, two seeds; batches of 16, one epoch. Accuracy
on 1,000 held-out pairs with right labels; gold reward and KL (nats per response) on 400 samples. "dpo" has no audit;
"ropo" trains on what the filter keeps for as many steps as on all pairs, with the β that follows the filter; "β as
given" leaves that out; "one epoch" as well, and passes over what is kept once. Where the filter keeps every pair all
four are one training. A task of files has no gold reward.
"""

import itertools
import logging
import multiprocessing
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ropo import ROPOConfig, flip_labels, run_audit, run_rounds
from ropo.data.load import load_pairs
from ropo.models.source import Model, load_tokenizer
from ropo.provenance import read_json
from ropo_bench.policy_score import score_policy
from ropo_bench.rows import append_row, read_rows
from ropo_bench.task import Task, TaskOptions
from ropo_bench.tasks import TASKS

RESULTS = Path(__file__).with_suffix(".csv")
RATES, SEEDS, NUM_PAIRS, NUM_HELD_OUT, NUM_SAMPLES, BATCH = (0.25, 0.0), (1, 2), 1500, 1000, 400, 16
AS_GIVEN, ONE_EPOCH = "ropo, β as given", "ropo, β as given, one epoch"
ROWS, LEARNING_RATES, BETAS = ("dpo", "ropo", AS_GIVEN, ONE_EPOCH), (1e-4, 4e-4), (0.1, 0.3, 1.0)
SMALL_RATE = 1e-5  # of one data set: what a learning rate that is too small does
DATA = ("task", "flip_rate", "seed")
CELL = (*DATA, "learning_rate", "beta", "row")
SCORES = ("accuracy", "gold", "kl")
COLUMNS = (*CELL, "kept", *SCORES, "finished")


def files_task(data: Path, model: Path) -> Task:
    """A task whose labels are noisy already, by an unknown share."""
    train, test = (load_pairs(str(data / f"{name}.jsonl")).pairs for name in ("train", "test"))
    return Task(
        name=data.name, model=model, pairs=train, held_out=test, words=(), max_length=128, max_new_tokens=48,
        gold_rewards=lambda prompts, _: [np.nan] * len(prompts),
    )  # fmt: skip


def task_of(name: str, seed: int, files: str, scratch: Path) -> Task:
    """The task of a seed."""
    if files:
        return files_task(*map(Path, files.split(",")))
    return TASKS[name](scratch, TaskOptions(num_pairs=NUM_PAIRS, num_held_out=NUM_HELD_OUT, seed=seed))


def config(task: Task, seed: int, scratch: Path, name: str, **options: Any) -> ROPOConfig:
    """What all runs share; everything else is the default."""
    return ROPOConfig(
        output_dir=str(scratch / name), seed=seed, per_device_train_batch_size=BATCH, max_length=task.max_length,
        save_strategy="no", logging_strategy="no", disable_tqdm=True, reference_cache_dir=str(scratch / "cache"),
        **options,
    )  # fmt: skip


def audit(data: tuple[str, float, int], files: str, scratch: Path) -> int:
    """Audit a data set once, since no margin depends on learning rate or beta; the number of pairs that are kept."""
    name, rate, seed = data
    task = task_of(name, seed, files, scratch)
    pairs, _ = flip_labels(task.pairs, rate=rate, seed=1000 * seed + 1)
    folder = scratch / name_of(data)
    if not (folder / "summary.json").exists():
        run_audit(task.model, pairs, config(task, seed, scratch, folder.name))
    kept: int = read_json(folder / "summary.json")["num_kept"]
    return kept


def name_of(data: Iterable[Any]) -> str:
    """Folder of the audit of a data set, in scratch."""
    return "_".join(["audit", *map(str, data)])


def measure(cell: dict[str, Any], files: str, scratch: Path) -> dict[str, Any]:
    """One training and its scores."""
    task, seed = task_of(cell["task"], cell["seed"], files, scratch), cell["seed"]
    pairs, _ = flip_labels(task.pairs, rate=cell["flip_rate"], seed=1000 * seed + 1)
    audited = scratch / name_of(cell[key] for key in DATA)
    kept = read_json(audited / "summary.json")["num_kept"]
    options: dict[str, Any] = {"learning_rate": cell["learning_rate"], "beta": cell["beta"]}
    if cell["row"] == "dpo":
        kept, options = len(pairs), {**options, "loss": "dpo", "num_folds": 0}
    else:
        options |= {"audit_from": str(audited), "adapt_beta": cell["row"] == "ropo"}
    if cell["row"] == ONE_EPOCH:
        options["max_steps"] = -(-kept // BATCH)
    trained = scratch / "_".join(["run", *map(str, cell.values())])
    run_rounds(task.model, pairs, config(task, seed, scratch, trained.name, **options))
    score = score_policy(
        Model(str(trained)).load(), Model(str(task.model)).load(), load_tokenizer(str(task.model)),
        task.gold, num_samples=min(NUM_SAMPLES, len(task.held_out)), seed=seed,
    )  # fmt: skip
    shutil.rmtree(trained)
    found = {name: getattr(score, name).value for name in ("accuracy", "gold", "kl", "finished")}
    return {**cell, "kept": kept / len(pairs), **found}


def cells(name: str, rates: tuple[float, ...]) -> Iterator[dict[str, Any]]:
    """All cells of a task, whole seeds first."""
    for seed, rate in itertools.product(SEEDS, rates):
        is_first = (name, rate, seed) == ("reviews", RATES[0], SEEDS[0])
        learning_rates = (*LEARNING_RATES, SMALL_RATE) if is_first else LEARNING_RATES
        for values in itertools.product(learning_rates, BETAS, ROWS):
            yield dict(zip(CELL, (name, rate, seed, *values), strict=True))


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    """What names a cell, whether read or just made."""
    return tuple(str(row[key]) if key in ("task", "row") else float(row[key]) for key in CELL)


def _start() -> None:
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)


def fill(scratch: Path, files: str) -> None:
    """Measure what is missing, one process per core."""
    done = {key_of(row) for row in read_rows(RESULTS)}
    tasks = {Path(files.split(",")[0]).name: (0.0,)} if files else dict.fromkeys(("reviews", "support"), RATES)
    wanted = [cell for name, rates in tasks.items() for cell in cells(name, rates) if key_of(cell) not in done]
    wanted.sort(key=lambda cell: (cell["learning_rate"] == SMALL_RATE, cell["seed"]))
    for name in tasks:
        task_of(name, SEEDS[0], files, scratch)  # makes the model, which all processes read
    with multiprocessing.get_context("spawn").Pool(os.cpu_count(), _start) as pool:
        for data, group in itertools.groupby(wanted, key=lambda cell: tuple(cell[key] for key in DATA)):
            todo, given = list(group), {"files": files, "scratch": scratch}
            is_filtered = pool.apply(audit, (data,), given) < len(task_of(data[0], data[2], files, scratch).pairs)
            for row in pool.imap_unordered(
                partial(measure, **given), [cell for cell in todo if is_filtered or cell["row"] == "dpo"]
            ):
                append_row(RESULTS, row, COLUMNS)
                print(row, flush=True)


def read_cells() -> dict[tuple[str, ...], dict[str, dict[str, list[float]]]]:
    """Scores by data set without its seed, learning rate and beta, then by row, then by score; one value per seed."""
    found: dict[tuple[str, ...], dict[str, dict[str, list[float]]]] = {}
    for row in read_rows(RESULTS):
        cell = found.setdefault(tuple(row[key] for key in (*CELL[:2], *CELL[3:5])), {})
        scores = cell.setdefault(row["row"], {name: [] for name in SCORES})
        for name in SCORES:
            scores[name].append(float(row[name] or "nan"))
    return dict(sorted(found.items(), key=lambda one: (one[0][0], *map(float, one[0][1:]))))


def table() -> str:
    """One line per data set, learning rate and beta: what each row scores, means over seeds."""
    scored = " | ".join(f"{row}: accuracy, gold, KL" for row in ROWS)
    lines = [
        f"| pairs | flipped | learning rate | beta | seeds | {scored} |",
        "|---" * (5 + len(ROWS)) + "|",
    ]
    for (task, rate, learning_rate, beta), cell in read_cells().items():
        num_seeds = min(len(scores["kl"]) for scores in cell.values())
        shown = [_written(cell[row]) if row in cell else "as dpo" for row in ROWS]
        flipped = f"{float(rate):.0%}" if task in TASKS else "in the file"
        lines.append(f"| {task} | {flipped} | {learning_rate} | {beta} | {num_seeds} | {' | '.join(shown)} |")
    return "\n".join(lines)


def _written(scores: dict[str, list[float]]) -> str:
    accuracy, gold, kl = (np.mean(scores[name]) for name in SCORES)
    return f"{accuracy:.3f}, {'-' if np.isnan(gold) else f'{gold:+.2f}'}, {kl:.2f}"


if __name__ == "__main__":
    given = dict(one.removeprefix("--").partition("=")[::2] for one in sys.argv[1:])
    if "table" in given:
        print(table())
        sys.exit()
    with tempfile.TemporaryDirectory() as made:
        fill(Path(given.get("scratch", made)), given.get("files", ""))
