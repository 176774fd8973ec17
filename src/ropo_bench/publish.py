"""The last step of a benchmark: rows to `results.md` and pictures beside it.

In: `results.csv`. Out: files that can be made again at any time, of an unfinished grid too.
"""

from collections.abc import Sequence
from pathlib import Path

from ropo.provenance import write_aside
from ropo_bench.figures import cost_and_quality, gold_over_distance, score_over_rate
from ropo_bench.methods import METHODS
from ropo_bench.results import (
    FLOOR,
    CellOfGrid,
    Row,
    cell_tables,
    cells_of,
    detection_table,
    difference_table,
    methods_of,
    settings_table,
    shipped_table,
    summary_table,
)
from ropo_bench.rows import read_rows

# A picture with more lines cannot be read: the lines to compare with, and of each family one.
DRAWN = ("ceiling", "information_line", "ropo", "dpo", "ropo_loss", "ropo_paper", "rdpo", "holder", "plc_dpo")


def publish_bench(folder: Path) -> list[Path]:
    """Write the tables and the pictures of a grid.

    Returns:
        The files, `results.md` first.
    """
    rows = read_rows(folder / "results.csv")
    made = [folder / "results.md"]
    parts = ["# Results", "", _conditions(rows)]
    for task, num_pairs in dict.fromkeys((row["task"], row["num_pairs"]) for row in rows):
        group = [row for row in rows if (row["task"], row["num_pairs"]) == (task, num_pairs)]
        name = f"{task}_{num_pairs}"
        parts += ["", f"## {task}, {int(num_pairs):,} pairs", "", summary_table(group), "", _LEGEND, ""]
        for key, (what, picture) in draw(group).items():
            made.append(folder / f"{name}_{key}.svg")
            with write_aside(made[-1]) as path:
                path.write_text(picture, encoding="utf-8")
            parts += [f"![{what}]({made[-1].name})", ""]
        if shipped := shipped_table(group):
            parts += ["### As shipped", "", shipped, ""]
        parts += ["### Flips ranked", "", detection_table(group), "", cell_tables(group), ""]
        parts += ["### Differences within seeds", "", difference_table(group), ""]
        parts += ["### Settings", "", settings_table(group)]
    with write_aside(made[0]) as path:
        path.write_text("\n".join(parts) + "\n", encoding="utf-8")
    return made


def draw(rows: Sequence[Row]) -> dict[str, tuple[str, str]]:
    """The pictures that the rows of one task suffice for: name -> what it shows, SVG."""
    lines, names = methods_of(rows)
    cells = cells_of(rows)
    # A line that lacks cells or seeds would be compared with lines of other data.
    whole = [name for name in {*lines, *names} if all(_is_whole(cell, name) for cell in cells)]
    drawn = [name for name in DRAWN if name in whole]
    found: dict[str, tuple[str, str]] = {}
    if len({cell.flip_rate for cell in cells if cell.kind == "symmetric"}) > 1 and drawn:
        for key, what in (
            ("accuracy", "accuracy on held-out pairs with right labels"),
            ("gold", "gold reward of samples"),
        ):
            found[key] = (f"{what} over flip rate", score_over_rate(rows, key, methods=drawn, y_label=what))
        judging = [name for name in drawn if any(row["auroc"] for row in rows if row["method"] == name)]
        if judging:
            picture = score_over_rate(
                [row for row in rows if float(row["flip_rate"])],
                "auroc",
                methods=judging,
                y_label="flips ranked by margin, AUROC",
            )
            found["detection"] = ("AUROC over flip rate", picture)
    if drawn:
        found["distance"] = ("Gold reward over distance", gold_over_distance(rows, methods=drawn))
    if any(cell.has_gap("accuracy") for cell in cells):
        found["cost"] = ("Gap closed over cost", cost_and_quality(rows))
    return found


def _is_whole(cell: CellOfGrid, name: str) -> bool:
    return len(cell.by_method.get(name, {})) == len(cell.by_method.get(FLOOR, {}))


def _conditions(rows: Sequence[Row]) -> str:
    def of(key: str) -> str:
        return ", ".join(sorted({row[key] for row in rows}))

    return (
        f"{len(rows)} rows, seeds {of('seed')}, code {of('version')} ({of('commit')}), torch {of('torch')}, on "
        f"{of('device')}. Means over seeds with Student's 90 % interval. Made by `ropo bench`."
    )


_LEGEND = (
    "*Needs oracle*: a truth that a method is given and a user does not have. *Gap closed*: "
    "(score − dpo)/(ceiling − dpo), mean over the noisy "
    "cells in which the ceiling is above dpo by more than the interval. *Behind the best in*: cells in which the best "
    "mean accuracy of all competitors is better by more than the interval of the difference. In tables of single cells "
    "bold accuracies cannot be distinguished from the best; *lines in italics* are no competitors: "
    + ", ".join(f"*{name}* is {method.meaning}" for name, method in METHODS.items() if method.is_reference)
    + "."
)
