"""The `server` engine: a running server that speaks OpenAI's completions protocol, such as `vllm serve`.

In: its address and the name of a model there. Out: an `Engine`.

The one idea: prompts are sent as token ids, so the server sees exactly what training sees, and with a seed each, so the
same request gives the same responses. The server decides which model answers: if it is not the one in training, the
responses are not samples of the policy.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from ropo.endpoint.address import Endpoint, resource_url, without_query
from ropo.endpoint.client import EndpointError, post_json
from ropo.endpoint.pool import ask_many, pause_until
from ropo.sampling.engine import Advance, Prompt, Response, Sampling, response_of, stop_tokens, with_end

_RESOURCE = "completions"
_TOKENS_PER_SHARD = 2**18
_SEED_BITS = 31  # servers that are not vLLM take no more
_SHOWN = 60  # characters of a prompt in a message


class ServerEngine:
    """Samples from a running server.

    Args:
        endpoint: The server, the model there, and how long to try; all candidates of a prompt are drawn in one attempt.
        tokenizer: That model's: prompts are sent as its token ids.
        num_threads: Requests at a time; the server batches them.
        sleep: Waits before a request is repeated. Default: a wait that ends when another request has failed for good.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        tokenizer: PreTrainedTokenizerBase,
        *,
        num_threads: int = 16,
        sleep: Callable[[float], object] | None = None,
    ) -> None:
        self._endpoint, self._tokenizer, self._num_threads = endpoint, tokenizer, num_threads
        self._has_failed = threading.Event()
        self._sleep = sleep or pause_until(self._has_failed)

    @property
    def identity(self) -> dict[str, Any]:
        """What changes the responses: which model answers, wherever it is."""
        return {"engine": "server", "model": self._endpoint.model}

    @property
    def tokens_per_shard(self) -> int:
        """Few enough that a killed run repeats little."""
        return _TOKENS_PER_SHARD

    def sample(self, prompts: Sequence[Prompt], sampling: Sampling, advance: Advance) -> list[list[Response]]:
        """Draw responses.

        Raises:
            EndpointError: If the server gives no usable answer to a prompt; names both, and what to do.
            ValueError: If the key is unusable.
        """
        self._has_failed.clear()
        return ask_many(
            lambda prompt: self._ask(prompt, sampling),
            prompts,
            num_threads=self._num_threads,
            stop=self._has_failed,
            on_answer=lambda responses: advance(1, sum(response.num_tokens for response in responses)),
        )

    def close(self) -> None:
        """Nothing to release."""

    def _ask(self, prompt: Prompt, sampling: Sampling) -> list[Response]:
        # What is left out would be taken from the options that the model was published with.
        body = {
            "model": self._endpoint.model,
            "prompt": list(prompt.ids),
            "n": sampling.num_candidates,
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.vllm_temperature,
            "top_p": sampling.top_p,
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "seed": prompt.seed % 2**_SEED_BITS,
            "stop_token_ids": list(stop_tokens(self._tokenizer, None)),
            "return_token_ids": True,  # of vLLM; where it is not known, only the text comes back
        }
        try:
            answer = post_json(self._endpoint, _RESOURCE, body, sleep=self._sleep)
            choices = _choices(answer, sampling.num_candidates)
        except EndpointError as error:
            raise EndpointError(
                f"{error} The prompt has {len(prompt.ids)} tokens and ends with {self._end_of(prompt)!r}; "
                f"{sampling.num_candidates} responses of {self._endpoint.model} were asked of "
                f"{without_query(resource_url(self._endpoint.url, _RESOURCE))}.",
                status=error.status,
                is_final=error.is_final,
            ) from None
        return [self._response(choice) for choice in choices]

    def _response(self, choice: dict[str, Any]) -> Response:
        text = choice["text"].encode("utf-8", errors="replace").decode()  # JSON can hold half a character
        is_finished, drawn = choice.get("finish_reason") == "stop", choice.get("token_ids")
        if isinstance(drawn, list) and drawn and all(type(one) is int and one >= 0 for one in drawn):
            response = response_of(drawn, stop_tokens(self._tokenizer, None), self._tokenizer)
            return with_end(replace(response, text=text), is_finished=is_finished)
        ids = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return Response(text=text, num_tokens=len(ids), is_finished=is_finished)

    def _end_of(self, prompt: Prompt) -> str:
        return str(self._tokenizer.decode(list(prompt.ids[-_SHOWN:])))[-_SHOWN:]


def _choices(answer: dict[str, Any], num_candidates: int) -> list[dict[str, Any]]:
    """The choices of an answer by their index."""
    choices = answer.get("choices")
    if not isinstance(choices, list) or not all(
        isinstance(choice, dict) and isinstance(choice.get("text"), str) for choice in choices
    ):
        raise EndpointError(
            f"Sampling needs choices with text; got {str(answer)[:_SHOWN]!r}. Check that the address is that of "
            "a completions server, as `vllm serve` starts.",
            is_final=True,
        )
    if len(choices) != num_candidates:
        raise EndpointError(
            f"Sampling needs as many choices as it asks for; got {len(choices)}, not {num_candidates}. Use a server "
            "that obeys `n`, or set num_candidates to 1.",
            is_final=True,
        )
    return sorted(choices, key=_index)


def _index(choice: dict[str, Any]) -> int:
    index = choice.get("index")
    return index if isinstance(index, int) else 0
