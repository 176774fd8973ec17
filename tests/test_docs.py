"""Documents are run: python blocks, links, generated tables, and the options that commands name."""

import importlib.util
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from ropo.cli.arguments import parse_options, parse_train
from ropo.data.inject import noise_table
from ropo.evaluate.export import EXPORTS
from ropo.evaluate.options import ExportArguments, WinRateArguments
from ropo.losses import methods_table
from ropo.noise.decide import rules_table
from ropo.resample.select import selection_table
from ropo.train.metrics import metrics_table
from ropo_bench import methods
from ropo_bench.grid_config import read_bench_config
from ropo_bench.publish import publish_bench
from ropo_bench.results import summary_table
from ropo_bench.rows import read_rows

ROOT = Path(__file__).parents[1]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(language):
    return [
        pytest.param(code, id=f"{path.relative_to(ROOT)}:{path.read_text()[: match.start()].count(chr(10)) + 2}")
        for path in DOCUMENTS
        for match in BLOCK.finditer(path.read_text())
        for code in [match.group(2)]
        if match.group(1) == language
    ]


@pytest.mark.parametrize("code", blocks("python"))
def test_python_blocks_run(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "document", "exec"), {"__name__": "__document__"})


@pytest.mark.parametrize("code", blocks("sh"))
def test_commands_are_understood(code):
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:2] in (["ropo", "train"], ["ropo", "audit"]):
            parse_train([*words[2:], "--use_cpu"])  # bf16 is refused on a CPU otherwise
        for task, kind in (("export", ExportArguments), ("win_rate", WinRateArguments)):
            if words[:2] == ["ropo", task]:
                parse_options(kind, words[2:], command=task)


def test_docs_name_every_format_with_its_defaults():
    page = (ROOT / "docs" / "evaluation.md").read_text()
    for name, spec in EXPORTS.items():
        assert f"| `{name}` |" in page
        assert f"`{spec.file.format(name='NAME')}`" in page
        [row] = [line for line in page.splitlines() if f"`{name}`" in line and f"| {spec.max_new_tokens} |" in line]
        assert f"{spec.temperature:g}" in row
        for category, temperature in spec.temperatures.items():
            assert re.search(rf"{category}[a-z, ]* {temperature:g}\b", row), category


@pytest.mark.parametrize("code", blocks("yaml"))
def test_grids_are_understood(code, tmp_path):
    (tmp_path / "grid.yaml").write_text(code)
    read_bench_config(tmp_path / "grid.yaml")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_resolve(path):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text()):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), f"{path.name} links to {target}, which is not there"


def test_generated_tables():
    assert methods_table().strip() in (ROOT / "docs" / "methods.md").read_text()
    assert metrics_table().strip() in (ROOT / "docs" / "metrics.md").read_text()
    assert rules_table().strip() in (ROOT / "docs" / "noise.md").read_text()
    assert methods.methods_table() in (ROOT / "docs" / "benchmark.md").read_text()
    assert noise_table() in (ROOT / "docs" / "benchmark.md").read_text()
    assert selection_table().strip() in (ROOT / "docs" / "resampling.md").read_text()


def test_readme_shows_the_measured_demo():
    """The table in the README is the one that `ropo demo` printed, and its numbers are those it wrote."""
    readme, found = (ROOT / "README.md").read_text(), json.loads((ROOT / "benchmarks" / "demo.json").read_text())
    for method in ("before", "DPO", "ROPO", "ROPO, resampling"):
        accuracy, gold = (found["scores"][method][name] for name in ("accuracy", "gold"))
        assert f"{accuracy['value']:.1%} ±{(accuracy['high'] - accuracy['low']) / 2:.1%}" in readme
        assert f"{gold['value']:.2f} ±{(gold['high'] - gold['low']) / 2:.2f}" in readme
    rate = {name: 100 * found["detection"]["ROPO"]["flip_rate"][name] for name in ("estimate", "low", "high")}
    assert "{estimate:.1f}% ({low:.1f}-{high:.1f})".format(**rate) in readme
    for name in ("auroc", "precision", "recall"):
        assert f"{found['detection']['ROPO'][name]:.3f}" in readme


def test_docs_show_the_measured_speed():
    """The tables of the page are those that the rows give."""
    page = (ROOT / "docs" / "performance.md").read_text()
    speed, scaling = benchmark("speed"), benchmark("scaling")
    tables = (scaling.measured_table(), scaling.runs_table(), scaling.planned_table(), scaling.options_table())
    for table in (speed.table(), speed.pair_table(), speed.whole_table(), *tables):
        assert table in page
    assert scaling.picture() == (ROOT / "benchmarks" / "scaling.svg").read_text()


def test_docs_show_the_measured_noise():
    """The tables are those that the rows in benchmarks/ give."""
    module, margins = benchmark("noise"), benchmark("margins")
    page = (ROOT / "docs" / "noise.md").read_text()
    for table in (module.detection_table(), module.pattern_table()):
        assert table in page
    assert margins.table() in page
    assert benchmark("families").table() in page
    assert benchmark("real_model").table() in page
    assert benchmark("known_flips").table() in page


def test_docs_show_the_measured_beta():
    assert benchmark("beta").table() in (ROOT / "docs" / "results.md").read_text()


def test_docs_show_the_kills():
    """The table is that of benchmarks/kills.json, in which every run ended as if it had not been killed."""
    module = benchmark("kills")
    figures = json.loads(module.FIGURES.read_text())
    assert module.table(figures) in module.PAGE.read_text()
    assert figures["failures"] == []


@pytest.mark.parametrize("name", ["toy", "sentiment"])
def test_the_benchmark_is_published_as_its_rows_say(name, tmp_path):
    """Tables and pictures in benchmarks/ are those of results.csv."""
    kept = ROOT / "benchmarks" / name
    shutil.copy(kept / "results.csv", tmp_path)
    for path in publish_bench(tmp_path):
        assert path.read_text() == (kept / path.name).read_text(), path.name
    assert summary_table(read_rows(kept / "results.csv")) in (ROOT / "docs" / "results.md").read_text()


def test_the_text_quotes_the_benchmark():
    """The README shows the table of the rows, and what a text quotes stands in a table."""
    tables = [summary_table(read_rows(ROOT / "benchmarks" / name / "results.csv")) for name in ("toy", "sentiment")]
    kept = ("toy", "sentiment", "support")
    numbers = "".join((ROOT / "benchmarks" / name / "results.md").read_text() for name in kept)
    assert tables[0] in (ROOT / "README.md").read_text()
    page = (ROOT / "docs" / "results.md").read_text()
    for table in tables:
        page = page.replace(table, "")
    for quoted in re.findall(r"[+−]?\d\.\d+ ±\d\.\d+", page):
        assert quoted in numbers.replace("-", "−"), quoted


def benchmark(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look for their module
    spec.loader.exec_module(module)
    return module
