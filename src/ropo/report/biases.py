"""What the labels prefer beside quality: length, lists, questions, and where in the file the doubts lie.

In: the pairs with what was decided about them. Out: plain values, one entry per feature of `BIASES` and one per tenth
of the file.

The one idea: only pairs whose two responses differ in a feature say anything about it, and if the feature did not
matter, chosen would have more of it in half of them.

Add a feature: one line in `BIASES`.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ropo.noise.shares import wilson_interval
from ropo.pairs import Pair
from ropo.provenance import Json
from ropo.report.statistics import Floats, mean, number
from ropo.report.texts import plain

Table = Json
Measure = Callable[[str], float]
Bools = NDArray[np.bool_]

MIN_DIFFERING = 20  # pairs; a share of fewer says too little to be pointed at
MOST_PAIRS = 10_000  # measured, evenly spaced over the file: more would not change a share that anybody can see
MOST_CHARACTERS = 5_000  # of a response that are searched; its length is always that of all
NUM_PARTS, MIN_PART = 10, 20
LEAST_DIFFERENCE = 0.01  # less is nothing to act on, however sure
PART_Z = 3.5  # standard errors above the others; by chance one file in 400 has a part so high


def _count(pattern: str) -> Measure:
    found = re.compile(pattern)
    # The line end in front lets a pattern of lines begin with one, which is found many times faster than `^`.
    return lambda text: len(found.findall("\n" + text[:MOST_CHARACTERS]))


_REFUSAL = re.compile(
    r"\s*(?:(?:i['’]m|i am) (?:very |so )?(?:sorry|afraid|unable)|sorry\b|"
    r"(?:unfortunately, )?i (?:can(?:not|['’]t)|won['’]t)|as an ai\b)",
    re.IGNORECASE,
)

LENGTH = "length in characters"

BIASES: Mapping[str, Measure] = MappingProxyType(
    {
        LENGTH: len,
        "paragraphs": _count(r"\n[ \t]*\n"),
        "list items": _count(r"\n[ \t]*(?:[-*•+]|\d{1,3}[.)])[ \t]"),
        "headings": _count(r"\n#{1,6}[ \t]"),
        "bold text": _count(r"\*\*\S|__\S"),
        "code blocks": _count(r"\n[ \t]*```"),
        "links": _count(r"https?://"),
        "digits": _count(r"\d"),
        "question marks": _count(r"[?？]"),
        "exclamation marks": _count(r"[!！]"),
        "a refusal at the beginning": lambda text: float(bool(_REFUSAL.match(text))),
        "the word “I”": _count(r"(?<![\w*])I(?!\w)"),
    }
)
"""Features of a response by name, each a count of what it has. A name completes "chosen has more ..."."""


def response_biases(pairs: Sequence[Pair], *, p_flip: Floats, is_kept: Bools, is_informative: bool) -> Table:
    """How often the chosen response has more of each feature.

    Args:
        pairs: The original pairs, in the order of the file.
        p_flip: P(flipped) of each, shape (pairs,).
        is_kept: Whether each is kept, shape (pairs,).
        is_informative: Whether `p_flip` says anything.

    Returns:
        `num_pairs` that were measured, and `features`: for each its groups "all", "kept" and "not_kept" with share and
        interval, mean P(flipped) where chosen has more and where it has less, and whether it `is_clear`.
    """
    spaced = np.linspace(0, len(pairs) - 1, min(len(pairs), MOST_PAIRS)).round().astype(int)
    texts = [(plain(pairs[i].chosen), plain(pairs[i].rejected)) for i in spaced]
    p_flip, is_kept = (p_flip if is_informative else np.full(len(p_flip), np.nan))[spaced], is_kept[spaced]
    features = []
    for name, measure in BIASES.items():
        counts = np.array([[measure(chosen), measure(rejected)] for chosen, rejected in texts], dtype=np.float64)
        features.append(_feature(name, counts[:, 0], counts[:, 1], p_flip, is_kept))
    return {"num_pairs": len(texts), "min_differing": MIN_DIFFERING, "features": features}


def _feature(name: str, chosen: Floats, rejected: Floats, p_flip: Floats, is_kept: Bools) -> Table:
    has_more, has_less = chosen > rejected, chosen < rejected
    groups = {"all": np.ones(len(chosen), dtype=bool), "kept": is_kept, "not_kept": ~is_kept}
    shares = {key: _share(has_more[of_group], has_less[of_group]) for key, of_group in groups.items()}
    whole = shares["all"]
    is_clear = whole["num_pairs"] >= MIN_DIFFERING and (whole["low"] > 0.5 or whole["high"] < 0.5)
    return {
        "name": name,
        "mean_chosen": mean(chosen),
        "mean_rejected": mean(rejected),
        **shares,
        "p_flip_more": mean(p_flip[has_more]),
        "p_flip_less": mean(p_flip[has_less]),
        "is_clear": bool(is_clear),
    }


def kept_differ(entry: Mapping[str, Any], *, least: int) -> bool:
    """Whether kept pairs and the others prefer a feature by shares whose intervals lie apart.

    Args:
        entry: Of `features`.
        least: Pairs that must differ in the feature, of each kind.
    """
    kept, rest = entry["kept"], entry["not_kept"]
    is_known = min(kept["num_pairs"], rest["num_pairs"]) >= least
    return is_known and bool(kept["low"] > rest["high"] or kept["high"] < rest["low"])


def _share(has_more: Bools, has_less: Bools) -> Table:
    num_pairs = int(has_more.sum() + has_less.sum())
    if not num_pairs:
        return {"num_pairs": 0, "share": None, "low": None, "high": None}
    share = float(has_more.sum() / num_pairs)
    low, high = wilson_interval(share, num_pairs)
    return {"num_pairs": num_pairs, "share": number(share), "low": number(low), "high": number(high)}


def file_parts(rows: NDArray[np.int64], *, p_flip: Floats, is_informative: bool) -> list[Table]:
    """Mean P(flipped) in tenths of the file: a jump says that a batch of labels is bad.

    Args:
        rows: Of the original pairs, rising.
        p_flip: P(flipped) of each, shape (pairs,).
        is_informative: Whether `p_flip` says anything.

    Returns:
        One entry per tenth: its rows, its mean, the mean of the other tenths, and whether it `is_high`, that is further
        above the others than chance allows. Empty where a tenth would hold fewer than `MIN_PART` pairs.
    """
    rows, p_flip = rows[np.isfinite(p_flip)], p_flip[np.isfinite(p_flip)]
    if not is_informative or len(rows) < NUM_PARTS * MIN_PART:
        return []
    return [_part(rows, p_flip, places) for places in np.array_split(np.arange(len(rows)), NUM_PARTS)]


def _part(rows: NDArray[np.int64], p_flip: Floats, places: NDArray[np.int64]) -> Table:
    inside, outside = p_flip[places], np.delete(p_flip, places)
    # The spread of all pairs, since a batch of which everything is flipped has none of its own.
    error = float(p_flip.std() * np.sqrt(1 / len(inside) + 1 / len(outside)))
    difference = float(inside.mean() - outside.mean())
    return {
        "first_row": int(rows[places[0]]),
        "last_row": int(rows[places[-1]]),
        "num_pairs": len(places),
        "p_flip_mean": number(float(inside.mean())),
        "p_flip_others": number(float(outside.mean())),
        "is_high": difference > max(PART_Z * error, LEAST_DIFFERENCE),
    }
