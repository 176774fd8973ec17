"""Sources to rows: one reader per file type, and none of them knows what a pair is.

In: a path, a folder that `datasets` saved, a hub id, a `datasets.Dataset`, or rows in memory.
Out: one `(line, row)` after the other; in place of a row that cannot be read, the `BadRow` that says why.

The one idea: what is wrong with one row is handed on and reading goes on; what is wrong with the whole source raises.
Text is decoded so that bytes which are not UTF-8 survive as characters that no UTF-8 text can hold: the row they are
in is still found, and refused later by whoever encodes it.

Add a file type: one function from a byte stream to rows, one line in `READERS`.
"""

import csv
import gzip
import io
import json
import zlib
from codecs import BOM_UTF8
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.exceptions import DatasetsError

from ropo.data.problems import BadRow, short

Source: TypeAlias = str | Path | datasets.Dataset | Sequence[object]  # rows in memory: dicts or `Pair`s
Row = tuple[int | None, Any]  # the line of a text file at which the row begins, counted from 1, and the row

_ROWS_PER_BATCH = 1000
_MAX_CSV_FIELD = 2**31 - 1  # characters; the csv module refuses more than 131,072 unless told
# Endings that mean a file was meant, beside those that have a reader: a typing mistake must not become a question to
# the hub. Names on the hub do hold dots ("OpenHermes-2.5-..."), so not every dot begins an ending.
_OTHER_ENDINGS = (".arrow", ".bz2", ".gz", ".pkl", ".tsv", ".txt", ".xlsx", ".xz", ".yaml", ".zip", ".zst")


def read_rows(source: Source, split: str = "train") -> Iterator[Row]:
    """Read any source row by row.

    Args:
        source: As in `load_pairs`.
        split: Which part of a source that has several; "train" for a source that has no parts.

    Returns:
        An iterator over line and row; the line is None unless the source is a text file.

    Raises:
        FileNotFoundError: If `source` looks like a path and nothing is there.
        ValueError: If the source cannot be read, or has no such split.
        TypeError: If `source` is of another type.
    """
    if isinstance(source, str | Path):
        path = Path(source).expanduser()
        if path.is_dir():
            return _read_dataset(_open_folder(path, split))
        if path.exists() or isinstance(source, Path) or looks_like_path(source):
            _refuse_split(split, path.name)
            return _read_file(path)
        return _read_dataset(_open_hub(source, split))
    _refuse_split(split, f"a {type(source).__name__} in memory")
    if isinstance(source, datasets.Dataset):
        return _read_dataset(source)
    if isinstance(source, list | tuple):
        return ((None, row) for row in source)
    raise TypeError(
        "load_pairs needs a path, the name of a dataset on the hub, a datasets.Dataset, or a list of dicts or Pairs; "
        f"got {short(source)}. Choose the split of a DatasetDict; turn a table into a list of dicts."
    )


def _refuse_split(split: str, what: str) -> None:
    if split != "train":
        raise ValueError(
            f"split needs a source with several parts, a folder or a hub dataset; got {split!r} for {what}. "
            "Leave split (--dataset_split) at 'train' and pass the part itself."
        )


def looks_like_path(source: str) -> bool:
    """Whether a name is meant as a path, so that a typing mistake must not become a question to the hub."""
    return source.startswith((".", "/", "~")) or source.count("/") > 1 or source.endswith((*READERS, *_OTHER_ENDINGS))


def _read_file(path: Path) -> Iterator[Row]:
    reader = READERS.get(Path(path.name.removesuffix(".gz")).suffix)
    if not path.exists():
        raise FileNotFoundError(f"load_pairs needs a file that exists; got {path}: file not found. Check the path.")
    if reader is None:
        raise ValueError(f"load_pairs needs a file that ends in {', '.join(READERS)}; got {path.name}. Convert it.")
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            yield from reader(stream)
    except (OSError, EOFError, zlib.error, pa.ArrowException, UnicodeDecodeError) as error:
        raise ValueError(
            f"load_pairs needs a file that can be read to its end; got {path}: {error}. Is it complete?"
        ) from error


def _lines(stream: Iterable[bytes]) -> Iterator[tuple[int, str]]:
    """Numbered lines. Only a line feed ends one: U+2028 and its kind may stand inside a JSON text."""
    for number, line in enumerate(stream, start=1):
        yield number, (line.removeprefix(BOM_UTF8) if number == 1 else line).decode("utf-8", "surrogateescape")


