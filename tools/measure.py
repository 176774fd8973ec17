"""How large the code is, how readable by number, and how fast the command starts: one table.

    python tools/measure.py                    # this working tree
    python tools/measure.py --before 7991132   # the same of another commit beside it
    python tools/measure.py --static           # without starting the command

In: the working tree, and a commit from git. Out: a Markdown table on standard output. Standard library only.

How it counts: lines are those of files and functions as they stand, docstrings, comments and blank lines included; the
lines of a function exclude its decorators. Parameters exclude `self`, `cls`, `*args` and `**kwargs`. A function is
public if neither its name nor that of a class around it begins with an underscore; one within another function is not.
An assert holds prose if it compares with, or searches for, a string literal of four or more words.
"""

import argparse
import ast
import io
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_PARAMETERS = 450, 60, 8
NUM_WORDS_OF_PROSE = 4
NUM_STARTS = 3  # of each command; the fastest counts

Function = ast.FunctionDef | ast.AsyncFunctionDef
_SEARCHES = {"startswith", "endswith", "count", "find", "index", "search", "match", "fullmatch"}


class Code:
    """The Python files below one folder, read and parsed once.

    Args:
        folder: Where to look; may be missing.
    """

    def __init__(self, folder: Path) -> None:
        self.texts = {path.relative_to(folder): path.read_text() for path in sorted(folder.rglob("*.py"))}
        self.trees = {path: ast.parse(text) for path, text in self.texts.items()}
        self.lines = {path: len(text.splitlines()) for path, text in self.texts.items()}
        self.functions = [node for tree in self.trees.values() for node in ast.walk(tree) if isinstance(node, Function)]


def function_lines(function: Function) -> int:
    """Lines from `def` to the end."""
    return (function.end_lineno or function.lineno) - function.lineno + 1


def num_parameters(function: Function) -> int:
    """Parameters that a caller can name or place."""
    names = [one.arg for one in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)]
    return len(names) - (names[:1] in (["self"], ["cls"]))


def undocumented(tree: ast.AST) -> Iterator[Function]:
    """Public functions and methods without a docstring."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from undocumented(node)
        elif isinstance(node, Function) and not node.name.startswith("_") and ast.get_docstring(node) is None:
            yield node


def literals(node: ast.AST) -> Iterator[str]:
    """String literals that an expression consists of; what it passes to a function is not looked at."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.JoinedStr):
        yield " ".join(text for part in node.values if isinstance(part, ast.Constant) for text in literals(part))
    elif isinstance(node, ast.List | ast.Tuple | ast.Set | ast.BinOp | ast.Dict):
        for part in ast.iter_child_nodes(node):
            yield from literals(part)


def holds_prose(statement: ast.Assert) -> bool:
    """Whether an assert compares with, or searches for, a text of four or more words."""
    sought: list[ast.AST] = []
    for node in ast.walk(statement.test):
        if isinstance(node, ast.Compare):
            sought += [node.left, *node.comparators]
        elif isinstance(node, ast.comprehension):
            sought.append(node.iter)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _SEARCHES:
            sought += node.args
    return any(is_prose(text) for node in sought for text in literals(node))


def is_prose(text: str) -> bool:
    """Whether a text has four or more words of two or more letters each."""
    return sum(bool(re.search("[A-Za-z]{2}", word)) for word in text.split()) >= NUM_WORDS_OF_PROSE


def matches_prose(tree: ast.AST) -> Iterator[ast.keyword]:
    """`match=` of `pytest.raises` and `pytest.warns` that hold prose."""
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "match" and any(map(is_prose, literals(node.value))):
            yield node


def places_per_addition(path: Path) -> Mapping[str, tuple[int, int]]:
    """Places and files that each kind of addition touches, from the table `PLACES` of a test that adds one of each.

    Args:
        path: The test; may be missing.
    """
    if path.exists():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "PLACES":
                found: Mapping[str, tuple[int, int]] = ast.literal_eval(node.value)
                return found
    return {}


