import re
from xml.etree import ElementTree

import pytest

from ropo.report import plots, svg
from ropo.report.html import figures
from ropo.report.tables import DECISIONS, build_tables


@pytest.fixture(params=["train", "audit"])
def tables(make_run, make_audit, request):
    return build_tables(**(make_run() if request.param == "train" else make_audit()))


def numbers_in(picture, attribute):
    return [float(value) for value in re.findall(rf'\b{attribute}="(-?[\d.]+)"', picture)]


def test_every_figure_is_well_formed_named_and_keeps_its_text(tables):
    drawn = figures(tables)
    of_task = ["training_loss", "weight"] if tables["task"] == "train" else ["calibration", "annotators"]
    for name in ("margins_wide", "margins_narrow", "review", "biases", "gauge", *of_task):
        root = ElementTree.fromstring(drawn[name])
        assert root.get("role") == "img"
        assert root.get("aria-label")
        assert any(element.tag == "text" for element in root.iter())
    for picture in drawn.values():
        ElementTree.fromstring(picture)
        assert "nan" not in picture
        assert not re.search(r"#[0-9a-fA-F]{3,6}\b", picture), "colours belong to the style sheet"


def test_nothing_is_drawn_outside_the_figure(tables):
    for name, picture in figures(tables).items():
        if name in ("bar", "patterns"):  # they have no scale
            continue
        width, height = (float(value) for value in re.search(r'viewBox="0 0 (\d+) (\d+)"', picture).groups())
        limits = {"x1": width, "x2": width, "cx": width, "y1": height, "y2": height, "cy": height}
        for attribute, limit in limits.items():
            assert all(0 <= value <= limit for value in numbers_in(picture, attribute)), (name, attribute)


def test_bars_of_the_histogram_add_up(tables):
    picture = plots.margin_histogram(tables["margins"])
    bars = re.findall(r'<rect class="(keep|drop|flip|resample)"[^>]*height="([\d.]+)"', picture)
    total = {decision: sum(float(height) for kind, height in bars if kind == decision) for decision in DECISIONS}
    one = total["keep"] / 16
    num_dropped = 2 if tables["task"] == "train" else 3
    assert total["drop"] == pytest.approx(num_dropped * one, rel=0.02)
    assert total["flip"] == pytest.approx(one, rel=0.02)


def test_decisions_differ_by_pattern_and_not_by_colour_alone(make_run):
    picture = plots.margin_histogram(build_tables(**make_run())["margins"])
    assert 'fill="url(#fill-flip)"' in picture
    assert 'fill="url(#fill-resample)"' in picture
    assert len({plots.swatch(decision) for decision in DECISIONS}) == 4


def test_every_pattern_that_is_used_exists_once(tables):
    page = "".join(figures(tables).values())
    names = re.findall(r'id="([^"]+)"', page)
    assert sorted(names) == sorted(set(re.findall(r"url\(#([^)]+)\)", page)))


def test_the_bar_of_decisions_is_full():
    picture = plots.decision_bar({"num_pairs": 8, "keep": 5, "drop": 2, "flip": 1, "resample": 0})
    parts = re.findall(r'<rect class="(\w+)" x="([\d.]+)%" y="1" width="([\d.]+)%"', picture)
    assert [(decision, float(x), float(width)) for decision, x, width in parts] == [
        ("keep", 0.0, 62.5),
        ("drop", 62.5, 25.0),
        ("flip", 87.5, 12.5),
    ]
    assert "5 kept, 2 dropped, 1 flipped" in picture


def test_text_in_a_figure_is_escaped(make_run):
    curve = build_tables(**make_run())["weight_curve"] | {"loss": '"><script>alert(1)</script>'}
    picture = plots.weight_curve(curve)
    root = ElementTree.fromstring(picture)
    assert "<script" not in picture
    assert '"><script>' in root.get("aria-label")


def test_an_unknown_rate_draws_an_empty_scale(tables):
    picture = plots.interval_gauge(
        tables["estimate"] | {"is_informative": False, "rate": None, "low": None, "high": None}
    )
    assert "unknown" in picture
    assert "circle" not in picture


