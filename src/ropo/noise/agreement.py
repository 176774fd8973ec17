"""How many labels are wrong, if two judges of different training are asked instead of one.

In: the margins of both, numpy float64. Out: `Agreement`, and the rate of each annotator by the same reading.

The one idea: a judge that contradicts a label without being sure of it may not know better, or the label may be wrong.
A second judge tells the two apart. What a judge merely does not know, the other need not get wrong as well; a wrong
label both contradict. So label and judges are three raters of one truth, and how often each two of them differ gives
the error rate of each (Dawid & Skene 1979, in the closed form for two classes with equal errors).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import norm

from ropo.noise.clusters import Clusters, cluster_weights, mean_of, sd_of, within
from ropo.noise.estimate import PRIOR_PAIRS, AnnotatorRate


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """The share of wrong labels by two judges.

    Attributes:
        rate: In [0, 0.5].
        low: Lower end of the interval.
        high: Upper end of the interval.
        disagreement: d₁₂, how often the judges contradict each other.
    """

    rate: float
    low: float
    high: float
    disagreement: float


def rate_by_agreement(
    first: np.ndarray, second: np.ndarray, *, level: float = 0.90, clusters: Clusters | None = None
) -> Agreement | None:
    """Estimate the share of wrong labels from the signs of two judges' margins.

    ::

        1 − 2η = √[(1 − 2·d₁)(1 − 2·d₂) / (1 − 2·d₁₂)]
        d₁, d₂ how often a judge contradicts the label, d₁₂ how often the judges contradict each other

    Right if the three err independently of each other. Judges that share errors, as those do that have seen the same
    pairs, contradict each other too seldom, and right labels that both get wrong are then counted as wrong: read it as
    an upper reading, beside the lower one of `estimate_flips`, which takes every doubt for honest.

    Args:
        first: Held-out margin of each pair by one judge; 0 counts half for either side.
        second: By another, for the same pairs.
        level: Nominal coverage of the interval, for the chance in which pairs were drawn alone.
        clusters: A name for each pair, the same for copies of one pair, which count as one; see `estimate_flips`.

    Returns:
        The estimate; None where a judge is no better than a coin, so that nothing can be told.

    Raises:
        ValueError: If the shapes differ.

    Examples:
        >>> rng = np.random.default_rng(0)
        >>> label, one, other = (np.where(rng.random(100_000) < rate, -1.0, 1.0) for rate in (0.3, 0.1, 0.05))
        >>> round(rate_by_agreement(label * one, label * other).rate, 2)
        0.3
    """
    if np.shape(first) != np.shape(second):
        raise ValueError(
            f"rate_by_agreement needs both margins of the same pairs; got {np.shape(first)} and {np.shape(second)}."
        )
    signs = np.array([np.sign(first), np.sign(second), np.sign(first) * np.sign(second)])
    weights = cluster_weights(clusters, signs.shape[1])
    means = np.average(signs, axis=1, weights=weights)
    if (means <= 0).any():
        return None
    powers = np.array([0.5, 0.5, -0.5])[:, None]
    log_share = float((powers[:, 0] * np.log(means)).sum())
    # The delta method: to first order the logarithm is a mean over pairs.
    error = sd_of((powers * signs / means[:, None]).sum(axis=0), weights) / float(np.sqrt(weights.sum()))
    width = float(norm.ppf((1 + level) / 2)) * error
    rate, low, high = (float(np.clip((1 - np.exp(log_share + shift)) / 2, 0.0, 0.5)) for shift in (0.0, width, -width))
    return Agreement(rate=rate, low=low, high=high, disagreement=float((1 - means[2]) / 2))


def annotators_by_agreement(
    first: np.ndarray,
    second: np.ndarray,
    annotators: Sequence[str | None],
    *,
    level: float = 0.90,
    clusters: Clusters | None = None,
) -> list[AnnotatorRate]:
    """Estimate the share of wrong labels of each annotator from the signs of two judges' margins.

    ::

        1 − 2·η_a = ½·(1 − 2η)·[(1 − 2·d₁ₐ)/(1 − 2·d₁) + (1 − 2·d₂ₐ)/(1 − 2·d₂)]

    with η, d₁ and d₂ of all as in `rate_by_agreement`, d₁ₐ and d₂ₐ of the labels of annotator a: the judges err as
    often with the labels of one annotator as with those of another. So the rates of all average to the rate of all. Of
    the labels of one annotator only their own copies are copies.

    Args:
        first: Held-out margin of each pair by one judge.
        second: By another.
        annotators: Who labelled each pair; None where unknown.
        level: Nominal coverage of the intervals.
        clusters: See `rate_by_agreement`.

    Returns:
        The rates, drawn towards that of all as those of `estimate_flips` are, the worst first; none if fewer than two
        annotators are named, or if nothing can be told.

    Examples:
        >>> rng = np.random.default_rng(0)
        >>> names, sign = ["a"] * 5000 + ["b"] * 5000, np.where(np.arange(10_000) < 2000, -1.0, 1.0)
        >>> one, other = (sign * np.where(rng.random(10_000) < rate, -1.0, 1.0) for rate in (0.1, 0.05))
        >>> [(found.name, round(found.rate, 2)) for found in annotators_by_agreement(one, other, names)]
        [('a', 0.4), ('b', 0.0)]
    """
    both = rate_by_agreement(first, second, level=level, clusters=clusters)
    names = np.array(["" if name is None else str(name) for name in annotators])
    known = sorted(set(names.tolist()) - {""})
    if both is None or len(known) < 2:
        return []
    signs = np.array([np.sign(first), np.sign(second)])
    # Of each label what the two judges say of it, in units in which its mean over all is 1 − 2η.
    weights = cluster_weights(clusters, len(names))
    told = (1 - 2 * both.rate) * (signs / np.average(signs, axis=1, weights=weights)[:, None]).mean(axis=0)
    overall, spread, quantile = mean_of(told, weights), sd_of(told, weights), float(norm.ppf((1 + level) / 2))
    own = cluster_weights(within(clusters, names), len(names))
    found = []
    for name in known:
        mine, of_mine = told[names == name], own[names == name]
        share = ((of_mine * mine).sum() + PRIOR_PAIRS * overall) / (of_mine.sum() + PRIOR_PAIRS)
        width = quantile * spread / np.sqrt(of_mine.sum())
        rate, low, high = (float(np.clip((1 - share + shift) / 2, 0.0, 1.0)) for shift in (0.0, -width, width))
        # The rate of all is not known better than its interval, and this one moves with it.
        low, high = max(0.0, low - (both.rate - both.low)), min(1.0, high + (both.high - both.rate))
        found.append(AnnotatorRate(name=name, num_pairs=len(mine), rate=rate, low=low, high=high))
    return sorted(found, key=lambda one: -one.rate)
