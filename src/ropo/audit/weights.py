"""From what is known about labels to what is trained on: ρ, α, a decision and a weight for every pair.

In: pairs with verdicts, an estimate of the flip rate, margins. Out: weights, and the training set that they make.

The one idea: evidence and consequence are kept apart. What an estimate says is evidence; here stands what follows.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ropo.audit.result import RateEstimate
from ropo.noise.decide import decide
from ropo.pairs import Pair, PairLogps
from ropo.train.dataset import PairDataset

Floats = NDArray[np.float64]

ALPHA_OF_PAPER = 14.0

_SIGNS: Mapping[str | None, float] = {"wrong": -1.0, "drop": 0.0}


def known_labels(pairs: Sequence[Pair]) -> tuple[Floats, NDArray[np.bool_]]:
    """What human review says about each label; trusted ones count as right.

    Returns:
        +1 where the label stands, −1 where it was called wrong, 0 where the pair is to be left out; and whether the
        label is known to be right or wrong; each of shape (pairs,).
    """
    sign = np.array([_SIGNS.get(pair.verdict, 1.0) for pair in pairs])
    is_known = [pair.origin == "trusted" or pair.verdict in ("right", "wrong") for pair in pairs]
    return sign, np.array(is_known, dtype=bool)


def share_of_open(share: float, sign: Floats, is_known: NDArray[np.bool_], is_trusted: NDArray[np.bool_]) -> float:
    """The share of flipped labels among those that are open to doubt, from the share in the whole data.

    Args:
        share: Of all labels of the data, reviewed ones counted as well.
        sign: See `known_labels`.
        is_known: See `known_labels`.
        is_trusted: Which pairs are no part of the data.

    Examples:
        >>> nobody = np.zeros(4, dtype=bool)
        >>> share_of_open(0.5, np.array([-1.0, 1.0, 1.0, 1.0]), np.array([True, False, False, True]), nobody)
        0.5
    """
    counts = (sign != 0) & ~is_trusted
    if not (counts & is_known).any():
        return share
    num_left = share * counts.sum() - (counts & is_known & (sign < 0)).sum()
    return float(np.clip(num_left / max((counts & ~is_known).sum(), 1), 0.0, 0.5))


def decide_all(
    data: PairDataset, margins: Floats, p_flip: Floats, *, rho: float, rule: str
) -> tuple[NDArray[np.str_], Floats]:
    """Obey the review decisions, and decide about the rest by a rule.

    Args:
        data: The pairs, without resampled ones.
        margins: Shape (pairs,).
        p_flip: Shape (pairs,).
        rho: The share of the pairs without a review decision that the budget takes away.
        rule: A name in `RULES`.

    Returns:
        "keep", "drop" or "flip" for each pair, and its weight times the one it has in the data.
    """
    sign, is_known = known_labels(data.pairs)
    decisions = np.where(sign > 0, "keep", np.where(sign < 0, "flip", "drop")).astype("<U8")
    weights = np.abs(sign)
    doubtful = ~is_known & (sign != 0)
    if doubtful.any():
        decided = decide(margins[doubtful], p_flip[doubtful], rho=rho, rule=rule)
        decisions[doubtful], weights[doubtful] = decided.decision, decided.weight
    return decisions, weights * [pair.weight for pair in data.pairs]


class Why(StrEnum):
    """Why ρ or α is what it is; `ropo.report` has a clause for each."""

    GIVEN = "given"
    ESTIMATED = "estimated"
    FILTER_HELPS = "filter_helps"
    MAY_BE_CLEAN = "may_be_clean"
    CANNOT_TELL = "cannot_tell"
    AFTER_FILTER = "after_filter"
    NOT_ESTIMATED = "not_estimated"


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A value that follows from what is known, and why.

    Attributes:
        value: The value.
        why: Why it is that.
        facts: The numbers that it follows from, by name.
    """

    value: float
    why: Why
    facts: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> "Choice":
        """Of what `asdict` gave."""
        return cls(value=found["value"], why=Why(found["why"]), facts=found.get("facts", {}))


