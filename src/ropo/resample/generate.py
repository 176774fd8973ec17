"""Sample responses to prompts from a model, in batches of similar length.

In: a model, its tokenizer, prompts as token ids. Out: K responses per prompt, as text, and whether each ended.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from ropo.logps.score import progress_bar

_MAX_ROWS = 128  # sequences decoded together; more only helps where memory bandwidth is idle


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One sampled response.

    Attributes:
        prompt: Place of its prompt in the input.
        text: The response without special tokens.
        num_tokens: Its tokens, the end-of-sequence token not counted.
        is_finished: Whether the model ended it by itself.
    """

    prompt: int
    text: str
    num_tokens: int
    is_finished: bool


def sample_responses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    num_candidates: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    title: str = "Sampling responses",
) -> list[Sample]:
    """Draw `num_candidates` responses for each prompt.

    Prompts are sorted by length, so a batch needs little padding; each batch has a seed of its own, so the same call
    gives the same text. With several processes each samples its share of the batches and all return everything.

    Args:
        model: A causal language model on its device.
        tokenizer: Its tokenizer, for padding and decoding.
        prompts: Token ids of each prompt.
        num_candidates: Responses per prompt.
        max_new_tokens: Longest response.
        temperature: Sampling temperature.
        top_p: Nucleus sampling.
        seed: Of the first batch; the others count up from it.
        title: What the progress bar says.

    Returns:
        `num_candidates` samples per prompt, in the order of the prompts.
    """
    state = PartialState()
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    per_batch = max(_MAX_ROWS // num_candidates, 1)
    batches = [order[start : start + per_batch] for start in range(0, len(order), per_batch)]
    samples: list[tuple[int, int, Sample]] = []
    was_training, was_cached = model.training, model.config.use_cache
    model.eval()
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    with progress_bar(title, len(prompts), is_shown=state.is_main_process) as advance:
        for number, where in list(enumerate(batches))[state.process_index :: state.num_processes]:
            set_seed(seed + number)
            width = max(len(prompts[i]) for i in where)
            rows = [[pad] * (width - len(prompts[i])) + list(prompts[i]) for i in where]
            mask = [[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in where]
            with torch.no_grad():
                output = model.generate(  # type: ignore[operator]
                    input_ids=torch.tensor(rows, device=model.device),
                    attention_mask=torch.tensor(mask, device=model.device),
                    num_return_sequences=num_candidates,
                    max_new_tokens=max_new_tokens,
                    do_sample=True,
                    temperature=temperature,
                    top_p=top_p,
                    top_k=0,
                    eos_token_id=tokenizer.eos_token_id,
                    pad_token_id=pad,
                    use_cache=True,
                )
            for row, ids in enumerate(output[:, width:].tolist()):
                i, k = where[row // num_candidates], row % num_candidates
                samples.append((i, k, _sample(i, ids, tokenizer)))
            advance(len(where))
    model.train(was_training)
    model.config.use_cache = was_cached
    if state.num_processes > 1:
        samples = gather_object(samples)
    return [sample for _, _, sample in sorted(samples, key=lambda item: item[:2])]


def _sample(prompt: int, ids: list[int], tokenizer: PreTrainedTokenizerBase) -> Sample:
    is_finished = tokenizer.eos_token_id in ids
    if is_finished:
        ids = ids[: ids.index(tokenizer.eos_token_id)]
    text = str(tokenizer.decode(ids, skip_special_tokens=True))
    return Sample(prompt=prompt, text=text, num_tokens=len(ids), is_finished=is_finished)
