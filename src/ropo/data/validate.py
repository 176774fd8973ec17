"""What is wrong with the texts of pairs that could be read.

In: `Pair`s. Out: a `Problem` for each text that is empty, each pair that prefers nothing, and each pair that an
earlier one already held, in the same order or the opposite one.

The one idea: two pairs are the same question if they have the same id, whichever response is called chosen; so one
pass with a dictionary finds all repetitions. A second id, of the normalised text, finds those that are the same to a
reader.
"""

import logging
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ropo.data.load import Loaded
from ropo.data.mixture import load_mixture
from ropo.data.problems import Problem, printable, render, rows_left_out, short
from ropo.pairs import Pair, Text, pair_id, said

logger = logging.getLogger(__name__)

_LONG_PROMPT = 20  # characters
_MAX_CHARACTERS = 5_000_000  # of one text: a tokenizer may need time with the square of it


def validate_pairs(pairs: Iterable[Pair]) -> list[Problem]:
    """Find what is wrong with the texts, in one pass.

    White space around a text does not count: a response of blanks is empty, and two responses that differ by it are
    identical. Votes of different annotators on one pair are no duplicates. A pair that will be left out is not
    compared with others.

    Args:
        pairs: In the order of the data.

    Returns:
        Findings in the order of the data; a pair may have several.

    Examples:
        >>> pairs = [
        ...     Pair(prompt="2 + 2 =", chosen=" 4", rejected=" 5", row=0),
        ...     Pair(prompt="2 + 2 =", chosen=" 5", rejected=" 4", row=1),
        ... ]
        >>> [(problem.kind, problem.row) for problem in validate_pairs(pairs)]
        [('contradictory', 1)]
    """
    problems: list[Problem] = []
    first: dict[str, Pair] = {}  # by id
    first_order: dict[tuple[str, bool], Pair] = {}  # by id, and whether `first` calls chosen what this calls rejected
    first_text: dict[str, Pair] = {}  # by `text_id`
    first_vote: dict[tuple[str, bool, str | None], Pair] = {}  # by annotator as well
    for pair in pairs:
        useless = _useless(pair)
        problems += useless
        if useless:
            continue
        if _repeats_prompt(pair):
            message = f"chosen and rejected both begin with the prompt, {short(pair.prompt)}."
            problems.append(Problem.of(pair, "repeats_prompt", message))
        is_swapped = pair.chosen != first.setdefault(pair.id, pair).chosen
        first_order.setdefault((pair.id, is_swapped), pair)
        if first[pair.id] is pair:
            problems += _near(pair, first_text)
        earlier = first_vote.setdefault((pair.id, is_swapped, pair.annotator), pair)
        if earlier is not pair:
            problems.append(Problem.of(pair, "duplicate", f"the pair is that of {earlier.place}."))
        opposite = first_order.get((pair.id, not is_swapped))
        if opposite is not None:
            message = f"the pair prefers the opposite of {opposite.place}."
            problems.append(Problem.of(pair, "contradictory", message))
    return problems


def _repeats_prompt(pair: Pair) -> bool:
    """Whether the responses are whole transcripts; a short prompt may well be how two answers begin."""
    prompt, chosen, rejected = _bare(pair.prompt), _bare(pair.chosen), _bare(pair.rejected)
    if not (isinstance(prompt, str) and isinstance(chosen, str) and isinstance(rejected, str)):
        return False
    return len(prompt) >= _LONG_PROMPT and chosen.startswith(prompt) and rejected.startswith(prompt)


def _near(pair: Pair, first_text: dict[str, Pair]) -> list[Problem]:
    """Whether another pair, which is not this one to the letter, has the same normalised text."""
    earlier = first_text.setdefault(text_id(pair), pair)
    if earlier is pair:
        return []
    chosen = _normalised(pair.chosen)
    if chosen == _normalised(pair.rejected):  # neither order is the opposite of the other
        return []
    is_same = _normalised(earlier.chosen) == chosen
    kind, verb = ("near_duplicate", "is nearly") if is_same else ("near_contradiction", "is nearly, turned,")
    return [Problem.of(pair, kind, f"the pair {verb} that of {earlier.place}.")]


def text_id(pair: Pair, *, has_punctuation: bool = True) -> str:
    """Name a pair by its normalised text, whichever response is called chosen: the same for what reads the same.

    Letter case, the amount of white space and how letters are encoded (composed or decomposed, NFC) do not count.
    Everything else does: operators, signs, accents, vowel signs, punctuation, the roles of messages and whatever they
    carry beside their content. Compatibility forms (NFKC) stay apart, since x² is not x2.

    Args:
        pair: The pair.
        has_punctuation: Whether punctuation counts. Without it more pairs have the same id ("Hi" and "Hi!", but also
            "2 - 1" and "2 * 1"): enough to keep pairs together, too much to call them one.

    Returns:
        16 hexadecimal digits.

    Examples:
        >>> one, other = (Pair(prompt=f"Is 3 {sign} 4 ?", chosen="yes", rejected="no", row=0) for sign in "<>")
        >>> text_id(one) == text_id(other)
        False
        >>> text_id(one) == text_id(Pair(prompt="is  3 < 4 ?", chosen="No", rejected="Yes", row=1))
        True
    """
    texts = (pair.prompt, pair.chosen, pair.rejected)
    return pair_id(*(_normalised(text, has_punctuation=has_punctuation) for text in texts))


