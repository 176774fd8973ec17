"""How far decisions can be trusted, from labels that are flipped on purpose.

In: held-out margins, their `FlipEstimate`, and which labels the decisions call wrong. Out: `Calibration`.

The one idea: a held-out pair may be flipped after the training, since the model that scores it has never seen it; its
margin is then −h. So counting how many labels would be called wrong needs no truth and no further training.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool

from ropo.noise.estimate import MIN_PAIRS, FlipEstimate
from ropo.noise.shares import Clusters, PerPair, cluster_weights, mean_of

INJECTED_SHARE = 0.1
"""Labels that are flipped at a time for the bins."""

NUM_BINS = 10
_TINY = 1e-9  # stands for a rate of 0, at which recall has a limit


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationBin:
    """Pairs whose P(flipped) is about equal, with the mean share that the estimate predicts and the one observed."""

    num_pairs: int
    predicted: float
    observed: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What became of labels that were flipped on purpose; copies of a pair count once.

    Attributes:
        num_injected: Labels flipped at a time.
        num_turned: Labels flipped in all rounds: each once.
        share_found: Of these, called wrong; some were wrong before, so 1 is neither possible nor meant.
        share_others: Of the labels as they are, called wrong.
        recall: Share of truly wrong labels that is called wrong, from these two shares and the rate; in [0, 1].
        precision: Share of called labels that is truly wrong; None if no label is thought wrong.
        recall_range: `recall` at the ends of the rate's interval.
        precision_range: `precision` there; begins at 0 where the labels may all be right.
        bins: Of one round, from the least to the most suspect.
    """

    num_injected: int
    num_turned: int
    share_found: float
    share_others: float
    recall: float
    precision: float | None
    recall_range: tuple[float, float]
    precision_range: tuple[float, float]
    bins: tuple[CalibrationBin, ...]


def calibrate(
    margins: PerPair,
    estimate: FlipEstimate,
    is_called: Bool[np.ndarray, " pairs"],
    *,
    annotators: Sequence[str | None] | None = None,
    seed: int = 0,
    clusters: Clusters | None = None,
) -> Calibration | None:
    """Flip each label once, and see whether it would be called wrong.

    ::

        flipped = (1−ε)·R + ε·F,   others = (1−ε)·F + ε·R      R recall on wrong labels, F false alarms on right ones
        R = [(1−ε)·flipped − ε·others] / (1−2ε),   precision = ε·R / others

    Called is what is no less suspicious than some pair that was: by its margin or, where the decisions follow the rates
    of annotators, by its P(flipped). These rates then stand for ε, and hits are counted together. Flips are assumed to
    fall at random.

    Args:
        margins: Held-out margins of the pairs that are open to doubt, shape (pairs,).
        estimate: From the same margins.
        is_called: Which labels the decisions call wrong.
        annotators: Who labelled each pair, as given to `estimate_flips`.
        seed: Which labels are flipped for the bins.
        clusters: A name for each pair, the same for copies of one pair.

    Returns:
        None where the estimate is not informative, nothing is called, or `MIN_PAIRS` different pairs are not there.
    """
    weights = cluster_weights(clusters, len(margins))
    num_pairs = round(weights.sum())
    if not estimate.is_informative or not is_called.any() or num_pairs < MIN_PAIRS or estimate.rate >= 0.5:
        return None
    groups = _groups(margins, weights, is_called, estimate, annotators)
    recall, precision = _claims(groups, 1.0)
    if max(one.rate for one in groups) <= _TINY:
        precision = None
    ends = [_claims(groups, end / max(estimate.rate, _TINY)) for end in (estimate.low, estimate.high)]
    recalls, precisions = zip(*((one[0], one[1] or 0.0) for one in ((recall, precision), *ends)), strict=True)
    shares = np.array([one.share for one in groups])
    if clusters is not None:
        margins = margins[np.sort(np.unique(np.asarray(clusters), return_index=True)[1])]  # the first of each cluster
    return Calibration(
        num_injected=round(INJECTED_SHARE * num_pairs),
        num_turned=num_pairs,
        share_found=float(shares @ [one.flipped for one in groups]),
        share_others=float(shares @ [one.others for one in groups]),
        recall=recall,
        precision=precision,
        recall_range=(min(recalls), max(recalls)),
        precision_range=(min(precisions), max(precisions)),
        bins=_bins(margins, estimate, seed=seed),
    )


