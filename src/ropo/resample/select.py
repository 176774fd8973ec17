"""Which sampled responses become new pairs (robustness-guided rejection sampling).

In: candidate pairs, each a sampled response with one of the two original responses of its prompt, and their margins.
Out: at most one candidate per prompt, the prompts that the rule could not settle, and why others were refused.

The paper states the purpose (to make up for the information in discarded queries, guided by the robust loss), not
the procedure (arXiv:2404.04102v2, abstract). The procedure here is ours: the robust loss falls with the margin, so of
the two orientations of a candidate pair the loss always prefers the one that the policy prefers; the pair is therefore
oriented by the sign of its margin. How reliable this sign is depends on the model that was sampled: a policy rates its
own samples above other responses (docs/resampling.md).

Add a rule: write a function `Field -> position or None`, and add a line to SELECTION_RULES.
Add a guard: a field in `Guards` whose default lets everything pass, a reason in `Refusal`, and the line in `_refusal`
that reads it.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from ropo.pairs import Pair, Text

Floats = NDArray[np.float64]

_WORDS_PER_GRAM = 3  # of the repetition guard


class Refusal(StrEnum):
    """Why a sample, a candidate or a prompt was not used."""

    UNFINISHED = "response did not end within max_new_tokens"
    CONTROL_TOKEN = "response holds a control token"
    NOT_NEW = "no new text once tokenized"
    CUT = "response is cut to max_length"
    EMPTY = "empty response"
    SAME_TEXT = "same text as an original response"
    LENGTHS = "lengths too different"
    REPETITION = "response repeats itself"
    COPIES = "same response to many prompts"
    NO_MARGIN = "margin is not a number"
    EXTREME_MARGIN = "margin too extreme to be believed"
    HIGH_LOSS = "loss above that of every kept pair"
    DISAGREEMENT = "the model half way through training disagrees"
    NOT_BEST = "another candidate was better"
    OVER_LIMIT = "more new pairs than max_resampled_share allows"
    PROMPT_WITHOUT_USABLE = "prompt without a usable candidate"
    PROMPT_UNSETTLED = "prompt without a candidate that the rule takes"


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A sampled response beside one original response of its prompt.

    Attributes:
        parent: The dropped pair whose prompt was answered.
        sampled: The sampled response.
        original: One of the parent's two responses.
        num_sampled_tokens: Tokens of `sampled`.
        num_original_tokens: Tokens of `original`.
        sampled_ids: Tokens of `sampled` as they were drawn, with the one that ended it; None where they are not known.
    """

    parent: Pair
    sampled: Text
    original: Text
    num_sampled_tokens: int
    num_original_tokens: int
    sampled_ids: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Guards:
    """What a candidate must pass whatever the rule. The defaults let everything pass but empty and identical texts.

    Attributes:
        max_abs_margin: Largest absolute margin, nats: a rule that looks for a low loss finds the most extreme pair,
            which may be one that the policy is confidently wrong about.
        max_length_ratio: Most that one response may be longer than the other, in tokens.
        max_repetition: Largest share of three-word sequences of the sampled response that repeat an earlier one.
        max_copies: Most prompts that may be answered by one and the same sampled text; more is a stock phrase.
        max_share: Most new pairs, as a share of the kept pairs.
    """

    max_abs_margin: float = np.inf
    max_length_ratio: float = np.inf
    max_repetition: float = 1.0
    max_copies: float = np.inf
    max_share: float = np.inf


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Field:
    """The candidates of one prompt that have passed the guards, as a rule sees them.

    Attributes:
        losses: Training loss of each, oriented by the sign of its margin, shape (candidates,).
        views: Margin under the earlier checkpoint, above 0 where it agrees with the orientation, shape (candidates,);
            None for rules that do not ask for it.
        kept_losses: Losses of the pairs that the filter kept, shape (kept,).
    """

    losses: Floats
    views: Floats | None
    kept_losses: Floats


def min_loss(field: Field) -> int | None:
    """The candidate with the lowest loss, whatever it is."""
    return int(np.argmin(field.losses))


def threshold(field: Field) -> int | None:
    """The candidate with the lowest loss, if some kept pair has a higher one."""
    best = int(np.argmin(field.losses))
    return best if field.losses[best] <= field.kept_losses.max(initial=-np.inf) else None


def quantile(field: Field) -> int | None:
    """The candidate whose loss is nearest to the median of the kept pairs: a typical pair, not an extreme one."""
    if not len(field.kept_losses):
        return None
    best = int(np.argmin(np.abs(field.losses - np.median(field.kept_losses))))
    return best if field.losses[best] <= field.kept_losses.max() else None


