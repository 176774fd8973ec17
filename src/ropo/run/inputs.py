"""What a run is given beside its model and its options.

In: what the user wrote. Out: `DataSource` and `ReviewInputs`, which say what is read and how.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class DataSource:
    """Pairs to read; a bare path, list or `datasets.Dataset` stands for one with the defaults.

    Attributes:
        data: Anything that `ropo.data.load.load_pairs` reads.
        split: Which part of it, where it has several.
        columns: Names of its columns where they differ from `prompt`, `chosen`, `rejected`; None: those of the dataset
            to train on.

    Examples:
        >>> DataSource.of("pairs.jsonl", columns={"chosen": "better"})
        DataSource(data='pairs.jsonl', split='train', columns={'chosen': 'better'})
    """

    data: Any
    split: str = field(default="train", kw_only=True)
    columns: Mapping[str, str] | None = field(default=None, kw_only=True)

    @classmethod
    def of(cls, given: Any, *, columns: Mapping[str, str] | None = None) -> "DataSource":
        """What was given, as a source.

        Args:
            given: A `DataSource`, or what `load_pairs` reads.
            columns: Of a source that names none.
        """
        found = given if isinstance(given, cls) else cls(given)
        return found if found.columns is not None else replace(found, columns=columns)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReviewInputs:
    """What people have said about labels.

    Attributes:
        trusted: Pairs whose labels are known to be right, like a dataset; 50 to 200 help. For those that the dataset
            holds, too, they are review decisions about the labels there.
        decisions: A `review.csv` with review decisions, which are obeyed.
    """

    trusted: Any = None
    decisions: str | Path | None = None
