"""The benchmark: every method on every kind of noise, tuned alike, row by row into a file that resumes by itself.

In: `BenchConfig`. Out: `trials.csv` (how each method was tuned) and `results.csv` (what is reported).

The one idea: a row is keyed by everything that made it, and a row that is there is not made again. So a run that is
killed goes on, a grid that grows costs only what is new, and rows of several runs can be read together.
"""

import csv
import json
import logging
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

import ropo
from ropo.bench.measures import auroc
from ropo.bench.methods import METHODS, Noisy, run_method, trials_of
from ropo.bench.policy import score_policy
from ropo.bench.tasks import TASKS, Task
from ropo.bench.word_reward import fit_on_pairs
from ropo.data.inject import NOISE, flip_labels
from ropo.ledger import read_ledger
from ropo.provenance import read_json

logger = logging.getLogger(__name__)

NUM_SPARE = 100  # right pairs that are neither trained nor tested on
NUM_SEEN_BY_WEAK_ANNOTATOR = 30  # of the spare ones: it then errs on about a third of the toy pairs
NEARLY_BEST = {"accuracy": 0.01, "gold": 0.1}  # scores that close are a tie when a setting is chosen

KEY = ("task", "num_pairs", "kind", "flip_rate", "seed", "method")
SCORES = ("accuracy", "accuracy_error", "gold", "gold_error", "kl", "finished")
MEASURED = (*SCORES, "auroc", "estimate", "low", "high", "kept", "seconds", "cpu_seconds")
PROVENANCE = ("memory_gib", "version", "commit", "torch", "device")
RESULT_COLUMNS = (*KEY, "options", *MEASURED, *PROVENANCE)
TRIAL_KEY = (*KEY, "options")


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchConfig:
    """What to measure; the fields are the keys of the YAML file.

    Attributes:
        task: A name in `TASKS`.
        source: Data of the task, if it needs any.
        num_pairs: Training pairs.
        num_held_out: Pairs for the accuracy.
        num_samples: Responses for gold reward and distance, at most one per held-out pair.
        seeds: Those that are reported.
        noise: Kind of noise -> flip rates.
        methods: Names in `METHODS`; reference lines too.
        num_trials: Settings that are tried for each method.
        tuning_kind: Noise on which methods are tuned.
        tuning_rate: Its rate.
        tuning_seed: A seed that is not reported.
        tuned: Settings that are known already: method -> learning rate, beta, own parameters. It is not tuned then.
        options: Options of `ROPOConfig` that all methods share.
    """

    task: str
    seeds: tuple[int, ...]
    noise: Mapping[str, Sequence[float]]
    methods: tuple[str, ...]
    source: str | None = None
    num_pairs: int = 6000
    num_held_out: int = 2000
    num_samples: int = 1000
    num_trials: int = 9
    tuning_kind: str = "symmetric"
    tuning_rate: float = 0.2
    tuning_seed: int = 100
    tuned: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_known("task", [self.task], TASKS)
        _check_known("methods", self.methods, METHODS)
        _check_known("tuned", self.tuned, METHODS)
        _check_known("noise", [*self.noise, self.tuning_kind], NOISE)
        for kind, rates in self.noise.items():
            for rate in rates:
                if not 0 <= rate < 0.5:
                    raise ValueError(f"noise needs rates in [0, 0.5); got {rate} for {kind}.")
        if self.tuning_seed in self.seeds:
            raise ValueError(
                f"tuning_seed needs a seed that is not reported; got {self.tuning_seed}, which is in seeds. Change one."
            )
        for name, least in (("num_pairs", 10), ("num_held_out", 1), ("num_samples", 2), ("num_trials", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} needs {least} or more; got {getattr(self, name)}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One training and what it is measured on.

    Attributes:
        method: A name in `METHODS`.
        kind: Kind of noise.
        flip_rate: Its rate.
        seed: Of data and training.
        options: Learning rate, beta and the method's own parameters.
    """

    method: str
    kind: str
    flip_rate: float
    seed: int
    options: Mapping[str, Any]


def read_bench_config(path: Path) -> BenchConfig:
    """Read a grid from YAML.

    Raises:
        ValueError: If the file is not there, or a key is unknown, missing or out of range.
    """
    if not path.is_file():
        raise ValueError(f"--config needs a YAML file; {path} is not there.")
    found = yaml.safe_load(path.read_text("utf-8"))
    if not isinstance(found, dict):
        raise ValueError(f"--config needs a YAML file of `key: value` lines; {path} holds a {type(found).__name__}.")
    known = {one.name: one for one in fields(BenchConfig)}
    _check_known(str(path), found, known)
    missing = [name for name in ("task", "seeds", "noise", "methods") if name not in found]
    if missing:
        raise ValueError(f"{path} needs {', '.join(missing)}; got none. See benchmarks/quick.yaml.")
    for name in ("seeds", "methods"):
        found[name] = tuple(found[name])
    return BenchConfig(**found)


def run_bench(
    config: BenchConfig,
    folder: Path,
    *,
    num_processes: int | None = None,
    on_row: Callable[[str, int, int], None] | None = None,
) -> Path:
    """Fill in what is missing of a grid: first the trials, then with each method's best setting the cells.

    Args:
        config: The grid.
        folder: For `trials.csv`, `results.csv` and what tasks make once; used again by the next call.
        num_processes: Trainings at a time; default one per core, or per GPU where there are any. With 1 they run here.
        on_row: Called when a row is there, with what it is, its number and how many there are to do.

    Returns:
        `results.csv`.

    Raises:
        RuntimeError: If a worker was killed, for example for want of memory. What was finished is kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    num_gpus = torch.cuda.device_count()
    num_processes = num_processes or num_gpus or os.cpu_count() or 1
    told = on_row or (lambda *_: None)
    trials, results = folder / "trials.csv", folder / "results.csv"
    # One process makes what all read: two that pre-train a model at the same time would do so twice.
    _make_task(config, folder, config.tuning_seed)
    with _Workers(config, folder, num_processes, num_gpus) as workers:
        workers.fill(trials, missing_trials(config, trials), told)
        workers.fill(results, missing_cells(config, trials, results), told)
    return results


def missing_trials(config: BenchConfig, path: Path) -> list[Cell]:
    """Trials that are not in the file yet."""
    done = {_key(row, TRIAL_KEY) for row in read_rows(path)}
    cells = (
        Cell(
            method=method,
            kind=config.tuning_kind,
            flip_rate=config.tuning_rate,
            seed=config.tuning_seed,
            options=options,
        )
        for method in dict.fromkeys(METHODS[name].like or name for name in config.methods)
        if method not in config.tuned
        for options in trials_of(method, config.num_trials)
    )
    return [cell for cell in cells if _key(_named(config, cell), TRIAL_KEY) not in done]


def missing_cells(config: BenchConfig, trials: Path, results: Path) -> list[Cell]:
    """Cells that are not in the file yet, whole seeds first, so that a run that is stopped early has some.

    Raises:
        ValueError: If the file has a row of another setting than the trials now say.
    """
    done = {_key(row, KEY): row["options"] for row in read_rows(results)}
    tuned = {method: best_setting(config, method, trials) for method in config.methods}
    cells = (
        Cell(method=method, kind=kind, flip_rate=rate, seed=seed, options=tuned[method])
        for seed in config.seeds
        for kind, rate in noise_of(config)
        for method in config.methods
        if not (rate == 0 and method in ("ceiling", "clean", "information_line"))  # there all three are DPO
    )
    missing = []
    for cell in cells:
        named = _named(config, cell)
        there = done.get(_key(named, KEY))
        if there is None:
            missing.append(cell)
        elif there != named["options"]:
            raise ValueError(
                f"{results} has {cell.method} with {there}; the trials now say {named['options']}. Remove its rows, or "
                "use another output_dir."
            )
    return missing


def noise_of(config: BenchConfig) -> Iterator[tuple[str, float]]:
    """Every kind of noise with every rate."""
    for kind, rates in config.noise.items():
        for rate in rates:
            yield kind, float(rate)


def best_setting(config: BenchConfig, method: str, trials: Path) -> dict[str, Any]:
    """The setting of a method: nearly best in accuracy, then nearly best in gold reward, then nearest to the start.

    The last step is what keeps a method from winning by a model that went far on the tuning seed and broke on others.

    Args:
        config: The grid.
        method: A name in `METHODS`.
        trials: The file with the trials.

    Returns:
        Learning rate, beta and own parameters.
    """
    method = METHODS[method].like or method
    if method in config.tuned:
        return dict(config.tuned[method])
    wanted = _named(
        config,
        Cell(
            method=method,
            kind=config.tuning_kind,
            flip_rate=config.tuning_rate,
            seed=config.tuning_seed,
            options={},
        ),
    )
    rows = [row for row in read_rows(trials) if _key(row, KEY) == _key(wanted, KEY) and row["accuracy"]]
    if not rows:
        raise RuntimeError(f"{method} diverged with every setting that was tried; see {trials}. Leave it out.")
    for key, tie in NEARLY_BEST.items():
        best = max(float(row[key]) for row in rows)
        rows = [row for row in rows if float(row[key]) >= best - tie]
    # Where no sample ended there is no distance: such a model has gone farther than any.
    found: dict[str, Any] = json.loads(min(rows, key=lambda row: float(row["kl"] or "inf"))["options"])
    return found


def plant(task: Task, kind: str, rate: float, seed: int, spare: Sequence[Any]) -> tuple[list[Any], np.ndarray]:
    """Flip a share of a task's labels.

    Args:
        task: The task.
        kind: A name in `NOISE`.
        rate: Share to flip.
        seed: Of the flips.
        spare: Right pairs, some of which the weak annotator has learned from.

    Returns:
        The noisy pairs, and which are flipped.
    """
    needs = NOISE[kind].needs
    more: dict[str, Any] = {}
    if needs == "rewards":
        reward = fit_on_pairs(spare[:NUM_SEEN_BY_WEAK_ANNOTATOR]) if kind == "weak_annotator" else task.gold_reward
        more["rewards"] = [[reward(pair.prompt, y) for y in (pair.chosen, pair.rejected)] for pair in task.pairs]
    elif needs == "words":
        more["words"] = task.words
    return flip_labels(task.pairs, rate=rate, seed=1000 * seed + 1, kind=kind, **more)


def measure(config: BenchConfig, cell: Cell, folder: Path) -> dict[str, Any]:
    """Train one method on one noisy data set and score the result.

    Args:
        config: The grid.
        cell: What to measure.
        folder: Of the benchmark; the training's own files are removed afterwards.

    Returns:
        A row.
    """
    task, spare = _make_task(config, folder, cell.seed)
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
    noisy = Noisy(task=task, pairs=pairs, is_flipped=is_flipped, spare=list(spare), seed=cell.seed, common=common)
    name = "_".join([cell.method, cell.kind, f"{cell.flip_rate:g}", str(cell.seed), str(os.getpid())])
    work = folder / "work" / name
    shutil.rmtree(work, ignore_errors=True)
    start = _clocks()
    try:
        trained = run_method(cell.method, noisy, work, cell.options)
        took = _clocks() - start
        scores = {**_scores(config, task, trained, cell.seed), **_found_noise(cell.method, trained, noisy)}
    except FloatingPointError:  # a result, too: this method does not bear this setting
        took, scores = _clocks() - start, {"accuracy": np.nan}
    found = {
        **_named(config, cell),
        **scores,
        "seconds": float(took[0]),
        "cpu_seconds": float(took[1]),
        "memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        / (2**30 if sys.platform == "darwin" else 2**20),
        "version": ropo.__version__,
        "commit": _commit(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"cpu, {torch.get_num_threads()} thread",
    }
    shutil.rmtree(work, ignore_errors=True)
    return found


def _scores(config: BenchConfig, task: Task, trained: Path, seed: int) -> dict[str, float]:
    score = score_policy(
        AutoModelForCausalLM.from_pretrained(trained),
        AutoModelForCausalLM.from_pretrained(task.model),
        AutoTokenizer.from_pretrained(task.model),
        task.held_out,
        task.gold_reward,
        num_samples=min(config.num_samples, len(task.held_out)),
        max_length=task.max_length,
        max_new_tokens=task.max_new_tokens,
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
    summary = read_json(trained / "summary.json")
    ledger = read_ledger(trained / "ledger.parquet").to_pandas()
    rows = ledger[(ledger["origin"] == "data") & (ledger["round"] == 0)].set_index("pair_id")
    rows = rows.loc[[pair.id for pair in noisy.pairs]]
    margins = rows["held_out_margin"].fillna(rows["margin"]).to_numpy()
    found = {"kept": float((rows["decision"] == "keep").mean()), "auroc": auroc(-margins, noisy.is_flipped)}
    if summary.get("is_informative"):
        found |= {key: summary["flip_rate"][key] for key in ("estimate", "low", "high")}
    return found


def read_rows(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file; none if it is not there."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Add a row to a file of results.

    Raises:
        ValueError: If the file has other columns.
    """
    is_new = not path.exists()
    if not is_new:
        with path.open(newline="", encoding="utf-8") as file:
            if tuple(next(csv.reader(file), ())) != RESULT_COLUMNS:
                raise ValueError(f"{path} was written by another version: its columns differ. Use another output_dir.")
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, RESULT_COLUMNS)
        if is_new:
            writer.writeheader()
        writer.writerow({name: _written(row.get(name)) for name in RESULT_COLUMNS})


def _written(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) and np.isfinite(value) else "" if value != value else value


def _named(config: BenchConfig, cell: Cell) -> dict[str, Any]:
    """What names a row."""
    found = asdict(cell)
    options = json.dumps(dict(cell.options), sort_keys=True)
    return {**found, "task": config.task, "num_pairs": config.num_pairs, "options": options}


def _key(row: Mapping[str, Any], names: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"{float(row[name]):g}" if name == "flip_rate" else str(row[name]) for name in names)


def _make_task(config: BenchConfig, folder: Path, seed: int) -> tuple[Task, list[Any]]:
    """The task and its spare pairs."""
    made = TASKS[config.task](
        folder / "tasks",
        num_pairs=config.num_pairs,
        num_held_out=config.num_held_out + NUM_SPARE,
        seed=seed,
        source=None if config.source is None else Path(config.source),
    )
    held_out, spare = made.held_out[: config.num_held_out], made.held_out[config.num_held_out :]
    return Task(**{**{one.name: getattr(made, one.name) for one in fields(made)}, "held_out": held_out}), spare


def _check_known(what: str, names: Any, known: Mapping[str, Any]) -> None:
    for name in names:
        if name not in known:
            close = "".join(f" Did you mean {one}?" for one in get_close_matches(str(name), known, n=1))
            raise ValueError(f"{what} needs known names; got {name!r}.{close} There are: {', '.join(known)}.")


def _clocks() -> np.ndarray:
    """Wall clock and processor time, seconds; on a machine that does other things too, only the second compares."""
    return np.array([time.monotonic(), time.process_time()])


def _peak_gib() -> float:
    """Most memory that this process ever had; a worker measures one cell after the other, so of the largest so far."""
    units_per_gib = 2**30 if sys.platform == "darwin" else 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / units_per_gib


def _commit() -> str:
    """Commit of the code that runs, with a plus if files differ from it; empty outside a checkout."""
    here = Path(ropo.__file__).parent

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True, check=False)
        return done.stdout.strip()

    commit = git("rev-parse", "--short=10", "HEAD")
    return commit + ("+" if commit and git("status", "--porcelain", "--", str(here)) else "")


class _Workers:
    """What measures cells, in this process or in several; only this process writes rows."""

    def __init__(self, config: BenchConfig, folder: Path, number: int, num_gpus: int) -> None:
        self._config, self._folder, self._pool = config, folder, None
        if number > 1:
            context = multiprocessing.get_context("spawn")  # torch does not survive a fork
            places = context.Queue()
            for i in range(number):
                places.put(i)
            threads = max(1, (os.cpu_count() or 1) // number)
            os.environ["OMP_NUM_THREADS"] = str(threads)  # read by the workers when they import numpy
            self._pool = ProcessPoolExecutor(number, context, _start, (places, num_gpus, threads))

    def __enter__(self) -> "_Workers":
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def fill(self, path: Path, cells: list[Cell], told: Callable[[str, int, int], None]) -> None:
        """Measure cells and append a row for each as it is finished.

        Raises:
            RuntimeError: If a worker was killed; or at the end, if some cells failed.
        """
        failed: list[str] = []
        for number, (cell, finished) in enumerate(self._finished(cells), 1):
            try:
                row = finished()
            except BrokenProcessPool:
                raise RuntimeError(
                    "A worker was killed, perhaps for want of memory. What was finished is kept; the same command goes "
                    "on from there, with --num_processes 1 in less memory."
                ) from None
            except (ValueError, OSError, RuntimeError) as error:  # one method's trouble must not cost the others' rows
                failed.append(f"  {describe(cell)}: {error}")
                continue
            append_row(path, row)
            told(describe(cell, row), number, len(cells))
        if failed:
            raise RuntimeError(
                f"{len(failed)} of {len(cells)} cells failed; the others are kept, and the same command tries these "
                "again:\n" + "\n".join(failed)
            )

    def _finished(self, cells: list[Cell]) -> Iterator[tuple[Cell, Callable[[], dict[str, Any]]]]:
        """Cells as they are finished, with what gives their row or raises what stopped them."""
        if self._pool is None:
            yield from ((cell, partial(measure, self._config, cell, self._folder)) for cell in cells)
            return
        waiting = {self._pool.submit(measure, self._config, cell, self._folder): cell for cell in cells}
        for future in as_completed(waiting):
            yield waiting[future], future.result


def describe(cell: Cell, row: Mapping[str, Any] | None = None) -> str:
    """One line about a cell, with its scores if it has any."""
    options = ", ".join(f"{name} {value}" for name, value in cell.options.items())
    what = f"{cell.method} on {cell.kind} {cell.flip_rate:.0%}, seed {cell.seed} ({options})"
    if row is None:
        return what
    if np.isnan(row["accuracy"]):
        return f"{what}: diverged"
    return (
        f"{what}: accuracy {row['accuracy']:.3f}, gold reward {row['gold']:.2f} at {row['kl']:.1f} nats, "
        f"{row['seconds']:.0f} s"
    )


def _start(places: Any, num_gpus: int, threads: int) -> None:
    """Give a worker its cores or its GPU, and keep it quiet."""
    place = places.get()
    if num_gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(place % num_gpus)
    torch.set_num_threads(threads)
    logging.disable(logging.WARNING)
    # Bars of several workers on one terminal cannot be read.
    sys.stdout = sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 - open as long as the process
