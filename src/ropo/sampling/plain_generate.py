"""The plain decoder: `model.generate`, one batch after the other, for every model; the fast one is tested against it.

In: a job. Out: responses, batch by batch.

The one idea: `generate` reads prompts and computes logits; which token comes next is decided by our noise, so the
result is that of the other decoder, and the global random state is neither read nor moved.

Shapes: B rows, T positions, V vocabulary, N new tokens.
"""

import contextlib
from collections.abc import Iterator
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from ropo.sampling.call import Ended, Job


def ask_generate(job: Job) -> Ended:
    """Sample with `model.generate`, from prompts of one length at a time.

    Whoever gets here may read padding: recurrent models and those with positions of their own do, without a word.
    """
    call, num_candidates = job.call, job.sampling.num_candidates
    model: Any = call.model
    for places in _of_one_length(job):
        ids_BT, mask_BT = call.left_padded([job.prompts[i].ids for i in places for _ in range(num_candidates)])
        options = GenerationConfig(
            max_new_tokens=min(job.most[i] for i in places),
            do_sample=False,
            use_cache=True,
            eos_token_id=list(job.stop_ids) or None,
            pad_token_id=call.pad_token_id,
        )
        chooser = _Chooser(job, job.noise(places), ids_BT.shape[1])
        with _no_published_options(call.causal_lm):
            output_BT = model.generate(
                input_ids=ids_BT,
                attention_mask=mask_BT,
                generation_config=options,
                logits_processor=LogitsProcessorList([chooser]),
                **call.positions(*ids_BT.shape),
            )
        for row, ids in enumerate(output_BT[:, ids_BT.shape[1] :].tolist()):
            yield places[row // num_candidates], row % num_candidates, ids


def _of_one_length(job: Job) -> Iterator[list[int]]:
    """Places of prompts that are read at once."""
    for _, same in groupby(job.places, key=lambda i: len(job.prompts[i].ids)):
        places = list(same)
        per_batch = job.num_rows // job.sampling.num_candidates
        yield from (places[start : start + per_batch] for start in range(0, len(places), per_batch))


class _Chooser(LogitsProcessor):
    """Leaves `generate` nothing to choose: every logit but that of the token that our noise drew is minus infinity."""

    def __init__(self, job: Job, noise_BN: Tensor, width: int) -> None:
        self._job, self._noise_BN, self._width = job, noise_BN, width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        chosen_B = self._job.choose(scores, self._noise_BN[:, input_ids.shape[1] - self._width])
        self._job.check(int((chosen_B < 0).sum()), len(chosen_B))
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen_B[:, None], 0.0)


@contextlib.contextmanager
def _no_published_options(causal_lm: Any) -> Iterator[None]:
    """Keep the options a model was published with (penalties, top_k) out of `generate`: they change what is drawn."""
    published = causal_lm.generation_config
    causal_lm.generation_config = GenerationConfig()
    try:
        yield
    finally:
        causal_lm.generation_config = published
