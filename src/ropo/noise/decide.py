"""What to do with each pair: keep, drop or flip it, and how much it weighs, within a budget.

In: margin and P(flipped) of each pair, ρ, the share of pairs that the budget takes away, and for some rules the margins
at several checks. Out: `Decisions`.

The one idea: ROPO minimises Σ w·ℓ over weights in [0, 1] with Σ w = N_ρ. Every loss that falls with the margin ranks
pairs alike, so a rule needs no loss, only the margins; the rules differ in what else they believe.

Add a rule: one function, one line in `RULES`, one recovery test.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
from jaxtyping import Float, Shaped
from scipy.special import entr, expit

from ropo.noise.clusters import PerPair
from ropo.noise.estimate import check_margins
from ropo.spelling import did_you_mean

Rule = Callable[..., "Decisions"]
Checks = Float[np.ndarray, "checks pairs"]
Judge = Callable[[Shaped[np.ndarray, " asked"]], Float[np.ndarray, " asked"]]
"""Says for positions of pairs how likely their labels are wrong, in [0, 1]: a person, a reward model, an LLM."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Decisions:
    """What happens to each pair.

    Attributes:
        decision: "keep", "drop" or "flip" (swap chosen and rejected, then keep); shape (pairs,).
        weight: Weight of the pair in training, in [0, 1]; 0 exactly where it is dropped.
    """

    decision: Shaped[np.ndarray, " pairs"]
    weight: PerPair


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleSpec:
    """A decision rule and what it needs.

    Attributes:
        fn: (margins, p_flip, num_kept, its options, and `checks` and `judge` if it needs checks) -> Decisions.
        meaning: One sentence for the docs and the report.
        total_weight: What the weights sum to, N_ρ being N − ⌊ρN⌋.
        options: The options it takes, with their defaults.
        needs_checks: Whether it compares margins of several checks.
        takes_judge: Whether it can ask a judge about what it cannot settle.
        source: Whose idea it is.
    """

    fn: Rule
    meaning: str
    total_weight: str
    options: Mapping[str, float] = field(default_factory=dict)
    needs_checks: bool = False
    takes_judge: bool = False
    source: str = "ours"


def num_keep(num_pairs: int, rho: float) -> int:
    """N_ρ = N − ⌊ρN⌋, the number of pairs that the budget leaves.

    In floats 0.29·100 is 28.999..., of which the floor would be one too few; hence the 1e-9.

    Args:
        num_pairs: N.
        rho: ρ, the share taken away.

    Returns:
        Number of pairs kept.

    Examples:
        >>> num_keep(10, 0.3), num_keep(100, 0.29), num_keep(7, 0.1)
        (7, 71, 7)
    """
    return num_pairs - int(np.floor(rho * num_pairs + 1e-9))


def decide(
    margins: np.ndarray,
    p_flip: np.ndarray,
    *,
    rho: float,
    rule: str = "lowest_loss",
    checks: np.ndarray | None = None,
    judge: Judge | None = None,
    **options: float,
) -> Decisions:
    """Decide about every pair by one of the `RULES`.

    With `lowest_loss` this is ROPO's filtering step, exactly: the weights that minimise Σ w·ℓ with Σ w = N_ρ and
    0 ≤ w ≤ 1 are 1 for the N_ρ smallest losses (the largest margins) and 0 for the rest. The other rules are not the
    paper's. At ρ = 0 every rule keeps every pair with weight exactly 1.

    Args:
        margins: Margin of each pair, whatever its unit.
        p_flip: P(flipped) of each pair, from `estimate_flips`.
        rho: ρ, the share of pairs that the budget takes away, in [0, 0.5].
        rule: A name in `RULES`.
        checks: Margins at several checks of the training (or views of the model), shape (checks, pairs); needed by
            the rules that compare them, ignored by the others.
        judge: Only for `hard_or_noisy`: asked about the pairs that the checks cannot settle.
        **options: Those of the rule, see `RULES`; each a share or a probability.

    Returns:
        A decision and a weight per pair.

    Raises:
        ValueError: If a value is out of its range, the shapes differ, a margin is not finite, the rule is unknown, it
            needs checks and there are none, or an option is given that the rule would ignore.

    Examples:
        >>> found = decide(np.array([2.0, -1.0, 0.5, -3.0]), np.array([0.0, 0.6, 0.1, 0.9]), rho=0.25)
        >>> found.decision.tolist(), found.weight.tolist()
        (['keep', 'keep', 'keep', 'drop'], [1.0, 1.0, 1.0, 0.0])
    """
    if rule not in RULES:
        close = did_you_mean(rule, RULES)
        raise ValueError(f"decide needs a rule of RULES; got {rule!r}.{close} There are: {', '.join(RULES)}.")
    spec = RULES[rule]
    for name, value in options.items():
        if name not in spec.options:
            takers = ", ".join(repr(other) for other in RULES if name in RULES[other].options)
            use = f"use {takers}" if takers else f"it takes {', '.join(spec.options) or 'none'}"
            raise ValueError(f"decide needs no {name} for rule {rule!r}; got {value}. Leave it out, or {use}.")
        _check_share(name, value, highest=1.0, advice="It is a share or a probability.")
    if judge is not None and not spec.takes_judge:
        raise ValueError(f"decide needs no judge for rule {rule!r}; got one. Leave it out, or use 'hard_or_noisy'.")
    _check_share("rho", rho, highest=0.5, advice="Above one half most labels would be wrong: swap chosen and rejected.")
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
    given: dict[str, object] = {**spec.options, **options}
    if spec.needs_checks:
        given["checks"] = _checked(checks, rule, len(margins))
    if spec.takes_judge:
        given["judge"] = judge
    return spec.fn(margins, p_flip, num_keep(len(margins), rho), **given)


