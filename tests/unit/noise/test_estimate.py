import json

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit
from scipy.stats import beta, chi2, t

from ropo.noise.estimate import FlipEstimate, Obstacle, _bound, estimate_flips
from ropo.noise.likelihood import Labelled, Link, ProfileLikelihood


def flipped_margins(num_pairs, rate, seed=0):
    rng = np.random.default_rng(seed)
    clean = rng.normal(2.0, 1.5, size=num_pairs)
    return np.where(rng.random(num_pairs) < rate, -clean, clean)


def logistic(margins):
    """The profile of one link, without those that widen the interval."""
    ones = np.ones(len(margins))
    sample = Labelled(margins=margins, weights=ones, is_trusted=ones == 0, is_vouched=ones == 0, reviews=0 * ones)
    return ProfileLikelihood(Link(), sample)


def test_rate_scale_and_interval_are_those_of_the_plain_likelihood():
    margins = flipped_margins(600, 0.2, seed=3)
    fit, drop = logistic(margins), chi2.ppf(0.8, df=1) / 2
    rates, scales = np.linspace(0, 0.5, 501), np.geomspace(0.3, 5, 120)
    p_right = expit(scales[:, None] * margins)
    profile = np.array([np.log(p_right + rate * (1 - 2 * p_right)).sum(axis=1).max() for rate in rates])
    inside = rates[profile >= profile.max() - drop]
    assert fit.best.rate == pytest.approx(rates[profile.argmax()], abs=0.002)
    assert fit.interval(drop) == pytest.approx((inside[0], inside[-1]), abs=0.002)
    at_best = np.log(p_right + fit.best.rate * (1 - 2 * p_right)).sum(axis=1)
    assert fit.best.scale == pytest.approx(scales[at_best.argmax()], rel=0.02)


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
    best = logistic(margins).best
    exact = climb(plain_loss(margins), [0.25, 0.0])
    assert (best.rate, np.log(best.scale)) == pytest.approx(tuple(exact.x), abs=5e-5)


def test_the_higher_of_two_hills_is_found():
    """A third of the margins tiny but as right as the others: only signs count, which a climber from T = 1 misses."""
    margins = flipped_margins(3000, 0.2, seed=4)
    margins[::3] *= np.geomspace(1e-9, 1.0, 1000)
    loss = plain_loss(margins)
    nearby = climb(loss, [0.25, 0.0])
    best = logistic(margins).best
    assert loss([best.rate, np.log(best.scale)]) < nearby.fun - 10
    assert best.rate == pytest.approx(climb(loss, [0.25, 5.6]).x[0], abs=0.01)


def test_p_flip_is_the_posterior():
    margins = flipped_margins(500, 0.2)
    found = estimate_flips(margins)
    right, wrong = found.link.p_right(found.scale, margins), found.link.p_right(found.scale, -margins)
    posterior = found.rate * wrong / ((1 - found.rate) * right + found.rate * wrong)
    np.testing.assert_allclose(found.p_flip, posterior, rtol=1e-9)
    assert found.p_flip.mean() == pytest.approx(found.rate, abs=1e-6)  # where the likelihood is flat in the rate


def test_order_does_not_matter():
    margins = flipped_margins(1000, 0.2)
    order = np.random.default_rng(1).permutation(1000)
    found, shuffled = estimate_flips(margins), estimate_flips(margins[order])
    assert shuffled.rate == pytest.approx(found.rate, abs=1e-6)
    np.testing.assert_allclose(shuffled.p_flip, found.p_flip[order], atol=1e-6)


def test_duplicating_the_data_keeps_the_rate_and_narrows_the_interval():
    margins = flipped_margins(700, 0.2)
    once, more = logistic(margins), logistic(np.tile(margins, 2))
    assert more.best.rate == pytest.approx(once.best.rate, abs=1e-6)
    (low, high), (low_of_more, high_of_more) = once.interval(1.35), more.interval(1.35)
    assert low < low_of_more < more.best.rate < high_of_more < high


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
FALLING = RNG.uniform(0.0, 3.0, size=1500)
CANNOT_TELL = {
    "pure noise": (RNG.normal(size=2000), Obstacle.NO_SIGNAL),
    "nothing learned": (np.zeros(500), Obstacle.ONE_SIZE),
    "constant": (np.full(500, 3.0), Obstacle.ONE_SIZE),
    "constant but flipped": (np.where(RNG.random(500) < 0.3, -3.0, 3.0), Obstacle.ONE_SIZE),
    "weak": (RNG.normal(0.06, 1.0, size=10_000), Obstacle.WIDE),
    "swapped": (-RNG.normal(2.0, 1.0, size=1000), Obstacle.REVERSED),
    "few": (RNG.normal(2.0, 1.0, size=20), Obstacle.TOO_FEW),
    "heavy": (1.0 + RNG.standard_t(2, size=1500), Obstacle.HEAVY_TAILS),
    "falling": (np.where(RNG.random(1500) < np.where(FALLING > 2.0, 0.35, 0.1), -FALLING, FALLING), Obstacle.MISFIT),
}


@pytest.mark.parametrize("case", CANNOT_TELL)
def test_says_when_it_cannot_tell(case):
    margins, obstacle = CANNOT_TELL[case]
    found = estimate_flips(margins)
    assert found.obstacle is obstacle
    assert not found.is_informative
    assert 0.0 == found.low <= found.rate <= found.high <= 0.5
    assert np.isfinite(found.p_flip).all()


