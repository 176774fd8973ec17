"""From what is known about labels to what is trained on: ρ, α, a decision and a weight for every pair.

In: pairs with verdicts, an estimate of the flip rate, margins. Out: weights, and the training set that they make.

The one idea: evidence and consequence are kept apart. What an estimate, two judges or a trial say is evidence; here
stands what follows from it, and in which words it is told.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ropo.judge.verdicts import Judge, flip_judge
from ropo.noise.agreement import annotators_by_agreement, rate_by_agreement
from ropo.noise.clusters import Clusters
from ropo.noise.decide import RULES, decide
from ropo.pair_dataset import PairDataset
from ropo.pairs import Pair, PairLogps

Floats = NDArray[np.float64]

LEAST_ALPHA, ALPHA_PER_NOISE = 2.0, 34.0

MIN_RATE = 0.05
"""From this estimate on the robust loss is used even where the interval reaches 0. Right labels can read so, too, and
there it costs about a point of accuracy at most (docs/noise.md, step 7)."""

AGREEMENT_LEVEL = 0.99
"""How sure it must be that two judges together contradict more labels than the first pass's interval holds."""

MAX_DISAGREEMENT = 0.1
"""Judges that contradict each other on more of the pairs know too little, and share errors that their agreement cannot
show: it would count right labels as wrong. Chosen after a look, between what was seen where raising is right (0.05 to
0.09, 6,000 toy pairs) and where it is not (0.13 to 0.15, controlled sentiment)."""


_SIGNS: Mapping[str | None, float] = {"wrong": -1.0, "drop": 0.0}


def known_labels(pairs: Sequence[Pair]) -> tuple[Floats, NDArray[np.bool_]]:
    """What a person has said about each label.

    Args:
        pairs: With their verdicts; trusted ones count as right.

    Returns:
        +1 where the label stands, −1 where it was called wrong, 0 where the pair is to be left out; and whether the
        label is known to be right or wrong.
    """
    sign = np.array([_SIGNS.get(pair.verdict, 1.0) for pair in pairs])
    is_known = [pair.origin == "trusted" or pair.verdict in ("right", "wrong") for pair in pairs]
    return sign, np.array(is_known, dtype=bool)


def decide_all(
    data: PairDataset,
    margins: Floats,
    p_flip: Floats,
    *,
    rho: float,
    rule: str,
    checks: Floats | None = None,
    judge: Judge | None = None,
) -> tuple[NDArray[np.str_], Floats]:
    """Obey the verdicts, and decide about the rest by a rule.

    Args:
        data: The pairs, without resampled ones.
        margins: One per pair.
        p_flip: One per pair.
        rho: The share of the pairs without a verdict that the budget takes away.
        rule: A name in `RULES`.
        checks: Margins at several checks, shape (checks, pairs), for rules that need them.
        judge: Asked by rules that take one; the others leave it alone.

    Returns:
        "keep", "drop" or "flip" for each pair, and its weight times the one it has in the data.
    """
    sign, is_known = known_labels(data.pairs)
    decisions = np.where(sign > 0, "keep", np.where(sign < 0, "flip", "drop")).astype("<U8")
    weights = np.abs(sign)
    doubtful = ~is_known & (sign != 0)
    if doubtful.any():
        of_doubtful = None if checks is None else checks[:, doubtful]
        asked = None
        if judge is not None and RULES[rule].takes_judge:
            asked = flip_judge(judge, [data.pairs[i] for i in np.flatnonzero(doubtful)], p_flip[doubtful])
        found = decide(margins[doubtful], p_flip[doubtful], rho=rho, rule=rule, checks=of_doubtful, judge=asked)
        decisions[doubtful], weights[doubtful] = found.decision, found.weight
    return decisions, weights * [pair.weight for pair in data.pairs]


def raise_by_agreement(
    estimate: Mapping[str, Any],
    first: Floats,
    second: Floats,
    *,
    trial: Mapping[str, Any] | None = None,
    annotators: Sequence[str | None] = (),
    clusters: Clusters | None = None,
) -> dict[str, Any]:
    """Take the rate of two judges where it is surely above what one judge's margins explain by flips at random.

    Also where a trial has shown that it helps to leave out what the first contradicts.

    Errors with a rule (the larger model is taken to write better, annotators err between responses that are nearly as
    good) look like honest doubt to one judge: the surer it is of a pair, the seldomer the label is wrong.

    Args:
        estimate: `FlipEstimate.to_dict()` of the first pass.
        first: Held-out margins of its judges, shape (pairs,).
        second: Of judges trained on what it kept.
        trial: What `Audit` wrote of a filter that it tried, if it did.
        annotators: Who labelled each pair, shape (pairs,); nobody where it is not known of any.
        clusters: A name for each pair, the same for copies of one pair, see `estimate_flips`.

    Returns:
        The estimate with `is_raised`; where it is, `rate` is that of both, and the interval reaches from the lower end
        of the one reading to the upper end of the other. So do rates and intervals of the annotators.
    """
    both = rate_by_agreement(first, second, level=AGREEMENT_LEVEL, clusters=clusters)
    of_annotators = partial(_annotators_of_both, estimate, first, second, annotators, clusters)
    if both is not None and trial is not None and trial["helps"]:
        return {
            **estimate,
            "annotators": of_annotators(),
            "is_raised": True,
            "is_informative": True,
            "rate": both.rate,
            "low": min(estimate["low"], both.rate),
            "high": both.high,
            "reason": (
                f"Models trained without the {100 * trial['left_out']:.1f} % that the first judges contradict agree "
                f"with {100 * trial['tried']:.1f} % of the labels they have not seen, others with "
                f"{100 * trial['as_is']:.1f} %. Both judges together contradict {100 * both.rate:.1f} %."
            ),
        }
    if both is None or both.low <= estimate["high"] or both.disagreement > MAX_DISAGREEMENT:
        return {**estimate, "is_raised": False}
    return {
        **estimate,
        "annotators": of_annotators(),
        "is_raised": True,
        "rate": both.rate,
        "high": both.high,
        "reason": (
            f"Flips at random explain {100 * estimate['low']:.1f} % to {100 * estimate['high']:.1f} %, but two judges "
            f"of different training together contradict {100 * both.rate:.1f} %."
        ),
    }


