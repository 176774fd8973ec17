"""A model on a task whose truth is known: accuracy on clean pairs, gold reward, distance to the reference.

In: a policy, a reference, held-out pairs with right labels, a gold reward. Out: `PolicyScore`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ropo.data.tokenize import TokenizedPair, encode_prompts, tokenize_pairs
from ropo.evaluate.measures import Mean, mean_of, share_of
from ropo.logps.score import score_pairs
from ropo.pairs import Pair, margin
from ropo.sampling.engine import Sampling
from ropo.sampling.generate import Sample, sample_responses

GoldRewards = Callable[[Sequence[Any], Sequence[Any]], list[float]]
"""True rewards of prompts and of one response to each, as the task writes them: all at once, since a judge may ask."""


def each(gold_reward: Callable[[Any, Any], float]) -> GoldRewards:
    """`GoldRewards` from a reward of one prompt and one response."""
    return lambda prompts, responses: [gold_reward(x, y) for x, y in zip(prompts, responses, strict=True)]


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyScore:
    """Scores of one policy; no single one can be gamed alone.

    Attributes:
        accuracy: Share of held-out pairs with a positive margin, ties counting half.
        gold: True reward of responses sampled at temperature 1, over those that have one.
        kl: Mean of log π − log π_ref over the finished samples, nats per response: the KL divergence to the reference.
        finished: Share of the samples that ended by themselves.
        samples: The sampled responses.
        rewards: Their gold rewards, not-a-number where a judge could not tell.
    """

    accuracy: Mean
    gold: Mean
    kl: Mean
    finished: Mean
    samples: list[Sample]
    rewards: list[float]


def score_policy(
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    gold_rewards: GoldRewards,
    *,
    num_samples: int,
    max_length: int = 512,
    max_new_tokens: int = 64,
    seed: int = 0,
) -> PolicyScore:
    """Score a policy on held-out pairs with right labels.

    Args:
        policy: The model to score.
        reference: The model it was aligned from.
        tokenizer: Of both.
        pairs: Held-out pairs, text, right labels.
        gold_rewards: True rewards; `each` makes it from a function of one response.
        num_samples: Responses to sample, one for each of the first prompts.
        max_length: For tokenizing.
        max_new_tokens: Longest response.
        seed: Of the samples: the same for all policies that are compared.

    Returns:
        Scores with 90 % intervals.
    """
    tokenized = tokenize_pairs(pairs, tokenizer, max_length=max_length)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    own = score_pairs(policy, tokenized.tokens, title="Held-out pairs", pad_token_id=pad)
    base = score_pairs(reference, tokenized.tokens, title="Held-out pairs", pad_token_id=pad)
    h = margin(own, base, beta=1.0).numpy()
    prompts = [pair.prompt for pair in pairs[:num_samples]]
    prompt_ids = encode_prompts(prompts, tokenizer)
    samples = sample_responses(
        policy,
        tokenizer,
        prompt_ids,
        Sampling(num_candidates=1, max_new_tokens=max_new_tokens),
        seed=seed,
        title="Sampling for the gold reward",
    )
    rewards = gold_rewards([prompts[sample.prompt] for sample in samples], [sample.text for sample in samples])
    drawn = _as_pairs(prompt_ids, samples, tokenizer)
    drawn_own, drawn_base = (
        score_pairs(model, drawn, title="Distance", pad_token_id=pad) for model in (policy, reference)
    )
    return PolicyScore(
        accuracy=share_of((h > 0) + 0.5 * (h == 0)),
        gold=mean_of([reward for reward in rewards if np.isfinite(reward)]),
        kl=mean_of((drawn_own.chosen - drawn_base.chosen).numpy()),
        finished=share_of([sample.is_finished for sample in samples]),
        samples=samples,
        rewards=rewards,
    )


def _as_pairs(
    prompt_ids: Sequence[Sequence[int]], samples: Sequence[Sample], tokenizer: PreTrainedTokenizerBase
) -> list[TokenizedPair]:
    """Each finished sample as the chosen response of a pair; the rejected one is the end token alone, nearly free."""
    end = np.array([tokenizer.eos_token_id], dtype=np.int32)
    return [
        TokenizedPair(
            prompt=np.array(prompt_ids[sample.prompt], dtype=np.int32),
            chosen=np.array(sample.ids, dtype=np.int32),
            rejected=end,
        )
        for sample in samples
        if sample.is_finished
    ]
