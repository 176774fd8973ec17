"""Documents are run: python blocks, links, generated tables, the options that commands name and their defaults.

The README is short, and the words are those of the field.
"""

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
from ropo.data.problems import problems_table
from ropo.evaluate.export import EXPORTS
from ropo.evaluate.options import ExportArguments, WinRateArguments
from ropo.losses import methods_table
from ropo.noise.decide import rules_table
from ropo.resample.select import selection_table
from ropo.train.metrics import metrics_table
from ropo_bench import methods
from ropo_bench.grid_config import read_bench_config
from ropo_bench.publish import publish_bench
from ropo_bench.results import cells_of, relative_cost, summary_table
from ropo_bench.rows import read_rows

ROOT = Path(__file__).parents[1]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
MOST_WORDS = 1_000  # of the README, as `wc -w` counts: code, tables and their bars included
# Terms that the field does not use; tables that code makes are the code's business.
NOT_OUR_WORDS = re.compile(
    r"turned round|\bdear\b|hangs on|goes far|verdicts? of a person|win(s|ning)? back|bit for bit|is only looked at|"
    r"no rows (are )?kept|\bsurely\b|wrong throughout|told (right|nothing)",
    re.IGNORECASE,
)
MADE_TABLES = (
    methods_table, metrics_table, rules_table, selection_table, noise_table, problems_table, methods.methods_table,
)  # fmt: skip
HUB_MODEL, OWN_PAIRS = "Qwen/Qwen2.5-0.5B-Instruct", "pairs.jsonl"  # of the quickstart


def blocks(language):
    return [
        pytest.param(code, id=f"{path.relative_to(ROOT)}:{path.read_text()[: match.start()].count(chr(10)) + 2}")
        for path in DOCUMENTS
        for match in BLOCK.finditer(path.read_text())
        for code in [match.group(2)]
        if match.group(1) == language
    ]


@pytest.mark.parametrize("code", blocks("python"))
def test_python_blocks_run(code, model_folder, pairs, tmp_path, monkeypatch):
    """As they stand, but for the model of the quickstart: a tiny one takes its place, since tests are offline."""
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected} for pair in pairs]
    Path(OWN_PAIRS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    exec(compile(code.replace(HUB_MODEL, str(model_folder)), "document", "exec"), {"__name__": "__document__"})


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) <= MOST_WORDS


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_words_are_those_of_the_field(path):
    text = path.read_text()
    for table in MADE_TABLES:
        text = text.replace(table().strip(), "")
    assert not [line for line in text.splitlines() if NOT_OUR_WORDS.search(line)]


def test_changelog_has_at_most_40_lines_per_version():
    for version in (ROOT / "CHANGELOG.md").read_text().split("\n## ")[1:]:
        assert len([line for line in version.splitlines() if line.strip()]) <= 40, version.splitlines()[0]


def test_options_have_the_defaults_that_the_page_says():
    page = (ROOT / "docs" / "options.md").read_text()
    rows = dict(re.findall(r"^\| `--(\w+)` \| ([^|]*?) ?\|", page, re.MULTILINE))
    required = {"model_name_or_path": "M", "dataset_name": "D"}
    words = [word for name, value in required.items() for word in (f"--{name}", value)]
    given, args = parse_train([*words, "--output_dir", "O", "--use_cpu"])
    values = {name: getattr(given if hasattr(given, name) else args, name) for name in rows if name not in required}
    assert {name: rows[name] for name in values} == {name: written(value) for name, value in values.items()}


def written(value):
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}".replace("e-0", "e-")
    return "" if value is None else str(getattr(value, "value", value))


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


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_that_documents_name_are_there(path):
    named = re.findall(r"`((?:\w+/)+\w+\.py)`", path.read_text())
    assert [name for name in named if not any((ROOT / top / name).exists() for top in ("", "src", "src/ropo"))] == []


def test_generated_tables():
    assert methods_table().strip() in (ROOT / "docs" / "methods.md").read_text()
    assert metrics_table().strip() in (ROOT / "docs" / "metrics.md").read_text()
    assert rules_table().strip() in (ROOT / "docs" / "noise.md").read_text()
    assert methods.methods_table() in (ROOT / "docs" / "benchmark.md").read_text()
    assert noise_table() in (ROOT / "docs" / "benchmark.md").read_text()
    assert selection_table().strip() in (ROOT / "docs" / "resampling.md").read_text()


