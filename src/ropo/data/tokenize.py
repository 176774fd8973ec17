"""Text to token ids, with one rule for what does not fit.

In: `Pair`s and a tokenizer. Out: `TokenizedPair`s whose two responses follow exactly the same prompt tokens, and a
`Problem` for every pair that was cut or left out.

The rule: a prompt is never cut. What `max_length` leaves after the prompt is the budget of either response; a longer
response loses its end. A pair whose prompt leaves no room is left out and counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jinja2 import TemplateError
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from ropo.data.problems import Problem
from ropo.pairs import Pair, Text

TokenIds = NDArray[np.int32]

_PAIRS_PER_CALL = 1000  # fast tokenizers work in parallel inside one call; more than this only costs memory


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizedPair:
    """One pair as token ids: `prompt` then `chosen`, or `prompt` then `rejected`. None of the three is empty."""

    prompt: TokenIds
    chosen: TokenIds
    rejected: TokenIds

    def __len__(self) -> int:
        """Number of unique tokens: the prompt counts once."""
        return len(self.prompt) + len(self.chosen) + len(self.rejected)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizedPairs:
    """Pairs that fit, their tokens in the same order, and what happened to the others.

    Attributes:
        pairs: The pairs that can be trained on and scored.
        tokens: Their token ids, one for each of `pairs`.
        problems: One entry for each pair that was cut or left out.
        lengths: Tokens of prompt and longer response of every pair that was given, before anything was cut.
    """

    pairs: list[Pair]
    tokens: list[TokenizedPair]
    problems: list[Problem]
    lengths: list[int]

    def __len__(self) -> int:
        return len(self.pairs)


def tokenize_pairs(pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerBase, *, max_length: int) -> TokenizedPairs:
    """Tokenize prompt and responses so that both responses share the prompt's tokens.

    Prompt and response are tokenized as one text, as they stand when the model reads them; the response begins where
    that differs from the prompt alone. Plain text ends with the end-of-sequence token; a conversation ends as the
    chat template says.

    Args:
        pairs: Text or message lists.
        tokenizer: With an end-of-sequence token; with a chat template if any pair holds message lists.
        max_length: Most tokens that prompt and one response may have together.

    Returns:
        The pairs that fit with their tokens, and the problems of the others.

    Raises:
        ValueError: If `max_length` is below 2, the tokenizer has no end-of-sequence token, or a conversation meets a
            tokenizer without chat template.
    """
    if max_length < 2:
        raise ValueError(f"tokenize_pairs needs max_length of 2 or more; got {max_length}. Usual is 512 to 4096.")
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "tokenize_pairs needs a tokenizer with an end-of-sequence token; got none. Set tokenizer.eos_token, "
            "or the model never learns where a response ends."
        )
    kept: list[Pair] = []
    tokens: list[TokenizedPair] = []
    problems: list[Problem] = []
    lengths: list[int] = []
    for start in range(0, len(pairs), _PAIRS_PER_CALL):
        part = pairs[start : start + _PAIRS_PER_CALL]
        for pair, ids in zip(part, _tokenize(part, tokenizer), strict=True):
            if isinstance(ids, Problem):
                problems.append(ids)
                continue
            lengths.append(len(ids.prompt) + max(len(ids.chosen), len(ids.rejected)))
            fitted, found = _fit(pair, ids, max_length=max_length)
            problems.extend(found)
            if fitted is not None:
                kept.append(pair)
                tokens.append(fitted)
    return TokenizedPairs(pairs=kept, tokens=tokens, problems=problems, lengths=lengths)


def encode_prompts(prompts: Sequence[Text], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids after which a model is to answer each prompt, as `tokenize_pairs` sees them.

    Args:
        prompts: Text or message lists.
        tokenizer: The model's.

    Returns:
        One list of ids per prompt.
    """
    texts = [_render(prompt, None, tokenizer) for prompt in prompts]
    return _encode(texts, [isinstance(prompt, str) for prompt in prompts], tokenizer)


