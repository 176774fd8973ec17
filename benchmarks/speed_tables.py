"""The tables of docs/performance.md, from the rows of `speed.py`."""

import math
import statistics
from typing import Any

from speed_tasks import TASKS
from speed_ways import RESULTS, RESULTS_GPU, WAYS

from ropo_bench.rows import read_rows


def table() -> str:
    """One table per task: speeds and memory as mean and range over the turns, and ratios of runs of one turn."""
    rows = [row for path in (RESULTS, RESULTS_GPU) for row in read_rows(path)]
    tasks = [task for task in TASKS if any(row["task"] == task for row in rows)]
    return "\n\n".join(_table(task, [row for row in rows if row["task"] == task]) for task in tasks)


def _table(task: str, rows: list[dict[str, Any]]) -> str:
    by_way = {way.name: {row["turn"]: row for row in rows if row["way"] == way.name} for way in WAYS}

    def ratio(name: str, column: str, other: str) -> str:
        mine, theirs = by_way[name], by_way[other]
        return _spread([float(mine[turn][column]) / float(theirs[turn][column]) for turn in mine if turn in theirs])

    lines = [
        f"| {task} | training, pairs/s | with reference, pairs/s | share of matrix rate | peak, MiB "
        "| with reference, to TRL's defaults | with a cached reference, to TRL's defaults | training, to TRL's best "
        "| memory, to TRL's best |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for way in WAYS:
        if not (found := list(by_way[way.name].values())) or way.is_whole:
            continue
        has_reference = way.measure == "ours" or way.reads_reference
        cells = [
            _spread([float(row["training_per_second"]) for row in found]),
            _spread([float(row["pairs_per_second"]) for row in found]) if has_reference else "",
            _spread([float(row["matrix_share"]) for row in found]),
            f"{statistics.mean(float(row['peak_mib']) for row in found):.0f}",
            ratio(way.name, "pairs_per_second", "TRL, defaults") if has_reference else "",
            ratio(way.name, "training_per_second", "TRL, defaults") if way.measure == "ours" else "",
            ratio(way.name, "training_per_second", "TRL, best") if way.is_training else "",
            ratio(way.name, "peak_mib", "TRL, best") if way.is_training else "",
        ]
        lines.append(f"| {way.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def whole_table() -> str:
    """What a whole run costs, beside one TRL run (at its defaults) of as many epochs: two."""
    rows = [row for row in read_rows(RESULTS) if row["task"] == "hh"]
    trl = {row["turn"]: 2 / float(row["pairs_per_second"]) for row in rows if row["way"] == "whole, TRL"}
    lines = ["| run | ms a pair | to two epochs of TRL's DPOTrainer |", "|---|---|---|"]
    lines.append(f"| TRL, defaults, 2 epochs | {_spread([1000 * value for value in trl.values()])} | 1 |")
    for way in WAYS:
        found = {row["turn"]: 1 / float(row["pairs_per_second"]) for row in rows if row["way"] == way.name}
        if way.is_whole and way.measure != "trl" and found:
            ratios = [value / trl[turn] for turn, value in found.items() if turn in trl]
            lines.append(f"| {way.name} | {_spread([1000 * v for v in found.values()])} | {_spread(ratios)} |")
    return "\n".join(lines)


def pair_table() -> str:
    """Ways of ours beside each other, as ratios of runs of one turn."""
    rows = read_rows(RESULTS)
    rate = {(row["task"], row["way"], row["turn"]): float(row["training_per_second"]) for row in rows}
    tasks = [task for task in TASKS if any(row["task"] == task and row["way"] == "scoring" for row in rows)]
    lines = [f"| pairs a second, ratio | {' | '.join(tasks)} |", "|---|---|---|"]
    for name, other in (("ours, packed, bf16", "ours, packed"), ("scoring", "bare forward")):
        turns = sorted({row["turn"] for row in rows})
        cells = [_spread([rate[task, name, turn] / rate[task, other, turn] for turn in turns]) for task in tasks]
        lines.append(f"| {name}, to {other} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    if not values:
        return ""
    digits = max(0, 1 - math.floor(math.log10(statistics.mean(values))))
    mean, low, high = (f"{value:.{digits}f}" for value in (statistics.mean(values), min(values), max(values)))
    return f"{mean} ({low}-{high})" if len(values) > 1 else mean
