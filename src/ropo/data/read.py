"""Sources to rows: one reader per file type, and none of them knows what a pair is.

In: a path, a folder of shards or one that `datasets` saved, a hub id, a `datasets.Dataset`, or rows in memory.
Out: one `(line, row)` after the other; in place of a row that cannot be read, the `BadRow` that says why.

The one idea: what is wrong with one row is handed on, what is wrong with the whole source raises.
Where the next row begins cannot be known, the last `BadRow` is of the kind "unread" and says how much is lost.
Text is decoded so that bytes which are not UTF-8 survive as characters that no UTF-8 text can hold: the row they are
in is still found, and refused later by whoever encodes it.

Add a file type: one function from a byte stream to rows, one line in `READERS`.
"""

import gzip
import io
import json
import logging
import re
import zlib
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.exceptions import DatasetsError

from ropo.data.csv_rows import read_csv, refuse_repeated, text_lines
from ropo.data.problems import BadRow, short
from ropo.provenance import file_kind
from ropo.spelling import did_you_mean_path, is_misspelt_path

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class HubDataset:
    """A dataset on the hub of which the name alone does not say what to read.

    Attributes:
        name: Its name, "owner/name".
        config: Which of its configurations (subsets); None for the only one.
        data_dir: Which of its folders; None for what it names itself.
    """

    name: str
    config: str | None = None
    data_dir: str | None = None


# Rows in memory are dicts or `Pair`s.
Source: TypeAlias = str | Path | HubDataset | datasets.Dataset | Sequence[object]
Row = tuple[int | None, Any]  # the line of a text file at which the row begins, counted from 1, and the row

