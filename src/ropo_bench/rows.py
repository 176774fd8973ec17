"""The file that a benchmark fills: one row per training, named by everything that made it.

In: rows as dicts. Out: a CSV file; its rows as dicts of text.
"""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

KEY = ("task", "num_pairs", "kind", "flip_rate", "seed", "method")
TRIAL_KEY = (*KEY, "options")
SCORES = ("accuracy", "accuracy_error", "gold", "gold_error", "kl", "finished")
MEASURED = (*SCORES, "auroc", "estimate", "low", "high", "kept", "seconds", "cpu_seconds")
PROVENANCE = ("memory_gib", "version", "commit", "torch", "device")
RESULT_COLUMNS = (*TRIAL_KEY, *MEASURED, *PROVENANCE)


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


def key_of(row: Mapping[str, Any], names: Sequence[str]) -> tuple[str, ...]:
    """What names a row, comparable whether it was read or just made."""
    return tuple(f"{float(row[name]):g}" if name == "flip_rate" else str(row[name]) for name in names)
