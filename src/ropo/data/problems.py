"""What can be wrong with a row of preference data, and what happens to it.

In: nothing; this is the table that reading, checking and tokenising share.
Out: `Problem`, one finding about one row; `PROBLEMS`, what each kind of finding means and what to do about it; the
findings as counts, as plain text, and the table as Markdown.

Add a kind of problem: one entry in `PROBLEMS`, the place that finds it, one test. `docs/formats.md` shows the table
as `problems_table` prints it; a test compares the two.
"""

import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from ropo.pairs import Pair

# Controls, soft hyphens, marks and overrides of direction, fillers and spaces without width, invisible operators, tags;
# and joiners beside ASCII. Each branch begins with a set, which long texts are searched for at once.
_HIDDEN = re.compile(
    "[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\xad\u061c\u115f\u1160\u17b4\u17b5\u180e\u200b\u200e\u200f\u202a-\u202e"
    "\u2060-\u206f\u3164\ufeff\uffa0\ufff9-\ufffb\U000e0000-\U000e007f]"
    "|[\u034f\u200c\u200d](?:(?<![^\0-\x7f][\u034f\u200c\u200d])|(?![^\0-\x7f]))"
)
Severity = Literal["fatal", "error", "left_out", "warning"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProblemSpec:
    """What a kind of problem means.

    Attributes:
        severity: "fatal" if no training takes the data, since rows are lost that nobody has seen; "error" if training
            refuses the data until it is fixed or the row is skipped on request; "left_out" if training goes on without
            the row; "warning" if the row is kept.
        meaning: What is the matter, in one sentence.
        remedy: What the user can do about it.
    """

    severity: Severity
    meaning: str
    remedy: str


PROBLEMS: Mapping[str, ProblemSpec] = MappingProxyType(
    {
        "empty_file": ProblemSpec(
            severity="error",
            meaning="The source holds no rows.",
            remedy="Check the path and the split.",
        ),
        "unread": ProblemSpec(
            severity="fatal",
            meaning="The rest of the file cannot be read, since where its next row begins cannot be known.",
            remedy="Mend the file at that line; on_bad_rows='skip' does not go on without rows that nobody has seen.",
        ),
        "not_utf8": ProblemSpec(
            severity="error",
            meaning="The text holds bytes that are not UTF-8, or half of a character.",
            remedy="Save the file as UTF-8.",
        ),
        "not_json": ProblemSpec(
            severity="error",
            meaning="The line is not JSON, or one object holds a key twice.",
            remedy="Write one object per line (.jsonl), or one list of objects (.json).",
        ),
        "not_csv": ProblemSpec(
            severity="error",
            meaning="The record has not as many fields as the header, or is the header once more.",
            remedy="Separate fields by commas; quote a field with commas, quotes or line ends, doubling its quotes.",
        ),
        "not_an_object": ProblemSpec(
            severity="error",
            meaning="The row is not an object with named fields.",
            remedy="Give each row as an object: {chosen, rejected} and, if it is not part of both, prompt.",
        ),
        "missing_field": ProblemSpec(
            severity="error",
            meaning="A field that the row needs is absent or null.",
            remedy="Fill the field, or say which column holds it.",
        ),
        "wrong_type": ProblemSpec(
            severity="error",
            meaning="A field is neither text nor a list of messages, or the fields do not go together.",
            remedy="Use text for all, or lists of messages (role, content) whose responses begin with the assistant.",
        ),
        "mixed_formats": ProblemSpec(
            severity="error",
            meaning="The row has another layout than the rows before it.",
            remedy="Bring all rows into one layout.",
        ),
        "no_shared_prompt": ProblemSpec(
            severity="error",
            meaning="There is no prompt: the two conversations do not agree up to an assistant turn that both have.",
            remedy="Give the prompt as a column of its own, or let both conversations begin with the same turns.",
        ),
        "bad_weight": ProblemSpec(
            severity="error",
            meaning="The weight is not a finite number of 0 or more, or only some of the rows have one.",
            remedy="Correct the weight; give one to every row or to none.",
        ),
        "empty_prompt": ProblemSpec(
            severity="left_out",
            meaning="The prompt has no text, so there is nothing to answer and nothing to sample a new answer from.",
            remedy="Give the prompt at least one word.",
        ),
        "empty_response": ProblemSpec(
            severity="left_out",
            meaning="A response has no text; training on it would compare a lone end-of-text token with an answer.",
            remedy="Fill in the response, or the words with which the model should refuse.",
        ),
        "text_too_long": ProblemSpec(
            severity="left_out",
            meaning="A text has more than 5,000,000 characters, more than any model reads; cutting it up takes hours.",
            remedy="Shorten it, or look whether a quote too many has made one text of many rows.",
        ),
        "identical": ProblemSpec(
            severity="left_out",
            meaning="Chosen and rejected are the same, or are so once cut to the maximal length; it prefers nothing.",
            remedy="Remove the pair; many of them point to ties, or to a mistake in how the data was made.",
        ),
        "tie": ProblemSpec(
            severity="left_out",
            meaning="The row says that neither response is better.",
            remedy="Nothing; a tie prefers nothing.",
        ),
        "template_refuses": ProblemSpec(
            severity="left_out",
            meaning="The model's chat template does not take this conversation; the message says why.",
            remedy="Bring the turns into the order it wants; put the words of a system message into the first turn.",
        ),
        "template_leaves_out": ProblemSpec(
            severity="warning",
            meaning="The chat template leaves out what a message says, so the model never reads it.",
            remedy="Use a template that knows such messages (system, tool calls), or write them into the user's turn.",
        ),
        "template_without_end": ProblemSpec(
            severity="warning",
            meaning="The chat template ends an answer without a control token, so the model never learns to stop.",
            remedy="Let tokenizer.chat_template write the end-of-sequence token after an assistant's content.",
        ),
        "template_with_date": ProblemSpec(
            severity="warning",
            meaning="The chat template writes the date: all texts of a run get that of its start.",
            remedy="Nothing; write a date into tokenizer.chat_template if runs of different days are to be equal.",
        ),
        "text_without_template": ProblemSpec(
            severity="warning",
            meaning="The model comes with a chat template, and plain text is read without it.",
            remedy="Nothing for a base model; for one that chats give messages, as it is asked later.",
        ),
        "templated_text": ProblemSpec(
            severity="warning",
            meaning="The plain text begins with a control token, as if a chat template had been applied to it already.",
            remedy="Nothing if it is this model's template: no second token is put before it. Else give messages.",
        ),
        "unknown_tokens": ProblemSpec(
            severity="warning",
            meaning="The tokenizer has no tokens for part of the text and puts the one for unknown text in its place.",
            remedy="Use a model whose tokenizer knows the language and the signs of the data.",
        ),
        "control_tokens": ProblemSpec(
            severity="warning",
            meaning="A text holds the name of a control token; the message says how the model reads it.",
            remedy="Remove it unless it is meant so: in plain text it is a token, in a message it stays text.",
        ),
        "prompt_too_long": ProblemSpec(
            severity="left_out",
            meaning="The prompt alone has as many tokens as a sequence may have, or more.",
            remedy="Raise the maximal length or shorten the prompt.",
        ),
        "completion_emptied": ProblemSpec(
            severity="left_out",
            meaning="Cutting the pair to the maximal length leaves a response without tokens.",
            remedy="Raise the maximal length or shorten the prompt.",
        ),
        "truncated": ProblemSpec(
            severity="warning",
            meaning="A response is cut to the maximal length; its end is not learned from.",
            remedy="Raise the maximal length if many are cut.",
        ),
        "swallowed": ProblemSpec(
            severity="warning",
            meaning="A quoted field of a CSV file holds lines that look like rows; a quote too many does that.",
            remedy="Look at the line; write the data as .jsonl if the lines are meant.",
        ),
        "duplicate": ProblemSpec(
            severity="warning",
            meaning=(
                "The pair repeats an earlier row: same prompt, chosen, rejected and annotator. Training sees it twice; "
                "estimates count it once."
            ),
            remedy="Remove the repetition, unless it is meant as a weight.",
        ),
        "contradictory": ProblemSpec(
            severity="warning",
            meaning="The pair prefers the opposite of an earlier row. Both are kept: this is the noise to be found.",
            remedy="Nothing, or remove the label that you trust less.",
        ),
        "repeats_prompt": ProblemSpec(
            severity="warning",
            meaning="Both responses begin with the whole prompt, so the model reads it twice.",
            remedy="Cut it off the responses, or leave the prompt out: of two transcripts it is what they share.",
        ),
        "near_duplicate": ProblemSpec(
            severity="warning",
            meaning="The pair differs from an earlier row in case and white space only, and prefers the same.",
            remedy="Remove the repetition, unless it is meant as a weight.",
        ),
        "near_contradiction": ProblemSpec(
            severity="warning",
            meaning="The pair differs from an earlier row in case and white space only; its label is opposite.",
            remedy="Nothing, or remove the label that you trust less.",
        ),
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One finding about one row.

    Attributes:
        kind: A key of `PROBLEMS`.
        row: Place of the row in the input, counted from 0; None if the finding is about the whole source.
        line: Line of a text file at which the row begins, counted from 1; None for other sources.
        message: What was needed and what was found.
        source: Dataset and row in it, where several are mixed; see `Pair`.

    Raises:
        ValueError: If `kind` is not in `PROBLEMS`.
    """

    kind: str
    row: int | None
    line: int | None = None
    message: str
    source: str | None = None

    @classmethod
    def of(cls, pair: Pair, kind: str, message: str) -> "Problem":
        """A finding about a pair that was read."""
        return cls(kind=kind, row=pair.row, message=message, source=pair.source)

    def __post_init__(self) -> None:
        if self.kind not in PROBLEMS:
            raise ValueError(f"Problem needs a kind of {', '.join(PROBLEMS)}; got {self.kind!r}. Add it to PROBLEMS.")

    @property
    def severity(self) -> Severity:
        """How much it matters; see `ProblemSpec`."""
        return PROBLEMS[self.kind].severity


class BadRow(Exception):
    """A problem that does not know its place yet: code that looks at one row raises it, or hands it on as the row."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def rows_left_out(problems: Iterable["Problem"]) -> set[int | None]:
    """Rows that training goes on without, for an error or because nothing can be learned from them."""
    return {problem.row for problem in problems if PROBLEMS[problem.kind].severity != "warning"}


def printable(name: object) -> str:
    r"""A name from the data, as any terminal and file can show it: what cannot be printed is written as `\x..`.

    Examples:
        >>> print(printable("prompt"), printable("a\x1bb"), printable(""))
        prompt a\x1bb ""
    """
    text = str(name)
    return (text if text.isprintable() else text.encode("unicode_escape").decode()) or '""'


def visible(text: str) -> str:
    r"""A text for a reader: what would hide in it or reverse the order of its letters is written as ⟨U+...⟩.

    Joiners stay between letters of scripts that need them, and in emoji.

    Examples:
        >>> visible("not \u202edoog\u202c"), visible("a\u200db")
        ('not ⟨U+202E⟩doog⟨U+202C⟩', 'a⟨U+200D⟩b')
    """
    return _HIDDEN.sub(lambda found: "".join(f"⟨U+{ord(letter):04X}⟩" for letter in found.group()), text)


def short(value: object) -> str:
    """A value for a message: its type and how it begins, some 80 characters at most.

    Examples:
        >>> short("Hello"), short(3.5)
        ("str 'Hello'", 'float 3.5')
    """
    try:
        text = repr(value[:60] if isinstance(value, str) else value)
    except ValueError:  # an integer of thousands of digits
        text = "too long to write"
    return f"{type(value).__name__} {text if len(text) <= 70 else text[:70] + '...'}"


def summarise(problems: Iterable[Problem]) -> dict[str, int]:
    """Count rows by kind of problem.

    Args:
        problems: The findings, in any order; a row may have two of one kind, one for each response.

    Examples:
        >>> summarise([Problem(kind="truncated", row=row, message="") for row in (3, 3, 5)])
        {'truncated': 2}
    """
    counts = Counter(kind for kind, _ in {(problem.kind, problem.row) for problem in problems})
    return {kind: counts[kind] for kind in PROBLEMS if counts[kind]}


def render(problems: Iterable[Problem], *, limit: int = 20) -> str:
    """Write problems as plain text: one block per kind with its meaning, what to do and the first rows.

    Args:
        problems: The findings, in any order.
        limit: Number of findings to show of each kind; the others are counted.

    Examples:
        >>> print(render([Problem(kind="bad_weight", row=4, line=5, message="weight needs a number; got 'x'.")]))
        bad_weight: 1 error
          The weight is not a finite number of 0 or more, or only some of the rows have one.
          What to do: Correct the weight; give one to every row or to none.
          - row 4 (line 5): weight needs a number; got 'x'.
    """
    by_kind: dict[str, list[Problem]] = {}
    for problem in problems:
        by_kind.setdefault(problem.kind, []).append(problem)
    blocks = [_render_kind(kind, by_kind[kind], limit) for kind in PROBLEMS if kind in by_kind]
    return "\n\n".join(blocks) or "No problems found."


def problems_table() -> str:
    """Write `PROBLEMS` as the Markdown table of `docs/formats.md`."""
    rows = [f"| `{kind}` | {spec.severity} | {spec.meaning} | {spec.remedy} |" for kind, spec in PROBLEMS.items()]
    return "\n".join(["| kind | severity | meaning | what to do |", "|---|---|---|---|", *rows])


def _render_kind(kind: str, problems: list[Problem], limit: int) -> str:
    spec = PROBLEMS[kind]
    noun = {"fatal": "error", "error": "error", "left_out": "left out", "warning": "warning"}[spec.severity]
    plural = "s" if len(problems) > 1 and spec.severity != "left_out" else ""
    lines = [f"{kind}: {len(problems)} {noun}{plural}"]
    lines += textwrap.wrap(spec.meaning, width=110, initial_indent="  ", subsequent_indent="  ")
    lines += textwrap.wrap(f"What to do: {spec.remedy}", width=110, initial_indent="  ", subsequent_indent="  ")
    for problem in problems[:limit]:
        place = "the source" if problem.row is None else f"row {problem.row}"
        beside = [problem.source] if problem.source else []
        beside += [f"line {problem.line}"] if problem.line is not None else []
        place += f" ({', '.join(beside)})" if beside else ""
        lines.append(f"  - {place}: {problem.message}")
    if len(problems) > limit:
        lines.append(f"  - and {len(problems) - limit} more")
    return "\n".join(lines)