class _Group(NamedTuple):
    """Pairs with one flip rate: their share of all, and the shares called of flipped and of other labels."""

    share: float
    rate: float
    flipped: float
    others: float


def _groups(
    margins: PerPair,
    weights: PerPair,
    is_called: Bool[np.ndarray, " pairs"],
    estimate: FlipEstimate,
    annotators: Sequence[str | None] | None,
) -> list[_Group]:
    """Annotators with `MIN_PAIRS` pairs and a rate of their own, each; all other pairs together."""
    rates = {one.name: one.rate for one in estimate.annotators}
    names = np.array([str(name) if str(name) in rates else "" for name in annotators or [""] * len(margins)])
    own_rates = np.array([rates.get(str(name), estimate.rate) for name in names])
    _, where = np.unique(names, return_inverse=True)
    where = np.where(np.bincount(where, weights=weights)[where] < MIN_PAIRS, -1, where)  # too few to count among
    goes_by_margin = is_called[margins <= margins[is_called].max()].all()  # else by P(flipped) at each annotator's rate

    def suspicion(of: PerPair) -> PerPair:
        return -of if goes_by_margin else estimate.link.p_flip(own_rates, estimate.scale, of)

    least = suspicion(margins)[is_called].min()
    groups = []
    for place in np.unique(where):
        own = where == place
        flipped, others = (mean_of((suspicion(of) >= least)[own], weights[own]) for of in (-margins, margins))
        share, rate = float(weights[own].sum() / weights.sum()), mean_of(own_rates[own], weights[own])
        groups.append(_Group(share, max(rate, _TINY), flipped, others))
    return groups


def _claims(groups: Sequence[_Group], factor: float) -> tuple[float, float | None]:
    """The recall and the precision that follow if every rate is `factor` times the estimated one."""
    wrong, hits = 0.0, 0.0
    for one in groups:
        rate = min(max(one.rate * factor, _TINY), 1.0)  # an annotator may be wrong more often than right
        rate = 0.49 if 0.49 < rate < 0.51 else rate  # where flipped labels look like the others
        recall = float(np.clip(((1 - rate) * one.flipped - rate * one.others) / (1 - 2 * rate), 0.0, 1.0))
        wrong += one.share * rate
        hits += one.share * rate * recall
    if hits == 0:
        return 0.0, None
    called = sum(one.share * one.others for one in groups)
    return hits / wrong, min(hits / called, 1.0) if called and wrong > 2 * _TINY else 0.0


def _bins(margins: PerPair, estimate: FlipEstimate, *, seed: int) -> tuple[CalibrationBin, ...]:
    """Flip a share of the labels, and compare P(flipped on purpose) with what was."""
    is_flipped = np.zeros(len(margins), dtype=bool)
    num_injected = round(INJECTED_SHARE * len(margins))
    is_flipped[np.random.default_rng(seed).choice(len(margins), size=num_injected, replace=False)] = True
    before = estimate.rate
    rate = before + INJECTED_SHARE - 2 * before * INJECTED_SHARE  # of labels that are wrong now
    p_wrong = estimate.p_flip_at(np.where(is_flipped, -margins, margins), rate=rate)
    p_flipped = INJECTED_SHARE * (p_wrong * (1 - before) / rate + (1 - p_wrong) * before / (1 - rate))
    return tuple(
        CalibrationBin(
            num_pairs=len(places), predicted=float(p_flipped[places].mean()), observed=float(is_flipped[places].mean())
        )
        for places in np.array_split(np.argsort(p_flipped, kind="stable"), NUM_BINS)
    )
