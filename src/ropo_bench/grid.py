"""The benchmark: every method on every kind of noise, tuned alike, row by row into a file that resumes by itself.

In: `BenchConfig`. Out: `trials.csv` (how each method was tuned) and `results.csv` (what is reported).

The one idea: a row is keyed by everything that made it, and a row that is there is not made again. So a run that is
killed resumes, a grid that grows costs only what is new, and rows of several runs can be read together.
"""

import json
import logging
import multiprocessing
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ropo.provenance import RunError, hash_file, hash_value, read_json, write_json
from ropo.run.lock import owning
from ropo_bench.cell import WORK, Cell, make_task, measure, named
from ropo_bench.grid_config import BenchConfig
from ropo_bench.methods import METHODS, trials_of
from ropo_bench.rows import KEY, TRIAL_KEY, append_row, key_of, read_rows

NEARLY_BEST = {"accuracy": 0.01, "gold": 0.1}  # scores that close are a tie when a setting is chosen


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

    Raises:
        ValueError: If the folder holds a grid that was measured otherwise.
        RunError: If a worker was killed, for example for want of memory. What was finished is kept.
    """
    if num_processes is not None and num_processes < 1:
        raise ValueError(f"num_processes needs 1 or more; got {num_processes}.")
    num_gpus = torch.cuda.device_count()
    num_processes = num_processes or num_gpus or os.cpu_count() or 1
    report = on_row or (lambda *_: None)
    trials, results = folder / "trials.csv", folder / "results.csv"
    with owning(folder):
        shared = _shared(folder, config)
        # One process makes what all read: two that pre-train a model at the same time would do so twice.
        make_task(config, folder, config.tuning_seed)
        write_json(folder / "bench.json", shared)  # not before: what could not be made has measured nothing
        try:
            with _Workers(config, folder, num_processes, num_gpus) as workers:
                workers.fill(trials, missing_trials(config, trials), report)
                workers.fill(results, missing_cells(config, trials, results), report)
        finally:
            shutil.rmtree(folder / WORK, ignore_errors=True)  # of cells that were interrupted, in this run or before
    return results


def _shared(folder: Path, config: BenchConfig) -> dict[str, Any]:
    """Rows do not name what is the same for all of them; it stands beside them, and may not change.

    Raises:
        ValueError: If it has changed.
    """
    shared = {
        "num_held_out": config.num_held_out,
        "num_samples": config.num_samples,
        "source": None if config.source is None else Path(config.source).name,
        "options": dict(config.options),
        **config.own,
        **({"contents": contents} if (contents := _contents(config)) else {}),
    }
    path = folder / "bench.json"
    there = read_json(path) if path.exists() else shared
    for name in {**shared, **there}:  # what is no longer given counts, too
        if there.get(name) != shared.get(name):
            raise ValueError(
                f"{folder} holds rows measured with {name} {there.get(name)}; got {shared.get(name)}. Use another "
                "output_dir."
            )
    return shared


def _contents(config: BenchConfig) -> dict[str, str]:
    """Digests of the files and folders that a grid is given: a name says little about what stands in it."""
    given = {"source": config.source, "model": config.model, "judge_model": config.judge.get("judge_model")}
    paths = {name: Path(value) for name, value in given.items() if value and Path(value).exists()}
    return {name: _content(path) for name, path in paths.items()}


def _content(path: Path) -> str:
    if path.is_file():
        return hash_file(path)[:16]
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return hash_value([(file.relative_to(path).as_posix(), hash_file(file)) for file in files])[:16]


def missing_trials(config: BenchConfig, path: Path) -> list[Cell]:
    """Trials that are not in the file yet."""
    done = {key_of(row, TRIAL_KEY) for row in read_rows(path)}
    cells = (
        Cell(
            method=method,
            kind=config.tuning_kind,
            flip_rate=config.tuning_rate,
            seed=config.tuning_seed,
            options=options,
        )
        for method in dict.fromkeys(METHODS[name].like or name for name in config.methods)
        if method not in config.tuned and not METHODS[method].is_shipped
        for options in trials_of(method, config.num_trials, learning_rates=config.learning_rates, betas=config.betas)
    )
    return [cell for cell in cells if key_of(named(config, cell), TRIAL_KEY) not in done]


def missing_cells(config: BenchConfig, trials: Path, results: Path) -> list[Cell]:
    """Cells that are not in the file yet, whole seeds first, so that a run that is stopped early has some.

    Raises:
        ValueError: If the file has a row of another setting than the trials now say.
    """
    rows = read_rows(results)
    done = {key_of(row, TRIAL_KEY) for row in rows}
    options_there = {key_of(row, KEY): row["options"] for row in rows}
    settings = {method: settings_of(config, method, trials) for method in config.methods}
    cells = (
        Cell(method=method, kind=kind, flip_rate=rate, seed=seed, options=options)
        for seed in config.seeds
        for kind, rate in noise_of(config)
        for method in config.methods
        for options in settings[method]
        if rate or not METHODS[method].is_reference  # without flips all reference lines are DPO
    )
    missing = []
    for cell in cells:
        name = named(config, cell)
        if key_of(name, TRIAL_KEY) in done:
            continue
        there = options_there.get(key_of(name, KEY))
        if there is not None and not METHODS[cell.method].is_shipped:
            raise ValueError(
                f"{results} has {cell.method} with {there}; the trials now say {name['options']}. Remove its rows, or "
                "use another output_dir."
            )
        missing.append(cell)
    return missing


def noise_of(config: BenchConfig) -> Iterator[tuple[str, float]]:
    """Every kind of noise with every rate."""
    for kind, rates in config.noise.items():
        for rate in rates:
            yield kind, float(rate)


def settings_of(config: BenchConfig, method: str, trials: Path) -> list[dict[str, Any]]:
    """What a method is measured with: its best setting, or as shipped every learning rate and nothing else.

    Raises:
        RunError: If every trial diverged.
    """
    if METHODS[method].is_shipped:
        return [{"learning_rate": rate} for rate in config.learning_rates]
    return [best_setting(config, method, trials)]


def best_setting(config: BenchConfig, method: str, trials: Path) -> dict[str, Any]:
    """The setting of a method: nearly best in accuracy, then nearly best in gold reward, then nearest to the start.

    The last step is what keeps a method from winning by a model that went far on the tuning seed and broke on others.

    Raises:
        RunError: If every trial diverged.
    """
    method = METHODS[method].like or method
    if method in config.tuned:
        return dict(config.tuned[method])
    wanted = named(
        config,
        Cell(
            method=method,
            kind=config.tuning_kind,
            flip_rate=config.tuning_rate,
            seed=config.tuning_seed,
            options={},
        ),
    )
    rows = [row for row in read_rows(trials) if key_of(row, KEY) == key_of(wanted, KEY) and row["accuracy"]]
    if not rows:
        raise RunError(f"{method} diverged with every setting that was tried; see {trials}. Leave it out.")
    for key, tie in NEARLY_BEST.items():
        values = [float(row[key] or "-inf") for row in rows]  # gold is unknown where a judge knew none
        rows = [row for row, value in zip(rows, values, strict=True) if value >= max(values) - tie]
    # Where no sample ended there is no distance: such a model has gone farther than any.
    found: dict[str, Any] = json.loads(min(rows, key=lambda row: float(row["kl"] or "inf"))["options"])
    return found


class _Workers:
    """What measures cells, in this process or in several; only this process writes rows."""

    def __init__(self, config: BenchConfig, folder: Path, number: int, num_gpus: int) -> None:
        self._config, self._folder, self._pool = config, folder, None
        self._of_others = set(multiprocessing.active_children())
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

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and not issubclass(kind, Exception):  # interrupted: a cell may take hours
            for worker in {*multiprocessing.active_children()} - self._of_others:
                worker.terminate()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def fill(self, path: Path, cells: list[Cell], report: Callable[[str, int, int], None]) -> None:
        """Measure cells and append a row for each as it is finished.

        Raises:
            RunError: If a worker was killed; or at the end, if some cells failed.
        """
        failed: list[str] = []
        for number, (cell, finished) in enumerate(self._finished(cells), 1):
            try:
                row = finished()
            except BrokenProcessPool:
                raise RunError(
                    "A worker was killed, perhaps for want of memory. What was finished is kept; the same command goes "
                    "on from there, with --num_processes 1 in less memory."
                ) from None
            except (ValueError, OSError, RuntimeError) as error:  # one method's trouble must not cost the others' rows
                failed.append(f"  {describe(cell)}: {error}")
                continue
            append_row(path, row)
            report(describe(cell, row), number, len(cells))
        if failed:
            raise RunError(
                f"{len(failed)} of {len(cells)} cells failed; the others are kept, and the same command tries these "
                "again:\n" + "\n".join(failed)
            )

    def _finished(self, cells: list[Cell]) -> Iterator[tuple[Cell, Callable[[], dict[str, Any]]]]:
        """Cells as they are finished, with what gives their row or raises what stopped them."""
        if self._pool is None:
            yield from ((cell, partial(_quietly, self._config, cell, self._folder)) for cell in cells)
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


def _quietly(config: BenchConfig, cell: Cell, folder: Path) -> dict[str, Any]:
    """Measure in this process; what trainers print and log would drown the lines that say how far the grid is."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            return measure(config, cell, folder)
    finally:
        logging.disable(before)


def _start(places: Any, num_gpus: int, threads: int) -> None:
    """Give a worker its cores or its GPU, and keep it quiet."""
    place = places.get()
    if num_gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(place % num_gpus)
    torch.set_num_threads(threads)
    logging.disable(logging.WARNING)
    # Bars of several workers on one terminal cannot be read.
    sys.stdout = sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 - open as long as the process
