"""The way of the data is the reading order, and the reading order is the import order."""

import ast
from pathlib import Path

import pytest

import ropo

# A room may import rooms that stand above it, and its own files.
ORDER = [
    "pairs", "spelling", "progress", "provenance", "stages", "options", "endpoint", "data", "logps", "losses", "noise",
    "models", "judge", "sampling", "resample", "config", "train", "audit", "report", "run", "evaluate", "cli",
    "__main__",
]  # fmt: skip
PURE = ORDER[: ORDER.index("config")]
SOURCE = Path(ropo.__file__).parent


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported_rooms(code: str) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(code)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            pytest.fail("relative imports hide the room they come from")
        rooms |= {name.split(".")[1] for name in names if name.startswith("ropo.")}
    return rooms


def violations(room: str, code: str) -> set[str]:
    allowed = {*ORDER[: ORDER.index(room)], room}
    return imported_rooms(code) & set(ORDER) - allowed


FILES = [path for path in sorted(SOURCE.rglob("*.py")) if path.name != "__init__.py" or path.parent != SOURCE]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_only_from_above(path):
    assert room_of(path) in ORDER, f"{path.name} stands in no room; add it to ORDER where its data comes by"
    assert not violations(room_of(path), path.read_text())


@pytest.mark.parametrize("code", ["import ropo.losses", "from ropo.losses import dpo", "from ropo import losses"])
def test_the_test_notices(code):
    assert violations("pairs", code) == {"losses"}


def test_pure_rooms_know_no_config():
    """Above the border nothing needs a trainer or a configuration."""
    for path in FILES:
        if room_of(path) in PURE:
            assert not imported_rooms(path.read_text()) & {"config", "train", "run", "cli"}
