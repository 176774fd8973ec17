import json

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit
from scipy.stats import chi2

from ropo.noise.estimate import estimate_flips
from ropo.noise.estimators import ESTIMATORS, agreement, area_under_margin, em, em_step, holder, tied_gaussian

FIVE = np.array([-5.0, -1.0, 0.0, 0.5, 3.0])
TEN = np.array([4.0, 3.5, 3.0, 2.5, 2.0, 1.5, 1.0, -3.0, -2.5, 0.5])


def flipped_margins(num_pairs, rate, seed=0):
    rng = np.random.default_rng(seed)
    clean = rng.normal(2.0, 1.5, size=num_pairs)
    return np.where(rng.random(num_pairs) < rate, -clean, clean)


@pytest.mark.parametrize(
    ("found", "golden"),
    [
        (1 - em_step(FIVE, 0.1), 0.73131325512),
        (1 - em(FIVE), 0.427403533237),
        (1 - em(TEN), 0.811379755285),
        (agreement(TEN), 0.100853950821),
        (holder(FIVE, gamma=1.0), 0.316652823706),
        (holder(FIVE), 0.3917455503),
        (holder(FIVE, gamma=4.0), 0.462322222894),
        (holder(np.array([40.0] * 8 + [-40.0] * 2)), 0.2),
    ],
)
def test_golden(found, golden):
    assert found == pytest.approx(golden, abs=1e-11)


def test_em_is_where_em_step_comes_to_rest():
    assert em_step(TEN, em(TEN)) == pytest.approx(em(TEN), abs=1e-12)


def test_em_has_no_interior_rest_when_all_labels_agree_or_disagree():
    assert em(np.full(20, 800.0)) == 0.0
    assert em(np.full(20, -800.0)) == 1.0


def test_tied_gaussian_recovers_its_own_mixture():
    """Standard error 0.005 at 10,000 pairs; five of them: false alarm 6e-7."""
    assert tied_gaussian(flipped_margins(10_000, 0.2)) == pytest.approx(0.2, abs=0.025)


def test_agreement_counts_ties_half_and_knows_nothing_without_margins():
    assert agreement(np.array([0.0, 0.0, 5.0, -5.0])) == pytest.approx(0.5)
    assert np.isnan(agreement(np.zeros(3)))


def test_every_estimator_is_a_function_of_margins_alone():
    margins = flipped_margins(2000, 0.2)
    assert next(iter(ESTIMATORS)) == "em_temperature"
    for estimator in ESTIMATORS.values():
        assert 0.0 <= estimator(margins) <= 0.5


def test_rate_scale_and_interval_are_those_of_the_plain_likelihood():
    margins = flipped_margins(300, 0.2, seed=3)
    found = estimate_flips(margins, level=0.8)
    rates, scales = np.linspace(0, 0.5, 501), np.geomspace(0.3, 5, 120)
    p_right = expit(scales[:, None] * margins)
    profile = np.array([np.log(p_right + rate * (1 - 2 * p_right)).sum(axis=1).max() for rate in rates])
    inside = rates[profile >= profile.max() - chi2.ppf(0.8, df=1) / 2]
    assert found.rate == pytest.approx(rates[profile.argmax()], abs=0.002)
    assert (found.low, found.high) == pytest.approx((inside[0], inside[-1]), abs=0.002)
    at_best = np.log(p_right + found.rate * (1 - 2 * p_right)).sum(axis=1)
    assert found.scale == pytest.approx(scales[at_best.argmax()], rel=0.02)


def plain_loss(margins):
    """Minus the log-likelihood of (rate, log scale), every margin by itself."""

    def loss(parameters):
        p_right = expit(np.exp(parameters[1]) * margins)
        return -np.log(p_right + parameters[0] * (1 - 2 * p_right)).sum()

    return loss


def climb(loss, start):
    return minimize(loss, start, method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-9})


