"""What a person says about labels: a table to fill in, and the way back into the data.

In: pairs with what was found about them; a table with verdicts. Out: `review.csv`; pairs with their `verdict`.

The one idea: only three columns are read back (row, pair_id, verdict), so a person may add, sort or delete anything
else, and a table that belongs to other data is noticed.
"""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ropo.data.problems import short
from ropo.pairs import Pair, Text

VERDICTS = ("right", "wrong", "drop")
COLUMNS = ("verdict", "p_flip", "decision", "row", "pair_id", "margin", "annotator", "prompt", "chosen", "rejected")
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def write_review(
    path: Path,
    pairs: Sequence[Pair],
    *,
    p_flip: Mapping[int, float | None],
    margins: Mapping[int, float],
    decisions: Mapping[int, str],
) -> None:
    """Write the table for a person, in the order given; the column `verdict` is empty where nobody has judged.

    A spreadsheet would run a cell that begins like a formula, so such a text gets an apostrophe in front.

    Args:
        path: Where to write.
        pairs: Those of the data, the one to read first in front.
        p_flip: P(flipped) by row; None where it cannot be told, and the cell stays empty.
        margins: Held-out margin by row.
        decisions: Decision by row.
    """
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for pair in pairs:
            texts = (pair.annotator or "", *(_plain(text) for text in (pair.prompt, pair.chosen, pair.rejected)))
            told = p_flip[pair.row]
            shown = "" if told is None else f"{told:.4f}"
            known = (pair.verdict or "", shown, decisions[pair.row], pair.row, pair.id, f"{margins[pair.row]:.4f}")
            writer.writerow([*known, *(f"'{text}" if text.startswith(_FORMULA) else text for text in texts)])


def _plain(text: Text) -> str:
    if isinstance(text, str):
        return text
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in text)


def read_verdicts(path: Path) -> dict[int, tuple[str, str]]:
    """Read the verdicts of a table that `write_review` wrote and a person filled in.

    Args:
        path: The table; rows without a verdict are passed over.

    Returns:
        By row: `pair_id` and verdict.

    Raises:
        FileNotFoundError: If it is not there.
        ValueError: If a column is missing, or a row holds no number or an unknown verdict; the line is named.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--decisions needs a table such as review.csv; {path} is not there.")
    found: dict[int, tuple[str, str]] = {}
    csv.field_size_limit(2**31 - 1)  # a long conversation is one field
    with path.open(encoding="utf-8-sig", newline="") as file:
        first = file.readline()
        file.seek(0)
        # Where a comma divides decimals, a spreadsheet divides cells by semicolons.
        reader = csv.DictReader(file, delimiter=";" if first.count(";") > first.count(",") else ",")
        missing = {"row", "pair_id", "verdict"} - set(reader.fieldnames or ())
        if missing:
            raise ValueError(f"{path} needs columns row, pair_id and verdict; it lacks {', '.join(sorted(missing))}.")
        for record in reader:
            verdict = (record["verdict"] or "").strip().lower()
            if not verdict:
                continue
            place = f"{path}, line {reader.line_num}"
            if verdict not in VERDICTS:
                raise ValueError(
                    f"{place}: verdict needs one of {', '.join(VERDICTS)}, or nothing; got {short(verdict)}."
                )
            if not (record["row"] or "").strip().isdigit():
                raise ValueError(f"{place}: row needs a number from 0; got {short(record['row'])}.")
            found[int(record["row"])] = ((record["pair_id"] or "").strip(), verdict)
    return found


def with_verdicts(pairs: Sequence[Pair], verdicts: Mapping[int, tuple[str, str]]) -> list[Pair]:
    """The pairs with what a person said about them.

    Args:
        pairs: Those of the data.
        verdicts: As `read_verdicts` gives them. Rows that were left out before are passed over.

    Returns:
        The same pairs, `verdict` set where there is one.

    Raises:
        ValueError: If a row holds another pair than the one that was judged.

    Examples:
        >>> pair = Pair(prompt="p", chosen="a", rejected="b", row=0)
        >>> with_verdicts([pair], {0: (pair.id, "wrong")})[0].verdict
        'wrong'
    """
    found = []
    for pair in pairs:
        name, verdict = verdicts.get(pair.row, (pair.id, pair.verdict))
        if name != pair.id:
            raise ValueError(
                f"The verdict on row {pair.row} is about pair {name}; the data holds {pair.id} there. "
                "Use the table with the data it was made from."
            )
        found.append(replace(pair, verdict=verdict))
    return found
