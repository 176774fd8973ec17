"""Rows to pairs: whatever the file type and the layout of its columns, the result is the same `Pair`s.

In: a path, a folder that `datasets` saved, a hub id, a `datasets.Dataset`, a list of dicts or of `Pair`s.
Out: `Loaded`: the pairs, a `Problem` for each row that could not be read, and a hash of the content.

The one idea: a layout (`ropo.data.layouts`) says where prompt, chosen and rejected stand in a row, a format what they
hold. A row that fails is reported with its place and does not stop the others; only a source that cannot be opened
raises.

Add a format: one function, one line in `FORMATS`, a fixture of three rows.
"""

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from math import inf
from numbers import Integral, Real
from types import MappingProxyType
from typing import Any, TypeVar

from ropo.data.layouts import Layout, layout_of
from ropo.data.problems import PROBLEMS, BadRow, Problem, printable, short
from ropo.data.read import Source, read_rows
from ropo.pairs import Messages, Pair, Text

Texts = tuple[Text, Text, Text]
T = TypeVar("T")

_FIELDS = ("prompt", "chosen", "rejected", "annotator", "weight")
_SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_MARKER = re.compile(r"\n\n(Human|Assistant):")
_MESSAGES_AS_TEXT = re.compile(r"\s*\[?\s*\{\s*['\"](?:role|content|from|value)['\"]\s*:")


@dataclass(frozen=True, slots=True, kw_only=True)
class FormatSpec:
    """What prompt, chosen and rejected hold.

    Attributes:
        fn: From prompt, chosen and rejected as the row has them to the three texts of a pair.
        prompt: What the prompt column holds: "text", "messages", or "nothing".
        responses: What chosen and rejected both hold: "text" or "messages".
    """

    fn: Callable[[Any, Any, Any], Texts]
    prompt: str
    responses: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """What a source held.

    Attributes:
        pairs: The rows that could be read, in their order.
        problems: Why each of the others could not.
        num_rows: Number of rows seen, good and bad; blank lines are not rows.
        format: What the texts are, a key of `FORMATS`; "" if no row could be read.
        layout: Which columns they stand in, a key of `LAYOUTS`, or "own" for ours.
        sha256: Hash of the content of `pairs`: places, texts, annotators and weights. It does not depend on the file
            type or on columns that are ignored.
        ignored_columns: Columns that nothing reads, sorted.
    """

    pairs: list[Pair]
    problems: list[Problem]
    num_rows: int
    format: str
    layout: str
    sha256: str
    ignored_columns: tuple[str, ...]


def load_pairs(source: Source, *, split: str = "train", columns: Mapping[str, str] | None = None) -> Loaded:
    """Read preference pairs.

    Assumptions: only the form of each row is looked at; whether its texts are any good is `validate_pairs`' question.
    No code that comes with a dataset is ever run.

    Args:
        source: A .jsonl, .json or .csv file (also .gz), a .parquet file, a folder saved by
            `datasets.Dataset.save_to_disk`, the name of a dataset on the hub, or rows in memory.
        split: Which part to read of a source that has several.
        columns: Names of the columns where they differ from ours, for example `{"chosen": "better"}`.

    Returns:
        Pairs, problems and the hash of the content.

    Raises:
        FileNotFoundError: If `source` looks like a path and nothing is there.
        ValueError: If the source cannot be read at all, has no such split, has a layout that does not say what is
            preferred, or no row has a column of `columns`.
        TypeError: If `source` is of another type.

    Examples:
        >>> rows = [{"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}, {"prompt": "3 + 3 ="}]
        >>> loaded = load_pairs(rows)
        >>> loaded.pairs[0].chosen, loaded.format
        (' 4', 'text')
        >>> [(problem.kind, problem.row) for problem in loaded.problems]
        [('missing_field', 1)]
    """
    read = _RowReader(_column_names(columns))
    pairs: list[Pair] = []
    problems: list[Problem] = []
    num_rows = 0
    for line, record in read_rows(source, split):
        if isinstance(record, BadRow) and PROBLEMS[record.kind].severity == "warning":  # of the row that comes next
            problems.append(Problem(kind=record.kind, row=num_rows, line=line, message=str(record)))
            continue
        row = record.row if isinstance(record, Pair) else num_rows
        num_rows += 1
        try:
            pairs.append(read(record, row))
        except BadRow as bad:
            problems.append(Problem(kind=bad.kind, row=row, line=line, message=str(bad)))
    _refuse_absent(columns or {}, read.columns)
    if not num_rows:
        problems.append(Problem(kind="empty_file", row=None, message=f"no row found in {short(source)}."))
    return Loaded(
        pairs=pairs,
        problems=problems,
        num_rows=num_rows,
        format=read.format,
        layout=read.layout_name,
        sha256=read.digest.hexdigest(),
        ignored_columns=read.ignored_columns,
    )


