"""The `transformers` engine: a model in this process.

In: a function that gives the model, its tokenizer. Out: an `Engine`.

The one idea: how many rows go together follows from the memory at hand, which way they are decoded from a comparison,
and neither changes what is drawn.
"""

import contextlib
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ropo.sampling.call import Caller, Ended, Job, by_device
from ropo.sampling.engine import Advance, Prompt, Response, Sampling, response_of, stop_tokens
from ropo.sampling.shared_prompt import DECODERS, choose_decoder

logger = logging.getLogger(__name__)

_MAX_ROWS = {"cpu": 64, "cuda": 512}  # decoded together; with more, a row costs as much as before
_TOKENS_PER_SHARD = {"cpu": 2**18, "cuda": 2**22}
_TOKENS_TOGETHER = 2**15  # prompts and longest responses of these rows, where there is no GPU memory to fill
_CACHE_SHARE = 0.4  # of the GPU memory that the weights leave


class TransformersEngine:
    """Samples from a model in this process.

    Args:
        load: Gives the model, on its device; called once, when prompts come.
        tokenizer: The model's.
        use_bf16: Compute in bfloat16 by autocast, as training with `bf16` does.
    """

    def __init__(
        self, load: Callable[[], PreTrainedModel], tokenizer: PreTrainedTokenizerBase, *, use_bf16: bool = False
    ) -> None:
        self._load, self._tokenizer, self._use_bf16 = load, tokenizer, use_bf16
        self._model: PreTrainedModel | None = None
        self._call: Caller | None = None
        self._chosen: tuple[str, int] | None = None  # decoder, bytes of the cache per token

    @property
    def identity(self) -> dict[str, Any]:
        """What changes the responses: the precision."""
        return {"engine": "transformers", "use_bf16": self._use_bf16}

    @property
    def tokens_per_shard(self) -> int:
        """Enough to keep the batch full during most of a shard."""
        return by_device(_TOKENS_PER_SHARD, PartialState().device)

    def sample(self, prompts: Sequence[Prompt], sampling: Sampling, advance: Advance) -> list[list[Response]]:
        """Draw responses.

        Raises:
            ValueError: If no token can follow a prompt, or the model's logits are not numbers.
            torch.OutOfMemoryError: If not even the candidates of one prompt fit.
        """
        model = self._model = self._load() if self._model is None else self._model
        call = self._call = Caller(model, self._tokenizer) if self._call is None else self._call
        precision = (
            torch.autocast(call.device.type, dtype=torch.bfloat16) if self._use_bf16 else contextlib.nullcontext()
        )
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad(), precision:
                return self._sample(call, prompts, sampling, advance)
        finally:
            model.train(was_training)

    def close(self) -> None:
        """Release the model."""
        self._model = self._call = self._chosen = None

    def _sample(
        self, call: Caller, prompts: Sequence[Prompt], sampling: Sampling, advance: Advance
    ) -> list[list[Response]]:
        stop_ids = stop_tokens(self._tokenizer, call.causal_lm.generation_config)
        longest = max(len(prompt.ids) for prompt in prompts) + sampling.max_new_tokens
        if self._chosen is None:
            name, why, num_bytes = choose_decoder(call, prompts[0].ids, longest=longest)
            logger.info("Sampling by %s: %s.", name, why)
            self._chosen = name, num_bytes
        name, num_bytes = self._chosen
        most = [min(sampling.max_new_tokens, call.max_response_tokens(prompt.ids)) for prompt in prompts]
        drawn: list[dict[int, Response]] = [{} for _ in prompts]

        def keep(place: int, candidate: int, ids: list[int]) -> None:
            responses = drawn[place]
            if candidate in responses:  # drawn before memory ran out, and the same now
                return
            responses[candidate] = response_of(ids[: most[place]], stop_ids, self._tokenizer)
            if len(responses) == sampling.num_candidates:
                advance(1, sum(response.num_tokens for response in responses.values()))

        num_rows = _num_rows(call, longest, num_bytes, sampling.num_candidates)
        while missing := [i for i, responses in enumerate(drawn) if len(responses) < sampling.num_candidates]:
            places = sorted(missing, key=lambda i: -len(prompts[i].ids))
            if not _drain(DECODERS[name](Job(call, prompts, places, most, sampling, stop_ids, num_rows)), keep):
                if num_rows == sampling.num_candidates:
                    raise torch.OutOfMemoryError(
                        f"Sampling needs memory for {num_rows} rows of {longest} tokens; got less. Lower "
                        "num_candidates or max_new_tokens."
                    )
                num_rows = max(num_rows // 2 // sampling.num_candidates, 1) * sampling.num_candidates
                logger.warning("Sampling ran out of memory; continuing with %d rows at a time.", num_rows)
                torch.cuda.empty_cache()
        return [[responses[k] for k in range(sampling.num_candidates)] for responses in drawn]


def _drain(ended: Ended, keep: Callable[[int, int, list[int]], None]) -> bool:
    """Keep responses as they come; False if memory ran out on the way."""
    try:
        for place, candidate, ids in ended:
            keep(place, candidate, ids)
    except torch.OutOfMemoryError:
        return False
    return True


def _num_rows(call: Caller, longest: int, bytes_per_token: int, num_candidates: int) -> int:
    """How many rows to decode together: as many as help and fit, in whole prompts, at least one."""
    tokens = _TOKENS_TOGETHER
    if call.device.type == "cuda" and bytes_per_token:
        total = torch.cuda.get_device_properties(call.device).total_memory
        weights = sum(parameter.nbytes for parameter in call.model.parameters())
        tokens = int(_CACHE_SHARE * max(total - weights, 0.1 * total) / bytes_per_token)
    rows = min(by_device(_MAX_ROWS, call.device), tokens // longest)
    return max(rows // num_candidates, 1) * num_candidates
