"""A model on a task whose truth is known: accuracy on clean pairs, gold reward, distance to the reference.

In: a policy, a reference, held-out pairs with right labels, a gold reward. Out: `PolicyScore`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ropo.data.tokenize import TokenizedPair, encode_prompts, tokenize_pairs
from ropo.evaluate.measures import Mean, mean_of, share_of
from ropo.logps.batch import Batching, pad_token_id_of
from ropo.logps.score import score_pairs
from ropo.pairs import margin
from ropo.sampling.engine import Sampling
from ropo.sampling.generate import Sample, sample_responses
from ropo_bench.task import GoldStandard


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
    gold: GoldStandard,
    *,
    num_samples: int,
    seed: int = 0,
) -> PolicyScore:
    """Score a policy on held-out pairs with right labels.

    Args:
        policy: The model to score.
        reference: The model it was aligned from.
        tokenizer: Of both.
        gold: Held-out pairs and true rewards.
        num_samples: Responses to sample, one for each of the first prompts.
        seed: Of the samples: the same for all policies that are compared.
    """
    tokens = tokenize_pairs(gold.pairs, tokenizer, max_length=gold.max_length).tokens
    batching = Batching(pad_token_id=pad_token_id_of(tokenizer))
    both = [score_pairs(model, tokens, batching, title="Held-out pairs") for model in (policy, reference)]
    h = margin(*both, beta=1.0).numpy()
    prompts = [pair.prompt for pair in gold.pairs[:num_samples]]
    prompt_ids = encode_prompts(prompts, tokenizer)
    samples = sample_responses(
        policy,
        tokenizer,
        prompt_ids,
        Sampling(num_candidates=1, max_new_tokens=gold.max_new_tokens),
        seed=seed,
        title="Sampling for the gold reward",
    )
    rewards = gold.rewards([prompts[sample.prompt] for sample in samples], [sample.text for sample in samples])
    drawn = _as_pairs(prompt_ids, samples, tokenizer)
    policy_logps, reference_logps = (
        score_pairs(model, drawn, batching, title="Distance").chosen for model in (policy, reference)
    )
    return PolicyScore(
        accuracy=share_of((h > 0) + 0.5 * (h == 0)),
        gold=mean_of([reward for reward in rewards if np.isfinite(reward)]),
        kl=mean_of((policy_logps - reference_logps).numpy()),
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