def test_the_bound_is_the_least_over_sets_of_the_largest_margins():
    """64 pairs of size 2 with 4 contradicted, among 64 of size 1 with 32: Clopper-Pearson at 5 % / 5 sets."""
    margins = np.concatenate([np.where(np.arange(64) < 4, -2.0, 2.0), np.where(np.arange(64) < 32, -1.0, 1.0)])
    limits = [beta.ppf(0.99, k + 1, n - k) for k, n in ((36, 128), (4, 64), (4, 32), (4, 16), (4, 8))]
    assert _bound(margins, np.ones(128), 0.9) == pytest.approx(min(limits))
    assert _bound(np.tile(margins, 2), np.full(256, 0.5), 0.9) == pytest.approx(min(limits), abs=0.1)
    assert _bound(np.zeros(500), np.ones(500), 0.9) == 0.5


def test_errors_that_depend_on_a_covariate_are_seen_with_it():
    """Long responses have margins as large as short ones, but half of the errors: invisible in the margins alone."""
    rng = np.random.default_rng(8)
    is_long = rng.random(3000) < 0.5
    size = np.abs(rng.normal(0.0, 2.5, size=3000))
    margins = np.where(rng.random(3000) < expit(np.where(is_long, 0.4, 1.8) * size), size, -size)
    blind = estimate_flips(margins, covariate=rng.normal(size=3000))
    assert blind.is_informative
    assert estimate_flips(margins, covariate=is_long + rng.random(3000)).obstacle is Obstacle.MISFIT
    with pytest.raises(ValueError, match="needs a finite covariate"):
        estimate_flips(margins, covariate=np.full(3000, np.nan))


def test_a_link_of_heavy_tails_is_that_of_two_mirrored_densities():
    centre, spread, nu, margins = 1.3, 0.7, 5.0, np.linspace(-9, 9, 37)
    peak = spread * np.sqrt(nu + (centre / spread) ** 2)
    scale = 2 * (nu + 1) / peak * (centre / spread) / np.sqrt(nu + (centre / spread) ** 2)
    right, wrong = t.pdf((margins - centre) / spread, nu), t.pdf((margins + centre) / spread, nu)
    link = Link(tail=nu, peak=peak)
    np.testing.assert_allclose(link.p_right(scale, margins), right / (right + wrong), rtol=1e-9)
    assert link.p_right(scale, np.array([peak])) > link.p_right(scale, np.array([1.2 * peak]))


def test_without_signal_no_rate_is_named():
    found = estimate_flips(CANNOT_TELL["swapped"][0])
    assert (found.low, found.rate, found.high) == (0.0, 0.5, 0.5)
    np.testing.assert_allclose(found.p_flip, 0.5)


def test_extreme_margins_stay_finite():
    margins = flipped_margins(500, 0.2)
    margins[:4] = [1e6, -1e6, 0.0, 1e-12]
    with np.errstate(all="raise"):
        found = estimate_flips(margins)
    assert found.obstacle is Obstacle.HEAVY_TAILS
    assert 0.2 < found.high < 0.35


def test_reads_integers_and_float32():
    margins = np.round(flipped_margins(500, 0.2))
    assert estimate_flips(margins.astype(np.int64)).rate == estimate_flips(margins.astype(np.float32)).rate


@pytest.mark.parametrize("case", ["few", "heavy", None])
def test_an_estimate_is_read_back_from_json_without_what_it_says_of_single_pairs(case):
    margins = flipped_margins(500, 0.2) if case is None else CANNOT_TELL[case][0]
    found = estimate_flips(margins, annotators=["a", "b"] * (len(margins) // 2))
    read = FlipEstimate.from_json(json.loads(json.dumps({**found.to_json(), "another": 1})))
    assert read == found
    assert read.obstacle is (None if case is None else CANNOT_TELL[case][1])
    assert len(found.p_flip) == len(margins)
    assert not len(read.p_flip)


def test_trusted_pairs_are_no_labels_of_an_annotator():
    """Even where they name one: they are no part of the data, so no rate may fall by them."""
    margins, names = flipped_margins(1000, 0.3), ["a", "b"] * 500
    right = np.abs(flipped_margins(200, 0.0, seed=1))
    rates = []
    for of_trusted in ("a", "nobody"):
        found = estimate_flips(
            np.concatenate([margins, right]), annotators=[*names, *200 * [of_trusted]],
            is_trusted=np.arange(1200) >= 1000,
        )  # fmt: skip
        rates.append(found.annotators)
    assert rates[0] == rates[1]
    assert [one.num_pairs for one in rates[0]] == [500, 500]


def test_non_finite_margins_are_refused_with_their_positions():
    margins = flipped_margins(100, 0.2)
    margins[[3, 17]] = [np.nan, np.inf]
    with pytest.raises(ValueError, match=r"finite margins; .* 2 .* positions 3, 17\."):
        estimate_flips(margins)
    margins[:50] = np.nan
    with pytest.raises(ValueError, match=r"got 50 .* positions 0, 1, .*, 9, \.\.\.\."):
        estimate_flips(margins)


@pytest.mark.parametrize("margins", [np.zeros((2, 3)), np.zeros(0), np.float64(1.0)])
def test_wrong_shapes_are_refused(margins):
    with pytest.raises(ValueError, match=r"of shape \(pairs,\)"):
        estimate_flips(np.asarray(margins))


@pytest.mark.parametrize("level", [0.0, 1.0, 90.0])
def test_level_is_a_probability(level):
    with pytest.raises(ValueError, match=r"level in \(0, 1\); got"):
        estimate_flips(np.ones(5), level=level)