def _not_json(text: str, reason: str) -> BadRow:
    try:
        text.encode()
    except UnicodeEncodeError:
        return BadRow("not_utf8", f"a line needs UTF-8 text; got {short(text)}.")
    return BadRow("not_json", f"a line needs JSON; got {short(text)} ({reason}).")


def _read_json_lines(stream: Iterable[bytes]) -> Iterator[Row]:
    for number, text in _lines(stream):
        if text.strip():
            try:
                row = json.loads(text)
            except (ValueError, RecursionError) as error:
                row = _not_json(text, str(error))
            yield number, row


def _read_json(stream: io.BufferedIOBase) -> Iterator[Row]:
    """One list of objects, read object by object so that each has its line; or one object per line after all."""
    content = stream.read()
    text = content.removeprefix(BOM_UTF8).decode("utf-8", "surrogateescape")
    place = _after_space(text, 0)
    if not text.startswith("[", place):
        yield from _read_json_lines(io.BytesIO(content))
        return
    line = 1 + text.count("\n", 0, place)
    decoder = json.JSONDecoder()
    separator = "["
    while text.startswith(separator, place):
        begin = _after_space(text, place + 1)
        line += text.count("\n", place, begin)
        if separator == "[" and text.startswith("]", begin):
            place = begin
            break
        try:
            row, end = decoder.raw_decode(text, begin)
        except (ValueError, RecursionError) as error:
            yield line, _not_json(text[begin : begin + 200], str(error))
            return  # where the next object begins cannot be known
        yield line, row
        place = _after_space(text, end)
        line += text.count("\n", begin, place)
        separator = ","
    if text[place:].strip() != "]":
        yield line, _not_json(text[place : place + 200], "the list needs a comma or its closing bracket")


def _after_space(text: str, place: int) -> int:
    """The first place from `place` on that is not blank."""
    while place < len(text) and text[place] in " \t\r\n":
        place += 1
    return place


def _read_csv(stream: io.BufferedIOBase) -> Iterator[Row]:
    csv.field_size_limit(_MAX_CSV_FIELD)
    reader = csv.reader((text for _, text in _lines(stream)), strict=True)
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1
        try:
            record = next(reader, None)
        except csv.Error as error:
            yield line, BadRow("not_csv", f"a record needs to be CSV; got {error}.")
            return  # where the next record begins cannot be known
        if record is None:
            return
        if not record:
            continue
        if header is None:
            header = record
        elif len(record) != len(header):
            yield line, BadRow("not_csv", f"a record needs the header's {len(header)} fields; got {len(record)}.")
        else:
            yield line, dict(zip(header, record, strict=True))


def _read_parquet(stream: io.BufferedIOBase) -> Iterator[Row]:
    for batch in pq.ParquetFile(stream).iter_batches(batch_size=_ROWS_PER_BATCH):
        yield from ((None, row) for row in batch.to_pylist())


def _read_dataset(dataset: datasets.Dataset) -> Iterator[Row]:
    for batch in dataset.with_format("arrow").iter(batch_size=_ROWS_PER_BATCH):
        yield from ((None, row) for row in batch.to_pylist())


def _open_folder(path: Path, split: str) -> datasets.Dataset:
    try:
        found = datasets.load_from_disk(str(path))
    except FileNotFoundError as error:
        raise ValueError(
            f"load_pairs needs a folder saved by datasets' save_to_disk; got {path}. To read a file, name the file."
        ) from error
    if isinstance(found, datasets.Dataset):
        _refuse_split(split, path.name)
        return found
    if split not in found:
        raise ValueError(
            f"split needs to be one of {', '.join(found)}; got {split!r}. Choose one of these in {path} "
            "(--dataset_split)."
        )
    return found[split]


def _open_hub(name: str, split: str) -> datasets.Dataset:
    try:
        return datasets.load_dataset(name, split=split)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise ValueError(
            "load_pairs needs an existing file or folder, or a dataset on the hub; "
            f"got {name!r}, split {split!r}: {error}. Check the name, the split (--dataset_split) and the connection."
        ) from error


READERS: Mapping[str, Callable[[io.BufferedIOBase], Iterator[Row]]] = MappingProxyType(
    {".jsonl": _read_json_lines, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}
)
