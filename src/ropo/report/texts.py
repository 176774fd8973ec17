"""Text of a pair -> plain parts that a page can show: turn by turn, of bounded length, differing words marked.

In: `Text` of pairs; it is untrusted and may hold anything. Out: dicts of strings, still unescaped: escaping belongs
to the template that knows whether it writes HTML or Markdown.

The one idea: a text is a list of turns, a turn a list of `[string, is_marked]` parts; joining the strings gives the
text back, save for white space around it.
"""

import json
import re
from collections import Counter
from difflib import SequenceMatcher
from itertools import groupby
from typing import Any

from ropo.data.problems import visible
from ropo.pairs import Text, said
from ropo.provenance import Json

MAX_CHARACTERS = 5000  # of one text; ten suspects of three texts then stay well below a megabyte of page
EXCERPT_CHARACTERS = 90
SHORTEST_SHARED_RUN = 3  # words
MOST_MATCHES = 30_000  # equal words at any two places; the time of a comparison grows with it
# Above this share of differing words, marks would cover the texts; a handful of words is still worth marking.
MOST_MARKED = 0.85
FEW_WORDS = 30

# A word is a run of letters and digits; scripts without spaces between words are compared sign by sign.
_WORD = re.compile(r"\s+|[\u3040-\u30ff\u3400-\u9fff]|\w+|[^\w\s]")
# Control characters are invisible in a page, and some of them are not allowed in one; Unicode has a picture of each.
_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"} | {127: 0x2421}


def clean(text: str) -> str:
    r"""Make `text` safe to encode and visible: control characters become pictures, lone surrogates question marks.

    So does what would hide or reverse the order of letters; see `ropo.data.problems.visible`.

    Examples:
        >>> clean("a\x00b\u202e")
        'a␀b⟨U+202E⟩'
    """
    text = visible(text.replace("\r\n", "\n").translate(_PICTURES))
    return text.encode("utf-8", "replace").decode("utf-8")


def turns(text: Text) -> list[tuple[str, str]]:
    """Split a text into (role, content) turns; plain text is one turn without a role.

    Content that is not a string (parts of a multimodal message, a tool call) is shown by its text, or else as JSON.
    """
    if isinstance(text, str):
        return [("", clean(text))]
    return [(clean(str(message.get("role", ""))), clean(_content(message))) for message in text]


def _content(message: Json) -> str:
    content = message.get("content")
    if isinstance(content, str):
        return said(message)
    if isinstance(content, list):
        pieces = [item.get("text") if isinstance(item, dict) else item for item in content]
        if all(isinstance(piece, str) for piece in pieces):
            return "".join(str(piece) for piece in pieces)
    rest = {key: value for key, value in message.items() if key != "role"}
    return json.dumps(rest, ensure_ascii=False, default=str)


def plain(text: Text) -> str:
    """The text as one string; turns begin with their role when there is more than one."""
    parts = turns(text)
    if len(parts) == 1:
        return parts[0][1]
    return "\n\n".join(f"{role}: {content}" for role, content in parts)


def excerpt(text: Text) -> str:
    """The end of a text in one short line: of a conversation, the end is what the responses answer."""
    line = " ".join(plain(text).split())
    return line if len(line) <= EXCERPT_CHARACTERS else "…" + line[-EXCERPT_CHARACTERS:]


def show_prompt(prompt: Text) -> Json:
    """A prompt as shown: the last `MAX_CHARACTERS` of it, since its end is what the responses answer.

    Returns:
        `turns`: list of `role` and `parts`; `num_hidden`: characters left out at the beginning.
    """
    parts = turns(prompt)
    num_hidden = max(0, sum(len(content) for _, content in parts) - MAX_CHARACTERS)
    shown, to_skip = [], num_hidden
    for role, content in parts:
        kept = content[to_skip:]
        to_skip -= len(content) - len(kept)
        if kept or not content:
            shown.append({"role": role, "parts": [[kept.strip(), False]]})
    return {"turns": shown, "num_hidden": num_hidden}


