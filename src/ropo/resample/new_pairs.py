"""New pairs for discarded prompts: score sampled responses under policy and reference, select, ask a judge.

In: the discarded pairs with their log-probabilities, sampled responses, and functions that score. Out: new pairs with
their margins, and the count of refused candidates by reason.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from ropo.data.template import control_tokens
from ropo.data.tokenize import SampledIds, TokenizedPair, tokenize_pairs
from ropo.judge.verdicts import Judge, settle
from ropo.pairs import Pair, PairLogps, Text
from ropo.resample.select import Candidate, Guards, new_pair, select_candidates
from ropo.sampling.generate import Sample

Scorer = Callable[[Sequence[TokenizedPair]], PairLogps]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """One model's log-probabilities: of the discarded pairs, and a way to get those of others.

    Attributes:
        parents: Of the discarded pairs.
        score: Of tokenized pairs under the same model.
    """

    parents: PairLogps
    score: Scorer


@dataclass(frozen=True, slots=True, kw_only=True)
class WonBack:
    """What resampling found.

    Attributes:
        pairs: New pairs, origin "resampled", row and id of their parent.
        margins: Margin of each new pair, shape (pairs,), nats; below 0 only where a judge contradicts the policy.
        sampled: Token ids of the response of each new pair that was drawn; None where they are not known.
        num_judged: How many of the pairs, the last ones, were settled by the judge.
        refused: Number of candidates, or prompts, not used, by reason.
    """

    pairs: list[Pair]
    margins: NDArray[np.float64]
    sampled: list[SampledIds | None]
    num_judged: int
    refused: dict[str, int]


NOTHING = WonBack(pairs=[], margins=np.zeros(0), sampled=[], num_judged=0, refused={})


def win_back(  # noqa: PLR0913 - it conducts, and names everything it needs
    parents: Sequence[Pair],
    samples: Sequence[Sample],
    *,
    policy: Scored,
    reference: Scored | None,
    earlier: Scored | None,
    margins_of: Callable[[PairLogps, PairLogps | None], NDArray[np.float64]],
    loss_of: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    rule: str,
    guards: Guards,
    kept_losses: NDArray[np.float64],
    judge: Judge | None = None,
    weight: float = 1.0,
    seed: int = 0,
) -> WonBack:
    """Turn sampled responses into at most one new pair per discarded pair.

    Each sample is scored once, beside its parent's chosen response; its margin against either original response
    follows from that and the parent's own log-probabilities. The judge is asked only about prompts for which the rule
    takes no candidate, about the best one that is fit to be read.

    Args:
        parents: The discarded pairs.
        samples: Sampled responses; `prompt` is the place of the parent.
        policy: The model in training.
        reference: The frozen one; None for losses without it.
        earlier: The model half way through its training, for rules that compare with it.
        margins_of: Margins from log-probabilities under a policy and the reference.
        loss_of: The training loss as a function of margins.
        tokenizer: The model's.
        max_length: As in training.
        rule: See `select.SELECTION_RULES`.
        guards: See `select.Guards`.
        kept_losses: See `select.select_candidates`.
        judge: Settles what the rule cannot; None for nobody.
        weight: Weight of the new pairs in training.
        seed: See `select.select_candidates`.

    Returns:
        The new pairs.
    """
    ended = [sample for sample in samples if sample.is_finished]
    refused = Counter({"response did not end within max_new_tokens": len(samples) - len(ended)})
    control = set(control_tokens(tokenizer).values())  # its text would not show them
    finished = [sample for sample in ended if control.isdisjoint((sample.ids or ())[:-1])]
    refused["response holds a control token"] += len(ended) - len(finished)
    # `row` numbers the samples for a moment, to find them again after tokenizing has left some out.
    beside = [
        replace(parents[sample.prompt], chosen=_response(sample, parents[sample.prompt]),
                rejected=parents[sample.prompt].chosen, row=j, id="")
        for j, sample in enumerate(finished)
    ]  # fmt: skip
    drawn = [None if sample.ids is None else SampledIds(name="chosen", ids=sample.ids) for sample in finished]
    tokenized = tokenize_pairs(beside, tokenizer, max_length=max_length, sampled=drawn)
    refused["no new text once tokenized"] += len(beside) - len(tokenized)
    where = [finished[pair.row].prompt for pair in tokenized.pairs]
    own = _against_both(policy, tokenized.tokens, where)
    base = [None, None] if reference is None else _against_both(reference, tokenized.tokens, where)
    margins = np.concatenate([margins_of(*both) for both in zip(own, base, strict=True)])
    views = None
    if earlier is not None:
        then = _against_both(earlier, tokenized.tokens, where)
        views = np.concatenate([margins_of(*both) for both in zip(then, base, strict=True)])
    candidates = [
        Candidate(
            parent=parents[i],
            sampled=pair.chosen,
            original=getattr(parents[i], name),
            num_sampled_tokens=num_sampled,
            num_original_tokens=num_original,
            sampled_ids=finished[pair.row].ids,
        )
        for name, logps in zip(("chosen", "rejected"), own, strict=True)
        for pair, i, num_sampled, num_original in zip(tokenized.pairs, where, *_token_counts(logps), strict=True)
    ]
    found = select_candidates(
        candidates,
        margins,
        loss_of,
        rule=rule,
        guards=guards,
        kept_losses=kept_losses,
        views=views,
        seed=seed,
    )
    pairs = [new_pair(candidates[i], is_sampled_better=bool(margins[i] > 0), weight=weight) for i in found.taken]
    settled, settled_margins, from_judge = _settled(judge, candidates, margins, found.unsettled, weight)
    pairs += settled
    sources = [candidates[i] for i in [*found.taken, *from_judge]]
    refused.update(found.refused)
    refused["prompt without a candidate that the rule takes"] += len(found.unsettled) - len(settled)
    return WonBack(
        pairs=pairs,
        margins=np.concatenate([np.abs(margins[found.taken]), settled_margins]),
        sampled=[_drawn(pair, source) for pair, source in zip(pairs, sources, strict=True)],
        num_judged=len(settled),
        refused=dict(+refused),
    )


def _settled(
    judge: Judge | None, candidates: Sequence[Candidate], margins: NDArray[np.float64], where: list[int], weight: float
) -> tuple[list[Pair], NDArray[np.float64], list[int]]:
    """Pairs that the judge has turned the right way round, their margins and places; none without a judge."""
    if judge is None or not where:
        return [], np.zeros(0), []
    asked = [new_pair(candidates[i], is_sampled_better=bool(margins[i] > 0), weight=weight) for i in where]
    answers = settle(judge, asked)
    known = [(pair, asked[j], where[j]) for j, pair in enumerate(answers) if pair is not None]
    signed = [abs(margins[i]) * (1.0 if pair.chosen == before.chosen else -1.0) for pair, before, i in known]
    return [pair for pair, _, _ in known], np.array(signed, dtype=np.float64), [i for _, _, i in known]


def _drawn(pair: Pair, source: Candidate) -> SampledIds | None:
    """The drawn tokens of a new pair, on the side where its sampled response has come to stand."""
    if source.sampled_ids is None:
        return None
    return SampledIds(name="chosen" if pair.chosen == source.sampled else "rejected", ids=source.sampled_ids)


def _response(sample: Sample, parent: Pair) -> Text:
    return sample.text if isinstance(parent.prompt, str) else [{"role": "assistant", "content": sample.text}]


def _against_both(model: Scored, tokens: Sequence[TokenizedPair], where: Sequence[int]) -> list[PairLogps]:
    """Log-probabilities of the samples beside the chosen, then beside the rejected response of their parents."""
    sampled, parents = model.score(tokens), model.parents[where]
    return [
        PairLogps(
            chosen=sampled.chosen,
            rejected=getattr(parents, name),
            chosen_tokens=sampled.chosen_tokens,
            rejected_tokens=getattr(parents, f"{name}_tokens"),
        )
        for name in ("chosen", "rejected")
    ]


def _token_counts(logps: PairLogps) -> tuple[list[int], list[int]]:
    assert logps.chosen_tokens is not None  # noqa: S101 - scoring counts tokens
    assert logps.rejected_tokens is not None  # noqa: S101
    return logps.chosen_tokens.tolist(), logps.rejected_tokens.tolist()
