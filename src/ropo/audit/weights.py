"""From what is known about labels to what is trained on: ρ, α, a decision and a weight for every pair.

The one idea: evidence and consequence are kept apart. What an estimate says is evidence; here stands what follows.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ropo.data.validate import text_id
from ropo.noise.decide import decide
from ropo.noise.estimate import FlipEstimate
from ropo.noise.linear import Gain
from ropo.noise.shares import Clusters
from ropo.pairs import Pair, PairLogps
from ropo.train.dataset import PairDataset

Floats = NDArray[np.float64]

ALPHA_OF_PAPER = 14.0

_SURE = 1.6449  # standard errors from 0 that chance reaches in 5 % of cases

_SIGNS: Mapping[str | None, float] = {"wrong": -1.0, "drop": 0.0}


@dataclass(frozen=True, kw_only=True, eq=False)
class Labels:
    """What is known of each label before anything is learned; each of shape (pairs,).

    Attributes:
        pairs: Whose labels they are.
        sign: +1 where the label stands, −1 where a person has called it wrong, 0 where the pair is to be left out.
        is_known: Whether it is known to be right or wrong; of trusted pairs it is.
        is_trusted: Which pairs are no part of the data.
        is_vouched: Of which pairs of the data the label is that of a trusted pair.
    """

    pairs: Sequence[Pair]
    sign: Floats
    is_known: NDArray[np.bool_]
    is_trusted: NDArray[np.bool_]
    is_vouched: NDArray[np.bool_]

    @classmethod
    def of(cls, pairs: Sequence[Pair]) -> "Labels":
        """Of pairs as labelled, with their verdicts."""
        is_trusted = np.array([pair.origin == "trusted" for pair in pairs], dtype=bool)
        is_judged = np.array([pair.verdict in ("right", "wrong") for pair in pairs], dtype=bool)
        return cls(
            pairs=pairs,
            sign=np.array([_SIGNS.get(pair.verdict, 1.0) for pair in pairs]),
            is_known=is_trusted | is_judged,
            is_trusted=is_trusted,
            is_vouched=is_judged & np.array([pair.is_vouched for pair in pairs], dtype=bool),
        )

    @cached_property
    def clusters(self) -> NDArray[np.str_]:
        """The same name for copies of one pair, which are one piece of evidence."""
        return np.array([text_id(pair) for pair in self.pairs])

    @property
    def is_open(self) -> NDArray[np.bool_]:
        """Which labels nobody has vouched for or judged."""
        return np.asarray((self.sign != 0) & ~self.is_known)

    @property
    def is_reviewed(self) -> NDArray[np.bool_]:
        """Which labels of the data are known."""
        return np.asarray(self.is_known & ~self.is_trusted)

    def share_of_open(self, share: float) -> float:
        """The share of flipped labels among the open ones, from that among all of the data, reviewed ones counted."""
        if not self.is_reviewed.any():
            return share
        num_left = share * ((self.sign != 0) & ~self.is_trusted).sum() - (self.is_reviewed & (self.sign < 0)).sum()
        return float(np.clip(num_left / max(self.is_open.sum(), 1), 0.0, 0.5))


class Why(StrEnum):
    """Why ρ, α or β is what it is; `ropo.report` has a clause for each."""

    GIVEN = "given"
    ESTIMATED = "estimated"
    FILTER_HELPS = "filter_helps"
    MAY_BE_CLEAN = "may_be_clean"
    CANNOT_TELL = "cannot_tell"
    AFTER_FILTER = "after_filter"
    NOT_ESTIMATED = "not_estimated"
    SAME_DISTANCE = "same_distance"


CHOICES = ("rho", "alpha", "beta")
"""What an audit chooses for the training, each a `Choice`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A value that follows from what is known, why it is that, and the numbers that it follows from, by name."""

    value: float
    why: Why
    facts: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> "Choice":
        """Of what `asdict` gave."""
        return cls(value=found["value"], why=Why(found["why"]), facts=found.get("facts", {}))


def evidence_for(margins: Floats, p_flip: Floats, estimate: FlipEstimate) -> Floats:
    """What speaks for each label, below 0 where more speaks against it, shape (pairs,): its held-out margin.

    Where annotators have rates of their own, a label of one who is often wrong needs more in its favour: it is then how
    far P(flipped) is below that of a label of which nothing is known but the rate of all. For equal rates this has the
    sign and the order of the margins.

    Args:
        margins: Held-out, shape (pairs,).
        p_flip: P(flipped) at the rate of each pair's annotator, shape (pairs,).
        estimate: Of the flip rate.
    """
    has_rates = estimate.is_informative and estimate.rate > 0 and bool(estimate.annotators)
    return estimate.rate - p_flip if has_rates else margins


def filter_pays(gain: Gain | None, *, p_flip: Floats) -> bool:
    """Whether a training should do without the pairs that held-out margins contradict.

    Margins say nothing of lengths, so where labels follow lengths and are right, half of the pairs look contradicted,
    and models without these agree better with what lengths leave of the labels. A training learns whole labels. So a
    gain that is a loss once lengths count is believed only if the likeliest rate makes flips of most of these pairs.

    Args:
        gain: Of models that were fitted without those pairs; None where it was not tried.
        p_flip: P(flipped) of each of them, whether or not a rate can be told.
    """
    if gain is None or not gain.helps or not len(p_flip):
        return False
    return not gain.rests_on_covariates or float(p_flip.mean()) > 0.5


def resolve_rho(
    fixed: float | None,
    estimate: FlipEstimate,
    *,
    contradicted: float = 0.0,
    of_open: Callable[[float], float] = float,
) -> Choice:
    """The share of pairs to filter out.

    Args:
        fixed: What the user gave, or None to follow the estimate.
        estimate: Of the flip rate.
        contradicted: Share of labels that held-out margins contradict (`evidence_for`), if models are better without.
        of_open: What a share of all labels is of those without a review decision, see `Labels.share_of_open`.

    Returns:
        ρ in [0, 0.5]: the estimated rate if it can be told and its interval excludes 0, else 0; but no less than
        `contradicted`. Where wrong labels have a rule, such as errors between responses that are nearly as good, the
        rate reads too low, and what is contradicted is wrong all the same.
    """
    if fixed is not None:
        return Choice(value=fixed, why=Why.GIVEN)
    is_told = estimate.is_informative and of_open(estimate.low) > 0.0
    rate = of_open(estimate.rate) if is_told else 0.0
    if contradicted > rate:
        rate, why = contradicted, Why.FILTER_HELPS
    elif is_told:
        why = Why.ESTIMATED
    else:
        why = Why.MAY_BE_CLEAN if estimate.is_informative else Why.CANNOT_TELL
    facts = {"low": estimate.low, "high": estimate.high, "contradicted": contradicted}
    return Choice(value=min(rate, 0.5), why=why, facts=facts)


def resolve_rule(given: str, rho: Choice) -> str:
    """The name of the decision rule that was given or, for "auto", that suits ρ."""
    if given != "auto":
        return given
    # A share that was given, or a filter that was tried, is taken away as it is; else likelier right pairs are spared.
    return "lowest_loss" if rho.why in (Why.GIVEN, Why.FILTER_HELPS) else "threshold"


def resolve_alpha(fixed: float | None, *, is_audited: bool) -> Choice:
    """The α of the robust loss: as given; else 0, which is DPO, on what an audit has kept, and the paper's without one.

    Examples:
        >>> resolve_alpha(None, is_audited=True).value, resolve_alpha(None, is_audited=False).value
        (0.0, 14.0)
    """
    if fixed is not None:
        return Choice(value=fixed, why=Why.GIVEN)
    if not is_audited:
        return Choice(value=ALPHA_OF_PAPER, why=Why.NOT_ESTIMATED)
    return Choice(value=0.0, why=Why.AFTER_FILTER)


def resolve_beta(
    given: float, margins: Floats, *, before: Floats, after: Floats, clusters: Clusters | None = None
) -> Choice:
    """The β with which filtered labels move a model about as far from the reference as all labels would with `given`.

    To first order the margin of a fine-tuned model is linear in its parameters, h_i = β·g_i·δ. So the gradient that
    labels give along a direction δ is in proportion to their mean margin under it: flips pull back, and shorten the
    way by 1 − 2ε if they are a share ε. Labels without them pull harder, by as much as their mean margin is larger,
    and the optimum, at which β times the log-ratio has a given size, is farther away by that factor.

    Args:
        given: β of a training on all labels.
        margins: Held-out margin of each pair as the data labels it, shape (pairs,).
        before: Signed weight of each label without a filter, shape (pairs,); negative for one that is swapped.
        after: The same as they are trained on.
        clusters: Names of copies, which say no more than one of them, one for each pair.

    Returns:
        β, as given where the labels do not pull harder than before, or where the pull of all of them may be none: what
        is divided by it would be a factor of any size.

    Examples:
        >>> margins = np.array([1.0, 1.0, 1.0, -1.0] * 5)
        >>> resolve_beta(0.3, margins, before=np.ones(20), after=np.where(margins > 0, 1.0, 0.0))
        Choice(value=0.6, why=<Why.SAME_DISTANCE: 'same_distance'>, facts={'given': 0.3, 'factor': 2.0})
    """
    sizes = [max(float(np.abs(weights).sum()), 1e-12) for weights in (before, after)]
    pulls = [float(weights @ margins) / size for weights, size in zip((before, after), sizes, strict=True)]
    deviations: NDArray[Any] = before * (np.sign(before) * margins - pulls[0])
    if clusters is not None:
        deviations = np.bincount(np.unique(np.asarray(clusters), return_inverse=True)[1], weights=deviations)
    error = float(np.linalg.norm(deviations)) / sizes[0]
    if not _SURE * error < pulls[0] < pulls[1]:
        return Choice(value=given, why=Why.GIVEN)
    factor = pulls[1] / pulls[0]
    return Choice(value=given * factor, why=Why.SAME_DISTANCE, facts={"given": given, "factor": factor})


def decide_all(
    data: PairDataset, margins: Floats, p_flip: Floats, *, rho: Choice, rule: str
) -> tuple[NDArray[np.str_], Floats]:
    """Obey the review decisions, and decide about the rest by a rule.

    Args:
        data: The pairs, without resampled ones.
        margins: Shape (pairs,).
        p_flip: Shape (pairs,).
        rho: The share of the pairs without a review decision that the budget takes away.
        rule: A name in `RULES`, or "auto".

    Returns:
        "keep", "drop" or "flip" for each pair, and its weight times the one it has in the data.
    """
    labels = Labels.of(data.pairs)
    decisions = np.select([labels.sign > 0, labels.sign < 0], ["keep", "flip"], "drop").astype("<U8")
    weights, is_open = np.abs(labels.sign), labels.is_open
    if is_open.any():
        found = decide(margins[is_open], p_flip[is_open], rho=rho.value, rule=resolve_rule(rule, rho))
        decisions[is_open], weights[is_open] = found.decision, found.weight
    return decisions, weights * [pair.weight for pair in data.pairs]


def training_set(data: PairDataset, weights: Floats, is_flipped: NDArray[np.bool_]) -> PairDataset:
    """Pairs of `data` with a positive weight, in order, with chosen and rejected swapped where `is_flipped`.

    Raises:
        ValueError: If no pair is left.
    """
    kept = np.flatnonzero(np.asarray(weights) > 0).tolist()
    if not kept:
        raise ValueError("Training needs at least one pair with a weight above 0; got none. Lower rho.")
    training = data.select(kept)
    flipped = torch.from_numpy(np.asarray(is_flipped)[kept])
    for i in flipped.nonzero().flatten().tolist():
        pair, ids = training.pairs[i], training.tokens[i]
        training.pairs[i] = replace(pair, chosen=pair.rejected, rejected=pair.chosen)
        training.tokens[i] = replace(ids, chosen=ids.rejected, rejected=ids.chosen)
    if (old := training.reference) is not None:
        training.reference = PairLogps(
            chosen=torch.where(flipped, old.rejected, old.chosen),
            rejected=torch.where(flipped, old.chosen, old.rejected),
        )
    training.weights = [float(weights[i]) for i in kept]
    return training