def uncertainty_aware(field: Field) -> int | None:
    """The lowest loss among the candidates that the model half way through its training orients in the same way."""
    assert field.views is not None  # noqa: S101 - the table says that this rule needs them
    losses = np.where(field.views > 0, field.losses, np.inf)
    best = int(np.argmin(losses))
    return best if np.isfinite(losses[best]) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectionSpec:
    """A selection rule and what it needs.

    Attributes:
        fn: Position of the candidate to take, or None for none.
        refusal: Why it takes none, if it can.
        needs_views: Whether it compares with the margins of an earlier checkpoint.
    """

    fn: Callable[[Field], int | None]
    refusal: Refusal = Refusal.NOT_BEST
    needs_views: bool = False

    @property
    def meaning(self) -> str:
        """First sentence of the rule's docstring."""
        return str(self.fn.__doc__).split("\n", 1)[0]


SELECTION_RULES: Mapping[str, SelectionSpec] = MappingProxyType(
    {
        "min_loss": SelectionSpec(fn=min_loss),
        "threshold": SelectionSpec(fn=threshold, refusal=Refusal.HIGH_LOSS),
        "quantile": SelectionSpec(fn=quantile, refusal=Refusal.HIGH_LOSS),
        "uncertainty_aware": SelectionSpec(fn=uncertainty_aware, refusal=Refusal.DISAGREEMENT, needs_views=True),
    }
)


def selection_table() -> str:
    """SELECTION_RULES as a Markdown table, for `docs/resampling.md`."""
    rows = [f"| `{name}` | {spec.meaning} |" for name, spec in SELECTION_RULES.items()]
    return "\n".join(["| rule | what it takes |", "|---|---|", *rows])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Criteria:
    """What decides which candidates become pairs.

    Attributes:
        rule: A name in SELECTION_RULES.
        loss_of: The training loss as a function of margins.
        kept_losses: Losses of the pairs that the filter kept, shape (kept,).
        guards: What every candidate must pass.
        seed: Which new pairs stay when there are more than `guards.max_share` allows.
    """

    rule: str
    loss_of: Callable[[Floats], Floats]
    kept_losses: Floats
    guards: Guards = Guards()
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Selection:
    """What became of the candidates.

    Attributes:
        taken: Places of the candidates that become pairs, at most one per parent, in the order of the parents.
        unsettled: For each parent without one, the place of its best candidate that is fit to be read, if it has any.
        room: How many more pairs there may be.
        refused: Number of candidates, or prompts, not used, by reason.
    """

    taken: list[int]
    unsettled: list[int]
    room: float
    refused: Counter[Refusal]


def select_candidates(
    candidates: Sequence[Candidate], margins: Floats, criteria: Criteria, *, views: Floats | None = None
) -> Selection:
    """Choose at most one candidate for each parent.

    Args:
        candidates: Those of one parent need not stand together.
        margins: Margin of each candidate with `sampled` as chosen, shape (candidates,), nats.
        criteria: The rule, its guards and what it compares with.
        views: Margins like `margins` under the earlier checkpoint, for rules that need them.

    Returns:
        The choice. A candidate that is refused for its text is never unsettled, only one that is refused for its
        margin or by the rule.
    """
    refused: Counter[Refusal] = Counter()
    taken, unsettled = [], []
    for screened in _screen(candidates, margins, criteria.guards, refused):
        best = _choose(screened.usable, margins, views, criteria, refused) if screened.usable else None
        if best is not None:
            taken.append(best)
        elif screened.readable:
            unsettled.append(max(screened.readable, key=lambda i: abs(margins[i])))
        else:
            refused[Refusal.PROMPT_WITHOUT_USABLE] += 1
    share = criteria.guards.max_share
    limit = np.inf if np.isinf(share) else share * len(criteria.kept_losses)
    taken, num_over = capped(taken, limit, criteria.seed)
    refused[Refusal.OVER_LIMIT] += num_over
    return Selection(taken=taken, unsettled=unsettled, room=limit - len(taken), refused=+refused)


@dataclass(frozen=True, slots=True)
class _Screened:
    """Places of one parent's candidates: those whose texts pass the guards, and of them those whose margins do."""

    readable: list[int]
    usable: list[int]


