"""What to do with each pair: keep, drop or flip it, and how much it weighs, within a budget.

In: margin and P(flipped) of each pair, and ρ, the share of pairs that the budget takes away. Out: `Decisions`.

The one idea: ROPO minimises Σ w·ℓ over weights in [0, 1] with Σ w = N_ρ. Every loss that falls with the margin ranks
pairs alike, so a rule needs no loss, only the margins; the rules differ in what else they believe.

Add a rule: one function, one line in `RULES`, one recovery test.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from jaxtyping import Shaped

from ropo.noise.estimate import check_margins
from ropo.noise.shares import PerPair
from ropo.spelling import did_you_mean

DROP_ABOVE, FLIP_ABOVE = 0.5, 0.95
"""P(flipped) above which `threshold` drops and `relabel` flips. A right label that is flipped costs as much as a wrong
one that is kept, hence the high one."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Decisions:
    """What happens to each pair.

    Attributes:
        decision: "keep", "drop" or "flip" (swap chosen and rejected, then keep); shape (pairs,).
        weight: Weight of the pair in training, in [0, 1]; 0 exactly where it is dropped.
    """

    decision: Shaped[np.ndarray, " pairs"]
    weight: PerPair


@dataclass(frozen=True, slots=True)
class RuleSpec:
    """A decision rule.

    Attributes:
        fn: (margins, p_flip, num_kept) -> Decisions.
        meaning: One sentence for the docs and the report.
        total_weight: What the weights sum to, N_ρ being N − ⌊ρN⌋.
        source: Whose idea it is.
    """

    fn: Callable[[PerPair, PerPair, int], Decisions]
    meaning: str
    total_weight: str
    source: str = "ours"


def num_keep(num_pairs: int, rho: float) -> int:
    """N_ρ = N − ⌊ρN⌋, the number of pairs that the budget leaves.

    Examples:
        >>> num_keep(10, 0.3), num_keep(100, 0.29), num_keep(7, 0.1)
        (7, 71, 7)
    """
    return num_pairs - int(np.floor(rho * num_pairs + 1e-9))  # in floats 0.29·100 is 28.999...


def decide(margins: np.ndarray, p_flip: np.ndarray, *, rho: float, rule: str = "lowest_loss") -> Decisions:
    """Decide about every pair by one of the `RULES`.

    With `lowest_loss` this is ROPO's filtering step, exactly: the weights that minimise Σ w·ℓ with Σ w = N_ρ and
    0 ≤ w ≤ 1 are 1 for the N_ρ smallest losses (the largest margins) and 0 for the rest. The other rules are not the
    paper's. At ρ = 0 every rule keeps every pair with weight exactly 1.

    Args:
        margins: Margin of each pair, whatever its unit, shape (pairs,).
        p_flip: P(flipped) of each pair, from `estimate_flips`, shape (pairs,).
        rho: ρ, the share of pairs that the budget takes away, in [0, 0.5].
        rule: A name in `RULES`.

    Returns:
        A decision and a weight per pair.

    Raises:
        ValueError: If a value is out of its range, the shapes differ, a margin is not finite, or the rule is unknown.

    Examples:
        >>> decisions = decide(np.array([2.0, -1.0, 0.5, -3.0]), np.array([0.0, 0.6, 0.1, 0.9]), rho=0.25)
        >>> decisions.decision.tolist(), decisions.weight.tolist()
        (['keep', 'keep', 'keep', 'drop'], [1.0, 1.0, 1.0, 0.0])
    """
    if rule not in RULES:
        close = did_you_mean(rule, RULES)
        raise ValueError(f"decide needs a rule of RULES; got {rule!r}.{close} There are: {', '.join(RULES)}.")
    if not 0.0 <= rho <= 0.5:
        raise ValueError(
            f"decide needs rho in [0, 0.5]; got {rho}. Above one half most labels would be wrong: swap chosen and "
            "rejected."
        )
    margins = check_margins(margins, what="decide")
    p_flip = np.asarray(p_flip, dtype=np.float64)
    if p_flip.shape != margins.shape:
        raise ValueError(
            f"decide needs one p_flip per margin, {len(margins)}; got {p_flip.shape}. Both from the same pairs."
        )
    bad = np.flatnonzero(~((p_flip >= 0.0) & (p_flip <= 1.0)))
    if len(bad):
        raise ValueError(
            f"decide needs p_flip in [0, 1]; got {p_flip[bad[0]]} at position {bad[0]}. Pass probabilities."
        )
    return RULES[rule].fn(margins, p_flip, num_keep(len(margins), rho))


