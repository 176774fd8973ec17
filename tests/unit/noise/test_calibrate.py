"""What labels that are turned round on purpose say about the estimate."""

import dataclasses

import numpy as np
import pytest

from ropo.noise.calibrate import calibrate
from ropo.noise.decide import decide
from ropo.noise.estimate import Obstacle, estimate_flips


def planted(rate, *, separation=2.0, num_pairs=20_000, seed=0):
    rng = np.random.default_rng(seed)
    clean = rng.normal(separation, 1.0, size=num_pairs)
    is_flipped = rng.random(num_pairs) < rate
    return np.where(is_flipped, -clean, clean), is_flipped


@pytest.mark.parametrize("cut", [-1.0, 0.0])
@pytest.mark.parametrize("separation", [1.0, 2.0])
@pytest.mark.parametrize("rate", [0.1, 0.3])
def test_recall_and_precision_are_those_of_the_decisions(rate, separation, cut):
    """Known from nothing but turned labels; what is left is the error of the rate, and the ranges hold the truth."""
    margins, is_flipped = planted(rate, separation=separation)
    found = estimate_flips(margins, level=0.99)
    claimed = calibrate(margins, found, margins <= cut)
    called = margins <= cut
    assert claimed.recall == pytest.approx(called[is_flipped].mean(), abs=0.03)
    assert claimed.precision == pytest.approx(is_flipped[called].mean(), abs=0.08)
    low, high = claimed.precision_range
    assert low < claimed.precision < high
    assert low - 0.01 < is_flipped[called].mean() < high + 0.01
    assert (claimed.num_injected, claimed.num_turned) == (2000, 20_000)


def test_a_rate_that_is_not_known_well_makes_claims_that_are_not():
    """200 pairs at 30 % have a wide interval; 20,000 a narrow one."""
    few, many = (planted(0.3, separation=2.0, num_pairs=num_pairs, seed=3)[0] for num_pairs in (200, 20_000))
    widths = [
        np.ptp(calibrate(margins, estimate_flips(margins), margins <= 0.0).precision_range) for margins in (few, many)
    ]
    assert widths[0] > 2 * widths[1] > 0


def test_without_flips_in_reach_of_the_interval_all_called_pairs_may_be_right():
    margins, _ = planted(0.02, separation=1.5, num_pairs=400, seed=1)
    found = estimate_flips(margins)
    assert found.low == 0.0
    assert calibrate(margins, found, margins <= 0.0).precision_range[0] == 0.0


@pytest.mark.parametrize(("rate", "low"), [(0.0, 0.0), (0.0003, 0.0), (0.01, 0.005)])
def test_recall_has_a_limit_where_no_label_is_wrong(rate, low):
    """As where right labels are filtered by a given rho: flips would have been found, were there any."""
    margins = np.random.default_rng(0).normal(2.0, 1.0, 2000)
    estimate = dataclasses.replace(estimate_flips(margins), rate=rate, low=low, high=0.02)
    found = calibrate(margins, estimate, margins <= np.quantile(margins, 0.1))
    assert found.recall > 0.99
    assert 0.99 < found.recall_range[0] <= found.recall_range[1] <= 1.0
    assert (found.precision is None) == (rate == 0)
    assert found.precision_range[1] < 0.25


def test_bins_predict_what_is_observed():
    margins, _ = planted(0.2)
    bins = calibrate(margins, estimate_flips(margins), margins <= 0.0).bins
    assert sum(one.num_pairs for one in bins) == len(margins)
    assert [one.predicted for one in bins] == sorted(one.predicted for one in bins)
    for one in bins:  # standard error at most 0.011
        assert one.observed == pytest.approx(one.predicted, abs=0.045)


def test_an_estimate_that_is_off_shows_in_the_bins():
    margins, _ = planted(0.2)
    wrong = dataclasses.replace(estimate_flips(margins), scale=estimate_flips(margins).scale / 5)
    assert max(abs(one.observed - one.predicted) for one in calibrate(margins, wrong, margins <= 0.0).bins) > 0.07


def test_nothing_to_say():
    rng = np.random.default_rng(1)
    blind = rng.normal(size=500)
    assert calibrate(blind, estimate_flips(blind), blind <= 0.0) is None
    few, _ = planted(0.2, num_pairs=40)
    assert calibrate(few, estimate_flips(few), few <= 0.0) is None


def test_nothing_called_nothing_claimed():
    margins, _ = planted(0.0, separation=4.0, num_pairs=2000)
    assert calibrate(margins, estimate_flips(margins), np.zeros(2000, dtype=bool)) is None


@pytest.mark.parametrize("rate", [0.45, 0.9])
def test_claims_about_one_bad_annotator_are_those_of_the_truth(rate):
    """All pairs of a half that are contradicted at all are called, and of the others only the surest."""
    rng = np.random.default_rng(7)
    clean, is_bad = rng.normal(1.5, 1.0, 20_000), np.arange(20_000) < 5_000
    is_flipped = rng.random(20_000) < np.where(is_bad, rate, 0.02)
    margins = np.where(is_flipped, -clean, clean)
    names = ["bad" if bad else "good" for bad in is_bad]
    found = estimate_flips(margins, annotators=names)
    called = margins <= np.where(is_bad, 0.2, -2.0)
    claimed = calibrate(margins, found, called, annotators=names)
    assert claimed.precision == pytest.approx(is_flipped[called].mean(), abs=0.06)
    assert claimed.recall == pytest.approx(called[is_flipped].mean(), abs=0.06)


@pytest.mark.parametrize("rule", ["lowest_loss", "threshold"])
@pytest.mark.parametrize("num_each", [3, 5, 20, 200])
def test_claims_do_not_depend_on_how_many_annotators_share_the_pairs(num_each, rule):
    """Annotators with a handful of pairs each once took claimed precision from .83 to .23."""
    found, truth = [], []
    for seed in range(5):
        rng = np.random.default_rng(seed)
        clean, is_flipped = rng.normal(2.0, 1.0, 1200), rng.random(1200) < 0.25
        margins = np.where(is_flipped, -clean, clean)
        names = [f"a{i // num_each}" for i in range(1200)]
        estimate = estimate_flips(margins, annotators=names)
        called = decide(margins, estimate.p_flip, rho=estimate.rate, rule=rule).decision != "keep"
        claimed = calibrate(margins, estimate, called, annotators=names)
        found.append((claimed.precision, claimed.recall))
        truth.append((is_flipped[called].mean(), called[is_flipped].mean()))
    assert np.mean(found, axis=0) == pytest.approx(np.mean(truth, axis=0), abs=0.06)


def test_a_judge_that_trusted_pairs_show_to_be_surely_wrong_is_not_believed():
    """One in eight right labels is surely contradicted; only pairs that are known to be right can show that."""
    rng = np.random.default_rng(4)
    margins, is_flipped = planted(0.15, separation=3.0, num_pairs=4000)
    margins = np.where(~is_flipped & (rng.random(4000) < 0.12), -margins, margins)
    is_trusted = ~is_flipped & (np.cumsum(~is_flipped) <= 200)
    blind, seeing = estimate_flips(margins), estimate_flips(margins, is_trusted=is_trusted)
    assert blind.is_informative
    assert blind.low > 0.15
    assert seeing.obstacle is Obstacle.MISFIT
    assert calibrate(margins[~is_trusted], seeing, margins[~is_trusted] <= 0.0) is None