def compare(chosen: Text, rejected: Text) -> Json:
    """Both responses as shown, each with the words marked that the other lacks in that place.

    Returns:
        `chosen`, `rejected`: as `show_prompt`, cut at the end; `share_differing`: of the words of both together, how
        many differ; `is_marked`: false when nothing differs, and when so much differs that marks would say nothing.
    """
    words = [_words(chosen), _words(rejected)]
    marks = _differing([word for _, word in words[0]], [word for _, word in words[1]])
    num_words, num_differing = sum(map(len, marks)), sum(map(sum, marks))
    share = num_differing / num_words if num_words else 0.0
    is_marked = 0 < share <= (MOST_MARKED if num_words > FEW_WORDS else 1)
    sides = [
        _show_response(text, side_words, side_marks if is_marked else [False] * len(side_marks))
        for text, side_words, side_marks in zip((chosen, rejected), words, marks, strict=True)
    ]
    return {"chosen": sides[0], "rejected": sides[1], "share_differing": round(share, 4), "is_marked": is_marked}


def _words(text: Text) -> list[tuple[int, str]]:
    """(turn, word) of the part that is shown; a word carries the white space behind it."""
    found: list[tuple[int, str]] = []
    budget = MAX_CHARACTERS
    for index, (_, content) in enumerate(turns(text)):
        for match in _WORD.finditer(content[:budget]):
            if match.group().isspace() and found and found[-1][0] == index:
                found[-1] = (index, found[-1][1] + match.group())
            else:
                found.append((index, match.group()))
        budget = max(0, budget - len(content))
    return found


def _differing(first: list[str], second: list[str]) -> tuple[list[bool], list[bool]]:
    """For each word of each text, whether it is missing in the other one."""
    left, right = [word.strip() for word in first], [word.strip() for word in second]
    shortest = min(len(left), len(right))
    begin = next((i for i in range(shortest) if left[i] != right[i]), shortest)
    end = next((i for i in range(shortest - begin) if left[-1 - i] != right[-1 - i]), shortest - begin)
    middle = left[begin : len(left) - end], right[begin : len(right) - end]
    # Its heuristic for speed ignores frequent words; it is left off unless a text repeats itself without end.
    counts = Counter(middle[0]), Counter(middle[1])
    num_matches = sum(number * counts[1][word] for word, number in counts[0].items())
    blocks = SequenceMatcher(None, *middle, autojunk=num_matches > MOST_MATCHES).get_matching_blocks()
    if 2 * sum(block.size for block in blocks) < min(map(len, middle)):
        # Two texts that say different things share "the" and "," by chance; only runs of words mean something there.
        blocks = [block for block in blocks if block.size >= SHORTEST_SHARED_RUN]
    marks = [[begin <= i < len(side) - end for i in range(len(side))] for side in (left, right)]
    for block in blocks:
        for offset in range(block.size):
            marks[0][begin + block.a + offset] = marks[1][begin + block.b + offset] = False
    return marks[0], marks[1]


def _show_response(text: Text, words: list[tuple[int, str]], marks: list[bool]) -> Json:
    shown = []
    for index, (role, _) in enumerate(turns(text)):
        of_turn = [(word, is_marked) for (turn, word), is_marked in zip(words, marks, strict=True) if turn == index]
        shown.append({"role": role, "parts": _parts(of_turn)})
    num_hidden = max(0, sum(len(content) for _, content in turns(text)) - MAX_CHARACTERS)
    return {"turns": shown, "num_hidden": num_hidden}


def _parts(words: list[tuple[str, bool]]) -> list[list[Any]]:
    """Runs of words with the same mark; white space behind a marked run and around the whole is not part of it."""
    parts: list[list[Any]] = []
    for is_marked, run in groupby(words, key=lambda item: item[1]):
        text = "".join(word for word, _ in run)
        if is_marked:
            behind = text[len(text.rstrip()) :]
            parts += [[text.rstrip(), True], [behind, False]]
        elif parts:
            parts[-1][0] += text
        else:
            parts.append([text, False])
    if parts:
        parts[0][0] = parts[0][0].lstrip()
        parts[-1][0] = parts[-1][0].rstrip()
    return [part for part in parts if part[0]]
