"""A filter that is tried: better judges are told from equal ones, whatever share of the labels is flipped."""

import numpy as np
import pytest

from ropo.noise.trial import compare


def judged(rng, num_pairs, rate, errors):
    """Signs of margins: of each judge, against labels of which a share is wrong."""
    label = np.where(rng.random(num_pairs) < rate, -1.0, 1.0)
    return [label * np.where(rng.random(num_pairs) < error, -1.0, 1.0) for error in errors]


@pytest.mark.parametrize("rate", [0.0, 0.2, 0.4])
def test_the_gain_is_that_in_accuracy_times_what_flips_leave(rate):
    """Agreement is η + (1 − 2η)·accuracy; nobody says which labels are wrong."""
    found = [compare(*judged(np.random.default_rng(seed), 4000, rate, (0.06, 0.10))) for seed in range(100)]
    assert np.mean([one.gain for one in found]) == pytest.approx((1 - 2 * rate) * 0.04, abs=0.002)
    assert np.mean([one.tried for one in found]) == pytest.approx(rate + (1 - 2 * rate) * 0.94, abs=0.002)
    assert np.mean([one.as_is for one in found]) == pytest.approx(rate + (1 - 2 * rate) * 0.90, abs=0.002)


def test_equal_judges_seldom_pass():
    """One in twenty in either direction, as the level says."""
    found = [compare(*judged(np.random.default_rng(seed), 2000, 0.3, (0.1, 0.1))) for seed in range(1000)]
    assert 0.03 <= np.mean([one.helps for one in found]) <= 0.07
    assert 0.03 <= np.mean([one.hurts for one in found]) <= 0.07


def test_a_better_judge_helps_and_a_worse_one_hurts():
    good, poor = judged(np.random.default_rng(0), 4000, 0.3, (0.05, 0.12))
    assert (compare(good, poor).helps, compare(good, poor).hurts) == (True, False)
    assert (compare(poor, good).helps, compare(poor, good).hurts) == (False, True)


def test_doubt_on_both_sides_is_no_gain():
    found = compare(np.zeros(10), np.array([1.0, -1.0] * 5))
    assert (found.tried, found.as_is, found.gain, found.helps) == (0.5, 0.5, 0.0, False)


@pytest.mark.parametrize(("tried", "as_is"), [(np.ones(3), np.ones(4)), (np.ones(0), np.ones(0))])
def test_margins_of_other_pairs(tried, as_is):
    with pytest.raises(ValueError, match="needs both margins of the same pairs"):
        compare(tried, as_is)