def _checked(checks: np.ndarray | None, rule: str, num_pairs: int) -> Checks:
    if checks is None or np.ndim(checks) != 2 or len(checks) < 2 or np.shape(checks)[1] != num_pairs:
        got = "none" if checks is None else f"shape {np.shape(checks)}"
        raise ValueError(
            f"decide needs the margins of two or more checks for rule {rule!r}, shape (checks, {num_pairs}); got {got}."
            " Pass checks=, or use a rule that looks at one margin per pair."
        )
    checks = np.asarray(checks, dtype=np.float64)
    if not np.isfinite(checks).all():
        raise ValueError("decide needs finite checks; got some that are not. Leave out checks of a diverged model.")
    return checks


def _check_share(name: str, value: float, *, highest: float, advice: str) -> None:
    if not 0.0 <= value <= highest:
        raise ValueError(f"decide needs {name} in [0, {highest:g}]; got {value}. {advice}")


def lowest_loss(margins: PerPair, p_flip: PerPair, num_kept: int) -> Decisions:
    """Keep the `num_kept` largest margins; of equal ones the earlier stays."""
    del p_flip  # the paper's rule looks at the loss alone
    weight = np.zeros(len(margins))
    weight[np.argsort(-margins, kind="stable")[:num_kept]] = 1.0
    return Decisions(decision=np.where(weight == 1.0, "keep", "drop"), weight=weight)


def posterior(margins: PerPair, p_flip: PerPair, num_kept: int) -> Decisions:
    """Weigh each pair by the probability that its label is right, scaled to the budget.

    ::

        w = min(1, λ·(1 − p_flip)) with the λ at which Σ w = N_ρ

    Found as water fills a vessel: the surest pairs reach 1 first, and what is left of the budget is shared by the
    others in proportion. At ρ equal to the mean of `p_flip` λ is 1 and the weights are 1 − p_flip. When fewer pairs
    than N_ρ have any chance of being right, those have weight 1 and the others share the rest evenly.
    """
    del margins
    p_right = 1.0 - p_flip
    weight = np.zeros(len(p_right))
    hopeful = p_right > 0
    if np.count_nonzero(hopeful) <= num_kept:
        weight[hopeful] = 1.0
        if not hopeful.all():
            weight[~hopeful] = (num_kept - np.count_nonzero(hopeful)) / np.count_nonzero(~hopeful)
    else:
        falling = np.sort(p_right)[::-1]
        left = np.cumsum(falling[::-1])[::-1]  # mass of the pairs that are not full, if the first k are
        level = (num_kept - np.arange(num_kept)) / left[:num_kept]
        weight = np.minimum(1.0, level[np.flatnonzero(level * falling[:num_kept] <= 1.0 + 1e-12)[0]] * p_right)
    return Decisions(decision=np.where(weight > 0, "keep", "drop"), weight=weight)


def threshold(margins: PerPair, p_flip: PerPair, num_kept: int, *, drop_above: float) -> Decisions:
    """Drop pairs that are more likely flipped than `drop_above`, the likeliest first, and no more than the budget.

    Here the budget is a ceiling: on clean data nothing exceeds the threshold and nothing is lost, whatever ρ says.
    """
    order = np.lexsort((-np.arange(len(margins)), margins, -p_flip))  # equal ones: smaller margin first, then the later
    dropped = order[: len(margins) - num_kept]
    weight = np.ones(len(margins))
    weight[dropped[p_flip[dropped] > drop_above]] = 0.0
    return Decisions(decision=np.where(weight == 1.0, "keep", "drop"), weight=weight)


