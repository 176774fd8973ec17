"""What every engine takes and gives: prompts with a seed each, options of sampling, responses.

In: what the caller wants sampled. Out: plain values that all engines share, and the interface they offer.

The one idea: randomness belongs to the prompt. Each prompt has its own seed, made from its token ids, so its responses
depend neither on its neighbours in a batch nor on the order of the data nor on the number of processes.

Add an engine: write a class with the methods of `Engine` in a file beside this one, and add a line to ENGINES in
`engines.py`.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

from transformers import GenerationConfig, PreTrainedTokenizerBase

from ropo.provenance import hash_value

Advance = Callable[[int, int], None]  # number of prompts and of tokens just finished


LIKELIEST = 1e-4
"""The temperature at which only the likeliest tokens are left; 0 would divide by 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How responses are drawn.

    Attributes:
        num_candidates: Responses per prompt.
        max_new_tokens: Longest response.
        temperature: Divides the logits; near 0 only the likeliest token is left.
        top_p: Only the likeliest tokens that together have this much probability are drawn from.

    Raises:
        ValueError: If one is out of range.
    """

    num_candidates: int
    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        for name in ("num_candidates", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} needs 1 or more; got {getattr(self, name)}.")
        if self.temperature <= 0:
            raise ValueError(
                f"temperature needs a number above 0; got {self.temperature}. For the likeliest tokens alone take "
                f"{LIKELIEST:g}."
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p needs a share in (0, 1]; got {self.top_p}. 1 keeps all tokens.")

    @property
    def vllm_temperature(self) -> float:
        """As vLLM takes it: 0 for the likeliest tokens, of which there is one response; others below 0.01 it raises."""
        return 0.0 if self.temperature <= LIKELIEST and self.num_candidates == 1 else self.temperature


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids to answer, and the seed of everything that is drawn for them."""

    ids: Sequence[int]
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """One sampled response.

    Attributes:
        text: Without special tokens.
        num_tokens: Its tokens, the one that ended it not counted.
        is_finished: Whether the model ended it by itself.
        ids: Its tokens as they were drawn, with the one that ended it; None where an engine knows the text alone. The
            text, tokenized, may give others.
    """

    text: str
    num_tokens: int
    is_finished: bool
    ids: tuple[int, ...] | None = None


@runtime_checkable
class Engine(Protocol):
    """Something that samples responses.

    Making one is cheap; what is heavy (loading a model) is done when the first prompts come.
    """

    @property
    def identity(self) -> dict[str, Any]:
        """What changes the responses besides model, prompts and `Sampling`, as plain values."""
        ...

    @property
    def tokens_per_shard(self) -> int:
        """How many tokens, prompts and longest responses together, are worth one call of `sample`."""
        ...

    def sample(self, prompts: Sequence[Prompt], sampling: Sampling, advance: Advance) -> list[list[Response]]:
        """Draw responses.

        Args:
            prompts: At least one.
            sampling: How to draw.
            advance: To be called with the prompts and tokens that have just been finished.

        Returns:
            `sampling.num_candidates` responses for each prompt, in the order of the prompts.
        """
        ...

    def close(self) -> None:
        """Release what `sample` has loaded; the engine is not used any more."""
        ...


def seeded(prompts: Sequence[Sequence[int]], seed: int) -> list[Prompt]:
    """Give each prompt its seed.

    Args:
        prompts: Token ids. A prompt that comes twice gets two seeds.
        seed: Of the whole.

    Returns:
        The prompts in the same order.

    Examples:
        >>> first, second, again = seeded([[1, 2], [3], [1, 2]], seed=0)
        >>> first.seed == seeded([[1, 2]], seed=0)[0].seed, first.seed == again.seed
        (True, False)
    """
    seen: Counter[tuple[int, ...]] = Counter()
    made = []
    for ids in prompts:
        key = tuple(ids)
        made.append(Prompt(key, int(hash_value([seed, key, seen[key]])[:15], 16)))
        seen[key] += 1
    return made


def response_of(ids: list[int], stop_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> Response:
    """The response that drawn tokens make."""
    end = next((i for i, token in enumerate(ids) if token in stop_ids), None)
    kept = ids if end is None else ids[:end]
    return Response(
        text=str(tokenizer.decode(kept, skip_special_tokens=True)),
        num_tokens=len(kept),
        is_finished=end is not None,
        ids=tuple(ids if end is None else ids[: end + 1]),
    )


def with_end(response: Response, *, is_finished: bool) -> Response:
    """A response with the engine's word on whether the model ended it; tokens that contradict it are not kept."""
    if response.is_finished == is_finished:
        return response
    return replace(response, is_finished=is_finished, ids=None)


def stop_tokens(tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig | None) -> tuple[int, ...]:
    """Every token that ends a response: the tokenizer's end of a sequence, and those the model was published with."""
    named = getattr(generation_config, "eos_token_id", None)
    ends = [tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])]
    return tuple(dict.fromkeys(int(token) for token in ends if token is not None))
