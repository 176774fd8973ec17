"""Columns as other projects name them: where prompt, chosen and rejected stand.

In: the first row of a source, and the names the user gave. Out: a `Layout`, which takes the three from any row.

The one idea: the names of the columns say what they hold. What they leave open (which of two outputs is better, which
two of many answers make a pair) is refused once for the whole source, with what to do, and not guessed.

Add a layout: one function from a row to a `Layout` or None, one line in `LAYOUTS`, a fixture of three rows.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from types import MappingProxyType
from typing import Any

from ropo.data.problems import BadRow, printable, short

Record = Mapping[str, Any]

_QUESTIONS = ("instruction", "question", "query")
_OUTPUT = re.compile(r"(response|output|answer|completion|conversation|human_ref)_?(a|b|j|k|\d+)", re.IGNORECASE)
_LABELS = ("preference", "winner", "label", "labels", "choice", "preferred", "better_response_id")
_TIE = re.compile(r"(tie|both|neither|draw|equal)(?![a-z]).*", re.IGNORECASE)
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
# One response to a row, or many: nothing says which two make a pair.
_NO_PAIRS: tuple[tuple[frozenset[str], str], ...] = (
    (
        frozenset({"completion", "label"}),
        "single responses with a label each, as KTO takes them. Pair a good one with a bad one of the same prompt",
    ),
    *(
        (
            frozenset({name}),
            f"a list of answers in `{name}`. Choose two of each list, such as the best and the worst by score, as "
            "HuggingFaceH4/ultrafeedback_binarized has done for UltraFeedback",
        )
        for name in ("completions", "answers", "responses", "candidates")
    ),
    *(
        (frozenset({name}), f"one response to each prompt, in `{name}`. Take a dataset of preferences")
        for name in ("messages", "conversations", "completion", "response", "output")
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Where the three texts of a row stand.

    Attributes:
        columns: Names of the columns that are read.
        texts: From a row to its prompt, chosen and rejected as they stand; absent is None. Raises `BadRow` if the row
            does not say, ValueError if the whole source cannot be read.
    """

    columns: tuple[str, ...]
    texts: Callable[[Record], tuple[Any, Any, Any]]


def layout_of(row: Record, names: Mapping[str, str], *, is_conversation: Callable[[Any], bool]) -> tuple[str, Layout]:
    """The layout of a source.

    Args:
        row: Its first row.
        names: Name of the column of `prompt`, `chosen` and `rejected`.
        is_conversation: Whether a response holds its prompt, too.

    Returns:
        A key of `LAYOUTS`, or "own", and the layout.

    Raises:
        ValueError: If the layout is known not to hold pairs, or does not say which response is better.
    """
    if media := [name for name in _MEDIA if row.get(name)]:
        raise ValueError(
            f"A dataset needs pairs of text; got a column {media[0]} beside them. Drop it if the texts "
            "can stand without it."
        )
    prompt, chosen, rejected = (names[name] for name in ("prompt", "chosen", "rejected"))
    is_named = (chosen, rejected) != ("chosen", "rejected")
    own = Layout(
        columns=(prompt, chosen, rejected), texts=lambda one: (one.get(prompt), one.get(chosen), one.get(rejected))
    )
    if is_named or (prompt in row and chosen in row) or is_conversation(row.get(chosen)):
        return "own", own

    def renamed(one: Record) -> Record:
        return one if prompt == "prompt" else {**one, "prompt": one.get(prompt)}

    for name, find in LAYOUTS.items():
        if found := find(renamed(row)):
            read = tuple(prompt if column == "prompt" else column for column in found.columns)
            return name, Layout(columns=read, texts=lambda one: found.texts(renamed(one)))
    if not {chosen, rejected} & set(row):
        for columns, what in _NO_PAIRS:
            if columns <= set(row):
                raise ValueError(
                    f"A dataset needs two responses to a prompt; got {what}, and write chosen and rejected."
                )
    return "own", own


def _conversations(row: Record) -> Layout | None:
    """ShareGPT's turns, as LLaMA-Factory takes them: `conversations`, then the last turn in two versions."""
    if not {"conversations", "chosen", "rejected"} <= set(row):
        return None
    columns = ("conversations", "chosen", "rejected")
    return Layout(columns=columns, texts=lambda one: tuple(one.get(name) for name in columns))  # type: ignore[arg-type,return-value]


def _rejected_response(row: Record) -> Layout | None:
    """ms-swift's: the last of `messages` is the chosen response."""
    if not {"messages", "rejected_response"} <= set(row):
        return None

    def texts(one: Record) -> tuple[Any, Any, Any]:
        messages, rejected = one.get("messages"), one.get("rejected_response")
        if not isinstance(messages, list) or not messages:
            raise BadRow(
                "wrong_type", f"messages needs a list that ends with the chosen response; got {short(messages)}."
            )
        return messages[:-1], messages[-1:], _answer(rejected)

    return Layout(columns=("messages", "rejected_response"), texts=texts)


