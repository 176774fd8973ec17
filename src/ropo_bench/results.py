"""Rows of a benchmark to what they say: means with intervals, differences inside the noise, gaps closed.

In: rows as `grid` writes them. Out: plain values for figures, and tables in Markdown.

The one idea: everything is compared within a seed, where data, noise and start are the same for all methods, and only
then averaged; what the seeds do not agree on is called a tie.
"""

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t

from ropo_bench.methods import METHODS, Method

Row = Mapping[str, str]

FLOOR, CEILING = "dpo", "ceiling"
SHIPPED = ("ropo_shipped", "dpo_shipped")


def name_of(row: Row) -> str:
    """What a row is called in tables: its method, and as shipped the learning rate that it was given.

    Examples:
        >>> name_of({"method": "dpo_shipped", "options": '{"learning_rate": 0.0004}'})
        'dpo_shipped 0.0004'
    """
    method = row["method"]
    return f"{method} {json.loads(row['options'])['learning_rate']:g}" if METHODS[method].is_shipped else method


def method_of(name: str) -> Method:
    """The method of a name in tables."""
    return METHODS[name.split(" ")[0]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A mean over seeds and half the width of its 90 % interval; NaN where one seed says nothing about it."""

    mean: float
    half: float
    count: int

    def write(self, digits: int, *, signed: bool = False) -> str:
        """As text.

        Examples:
            >>> Interval(mean=0.5, half=0.012, count=3).write(3)
            '0.500 ±0.012'
        """
        sign = "+" if signed else ""
        half = f" ±{self.half:.{digits}f}" if np.isfinite(self.half) else ""
        return f"{self.mean:{sign}.{digits}f}{half}" if self.count else "-"


def interval_of(values: Iterable[float]) -> Interval:
    """Mean of seeds with Student's 90 % interval.

    Examples:
        >>> found = interval_of([1.0, 2.0, 3.0])
        >>> found.mean, round(found.half, 3)
        (2.0, 1.686)
    """
    array = np.array([value for value in values if np.isfinite(value)])
    if len(array) == 0:
        return Interval(mean=np.nan, half=np.nan, count=0)
    half = float(t.ppf(0.95, len(array) - 1) * array.std(ddof=1) / np.sqrt(len(array))) if len(array) > 1 else np.nan
    return Interval(mean=float(array.mean()), half=half, count=len(array))


class CellOfGrid:
    """All rows of one kind of noise at one rate."""

    def __init__(self, kind: str, flip_rate: float, rows: Sequence[Row]) -> None:
        self.kind, self.flip_rate = kind, flip_rate
        self.by_method: dict[str, dict[str, Row]] = {}
        for row in rows:
            self.by_method.setdefault(name_of(row), {})[row["seed"]] = row
        if flip_rate == 0 and FLOOR in self.by_method:
            for name, method in METHODS.items():  # there all reference lines are DPO, so they are not run
                if method.is_reference:
                    self.by_method.setdefault(name, self.by_method[FLOOR])

    @property
    def title(self) -> str:
        """Name of the cell in tables."""
        return f"{self.kind} {self.flip_rate:.0%}"

    def scores(self, method: str, key: str) -> dict[str, float]:
        """One score of a method by seed; diverged runs count as not-a-number."""
        return {seed: float(row.get(key) or "nan") for seed, row in self.by_method.get(method, {}).items()}

    def has_diverged(self, method: str, key: str) -> bool:
        """Whether a seed has no such score."""
        return bool(np.isnan(list(self.scores(method, key).values())).any())

    def mean(self, method: str, key: str) -> Interval:
        """A score of a method over seeds."""
        return interval_of(self.scores(method, key).values())

    def difference(self, method: str, other: str, key: str) -> Interval:
        """A method's score minus another's, paired by seed."""
        one, two = self.scores(method, key), self.scores(other, key)
        return interval_of(one[seed] - two[seed] for seed in one if seed in two)

    def has_gap(self, key: str) -> bool:
        """Whether the ceiling is above the floor by more than the interval of their difference."""
        gap = self.difference(CEILING, FLOOR, key)
        return bool(self.flip_rate and gap.mean > gap.half)

    def gap_closed(self, method: str, key: str) -> dict[str, float]:
        """(score − floor)/(ceiling − floor), by seed, with the mean gap of all seeds below the line."""
        one, floor = self.scores(method, key), self.scores(FLOOR, key)
        gap = self.difference(CEILING, FLOOR, key).mean
        return {seed: (one[seed] - floor[seed]) / gap for seed in one if seed in floor}

    def best(self, methods: Sequence[str], key: str) -> str | None:
        """The method with the highest mean; one that diverged with a seed is none of them."""
        whole = [name for name in methods if self.scores(name, key) and not self.has_diverged(name, key)]
        means = {name: self.mean(name, key).mean for name in whole}
        return max(means, key=means.__getitem__) if means else None

    def is_tie(self, method: str, other: str, key: str) -> bool:
        """Whether the interval of the difference holds 0, or there is one seed only; not where a seed diverged."""
        if method == other or self.has_diverged(method, key):
            return method == other
        gap = self.difference(method, other, key)
        return not abs(gap.mean) > gap.half


def cells_of(rows: Sequence[Row]) -> list[CellOfGrid]:
    """The cells of one task and size, symmetric noise first."""
    groups: dict[tuple[str, float], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["kind"], float(row["flip_rate"])), []).append(row)
    order = sorted(groups, key=lambda key: (key[0] != "symmetric", key))
    return [CellOfGrid(*key, groups[key]) for key in order]


def methods_of(rows: Sequence[Row]) -> tuple[list[str], list[str]]:
    """Reference lines and competitors that have rows, in the order of `METHODS`; what is not tuned does not compete."""
    there = {row["method"] for row in rows}
    names = [name for name, method in METHODS.items() if name in there and not method.is_shipped]
    lines = [name for name in names if METHODS[name].is_reference]
    return lines, [name for name in names if name not in lines]


def shipped_of(rows: Sequence[Row]) -> list[str]:
    """Names of the rows as shipped: each method with each learning rate."""
    there = [row for row in rows if METHODS[row["method"]].is_shipped]
    there.sort(key=lambda row: (row["method"], _learning_rate(row)))
    return list(dict.fromkeys(map(name_of, there)))


def _learning_rate(row: Row) -> float:
    return float(json.loads(row["options"])["learning_rate"])


def mean_gap_closed(cells: Sequence[CellOfGrid], method: str, key: str) -> Interval:
    """Mean over the noisy cells that have a gap, seed by seed."""
    found = [cell.gap_closed(method, key) for cell in cells if cell.has_gap(key)]
    seeds = set.intersection(*(set(one) for one in found)) if found else set()
    return interval_of(float(np.mean([one[seed] for one in found])) for seed in sorted(seeds))


def summary_table(rows: Sequence[Row]) -> str:
    """One line per competitor: gap closed over all noisy cells, harm on clean data, worst cell, cost."""
    cells, (_, names), shipped = cells_of(rows), methods_of(rows), shipped_of(rows)
    noisy, clean = [cell for cell in cells if cell.flip_rate], [cell for cell in cells if not cell.flip_rate]
    lines = [
        "| method | needs oracle | gap closed, accuracy | gap closed, gold | at 0 % against dpo: accuracy | gold "
        "| behind the best in | cost / dpo |",
        "|---|---|---|---|---|---|---|---|",
    ]
    order = sorted(
        [*names, *shipped], key=lambda name: -np.nan_to_num(mean_gap_closed(noisy, name, "accuracy").mean, nan=-9.0)
    )
    for name in order:
        # One seed tells nothing apart, so it cannot be behind either.
        can_tell = all(cell.mean(name, "accuracy").count > 1 for cell in cells)
        behind = f"{sum(_is_behind(cell, name, names) for cell in cells)} of {len(cells)}" if can_tell else "-"
        harm = [clean[0].difference(name, FLOOR, key).write(n, signed=True) if clean else "" for key, n in _DIGITS]
        lines.append(
            f"| {name} | {method_of(name).oracle} | {mean_gap_closed(noisy, name, 'accuracy').write(2)} "
            f"| {mean_gap_closed(noisy, name, 'gold').write(2)} | {harm[0]} | {harm[1]} "
            f"| {behind} | {relative_cost(cells, name):.1f} |"
        )
    return "\n".join(lines)


_DIGITS = (("accuracy", 3), ("gold", 2))


def _is_behind(cell: CellOfGrid, name: str, names: Sequence[str]) -> bool:
    best = cell.best(names, "accuracy")
    return best is not None and name in cell.by_method and not cell.is_tie(name, best, "accuracy")


def relative_cost(cells: Sequence[CellOfGrid], name: str) -> float:
    """Processor time of a run over that of DPO in the same cell, median; wall clock where a GPU did the work.

    Where there are, those measured by the same commit are compared: machines are not equally fast on all days.
    """
    is_on_cpu = all(row["device"].startswith("cpu") for cell in cells for row in cell.by_method.get(name, {}).values())
    key = "cpu_seconds" if is_on_cpu else "seconds"
    both = [
        (row, cell.by_method[dpo][seed])
        for cell in cells
        for seed, row in cell.by_method.get(name, {}).items()
        for dpo in cell.by_method
        if dpo.split(" ")[0] in (FLOOR, SHIPPED[1]) and seed in cell.by_method[dpo]
    ]
    of_one_day = [(row, dpo) for row, dpo in both if row["commit"] == dpo["commit"]]
    chosen = of_one_day or [(row, dpo) for row, dpo in both if dpo["method"] == FLOOR]
    ratios = [float(row[key]) / float(dpo[key]) for row, dpo in chosen if row[key] and dpo[key]]
    return float(np.median(ratios)) if ratios else np.nan


def cell_tables(rows: Sequence[Row]) -> str:
    """One table per cell: every method with both scores, distance, gap closed, and ties with the best."""
    lines_of_reference, names = methods_of(rows)
    parts = []
    for cell in cells_of(rows):
        best = cell.best(names, "accuracy")
        lines = [
            f"### {cell.title}",
            "",
            "| method | seeds | accuracy | gold reward | distance, nats | finished | gap closed, accuracy | gold |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for name in [*lines_of_reference, *names, *shipped_of(rows)]:
            if name not in cell.by_method or (method_of(name).is_reference and not cell.flip_rate):
                continue
            accuracy = cell.mean(name, "accuracy")
            is_best = best is not None and name in names and cell.is_tie(name, best, "accuracy")
            shown = f"**{accuracy.write(3)}**" if is_best else accuracy.write(3)
            gaps = [
                interval_of(cell.gap_closed(name, key).values()).write(2)
                if cell.has_gap(key) and name not in (FLOOR, CEILING)
                else ""
                for key, _ in _DIGITS
            ]
            title = f"*{name}*" if name in lines_of_reference else name
            lines.append(
                f"| {title} | {accuracy.count} | {shown} | {cell.mean(name, 'gold').write(2)} "
                f"| {cell.mean(name, 'kl').mean:.1f} | {_share(cell.mean(name, 'finished'))} | {gaps[0]} | {gaps[1]} |"
            )
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def difference_table(rows: Sequence[Row], method: str = "ropo") -> str:
    """A method against every other one and the lines, cell by cell, paired by seed."""
    lines, names = methods_of(rows)
    written = [f"| {method} minus | cell | accuracy | gold reward |", "|---|---|---|---|"]
    for other in [*lines, *names]:
        for cell in cells_of(rows):
            both = [(cell.difference(method, other, key), digits) for key, digits in _DIGITS]
            if other != method and both[0][0].count > 1:
                shown = " | ".join(one.write(digits, signed=True) for one, digits in both)
                written.append(f"| {other} | {cell.title} | {shown} |")
    return "\n".join(written)


def shipped_table(rows: Sequence[Row]) -> str:
    """ROPO beside DPO as shipped, at every learning rate of every cell, and how far DPO goes with right labels."""
    lines = [
        "| cell | learning rate | accuracy, dpo | ropo − dpo | gold reward, dpo | ropo − dpo | KL, dpo | ropo "
        "| dpo, right labels |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    ropo, dpo = SHIPPED
    right = next((cell for cell in cells_of(rows) if not cell.flip_rate), CellOfGrid("none", 0.0, []))
    rates = sorted({_learning_rate(row) for row in rows if row["method"] in SHIPPED})
    for cell, rate in itertools.product(cells_of(rows), rates):
        one, floor = f"{ropo} {rate:g}", f"{dpo} {rate:g}"
        scores = [
            f"{cell.mean(floor, key).write(n)} | {cell.difference(one, floor, key).write(n, signed=True)}"
            for key, n in _DIGITS
        ]
        kl = " | ".join(of.mean(name, "kl").write(1) for of, name in ((cell, floor), (cell, one), (right, floor)))
        lines.append(f"| {cell.title} | {rate:g} | {' | '.join(scores)} | {kl} |")
    return "\n".join(lines) if rates else ""


def _share(one: Interval) -> str:
    return f"{one.mean:.0%}" if one.count else ""


def settings_table(rows: Sequence[Row]) -> str:
    """The setting that each method was run with."""
    found = {row["method"]: row["options"] for row in rows if not METHODS[row["method"]].is_shipped}
    lines = ["| method | setting |", "|---|---|"]
    return "\n".join([*lines, *(f"| {name} | `{found[name]}` |" for name in METHODS if name in found)])


def detection_table(rows: Sequence[Row]) -> str:
    """How well margins rank the flips, and the estimated rate where there is one."""
    _, names = methods_of(rows)
    cells = [cell for cell in cells_of(rows) if cell.flip_rate]
    lines = [f"| AUROC | {' | '.join(cell.title for cell in cells)} |", "|---" * (len(cells) + 1) + "|"]
    for name in names:
        shown = [cell.mean(name, "auroc") for cell in cells]
        if any(one.count for one in shown):
            lines.append(f"| {name} | {' | '.join(one.write(3) for one in shown)} |")
    estimates = [cell.mean("ropo", "estimate") for cell in cells]
    lines.append(f"| *flip rate estimated by ropo* | {' | '.join(one.write(3) for one in estimates)} |")
    return "\n".join(lines)