def lowest_loss(margins: PerPair, p_flip: PerPair, num_kept: int) -> Decisions:
    """Keep the `num_kept` largest margins; of equal ones the earlier stays."""
    del p_flip  # the paper's rule looks at the loss alone
    weight = np.zeros(len(margins))
    weight[np.argsort(-margins, kind="stable")[:num_kept]] = 1.0
    return _kept(weight)


def posterior(margins: PerPair, p_flip: PerPair, num_kept: int) -> Decisions:
    """Weigh each pair by the probability that its label is right, scaled to the budget.

    ::

        w = min(1, λ·(1 − p_flip)) with the λ at which Σ w = N_ρ

    At ρ equal to the mean of `p_flip` λ is 1. When fewer pairs than N_ρ have any chance of being right, those have
    weight 1 and the others share the rest evenly.
    """
    del margins
    p_right = 1.0 - p_flip
    weight = np.zeros(len(p_right))
    hopeful = p_right > 0
    if np.count_nonzero(hopeful) <= num_kept:
        weight[hopeful] = 1.0
        if not hopeful.all():
            weight[~hopeful] = (num_kept - np.count_nonzero(hopeful)) / np.count_nonzero(~hopeful)
    else:  # as water fills a vessel: the surest reach 1 first, the others share what is left in proportion
        falling = np.sort(p_right)[::-1]
        left = np.cumsum(falling[::-1])[::-1]  # mass of the pairs that are not full, if the first k are
        level = (num_kept - np.arange(num_kept)) / left[:num_kept]
        weight = np.minimum(1.0, level[np.flatnonzero(level * falling[:num_kept] <= 1.0 + 1e-12)[0]] * p_right)
    return _kept(weight)


def threshold(margins: PerPair, p_flip: PerPair, num_kept: int) -> Decisions:
    """Drop pairs whose P(flipped) is above `DROP_ABOVE`, the likeliest first; the budget is a ceiling."""
    order = np.lexsort((-np.arange(len(margins)), margins, -p_flip))  # equal ones: smaller margin first, then the later
    dropped = order[: len(margins) - num_kept]
    weight = np.ones(len(margins))
    weight[dropped[p_flip[dropped] > DROP_ABOVE]] = 0.0
    return _kept(weight)


def relabel(margins: PerPair, p_flip: PerPair, num_kept: int) -> Decisions:
    """Take the pairs that `lowest_loss` drops, but flip them where P(flipped) is above `FLIP_ABOVE`, with weight 1."""
    filtered = lowest_loss(margins, p_flip, num_kept)
    is_flipped = (filtered.weight == 0.0) & (p_flip > FLIP_ABOVE)
    return Decisions(
        decision=np.where(is_flipped, "flip", filtered.decision), weight=np.where(is_flipped, 1.0, filtered.weight)
    )


def _kept(weight: PerPair) -> Decisions:
    """Keep what has weight."""
    return Decisions(decision=np.where(weight > 0, "keep", "drop"), weight=weight)


RULES: Mapping[str, RuleSpec] = MappingProxyType(
    {
        "lowest_loss": RuleSpec(
            lowest_loss, "Drop the ⌊ρN⌋ pairs with the largest loss.", "N_ρ", "ROPO, arXiv:2404.04102"
        ),
        "posterior": RuleSpec(
            posterior, "Drop nothing, but weigh each pair by the probability that its label is right.", "N_ρ"
        ),
        "threshold": RuleSpec(
            threshold,
            f"Drop pairs with P(flipped) above {DROP_ABOVE}, at most ⌊ρN⌋ of them.",
            "N_ρ or more: what the threshold spares stays",
        ),
        "relabel": RuleSpec(
            relabel,
            f"Of the ⌊ρN⌋ pairs with the largest loss, flip those with P(flipped) above {FLIP_ABOVE}, drop the rest.",
            "N_ρ plus the number of flipped pairs",
        ),
    }
)
"""The decision rules by name."""


def rules_table() -> str:
    """`RULES` as a Markdown table, for `docs/noise.md`."""
    rows = ["| rule | what it does | weights sum to | source |", "|---|---|---|---|"]
    rows += [f"| `{name}` | {one.meaning} | {one.total_weight} | {one.source} |" for name, one in RULES.items()]
    return "\n".join(rows)
