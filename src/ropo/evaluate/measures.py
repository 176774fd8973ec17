"""How well flips are found and how sure a mean is. Pure functions of arrays.

In: scores and known answers. Out: plain numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import norm, rankdata

from ropo.noise.shares import wilson_interval


@dataclass(frozen=True, slots=True, kw_only=True)
class Mean:
    """A mean with its interval."""

    value: float
    low: float
    high: float
    count: int


def mean_of(values: ArrayLike, *, level: float = 0.90) -> Mean:
    """Mean with its normal interval.

    Args:
        values: Independent values; one gives an interval without width, none a mean that is not a number.
        level: Coverage.

    Examples:
        >>> mean_of([1.0, 2.0, 3.0]).value
        2.0
    """
    array = np.asarray(values, dtype=np.float64)
    if not len(array):
        return Mean(value=np.nan, low=np.nan, high=np.nan, count=0)
    half = norm.ppf((1 + level) / 2) * array.std(ddof=1) / np.sqrt(len(array)) if len(array) > 1 else 0.0
    return Mean(
        value=float(array.mean()), low=float(array.mean() - half), high=float(array.mean() + half), count=len(array)
    )


def share_of(hits: ArrayLike, *, level: float = 0.90) -> Mean:
    """Share of hits with its Wilson interval, which stays inside [0, 1].

    Args:
        hits: 1 for a hit, 0 for none, a half for a tie.
        level: Coverage.

    Examples:
        >>> found = share_of([1, 1, 1, 1])
        >>> found.value, round(found.low, 2), found.high
        (1.0, 0.6, 1.0)
    """
    array = np.asarray(hits, dtype=np.float64)
    count, share = len(array), float(array.mean())
    low, high = wilson_interval(share, count, z=float(norm.ppf((1 + level) / 2)))
    return Mean(value=share, low=low, high=high, count=count)


def auroc(scores: ArrayLike, is_flipped: ArrayLike) -> float:
    """Chance that a flipped pair scores above one that is not; ties count half.

    Args:
        scores: Suspicion of each pair, such as `p_flip` or −margin.
        is_flipped: The answer key.

    Returns:
        0.5 for blind scores, 1 for perfect ones, NaN if only one kind of pair is there.

    Examples:
        >>> auroc([0.9, 0.8, 0.1], [True, False, False])
        1.0
    """
    truth = np.asarray(is_flipped, dtype=bool)
    num_flipped, num_clean = int(truth.sum()), int((~truth).sum())
    if not num_flipped or not num_clean:
        return float("nan")
    ranks = rankdata(scores)
    return float((ranks[truth].sum() - num_flipped * (num_flipped + 1) / 2) / (num_flipped * num_clean))


def average_precision(scores: ArrayLike, is_flipped: ArrayLike) -> float:
    """Mean precision over the flipped pairs when the most suspect come first.

    Returns:
        Between the share of flips (blind) and 1; NaN if nothing is flipped.

    Examples:
        >>> average_precision([0.9, 0.8, 0.1], [True, False, True])
        0.8333333333333333
    """
    truth = np.asarray(is_flipped, dtype=bool)[np.argsort(-np.asarray(scores), kind="stable")]
    if not truth.any():
        return float("nan")
    precision = np.cumsum(truth) / np.arange(1, len(truth) + 1)
    return float(precision[truth].mean())


def precision_recall(is_suspect: Sequence[bool] | NDArray[np.bool_], is_flipped: ArrayLike) -> tuple[float, float]:
    """Precision and recall of a set of suspects.

    Returns:
        Precision (NaN without suspects) and recall (NaN without flips).

    Examples:
        >>> precision_recall([True, True, False], [True, False, False])
        (0.5, 1.0)
    """
    suspect, truth = np.asarray(is_suspect, dtype=bool), np.asarray(is_flipped, dtype=bool)
    hits = float((suspect & truth).sum())
    return (
        hits / float(suspect.sum()) if suspect.any() else float("nan"),
        hits / float(truth.sum()) if truth.any() else float("nan"),
    )