def test_counting_close_margins_together_costs_nothing():
    margins = flipped_margins(3000, 0.2, seed=4)
    margins[::3] *= np.geomspace(1e-9, 1e-6, 1000)  # signs of these must not be mixed up, nor with the large ones
    margins[::3] *= np.sign(margins[::3]) * np.where(np.arange(1000) % 2, 1, -1)
    found = estimate_flips(margins)
    exact = climb(plain_loss(margins), [0.25, 0.0])
    assert (found.rate, np.log(found.scale)) == pytest.approx(tuple(exact.x), abs=1e-5)


def test_the_higher_of_two_hills_is_found():
    """A third of the margins tiny but as right as the others: only signs count, which a climber from T = 1 misses."""
    margins = flipped_margins(3000, 0.2, seed=4)
    margins[::3] *= np.geomspace(1e-9, 1.0, 1000)
    loss = plain_loss(margins)
    nearby = climb(loss, [0.25, 0.0])
    found = estimate_flips(margins)
    assert loss([found.rate, np.log(found.scale)]) < nearby.fun - 10
    assert found.rate == pytest.approx(climb(loss, [0.25, 5.6]).x[0], abs=0.01)


def test_p_flip_is_the_posterior():
    margins = flipped_margins(500, 0.2)
    found = estimate_flips(margins)
    right, wrong = expit(found.scale * margins), expit(-found.scale * margins)
    posterior = found.rate * wrong / ((1 - found.rate) * right + found.rate * wrong)
    np.testing.assert_allclose(found.p_flip, posterior, rtol=1e-9)
    assert found.p_flip.mean() == pytest.approx(found.rate, abs=1e-6)  # where the likelihood is flat in the rate


def test_order_does_not_matter():
    margins = flipped_margins(1000, 0.2)
    order = np.random.default_rng(1).permutation(1000)
    found, shuffled = estimate_flips(margins), estimate_flips(margins[order])
    assert shuffled.rate == pytest.approx(found.rate, abs=1e-6)
    np.testing.assert_allclose(shuffled.p_flip, found.p_flip[order], atol=1e-6)


@pytest.mark.parametrize("copies", [2, 3])
def test_duplicating_the_data_keeps_the_rate_and_narrows_the_interval(copies):
    margins = flipped_margins(700, 0.2)
    once, more = estimate_flips(margins), estimate_flips(np.tile(margins, copies))
    assert more.rate == pytest.approx(once.rate, abs=1e-6)
    assert once.low < more.low < more.rate < more.high < once.high


@pytest.mark.parametrize("unit", [1e-200, 1e-3, 50.0, 1e200])
def test_the_unit_of_the_margins_changes_only_the_scale(unit):
    margins = flipped_margins(500, 0.2)
    plain, other = estimate_flips(margins), estimate_flips(unit * margins)
    assert (other.rate, other.low, other.high) == pytest.approx((plain.rate, plain.low, plain.high), abs=1e-6)
    assert other.scale * unit == pytest.approx(plain.scale, rel=1e-5)
    assert other.is_informative


def test_undecided_margins_say_nothing():
    margins = flipped_margins(500, 0.2)
    plain, padded = estimate_flips(margins), estimate_flips(np.append(margins, np.zeros(1000)))
    assert (padded.rate, padded.low, padded.high) == pytest.approx((plain.rate, plain.low, plain.high), abs=1e-6)
    np.testing.assert_allclose(padded.p_flip[500:], padded.rate)


def test_labels_that_all_agree_give_exactly_zero():
    found = estimate_flips(np.random.default_rng(0).uniform(1, 5, size=400))
    assert found.rate == 0.0
    assert found.low == 0.0
    assert 0 < found.high < 0.01
    assert found.is_informative
    assert not found.p_flip.any()


def test_higher_level_gives_a_wider_interval():
    margins = flipped_margins(500, 0.2)
    narrow, wide = estimate_flips(margins, level=0.5), estimate_flips(margins, level=0.99)
    assert wide.low < narrow.low < narrow.rate < narrow.high < wide.high
    assert wide.rate == narrow.rate