def relabel(margins: PerPair, p_flip: PerPair, num_kept: int, *, flip_above: float) -> Decisions:
    """Take the same pairs as `lowest_loss`, but flip instead of dropping where the flip is nearly certain.

    A flipped pair teaches again, with weight 1. Keep `flip_above` high: a right label that is flipped costs as much
    as a wrong one that is kept.
    """
    found = lowest_loss(margins, p_flip, num_kept)
    flipped = (found.weight == 0.0) & (p_flip > flip_above)
    return Decisions(decision=np.where(flipped, "flip", found.decision), weight=np.where(flipped, 1.0, found.weight))


def damped_loss(loss: PerPair | Checks) -> PerPair | Checks:
    """ψ(ℓ) = log(1 + ℓ + ℓ²/2): grows with the logarithm, so that one check with a huge loss does not decide alone.

    Examples:
        >>> damped_loss(np.array([0.2, 0.5, 3.0])).round(6).tolist()
        [0.198851, 0.485508, 2.140066]
    """
    return np.asarray(np.log1p(loss + loss**2 / 2))


def lower_bound(loss: Checks, times_kept: PerPair, *, variance: float) -> PerPair:
    """The lower bound of a pair's damped loss over checks: pairs that were seldom kept get a larger discount.

    ::

        ℓ* = max(0, mean ψ(ℓ) − σ²·(s + σ²·log(2s)/s²) / (n − σ²))      (arXiv:2405.11272)
        s checks, n = 1 + times kept

    Args:
        loss: DPO loss of each pair at each check, shape (checks, pairs).
        times_kept: At how many checks the pair was among those kept.
        variance: σ², how large the discount is.

    Returns:
        The bound, shape (pairs,), nats.
    """
    s = len(loss)
    discount = variance * (s + variance * np.log(2 * s) / s**2) / (1.0 + times_kept - variance)
    bound: PerPair = np.maximum(0.0, damped_loss(loss).mean(axis=0) - discount)
    return bound


def double_correction(
    margins: PerPair, p_flip: PerPair, num_kept: int, *, checks: Checks, variance: float, flip_share: float
) -> Decisions:
    """Drop the largest lower bounds of the loss over checks, and flip the surest of them instead.

    The first correction lets hard pairs come back: a pair that some checks find right, or that was seldom trained on,
    has a lower bound than one that all find wrong. The second relabels, but only the top.
    """
    loss = np.logaddexp(0.0, -checks)
    ranks = np.argsort(np.argsort(loss, axis=1, kind="stable"), axis=1)
    bound = lower_bound(loss, (ranks < num_kept).sum(axis=0).astype(np.float64), variance=variance)
    order = np.lexsort((margins, -bound))  # equal bounds: the smaller margin first
    dropped = order[: len(margins) - num_kept]
    flipped = dropped[: int(np.floor(flip_share * len(dropped) + 1e-9))]
    flipped = flipped[p_flip[flipped] > 0.5]
    weight = np.ones(len(margins))
    weight[dropped] = 0.0
    weight[flipped] = 1.0
    decision = np.where(weight == 1.0, "keep", "drop")
    decision[flipped] = "flip"
    return Decisions(decision=decision, weight=weight)


def disagreement(p_right: Checks) -> PerPair:
    """Mutual information between a label and the check that judges it, over log 2: H(mean p) − mean H(p), in [0, 1].

    UPO's uncertainty (arXiv:2409.11212), with checks of the training in place of dropout masks: language models are
    trained without dropout.

    Examples:
        >>> (disagreement(np.array([[0.9], [0.1], [0.5], [0.5]])) * np.log(2)).round(6).tolist()
        [0.184032]
    """

    def entropy(p: np.ndarray) -> np.ndarray:
        found: np.ndarray = entr(p) + entr(1.0 - p)
        return found

    gained = entropy(p_right.mean(axis=0)) - entropy(p_right).mean(axis=0)
    share: PerPair = np.clip(gained / np.log(2.0), 0.0, 1.0)
    return share