_ROWS_PER_BATCH = 1000
# Endings that mean a file was meant, beside those that have a reader: a typing mistake must not become a question to
# the hub. Names on the hub do hold dots ("OpenHermes-2.5-..."), so not every dot begins an ending.
_OTHER_ENDINGS = (".arrow", ".bz2", ".gz", ".pkl", ".tsv", ".txt", ".xlsx", ".xz", ".yaml", ".zip", ".zst")
_SHARDS = (".parquet", ".jsonl", ".jsonl.gz", ".csv", ".csv.gz")  # not .json, in which folders keep other things
_NUMBERED = re.compile(r"(?P<split>.+)-\d{5}-of-(?P<total>\d{5})(?:-[0-9a-f]+)?")  # as the hub names shards
_SPLIT = re.compile(r"(train|test|validation|valid|val|dev|eval)(?=[-_.]|$)")


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
            return _read_folder(path, split)
        if isinstance(source, Path) or is_here(source):
            _refuse_split(split, path.name)
            return _read_file(path)
        return _read_dataset(_open_hub(HubDataset(name=source), split))
    if isinstance(source, HubDataset):
        if _is_written_as_path(source.name) or Path(source.name).exists():
            raise ValueError(
                f"dataset_config and dataset_data_dir need a dataset on the hub; got the file or folder {source.name}. "
                "Leave them out; a folder inside it is named by its path."
            )
        return _read_dataset(_open_hub(source, split))
    _refuse_split(split, f"a {type(source).__name__} in memory")
    if isinstance(source, datasets.Dataset):
        return _read_dataset(source)
    if isinstance(source, list | tuple):
        return ((None, row) for row in source)
    raise TypeError(
        "A dataset needs a path, the name of a dataset on the hub, a datasets.Dataset, or a list of dicts or Pairs; "
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
    return _is_written_as_path(source) or is_misspelt_path(source)


def _is_written_as_path(source: str) -> bool:
    is_written_so = source.startswith((".", "/", "~")) or source.count("/") > 1
    return is_written_so or source.endswith((*READERS, *_OTHER_ENDINGS))


def instead_of_missing(source: str) -> str:
    """What may have been meant by a path at which nothing is, as a sentence to append."""
    on_hub = f" If it is on the hub, start where there is no folder {Path(source).parent}."
    return (did_you_mean_path(Path(source)) or " Check the path.") + ("" if _is_written_as_path(source) else on_hub)


def is_here(source: str) -> bool:
    """Whether a dataset is read from this machine and not from the hub.

    Raises:
        FileNotFoundError: If it looks like a path and nothing is there.
    """
    path = Path(source).expanduser()
    if not path.exists() and looks_like_path(source):
        raise FileNotFoundError(
            f"A dataset needs a file that exists; got {source}: file not found.{instead_of_missing(source)}"
        )
    return path.exists()


def _read_file(path: Path) -> Iterator[Row]:
    reader = READERS.get(Path(path.name.removesuffix(".gz")).suffix)
    if not path.exists():
        is_here(str(path))
        raise FileNotFoundError(f"A dataset needs a file that exists; got {path}: file not found. Check the path.")
    if not path.is_file():  # opening a pipe waits for whoever writes into it, and a device may have no end
        raise ValueError(f"A dataset needs a regular file; got {path}, {file_kind(path)}. Write the rows to a file.")
    if reader is None:
        raise ValueError(f"A dataset needs a file that ends in {', '.join(READERS)}; got {path.name}. Convert it.")
    num_read = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            if reader is not _read_parquet:
                _refuse_utf16(path, stream.peek(4)[:4])
            for row in reader(stream):
                num_read += 1
                yield row
    except (OSError, EOFError, zlib.error, pa.ArrowException, UnicodeDecodeError) as error:
        raise ValueError(
            f"A dataset needs a file that can be read to its end; got {path}: {error}. {num_read} rows came before "
            "that; how many are lost cannot be known. Is it complete?"
        ) from error


def _refuse_utf16(path: Path, start: bytes) -> None:
    """Refuse once what would be one problem for each line."""
    if start[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in start:
        raise ValueError(
            f"A dataset needs text in UTF-8; got {path}, which is UTF-16 or no text. Save it as UTF-8: "
            "iconv -f UTF-16 -t UTF-8."
        )


def _not_json(text: str, reason: str) -> BadRow:
    try:
        text.encode()
    except UnicodeEncodeError:
        return BadRow("not_utf8", f"a line needs UTF-8 text; got {short(text)}.")
    return BadRow("not_json", f"a line needs JSON; got {short(text)} ({reason}).")


def _object(members: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(members)
    if len(found) < len(members):
        repeated = next(name for name, count in Counter(name for name, _ in members).items() if count > 1)
        raise ValueError(f"the key {short(repeated)} stands twice in one object")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _read_json_lines(stream: Iterable[bytes]) -> Iterator[Row]:
    """No JSON text holds a CR as it is, so a lone one ends a line, too. Files that were joined hold marks of order."""
    lines = (part for line in text_lines(stream) for part in line.removesuffix("\r\n").split("\r"))
    for number, text in enumerate(lines, start=1):
        text = text.removeprefix("\ufeff")
        if text.strip():
            try:
                row = _DECODER.decode(text)
            except (ValueError, RecursionError) as error:
                row = _not_json(text, str(error))
            yield number, row


def _read_json(stream: io.BufferedIOBase) -> Iterator[Row]:
    """One list of objects, read object by object so that each has its line; or one object per line after all."""
    content = stream.read()
    text = content.removeprefix(BOM_UTF8).decode("utf-8", "surrogateescape")
    place = _after_space(text, 0)
    if not text.startswith("[", place):
        try:
            whole = _DECODER.decode(text)
        except (ValueError, RecursionError):
            yield from _read_json_lines(io.BytesIO(content))
        else:  # one row, or an object of something else over many lines: one problem and not one for each line
            yield 1 + text.count("\n", 0, place), whole
        return
    line = 1 + text.count("\n", 0, place)
    separator = "["
    while text.startswith(separator, place):
        begin = _after_space(text, place + 1)
        line += text.count("\n", place, begin)
        if separator == "[" and text.startswith("]", begin):
            place = begin
            break
        try:
            row, end = _DECODER.raw_decode(text, begin)
        except (ValueError, RecursionError) as error:
            yield line, _unread(text, begin, str(error))
            return
        yield line, row
        place = _after_space(text, end)
        line += text.count("\n", begin, place)
        separator = ","
    if text[place:].strip() != "]":
        yield line, _unread(text, place, "the list needs a comma or its closing bracket")


def _unread(text: str, place: int, reason: str) -> BadRow:
    """Where the next object of a list begins cannot be known."""
    num_lines = 1 + text.count("\n", place, len(text.rstrip()))
    return BadRow(
        "unread",
        f"the list cannot be read from here to its end, {num_lines} lines, {len(text) - place} characters: {reason}; "
        f"got {short(text[place : place + 200])}.",
    )


def _after_space(text: str, place: int) -> int:
    """The first place from `place` on that is not blank."""
    while place < len(text) and text[place] in " \t\r\n":
        place += 1
    return place


def _read_parquet(stream: io.BufferedIOBase) -> Iterator[Row]:
    file = pq.ParquetFile(stream, page_checksum_verification=True)
    refuse_repeated(file.schema_arrow.names)
    for batch in file.iter_batches(batch_size=_ROWS_PER_BATCH):
        yield from ((None, row) for row in batch.to_pylist())


def _read_dataset(dataset: datasets.Dataset) -> Iterator[Row]:
    for batch in dataset.with_format("arrow").iter(batch_size=_ROWS_PER_BATCH):
        yield from ((None, row) for row in batch.to_pylist())


def _read_folder(path: Path, split: str) -> Iterator[Row]:
    """What `save_to_disk` wrote, or shards: files of one kind, whose names may say which split they belong to."""
    if any((path / name).exists() for name in ("dataset_dict.json", "state.json")):
        return _read_dataset(_open_saved(path, split))
    files = [file for file in sorted(path.iterdir()) if file.name.endswith(_SHARDS) and file.name[0] not in "._"]
    if not files:
        raise ValueError(
            f"A dataset needs a folder saved by datasets' save_to_disk, or one with {', '.join(_SHARDS)} files; "
            f"{path} holds neither. Name the file, or the folder that holds the shards."
        )
    kinds = sorted({next(kind for kind in _SHARDS if file.name.endswith(kind)) for file in files})
    if len(kinds) > 1:
        raise ValueError(
            f"A folder of shards needs files of one kind; {path} holds {' and '.join(kinds)}. Name one file, or move "
            "the others."
        )
    files = _of_split(files, split, path)
    logger.info("%d files of %s, in this order: %s.", len(files), path, ", ".join(file.name for file in files))
    return _read_shards(files)


def _read_shards(files: Sequence[Path]) -> Iterator[Row]:
    """Lines are those of a file, so they are told with its name and not as the line of the row."""
    for file in files:
        for line, row in _read_file(file):
            if isinstance(row, BadRow):
                row = BadRow(row.kind, f"{file.name}{'' if line is None else f', line {line}'}: {row}")
            yield None, row


def _of_split(files: Sequence[Path], split: str, folder: Path) -> list[Path]:
    """The shards of one split, all of them; every shard where the names tell no splits apart.

    Raises:
        ValueError: If there is no such split, some names tell none, or the names say that a shard is missing.
    """
    stems = [file.name.split(".")[0] for file in files]
    numbered = [_NUMBERED.fullmatch(stem) for stem in stems]
    names = [
        match["split"] if match else by[1] if (by := _SPLIT.match(stem)) else ""
        for match, stem in zip(numbered, stems, strict=True)
    ]
    if len(set(names)) == 1 and not _SPLIT.match(names[0]):
        _refuse_split(split, folder.name)
        split = names[0]
    elif split not in names or "" in names:
        here = ", ".join(sorted({name or "files of no split" for name in names}))
        raise ValueError(
            f"split needs a part that the names of the files tell; got {split!r} for {folder} with {here}. Choose one "
            "(--dataset_split), or name the file."
        )
    chosen = [i for i, name in enumerate(names) if name == split]
    totals = {int(match["total"]) for i in chosen if (match := numbered[i])}
    if totals and totals != {len(chosen)}:
        raise ValueError(
            f"A folder of shards needs all of them; got {len(chosen)} of {max(totals)} in {folder}. Fetch the others."
        )
    return [files[i] for i in chosen]


def _open_saved(path: Path, split: str) -> datasets.Dataset:
    try:
        found = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise ValueError(
            f"A dataset needs a whole folder as datasets' save_to_disk wrote it; got {path}: {error}. Save it again."
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


def _open_hub(source: HubDataset, split: str) -> datasets.Dataset:
    options = {"name": source.config, "data_dir": source.data_dir}
    try:
        return datasets.load_dataset(
            source.name, split=split, **{name: value for name, value in options.items() if value is not None}
        )
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        close = did_you_mean_path(Path(source.name)) if "/" not in source.name else ""
        raise ValueError(
            "A dataset needs a file or folder that exists, or a name on the hub; "
            f"got {source.name!r}, split {split!r}: {error}.{close} Check the name, the split (--dataset_split), the "
            "configuration (--dataset_config) and the connection."
        ) from error


READERS: Mapping[str, Callable[[io.BufferedIOBase], Iterator[Row]]] = MappingProxyType(
    {".jsonl": _read_json_lines, ".json": _read_json, ".csv": read_csv, ".parquet": _read_parquet}
)
