"""The way of the data is the reading order, the reading order is the import order, and nothing above the border acts.

Above the border stand data, log-probabilities, losses and noise: plain values in, plain values out. That is tested by
what is called there, not only by what is imported.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import ropo
import ropo_bench

# A package may import packages that stand above it, and its own files.
ABOVE_THE_BORDER = [
    "pairs", "spelling", "progress", "provenance", "processes", "stages", "options", "data", "logps", "losses",
    "noise",
]  # fmt: skip
ORDER = [
    *ABOVE_THE_BORDER, "endpoint", "models", "judge", "sampling", "resample", "train", "audit", "config", "report",
    "run", "evaluate", "integrations", "cli", "__main__",
]  # fmt: skip
SOURCE, BENCH = (Path(module.__file__).parent for module in (ropo, ropo_bench))

# What counts as acting: names of modules that are imported, of functions and methods that are called.
ACTS = {
    "network": {
        "aiohttp", "hf_hub_download", "http", "httpx", "load_dataset", "requests", "snapshot_download", "socket",
        "stamina", "tenacity", "urllib", "urlopen",
    },
    "models": {"from_pretrained", "get_peft_model", "load_checkpoint_and_dispatch"},
    "environment": {"environ", "getenv", "putenv", "setenv"},
    "files": {
        "load_file", "load_from_disk", "mkdir", "open", "read_bytes", "read_json", "read_text", "rmtree", "safe_open",
        "save_file", "touch", "unlink", "write_aside", "write_bytes", "write_json", "write_text",
    },
    "processes": {"subprocess", "multiprocessing", "Popen"},
}  # fmt: skip
ALLOWED = {
    "provenance.py": {"files", "processes"},  # is how files are written and read back; asks git for the commit
    "processes.py": {"environment"},  # where the store of the launch is
    "stages.py": {"files"},  # keeps the manifest of a folder
    "options/read.py": {"files"},  # reads YAML, and JSON from a file
    "data/read.py": {"files", "network"},  # a data set may be a file, a folder or a name on the hub
    "data/review.py": {"files"},  # the table that a person fills in
    "logps/cache.py": {"files"},  # is a cache
}


def package_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports(tree: ast.AST) -> Iterator[str]:
    """Full names of what is imported."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            pytest.fail("relative imports hide the package they come from")


def imported_packages(code: str) -> set[str]:
    return {name.split(".")[1] for name in imports(ast.parse(code)) if name.startswith("ropo.")}


def violations(package: str, code: str) -> set[str]:
    allowed = {*ORDER[: ORDER.index(package)], package}
    return imported_packages(code) & set(ORDER) - allowed


def acts(code: str) -> set[str]:
    """Kinds of `ACTS` that a module does: by what it imports, calls, or reads of `os`."""
    tree = ast.parse(code)
    names = {name.split(".")[0] for name in imports(tree)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            names.add(getattr(node.func, "id", getattr(node.func, "attr", "")))
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "os":
            names.add(node.attr)
    return {kind for kind, acting in ACTS.items() if names & acting}


FILES = [path for path in sorted(SOURCE.rglob("*.py")) if path.name != "__init__.py" or path.parent != SOURCE]
PURE = [path for path in FILES if package_of(path) in ABOVE_THE_BORDER]
by_name = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))


@by_name
def test_imports_only_from_above(path):
    assert package_of(path) in ORDER, f"{path.name} stands in no package; add it to ORDER where its data comes by"
    assert not violations(package_of(path), path.read_text())


@pytest.mark.parametrize("code", ["import ropo.losses", "from ropo.losses import dpo", "from ropo import losses"])
def test_a_forbidden_import_is_noticed(code):
    assert violations("pairs", code) == {"losses"}


@pytest.mark.parametrize("path", PURE, ids=lambda path: str(path.relative_to(SOURCE)))
def test_above_the_border_nothing_acts(path):
    """And what is allowed to is listed only where it does."""
    assert acts(path.read_text()) == ALLOWED.get(str(path.relative_to(SOURCE)), set())


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("from urllib.request import urlopen", "network"),
        ("import httpx", "network"),
        ("import datasets\ndatasets.load_dataset('x')", "network"),
        ("AutoModelForCausalLM.from_pretrained('x')", "models"),
        ("import os\nkey = os.environ['KEY']", "environment"),
        ("import os\nos.getenv('KEY')", "environment"),
        ("with open('x') as file: pass", "files"),
        ("path.write_text('x')", "files"),
        ("import subprocess\nsubprocess.Popen(['x'])", "processes"),
    ],
)
def test_an_act_is_noticed(code, kind):
    assert acts(code) == {kind}


def test_above_the_border_nothing_is_configured():
    """A function there takes what it needs; options of a run are chosen below."""
    for path in PURE:
        assert not any("Config" in name.rsplit(".", 1)[-1] and name.startswith("ropo.") for name in imports(
            ast.parse(path.read_text())
        )), path  # fmt: skip


def test_only_the_command_line_knows_the_benchmark():
    for path in FILES:
        if any(name.startswith("ropo_bench") for name in imports(ast.parse(path.read_text()))):
            assert package_of(path) == "cli", path


def test_the_benchmark_is_imported_when_it_is_asked_for():
    code = "import sys; import ropo.cli.main; sys.exit(any(name.startswith('ropo_bench') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_benchmark_uses_the_package_as_anybody_can():
    """It imports nothing of the command line, which starts it."""
    for path in sorted(BENCH.rglob("*.py")):
        assert not imported_packages(path.read_text()) & {"cli", "__main__"}, path
