"""What `make measure` counts, on a tree that is small enough to count by hand."""

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "tools" / "measure.py"
CODE = '''"""A module."""


def open_one(a, b, *args, c=1, **rest) -> dict[str, Any]:
    return a


def _private(a):
    return a


class Shown:
    """A class."""

    def method(self, a):
        """Documented."""
        return a

    def bare(self, a):
        def within():
            return a

        return within
'''
TESTS = """
def test_some():
    assert value == 3
    assert message == "this text has five words"
    assert "found two of them" not in text, "a message of four words is none"
    assert call("a long text of a call") == 2
    assert found.startswith(f"in {folder} nothing was found")
    assert all(part in text for part in ("short", "a part with four words"))
    assert text == "1 2 3 4 5"
    with pytest.raises(ValueError, match="needs one or more pairs"):
        call()
"""


@pytest.fixture(scope="module")
def measure():
    spec = importlib.util.spec_from_file_location("measure", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_counts(measure, tmp_path):
    for name, text in (("src/one.py", CODE), ("tests/test_one.py", TESTS), ("README.md", "Four words in all")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "tests" / "test_adding.py").write_text('PLACES = {"a thing": (2, 1)}')
    numbers = measure.static_numbers(tmp_path)
    expected = {
        "files in src": "1", "lines in src": "23", "functions in src": "5", "most parameters": "3",
        "function lines: median, p90, most": "2, 5, 5", "public functions without docstring": "2",
        "`dict[str, Any]` in src": "1", "asserts in tests": "7", "of these with prose": "4", "`match=` with prose": "1",
        "README, words": "4", "places (files) to add a thing": "2 (1)",
    }  # fmt: skip
    assert {name: numbers[name] for name in expected} == expected


def test_a_number_that_one_column_lacks(measure):
    shown = measure.table({"abc": {"a": "1"}, "now": {"b": "2", "a": "3"}})
    assert shown.splitlines()[2:] == ["| b | - | 2 |", "| a | 1 | 3 |"]
