"""Copies of one pair, which are one piece of evidence.

In: a name for each pair, the same for copies. Out: weights of which each cluster of copies has 1 in all.

The one idea: a row that stands in the data twice has one margin and one label; counted twice, it would narrow every
interval without anything new being known.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Shaped

PerPair = Float[np.ndarray, " pairs"]
Clusters = Sequence[str] | np.ndarray
"""Names of clusters, one for each pair: pairs with the same name are copies of each other."""


def cluster_weights(clusters: Clusters | None, num_pairs: int) -> PerPair:
    """Weights that count the pairs of a cluster once.

    Args:
        clusters: Name of the cluster of each pair; None where each is its own.
        num_pairs: Number of pairs.

    Returns:
        1 / (size of the cluster) for each pair; they sum to the number of clusters.

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


def within(
    clusters: Clusters | None, names: Shaped[np.ndarray, " pairs"], *, of: Bool[np.ndarray, " pairs"] | None = None
) -> Shaped[np.ndarray, " some"] | None:
    """Split clusters by a second name: copies that differ in it are no copies.

    Args:
        clusters: Name of the cluster of each pair, or None.
        names: The second name of each pair, such as that of its annotator.
        of: The pairs to name; all by default.

    Returns:
        Names of the smaller clusters, or None.
    """
    if clusters is None:
        return None
    _, where = np.unique(np.asarray(clusters), return_inverse=True)
    _, which = np.unique(names, return_inverse=True)
    found: np.ndarray = where * len(names) + which
    return found if of is None else found[of]


def mean_of(values: Shaped[np.ndarray, " pairs"], weights: PerPair) -> float:
    """Weighted mean; of equal weights exactly what `values.mean()` gives."""
    return float(np.average(values, weights=weights))


def sd_of(values: PerPair, weights: PerPair) -> float:
    """Weighted standard deviation; of equal weights exactly what `values.std()` gives."""
    return float(np.sqrt(mean_of((values - mean_of(values, weights)) ** 2, weights)))
