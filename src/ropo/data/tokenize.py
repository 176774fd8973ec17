"""Pairs to token ids, with one rule for what does not fit.

In: `Pair`s and a tokenizer. Out: `TokenizedPair`s whose two responses follow exactly the same prompt tokens, and a
`Problem` for every pair that was cut or left out, or that a model reads otherwise than its author may have meant.

The rule: a prompt is never cut. What `max_length` leaves after the prompt is the budget of either response; a longer
response loses its end. A pair whose prompt leaves no room is left out and counted.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from transformers import PreTrainedTokenizerBase

from ropo.data.encode import Encoded, TokenIds, encode
from ropo.data.problems import BadRow, Problem, short
from ropo.data.template import Conversation, Rendered, control_tokens, date_of, render
from ropo.pairs import Pair, Text

_PAIRS_PER_CALL = 1000  # fast tokenizers work in parallel inside one call; more than this only costs memory
_NAMES = ("prompt", "chosen", "rejected")


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
        problems: One entry for each pair that was cut, left out or read in an unexpected way; those about all pairs,
            whose `row` is None, come last.
        lengths: Tokens of prompt and longer response of every pair that was given, before anything was cut; a lower
            bound for texts of more than 131,072 characters that are far too long anyway.
    """

    pairs: list[Pair]
    tokens: list[TokenizedPair]
    problems: list[Problem]
    lengths: list[int]

    def __len__(self) -> int:
        return len(self.pairs)


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledIds:
    """Token ids of a response as a model drew them: its text, tokenized, may give others.

    Attributes:
        name: Which response of the pair it is, "chosen" or "rejected".
        ids: With the token that ended it.
    """

    name: str
    ids: tuple[int, ...]


def tokenize_pairs(
    pairs: Sequence[Pair],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    sampled: Sequence[SampledIds | None] | None = None,
) -> TokenizedPairs:
    """Tokenize prompt and responses so that both responses share the prompt's tokens.

    Prompt and response are tokenized as one text, as they stand when the model reads them; the response begins where
    that differs from the prompt alone. Plain text begins as the tokenizer begins texts and ends with the
    end-of-sequence token; a conversation begins and ends as the chat template says.

    Control tokens that stand in plain text are read as tokens, since such text may have been templated already; in a
    message they are read as the letters they are written with. Both are reported.

    Args:
        pairs: Text or message lists.
        tokenizer: With an end-of-sequence token; with a chat template if any pair holds message lists.
        max_length: Most tokens that prompt and one response may have together.
        sampled: For each pair the token ids of a response that was drawn, or None; default none for all.

    Returns:
        The pairs that fit with their tokens, and the problems of the others.

    Raises:
        ValueError: If `max_length` is below 2, the tokenizer has no end-of-sequence token, or a conversation meets a
            tokenizer without chat template, or with one that does not end.
    """
    if max_length < 2:
        raise ValueError(f"tokenize_pairs needs max_length of 2 or more; got {max_length}. Usual is 512 to 4096.")
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "tokenize_pairs needs a tokenizer with an end-of-sequence token; got none. Set tokenizer.eos_token, "
            "or the model never learns where a response ends."
        )
    drawn = sampled or [None] * len(pairs)
    reader = _Reader(tokenizer, max_length)
    kept: list[Pair] = []
    tokens: list[TokenizedPair] = []
    problems: list[Problem] = []
    lengths: list[int] = []
    for start in range(0, len(pairs), _PAIRS_PER_CALL):
        where = slice(start, start + _PAIRS_PER_CALL)
        for pair, read in zip(pairs[where], reader.read(pairs[where], drawn[where]), strict=True):
            if isinstance(read, BadRow):
                problems.append(Problem.of(pair, read.kind, str(read)))
                continue
            ids = read.ids
            lengths.append(len(ids.prompt) + max(len(ids.chosen), len(ids.rejected)))
            fitted, found = _fit(read, max_length=max_length)
            problems += [Problem.of(pair, kind, message) for kind, message in found]
            if fitted is not None:
                kept.append(pair)
                tokens.append(fitted)
    return TokenizedPairs(pairs=kept, tokens=tokens, problems=[*problems, *reader.about_all()], lengths=lengths)