def _annotators_of_both(
    estimate: Mapping[str, Any],
    first: Floats,
    second: Floats,
    annotators: Sequence[str | None],
    clusters: Clusters | None,
) -> list[dict[str, Any]]:
    """The rate of each annotator by two judges, with an interval that reaches down to the reading of one."""
    if not any(annotators):
        return []
    lows = {one["name"]: one["low"] for one in estimate["annotators"]}
    found = [asdict(one) for one in annotators_by_agreement(first, second, annotators, clusters=clusters)]
    return [one | {"low": min(one["low"], lows.get(one["name"], one["low"]))} for one in found]


def resolve_rho(fixed: float | None, estimate: Mapping[str, Any]) -> tuple[float, str]:
    """The share of pairs to filter out, and the reason in words.

    Args:
        fixed: What the user gave, or None to follow the estimate.
        estimate: `FlipEstimate.to_dict()`.

    Returns:
        ρ in [0, 0.5] and a clause that completes "ρ is ..., since ...".

    Examples:
        >>> resolve_rho(None, {"is_informative": True, "rate": 0.01, "low": 0.0, "high": 0.02})[0]
        0.0
    """
    if fixed is not None:
        return fixed, "it was given"
    if estimate.get("is_raised"):
        return min(float(estimate["rate"]), 0.5), "this is the share of labels that two judges contradict"
    if not estimate["is_informative"]:
        return 0.0, f"the margins cannot tell how many labels are flipped: {estimate['reason'].rstrip('.')}"
    if estimate["low"] <= 0.0:
        return 0.0, "the labels may all be right: the interval of the estimate reaches down to 0"
    return min(float(estimate["rate"]), 0.5), "this is the estimated flip rate"


def resolve_alpha(fixed: float | None, estimate: Mapping[str, Any], left: float) -> tuple[float, str]:
    """The α of the robust loss, and the reason in words.

    ::

        α = 2 + 34·(share of wrong labels left in training);   0, which is DPO, if little speaks for flips

    An audit may try the loss where this gives 0, and overrule it. The rule is ours. Above 2 a contradicted pair weighs
    less than an undecided one; the paper's 14 is reached where 35 % of what is trained on is wrong. Little is an
    estimate below `MIN_RATE` whose interval reaches 0.

    Args:
        fixed: What the user gave, or None to follow the noise.
        estimate: `FlipEstimate.to_dict()`.
        left: Expected share of wrong labels among the weighted pairs.

    Returns:
        α and a clause that completes "α is ..., since ...".

    Examples:
        >>> resolve_alpha(None, {"is_informative": True, "rate": 0.3, "low": 0.25}, 0.1)[0]
        5.4
        >>> resolve_alpha(None, {"is_informative": True, "rate": 0.01, "low": 0.0}, 0.01)
        (0.0, 'little speaks for flipped labels, and without them DPO is best')
    """
    if fixed is not None:
        return fixed, "it was given"
    if not estimate["is_informative"]:
        return 0.0, "it cannot be told how many labels are wrong, and DPO assumes the least"
    is_sure = estimate["low"] > 0.0 or estimate.get("is_raised", False)
    if not is_sure and estimate["rate"] < MIN_RATE:
        return 0.0, "little speaks for flipped labels, and without them DPO is best"
    is_wrong = "is wrong" if is_sure else "may be wrong"
    return alpha_for(left), f"about {100 * left:.1f} % of what is trained on {is_wrong}"


def alpha_for(share: float) -> float:
    """α = 2 + 34·(share of wrong labels in what is trained on), see `resolve_alpha`.

    Examples:
        >>> alpha_for(0.1)
        5.4
    """
    return round(LEAST_ALPHA + ALPHA_PER_NOISE * share, 4)


def training_set(data: PairDataset, weights: Floats, is_flipped: NDArray[np.bool_]) -> PairDataset:
    """What to train on: pairs with a positive weight, with chosen and rejected swapped where `is_flipped`.

    Args:
        data: Pairs as labelled.
        weights: One per pair, 0 leaves the pair out.
        is_flipped: One per pair.

    Returns:
        Weighted pairs in the order of `data`.

    Raises:
        ValueError: If no pair is left.
    """
    kept = np.flatnonzero(np.asarray(weights) > 0).tolist()
    if not kept:
        raise ValueError("Training needs at least one pair with a weight above 0; got none. Lower rho.")
    chosen = data.select(kept)
    turned = [i for i, place in enumerate(kept) if is_flipped[place]]
    for i in turned:
        pair, ids = chosen.pairs[i], chosen.tokens[i]
        chosen.pairs[i] = replace(pair, chosen=pair.rejected, rejected=pair.chosen)
        chosen.tokens[i] = replace(ids, chosen=ids.rejected, rejected=ids.chosen)
    if chosen.reference is not None and turned:
        flipped = torch.tensor([bool(is_flipped[place]) for place in kept])
        old = chosen.reference
        chosen.reference = PairLogps(
            chosen=torch.where(flipped, old.rejected, old.chosen),
            rejected=torch.where(flipped, old.chosen, old.rejected),
        )
    chosen.weights = [float(weights[i]) for i in kept]
    return chosen