class _RowReader:
    """Makes a pair of each row, by the layout and the format of the rows before it.

    Args:
        names: The name in the data of each of our fields.
    """

    def __init__(self, names: Mapping[str, str]) -> None:
        self._names = names
        self._layout: Layout | None = None
        self.layout_name, self.format = "own", ""
        self._is_weighted: bool | None = None
        self.columns: set[str] = set()
        self.digest = sha256()

    def __call__(self, record: object, row: int) -> Pair:
        """The pair of a row.

        Raises:
            BadRow: If it is none; a row that follows is then read as if this one were not there.
        """
        name, layout = self.layout_name, self._layout
        if isinstance(record, Mapping):
            self.columns.update(record)
            if layout is None:
                name, layout = layout_of(record, self._names, is_conversation=_is_conversation)
        fields = _fields(record, self._names, layout)
        origin, verdict = getattr(record, "origin", "data"), getattr(record, "verdict", None)
        pair, form = _pair(fields, row=row, form=self.format, origin=origin, verdict=verdict)
        is_weighted = fields["weight"] not in (None, "")
        if self._is_weighted not in (None, is_weighted):  # 1 may be far off the scale of the others
            has, got = ("none", short(fields["weight"])) if is_weighted else ("one", "none")
            raise BadRow("bad_weight", f"a row needs a weight if all have one; those before have {has}; got {got}.")
        self.digest.update(_canonical(pair))
        self.format, self._is_weighted, self.layout_name, self._layout = form, is_weighted, name, layout
        return pair

    @property
    def ignored_columns(self) -> tuple[str, ...]:
        """Columns that nothing reads, sorted."""
        read = {*self._names.values(), *(self._layout.columns if self._layout else ())}
        return tuple(sorted(self.columns - read, key=str))


def _column_names(columns: Mapping[str, str] | None) -> dict[str, str]:
    """The name in the data of each of our fields."""
    columns = columns or {}
    unknown = [name for name in columns if name not in _FIELDS]
    if unknown:
        raise ValueError(f"columns needs keys of {', '.join(_FIELDS)}; got {unknown[0]!r}. Its value is your name.")
    return {name: columns.get(name, name) for name in _FIELDS}


def _refuse_absent(columns: Mapping[str, str], found: Collection[str]) -> None:
    """Refuse a name that the user gave and no row has."""
    for name, column in columns.items():
        if found and column not in found:
            here = ", ".join(sorted(map(printable, found)))
            raise ValueError(f"{name} needs the name of a column that is there; got {column!r} for data with {here}.")


