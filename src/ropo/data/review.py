"""What a person says about labels: a table to fill in, and the way back into the data.

In: pairs with what was found about them; a table with verdicts. Out: `review.csv`; pairs with their `verdict`.

The one idea: only three columns are read back (row, pair_id, verdict), so a person may add, sort or delete anything
else, and a table that belongs to other data is noticed. What a spreadsheet would change has an apostrophe in front.
"""

import csv
import io
import re
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from unicodedata import normalize

from ropo.data.csv_rows import csv_lines, delimiter_of
from ropo.data.problems import printable, short, visible
from ropo.pairs import Pair, Text, said
from ropo.provenance import file_kind

VERDICTS = ("right", "wrong", "drop")
COLUMNS = ("verdict", "p_flip", "decision", "row", "pair_id", "margin", "annotator", "prompt", "chosen", "rejected")
_NEEDED = ("row", "pair_id", "verdict")
_NUMBER = re.compile(r"\d+(e\d+)?")  # what 16 hexadecimal digits may look like to a spreadsheet
_ROW = re.compile(r"(\d+)([.,]0+)?")  # 12.0 where a column of numbers has a gap


def write_review(
    path: Path,
    pairs: Sequence[Pair],
    *,
    p_flip: Mapping[int, float | None],
    margins: Mapping[int, float],
    decisions: Mapping[int, str],
) -> None:
    """Write the table for a person, in the order given; the column `verdict` is empty where nobody has judged.

    A spreadsheet would run a cell that begins like a formula, and write an id of digits as 1.2E+15, so these get an
    apostrophe in front. Characters that hide or reverse the order of letters are written out.

    Args:
        path: Where to write.
        pairs: Those of the data, the one to read first in front.
        p_flip: P(flipped) by row; None where it is not known, and the cell stays empty.
        margins: Held-out margin by row.
        decisions: Decision by row.
    """
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        is_mixed = any(pair.source for pair in pairs)
        writer.writerow([*COLUMNS, *(["source"] if is_mixed else [])])
        for pair in pairs:
            texts = (pair.annotator or "", *(_plain(text) for text in (pair.prompt, pair.chosen, pair.rejected)))
            p = p_flip[pair.row]
            shown = "" if p is None else f"{p:.4f}"
            name = f"'{pair.id}" if _NUMBER.fullmatch(pair.id) else pair.id
            known = (pair.verdict or "", shown, decisions[pair.row], pair.row, name, f"{margins[pair.row]:.4f}")
            texts += (pair.source or "",) if is_mixed else ()
            writer.writerow([*known, *(_no_formula(visible(text)) for text in texts)])


def _no_formula(text: str) -> str:
    """Full-width signs, and blanks before a sign, begin a formula in some spreadsheets."""
    first = normalize("NFKC", text.lstrip()[:1])
    return f"'{text}" if first.startswith(("=", "+", "-", "@", "'")) or text[:1] in ("\t", "\r", "\n") else text


def _plain(text: Text) -> str:
    if isinstance(text, str):
        return text
    return "\n\n".join(f"{message['role']}: {said(message)}" for message in text)


