"""The plain decoders: `model.generate`, one batch after the other, and the forward pass alone, where that is wrong.

In: a job. Out: responses, batch by batch; the fast decoder is tested against them.

The one idea: `generate` reads prompts and computes logits; which token comes next is decided by our noise, so the
result is that of the other decoder, and the global random state is neither read nor moved.

Shapes: B rows, T positions, V vocabulary, N new tokens.
"""

import contextlib
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from ropo.sampling.call import Caller, Ended, Job


def ask_generate(job: Job) -> Ended:
    """Sample with `model.generate`, from prompts of one length at a time.

    Whoever gets here may read padding: recurrent models and those with positions of their own do, without a word.
    """
    return _generate(job, num_rows=job.num_rows)


def ask_generate_alone(job: Job) -> Ended:
    """The same, one row at a time, for models that mix up the rows of a batch."""
    return _generate(job, num_rows=1)


def ask_forward(job: Job) -> Ended:
    """Read the whole text for every token, for models whose `generate` says something else than their forward pass."""
    for place in job.places:
        for number, noise_N in enumerate(job.noise([place])):
            prompt = list(job.prompts[place].ids)
            drawn: list[int] = []
            while len(drawn) < job.most[place] and not (drawn and drawn[-1] in job.stop_ids):
                chosen_B = job.choose(job.call.plain([*prompt, *drawn]), noise_N[len(drawn)][None])
                job.check(int((chosen_B < 0).sum()), 1)
                drawn.append(int(chosen_B))
            yield place, number, drawn


def _generate(job: Job, *, num_rows: int) -> Ended:
    for rows in _of_one_length(job, num_rows):
        places = list(dict.fromkeys(place for place, _ in rows))
        noise = {place: job.noise([place]) for place in places}
        ids_BT, mask_BT = job.call.left_padded([job.prompts[place].ids for place, _ in rows])
        chooser = _Chooser(job, torch.stack([noise[place][number] for place, number in rows]), ids_BT.shape[1])
        most = min(job.most[place] for place in places)
        drawn_BN = _call(job.call, ids_BT, mask_BT, chooser, max_new_tokens=most, stop_ids=job.stop_ids)
        for (place, number), ids in zip(rows, drawn_BN.tolist(), strict=True):
            yield place, number, ids


def _call(
    call: Caller, ids_BT: Tensor, mask_BT: Tensor, chooser: LogitsProcessor, *, max_new_tokens: int,
    stop_ids: Sequence[int],
) -> Tensor:  # fmt: skip
    """What `generate` puts after texts, shape (B, N)."""
    options = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=True,
        eos_token_id=list(stop_ids) or None,
        pad_token_id=call.pad_token_id,
    )
    model: Any = call.model
    with _no_published_options(call.causal_lm):
        output_BT: Tensor = model.generate(
            input_ids=ids_BT,
            attention_mask=mask_BT,
            generation_config=options,
            logits_processor=LogitsProcessorList([chooser]),
            **call.positions(*ids_BT.shape),
        )
    return output_BT[:, ids_BT.shape[1] :]


def generated_both_ways(call: Caller, rows: Sequence[Sequence[int]], *, num_read: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities in `generate` and by the plain forward, each of shape (B · N, V).

    Args:
        call: The model.
        rows: Texts of one length.
        num_read: How many tokens of each are the prompt; the N others are what `generate` is made to say.
    """
    texts_BT = torch.tensor([list(row) for row in rows], device=call.device)
    speaker = _Speaker(texts_BT)
    read_BT = texts_BT[:, :num_read]
    most = texts_BT.shape[1] - num_read
    _call(call, read_BT, torch.ones_like(read_BT), speaker, max_new_tokens=most, stop_ids=())
    plain = [call.plain(row[:end]) for end in range(num_read, texts_BT.shape[1]) for row in rows]
    return torch.cat(speaker.heard).log_softmax(dim=-1), torch.cat(plain).log_softmax(dim=-1)


def _of_one_length(job: Job, num_rows: int) -> Iterator[list[tuple[int, int]]]:
    """Places and numbers of candidates that are drawn at once."""
    for _, same in groupby(job.places, key=lambda i: len(job.prompts[i].ids)):
        rows = [(place, number) for place in same for number in range(job.sampling.num_candidates)]
        yield from (rows[start : start + num_rows] for start in range(0, len(rows), num_rows))


class _Chooser(LogitsProcessor):
    """Leaves `generate` nothing to choose: every logit but that of the token that our noise drew is minus infinity."""

    def __init__(self, job: Job, noise_BN: Tensor, width: int) -> None:
        self._job, self._noise_BN, self._width = job, noise_BN, width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        chosen_B = self._job.choose(scores, self._noise_BN[:, input_ids.shape[1] - self._width])
        self._job.check(int((chosen_B < 0).sum()), len(chosen_B))
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen_B[:, None], 0.0)


class _Speaker(LogitsProcessor):
    """Has `generate` say what is given, and keeps the logits on the way."""

    def __init__(self, texts_BT: Tensor) -> None:
        self._texts_BT = texts_BT
        self.heard: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.heard.append(scores.float().clone())
        said_B = self._texts_BT[:, input_ids.shape[1]]
        return torch.full_like(scores, -torch.inf).scatter_(1, said_B[:, None], 0.0)


@contextlib.contextmanager
def _no_published_options(causal_lm: Any) -> Iterator[None]:
    """Keep the options a model was published with (penalties, top_k) out of `generate`: they change what is drawn."""
    published = causal_lm.generation_config
    causal_lm.generation_config = GenerationConfig()
    try:
        yield
    finally:
        causal_lm.generation_config = published