def uncertainty(margins: PerPair, p_flip: PerPair, num_kept: int, *, checks: Checks) -> Decisions:
    """Weigh each pair by how likely its label is right and how far the checks agree on it, scaled to the budget.

    ::

        w ∝ (1 − p_flip)·(1 − B/log 2),   Σ w = N_ρ,   B the disagreement of the checks         (after arXiv:2409.11212)

    As printed, UPO's weights cancel and its labels turn round; this is the reading that can be used.
    """
    if num_kept == len(margins):
        return posterior(margins, np.zeros(len(margins)), num_kept)
    return posterior(margins, 1.0 - (1.0 - p_flip) * (1.0 - disagreement(expit(checks))), num_kept)


def hard_or_noisy(
    margins: PerPair,
    p_flip: PerPair,
    num_kept: int,
    *,
    checks: Checks,
    judge: Judge | None,
) -> Decisions:
    """Of the pairs in the budget, drop those with a low margin at all checks, keep those that are merely hard.

    ::

        noisy: mean + sd < 0 over the checks     hard: mean ≥ 0     between: ask the judge, or else look at p_flip > ½

    After LLMHD (arXiv:2409.10343): a loss cannot tell hard pairs from wrong ones, its course over training can; what
    lies between may be worth a judge. The budget is a ceiling.
    """
    mean, spread = checks.mean(axis=0), checks.std(axis=0)
    suspects = np.lexsort((np.arange(len(margins)), margins))[: len(margins) - num_kept]
    is_noisy = mean[suspects] + spread[suspects] < 0
    is_between = ~is_noisy & (mean[suspects] < 0)
    asked = suspects[is_between]
    verdict = np.asarray(judge(asked), dtype=np.float64) if judge is not None and len(asked) else p_flip[asked]
    if verdict.shape != asked.shape:
        raise ValueError(f"A judge needs to give one number per pair, {len(asked)}; got shape {verdict.shape}.")
    is_noisy[is_between] = verdict > 0.5
    weight = np.ones(len(margins))
    weight[suspects[is_noisy]] = 0.0
    return Decisions(decision=np.where(weight == 1.0, "keep", "drop"), weight=weight)


RULES: Mapping[str, RuleSpec] = MappingProxyType(
    {
        "lowest_loss": RuleSpec(
            fn=lowest_loss,
            meaning="Drop the ⌊ρN⌋ pairs with the largest loss.",
            total_weight="N_ρ",
            source="ROPO, arXiv:2404.04102",
        ),
        "posterior": RuleSpec(
            fn=posterior,
            meaning="Drop nothing, but weigh each pair by the probability that its label is right.",
            total_weight="N_ρ",
        ),
        "threshold": RuleSpec(
            fn=threshold,
            meaning="Drop pairs that are likelier flipped than a threshold, at most ⌊ρN⌋ of them.",
            total_weight="N_ρ or more: what the threshold spares stays",
            options=MappingProxyType({"drop_above": 0.5}),
        ),
        "relabel": RuleSpec(
            fn=relabel,
            meaning="Of the ⌊ρN⌋ pairs with the largest loss, flip the nearly certain ones and drop the others.",
            total_weight="N_ρ plus the number of flipped pairs",
            options=MappingProxyType({"flip_above": 0.95}),
        ),
        "double_correction": RuleSpec(
            fn=double_correction,
            meaning="Drop the ⌊ρN⌋ largest lower bounds of the loss over checks; flip the surest quarter of them.",
            total_weight="N_ρ plus the number of flipped pairs",
            options=MappingProxyType({"variance": 1e-4, "flip_share": 0.25}),
            needs_checks=True,
            source="DCF, arXiv:2405.11272",
        ),
        "uncertainty": RuleSpec(
            fn=uncertainty,
            meaning="Weigh each pair by the probability that its label is right and by how far the checks agree.",
            total_weight="N_ρ",
            needs_checks=True,
            source="UPO, arXiv:2409.11212, repaired",
        ),
        "hard_or_noisy": RuleSpec(
            fn=hard_or_noisy,
            meaning="Of ⌊ρN⌋ suspects drop those surely below 0 over the checks; a judge may settle the doubtful ones.",
            total_weight="N_ρ or more: what is merely hard stays",
            needs_checks=True,
            takes_judge=True,
            source="LLMHD, arXiv:2409.10343",
        ),
    }
)
"""The decision rules by name."""


def rules_table() -> str:
    """`RULES` as a Markdown table, for `docs/methods.md`."""
    rows = []
    for name, spec in RULES.items():
        options = ", ".join(f"`{option}` {value:g}" for option, value in spec.options.items()) or "none"
        rows.append(f"| `{name}` | {spec.meaning} | {spec.total_weight} | {options} | {spec.source} |")
    head = ["| rule | what it does | weights sum to | options | source |", "|---|---|---|---|---|"]
    return "\n".join([*head, *rows])