def _question(row: Record) -> Layout | None:
    """A prompt under another name beside chosen and rejected; Alpaca's `input` belongs to its `instruction`."""
    if not {"chosen", "rejected"} <= set(row) or not (found := _prompt_of(row)):
        return None
    columns, prompt = found
    if "system" not in row:

        def texts(one: Record) -> tuple[Any, Any, Any]:
            if one.get("system"):
                raise BadRow("mixed_formats", "a row has `system`, and those before had none: write it there, too.")
            return prompt(one), one.get("chosen"), one.get("rejected")

        return Layout(columns=(*columns, "chosen", "rejected"), texts=texts)

    def with_system(one: Record) -> tuple[Any, Any, Any]:
        system, asked = one.get("system"), prompt(one)
        asked = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
        if system and isinstance(asked, list):
            asked = [{"role": "system", "content": system}, *asked]
        return asked, _answer(one.get("chosen")), _answer(one.get("rejected"))

    return Layout(columns=("system", *columns, "chosen", "rejected"), texts=with_system)


def _paired(row: Record) -> Layout | None:
    """Two outputs, and a column that says which is better."""
    outputs = [match for name in row if isinstance(name, str) and (match := _OUTPUT.fullmatch(name))]
    outputs.sort(key=lambda match: match[2].lower())  # columns stand in any order
    if len(outputs) < 2 or {"chosen", "rejected"} & set(row):
        return None
    names = " and ".join(printable(match.group()) for match in outputs)
    if len(outputs) > 2:
        raise ValueError(
            f"A dataset needs two responses to a row; got {names}. Write two of them as chosen and rejected."
        )
    (first, second), tags = (match.group() for match in outputs), [match[2].lower() for match in outputs]
    asked, prompt = _prompt_of(row) or ((), lambda _: None)
    if tags == ["j", "k"]:  # as in lvwerra/stack-exchange-paired, whose page says that j is the better one
        return Layout(columns=(*asked, first, second), texts=lambda one: (prompt(one), one.get(first), one.get(second)))
    labels = [name for name in _LABELS if name in row]
    if len(labels) != 1:
        got = ", ".join(labels) or "none"
        raise ValueError(
            f"A dataset needs one column that says which of {names} is better, such as {', '.join(_LABELS[:3])}; got "
            f"{got}. Rename one, or write chosen and rejected. Is one always better? Name both (--chosen_column)."
        )
    label = labels[0]

    def texts(one: Record) -> tuple[Any, Any, Any]:
        is_first = _is_first(one.get(label), label, (first, second), tags)
        return prompt(one), one.get(first if is_first else second), one.get(second if is_first else first)

    return Layout(columns=(*asked, first, second, label), texts=texts)


def _is_first(value: object, label: str, outputs: tuple[str, str], tags: list[str]) -> bool:
    """Whether a label calls the first of two outputs better.

    Raises:
        BadRow: If it calls neither so.
        ValueError: If it may mean either.
    """
    text = "" if value is None or value != value else str(value).strip().lower()
    if not text:
        raise BadRow("missing_field", f"a row needs {label}, which says what is better; got none.")
    if _TIE.fullmatch(text):
        raise BadRow("tie", f"{label} is {short(value)}.")
    for number, (output, tag) in enumerate(zip(outputs, tags, strict=True)):
        if text == output.lower() or re.fullmatch(rf"((model|assistant|response|output|answer)[_ ]?)?{tag}", text):
            return number == 0
    low, high = (float(tag) if tag.isdigit() else float("nan") for tag in tags)
    try:
        place = float(value) if isinstance(value, str | Real) and not isinstance(value, bool) else float("nan")
    except ValueError:
        place = float("nan")
    if not low <= place <= high:  # nor where one of them is no number: 1 calls A better in some data and B in other
        raise ValueError(
            f"A dataset needs {label} to name {outputs[0]} or {outputs[1]} ({tags[0]} or {tags[1]}), or a tie; got "
            f"{short(value)}, which may mean either. Write chosen and rejected instead."
        )
    if place == (low + high) / 2:
        raise BadRow("tie", f"{label} is {short(value)}.")
    return place < (low + high) / 2


def _prompt_of(row: Record) -> tuple[tuple[str, ...], Callable[[Record], Any]] | None:
    """The columns that make the prompt and how they do, or None if no column is known to.

    Raises:
        ValueError: If several may be it.
    """
    if "prompt" in row:
        return ("prompt",), lambda one: one.get("prompt")
    found = [name for name in _QUESTIONS if name in row]
    if len(found) > 1:
        raise ValueError(f"A dataset needs one prompt; got {' and '.join(found)}. Choose by --prompt_column.")
    if found == ["instruction"]:  # writers may leave out an input that is empty
        return ("instruction", "input"), _instruction
    name = found[0] if found else "input"
    return ((name,), lambda one: one.get(name)) if name in row else None


def _instruction(row: Record) -> Any:
    """Alpaca's: what `input` holds follows the instruction on a line of its own."""
    instruction, given = row.get("instruction"), row.get("input")
    if isinstance(instruction, str) and isinstance(given, str) and given.strip():
        return f"{instruction}\n{given}"
    return instruction


def _answer(response: Any) -> Any:
    """A response beside messages is a message."""
    return [{"role": "assistant", "content": response}] if isinstance(response, str) else response


LAYOUTS: Mapping[str, Callable[[Record], Layout | None]] = MappingProxyType(
    {
        "conversations": _conversations,
        "rejected_response": _rejected_response,
        "question": _question,
        "paired": _paired,
    }
)