def read_verdicts(path: Path) -> dict[int, tuple[str, str]]:
    """Read the verdicts of a table that `write_review` wrote and a person filled in.

    Args:
        path: The table; rows without a verdict are passed over.

    Returns:
        By row: `pair_id` and verdict.

    Raises:
        FileNotFoundError: If it is not there.
        ValueError: If it is no table, a column is missing or there twice, a row holds no number or an unknown verdict,
            or two verdicts on one row differ; the line is named.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--decisions needs a table such as review.csv; {path} is {file_kind(path)}.")
    found: dict[int, tuple[str, str]] = {}
    csv.field_size_limit(2**31 - 1)  # a long conversation is one field
    data = path.read_bytes()
    # What is read back is ASCII, so texts may be in whatever encoding a spreadsheet has saved them.
    text = data.decode("utf-16" if data[:2] in (BOM_UTF16_LE, BOM_UTF16_BE) else "utf-8-sig", "replace")
    lines = csv_lines(io.BytesIO(text.encode()))
    header = next(lines, "")
    reader = csv.DictReader(chain([header], lines), delimiter=delimiter_of(header), strict=True)
    try:
        names = [name.strip().lower() for name in reader.fieldnames or ()]
        for name in _NEEDED:
            if names.count(name) != 1:
                raise ValueError(f"{path} needs columns {', '.join(_NEEDED)}; it has {names.count(name)} named {name}.")
        reader.fieldnames = names
        for record in reader:
            row, name, verdict = ((record[name] or "").strip().strip("'\"") for name in _NEEDED)
            if not verdict:
                continue
            place, verdict = f"{path}, line {reader.line_num}", verdict.lower()
            if verdict not in VERDICTS:
                raise ValueError(
                    f"{place}: verdict needs one of {', '.join(VERDICTS)}, or nothing; got {short(verdict)}."
                )
            number = _ROW.fullmatch(row)
            if number is None:
                raise ValueError(f"{place}: row needs a number from 0; got {short(record['row'])}.")
            if found.setdefault(int(number[1]), (name, verdict)) != (name, verdict):
                raise ValueError(
                    f"{place}: row {int(number[1])} needs one verdict; got another one before. Delete one."
                )
    except csv.Error as error:
        raise ValueError(
            f"{path}, after line {reader.line_num}: a table needs to be CSV; got {error}. Save it as CSV again."
        ) from error
    return found


def with_verdicts(
    pairs: Sequence[Pair],
    verdicts: Mapping[int, tuple[str, str]],
    *,
    vouched: Collection[int] = (),
    is_whole: bool = False,
) -> list[Pair]:
    """The pairs with what a person said about them.

    Args:
        pairs: Those of the data.
        verdicts: As `read_verdicts` gives them.
        vouched: Rows whose verdict is that of a trusted pair.
        is_whole: Whether `pairs` are all that could be read. Otherwise verdicts on others are passed over.

    Raises:
        ValueError: If a row holds another pair than the one that was judged, or is not there.

    Examples:
        >>> pair = Pair(prompt="p", chosen="a", rejected="b", row=0)
        >>> with_verdicts([pair], {0: (pair.id, "wrong")})[0].verdict
        'wrong'
    """
    if is_whole and (missing := sorted(set(verdicts) - {pair.row for pair in pairs})):
        raise ValueError(
            f"A verdict needs a row that the data holds; got {len(missing)} on others, the first on row {missing[0]}. "
            "Use the table with the data it was made from."
        )
    found = []
    for pair in pairs:
        name, verdict = verdicts.get(pair.row, (pair.id, pair.verdict))
        if name != pair.id:
            remedy = "Use the table with the data it was made from."
            if _NUMBER.fullmatch(pair.id) and re.fullmatch(r"[\d.,+e]+", name, re.IGNORECASE):
                remedy = (
                    f"If a spreadsheet has made a number of it, write '{pair.id} into that cell, with the apostrophe."
                )
            raise ValueError(
                f"The verdict on row {pair.row} is about pair {printable(name)}; the data holds {pair.id} there. "
                f"{remedy}"
            )
        found.append(replace(pair, verdict=verdict, is_vouched=pair.is_vouched or pair.row in vouched))
    return found


def verdicts_of(trusted: Sequence[Pair], pairs: Sequence[Pair]) -> dict[int, tuple[str, str]]:
    """What trusted pairs say of the same pairs in the data.

    Args:
        trusted: Pairs whose labels are known to be right.
        pairs: Those of the data.

    Returns:
        As `read_verdicts`: "right" where the label is that of the trusted pair, "wrong" where it is the opposite.

    Raises:
        ValueError: If two trusted pairs contradict each other, or every pair of the data is trusted.

    Examples:
        >>> data = [Pair(prompt="p", chosen=a, rejected=b, row=row) for row, (a, b) in enumerate(("xy", "yx", "xz"))]
        >>> [verdict for _, verdict in verdicts_of(data[:1], data).values()]
        ['right', 'wrong']
    """
    preferred: dict[str, Pair] = {}
    for pair in trusted:
        if preferred.setdefault(pair.id, pair).chosen != pair.chosen:
            raise ValueError(
                f"Trusted pairs need labels that are right; rows {preferred[pair.id].row} and {pair.row} contradict "
                "each other. Remove one."
            )
    known = [pair for pair in pairs if pair.id in preferred]
    if known and len(known) == len(pairs):
        raise ValueError(
            f"--trusted needs pairs whose labels somebody has checked; got all {len(pairs)} pairs of the dataset "
            "itself, which leaves nothing to estimate. Leave it out, or name another file."
        )
    return {pair.row: (pair.id, "right" if pair.chosen == preferred[pair.id].chosen else "wrong") for pair in known}