def _fields(record: object, names: Mapping[str, str], layout: Layout | None) -> dict[str, Any]:
    """Our fields of one row; absent and null are both None."""
    if isinstance(record, BadRow):
        raise record
    if isinstance(record, Pair):
        return {name: getattr(record, name) for name in _FIELDS}
    if not isinstance(record, Mapping) or layout is None:
        raise BadRow("not_an_object", f"a row needs named fields; got {short(record)}.")
    prompt, chosen, rejected = layout.texts(record)
    others = {name: record.get(names[name]) for name in ("annotator", "weight")}
    if chosen is None or rejected is None:
        is_own = {names["chosen"], names["rejected"]} <= set(layout.columns)
        absent = [names[name] for name, text in (("chosen", chosen), ("rejected", rejected)) if text is None]
        missing = absent if is_own else [name for name in layout.columns if record.get(name) is None]
        here = ", ".join(printable(column) for column, value in record.items() if value is not None) or "nothing"
        raise BadRow("missing_field", f"a row needs {' and '.join(missing or layout.columns)}; got {here}.")
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **others}


def _pair(fields: Mapping[str, Any], *, row: int, form: str, origin: str, verdict: str | None) -> tuple[Pair, str]:
    """Make the pair and say which format it had; `form` is that of the rows before, "" at first."""
    values = {name: _checked(fields[name], name) for name in ("prompt", "chosen", "rejected")}
    shape = {name: _shape(value) for name, value in values.items()}
    if shape["prompt"] == "nothing" and form and FORMATS[form].prompt != "nothing":
        raise BadRow("missing_field", "a row needs prompt, as the rows before have it; got none.")
    found = _find_format(shape)
    if form and found != form:
        raise BadRow("mixed_formats", f"a row needs the layout {form} of the rows before; got {found}.")
    prompt, chosen, rejected = FORMATS[found].fn(values["prompt"], values["chosen"], values["rejected"])
    for name, response in (("chosen", chosen), ("rejected", rejected)):
        if isinstance(response, list) and response and response[0]["role"] != "assistant":
            raise BadRow("wrong_type", f"{name} needs to begin with an assistant message; got {response[0]['role']!r}.")
    annotator, weight = _annotator(fields["annotator"]), _weight(fields["weight"])
    try:
        pair = Pair(
            prompt=prompt,
            chosen=chosen,
            rejected=rejected,
            row=row,
            origin=origin,
            annotator=annotator,
            weight=weight,
            verdict=verdict,
        )
    except TypeError as error:  # the id is a hash of JSON, and a message may carry anything beside its content
        raise BadRow("wrong_type", f"messages need values that JSON can hold; got another: {error}.") from error
    return pair, found


def _find_format(shape: Mapping[str, str]) -> str:
    for name, spec in FORMATS.items():
        if shape == {"prompt": spec.prompt, "chosen": spec.responses, "rejected": spec.responses}:
            return name
    got = ", ".join(f"{name}: {what}" for name, what in shape.items())
    raise BadRow("wrong_type", f"prompt, chosen and rejected need to go together; got {got}.")


def _shape(value: Text | None) -> str:
    if value is None:
        return "nothing"
    return "text" if isinstance(value, str) else "messages"


def _checked(value: object, name: str) -> Text | None:
    """The value as text or messages, or a complaint that names the field."""
    if isinstance(value, str):
        if _MESSAGES_AS_TEXT.match(value):
            raise BadRow("wrong_type", f"{name} needs messages as a list; got a list written as text, {short(value)}.")
        return value
    if value is None:
        return None
    if isinstance(value, Mapping):  # one message, as ShareGPT's chosen and rejected are
        value = [value]
    if not isinstance(value, list):
        raise BadRow("wrong_type", f"{name} needs text or a list of messages; got {short(value)}.")
    return [_message(one, f"message {place} of {name}") for place, one in enumerate(value)]


