"""New pairs for discarded prompts: sample, score under policy and reference, select.

In: the discarded pairs with their log-probabilities, and functions that sample and score. Out: `NewPair`s, each with
its reference log-probabilities, and the count of refused candidates by reason.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from ropo.data.tokenize import TokenizedPair, tokenize_pairs
from ropo.pairs import Pair, PairLogps, Text
from ropo.resample.generate import Sample
from ropo.resample.select import Candidate, select_pairs

Scorer = Callable[[Sequence[TokenizedPair]], PairLogps]


@dataclass(frozen=True, slots=True, kw_only=True)
class WonBack:
    """What resampling found.

    Attributes:
        pairs: New pairs, origin "resampled", row of their parent.
        margins: Margin of each new pair, shape (pairs,), nats; above 0 by construction.
        refused: Number of candidates, or prompts, not used, by reason.
    """

    pairs: list[Pair]
    margins: NDArray[np.float64]
    refused: dict[str, int]


def win_back(  # noqa: PLR0913 - it conducts, and names everything it needs
    parents: Sequence[Pair],
    samples: Sequence[Sample],
    parent_policy: PairLogps,
    parent_reference: PairLogps | None,
    *,
    score_policy: Scorer,
    score_reference: Scorer | None,
    margins_of: Callable[[PairLogps, PairLogps | None], NDArray[np.float64]],
    loss_of: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    rule: str,
    worst_kept_loss: float,
    max_abs_margin: float,
    max_length_ratio: float,
) -> WonBack:
    """Turn sampled responses into at most one new pair per discarded pair.

    Each sample is scored once, beside its parent's chosen response; its margin against either original response
    follows from that and the parent's own log-probabilities.

    Args:
        parents: The discarded pairs.
        samples: Sampled responses; `prompt` is the place of the parent.
        parent_policy: Log-probabilities of the parents under the policy that sampled.
        parent_reference: The same under the reference; None for losses without one.
        score_policy: Log-probabilities of tokenized pairs under that policy.
        score_reference: The same under the reference; None for losses without one.
        margins_of: Margins from the two.
        loss_of: The training loss as a function of margins.
        tokenizer: The model's.
        max_length: As in training.
        rule: See `select.SELECTION_RULES`.
        worst_kept_loss: See `select.select_pairs`.
        max_abs_margin: See `select.select_pairs`.
        max_length_ratio: See `select.select_pairs`.

    Returns:
        The new pairs.
    """
    finished = [sample for sample in samples if sample.is_finished]
    refused = Counter({"response did not end within max_new_tokens": len(samples) - len(finished)})
    # `row` numbers the samples for a moment, to find them again after tokenizing has left some out.
    beside = [
        replace(parents[sample.prompt], chosen=_response(sample, parents[sample.prompt]),
                rejected=parents[sample.prompt].chosen, row=j, id="")
        for j, sample in enumerate(finished)
    ]  # fmt: skip
    tokenized = tokenize_pairs(beside, tokenizer, max_length=max_length)
    refused["no new text once tokenized"] += len(beside) - len(tokenized)
    policy = score_policy(tokenized.tokens)
    reference = score_reference(tokenized.tokens) if score_reference else None
    where = [finished[pair.row].prompt for pair in tokenized.pairs]
    candidates, margins = [], []
    for name in ("chosen", "rejected"):
        own = _beside(policy, parent_policy[where], name)
        assert own.chosen_tokens is not None  # noqa: S101 - scoring counts tokens
        assert own.rejected_tokens is not None  # noqa: S101
        base = (
            _beside(reference, parent_reference[where], name)
            if reference is not None and parent_reference is not None
            else None
        )
        margins.append(margins_of(own, base))
        candidates += [
            Candidate(
                parent=parents[i],
                sampled=pair.chosen,
                original=getattr(parents[i], name),
                num_sampled_tokens=num_sampled,
                num_original_tokens=num_original,
            )
            for pair, i, num_sampled, num_original in zip(
                tokenized.pairs, where, own.chosen_tokens.tolist(), own.rejected_tokens.tolist(), strict=True
            )
        ]
    selection = select_pairs(
        candidates,
        np.concatenate(margins),
        loss_of,
        rule=rule,
        worst_kept_loss=worst_kept_loss,
        max_abs_margin=max_abs_margin,
        max_length_ratio=max_length_ratio,
    )
    refused.update(selection.refused)
    return WonBack(pairs=selection.pairs, margins=selection.margins, refused={k: n for k, n in refused.items() if n})


def _response(sample: Sample, parent: Pair) -> Text:
    return sample.text if isinstance(parent.prompt, str) else [{"role": "assistant", "content": sample.text}]


def _beside(sampled: PairLogps, parent: PairLogps, name: str) -> PairLogps:
    """Log-probabilities of pairs whose chosen response is the sample and whose rejected one is the parent's `name`."""
    return PairLogps(
        chosen=sampled.chosen,
        rejected=getattr(parent, name),
        chosen_tokens=sampled.chosen_tokens,
        rejected_tokens=getattr(parent, f"{name}_tokens"),
    )