def static_numbers(root: Path) -> dict[str, str]:
    """What can be counted without running anything.

    Args:
        root: Of a checkout.

    Returns:
        Numbers by what they count, as text.
    """
    code, tests = Code(root / "src"), Code(root / "tests")
    lengths = sorted(map(function_lines, code.functions))
    parameters = list(map(num_parameters, code.functions))
    asserts = [node for tree in tests.trees.values() for node in ast.walk(tree) if isinstance(node, ast.Assert)]
    readme = (root / "README.md").read_text()
    return {
        "files in src": f"{len(code.lines)}",
        "lines in src": f"{sum(code.lines.values()):,}",
        f"files above {MAX_FILE_LINES} lines": f"{_above(code.lines.values(), MAX_FILE_LINES)}",
        "longest file, lines": f"{max(code.lines.values())}",
        "functions in src": f"{len(lengths):,}",
        "function lines: median, p90, most": f"{median(lengths):g}, {lengths[len(lengths) * 9 // 10]}, {lengths[-1]}",
        "functions above 40 lines": f"{_above(lengths, 40)}",
        f"functions above {MAX_FUNCTION_LINES} lines": f"{_above(lengths, MAX_FUNCTION_LINES)}",
        f"functions above {MAX_PARAMETERS} parameters": f"{_above(parameters, MAX_PARAMETERS)}",
        "most parameters": f"{max(parameters)}",
        "public functions without docstring": f"{sum(len(list(undocumented(tree))) for tree in code.trees.values())}",
        "`dict[str, Any]` in src": f"{sum(text.count('dict[str, Any]') for text in code.texts.values())}",
        "lines in tests": f"{sum(tests.lines.values()):,}",
        "asserts in tests": f"{len(asserts):,}",
        "of these with prose": f"{sum(map(holds_prose, asserts))}",
        "`match=` with prose": f"{sum(len(list(matches_prose(tree))) for tree in tests.trees.values())}",
        "README, words": f"{len(readme.split()):,}",
        **{
            f"places (files) to add {what}": f"{places} ({files})"
            for what, (places, files) in places_per_addition(root / "tests" / "test_adding.py").items()
        },
    }


def started_numbers(root: Path) -> dict[str, str]:
    """CPU seconds and memory of commands that only print.

    Args:
        root: Of a checkout; its `src` is imported by the running interpreter, which needs the dependencies.

    Returns:
        Numbers by command, as text; NaN where a command exits otherwise than with 0.
    """
    found = {}
    for options in ("--version", "--help", "train --help"):
        costs = [_start(root, options.split()) for _ in range(NUM_STARTS)]
        seconds, mebibytes = (min(column) for column in zip(*costs, strict=True))
        found[f"`ropo {options}`, CPU seconds"] = f"{seconds:.2f}"
        found[f"`ropo {options}`, memory, MiB"] = f"{mebibytes:.0f}"
    return found


def _start(root: Path, options: list[str]) -> tuple[float, float]:
    """CPU seconds and peak memory in MiB of one start; NaN where it fails."""
    environment = {**os.environ, "PYTHONPATH": str(root / "src"), "HF_HUB_OFFLINE": "1"}
    with (root / "pyproject.toml").open("rb") as file:
        module, name = tomllib.load(file)["project"]["scripts"]["ropo"].split(":")
    process = subprocess.Popen(
        [sys.executable, "-c", f"import sys; from {module} import {name}; sys.exit({name}())", *options],
        env=environment,
        cwd=root,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        return float("nan"), float("nan")
    units_per_mebibyte = 2**20 if sys.platform == "darwin" else 2**10
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / units_per_mebibyte


def _above(values: Iterable[int], limit: int) -> int:
    return sum(value > limit for value in values)


def unpack(commit: str, folder: Path) -> None:
    """Write the files of a commit into a folder.

    Raises:
        SystemExit: If git knows no such commit.
    """
    got = subprocess.run(["git", "archive", commit], cwd=ROOT, capture_output=True, check=False)
    if got.returncode:
        sys.exit(f"--before needs a commit of this repository; got {commit}: {got.stderr.decode().strip()}")
    with tarfile.open(fileobj=io.BytesIO(got.stdout)) as archive:
        archive.extractall(folder, filter="data")


def table(columns: Mapping[str, Mapping[str, str]]) -> str:
    """Columns of numbers as a Markdown table; a number that a column lacks is a dash.

    Args:
        columns: Numbers by what they count, by the title of the column. The last column gives the order of rows.
    """
    rows = list(dict.fromkeys(name for numbers in reversed(columns.values()) for name in numbers))
    lines = [f"| | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    lines += [f"| {name} | {' | '.join(numbers.get(name, '-') for numbers in columns.values())} |" for name in rows]
    return "\n".join(lines)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Measure size, readability and start of the code.")
    parser.add_argument("--before", metavar="COMMIT", help="commit whose numbers stand in a first column")
    parser.add_argument("--static", action="store_true", help="count only; do not start the command")
    given = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        roots = {"now": ROOT}
        if given.before:
            unpack(given.before, Path(folder))
            roots = {given.before: Path(folder), **roots}
        # Commands first: the peak memory of a child counts from what its parent has.
        started = {} if given.static else {title: started_numbers(root) for title, root in roots.items()}
        print(table({title: {**static_numbers(root), **started.get(title, {})} for title, root in roots.items()}))


if __name__ == "__main__":
    main()
