"""Conversations to text by a chat template: a program that came with a model, and the messages of a stranger.

In: message lists and a tokenizer. Out: the text of each conversation and what its template left out, or why there is
none.

The one idea: nothing is taken for granted. A template may raise anything, never end, leave out what a message says, or
write today's date; and what a message says stays text where it reads like a control token.
"""

import ctypes
import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import mark_control_tokens

from ropo.data.problems import BadRow, short
from ropo.pairs import Messages

_BUDGET_SECONDS = 10.0  # of computing, for one conversation; a template takes less than a thousandth of one
_POLL_SECONDS = 0.1
_DATE = re.compile(r"\bstrftime_now\s*\(|=\s*strftime_now\b")  # called, or given another name
_DATE_CALL = re.compile(r"""\bstrftime_now\s*\(\s*(?:'([^'\\]*)'|"([^"\\]*)")\s*\)""")
_REASONING = ("reasoning_content", "thinking", "reasoning")  # the names that `transformers` takes for one thing

# The date that each tokenizer's template is given: of the first use, or of the run that is resumed.
_DATES: WeakKeyDictionary[PreTrainedTokenizerBase, datetime] = WeakKeyDictionary()

Item = TypeVar("Item")
Found = TypeVar("Found")


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """Messages for a chat template.

    Attributes:
        messages: At least one.
        is_open: Whether an answer is to follow, so that the text ends where it begins.
        place: Where it comes from, for messages: "row 3".
    """

    messages: Messages
    is_open: bool
    place: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendered:
    """What a template made of a conversation.

    Attributes:
        text: What the model reads.
        marked: The same with private marks around control tokens that messages hold, by which `transformers` tells them
            from those that the template writes; None where messages hold none.
        control_tokens: Names of those tokens.
        left_out: What messages say and the text does not, a few words each.
        is_ended: Whether the text ends with a control token, white space apart.
    """

    text: str
    marked: str | None
    control_tokens: tuple[str, ...]
    left_out: tuple[str, ...]
    is_ended: bool


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Special tokens and their ids: what a text must not hold by accident.

    Tokens that were merely added (`<think>`, `<tool_call>`) are none: they are part of what a model says. Nor is the
    token for unknown text, unless it has another office as well.
    """
    offices = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    added: Any = tokenizer.added_tokens_decoder
    if callable(added):  # MistralCommonBackend has none: it finds control tokens in no text
        return {}
    return {
        token.content: number
        for number, token in added.items()
        if token.special and token.content.strip() and (number != tokenizer.unk_token_id or number in offices)
    }


def writes_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template knows what day it is."""
    return bool(tokenizer.chat_template) and _DATE.search(tokenizer.get_chat_template()) is not None


def date_of(tokenizer: PreTrainedTokenizerBase, date: str | None = None) -> str | None:
    """The date that the chat template is given: one for all texts, whatever the calendar says meanwhile.

    Args:
        tokenizer: With a chat template.
        date: Local time as ISO 8601, to be given from now on; None for what was given before, or else for now.

    Returns:
        The date as ISO 8601, to the second; None for a template that writes none.
    """
    if not writes_date(tokenizer):
        return None
    if date is not None:
        _DATES[tokenizer] = datetime.fromisoformat(date)
    return _DATES.setdefault(tokenizer, datetime.now().replace(microsecond=0)).isoformat()


def render(conversations: Sequence[Conversation], tokenizer: PreTrainedTokenizerBase) -> list[Rendered | BadRow]:
    """Apply the chat template.

    Arguments of tool calls that are JSON in a string, as OpenAI's interface gives them, are parsed: templates expect
    an object.

    Returns:
        For each conversation its text, or a problem of kind "template_refuses" if the template raises anything.

    Raises:
        ValueError: If there is no chat template, it computes the format of the date, or it does not end.
    """
    if not conversations:
        return []
    if not tokenizer.chat_template:
        raise ValueError(
            "Message lists need a tokenizer with a chat template; got one without. Set tokenizer.chat_template, "
            "use the instruction-tuned model's tokenizer, or turn the messages into text."
        )
    template = _dated(tokenizer)
    names = tuple(control_tokens(tokenizer))
    pattern = re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)")

    def text_of(messages: Messages, *, is_open: bool) -> str:
        found = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=is_open
        )
        return str(found)

    def apply(conversation: Conversation) -> Rendered | BadRow:
        messages: Messages = [_with_parsed_arguments(message) for message in conversation.messages]
        found, contents = rendered(messages, conversation), _contents(messages)
        if not contents or (isinstance(found, Rendered) and any(_is_in(text, found.text) for text in contents)):
            return found
        # Templates of vision-language models may want a list of parts, and find nothing in a text.
        other = rendered([_in_parts(message) for message in messages], conversation)
        if isinstance(other, BadRow) or "'type': 'text'" in other.text:  # that of a list, as Python writes it
            return found
        return other if all(_is_in(text, other.text) for text in contents) else found

    def rendered(messages: Messages, conversation: Conversation) -> Rendered | BadRow:
        held = tuple(dict.fromkeys(name for text in _strings(messages) for name in pattern.findall(text)))
        marked = None
        try:
            text = text_of(messages, is_open=conversation.is_open)
            if held:
                marked = text_of(mark_control_tokens(messages, pattern), is_open=conversation.is_open)
        except Exception as error:  # a template is a program of somebody else
            return BadRow("template_refuses", f"the template says {str(error)[:200]!r} ({type(error).__name__})")
        return Rendered(
            text=text,
            marked=marked,
            control_tokens=held,
            left_out=tuple(_left_out(messages, text)),
            is_ended=(marked or text).rstrip().endswith(names),
        )

    return _in_budget(apply, conversations)