def encode_prompts(prompts: Sequence[Text], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids after which a model is to answer each prompt, as `tokenize_pairs` sees them.

    Returns:
        One list of ids per prompt.

    Raises:
        ValueError: If the chat template refuses a prompt, does not end, or is not there.
    """
    asked = {
        i: Conversation(messages=prompt, is_open=True, place=f"prompt {i}")
        for i, prompt in enumerate(prompts)
        if not isinstance(prompt, str)
    }
    rendered = dict(zip(asked, render(list(asked.values()), tokenizer), strict=True))
    texts: list[str | Rendered] = []
    refused: list[str] = []
    for i, prompt in enumerate(prompts):
        text = prompt if isinstance(prompt, str) else rendered[i]
        if isinstance(text, BadRow):
            refused.append(f"in prompt {i}, {text}")
        elif isinstance(text, Rendered) and (lost := [one for one in text.left_out if " (user): content" in one]):
            refused.append(f"in prompt {i}, the template leaves out {lost[0]}")
        else:
            texts.append(text)
    if refused:
        raise ValueError(
            f"Prompts need to be such as the model's chat template takes; {len(refused)} of {len(prompts)} are not: "
            f"{refused[0]}. Change the conversation, or the template."
        )
    return [one.ids.tolist() for one in encode(texts, tokenizer)]


@dataclass(frozen=True, slots=True, kw_only=True)
class _ReadPair:
    """A pair before anything is cut to `max_length`.

    Attributes:
        ids: Its tokens.
        is_more: Names of the texts that are longer than their tokens say.
        warnings: Kind and message of what there is to say about its texts.
    """

    ids: TokenizedPair
    is_more: tuple[str, ...]
    warnings: list[tuple[str, str]]


@dataclass(slots=True)
class _Reader:
    """Pairs to tokens before anything is cut to `max_length`, and what all their texts have in common."""

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    num_conversations: int = 0
    num_without_end: int = 0
    num_plain: int = 0
    _control: dict[int, str] = field(init=False)
    _unknown: int | None = field(init=False)

    def __post_init__(self) -> None:
        self._control = {number: name for name, number in control_tokens(self.tokenizer).items()}
        unknown = self.tokenizer.unk_token_id
        self._unknown = None if unknown in self._control else unknown  # many have one token for this and the end

    def read(self, pairs: Sequence[Pair], sampled: Sequence[SampledIds | None]) -> list[_ReadPair | BadRow]:
        """Tokens of each pair, or why its chat template refuses it."""
        texts = self._texts(pairs)
        flat = [one for three in texts if not isinstance(three, BadRow) for one in three]
        encoded = iter(encode(flat, self.tokenizer, max_tokens=self.max_length))
        return [
            three
            if isinstance(three, BadRow)
            else self._read(three, [next(encoded) for _ in three], drawn)
            for three, drawn in zip(texts, sampled, strict=True)
        ]  # fmt: skip

    def about_all(self) -> Iterator[Problem]:
        """What the chat template does to every conversation, and that it does nothing to plain text."""
        if self.num_plain and self.tokenizer.chat_template:
            yield Problem(kind="text_without_template", row=None, message=f"{self.num_plain} pairs")
        if self.num_without_end:
            message = f"{self.num_without_end} of {self.num_conversations} conversations"
            yield Problem(kind="template_without_end", row=None, message=message)
        if self.num_conversations and (date := date_of(self.tokenizer)):
            yield Problem(kind="template_with_date", row=None, message=f"all conversations have the date {date}")

    def _texts(self, pairs: Sequence[Pair]) -> list[list[str | Rendered] | BadRow]:
        """The prompt alone and with either response, as the model reads them."""
        asked = [_conversations(pair) for pair in pairs]
        rendered = iter(render([one for three in asked for one in three], self.tokenizer))
        found: list[list[str | Rendered] | BadRow] = []
        for pair, three in zip(pairs, asked, strict=True):
            if not three:
                found.append([str(pair.prompt), f"{pair.prompt}{pair.chosen}", f"{pair.prompt}{pair.rejected}"])
                continue
            texts = [next(rendered) for _ in three]
            refused = next((one for one in texts if isinstance(one, BadRow)), None)
            written: list[str | Rendered] = [one for one in texts if isinstance(one, Rendered)]
            found.append(refused or _changed_prompt(three[0], written) or written)
        return found

    def _read(self, texts: Sequence[str | Rendered], encoded: Sequence[Encoded], drawn: SampledIds | None) -> _ReadPair:
        alone, chosen, rejected = (one.ids for one in encoded)
        is_plain = isinstance(texts[0], str)
        if is_plain:
            chosen, rejected = (
                self._ended(ids, str(text)) for ids, text in zip((chosen, rejected), texts[1:], strict=True)
            )
        if drawn is not None:
            whole = np.array([*alone, *drawn.ids], dtype=np.int32)
            if drawn.name == "chosen":
                chosen = np.append(whole, self._after_end(rejected, drawn.ids[-1]))
            else:
                rejected = np.append(whole, self._after_end(chosen, drawn.ids[-1]))
        # Tokens may merge across the border of prompt and response, and some chat templates render a prompt
        # differently when nothing follows: the response begins where the first of the two departs.
        shared = min(_common_prefix(alone, chosen), _common_prefix(alone, rejected))
        ids = TokenizedPair(prompt=chosen[:shared], chosen=chosen[shared:], rejected=rejected[shared:])
        is_more = tuple(name for name, one in zip(_NAMES, encoded, strict=True) if one.is_cut)
        if is_plain:
            warnings = self._of_plain(ids, num_before=encoded[0].num_before)
            self.num_plain += drawn is None and all(kind != "templated_text" for kind, _ in warnings)
        else:
            warnings = self._of_rendered([one for one in texts if isinstance(one, Rendered)], encoded)
        return _ReadPair(ids=ids, is_more=is_more, warnings=[*warnings, *self._unread(ids)])

    def _ended(self, ids: TokenIds, text: str) -> TokenIds:
        """Plain text with an end, unless it has one; white space may follow it, as templates write it."""
        end = self.tokenizer.eos_token_id
        has_end = text.rstrip().endswith(str(self.tokenizer.eos_token)) and end in ids
        return ids if has_end else np.append(ids, np.int32(end))

    def _after_end(self, ids: TokenIds, end: int) -> TokenIds:
        """The white space that a template writes after the token that ends an answer: nobody samples it."""
        where = np.flatnonzero(ids == end)
        rest = ids[where[-1] + 1 :] if len(where) else ids[:0]
        return rest if not str(self.tokenizer.decode(rest)).strip() else ids[:0]

    def _unread(self, ids: TokenizedPair) -> list[tuple[str, str]]:
        counts = {name: int((getattr(ids, name) == self._unknown).sum()) for name in _NAMES}
        where = ", ".join(f"{count} of {len(getattr(ids, name))} in {name}" for name, count in counts.items() if count)
        return [("unknown_tokens", f"tokens for unknown text: {where}.")] if where else []

    def _of_plain(self, ids: TokenizedPair, *, num_before: int) -> list[tuple[str, str]]:
        """Control tokens in plain text; the one that ends a response is where it belongs."""
        parts = {"prompt": ids.prompt[num_before:], "chosen": ids.chosen[:-1], "rejected": ids.rejected[:-1]}
        held = {
            name: [self._control[one] for one in part.tolist() if one in self._control] for name, part in parts.items()
        }
        if not any(held.values()):
            return []
        if len(parts["prompt"]) and int(parts["prompt"][0]) in self._control:
            return [("templated_text", f"the prompt begins with {held['prompt'][0]!r}.")]
        where = ", ".join(f"{name} holds {_listed(found)}" for name, found in held.items() if found)
        return [("control_tokens", f"{where}: plain text, so the model reads the token.")]

    def _of_rendered(self, texts: Sequence[Rendered], encoded: Sequence[Encoded]) -> list[tuple[str, str]]:
        warnings = []
        if held := [name for text in texts for name in text.control_tokens]:
            becomes = "the token" if any(one.is_injected for one in encoded) else "its letters"
            message = f"the messages hold {_listed(held)}: the model reads {becomes}."
            warnings.append(("control_tokens", message))
        if left_out := list(dict.fromkeys(what for text in texts for what in text.left_out)):
            more = f", and {len(left_out) - 1} more" if len(left_out) > 1 else ""
            warnings.append(("template_leaves_out", f"{left_out[0]}{more}."))
        self.num_conversations += 1
        self.num_without_end += not all(text.is_ended for text in texts[1:])
        return warnings


def _conversations(pair: Pair) -> list[Conversation]:
    """The prompt alone and with either response; none for plain text."""
    parts = [text for text in (pair.prompt, pair.chosen, pair.rejected) if not isinstance(text, str)]
    if not parts:
        return []
    if len(parts) < len(_NAMES):
        raise ValueError(
            "A pair needs prompt and responses of one kind, all text or all message lists; got a mix. "
            "Write the prompt as [{'role': 'user', 'content': ...}]."
        )
    prompt, chosen, rejected = parts
    place = pair.place
    return [
        Conversation(messages=prompt, is_open=True, place=place),
        Conversation(messages=prompt + chosen, is_open=False, place=place),
        Conversation(messages=prompt + rejected, is_open=False, place=place),
    ]


def _changed_prompt(asked: Conversation, texts: Sequence[str | Rendered]) -> BadRow | None:
    """Whether a template writes the prompt, up to its last message, otherwise once an answer follows.

    A model would be trained on another prompt than the one that it answers, and a part of it would be taken for the
    response. What it writes after that message may differ: some begin an answer otherwise than they record one.
    """
    alone, *whole = (text.text for text in texts if isinstance(text, Rendered))
    last = asked.messages[-1].get("content")
    said = last.strip() if isinstance(last, str) else ""
    first, other = min(alone, *whole), max(alone, *whole)  # what these two share all share
    num_shared = next((i for i, both in enumerate(zip(first, other, strict=False)) if both[0] != both[1]), len(first))
    if not said or said not in alone or said in alone[:num_shared]:
        return None
    return BadRow("template_refuses", f"it writes the prompt otherwise once an answer follows: {short(said)}")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in dict.fromkeys(names))


def _common_prefix(first: TokenIds, second: TokenIds) -> int:
    """Number of leading tokens that the two share."""
    length = min(len(first), len(second))
    differs = np.flatnonzero(first[:length] != second[:length])
    return int(differs[0]) if len(differs) else length


def _fit(read: _ReadPair, *, max_length: int) -> tuple[TokenizedPair | None, list[tuple[str, str]]]:
    """Apply the budget to one pair: the tokens that remain, or None, and what there is to report."""
    ids = read.ids
    budget = max_length - len(ids.prompt)

    def count(name: str, kept: int = 0) -> str:
        return f"{'more than ' if name in read.is_more else ''}{len(getattr(ids, name)) - kept}"

    if not len(ids.prompt):
        return None, [("empty_prompt", "the prompt has no tokens, so nothing predicts the first token of a response")]
    if budget < 1:
        return None, [("prompt_too_long", f"the prompt has {count('prompt')} tokens and max_length is {max_length}")]
    fitted = TokenizedPair(prompt=ids.prompt, chosen=ids.chosen[:budget], rejected=ids.rejected[:budget])
    if not len(fitted.chosen) or not len(fitted.rejected):
        return None, [("completion_emptied", "a response has no tokens")]
    if np.array_equal(fitted.chosen, fitted.rejected):
        message = f"chosen and rejected have the same tokens (of at most {budget})"
        return None, [("identical", message), *read.warnings]
    cut = [name for name in ("chosen", "rejected") if len(getattr(ids, name)) > budget]
    lost = [("truncated", f"{name} lost {count(name, budget)} of {count(name)} tokens") for name in cut]
    return fitted, [*lost, *read.warnings]
