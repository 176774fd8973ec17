"""Copies of one pair, which are one piece of evidence.

In: a name for each pair, the same for copies. Out: weights of which each cluster of copies has 1 in all.

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
    """1 / (size of its cluster) for each pair, so the weights sum to the number of clusters; None: each is its own.

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


def within(clusters: Clusters | None, names: Shaped[np.ndarray, " pairs"]) -> Shaped[np.ndarray, " pairs"] | None:
    """Clusters split by a second name, such as that of the annotator: copies that differ in it are no copies."""
    if clusters is None:
        return None
    _, where = np.unique(np.asarray(clusters), return_inverse=True)
    _, which = np.unique(names, return_inverse=True)
    smaller: np.ndarray = where * len(names) + which
    return smaller


def mean_of(values: Shaped[np.ndarray, " pairs"], weights: PerPair) -> float:
    """Weighted mean; of equal weights exactly what `values.mean()` gives."""
    return float(np.average(values, weights=weights))
