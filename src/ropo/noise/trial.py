"""Whether another training is better, judged by labels that no model has trained on.

In: held-out margins of models that were trained as they would be, and of models for which something else was tried: the
suspects left out, another loss; numpy float64. Out: `Trial`.

The one idea: a filter may be tried before it is believed, and so may a loss. If labels are flipped whatever the texts
say, a model that is right more often agrees more often with labels it has not seen, right and wrong ones together:
agreement is η + (1 − 2η)·accuracy. So nobody has to know which labels are wrong to see which of two models is better,
nor why a judge contradicts a label. What agreement cannot see is a preference that is wrong throughout: what makes
models follow it more closely would look like a help.
"""

from dataclasses import dataclass

import numpy as np
from scipy.stats import norm

from ropo.noise.clusters import Clusters, cluster_weights, mean_of, sd_of

LEVEL = 0.95
"""How sure it must be that it helps: one-sided, for the chance in which pairs were drawn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What something did to the agreement with held-out labels.

    Attributes:
        tried: Share of the labels that the models agree with for which it was tried.
        as_is: The same of models that were trained without it.
        gain: The difference, in [−1, 1].
        low: What the gain surely (`LEVEL`) exceeds.
        num_pairs: Different pairs whose labels both were asked about; copies of one count once.
    """

    tried: float
    as_is: float
    gain: float
    low: float
    num_pairs: int

    @property
    def helps(self) -> bool:
        """Whether it surely makes better models."""
        return self.low > 0.0

    @property
    def hurts(self) -> bool:
        """Whether it surely makes worse models."""
        return 2 * self.gain - self.low < 0.0


def compare(tried: np.ndarray, as_is: np.ndarray, *, clusters: Clusters | None = None) -> Trial:
    """Compare two judges by how often each agrees with labels that neither has trained on.

    ::

        gain = mean d,   d = [h > 0] − [h₀ > 0] for each pair, a margin of 0 counts half;   low = gain − z·sd(d)/√n

    Args:
        tried: Held-out margin h of each pair by models for which something was tried.
        as_is: h₀ by models trained without it.
        clusters: A name for each pair, the same for copies of one pair, which count as one; see `estimate_flips`.

    Returns:
        The comparison.

    Raises:
        ValueError: If the shapes differ or there is no pair.

    Examples:
        >>> rng = np.random.default_rng(0)
        >>> label, good, poor = (np.where(rng.random(4000) < rate, -1.0, 1.0) for rate in (0.3, 0.05, 0.1))
        >>> compare(label * good, label * poor).helps, compare(label * poor, label * good).helps
        (True, False)
    """
    if np.shape(tried) != np.shape(as_is) or not np.size(tried):
        raise ValueError(f"compare needs both margins of the same pairs; got {np.shape(tried)} and {np.shape(as_is)}.")
    agrees = [(np.sign(margins) + 1) / 2 for margins in (tried, as_is)]
    differences, weights = agrees[0] - agrees[1], cluster_weights(clusters, len(agrees[0]))
    gain = mean_of(differences, weights)
    error = sd_of(differences, weights) / float(np.sqrt(weights.sum()))
    return Trial(
        tried=mean_of(agrees[0], weights),
        as_is=mean_of(agrees[1], weights),
        gain=gain,
        low=gain - float(norm.ppf(LEVEL)) * error,
        num_pairs=round(weights.sum()),
    )
