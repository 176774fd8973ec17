"""Shares that are counted over pairs, copies of one pair counting once, and how sure they are.

In: values per pair, and a name for each pair, the same for copies. Out: weights, means, intervals.

The one idea: a row that stands in the data twice has one margin and one label; counted twice, it would narrow every
interval without anything new being known.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Shaped

PerPair = Float[np.ndarray, " pairs"]
Clusters = Sequence[str] | np.ndarray
"""Names of clusters, one for each pair: pairs with the same name are copies of each other."""


def cluster_weights(clusters: Clusters | None, num_pairs: int) -> PerPair:
    """1 / (size of its cluster) for each pair; None: each is its own.

    Raises:
        ValueError: If there is not one name per pair.

    Examples:
        >>> cluster_weights(["a", "b", "a"], 3).tolist()
        [0.5, 1.0, 0.5]
    """
    if clusters is None:
        return np.ones(num_pairs)
    if len(clusters) != num_pairs:
        raise ValueError(f"clusters needs one name per pair, {num_pairs}; got {len(clusters)}.")
    _, where, sizes = np.unique(np.asarray(clusters), return_inverse=True, return_counts=True)
    weights: PerPair = 1.0 / sizes[where]
    return weights


def mean_of(values: Shaped[np.ndarray, " pairs"], weights: PerPair) -> float:
    """Weighted mean; of equal weights exactly what `values.mean()` gives."""
    return float(np.average(values, weights=weights))


def wilson_interval(share: float, count: int, *, z: float = 1.6449) -> tuple[float, float]:
    """Wilson's interval of a share seen in `count` cases, 1 or more; by default it covers 90 %.

    Examples:
        >>> [round(value, 3) for value in wilson_interval(0.5, 100)]
        [0.419, 0.581]
    """
    center = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * float(np.sqrt(share * (1 - share) / count + z * z / (4 * count * count)))
    return max(0.0, center - half), min(1.0, center + half)