def test_docs_show_the_measured_demo():
    """The table is the one that `ropo demo` printed, and its numbers are those it wrote."""
    page = (ROOT / "docs" / "results.md").read_text()
    found = json.loads((ROOT / "benchmarks" / "demo.json").read_text())
    for method in ("before", "DPO", "ROPO", "ROPO, resampling"):
        accuracy, gold = (found["scores"][method][name] for name in ("accuracy", "gold"))
        assert f"{accuracy['value']:.1%} ±{(accuracy['high'] - accuracy['low']) / 2:.1%}" in page
        assert f"{gold['value']:.2f} ±{(gold['high'] - gold['low']) / 2:.2f}" in page
    rate = {name: 100 * found["detection"]["ROPO"]["flip_rate"][name] for name in ("estimate", "low", "high")}
    assert "{estimate:.1f}% ({low:.1f}-{high:.1f})".format(**rate) in page
    for name in ("auroc", "precision", "recall"):
        assert f"{found['detection']['ROPO'][name]:.3f}" in page


README_CELLS = ("symmetric 0%", "symmetric 30%", "symmetric 40%", "weak_annotator 30%")
README_ROW = re.compile(r"^\| ([\w. ]+?) \|(.* ±.*)\|$", re.MULTILINE)


def test_readme_shows_the_measured_benchmark():
    """Accuracy and cost of each method that the README names, from the rows."""
    rows = README_ROW.findall((ROOT / "README.md").read_text())
    cells = cells_of(read_rows(ROOT / "benchmarks" / "toy" / "results.csv"))
    shown = [cell for title in README_CELLS for cell in cells if cell.title == title]
    assert [name for name, _ in rows if name in ("dpo", "ropo")] == ["dpo", "ropo"]  # whatever else it shows
    for name, told in rows:
        scores = [cell.mean(name, "accuracy") for cell in shown]
        expected = [f"{one.mean:.3f} ±{one.half:.3f}" for one in scores]
        assert [part.strip() for part in told.split("|")] == [*expected, f"{relative_cost(cells, name):.1f}"]


def test_docs_show_the_measured_speed():
    """The tables of the page are those that the rows give."""
    page = (ROOT / "docs" / "performance.md").read_text()
    speed, scaling = benchmark("speed"), benchmark("scaling")
    tables = (scaling.measured_table(), scaling.runs_table(), scaling.planned_table(), scaling.options_table())
    for table in (speed.table(), speed.pair_table(), speed.whole_table(), *tables):
        assert table in page
    assert scaling.picture() == (ROOT / "benchmarks" / "scaling.svg").read_text()


def test_docs_show_the_forecast():
    """What was measured stands in rows; the table by size is computed anew."""
    page = (ROOT / "docs" / "performance.md").read_text()
    assert benchmark("forecast").table() in page
    assert benchmark("memory_table").table() in page


def test_docs_show_the_measured_noise():
    """The tables are those that the rows in benchmarks/ give."""
    module, margins = benchmark("noise"), benchmark("margins")
    page = (ROOT / "docs" / "noise.md").read_text()
    for table in (module.detection_table(), module.pattern_table()):
        assert table in page
    assert margins.table() in page
    assert benchmark("runaway").table() in page
    assert benchmark("families").table() in page
    for table in (benchmark("real_model").table(), benchmark("real_model").training_table()):
        assert table in page
    module = benchmark("known_flips")
    assert module.table() in page
    assert module.training_table() in page


def test_docs_show_what_an_audit_costs():
    assert benchmark("audit_cost").table() in (ROOT / "docs" / "performance.md").read_text()


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
    """What the page quotes stands in a table of the rows."""
    tables = [summary_table(read_rows(ROOT / "benchmarks" / name / "results.csv")) for name in ("toy", "sentiment")]
    kept = ("toy", "sentiment", "support")
    numbers = "".join((ROOT / "benchmarks" / name / "results.md").read_text() for name in kept)
    page = (ROOT / "docs" / "results.md").read_text()
    for table in (*tables, page[page.index("## The demo") : page.index("## Why")]):
        page = page.replace(table, "")
    for quoted in re.findall(r"[+−]?\d\.\d+ ±\d\.\d+", page):
        assert quoted in numbers.replace("-", "−"), quoted


def benchmark(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look for their module
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")  # as for a script
        spec.loader.exec_module(module)
    return module
