"""What the fuzz tests share: texts that break readers, how many rows each drives, and what was found.

`make fuzz` drives 5,000 rows, the same ones each time; `make fuzz ROWS=100000 WRITE=1` more, drawn anew, and writes
their number, failures and seconds into docs/reliability.md and benchmarks/fuzz.json.
"""

import json
import os
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

ROWS = int(os.environ.get("FUZZ_ROWS", "5000"))
_SAME_EACH_TIME = 5000  # rows, as many as CI has
_SHARE = {"loaders": 0.4, "conversations": 0.2, "validation": 0.2, "tokenization": 0.2}  # of the rows
_ROOT = Path(__file__).parents[2]
_BEGIN, _END = "<!-- fuzz: begin, made by tests/fuzz -->", "<!-- fuzz: end -->"
_rows: Counter[str] = Counter()
_failures: Counter[str] = Counter()
_seconds: Counter[str] = Counter()

# Quotes, separators, every end of a line, signs of order, parts of characters, marks of turns and of a model's control.
PIECES = [
    "a", "B", "word ", " ", '"', '""', ",", ";", "\t", "\n", "\r\n", "\r", "\u2028", "\x85", "\x0b", "\x0c", "\x00",
    "\ufeff", "\\", "\\n", "{", "}", "[", "]", "null", "NaN", "ä", "e\u0301", "\u200d", "\U0001f600", "\u202e", "'",
    "=1", "\n\nHuman: ", "\n\nAssistant: ", "▁", "字", "क्षि",
]  # fmt: skip
_AS_ONE = {0xE000 + i: piece for i, piece in enumerate(PIECES)}  # one text is drawn faster than a list of some


def _part(path: Path) -> str:
    return path.stem.removeprefix("test_")


@dataclass(frozen=True)
class Fuzz:
    """The share of the rows that the tests of one file drive."""

    part: str

    def __call__(self, *, tests, at_once):
        """Settings for one of so many tests, whose examples have so many rows on average."""
        return settings(
            max_examples=max(5, round(ROWS * _SHARE[self.part] / tests / at_once)),
            derandomize=ROWS <= _SAME_EACH_TIME,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )

    def drive(self, num_rows):
        """Count the rows of an example."""
        _rows[self.part] += num_rows


@pytest.fixture
def fuzz(request):
    return Fuzz(_part(request.path))


@pytest.fixture(scope="session")
def texts():
    pieces = st.text("".join(map(chr, _AS_ONE)), max_size=6).map(lambda text: text.translate(_AS_ONE))
    return pieces | st.text(max_size=8)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


def pytest_runtest_logreport(report):
    path = Path(report.location[0])
    if path.parent.name == "fuzz" and report.when == "call":
        _seconds[_part(path)] += report.duration
        _failures[_part(path)] += report.failed


def pytest_terminal_summary(terminalreporter):
    if not _rows:
        return
    parts = {
        part: {"rows": _rows[part], "failures": _failures[part], "seconds": round(_seconds[part], 1)}
        for part in sorted(_rows)
    }
    total = {name: round(sum(part[name] for part in parts.values()), 1) for name in ("rows", "failures", "seconds")}
    terminalreporter.section("fuzz")
    for part, found in [*parts.items(), ("all", total)]:
        terminalreporter.line(f"{part}: {found['rows']} rows, {found['failures']} failures, {found['seconds']} s")
    if os.environ.get("FUZZ_WRITE"):
        found = {**total, "parts": parts, "date": time.strftime("%Y-%m-%d")}
        (_ROOT / "benchmarks" / "fuzz.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        page = _ROOT / "docs" / "reliability.md"
        before, _, rest = page.read_text("utf-8").partition(_BEGIN)
        page.write_text(f"{before}{_BEGIN}\n\n{_table(found)}\n\n{_END}{rest.partition(_END)[2]}", encoding="utf-8")


_WHAT = {
    "loaders": "files of JSON lines, JSON, CSV and Parquet, packed and broken: each row is a pair or a problem",
    "conversations": "prompts that two transcripts or conversations share: prompt and response are what stood there",
    "validation": "findings about texts: of rows that are there, the same again, none of what is left",
    "tokenization": "byte-level BPE, BPE and Unigram over `▁`: prompt and response are the ids of the whole text",
}


def _table(found):
    rows = [
        f"| {part} | {_WHAT[part]} | {one['rows']:,} | {one['failures']} | {one['seconds']:.0f} |"
        for part, one in found["parts"].items()
    ]
    return "\n".join(
        [
            f"{found['rows']:,} rows, drawn by hypothesis on {found['date']}; {found['failures']} properties failed.",
            "",
            "| part | what is drawn, and what must hold | rows | failures | seconds |",
            "|---|---|---|---|---|",
            *rows,
        ]
    )
