import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest

from ropo.pairs import Pair
from ropo.report import write_report
from ropo.report.html import render_html, render_markdown
from ropo.report.tables import build_tables

EVIL = (
    """<script>alert("x")</script> <img src=x onerror='alert(1)'> "quoted" & </div></article>"""
    " `code` ``` | pipe \\ {{ 7*7 }}"
)
VOID = {"meta", "br", "img", "hr", "input", "link", "rect", "line", "circle", "polyline"}


class Page(HTMLParser):
    """Elements with their attributes, text by element, and whether tags are balanced."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.open, self.unbalanced = "", [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.unbalanced.append(tag)

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("script", "style"):
            self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def build(run):
    return build_tables(**run)


@pytest.fixture(params=[True, False], ids=["informative", "uninformative"])
def evil_run(make_run, request):
    """Hostile text in every place that data can reach."""
    pairs = [
        Pair(prompt=EVIL, chosen=EVIL + " kind <b>", rejected=EVIL + " cruel", row=row, annotator=EVIL)
        for row in range(20)
    ]
    summary = {
        "is_informative": request.param,
        "reason": EVIL,
        "command": EVIL,
        "config": {"loss": EVIL, EVIL: EVIL},
        "versions": {EVIL: EVIL},
        "seconds": {EVIL: 1.0},
        "problems": {EVIL: 3},
        "weight_curve": {"loss": EVIL, "margin": [-5.0, 0.0, 5.0], "weight": [0.2, 1.0, 0.0]},
    }
    run = make_run(pairs, summary)
    messages = [{"role": EVIL, "content": EVIL}, {"role": EVIL, "content": EVIL}]
    run["pairs"][7] = Pair(prompt=messages, chosen=messages, rejected=messages, row=7)
    return run


def test_the_page_is_balanced_and_accessible(make_run):
    page = Page(render_html(build(make_run())))
    assert (page.unbalanced, page.open) == ([], [])
    assert page.all("html")[0]["lang"] == "en"
    headings = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h[1-6]", tag)]
    assert headings[0] == 1
    assert headings.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(headings))
    assert all(svg.get("aria-label") or svg.get("aria-hidden") == "true" for svg in page.all("svg"))
    assert all(cell.get("scope") for cell in page.all("th"))
    assert all(box.get("aria-label") for box in page.all("div") if box.get("tabindex") == "0")


def test_links_lead_somewhere_in_the_page(make_run):
    page = Page(render_html(build(make_run())))
    names = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    targets = [link["href"].removeprefix("#") for link in page.all("a")]
    assert len(names) == len(set(names)), "an id is given twice"
    assert targets
    assert set(targets) <= set(names)


def test_the_page_asks_for_nothing_outside_itself(evil_run):
    html = render_html(build(evil_run))
    page = Page(html)
    for tag, attributes in page.elements:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base")
        assert "src" not in attributes
        assert attributes.get("href", "#").startswith("#")
    assert not re.search(r"url\((?!#)|@import|https?:", html)
    policy = next(meta["content"] for meta in page.all("meta") if meta.get("http-equiv"))
    assert policy.startswith("default-src 'none'")


def test_the_policy_allows_the_script_of_the_page_and_no_other(make_run):
    html = render_html(build(make_run()))
    (script,) = re.findall(r"<script>(.*?)</script>", html, flags=re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in html


def test_hostile_text_stays_text(evil_run):
    html = render_html(build(evil_run))
    page = Page(html)
    assert len(page.all("script")) == 1
    assert page.unbalanced == []
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert "<script>alert" not in html
    assert '<script>alert("x")</script>' in page.text
    assert "{{ 7*7 }}" in page.text
    assert "kind <b>" in page.text
    figure = next(svg for svg in page.all("svg") if "Gradient weight" in (svg.get("aria-label") or ""))
    assert EVIL in figure["aria-label"], "a quote ended the attribute"


def test_hostile_text_stays_text_in_markdown(evil_run):
    markdown = render_markdown(build(evil_run))
    outside = re.sub(r"^(`{3,})text\n.*?^\1$", "", markdown, flags=re.DOTALL | re.MULTILINE)
    assert "alert" in outside
    assert not re.search(r"(?<!\\)<", outside), "a bracket begins a tag"
    assert "````text" in markdown, "a fence must be longer than the backticks inside it"
    for table in re.findall(r"(?:^\|.*\n)+", outside, flags=re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1, "a cell broke its row"


def test_words_that_differ_are_marked_and_no_others(make_run):
    html = render_html(build(make_run()))
    article = html[html.index("</span> Row 12</h3>") : html.index("</span> Row 18</h3>")]
    assert re.findall("<mark>(.*?)</mark>", article) == ["warm", "kind", "cold", ", alas,", "unkind"]


def test_three_files_say_the_same(make_run, tmp_path):
    run = make_run()
    write_report(tmp_path / "new", **run)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["report.html", "report.json", "report.md"]
    told = json.loads((tmp_path / "new" / "report.json").read_text(encoding="utf-8"))
    assert told == build(run)
    for page in ("report.html", "report.md"):
        text = (tmp_path / "new" / page).read_text(encoding="utf-8")
        assert told["sentences"]["title"] in text
        assert all(f"Row {pair['row']}" in text and pair["pair_id"] in text for pair in told["suspects"])
        assert all(f"{entry['margin']:.2f}".replace("-", "−") in text for entry in told["dropped"]["rows"])


def test_a_report_that_fails_leaves_the_old_one(make_run, tmp_path):
    write_report(tmp_path, **make_run())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="every ledger row"):
        write_report(tmp_path, **make_run() | {"pairs": []})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    "change",
    [
        {"training_log": []},
        {"summary": {}},
        {"summary": {"is_informative": False, "reason": "no signal", "flip_rate": None}},
        {"summary": {"flip_rate": {"estimate": float("nan"), "low": float("nan"), "high": float("nan")}}},
    ],
)
def test_what_is_missing_is_left_out_in_peace(make_run, change):
    run = make_run() | change
    run["pairs"] = [pair for pair in run["pairs"] if pair.origin == "data"]
    run["ledger"] = run["ledger"].filter(pa.compute.equal(run["ledger"]["origin"], "data"))
    tables = build(run)
    page = Page(render_html(tables))
    assert page.unbalanced == []
    assert tables["resampled"]["num_pairs"] == 0
    assert "pair it replaces" not in page.text
    assert "nan" not in page.text.lower().split()
    assert "None" not in page.text.replace("None were found", "")
    assert render_markdown(tables)


def test_right_to_left_and_long_words_find_a_place(make_run):
    pairs = [Pair(prompt="ما هي", chosen="x" * 4000, rejected="😀👩‍👩‍👧‍👦 " * 30, row=row) for row in range(20)]
    html = render_html(build(make_run(pairs)))
    assert "ما هي" in html
    assert 'dir="auto"' in html
    assert "overflow-wrap: anywhere" in html


@pytest.mark.parametrize("num", [1_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_many_long_pairs_stay_below_two_megabytes(make_run, num):
    rng = np.random.default_rng(0)
    long = "A long answer with many words & <signs>. " * 500
    short = long[:-9]
    pairs = [Pair(prompt=long, chosen=long, rejected=short, row=row, id=f"{row:016x}") for row in range(num)]
    pairs += [Pair(prompt=long, chosen=long, rejected=short, row=row, id="n", origin="resampled") for row in range(99)]
    margin = rng.normal(1, 2, num)
    columns = {
        "pair_id": [pair.id for pair in pairs[:num]],
        "row": np.arange(num),
        "round": np.zeros(num, dtype=np.int32),
        "margin": margin,
        "loss": margin,
        "weight": np.ones(num),
        "p_flip": 1 / (1 + np.exp(margin)),
        "decision": np.where(margin < -1, "drop", "keep"),
        "origin": ["data"] * num,
    }
    log = [{"round": 0, "step": step, "loss": 1.0, "rewards/margins": 0.1} for step in range(1, 50_000)]
    checks = {row: [-1.0, -0.5, 0.6] for row in range(num)}
    tables = build(make_run() | {"ledger": pa.table(columns), "pairs": pairs, "training_log": log, "checks": checks})
    assert len(tables["hard"]) == 10
    assert len(render_html(tables).encode()) < 2_000_000
    assert len(render_markdown(tables).encode()) < 2_000_000
    assert len(json.dumps(tables)) < 2_000_000


SECTIONS_OF_AUDIT = ["hard", "calibration", "annotators", "lengths"]
SECTIONS_OF_TRAINING = ["training", "resampled"]


def test_an_audit_has_its_sections_and_none_of_training(make_run, make_audit):
    audit, train = (Page(render_html(build(make()))) for make in (make_audit, make_run))
    for page, has, lacks in (
        (audit, SECTIONS_OF_AUDIT, SECTIONS_OF_TRAINING),
        (train, SECTIONS_OF_TRAINING, SECTIONS_OF_AUDIT),
    ):
        names = [section.get("id") for section in page.all("section")]
        links = [link["href"].removeprefix("#") for link in page.all("a")]
        assert {*has, "biases"} <= set(names)
        assert not {*lacks} & {*names, *links}
        assert (page.unbalanced, page.open) == ([], [])
        assert set(links) == {name for name in names if name}
    assert "training would do" in audit.text
    assert "What was done" in train.text


def test_an_evaluation_set_has_its_section(make_run):
    """A row for each round; without one the section and its link are not there."""
    row = {"accuracy": 0.71, "low": 0.66, "high": 0.75, "margin": 0.42, "loss": 0.613}
    found = {"num_pairs": 300, "num_shared": 2, "rounds": [{"round": 0, **row}, {"round": 1, **row, "accuracy": 0.74}]}
    page = Page(render_html(build(make_run(summary={"evaluation": found}))))
    assert "evaluation" in [section.get("id") for section in page.all("section")]
    assert "#evaluation" in [link["href"] for link in page.all("a")]
    assert "300\xa0pairs" in page.text
    assert "2 more" in page.text
    for shown in ("71\xa0%", "74\xa0%", "66–75\xa0%", "0.613"):
        assert shown in page.text
    without = Page(render_html(build(make_run())))
    assert "evaluation" not in [section.get("id") for section in without.all("section")]


def test_the_page_of_an_audit_is_accessible(make_audit):
    page = Page(render_html(build(make_audit())))
    headings = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h[1-6]", tag)]
    assert all(after <= before + 1 for before, after in pairwise(headings))
    assert all(svg.get("aria-label") or svg.get("aria-hidden") == "true" for svg in page.all("svg"))
    assert all(cell.get("scope") for cell in page.all("th"))
    labels = [box.get("aria-label") for box in page.all("div") if box.get("tabindex") == "0"]
    assert all(labels)
    assert len(labels) == len(set(labels)), "two boxes have the same name"


def test_the_caption_says_whose_margins_are_drawn(make_run, make_audit):
    for make, is_held_out in ((make_audit, True), (make_run, False)):
        tables = build(make())
        assert tables["margins"]["is_held_out"] == is_held_out
        for page in (Page(render_html(tables)).text, render_markdown(tables)):
            assert ("Held-out margins" in page) == is_held_out
            assert ("trained model" in page) == (not is_held_out)


def test_a_hostile_name_stays_text_in_every_place(make_audit):
    rates = [{"name": EVIL, "num_pairs": 40, "rate": rate, "low": 0.4, "high": 0.8} for rate in (0.7, 0.45)]
    scorers = [{"name": EVIL, "agreement": 0.6, "low": 0.5, "high": 0.7}]
    tables = build(make_audit(summary={"annotators": rates, "scorers": scorers}))
    html, markdown = render_html(tables), render_markdown(tables)
    page = Page(html)
    assert "<script>alert" not in html
    assert len(page.all("script")) == 1
    assert (page.unbalanced, page.open) == ([], [])
    assert page.text.count('<script>alert("x")</script>') >= 5, "table twice, figure twice, advice"
    outside = re.sub(r"^(`{3,})text\n.*?^\1$", "", markdown, flags=re.DOTALL | re.MULTILINE)
    assert not re.search(r"(?<!\\)<", outside)
    for table in re.findall(r"(?:^\|.*\n)+", outside, flags=re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


def test_a_command_in_markdown_ends_with_its_line(make_audit):
    """Whatever stands in a code span is not escaped; a line end inside it would close it, and free what follows."""
    tables = build(make_audit(summary={"is_informative": False, "reason": "a `b\n\n<script>` c"}))
    assert "\\<script\\>" in render_markdown(tables)


def test_markdown_has_the_numbers_of_every_figure(make_audit):
    markdown = render_markdown(build(make_audit())).replace("\xa0", " ")
    assert "| 100 | 30 % | 50 % | 42–58 % |" in markdown
    assert "| a2 | 12 | 45 % | 37–50 % |" in markdown
    assert re.search(r"\| length in characters \| 20 \| 65 % \(", markdown)
    assert "| 410 | 800 | 1,500 | 2,048 |" in markdown
    assert markdown.count("Not a suspect:") == len(build(make_audit())["hard"]) > 0


def test_clear_features_and_bad_parts_are_pointed_at(make_audit):
    tables = build(make_audit())
    part = {"first_row": 0, "last_row": 9, "num_pairs": 50, "p_flip_mean": 0.5, "p_flip_others": 0.1, "is_high": True}
    tables["file_parts"] = [part, part | {"is_high": False, "p_flip_mean": 0.1}]
    tables["biases"]["features"][0]["is_clear"] = True
    html, markdown = render_html(tables), render_markdown(tables)
    assert re.search(r'<tr class="clear"><th[^>]*>length in characters', html)
    assert "parts in colour" in html
    assert "| **length in characters** |" in markdown
    assert "| 0.50 | 0.10 | higher than" in markdown


@pytest.mark.parametrize(
    "change",
    [
        {"summary": {"calibration": None, "annotators": [], "token_lengths": None, "noise_left": None}},
        {"summary": {"is_informative": False, "reason": "no signal", "calibration": None, "rho": 0.0, "alpha": 0.0}},
        {"checks": {}},
        {"checks": None},
    ],
)
def test_an_audit_that_knows_little_is_still_a_page(make_audit, change):
    tables = build(make_audit(**change))
    page = Page(render_html(tables))
    assert (page.unbalanced, page.open) == ([], [])
    assert "None" not in page.text.replace("None were found", "")
    assert "nan" not in page.text.lower().split()
    assert "do next" in render_markdown(tables)


def test_a_page_of_an_audit_without_a_summary(make_audit):
    run = make_audit() | {"summary": {"task": "audit"}, "ledger": make_audit()["ledger"]}
    page = Page(render_html(build(run)))
    assert page.unbalanced == []
    assert "None" not in page.text.replace("None were found", "")


def test_a_new_pair_is_shown_with_the_one_it_replaces(make_run):
    page = Page(render_html(build(make_run())))
    assert "pair for row 12" in page.text
    assert "(margin −1.40 nats" in page.text