def _message(value: object, what: str) -> dict[str, Any]:
    """A message in our form: ShareGPT's `from` and `value` are its role and content, parts of text are one text."""
    if not isinstance(value, Mapping):
        raise BadRow("wrong_type", f"{what} needs role and content as text; got {short(value)}.")
    message: dict[str, Any] = {key: _given(one) for key, one in value.items() if _is_given(one)}
    if "from" in message and "value" in message and "role" not in message:
        speaker, content = message.pop("from"), message.pop("value")
        if not isinstance(speaker, str) or speaker not in _SPEAKERS:
            raise BadRow("wrong_type", f"{what} needs from to be one of {', '.join(_SPEAKERS)}; got {short(speaker)}.")
        message = {"role": _SPEAKERS[speaker], "content": content, **message}
    if isinstance(message.get("content"), list):
        message["content"] = "".join(_part(part, what) for part in message["content"])
    if message.get("role") == "assistant" and message.get("tool_calls"):
        message.setdefault("content", "")  # the API of OpenAI and whoever follows it write null
    if not all(isinstance(message.get(key), str) for key in ("role", "content")):
        raise BadRow("wrong_type", f"{what} needs role and content as text; got {short(value)}.")
    return message


def _part(value: object, what: str) -> str:
    text = value.get("text") if isinstance(value, Mapping) and value.get("type", "text") == "text" else value
    if not isinstance(text, str):
        raise BadRow("wrong_type", f"{what} needs parts of text; got {short(value)}. Images and the like are not read.")
    return text


def _is_conversation(response: Any) -> bool:
    """Whether a response holds its prompt, too: it begins with another turn than an answer."""
    if isinstance(response, str):
        return _MARKER.search("\n\n" + response) is not None or _MESSAGES_AS_TEXT.match(response) is not None
    first = response[0] if isinstance(response, list) and response else None
    return isinstance(first, Mapping) and first.get("role", first.get("from")) not in ("assistant", "gpt")


def _given(value: object) -> object:
    """Drop keys without value: Arrow files give each message all the keys that any message has."""
    if isinstance(value, Mapping):
        return {key: _given(one) for key, one in value.items() if _is_given(one)}
    return [_given(one) for one in value] if isinstance(value, list) else value


def _is_given(value: object) -> bool:
    """Neither null nor NaN, as pandas writes what is missing: it equals nothing and would part equal turns."""
    return value is not None and value == value


def _annotator(value: object) -> str | None:
    if value is None or value == "" or value != value:  # NaN, as pandas writes what is missing
        return None
    if isinstance(value, float) and value.is_integer():  # and integers beside it
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, str | Integral):
        raise BadRow("wrong_type", f"annotator needs a name or an integer; got {short(value)}.")
    return str(value)


def _weight(value: object) -> float:
    if value is None or value == "":
        return 1.0
    try:
        weight = -1.0 if isinstance(value, bool) or not isinstance(value, str | Real) else float(value)
    except (ValueError, OverflowError):
        weight = -1.0
    if not 0 <= weight < inf:
        raise BadRow("bad_weight", f"weight needs a finite number of 0 or more; got {short(value)}.")
    return weight


def _canonical(pair: Pair) -> bytes:
    """The content of a pair as bytes, the same for the same content."""
    content = [pair.row, pair.prompt, pair.chosen, pair.rejected, pair.annotator, pair.weight]
    if (pair.origin, pair.verdict) != ("data", None):  # known of pairs in memory only
        content += [pair.origin, pair.verdict]
    text = json.dumps(content, sort_keys=True, ensure_ascii=False) + "\n"
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        before = text[max(0, error.start - 30) : error.start]
        message = f"a row needs UTF-8 text; got something else after {short(before)}."
        raise BadRow("not_utf8", message) from error


def _as_they_are(prompt: str, chosen: str, rejected: str) -> Texts:
    return prompt, chosen, rejected


def _messages(prompt: Messages, chosen: Messages, rejected: Messages) -> Texts:
    """Three lists; responses that repeat the whole prompt lose it, or the model would read it twice."""
    length = len(prompt)
    if length and chosen[:length] == rejected[:length] == prompt:
        return prompt, chosen[length:], rejected[length:]
    return prompt, chosen, rejected