def test_one_round_one_step_and_a_flat_line_are_drawn():
    line = {"round": 0, "num_logged": 1, "x": [5.0], "y": [0.7]}
    curve = {"key": "loss", "title": "Loss", "unit": "nats", "reference": None, "meaning": "", "lines": [line]}
    assert "circle" in plots.training_curve(curve, [0], 5)


@pytest.mark.parametrize(
    ("low", "high", "names"),
    [
        (0, 10, ["0.0", "2.5", "5.0", "7.5", "10.0"]),
        (-1, 1, ["−1.0", "−0.5", "0.0", "0.5", "1.0"]),
        (0, 4e4, ["0", "10,000", "20,000", "30,000", "40,000"]),
    ],
)
def test_axis_numbers_are_round(low, high, names):
    assert [name for _, name in svg.ticks(low, high, 4, None)] == names


def dots(picture, kind="accent"):
    found = re.findall(rf'<circle class="{kind}" cx="([\d.]+)" cy="([\d.]+)"', picture)
    return [(float(x), float(y)) for x, y in found]


def test_calibrated_bins_lie_on_the_diagonal_and_others_off_it():
    entry = {"num_pairs": 100, "predicted": 0.2, "observed": 0.2, "low": 0.1, "high": 0.3}
    picture = plots.calibration_curve([entry, entry | {"observed": 0.3}])
    x1, y1, x2, y2 = (
        float(value)
        for value in re.search(r'"reference" x1="(.+?)" y1="(.+?)" x2="(.+?)" y2="(.+?)"/>', picture).groups()
    )
    (x, y), (same_x, above) = dots(picture)
    assert y == pytest.approx(y1 + (x - x1) / (x2 - x1) * (y2 - y1), abs=0.2)
    assert same_x == x
    assert above < y - 10, "an observed share above the predicted one lies above the diagonal"
    assert "20 % and 30 %" in picture.replace("\xa0", " ")


def test_each_annotator_has_a_dot_at_the_rate_and_the_band_is_the_interval_of_all():
    known = {"num_pairs": 9, "low": 0.1, "high": 0.4}
    rows = [known | {"name": "a", "rate": 0.3}, known | {"name": "b", "rate": 0.2}, known | {"name": "c", "rate": None}]
    picture = plots.annotator_rates(rows, {"low": 0.2, "high": 0.3})
    left, width = (
        float(value) for value in re.search(r'class="band" x="(.+?)" y=".+?" width="(.+?)"', picture).groups()
    )
    (first, _), (second, _) = dots(picture)
    assert (first, second) == (pytest.approx(left + width, abs=0.2), pytest.approx(left, abs=0.2))


def test_a_hostile_annotator_is_text_in_the_figure():
    name = '"><script>'
    picture = plots.annotator_rates(
        [{"name": name, "num_pairs": 9, "rate": 0.3, "low": 0.1, "high": 0.4}], {"low": 0.2, "high": 0.3}
    )
    root = ElementTree.fromstring(picture)
    assert "<script" not in picture
    assert name in root.get("aria-label")
    assert name in [element.text for element in root.iter() if element.tag == "text"]


def test_kept_and_other_pairs_differ_by_shape_and_not_by_colour_alone():
    group = {"num_pairs": 30, "share": 0.8, "low": 0.7, "high": 0.9}
    other = group | {"share": 0.3, "low": 0.2, "high": 0.4}
    entry = {"name": "links", "is_clear": True, "all": group, "kept": group, "not_kept": other}
    picture = plots.bias_shares([entry, entry | {"not_kept": group | {"num_pairs": 0, "share": None}}])
    assert (len(dots(picture)), len(dots(picture, "hollow"))) == (2, 1)
    assert dots(picture)[0][0] > dots(picture, "hollow")[0][0]


def test_a_bad_part_of_the_file_is_drawn_higher_and_in_another_look():
    part = {"first_row": 0, "last_row": 9, "num_pairs": 10, "p_flip_mean": 0.1, "p_flip_others": 0.2, "is_high": False}
    picture = plots.part_means([part, part | {"p_flip_mean": 0.4, "is_high": True}])
    bars = re.findall(r'<rect class="(\w+)"[^>]*height="([\d.]+)"', picture)
    assert [kind for kind, _ in bars] == ["keep", "drop"]
    assert float(bars[1][1]) == pytest.approx(4 * float(bars[0][1]), rel=0.01)