def _screen(
    candidates: Sequence[Candidate], margins: Floats, guards: Guards, refused: Counter[Refusal]
) -> list[_Screened]:
    copies = _prompts_by_text(candidates)
    by_parent: dict[tuple[str, int], _Screened] = {}
    for i, (candidate, h) in enumerate(zip(candidates, margins, strict=True)):
        screened = by_parent.setdefault((candidate.parent.id, candidate.parent.row), _Screened([], []))
        if reason := _refusal(candidate, guards, num_copies=copies[_text(candidate.sampled)]):
            refused[reason] += 1
        elif not np.isfinite(h):
            refused[Refusal.NO_MARGIN] += 1
        else:
            screened.readable.append(i)
            if abs(h) > guards.max_abs_margin:
                refused[Refusal.EXTREME_MARGIN] += 1
            else:
                screened.usable.append(i)
    return list(by_parent.values())


def _choose(
    places: list[int], margins: Floats, views: Floats | None, criteria: Criteria, refused: Counter[Refusal]
) -> int | None:
    """The place of the candidate of one parent that the rule takes."""
    spec = SELECTION_RULES[criteria.rule]
    losses = criteria.loss_of(np.abs(margins[places]))
    oriented = None if views is None else np.sign(margins[places]) * views[places]
    best = spec.fn(Field(losses=losses, views=oriented, kept_losses=criteria.kept_losses))
    if best is None:
        refused[spec.refusal] += len(places)
        return None
    refused[Refusal.NOT_BEST] += len(places) - 1
    return places[best]


def capped(places: list[int], limit: float, seed: int) -> tuple[list[int], int]:
    """At most so many of the places, drawn at random so that no kind of pair is favoured.

    Args:
        places: In order.
        limit: Most that may stay.
        seed: Of the draw.

    Returns:
        Those that stay, in order, and how many go.
    """
    if len(places) <= limit:
        return places, 0
    stay = np.sort(np.random.default_rng(seed).permutation(len(places))[: int(limit)])
    return [places[i] for i in stay], len(places) - len(stay)


def _prompts_by_text(candidates: Sequence[Candidate]) -> Counter[str]:
    """How many parents each sampled text answers."""
    return Counter(text for text, _, _ in {(_text(one.sampled), one.parent.id, one.parent.row) for one in candidates})


def _refusal(candidate: Candidate, guards: Guards, *, num_copies: int) -> Refusal | None:
    text = _text(candidate.sampled)
    if not text.strip():
        return Refusal.EMPTY
    if _bare(candidate.sampled) in (_bare(candidate.parent.chosen), _bare(candidate.parent.rejected)):
        return Refusal.SAME_TEXT
    longer = max(candidate.num_sampled_tokens, candidate.num_original_tokens)
    if longer > guards.max_length_ratio * min(candidate.num_sampled_tokens, candidate.num_original_tokens):
        return Refusal.LENGTHS
    if repetition(text) > guards.max_repetition:
        return Refusal.REPETITION
    if num_copies > guards.max_copies:
        return Refusal.COPIES
    return None


def repetition(text: str) -> float:
    """Share of three-word sequences that repeat an earlier one of the same text.

    Returns:
        0 for no repetition, near 1 for a loop; 0 for texts of fewer than four words.

    Examples:
        >>> repetition("it is good and it is cheap"), round(repetition("no no no no no no"), 2)
        (0.0, 0.75)
    """
    words = text.split()
    grams = [tuple(words[i : i + _WORDS_PER_GRAM]) for i in range(len(words) - _WORDS_PER_GRAM + 1)]
    return 1.0 - len(set(grams)) / len(grams) if len(grams) > 1 else 0.0


def _bare(response: Text) -> list[str]:
    """Without the white space around it, which some decoders take away."""
    return [response.strip()] if isinstance(response, str) else [str(one["content"]).strip() for one in response]


def _text(response: Text) -> str:
    return response if isinstance(response, str) else str(response[-1]["content"])


def new_pair(candidate: Candidate, *, is_sampled_better: bool, weight: float = 1.0) -> Pair:
    """The pair that a candidate becomes.

    Args:
        candidate: The candidate.
        is_sampled_better: Whether the sampled response is the chosen one.
        weight: Weight of the pair in training, as a share of its parent's.

    Returns:
        A pair with origin "resampled", the row of its parent and the parent's id.
    """
    texts = (candidate.sampled, candidate.original)
    chosen, rejected = texts if is_sampled_better else texts[::-1]
    parent = candidate.parent
    return Pair(
        prompt=parent.prompt, chosen=chosen, rejected=rejected,
        row=parent.row, origin="resampled", parent_id=parent.id, weight=weight * parent.weight,
    )  # fmt: skip