def _implicit_messages(prompt: None, chosen: Messages, rejected: Messages) -> Texts:  # noqa: ARG001
    """Two conversations; the turns that they share are the prompt."""
    turn = _first_message_of_response(chosen, rejected)
    return chosen[:turn], chosen[turn:], rejected[turn:]


def _text_and_messages(prompt: str, chosen: Messages, rejected: Messages) -> Texts:
    """A prompt as text beside two conversations that hold it as a user turn, or beside two lone answers."""
    if all(message["role"] == "assistant" for message in chosen[:1] + rejected[:1]):
        return [{"role": "user", "content": prompt}], chosen, rejected
    turn = _first_message_of_response(chosen, rejected)
    if prompt.strip() not in [message["content"].strip() for message in chosen[:turn] if message["role"] == "user"]:
        raise BadRow("no_shared_prompt", f"prompt needs to be a user turn of both conversations; got {short(prompt)}.")
    return chosen[:turn], chosen[turn:], rejected[turn:]


def _first_message_of_response(chosen: Messages, rejected: Messages) -> int:
    return _first_response_turn(chosen, rejected, lambda message: message["role"] == "assistant")


def _transcripts(prompt: None, chosen: str, rejected: str) -> Texts:  # noqa: ARG001
    r"""Two transcripts of "\n\nHuman: ...\n\nAssistant: ..." turns; the prompt ends with "\n\nAssistant:"."""
    turns = _turns(chosen)
    if len(turns) == 1:
        message = (
            r'a row needs a prompt, or chosen with "\n\nHuman:" turns; got neither. Name the columns with '
            "--prompt_column, --chosen_column and --rejected_column."
        )
        raise BadRow("no_shared_prompt", message)
    begin = turns[_first_response_turn(turns, _turns(rejected), lambda turn: turn[0] == "Assistant")][1]
    return chosen[:begin], chosen[begin:], rejected[begin:]


def _turns(transcript: str) -> list[tuple[str, int, str]]:
    """Who speaks, where the words begin, and the words; what precedes the first marker is a turn of nobody."""
    padded = "\n\n" + transcript  # some files cut the white space before the first marker
    markers = list(_MARKER.finditer(padded))
    ends = [marker.start() for marker in markers] + [len(padded)]
    turns = [("", 0, padded[: ends[0]])]
    turns += [(m.group(1), m.end() - 2, padded[m.end() : end]) for m, end in zip(markers, ends[1:], strict=True)]
    return turns


def _first_response_turn(chosen: Sequence[T], rejected: Sequence[T], is_assistant: Callable[[T], bool]) -> int:
    """The turn at which two conversations become responses.

    That is the first turn in which they differ. If they never differ before one of them ends, the last turn of the
    shorter one is its response, so that no response is ever empty. Two conversations that differ first in what the
    user says, or where only one has an answer, do not answer the same prompt.
    """
    shortest = min(len(chosen), len(rejected))
    shared = next((i for i in range(shortest) if chosen[i] != rejected[i]), shortest)
    turn = min(shared, shortest - 1)
    if turn < 0 or not is_assistant(chosen[turn]) or not is_assistant(rejected[turn]):
        raise BadRow(
            "no_shared_prompt",
            "chosen and rejected need the same turns up to an assistant turn of both; "
            f"got {len(chosen)} and {len(rejected)} turns, of which the first {shared} agree.",
        )
    return turn


FORMATS: Mapping[str, FormatSpec] = MappingProxyType(
    {
        "text": FormatSpec(fn=_as_they_are, prompt="text", responses="text"),
        "messages": FormatSpec(fn=_messages, prompt="messages", responses="messages"),
        "text_and_messages": FormatSpec(fn=_text_and_messages, prompt="text", responses="messages"),
        "implicit_messages": FormatSpec(fn=_implicit_messages, prompt="nothing", responses="messages"),
        "transcripts": FormatSpec(fn=_transcripts, prompt="nothing", responses="text"),
    }
)
