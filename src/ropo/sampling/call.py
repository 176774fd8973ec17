"""Calling a causal language model for the next token, and the job that decoders are given.

In: a model with its tokenizer, token ids. Out: logits of what comes next.

Shapes: B rows, T positions, V vocabulary, N new tokens.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from ropo.logps.batch import pad_token_id_of
from ropo.sampling.draw import choose_tokens, draw_noise
from ropo.sampling.engine import Prompt, Sampling

# Positions read at once. By kind of device; one that is not named is like a CPU.
_READ_TOKENS = {"cpu": 4096, "cuda": 32768}
_READ_LOGITS_BYTES = 2**30  # for models that cannot be asked for the last position alone

Ended = Iterator[
    tuple[int, int, list[int]]
]  # place of the prompt, number of the candidate, its tokens and what follows


def by_device(values: Mapping[str, int], device: torch.device) -> int:
    """The value for a kind of device; one that is not named is like a CPU."""
    return values.get(device.type, values["cpu"])


class Caller:
    """Calls a model with just the arguments that its forward knows.

    Attributes:
        first_position: Number of the first token's position: 0, but for models that count on from their padding.
    """

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model = model
        self.causal_lm: Any = getattr(model, "get_base_model", lambda: model)()  # what PEFT wraps
        self.device = next(model.parameters()).device
        self.pad_token_id = pad_token_id_of(tokenizer)
        self.first_position = 0
        known = inspect.signature(type(self.causal_lm).forward).parameters
        self._has_positions, self._has_logits_to_keep = "position_ids" in known, "logits_to_keep" in known

    @property
    def config(self) -> Any:
        """Of the part that writes text."""
        return self.causal_lm.config.get_text_config(decoder=True)

    def __call__(self, ids_BT: Tensor, mask_BT: Tensor, positions_BT: Tensor, cache: Cache | None) -> Tensor:
        """Logits of the last column, float32, shape (B, V)."""
        arguments: dict[str, Any] = {"input_ids": ids_BT, "attention_mask": mask_BT, "use_cache": cache is not None}
        if cache is not None:
            arguments["past_key_values"] = cache
        if self._has_positions:
            arguments["position_ids"] = positions_BT + self.first_position
        if self._has_logits_to_keep:
            arguments["logits_to_keep"] = 1
        logits_BV: Tensor = self.model(**arguments).logits[:, -1]
        return logits_BV.to(device=self.device, dtype=torch.float32)

    def read(self, texts: Sequence[Sequence[int]], cache: Cache | None) -> Tensor:
        """Read texts from their beginning; logits of what follows each, shape (B, V)."""
        ids_BT, mask_BT = self.left_padded(texts)
        return self(ids_BT, mask_BT, (mask_BT.cumsum(dim=1) - 1).clamp(min=0), cache)

    def plain(self, text: Sequence[int]) -> Tensor:
        """Logits of what follows a text by the model's own positions, without padding and cache; shape (1, V)."""
        ids_BT = torch.tensor([list(text)], device=self.device)
        found = self.model(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT), use_cache=False)
        logits_BV: Tensor = found.logits[:, -1]
        return logits_BV.to(device=self.device, dtype=torch.float32)

    def positions(self, num_rows: int, length: int) -> dict[str, Tensor]:
        """The argument of `generate` that gives rows of one length their positions; none where it knows them."""
        if not (self._has_positions and self.first_position):
            return {}
        return {"position_ids": (torch.arange(length, device=self.device) + self.first_position).repeat(num_rows, 1)}

    def left_padded(self, texts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Token ids and mask, both of shape (B, T)."""
        width = max(map(len, texts))
        ids = [[self.pad_token_id] * (width - len(text)) + list(text) for text in texts]
        mask = [[0] * (width - len(text)) + [1] * len(text) for text in texts]
        return torch.tensor(ids, device=self.device), torch.tensor(mask, device=self.device)

    def max_response_tokens(self, ids: Sequence[int]) -> int:
        """Most tokens that can follow a prompt; only a table of learned positions sets a limit.

        Raises:
            ValueError: If nothing can follow.
        """
        limit = getattr(self.config, "max_position_embeddings", None)
        if limit is None or limit < 1 or getattr(self.config, "rope_parameters", None) is not None:
            return 2**31
        limit -= self.first_position
        if len(ids) >= limit:
            raise ValueError(
                f"Sampling needs prompts shorter than the model's {limit} positions; got one of {len(ids)} tokens. "
                "Leave it out, or shorten it: a run does so by max_length."
            )
        return int(limit) - len(ids)

    def prompts_per_read(self, longest: int) -> int:
        """How many prompts of at most `longest` tokens to read at once."""
        tokens = by_device(_READ_TOKENS, self.device)
        if not self._has_logits_to_keep:
            tokens = min(tokens, _READ_LOGITS_BYTES // (4 * self.config.vocab_size))
        return max(tokens // longest, 1)


@dataclass(frozen=True, slots=True)
class Job:
    """What a decoder needs.

    Attributes:
        call: The model.
        prompts: All prompts.
        places: Which of them to answer, longest first.
        most: Longest response to each prompt, in tokens.
        sampling: How to draw.
        stop_ids: Tokens that end a response.
        num_rows: Most rows to decode together, a multiple of the candidates.
    """

    call: Caller
    prompts: Sequence[Prompt]
    places: Sequence[int]
    most: Sequence[int]
    sampling: Sampling
    stop_ids: Sequence[int]
    num_rows: int

    def noise(self, places: Sequence[int]) -> Tensor:
        """Random numbers of all candidates of some prompts, shape (B, N), on the model's device."""
        size = {"num_candidates": self.sampling.num_candidates, "max_new_tokens": self.sampling.max_new_tokens}
        return torch.cat([draw_noise(self.prompts[i].seed, **size) for i in places]).to(self.call.device)

    def choose(self, logits_BV: Tensor, noise_B: Tensor) -> Tensor:
        """The next tokens, shape (B,); negative where the logits are no numbers."""
        return choose_tokens(logits_BV, noise_B, temperature=self.sampling.temperature, top_p=self.sampling.top_p)

    def check(self, num_broken: int, num_rows: int) -> None:
        """Stop at logits that are no numbers.

        Raises:
            ValueError: If there are any.
        """
        if num_broken:
            raise ValueError(
                f"Sampling needs logits that are numbers; got NaN or infinity in {num_broken} of {num_rows} rows. The "
                "model has diverged, or its type is too narrow: try float32 or bfloat16."
            )
