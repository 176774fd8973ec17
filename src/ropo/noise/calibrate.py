"""How far an estimate can be trusted, from labels that we turn round ourselves.

In: held-out margins and their `FlipEstimate`. Out: `Calibration`.

The one idea: a held-out pair may be turned round after the training, since the model that judges it has never seen it;
its margin is then −h. So for a share of the pairs it is known that the label has just been turned, whatever it was, and
counting how many of these are called flipped needs no truth and no further training.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ropo.noise.estimate import FlipEstimate, PerPair

INJECTED_SHARE = 0.1
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
        num_injected: Labels turned round.
        share_found: Of these, called flipped (P > ½); some were wrong before, so 1 is neither possible nor meant.
        share_others: Of the others, called flipped.
        recall: Share of truly wrong labels that is called flipped, from these two shares and the rate; in [0, 1].
        precision: Share of called labels that is truly wrong; None if none is called or no label is thought wrong.
        bins: Predicted and observed share of turned labels, from the least to the most suspect.
    """

    num_injected: int
    share_found: float
    share_others: float
    recall: float
    precision: float | None
    bins: tuple[CalibrationBin, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def calibrate(margins: PerPair, estimate: FlipEstimate, *, seed: int = 0) -> Calibration | None:
    """Turn a tenth of the labels round and see how they are judged.

    ::

        found = (1−ε)·R + ε·F,   others = (1−ε)·F + ε·R      R recall on wrong labels, F false alarms on right ones
        R = [(1−ε)·found − ε·others] / (1−2ε),   precision = ε·R / [ε·R + (1−ε)·F]

    Assumptions: flips fall at random; every label has the overall rate. Where wrong labels have a pattern that the
    model takes for the truth, ours are found and theirs are not.

    Args:
        margins: Held-out margins of the pairs that are open to doubt.
        estimate: From the same margins.
        seed: Which labels are turned.

    Returns:
        The calibration; None where the estimate is not informative or there are fewer than 50 pairs.
    """
    if not estimate.is_informative or len(margins) < 50 or estimate.rate >= 0.5:
        return None
    rng = np.random.default_rng(seed)
    is_turned = np.zeros(len(margins), dtype=bool)
    is_turned[rng.choice(len(margins), size=round(INJECTED_SHARE * len(margins)), replace=False)] = True
    rate, share = estimate.rate, float(is_turned.mean())
    seen = np.where(is_turned, -margins, margins)
    # Every label is now wrong with this probability, turned or not.
    rate_now = rate + share - 2 * rate * share
    p_wrong = estimate.p_flip_at(seen, rate=rate_now)
    called = p_wrong > 0.5
    p_turned = p_wrong * share * (1 - rate) / rate_now + (1 - p_wrong) * share * rate / (1 - rate_now)
    found, others = float(called[is_turned].mean()), float(called[~is_turned].mean())
    recall = float(np.clip(((1 - rate) * found - rate * others) / (1 - 2 * rate), 0.0, 1.0))
    alarms = float(np.clip(((1 - rate) * others - rate * found) / (1 - 2 * rate), 0.0, 1.0))
    hits = rate * recall
    bins = tuple(
        CalibrationBin(
            num_pairs=len(places), predicted=float(p_turned[places].mean()), observed=float(is_turned[places].mean())
        )
        for places in np.array_split(np.argsort(p_turned, kind="stable"), NUM_BINS)
    )
    return Calibration(
        num_injected=int(is_turned.sum()),
        share_found=found,
        share_others=others,
        recall=recall,
        precision=hits / (hits + (1 - rate) * alarms) if hits > 0 else None,
        bins=bins,
    )
