"""How far an estimate can be trusted, from labels that we turn round ourselves.

In: held-out margins and their `FlipEstimate`. Out: `Calibration`.

The one idea: a held-out pair may be turned round after the training, since the model that judges it has never seen it;
its margin is then −h. So for a share of the pairs it is known that the label has just been turned, whatever it was, and
counting how many of these are called flipped needs no truth and no further training.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, Shaped

from ropo.noise.clusters import Clusters, PerPair, cluster_weights, mean_of
from ropo.noise.estimate import MIN_PAIRS, FlipEstimate

INJECTED_SHARE = 0.1
"""Labels that are turned round at a time for the bins."""

NUM_BINS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationBin:
    """Pairs whose P(flipped) is about equal.

    Attributes:
        num_pairs: How many, turned ones included.
        predicted: Mean P(just turned), as the estimate implies it.
        observed: Share of them that we have just turned.
    """

    num_pairs: int
    predicted: float
    observed: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What became of labels that were turned round on purpose.

    Attributes:
        num_injected: Labels flipped on purpose at a time; copies of a pair count once.
        num_turned: Labels flipped on purpose in all rounds: each once, copies likewise.
        share_found: Of these, called wrong; some were wrong before, so 1 is neither possible nor meant.
        share_others: Of the others, called wrong.
        recall: Share of truly wrong labels that is called wrong, from these two shares and the rate; in [0, 1].
        precision: Share of called labels that is truly wrong; None if no label is thought wrong.
        recall_range: The least and the most that `recall` is at the ends of the rate's interval.
        precision_range: The same of `precision`; begins at 0 where the labels may all be right.
        bins: Predicted and observed share of turned labels in one round, from the least to the most suspect.
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

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def calibrate(
    margins: PerPair,
    estimate: FlipEstimate,
    is_called: Bool[np.ndarray, " pairs"],
    *,
    annotators: Sequence[str | None] | None = None,
    seed: int = 0,
    clusters: Clusters | None = None,
) -> Calibration | None:
    """Turn each label round once, and see whether it would be called wrong.

    ::

        found = (1−ε)·R + ε·F,   others = (1−ε)·F + ε·R      R recall on wrong labels, F false alarms on right ones
        R = [(1−ε)·found − ε·others] / (1−2ε),   precision = ε·R / [ε·R + (1−ε)·F]

    Called is what has a margin no larger than that of some pair that was, by the same annotator if annotators have
    rates of their own; these then stand for ε, and R and F are counted together.

    Assumptions: flips fall at random. Where wrong labels have a pattern that the model takes for the truth, ours are
    found and theirs are not. R and F hang on ε, which is not known exactly, so they come with their values at both
    ends of its interval.

    Args:
        margins: Held-out margins of the pairs that are open to doubt.
        estimate: From the same margins.
        is_called: Which labels the decisions call wrong.
        annotators: Who labelled each pair, as given to `estimate_flips`.
        seed: Which labels are turned for the bins.
        clusters: A name for each pair, the same for copies of one pair, which count as one; see `estimate_flips`.

    Returns:
        The calibration; None where the estimate is not informative, nothing is called, or there are fewer than 50
        different pairs.
    """
    weights = cluster_weights(clusters, len(margins))
    num_pairs = round(weights.sum())
    if not estimate.is_informative or not is_called.any() or num_pairs < MIN_PAIRS or estimate.rate >= 0.5:
        return None
    groups = _groups(margins, weights, is_called, estimate, annotators)
    recall, precision = _claims(groups, 1.0)
    ends = [_claims(groups, end / max(estimate.rate, 1e-9)) for end in (estimate.low, estimate.high)]
    recalls, precisions = zip(*((one[0], one[1] or 0.0) for one in ((recall, precision), *ends)), strict=True)
    shares = np.array([one.share for one in groups])
    return Calibration(
        num_injected=round(INJECTED_SHARE * num_pairs),
        num_turned=num_pairs,
        share_found=float(shares @ [one.found for one in groups]),
        share_others=float(shares @ [one.others for one in groups]),
        recall=recall,
        precision=precision,
        recall_range=(min(recalls), max(recalls)),
        precision_range=(min(precisions), max(precisions)),
        bins=_bins(margins if clusters is None else margins[_first_of(np.asarray(clusters))], estimate, seed=seed),
    )


@dataclass(frozen=True, slots=True)
class _Group:
    """Pairs with one flip rate: their share of all, and the shares called of turned and of other labels."""

    share: float
    rate: float
    found: float
    others: float


def _groups(
    margins: PerPair,
    weights: PerPair,
    is_called: np.ndarray,
    estimate: FlipEstimate,
    annotators: Sequence[str | None] | None,
) -> list[_Group]:
    """The annotators with a rate of their own, and all others."""
    rates = {one.name: one.rate for one in estimate.annotators}
    names = np.array([str(name) if str(name) in rates else "" for name in annotators or [""] * len(margins)])
    groups = []
    for name in np.unique(names):
        own = names == name
        cut = margins[own & is_called].max(initial=-np.inf)
        found, others = (mean_of(seen[own] <= cut, weights[own]) for seen in (-margins, margins))
        share = float(weights[own].sum() / weights.sum())
        groups.append(_Group(share, rates.get(str(name), estimate.rate), found, others))
    return groups


def _claims(groups: Sequence[_Group], factor: float) -> tuple[float, float | None]:
    """The recall and the precision that follow if every rate is `factor` times what it was read as."""
    wrong, hits, called = 0.0, 0.0, 0.0
    for one in groups:
        rate = min(one.rate * factor, 1.0)  # an annotator may be wrong more often than right
        rate = 0.49 if 0.49 < rate < 0.51 else rate  # where turned labels look like the others
        recall = np.clip(((1 - rate) * one.found - rate * one.others) / (1 - 2 * rate), 0.0, 1.0)
        alarms = np.clip(((1 - rate) * one.others - rate * one.found) / (1 - 2 * rate), 0.0, 1.0)
        wrong += one.share * rate
        hits += one.share * rate * float(recall)
        called += one.share * (rate * float(recall) + (1 - rate) * float(alarms))
    return hits / max(wrong, 1e-12), hits / called if hits > 0 else None


def _first_of(clusters: Shaped[np.ndarray, " pairs"]) -> Int[np.ndarray, " clusters"]:
    """Positions of the first pair of each cluster, in order."""
    places: np.ndarray = np.sort(np.unique(clusters, return_index=True)[1])
    return places


def _rate_with_turned(estimate: FlipEstimate) -> float:
    """How often a label is wrong once a tenth of all are turned."""
    return estimate.rate + INJECTED_SHARE - 2 * estimate.rate * INJECTED_SHARE


def _p_wrong(seen: PerPair, estimate: FlipEstimate) -> PerPair:
    return estimate.p_flip_at(seen, rate=_rate_with_turned(estimate))


def _bins(margins: PerPair, estimate: FlipEstimate, *, seed: int) -> tuple[CalibrationBin, ...]:
    rate, rate_now = estimate.rate, _rate_with_turned(estimate)
    num_injected = round(INJECTED_SHARE * len(margins))
    is_turned = np.zeros(len(margins), dtype=bool)
    is_turned[np.random.default_rng(seed).choice(len(margins), size=num_injected, replace=False)] = True
    p_wrong = _p_wrong(np.where(is_turned, -margins, margins), estimate)
    p_turned = INJECTED_SHARE * (p_wrong * (1 - rate) / rate_now + (1 - p_wrong) * rate / (1 - rate_now))
    return tuple(
        CalibrationBin(
            num_pairs=len(places), predicted=float(p_turned[places].mean()), observed=float(is_turned[places].mean())
        )
        for places in np.array_split(np.argsort(p_turned, kind="stable"), NUM_BINS)
    )
