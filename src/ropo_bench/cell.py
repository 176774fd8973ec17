"""One cell of a benchmark: plant noise, train one method on it, score the result.

In: `BenchConfig`, `Cell`. Out: a row of `rows.RESULT_COLUMNS`.
"""

import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import ropo
from ropo.data.inject import NOISE, flip_labels
from ropo.models.source import Model, load_tokenizer
from ropo.pairs import Pair
from ropo.provenance import commit, read_json
from ropo_bench.detection import detection
from ropo_bench.grid_config import BenchConfig
from ropo_bench.methods import METHODS, Noisy, run_method
from ropo_bench.policy_score import score_policy
from ropo_bench.task import Task, TaskOptions, each
from ropo_bench.tasks import TASKS
from ropo_bench.word_reward import fit_on_pairs

WORK = "work"  # where the trainings of cells write while they run
NUM_SPARE = 100  # right pairs that are neither trained nor tested on
NUM_SEEN_BY_WEAK_ANNOTATOR = 30  # of the spare ones: it then errs on about a third of the toy pairs


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One training and what it is measured on."""

    method: str
    kind: str
    flip_rate: float
    seed: int
    options: Mapping[str, Any]


def named(config: BenchConfig, cell: Cell) -> dict[str, Any]:
    """What names a row."""
    found = asdict(cell)
    options = json.dumps(dict(cell.options), sort_keys=True)
    return {**found, "task": config.task, "num_pairs": config.num_pairs, "options": options}


def make_task(config: BenchConfig, folder: Path, seed: int) -> tuple[Task, list[Pair]]:
    """The task of a seed, cached, and its spare pairs."""
    options = TaskOptions(
        num_pairs=config.num_pairs,
        num_held_out=config.num_held_out + NUM_SPARE,
        seed=seed,
        source=None if config.source is None else Path(config.source),
        **config.own,
    )
    task = TASKS[config.task](folder / "tasks", options)
    return replace(task, held_out=task.held_out[: config.num_held_out]), task.held_out[config.num_held_out :]


def plant(task: Task, kind: str, rate: float, seed: int, spare: Sequence[Pair]) -> tuple[list[Pair], np.ndarray]:
    """Flip a share of a task's labels."""
    needs = NOISE[kind].needs
    more: dict[str, Any] = {}
    if needs == "rewards":
        is_weak = kind == "weak_annotator"
        rewards = each(fit_on_pairs(spare[:NUM_SEEN_BY_WEAK_ANNOTATOR])) if is_weak else task.gold_rewards
        prompts = [pair.prompt for pair in task.pairs]
        columns = ([pair.chosen for pair in task.pairs], [pair.rejected for pair in task.pairs])
        more["rewards"] = np.array([rewards(prompts, responses) for responses in columns]).T
    elif needs == "words":
        more["words"] = task.words
    return flip_labels(task.pairs, rate=rate, seed=1000 * seed + 1, kind=kind, **more)


def measure(config: BenchConfig, cell: Cell, folder: Path) -> dict[str, Any]:
    """Train one method on one noisy data set and score the result."""
    task, spare = make_task(config, folder, cell.seed)
    pairs, is_flipped = plant(task, cell.kind, cell.flip_rate, cell.seed, spare)
    common = {
        "per_device_train_batch_size": 16,
        "max_length": task.max_length,
        "max_new_tokens": task.max_new_tokens,
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "reference_cache_dir": str(folder / "reference_cache"),
        **config.options,
    }
    noisy = Noisy(task=task, pairs=pairs, is_flipped=is_flipped, spare=spare, seed=cell.seed, common=common)
    name = "_".join([cell.method, cell.kind, f"{cell.flip_rate:g}", str(cell.seed), str(os.getpid())])
    work = folder / WORK / name
    shutil.rmtree(work, ignore_errors=True)
    start = _clocks()
    try:
        trained = run_method(cell.method, noisy, work, cell.options)
        took = _clocks() - start
        scores = {**_scores(config, task, trained, cell.seed), **_found_noise(cell.method, trained, noisy)}
    except FloatingPointError:  # a result, too: this method does not bear this setting
        took, scores = _clocks() - start, {"accuracy": np.nan}
    found = {
        **named(config, cell),
        **scores,
        "seconds": float(took[0]),
        "cpu_seconds": float(took[1]),
        "memory_gib": _peak_gib(),
        "version": ropo.__version__,
        "commit": commit(),
        "torch": torch.__version__,
        "device": _device(),
    }
    shutil.rmtree(work, ignore_errors=True)
    return found


def _scores(config: BenchConfig, task: Task, trained: Path, seed: int) -> dict[str, float]:
    score = score_policy(
        Model(str(trained)).load(),
        Model(str(task.model)).load(),
        load_tokenizer(str(task.model)),
        task.gold,
        num_samples=min(config.num_samples, len(task.held_out)),
        seed=seed,
    )
    return {
        "accuracy": score.accuracy.value,
        "accuracy_error": (score.accuracy.high - score.accuracy.low) / 2,
        "gold": score.gold.value,
        "gold_error": (score.gold.high - score.gold.low) / 2,
        "kl": score.kl.value,
        "finished": score.finished.value,
    }


def _found_noise(name: str, trained: Path, noisy: Noisy) -> dict[str, float]:
    """How well the run's ledger ranks the flips, and its estimate if it made one."""
    method = METHODS[name]
    if method.is_reference or method.run is not None:  # its ledger is about fewer pairs, or about other labels
        return {}
    found, summary = detection(trained, noisy.is_flipped), read_json(trained / "summary.json")
    if summary.get("is_informative"):
        found |= {key: summary["flip_rate"][key] for key in ("estimate", "low", "high")}
    return found


def _clocks() -> np.ndarray:
    """Wall clock and processor time, seconds; on a machine that does other things too, only the second compares."""
    return np.array([time.monotonic(), time.process_time()])


def _peak_gib() -> float:
    """Most memory that this process ever had; a worker measures one cell after the other, so of the largest so far."""
    units_per_gib = 2**30 if sys.platform == "darwin" else 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / units_per_gib


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {torch.get_num_threads()} thread"