RNG = np.random.default_rng(5)
CANNOT_TELL = {
    "pure noise": (RNG.normal(size=2000), "do not follow the labels"),
    "nothing learned": (np.zeros(500), "same size"),
    "constant": (np.full(500, 3.0), "same size"),
    "constant but flipped": (np.where(RNG.random(500) < 0.3, -3.0, 3.0), "same size"),
    "weak": (RNG.normal(0.06, 1.0, size=10_000), "about equally well"),
    "swapped": (-RNG.normal(2.0, 1.0, size=1000), "chosen and rejected are swapped"),
    "few": (RNG.normal(2.0, 1.0, size=20), "too few"),
}


@pytest.mark.parametrize("case", CANNOT_TELL)
def test_says_when_it_cannot_tell(case):
    margins, reason = CANNOT_TELL[case]
    found = estimate_flips(margins)
    assert not found.is_informative
    assert reason in found.reason
    assert 0.0 <= found.low <= found.rate <= found.high <= 0.5
    assert np.isfinite(found.p_flip).all()


def test_weak_margins_leave_the_rate_open():
    """Only (1 − 2ε)·T is known there, so 0 and more than 40 % must both be inside."""
    found = estimate_flips(CANNOT_TELL["weak"][0])
    assert found.low == 0.0
    assert found.high > 0.4


def test_without_signal_every_rate_is_possible_and_none_is_not_said():
    found = estimate_flips(CANNOT_TELL["swapped"][0])
    assert (found.low, found.rate, found.high) == (0.0, 0.5, 0.5)
    np.testing.assert_allclose(found.p_flip, 0.5)


def test_extreme_margins_stay_finite():
    margins = flipped_margins(500, 0.2)
    margins[:4] = [1e6, -1e6, 0.0, 1e-12]
    with np.errstate(all="raise"):
        found = estimate_flips(margins)
    assert found.is_informative
    assert found.rate == pytest.approx(0.2, abs=0.06)


def test_reads_integers_and_float32():
    margins = np.round(flipped_margins(500, 0.2))
    assert estimate_flips(margins.astype(np.int64)).rate == estimate_flips(margins.astype(np.float32)).rate


def test_to_dict_is_json_without_arrays():
    found = estimate_flips(flipped_margins(500, 0.2))
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain == {
        "rate": found.rate,
        "low": found.low,
        "high": found.high,
        "level": 0.9,
        "scale": found.scale,
        "is_informative": True,
        "reason": found.reason,
        "num_pairs": 500,
        "num_trusted": 0,
        "tail": None,
        "annotators": [],
    }


def test_non_finite_margins_are_refused_with_their_positions():
    margins = flipped_margins(100, 0.2)
    margins[[3, 17]] = [np.nan, np.inf]
    with pytest.raises(ValueError, match=r"needs finite margins; got 2 that are not, at positions 3, 17\. Look"):
        estimate_flips(margins)
    margins[:50] = np.nan
    with pytest.raises(ValueError, match=r"got 50 that are not, at positions 0, 1, .*, 9, \.\.\.\. Look"):
        estimate_flips(margins)


@pytest.mark.parametrize("margins", [np.zeros((2, 3)), np.zeros(0), np.float64(1.0)])
def test_wrong_shapes_are_refused(margins):
    with pytest.raises(ValueError, match=r"needs margins of shape \(pairs,\)"):
        estimate_flips(np.asarray(margins))


@pytest.mark.parametrize("level", [0.0, 1.0, 90.0])
def test_level_is_a_probability(level):
    with pytest.raises(ValueError, match=r"needs level in \(0, 1\); got"):
        estimate_flips(FIVE, level=level)


def test_area_under_margin_is_the_mean_over_checks():
    margins_by_check = np.array([[1.0, -2.0, 0.0], [3.0, 2.0, 1.0]])
    np.testing.assert_array_equal(area_under_margin(margins_by_check), [2.0, 0.0, 0.5])