def _normalised(text: Text, *, has_punctuation: bool = True) -> Text:
    if not isinstance(text, str):
        return [
            {**message, "content": _normalised(message["content"], has_punctuation=has_punctuation)} for message in text
        ]
    # Case folding is defined on decomposed text (Unicode, D145) and may leave text that is not composed.
    folded = unicodedata.normalize("NFC", unicodedata.normalize("NFD", text).casefold())
    if not has_punctuation:
        marks = {ord(letter): " " for letter in set(folded) if unicodedata.category(letter).startswith("P")}
        folded = folded.translate(marks).strip() or folded
    return " ".join(folded.split())


def _useless(pair: Pair) -> list[Problem]:
    """Why nothing can be learned from the pair, whatever the others are."""
    prompt, chosen, rejected = _bare(pair.prompt), _bare(pair.chosen), _bare(pair.rejected)
    problems = []
    if _is_empty(prompt):
        message = f"prompt needs text; got {short(pair.prompt)}."
        problems.append(Problem.of(pair, "empty_prompt", message))
    for name, response in (("chosen", chosen), ("rejected", rejected)):
        if _is_empty(response):
            message = f"{name} needs text; got {short(getattr(pair, name))}."
            problems.append(Problem.of(pair, "empty_response", message))
    for name in ("prompt", "chosen", "rejected"):
        text = getattr(pair, name)
        length = len(text) if isinstance(text, str) else sum(len(message["content"]) for message in text)
        if length > _MAX_CHARACTERS:
            message = f"{name} needs at most {_MAX_CHARACTERS:,} characters; got {length:,}."
            problems.append(Problem.of(pair, "text_too_long", message))
    if chosen == rejected and not problems:  # one reason is enough to leave a pair out
        message = f"chosen and rejected need to differ; got {short(pair.chosen)} twice."
        problems.append(Problem.of(pair, "identical", message))
    return problems


def _bare(text: Text) -> Text:
    """The text without the white space around it, or around the content of each message."""
    if isinstance(text, str):
        return text.strip()
    return [{**message, "content": message["content"].strip()} for message in text]


def _is_empty(text: Text) -> bool:
    return not text if isinstance(text, str) else not any(said(message) for message in text)


class DataError(ValueError):
    """The data holds rows that would corrupt training; the message lists them."""


def read_checked(
    dataset: Any,
    *,
    split: str = "train",
    columns: Mapping[str, str] | None = None,
    on_bad_rows: str = "refuse",
    max_samples: int | None = None,
    seed: int = 0,
) -> tuple[Loaded, list[Pair], list[Problem]]:
    """Read a dataset and check its text.

    Args:
        dataset: Anything that `load_pairs` reads, or a `Mixture`.
        split: Of the dataset.
        columns: See `load_pairs`.
        on_bad_rows: "refuse" raises when a row has an error; "skip" leaves it out.
        max_samples: See `load_mixture`.
        seed: See `load_mixture`.

    Returns:
        What was read, the pairs to go on with, and every problem.

    Raises:
        ValueError: If two pairs share a row.
        DataError: As described at `on_bad_rows`; or if rows are lost unread, or no pair is left.
    """
    loaded = load_mixture(dataset, split=split, columns=columns, max_samples=max_samples, seed=seed)
    if len({pair.row for pair in loaded.pairs}) < len(loaded.pairs):
        raise ValueError(
            "Pairs need a row of their own each; got some that share one. Number them anew before joining lists."
        )
    problems = [*loaded.problems, *validate_pairs(loaded.pairs)]
    errors = [problem for problem in problems if problem.severity in ("fatal", "error")]
    if not loaded.num_rows:
        raise DataError(render(errors))
    if lost := [problem for problem in errors if problem.severity == "fatal"]:
        raise DataError(f"Only {len(loaded.pairs)} pairs could be read before the data broke off.\n{render(lost)}")
    if errors and on_bad_rows == "refuse":
        raise DataError(
            f"{len({problem.row for problem in errors})} of {loaded.num_rows} rows would corrupt training. "
            f"Fix them, or go on without them by on_bad_rows='skip'.\n{render(errors)}"
        )
    if loaded.ignored_columns:
        logger.warning("Columns that nothing reads: %s.", ", ".join(map(printable, loaded.ignored_columns)))
    out = rows_left_out(problems)
    pairs = [pair for pair in loaded.pairs if pair.row not in out]
    if not pairs:
        raise DataError(f"No pair is left to train on.\n{render(problems)}")
    _tell_weights(pairs, (columns or {}).get("weight", "weight"))
    return loaded, pairs, problems


def _tell_weights(pairs: Sequence[Pair], name: str) -> None:
    """Say that weights are read: a column of that name may have been meant for something else."""
    weights = [pair.weight for pair in pairs]
    if set(weights) != {1.0}:
        logger.info(
            "Weights (column %s): a pair counts by its weight in the loss, %g to %g, mean %g; %d of %d pairs have "
            "weight 0, and nothing is trained on them.",
            name, min(weights), max(weights), sum(weights) / len(weights), weights.count(0.0), len(weights),
        )  # fmt: skip
