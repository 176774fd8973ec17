"""Which sampled responses become new pairs (robustness-guided rejection sampling).

In: candidate pairs, each a sampled response with one of the two original responses of its prompt, and their margins.
Out: at most one new pair per prompt, and why the other candidates were refused.

The paper states the purpose (to make up for the information in discarded queries, guided by the robust loss), not
the procedure (arXiv:2404.04102v2, abstract). The procedure here is ours: the robust loss falls with the margin, so of
the two orientations of a candidate pair the loss always prefers the one the policy already believes; the pair is
therefore oriented by the sign of its margin, and guards keep it from being chosen because it is extreme.

Add a rule: write a function `(losses of one prompt's candidates, worst kept loss) -> position or None`, and add a
line to SELECTION_RULES.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from ropo.pairs import Pair, Text

Losses = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A sampled response beside one original response of its prompt.

    Attributes:
        parent: The pair whose prompt is to be won back.
        sampled: The response the policy gave.
        original: One of the parent's two responses.
        num_sampled_tokens: Tokens of `sampled`.
        num_original_tokens: Tokens of `original`.
    """

    parent: Pair
    sampled: Text
    original: Text
    num_sampled_tokens: int
    num_original_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """New pairs, their margins (pairs,), and the count of refused candidates by reason."""

    pairs: list[Pair]
    margins: NDArray[np.float64]
    refused: dict[str, int]


def min_loss(losses: Losses, worst_kept_loss: float) -> int | None:  # noqa: ARG001 - rules share one signature
    """The candidate with the lowest loss, whatever it is."""
    return int(np.argmin(losses))


def threshold(losses: Losses, worst_kept_loss: float) -> int | None:
    """The candidate with the lowest loss, if no kept pair has a higher one than it."""
    best = int(np.argmin(losses))
    return best if losses[best] <= worst_kept_loss else None


SELECTION_RULES: Mapping[str, Callable[[Losses, float], int | None]] = MappingProxyType(
    {"min_loss": min_loss, "threshold": threshold}
)


def select_pairs(
    candidates: Sequence[Candidate],
    margins: NDArray[np.float64],
    loss_of: Callable[[NDArray[np.float64]], Losses],
    *,
    rule: str,
    worst_kept_loss: float,
    max_abs_margin: float,
    max_length_ratio: float,
) -> Selection:
    """Choose at most one new pair for each parent.

    Args:
        candidates: Those of one parent need not stand together.
        margins: Margin of each candidate with `sampled` as chosen, shape (candidates,), nats.
        loss_of: The training loss as a function of margins.
        rule: A name in SELECTION_RULES.
        worst_kept_loss: Largest loss among the pairs that the filter kept.
        max_abs_margin: Candidates with a larger absolute margin are refused as self-confirming.
        max_length_ratio: Most that one response may be longer than the other, in tokens.

    Returns:
        Pairs with origin "resampled" and the row of their parent, in the order of the parents.
    """
    refused: Counter[str] = Counter()
    by_parent: dict[int, list[int]] = {}
    for i, (candidate, h) in enumerate(zip(candidates, margins, strict=True)):
        by_parent.setdefault(candidate.parent.row, [])
        reason = _refusal(candidate, float(h), max_abs_margin=max_abs_margin, max_length_ratio=max_length_ratio)
        if reason:
            refused[reason] += 1
        else:
            by_parent[candidate.parent.row].append(i)
    chosen = []
    for places in by_parent.values():
        if not places:
            refused["prompt without a usable candidate"] += 1
            continue
        best = SELECTION_RULES[rule](loss_of(np.abs(margins[places])), worst_kept_loss)
        if best is None:
            refused["loss above that of every kept pair"] += len(places)
            continue
        refused["another candidate was better"] += len(places) - 1
        chosen.append(places[best])
    return Selection(
        pairs=[_oriented(candidates[i], float(margins[i])) for i in chosen],
        margins=np.abs(margins[chosen]),
        refused=dict(refused),
    )


def _refusal(candidate: Candidate, h: float, *, max_abs_margin: float, max_length_ratio: float) -> str | None:
    text = candidate.sampled if isinstance(candidate.sampled, str) else candidate.sampled[-1]["content"]
    if not text.strip():
        return "empty response"
    if candidate.sampled in (candidate.parent.chosen, candidate.parent.rejected):
        return "same text as an original response"
    longer = max(candidate.num_sampled_tokens, candidate.num_original_tokens)
    if longer > max_length_ratio * min(candidate.num_sampled_tokens, candidate.num_original_tokens):
        return "lengths too different"
    if not np.isfinite(h) or abs(h) > max_abs_margin:
        return "margin too extreme to be believed"
    return None


def _oriented(candidate: Candidate, h: float) -> Pair:
    """The pair with the response that the policy prefers as chosen."""
    better, worse = (candidate.sampled, candidate.original) if h > 0 else (candidate.original, candidate.sampled)
    return Pair(
        prompt=candidate.parent.prompt, chosen=better, rejected=worse, row=candidate.parent.row, origin="resampled"
    )
