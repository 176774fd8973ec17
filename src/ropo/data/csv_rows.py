"""Tables of text to rows: a header, then one record per row, whatever divides the cells and ends the lines.

In: a byte stream. Out: `(line, row)`; in place of a record that cannot be read, the `BadRow` that says why.
"""

import csv
import io
import re
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

from ropo.data.problems import BadRow, printable

_MAX_CSV_FIELD = 2**31 - 1  # characters; the csv module refuses more than 131,072 by default
_LONE_CR = re.compile(r"\r++(?!\n|\Z)")
_INSTEAD_OF_CR = "\ud800"
_FEW_LINES = 3  # that are divided like rows by chance


def refuse_repeated(columns: Iterable[str]) -> None:
    """Of two columns with one name, one would be lost. Cells without a name stand behind the last one."""
    if repeated := [name for name, count in Counter(columns).items() if count > 1 and name]:
        raise ValueError(
            f"A dataset needs columns of different names; got {', '.join(map(printable, repeated))} more than once. "
            "Rename or remove one."
        )


def text_lines(stream: Iterable[bytes]) -> Iterator[str]:
    """Lines as a line feed ends them: U+2028 and its kind may stand inside a JSON text."""
    for number, line in enumerate(stream):
        yield (line if number else line.removeprefix(BOM_UTF8)).decode("utf-8", "surrogateescape")


def delimiter_of(header: str) -> str:
    """What divides the cells of a table: where a comma divides decimals, a spreadsheet writes semicolons, or tabs."""
    return max(",;\t", key=header.count)


def csv_lines(stream: Iterable[bytes]) -> Iterator[str]:
    """Lines as the csv module needs them: what ends the first one ends all, so any other CR is content.

    The module takes a CR for the end of a record. Where it is content, a letter that no text can hold stands for it.
    """
    lines = text_lines(stream)
    first = next(lines, "")
    lines = chain([first], lines)
    if "\r" in first.rstrip("\r\n"):
        return (part for text in lines for part in re.split(r"(?<=\r)(?!\n)", text) if part)
    return (
        text
        if text.count("\r") == text.endswith("\r\n")
        else _LONE_CR.sub(lambda found: _INSTEAD_OF_CR * len(found.group()), text)
        for text in lines
    )


def read_csv(stream: io.BufferedIOBase) -> Iterator[tuple[int, dict[str, str] | BadRow]]:
    """Rows of a table with a header, each with its line; in place of one that cannot be read, why."""
    csv.field_size_limit(_MAX_CSV_FIELD)
    lines = csv_lines(stream)
    first = next(lines, "")
    reader = csv.reader(chain([first], lines), delimiter=delimiter_of(first), strict=True)
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1
        try:
            record = next(reader, None)
        except csv.Error as error:
            num_lines = reader.line_num + sum(1 for _ in lines) - line + 1
            yield line, _no_csv_from_here(num_lines, f"{error}, as where a quote is not closed or not doubled")
            return
        if record is None:
            return
        if not record:
            continue
        if header is None:
            header = record
            refuse_repeated(header)
        elif len(record) != len(header) and any(_INSTEAD_OF_CR in field for field in record):
            num_lines = reader.line_num + sum(1 for _ in lines) - line + 1
            yield line, _no_csv_from_here(num_lines, "some records end with a CR, those before with a line feed")
            return
        elif len(record) != len(header):
            yield line, BadRow("not_csv", f"a record needs the header's {len(header)} fields; got {len(record)}.")
        elif record[-1] == header[-1] and [record[0].removeprefix("\ufeff"), *record[1:]] == header:
            yield (
                line,
                BadRow("not_csv", "a record needs values; got the header once more, as in files that were joined."),
            )
        else:
            if num_lines := _lines_like_rows(record, reader.dialect.delimiter):
                yield line, BadRow("swallowed", f"one quoted field holds {num_lines} lines that look like rows.")
            fields = (field.replace(_INSTEAD_OF_CR, "\r") for field in record)
            yield line, dict(zip(header, fields, strict=True))


def _lines_like_rows(record: Sequence[str], delimiter: str) -> int:
    """How many whole lines inside a field are divided like a row, as where a quote too many has swallowed rows."""
    lines = [line for field in record if "\n" in field for line in field.split("\n")[1:-1]]
    alike = sum(line.count(delimiter) == len(record) - 1 for line in lines)
    return alike if len(record) > 1 and alike >= max(_FEW_LINES, 0.8 * len(lines)) else 0


def _no_csv_from_here(num_lines: int, reason: str) -> BadRow:
    """Where the next record begins cannot be known."""
    return BadRow("unread", f"the table cannot be read from here to its end, {num_lines} lines: {reason}.")
