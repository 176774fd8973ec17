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


def append_row(path: Path, row: Mapping[str, Any], columns: Sequence[str] = RESULT_COLUMNS) -> None:
    """Add a row to a file of rows, which is made when it is missing.

    Args:
        path: A CSV file.
        row: Values by column; a column that it lacks stays empty, and so does one that is not-a-number.
        columns: Of the file.

    Raises:
        ValueError: If the file has other columns.
    """
    is_new, end = not path.exists(), "\r\n"
    if not is_new:
        with path.open(newline="", encoding="utf-8") as file:
            header = file.readline()
            end = end if header.endswith(end) else "\n"
            if tuple(next(csv.reader([header]), ())) != tuple(columns):
                raise ValueError(f"{path} was written by another version: its columns differ. Use another output_dir.")
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator=end)
        if is_new:
            writer.writeheader()
        writer.writerow({name: _written(row.get(name)) for name in columns})


def _written(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) and np.isfinite(value) else "" if value != value else value


def key_of(row: Mapping[str, Any], names: Sequence[str]) -> tuple[str, ...]:
    """What names a row, comparable whether it was read or just made."""
    return tuple(f"{float(row[name]):g}" if name == "flip_rate" else str(row[name]) for name in names)