def resolve_rho(
    fixed: float | None,
    estimate: RateEstimate,
    *,
    contradicted: float = 0.0,
    of_open: Callable[[float], float] = float,
) -> Choice:
    """The share of pairs to filter out.

    Args:
        fixed: What the user gave, or None to follow the estimate.
        estimate: Of the flip rate.
        contradicted: Share of labels that held-out margins contradict, if models are better without them.
        of_open: What a share of all labels is of those without a review decision, see `share_of_open`.

    Returns:
        ρ in [0, 0.5]: the estimated rate if it can be told and its interval excludes 0, else 0; but no less than
        `contradicted`. Where wrong labels have a rule, such as errors between responses that are nearly as good, the
        rate reads too low, and what is contradicted is wrong all the same.
    """
    if fixed is not None:
        return Choice(value=fixed, why=Why.GIVEN)
    is_told = estimate.is_informative and of_open(estimate.low) > 0.0
    rate = of_open(estimate.rate) if is_told else 0.0
    facts = {"low": estimate.low, "high": estimate.high, "contradicted": contradicted}
    if contradicted > rate:
        return Choice(value=min(contradicted, 0.5), why=Why.FILTER_HELPS, facts=facts)
    if not is_told:
        why = Why.MAY_BE_CLEAN if estimate.is_informative else Why.CANNOT_TELL
        return Choice(value=0.0, why=why, facts=facts)
    return Choice(value=min(rate, 0.5), why=Why.ESTIMATED, facts=facts)


def resolve_rule(given: str, rho: Choice) -> str:
    """The rule that decides which pairs to filter out.

    Args:
        given: A name in `RULES`, or "auto".
        rho: The share of pairs, and why it is that.

    Returns:
        As given; for "auto" `threshold`, which spares pairs that are likelier right, where ρ follows the estimate, and
        else `lowest_loss`: a share that was given, or a filter that was tried, is taken away as it is.
    """
    if given != "auto":
        return given
    return "lowest_loss" if rho.why in (Why.GIVEN, Why.FILTER_HELPS) else "threshold"


def resolve_alpha(fixed: float | None, *, is_audited: bool) -> Choice:
    """The α of the robust loss: as given; else 0, which is DPO, on what the filter keeps, and the paper's without one.

    Args:
        fixed: What the user gave, or None.
        is_audited: Whether an audit has filtered the pairs.

    Examples:
        >>> resolve_alpha(None, is_audited=True).value, resolve_alpha(None, is_audited=False).value
        (0.0, 14.0)
    """
    if fixed is not None:
        return Choice(value=fixed, why=Why.GIVEN)
    if not is_audited:
        return Choice(value=ALPHA_OF_PAPER, why=Why.NOT_ESTIMATED)
    return Choice(value=0.0, why=Why.AFTER_FILTER)


def training_set(data: PairDataset, weights: Floats, is_flipped: NDArray[np.bool_]) -> PairDataset:
    """Pairs of `data` with a positive weight, in order, with chosen and rejected swapped where `is_flipped`.

    Raises:
        ValueError: If no pair is left.
    """
    kept = np.flatnonzero(np.asarray(weights) > 0).tolist()
    if not kept:
        raise ValueError("Training needs at least one pair with a weight above 0; got none. Lower rho.")
    training = data.select(kept)
    swapped = [i for i, place in enumerate(kept) if is_flipped[place]]
    for i in swapped:
        pair, ids = training.pairs[i], training.tokens[i]
        training.pairs[i] = replace(pair, chosen=pair.rejected, rejected=pair.chosen)
        training.tokens[i] = replace(ids, chosen=ids.rejected, rejected=ids.chosen)
    if training.reference is not None and swapped:
        flipped, old = torch.tensor([bool(is_flipped[place]) for place in kept]), training.reference
        training.reference = PairLogps(
            chosen=torch.where(flipped, old.rejected, old.chosen),
            rejected=torch.where(flipped, old.chosen, old.rejected),
        )
    training.weights = [float(weights[i]) for i in kept]
    return training
