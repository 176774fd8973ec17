"""New pairs for the prompts of dropped pairs: score sampled responses, select, ask a judge.

In: the dropped pairs with their log-probabilities, sampled responses, and functions that score. Out: new pairs with
their margins, and the number of refused candidates by reason.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from ropo.data.template import control_tokens
from ropo.data.tokenize import SampledIds, TokenizedPair, TokenizedPairs, tokenize_pairs
from ropo.judge.verdicts import Judge, settle
from ropo.pairs import Pair, PairLogps, Text
from ropo.resample.select import Candidate, Criteria, Refusal, capped, new_pair, select_candidates
from ropo.sampling.generate import Sample

Scorer = Callable[[Sequence[TokenizedPair]], PairLogps]
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """One model's log-probabilities: of the dropped pairs, and a way to get those of others.

    Attributes:
        parents: Of the dropped pairs.
        score: Of tokenized pairs under the same model.
    """

    parents: PairLogps
    score: Scorer


@dataclass(frozen=True, slots=True, kw_only=True)
class Scoring:
    """The models that give candidates their margins.

    Attributes:
        policy: The model in training.
        reference: The frozen one; None for losses without it.
        earlier: The model half way through its training, for rules that compare with it.
        margins_of: Margins from log-probabilities under a policy and the reference, nats.
    """

    policy: Scored
    reference: Scored | None
    margins_of: Callable[[PairLogps, PairLogps | None], Floats]
    earlier: Scored | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class NewPairs:
    """What resampling has made.

    Attributes:
        pairs: New pairs, origin "resampled", row and id of their parent.
        margins: Margin of each new pair, shape (pairs,), nats; below 0 only where a judge contradicts the policy.
        sampled: Token ids of the sampled response of each new pair; None where they are not known.
        num_judged: How many of the pairs, the last ones, were settled by the judge.
        refused: Number of candidates, or prompts, not used, by reason.
    """

    pairs: list[Pair] = field(default_factory=list)
    margins: Floats = field(default_factory=lambda: np.zeros(0))
    sampled: list[SampledIds | None] = field(default_factory=list)
    num_judged: int = 0
    refused: dict[Refusal, int] = field(default_factory=dict)


def resample_pairs(
    parents: Sequence[Pair],
    samples: Sequence[Sample],
    *,
    scoring: Scoring,
    criteria: Criteria,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    judge: Judge | None = None,
    weight: float = 1.0,
) -> NewPairs:
    """Turn sampled responses into at most one new pair per dropped pair.

    Each sample is scored once, beside its parent's chosen response; its margin against either original response
    follows from that and the parent's own log-probabilities. The judge is asked only about prompts for which the rule
    takes no candidate, about the best one that is fit to be read, and about no more than there is room for.

    Args:
        parents: The dropped pairs.
        samples: Sampled responses; `prompt` is the place of the parent.
        scoring: Scores candidates.
        criteria: Chooses among them.
        tokenizer: The model's.
        max_length: As in training.
        judge: Settles what the rule cannot; None for no judge.
        weight: Weight of the new pairs in training, as a share of their parents'.
    """
    finished, refused = _finished(samples, tokenizer)
    beside = _beside_chosen(parents, finished, tokenizer, max_length=max_length)
    refused[Refusal.NOT_NEW] += len(finished) - len(beside)
    tokenized = _uncut(beside, max_length=max_length)
    refused[Refusal.CUT] += len(beside) - len(tokenized)
    scored = _score(parents, finished, tokenized, scoring)
    candidates, margins = scored.candidates, scored.margins
    selection = select_candidates(candidates, margins, criteria, views=scored.views)
    pairs = [new_pair(candidates[i], is_sampled_better=bool(margins[i] > 0), weight=weight) for i in selection.taken]
    asked, num_over = ([], 0) if judge is None else capped(selection.unsettled, selection.room, criteria.seed)
    settled, settled_margins, from_judge = _settled(judge, candidates, margins, asked, weight)
    pairs += settled
    sources = [candidates[i] for i in [*selection.taken, *from_judge]]
    refused.update(selection.refused)
    refused[Refusal.OVER_LIMIT] += num_over
    refused[Refusal.PROMPT_UNSETTLED] += len(selection.unsettled) - num_over - len(settled)
    return NewPairs(
        pairs=pairs,
        margins=np.concatenate([np.abs(margins[selection.taken]), settled_margins]),
        sampled=[_sampled_ids(pair, source) for pair, source in zip(pairs, sources, strict=True)],
        num_judged=len(settled),
        refused=dict(+refused),
    )


def _finished(samples: Sequence[Sample], tokenizer: PreTrainedTokenizerBase) -> tuple[list[Sample], Counter[Refusal]]:
    """Samples that the model has ended and whose text shows everything that they hold."""
    ended = [sample for sample in samples if sample.is_finished]
    control = control_tokens(tokenizer)
    numbers = set(control.values())

    def is_plain(sample: Sample) -> bool:
        if sample.ids is None:  # of a server that gives the text alone, in which they are letters
            return not any(token in sample.text for token in control)
        return numbers.isdisjoint(sample.ids[:-1])

    finished = [sample for sample in ended if is_plain(sample)]
    counts = {Refusal.UNFINISHED: len(samples) - len(ended), Refusal.CONTROL_TOKEN: len(ended) - len(finished)}
    return finished, Counter(counts)


def _beside_chosen(
    parents: Sequence[Pair], samples: Sequence[Sample], tokenizer: PreTrainedTokenizerBase, *, max_length: int
) -> TokenizedPairs:
    """Each sample beside its parent's chosen response; `row` is its place, since tokenizing leaves some out."""
    pairs = [
        replace(parents[sample.prompt], chosen=_response(sample, parents[sample.prompt]),
                rejected=parents[sample.prompt].chosen, row=place, id="")
        for place, sample in enumerate(samples)
    ]  # fmt: skip
    ids = [None if sample.ids is None else SampledIds(name="chosen", ids=sample.ids) for sample in samples]
    return tokenize_pairs(pairs, tokenizer, max_length=max_length, sampled=ids)


