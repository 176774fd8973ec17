"""Files to rows: whatever the bytes are, every row is a pair or a problem, and nothing else is raised than a sentence.

What was written is the reference: the rows themselves, and for lines of JSON the number of lines.
"""

import csv
import gzip
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ropo.data.load import load_pairs
from ropo.data.problems import PROBLEMS
from ropo.data.read import READERS

pytestmark = pytest.mark.slow

NAMES = ("prompt", "chosen", "rejected")
ENDINGS = [ending + packed for ending in READERS for packed in ("", ".gz") if not (ending == ".parquet" and packed)]


@pytest.fixture(scope="session")
def rows(texts):
    """What is written."""
    return st.lists(st.tuples(texts, texts, texts).map(lambda row: dict(zip(NAMES, row, strict=True))), min_size=1)


def as_csv(rows, *, end):
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, NAMES, lineterminator=end)
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue().encode()


def as_pandas_writes(rows):
    """A field is quoted for a comma, a quote or a line feed, but not for a lone carriage return."""

    def field(text):
        return '"' + text.replace('"', '""') + '"' if any(mark in text for mark in ',"\n') or text == "" else text

    return "".join(
        ",".join(field(text) for text in row) + "\n" for row in [NAMES, *(r.values() for r in rows)]
    ).encode()


def as_parquet(rows):
    stream = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), stream)
    return stream.getvalue()


WRITERS = {
    "lines": (".jsonl", lambda rows: "".join(json.dumps(row) + "\n" for row in rows).encode()),
    "lines as they are": (
        ".jsonl",
        lambda rows: "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode(),
    ),
    "list": (".json", lambda rows: json.dumps(rows).encode()),
    "list as it is": (".json", lambda rows: json.dumps(rows, ensure_ascii=False, indent=1).encode()),
    "csv": (".csv", lambda rows: as_csv(rows, end="\n")),
    "csv of a spreadsheet": (".csv", lambda rows: b"\xef\xbb\xbf" + as_csv(rows, end="\r\n")),
    "csv of pandas": (".csv", as_pandas_writes),
    "parquet": (".parquet", as_parquet),
}


def load(folder, ending, content):
    path = folder / f"rows{ending}"
    path.write_bytes(gzip.compress(content, 1) if ending.endswith(".gz") else content)
    return load_pairs(path)


def check(loaded):
    """Every row is once among the pairs or once among the problems."""
    rows = [pair.row for pair in loaded.pairs]
    bad = [problem.row for problem in loaded.problems if problem.row is not None and problem.severity != "warning"]
    assert sorted([*rows, *bad]) == list(range(loaded.num_rows))
    assert rows == sorted(rows)
    assert {problem.kind for problem in loaded.problems} <= set(PROBLEMS)


FILES = [(name, packed) for name in WRITERS for packed in ("", ".gz") if not (name == "parquet" and packed)]


@pytest.mark.parametrize(("written", "packed"), FILES)
def test_what_was_written_is_read(written, packed, rows, folder, fuzz):
    ending, write = WRITERS[written]

    @fuzz(tests=30, at_once=6)
    @given(rows)
    def run(rows):
        fuzz.drive(len(rows))
        if written in ("csv", "csv of pandas"):  # neither quotes it, and with the line feed behind it ends the line
            rows = [{**row, "rejected": row["rejected"].rstrip("\r")} for row in rows]
        loaded = load(folder, ending + packed, write(rows))
        assert not loaded.problems
        assert [{name: getattr(pair, name) for name in NAMES} for pair in loaded.pairs] == rows

    run()


@st.composite
def broken(draw, content):
    """The bytes with some of them gone, doubled, or replaced."""
    for _ in range(draw(st.integers(1, 3))):
        begin = draw(st.integers(0, len(content)))
        end = draw(st.integers(begin, min(len(content), begin + 40)))
        puts = [content[begin:end] * 2, b"", b'"', b"\n", b",", b"\xff", b"\x00", b"\r", b"\xe2\x82"]
        content = content[:begin] + draw(st.sampled_from(puts)) + content[end:]
    return content


@pytest.mark.parametrize("written", WRITERS)
def test_a_broken_file_is_counted_or_refused(written, rows, folder, fuzz):
    ending, write = WRITERS[written]

    @fuzz(tests=20, at_once=6)
    @given(rows, st.data())
    def run(rows, data):
        fuzz.drive(len(rows))
        content = data.draw(broken(write(rows)))
        try:
            loaded = load(folder, ending, content)
        except ValueError:
            return
        check(loaded)
        if ending == ".jsonl" and b"\r" not in content.replace(b"\r\n", b""):
            lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
            assert loaded.num_rows == sum(bool(line.decode("utf-8", "surrogateescape").strip()) for line in lines)

    run()


@pytest.mark.parametrize("ending", ENDINGS)
def test_any_bytes(ending, texts, folder, fuzz):
    @fuzz(tests=100, at_once=1)
    @given(st.lists(texts.map(str.encode) | st.binary(max_size=6), max_size=9).map(b"".join))
    def run(content):
        fuzz.drive(1)
        try:
            loaded = load(folder, ending, content)
        except ValueError:
            return
        check(loaded)

    run()


def test_what_calls_itself_packed_and_is_not(folder, fuzz):
    path = folder / "plain.jsonl.gz"

    @fuzz(tests=100, at_once=1)
    @given(st.binary(max_size=200))
    def run(content):
        fuzz.drive(1)
        path.write_bytes(content)
        try:
            loaded = load_pairs(path)
        except ValueError:
            return
        check(loaded)

    run()


def test_any_row_in_memory(texts, fuzz):
    anything = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | texts,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "x"]), inner),
        max_leaves=5,
    )
    fields = st.sampled_from([*NAMES, "annotator", "weight", "other"])

    @fuzz(tests=10, at_once=5)
    @given(st.lists(st.dictionaries(fields, anything, max_size=6) | anything, max_size=9))
    def run(rows):
        fuzz.drive(len(rows))
        check(load_pairs(rows))

    run()
