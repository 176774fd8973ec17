import re
from xml.etree import ElementTree

import pytest

from ropo.report import plots
from ropo.report.html import figures
from ropo.report.tables import DECISIONS, build_tables


@pytest.fixture
def tables(make_run):
    run = make_run()
    return build_tables(run["ledger"], run["summary"], run["pairs"], run["training_log"])


def numbers_in(svg, attribute):
    return [float(value) for value in re.findall(rf'\b{attribute}="(-?[\d.]+)"', svg)]


def test_every_figure_is_well_formed_named_and_keeps_its_text(tables):
    drawn = figures(tables)
    for name in ("margins_wide", "margins_narrow", "review", "rounds", "weight", "lengths", "gauge", "training_loss"):
        root = ElementTree.fromstring(drawn[name])
        assert root.get("role") == "img"
        assert root.get("aria-label")
        assert any(element.tag == "text" for element in root.iter())
    for svg in drawn.values():
        ElementTree.fromstring(svg)
        assert "nan" not in svg
        assert not re.search(r"#[0-9a-fA-F]{3,6}\b", svg), "colours belong to the style sheet"


def test_nothing_is_drawn_outside_the_figure(tables):
    for name, svg in figures(tables).items():
        if name in ("bar", "patterns"):  # they have no scale
            continue
        width, height = (float(value) for value in re.search(r'viewBox="0 0 (\d+) (\d+)"', svg).groups())
        limits = {"x1": width, "x2": width, "cx": width, "y1": height, "y2": height, "cy": height}
        for attribute, limit in limits.items():
            assert all(0 <= value <= limit for value in numbers_in(svg, attribute)), (name, attribute)


def test_bars_of_the_histogram_add_up(tables):
    svg = plots.margin_histogram(tables["margins"])
    bars = re.findall(r'<rect class="(keep|drop|flip|resample)"[^>]*height="([\d.]+)"', svg)
    total = {decision: sum(float(height) for kind, height in bars if kind == decision) for decision in DECISIONS}
    one = total["keep"] / 16
    assert total["drop"] == pytest.approx(2 * one, rel=0.02)
    assert total["flip"] == pytest.approx(one, rel=0.02)


def test_decisions_differ_by_pattern_and_not_by_colour_alone(tables):
    svg = plots.margin_histogram(tables["margins"])
    assert 'fill="url(#fill-flip)"' in svg
    assert 'fill="url(#fill-resample)"' in svg
    assert len({plots.swatch(decision) for decision in DECISIONS}) == 4


def test_every_pattern_that_is_used_exists_once(tables):
    page = "".join(figures(tables).values())
    names = re.findall(r'id="([^"]+)"', page)
    assert sorted(names) == sorted(set(re.findall(r"url\(#([^)]+)\)", page)))


def test_the_bar_of_decisions_is_full():
    svg = plots.decision_bar({"num_pairs": 8, "keep": 5, "drop": 2, "flip": 1, "resample": 0})
    parts = re.findall(r'<rect class="(\w+)" x="([\d.]+)%" y="1" width="([\d.]+)%"', svg)
    assert [(decision, float(x), float(width)) for decision, x, width in parts] == [
        ("keep", 0.0, 62.5),
        ("drop", 62.5, 25.0),
        ("flip", 87.5, 12.5),
    ]
    assert "5 kept, 2 dropped, 1 flipped" in svg


def test_text_in_a_figure_is_escaped(tables):
    curve = tables["weight_curve"] | {"loss": '"><script>alert(1)</script>'}
    svg = plots.weight_curve(curve)
    root = ElementTree.fromstring(svg)
    assert "<script" not in svg
    assert '"><script>' in root.get("aria-label")


def test_an_unknown_rate_draws_an_empty_scale(tables):
    svg = plots.interval_gauge(tables["estimate"] | {"is_informative": False, "rate": None, "low": None, "high": None})
    assert "unknown" in svg
    assert "circle" not in svg


def test_one_round_one_step_and_a_flat_line_are_drawn():
    line = {"round": 0, "num_logged": 1, "x": [5.0], "y": [0.7]}
    curve = {"key": "loss", "title": "Loss", "unit": "nats", "reference": None, "meaning": "", "lines": [line]}
    assert "circle" in plots.training_curve(curve, [0], 5)
    entry = {"round": 0, "rate": 0.0, "low": None, "high": None, "rho": None}
    ElementTree.fromstring(plots.rounds_estimate([entry]))


@pytest.mark.parametrize(
    ("low", "high", "names"),
    [
        (0, 10, ["0.0", "2.5", "5.0", "7.5", "10.0"]),
        (-1, 1, ["−1.0", "−0.5", "0.0", "0.5", "1.0"]),
        (0, 4e4, ["0", "10,000", "20,000", "30,000", "40,000"]),
    ],
)
def test_axis_numbers_are_round(low, high, names):
    assert [name for _, name in plots._ticks(low, high, 4, None)] == names