def _uncut(tokenized: TokenizedPairs, *, max_length: int) -> TokenizedPairs:
    """Those whose sample has its end, which `max_length` has taken from others: nobody has judged half of an answer."""
    cut = {problem.row for problem in tokenized.problems if problem.kind == "truncated"}
    stay = [
        i
        for i, (pair, ids) in enumerate(zip(tokenized.pairs, tokenized.tokens, strict=True))
        if pair.row not in cut or len(ids.prompt) + len(ids.chosen) < max_length
    ]
    return replace(tokenized, pairs=[tokenized.pairs[i] for i in stay], tokens=[tokenized.tokens[i] for i in stay])


@dataclass(frozen=True, slots=True)
class _ScoredCandidates:
    """Candidates with their margins under the policy and under the earlier model, both of shape (candidates,)."""

    candidates: list[Candidate]
    margins: Floats
    views: Floats | None


def _score(
    parents: Sequence[Pair], samples: Sequence[Sample], tokenized: TokenizedPairs, scoring: Scoring
) -> _ScoredCandidates:
    """Every sample beside the chosen, then every sample beside the rejected response of its parent."""
    where = [samples[pair.row].prompt for pair in tokenized.pairs]
    policy = _against_both(scoring.policy, tokenized.tokens, where)
    reference: Sequence[PairLogps | None] = [None, None]
    if scoring.reference is not None:
        reference = _against_both(scoring.reference, tokenized.tokens, where)
    views = None
    if scoring.earlier is not None:
        earlier = _against_both(scoring.earlier, tokenized.tokens, where)
        views = _margins(earlier, reference, scoring)
    candidates = [
        Candidate(
            parent=parents[i],
            sampled=pair.chosen,
            original=getattr(parents[i], name),
            num_sampled_tokens=num_sampled,
            num_original_tokens=num_original,
            sampled_ids=samples[pair.row].ids,
        )
        for name, logps in zip(("chosen", "rejected"), policy, strict=True)
        for pair, i, num_sampled, num_original in zip(tokenized.pairs, where, *_token_counts(logps), strict=True)
    ]
    return _ScoredCandidates(candidates, _margins(policy, reference, scoring), views)


def _margins(policy: Sequence[PairLogps], reference: Sequence[PairLogps | None], scoring: Scoring) -> Floats:
    return np.concatenate([scoring.margins_of(*both) for both in zip(policy, reference, strict=True)])


def _settled(
    judge: Judge | None, candidates: Sequence[Candidate], margins: Floats, where: list[int], weight: float
) -> tuple[list[Pair], Floats, list[int]]:
    """Pairs that the judge could settle, their margins and places; none without a judge."""
    if judge is None or not where:
        return [], np.zeros(0), []
    asked = [new_pair(candidates[i], is_sampled_better=bool(margins[i] > 0), weight=weight) for i in where]
    answers = settle(judge, asked)
    known = [(pair, asked[j], where[j]) for j, pair in enumerate(answers) if pair is not None]
    signed = [abs(margins[i]) * (1.0 if pair.chosen == before.chosen else -1.0) for pair, before, i in known]
    return [pair for pair, _, _ in known], np.array(signed, dtype=np.float64), [i for _, _, i in known]


def _sampled_ids(pair: Pair, source: Candidate) -> SampledIds | None:
    """The tokens of the sampled response of a new pair, which may be its chosen or its rejected one."""
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
