"""Texts to token ids: what a tokenizer puts around a text, what a text must not become, and texts without end.

In: texts as a model reads them, plain or rendered by a chat template, and a tokenizer. Out: their token ids.

The one idea: a text begins as the tokenizer begins texts and does not end by itself. Whatever a tokenizer appends
(`add_eos_token`) would stand between prompt and response, and a model that is asked to go on after its end has nothing
to say.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from ropo.data.template import Rendered

TokenIds = NDArray[np.int32]

# A text is read as far as so many characters for each token that can be used, and further where that gives fewer than
# twice the tokens. What stands behind can then change no token that is used, but for tokenizers that know no words:
# for them twice is a margin, not a proof.
_CHARS_PER_TOKEN = 128
_MIN_CHARS = 2**17
_MARGIN = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """Token ids of a text.

    Attributes:
        ids: Without what the tokenizer appends to a text.
        is_cut: Whether the text goes on: there are more tokens, `_MARGIN` times as many as can be used stand here.
        num_before: Tokens that the tokenizer has put before the text.
        is_injected: Whether a control token that a message holds as text has become the token, since this tokenizer
            has no other way to read it.
    """

    ids: TokenIds
    is_cut: bool
    num_before: int
    is_injected: bool


def encode(
    texts: Sequence[str | Rendered], tokenizer: PreTrainedTokenizerBase, *, max_tokens: int | None = None
) -> list[Encoded]:
    """Encode texts; plain ones begin with what the tokenizer puts before a text, unless they do so already.

    A chat template writes its own special tokens, so none are added to its output.

    Args:
        texts: Plain text, or what a template made.
        tokenizer: The model's.
        max_tokens: Most tokens that can be used of one text; None to read all of it.

    Raises:
        ValueError: If the tokenizer does not take a text, or does something else than to put tokens around one.
    """
    limit = None if max_tokens is None else max(_CHARS_PER_TOKEN * max_tokens, _MIN_CHARS)
    found: dict[int, Encoded] = {}
    missing = list(range(len(texts)))
    before = _put_before(tokenizer) if any(isinstance(text, str) for text in texts) else []
    while missing:
        parts = [_Part.of(texts[i], limit) for i in missing]
        again = []
        for i, part, (ids, is_injected) in zip(missing, parts, _ids(parts, tokenizer), strict=True):
            if part.is_cut and max_tokens is not None and len(ids) < _MARGIN * max_tokens:
                again.append(i)
                continue
            adds = before if isinstance(texts[i], str) and ids[: len(before)] != before else []
            found[i] = Encoded(
                ids=np.array([*adds, *ids], dtype=np.int32),
                is_cut=part.is_cut,
                num_before=len(adds),
                is_injected=is_injected,
            )
        missing, limit = again, None if limit is None else 8 * limit
    return [found[i] for i in range(len(texts))]


@dataclass(frozen=True, slots=True)
class _Part:
    """The beginning of a text, or all of it; see `Rendered` for `marked`."""

    text: str
    marked: str | None
    is_cut: bool

    @classmethod
    def of(cls, text: str | Rendered, limit: int | None) -> "_Part":
        whole, marked = (text, None) if isinstance(text, str) else (text.text, text.marked)
        is_cut = limit is not None and len(whole) > limit
        return cls(whole[:limit], None if marked is None else marked[:limit], is_cut)


def _ids(parts: Sequence[_Part], tokenizer: PreTrainedTokenizerBase) -> list[tuple[list[int], bool]]:
    """Token ids of each part, and whether a control token of a message has become one.

    Raises:
        ValueError: If the tokenizer does not take a text.
    """

    def ids_of(texts: list[str], **options: bool) -> list[list[int]]:
        # verbose=False: the "longer than the model's maximum" warning is ours to give, with a count.
        return list(tokenizer(texts, add_special_tokens=False, verbose=False, **options)["input_ids"])

    try:
        found = [(ids, False) for ids in ids_of([part.text for part in parts])]
    except Exception as error:  # what comes out of the tokenizers library has no type of its own
        raise ValueError(
            f"A tokenizer needs to take any text; got one that says {str(error)[:200]!r}. Give it a token for unknown "
            "text (unk_token), or use another."
        ) from error
    for i, part in enumerate(parts):
        if part.marked is not None:
            try:
                found[i] = (ids_of([part.marked], sanitize_control_tokens=True)[0], False)
            except ValueError:  # the token is also a word of the vocabulary: no letters could spell it
                found[i] = (found[i][0], True)
    return found


def _put_before(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids that the tokenizer puts before a text.

    Raises:
        ValueError: If it does something else than to put tokens around a text.
    """
    bare, dressed = (list(tokenizer("a", add_special_tokens=adds)["input_ids"]) for adds in (False, True))
    if not bare:  # it has no token for such a text
        return dressed[: dressed.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in dressed else dressed
    for start in range(len(dressed)):
        if dressed[start : start + len(bare)] == bare:
            return dressed[:start]
    raise ValueError(
        f"A tokenizer needs to put its special tokens around a text; got {dressed} for a text of {bare}. Use message "
        "lists and a chat template, which writes them itself."
    )
