"""Several datasets as one, by shares, and a sample of it.

In: anything that `ropo.data.load.load_pairs` reads, or a `Mixture` of such; how many pairs at most. Out: one `Loaded`,
whose pairs and problems say which dataset they come from, and a log line with the number drawn from each.

The one idea: a pair's row counts on through all datasets in the order given, whatever is drawn, so it stays the same
with another sample. No pair is drawn twice.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import isclose
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ropo.data.load import Loaded, load_pairs
from ropo.data.problems import short
from ropo.data.read import HubDataset
from ropo.provenance import hash_value

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """Several datasets.

    Attributes:
        parts: Each anything that `load_pairs` reads.
        shares: Of the pairs that are drawn, the share that comes from each part, together 1; None takes all pairs.

    Raises:
        ValueError: If there is no part, or the shares are not one positive number for each part that add up to 1.
    """

    parts: tuple[Any, ...]
    shares: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError("A mixture needs at least one dataset; got none.")
        if self.shares is None:
            return
        is_valid = len(self.shares) == len(self.parts) and all(0 < share <= 1 for share in self.shares)
        if not is_valid or not isclose(sum(self.shares), 1, abs_tol=0.005):
            got = ", ".join(f"{share:g}" for share in self.shares)
            raise ValueError(
                f"A mixture of {len(self.parts)} datasets needs a share above 0 for each, together 1; got {got}. "
                "Without shares all pairs are taken."
            )


def named_mixture(text: str) -> str | Mixture:
    """What a user's words name: one dataset, or several with commas between them, each with a share or none has.

    Args:
        text: Such as "a.jsonl", "a.jsonl,b.jsonl" or "a.jsonl:0.7,owner/b:0.3". A path that exists is that path.

    Raises:
        ValueError: If only some have a share, or the shares do not add up to 1.

    Examples:
        >>> named_mixture("a.jsonl:0.7,owner/b:0.3")
        Mixture(parts=('a.jsonl', 'owner/b'), shares=(0.7, 0.3))
        >>> named_mixture("a.jsonl")
        'a.jsonl'
    """
    names = [name.strip() for name in text.split(",")]
    if len(names) == 1 or Path(text).expanduser().exists():
        return text
    divided = [_share_of(name) for name in names]
    if not all(name for name, _ in divided):
        raise ValueError(f"Datasets need a comma between two names; got {short(text)}.")
    shares = [share for _, share in divided if share is not None]
    if shares and len(shares) < len(names):
        raise ValueError(f"Each dataset of a mixture needs a share (name:0.3), or none; got {short(text)}.")
    return Mixture(parts=tuple(name for name, _ in divided), shares=tuple(shares) or None)


def _share_of(text: str) -> tuple[str, float | None]:
    name, colon, share = text.rpartition(":")
    try:
        return (name, float(share)) if colon else (text, None)
    except ValueError:  # a colon in a name
        return text, None


def names_on_hub(source: Any) -> list[str]:
    """The names of the datasets that are read from the hub.

    Args:
        source: As for `load_mixture`.
    """
    parts = source.parts if isinstance(source, Mixture) else (source,)
    names = [part.name if isinstance(part, HubDataset) else part for part in parts]
    return [name for name in names if isinstance(name, str) and not Path(name).expanduser().exists()]


def load_mixture(
    source: Any,
    *,
    split: str = "train",
    columns: Mapping[str, str] | None = None,
    max_samples: int | None = None,
    seed: int = 0,
) -> Loaded:
    """Read one dataset or several, and draw a sample of their pairs.

    Shares are kept by drawing fewer pairs: as many as the dataset allows that is the first to run out.

    Args:
        source: A `Mixture`, or one dataset.
        split: Of each.
        columns: Of each; see `load_pairs`.
        max_samples: Most pairs to draw, of all datasets together; None for as many as there are.
        seed: Of the draw.

    Returns:
        The pairs that were drawn, in the order of the data, and all problems. `num_rows` counts the rows that are bad
        or were drawn.

    Raises:
        ValueError: As `load_pairs`; or if a dataset with a share has no pair.
    """
    mixture = source if isinstance(source, Mixture) else None
    parts = (source,) if mixture is None else mixture.parts
    loaded = [load_pairs(part, split=split, columns=columns) for part in parts]
    if len(parts) > 1:
        starts = np.cumsum([0, *(one.num_rows for one in loaded)]).tolist()
        names = [_name_of(part, number) for number, part in enumerate(parts)]
        loaded = [_placed(*of_part) for of_part in zip(loaded, names, starts, strict=False)]
    drawn = _draw(
        [len(one.pairs) for one in loaded],
        None if mixture is None else mixture.shares,
        max_samples=max_samples,
        rng=np.random.default_rng(seed),
    )
    if drawn is None and len(parts) == 1:
        return loaded[0]
    if drawn is None:
        drawn = [np.arange(len(one.pairs)) for one in loaded]
    counts = ", ".join(
        f"{_name_of(part, number)} {len(places)} of {len(one.pairs)}"
        for number, (part, places, one) in enumerate(zip(parts, drawn, loaded, strict=True))
    )
    logger.info("Pairs drawn: %s.", counts)
    return _joined(loaded, drawn)


def _name_of(part: Any, number: int) -> str:
    if isinstance(part, HubDataset):
        return part.name
    return str(part) if isinstance(part, str | Path) else f"dataset {number + 1}"


def _placed(loaded: Loaded, name: str, start: int) -> Loaded:
    """The same as one of several datasets: rows count on from `start`."""
    pairs = [replace(pair, row=start + pair.row, source=f"{name}:{pair.row}") for pair in loaded.pairs]
    problems = [
        replace(one, source=name) if one.row is None else replace(one, row=start + one.row, source=f"{name}:{one.row}")
        for one in loaded.problems
    ]
    return replace(loaded, pairs=pairs, problems=problems)


def _draw(
    sizes: Sequence[int], shares: Sequence[float] | None, *, max_samples: int | None, rng: np.random.Generator
) -> list[NDArray[np.int64]] | None:
    """Places of the pairs that are drawn of each dataset, in order; None if all are."""
    total = sum(sizes) if max_samples is None else min(sum(sizes), max_samples)
    if shares is None:
        if total == sum(sizes):
            return None
        taken, ends = np.sort(rng.choice(sum(sizes), total, replace=False)), np.cumsum([0, *sizes])
        return [taken[(taken >= low) & (taken < high)] - low for low, high in pairwise(ends)]
    if not all(sizes):
        raise ValueError(f"A mixture needs pairs in each dataset that has a share; got {', '.join(map(str, sizes))}.")
    share = np.array(shares) / sum(shares)
    total = min(total, int((np.array(sizes) / share + 1e-9).min()))
    counts = np.floor(share * total + 1e-9).astype(int)
    rest = np.argsort(counts - share * total, kind="stable")[: total - counts.sum()]  # largest remainders
    counts[rest] += 1
    return [np.sort(rng.choice(size, count, replace=False)) for size, count in zip(sizes, counts, strict=True)]


def _joined(loaded: Sequence[Loaded], drawn: Sequence[NDArray[np.int64]]) -> Loaded:
    pairs = [one.pairs[place] for one, places in zip(loaded, drawn, strict=True) for place in places]
    return Loaded(
        pairs=pairs,
        problems=[problem for one in loaded for problem in one.problems],
        num_rows=sum(one.num_rows - len(one.pairs) for one in loaded) + len(pairs),
        format=" and ".join(dict.fromkeys(one.format for one in loaded if one.format)),
        layout=" and ".join(dict.fromkeys(one.layout for one in loaded)),
        sha256=hash_value([[one.sha256, places.tolist()] for one, places in zip(loaded, drawn, strict=True)]),
        ignored_columns=tuple(sorted({column for one in loaded for column in one.ignored_columns})),
    )