def _dated(tokenizer: PreTrainedTokenizerBase) -> str:
    """The template with the date written into it: `transformers` lets nobody else tell it what day it is."""
    template: str = tokenizer.get_chat_template()
    date = date_of(tokenizer)
    if date is None:
        return template
    now = datetime.fromisoformat(date)
    fixed = _DATE_CALL.sub(lambda call: json.dumps(now.strftime(call[1] or call[2] or "")), template)
    if _DATE.search(fixed):
        raise ValueError(
            "A chat template that writes the date needs its format as a literal, as in strftime_now('%Y-%m-%d'); got "
            "another argument. Write the date into tokenizer.chat_template, or the tokens change from day to day."
        )
    return fixed


def _with_parsed_arguments(message: Mapping[str, Any]) -> dict[str, Any]:
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return dict(message)
    return {**message, "tool_calls": [_parsed_call(call) for call in calls]}


def _parsed_call(call: Any) -> Any:
    if not isinstance(call, Mapping):
        return call
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _parsed_call(call["function"])}
    try:
        arguments = json.loads(call["arguments"])
    except (KeyError, TypeError, ValueError, RecursionError):
        return call
    return {**call, "arguments": arguments} if isinstance(arguments, dict) else call


def _strings(value: Any) -> Iterator[str]:
    """Every text in a message, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from (text for one in value.values() for text in _strings(one))
    elif isinstance(value, list | tuple):
        yield from (text for one in value for text in _strings(one))


def _contents(messages: Messages) -> list[str]:
    """The texts of messages that are no lists of parts."""
    return [message["content"] for message in messages if isinstance(message.get("content"), str)]


def _in_parts(message: Mapping[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else dict(message)


def _left_out(messages: Messages, text: str) -> Iterator[str]:
    """What the messages say and the text does not."""
    for place, message in enumerate(messages):
        for what, said in _said(message):
            if not _is_in(said, text):
                yield f"message {place} ({message.get('role')}): {what} {short(said)}"


def _said(message: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    content = message.get("content")
    parts = content if isinstance(content, list) else [{"text": content}]
    parts = [part.get("text") for part in parts if isinstance(part, Mapping)]
    yield from (("content", text) for text in parts if isinstance(text, str))
    yield from ((name, message[name]) for name in _REASONING if isinstance(message.get(name), str))
    calls = message.get("tool_calls")
    for call in calls if isinstance(calls, list) else []:
        function = call.get("function", call) if isinstance(call, Mapping) else {}
        if isinstance(function, Mapping):
            yield from (("tool call", one) for one in _strings([function.get("name"), function.get("arguments")]))


def _is_in(said: str, text: str) -> bool:
    """Whether the text holds it: as it stands, as a JSON string, or with other white space."""
    if said.strip() in text:
        return True
    if any(json.dumps(said.strip(), ensure_ascii=ascii_only)[1:-1] in text for ascii_only in (False, True)):
        return True
    return "".join(said.split()) in "".join(text.split())


def _in_budget(fn: Callable[[Item], Found], items: Sequence[Item]) -> list[Found]:
    """Apply a function that may never end, in a thread of its own, and end it then.

    A thread, since signals reach the main thread only and a process would load everything anew. Computing time, since
    a run may be stopped and continued.

    Raises:
        ValueError: If one item takes more than `_BUDGET_SECONDS` of computing.
    """
    found: list[Found] = []
    failures: list[BaseException] = []
    is_done = threading.Event()

    def work() -> None:
        try:
            for item in items:
                found.append(fn(item))  # its length says how far it is
        except BaseException as error:  # raised below, in the thread that asked
            failures.append(error)
        finally:
            is_done.set()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    num_found, since = 0, time.process_time()
    try:
        while not is_done.wait(_POLL_SECONDS):
            if len(found) > num_found:
                num_found, since = len(found), time.process_time()
            elif time.process_time() - since > _BUDGET_SECONDS:
                place = getattr(items[num_found], "place", num_found)
                raise ValueError(
                    f"A chat template needs to end; at {place} it had not after {_BUDGET_SECONDS:.0f} s. Correct its "
                    "loops (tokenizer.chat_template, chat_template.jinja)."
                )
    finally:
        if not is_done.is_set():
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(SystemExit))
            is_done.wait(1.0)
    if failures:
        raise failures[0]
    return found