def _render(prompt: Text, response: Text | None, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text a model reads: the prompt alone when `response` is None, else prompt and response."""
    if isinstance(prompt, str) and (response is None or isinstance(response, str)):
        return prompt + (response or "")
    if isinstance(prompt, str) or isinstance(response, str):
        raise ValueError(
            "A pair needs prompt and responses of one kind, all text or all message lists; got a mix. "
            "Write the prompt as [{'role': 'user', 'content': ...}]."
        )
    if not tokenizer.chat_template:
        raise ValueError(
            "Message lists need a tokenizer with a chat template; got one without. Set tokenizer.chat_template, "
            "use the instruction-tuned model's tokenizer, or turn the messages into text."
        )
    messages = prompt + (response or [])
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=response is None))


def _encode(texts: list[str], is_plain: list[bool], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of each text. A chat template writes its own special tokens, so none are added to its output."""
    ids: list[list[int]] = [[] for _ in texts]
    for plain in (True, False):
        where = [i for i, is_this in enumerate(is_plain) if is_this is plain]
        if where:
            # verbose=False: the "longer than the model's maximum" warning is ours to give, with a count.
            encoded = tokenizer([texts[i] for i in where], add_special_tokens=plain, verbose=False)["input_ids"]
            for i, one in zip(where, encoded, strict=True):
                ids[i] = one
    return ids


def _tokenize(pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerBase) -> list[TokenizedPair | Problem]:
    """Tokens of each pair before anything is cut, or why its chat template refuses it."""
    texts: list[str] = []
    is_plain: list[bool] = []
    refused: dict[int, Problem] = {}
    for i, pair in enumerate(pairs):
        try:
            three = [_render(pair.prompt, response, tokenizer) for response in (None, pair.chosen, pair.rejected)]
        except TemplateError as error:  # as templates raise for a system message, or roles that do not alternate
            message = f"the template says {str(error)[:200]!r}"
            refused[i] = Problem(kind="template_refuses", row=pair.row, message=message)
            three = [""] * 3
        texts += three
        is_plain += [isinstance(pair.prompt, str)] * 3
    encoded = [np.asarray(ids, dtype=np.int32) for ids in _encode(texts, is_plain, tokenizer)]
    tokenized: list[TokenizedPair | Problem] = []
    for i in range(0, len(encoded), 3):
        if i // 3 in refused:
            tokenized.append(refused[i // 3])
            continue
        alone, with_chosen, with_rejected = encoded[i : i + 3]
        if is_plain[i]:
            with_chosen = _end_with(with_chosen, tokenizer.eos_token_id)
            with_rejected = _end_with(with_rejected, tokenizer.eos_token_id)
        # Tokens may merge across the border of prompt and response, and some chat templates render a prompt
        # differently when nothing follows: the response begins where the first of the two departs.
        shared = min(_common_prefix(alone, with_chosen), _common_prefix(alone, with_rejected))
        tokenized.append(
            TokenizedPair(prompt=with_chosen[:shared], chosen=with_chosen[shared:], rejected=with_rejected[shared:])
        )
    return tokenized


def _end_with(ids: TokenIds, eos_token_id: int) -> TokenIds:
    return ids if len(ids) and ids[-1] == eos_token_id else np.append(ids, np.int32(eos_token_id))


def _common_prefix(first: TokenIds, second: TokenIds) -> int:
    """Number of leading tokens that the two share."""
    length = min(len(first), len(second))
    differs = np.flatnonzero(first[:length] != second[:length])
    return int(differs[0]) if len(differs) else length


def _fit(pair: Pair, ids: TokenizedPair, *, max_length: int) -> tuple[TokenizedPair | None, list[Problem]]:
    """Apply the budget to one pair: the tokens that remain, or None, and what there is to report."""
    problems: list[Problem] = []

    def report(kind: str, message: str) -> None:
        problems.append(Problem(kind=kind, row=pair.row, line=None, message=message))

    budget = max_length - len(ids.prompt)
    if not len(ids.prompt):
        report("empty_prompt", "the prompt has no tokens, so nothing predicts the first token of a response")
        return None, problems
    if budget < 1:
        report("prompt_too_long", f"the prompt has {len(ids.prompt)} tokens and max_length is {max_length}")
        return None, problems
    fitted = TokenizedPair(prompt=ids.prompt, chosen=ids.chosen[:budget], rejected=ids.rejected[:budget])
    if not len(fitted.chosen) or not len(fitted.rejected):
        report("completion_emptied", "a response has no tokens")
        return None, problems
    if np.array_equal(fitted.chosen, fitted.rejected):
        report("identical", f"chosen and rejected have the same tokens (of at most {budget})")
        return None, problems
    for name, whole in (("chosen", ids.chosen), ("rejected", ids.rejected)):
        if len(whole) > budget:
            report("truncated", f"{name} lost {len(whole) - budget} of {len(whole)} tokens")
    return fitted, problems
