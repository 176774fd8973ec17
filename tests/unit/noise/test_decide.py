import numpy as np
import pytest
from scipy.optimize import linprog
from scipy.special import expit

from ropo.noise.decide import RULES, decide, num_keep

GOLDEN = np.array([0.3, -2.0, 1.5, -0.1, 4.0, -0.1, 0.9, -3.0, 2.2, 0.0])


def pairs(num_pairs=40, seed=0):
    margins = np.random.default_rng(seed).normal(1.0, 2.0, size=num_pairs)
    return margins, expit(-1.0 - 2 * margins)


def test_lowest_loss_golden_with_a_tie():
    found = decide(GOLDEN, expit(-GOLDEN), rho=0.3)
    assert np.flatnonzero(found.decision == "keep").tolist() == [0, 2, 3, 4, 6, 8, 9]
    assert np.flatnonzero(found.decision == "drop").tolist() == [1, 5, 7]  # 3 and 5 tie: the earlier stays
    np.testing.assert_array_equal(found.weight, (found.decision == "keep").astype(float))


@pytest.mark.parametrize("alpha", [6.0, 14.0])
def test_lowest_loss_solves_the_linear_program(alpha):
    margins, p_flip = pairs()
    loss = 4 * alpha / (1 + alpha) ** 2 * (np.logaddexp(0, -margins) + alpha * expit(-margins))
    best = linprog(loss, A_eq=np.ones((1, 40)), b_eq=[32], bounds=(0, 1))
    np.testing.assert_allclose(decide(margins, p_flip, rho=0.2).weight, best.x, atol=1e-9)


@pytest.mark.parametrize(
    ("num_pairs", "rho", "kept"),
    [(10, 0.3, 7), (100, 0.29, 71), (7, 0.1, 7), (1000, 0.07, 930), (5, 0.5, 3), (1, 0.5, 1), (10, 0.0, 10)],
)
def test_num_keep_is_exact_where_floats_are_not(num_pairs, rho, kept):
    assert num_keep(num_pairs, rho) == kept


@pytest.mark.parametrize("rule", RULES)
def test_rho_zero_keeps_every_pair_whole(rule):
    margins, _ = pairs()
    found = decide(margins, np.ones(40), rho=0.0, rule=rule)
    assert (found.decision == "keep").all()
    assert (found.weight == 1.0).all()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("rho", [0.1, 0.33, 0.5])
def test_permuting_pairs_permutes_decisions(rule, rho):
    margins, p_flip = pairs()
    order = np.random.default_rng(1).permutation(40)
    found = decide(margins, p_flip, rho=rho, rule=rule)
    shuffled = decide(margins[order], p_flip[order], rho=rho, rule=rule)
    np.testing.assert_array_equal(shuffled.decision, found.decision[order])
    np.testing.assert_allclose(shuffled.weight, found.weight[order], atol=1e-12)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("rho", [0.0, 0.1, 0.33, 0.5])
def test_weights_spend_the_budget(rule, rho):
    margins, p_flip = pairs()
    found = decide(margins, p_flip, rho=rho, rule=rule)
    allowance = num_keep(40, rho)
    if rule == "threshold":
        assert allowance <= found.weight.sum() <= 40
    else:
        assert found.weight.sum() == pytest.approx(allowance + np.sum(found.decision == "flip"), abs=1e-9)
    assert ((found.weight >= 0) & (found.weight <= 1)).all()
    np.testing.assert_array_equal(found.weight == 0, found.decision == "drop")
    assert set(found.decision) <= {"keep", "drop", "flip"}


def test_posterior_is_one_minus_p_flip_when_rho_is_its_mean():
    p_flip = np.array([0.0, 0.1, 0.2, 0.9, 0.8])
    np.testing.assert_allclose(decide(np.zeros(5), p_flip, rho=0.4, rule="posterior").weight, 1 - p_flip)


def test_posterior_fills_the_surest_first_and_shares_the_rest_in_proportion():
    p_flip = np.array([0.2, 0.5, 0.9, 0.8])
    found = decide(np.zeros(4), p_flip, rho=0.25, rule="posterior")
    np.testing.assert_allclose(found.weight, [1.0, 1.0, 1 / 3, 2 / 3])
    assert (found.decision == "keep").all()


def test_posterior_with_a_small_budget_scales_all():
    found = decide(np.zeros(4), np.array([0.0, 0.1, 0.2, 0.1]), rho=0.5, rule="posterior")
    np.testing.assert_allclose(found.weight, np.array([1.0, 0.9, 0.8, 0.9]) * 2 / 3.6)


def test_posterior_spreads_what_no_hopeful_pair_can_take():
    found = decide(np.zeros(5), np.array([0.0, 1.0, 1.0, 1.0, 0.0]), rho=0.4, rule="posterior")
    np.testing.assert_allclose(found.weight, [1, 1 / 3, 1 / 3, 1 / 3, 1])


def test_posterior_drops_the_hopeless_alone():
    found = decide(np.zeros(4), np.array([0.0, 1.0, 0.0, 0.5]), rho=0.25, rule="posterior")
    np.testing.assert_allclose(found.weight, [1, 0, 1, 1])
    assert found.decision.tolist() == ["keep", "drop", "keep", "keep"]


def test_threshold_spares_what_is_not_suspicious_and_stops_at_the_budget():
    margins, p_flip = np.array([3.0, -1.0, -2.0, 0.1, -3.0]), np.array([0.0, 0.7, 0.8, 0.3, 0.9])
    assert decide(margins, p_flip, rho=0.4, rule="threshold").decision.tolist() == [
        "keep",
        "keep",
        "drop",
        "keep",
        "drop",
    ]
    assert decide(margins, 0.1 * p_flip, rho=0.5, rule="threshold").weight.sum() == 5


def test_threshold_goes_by_p_flip_where_the_margin_disagrees():
    found = decide(np.array([-1.0, 3.0, 2.0, 1.0]), np.array([0.6, 0.9, 0.1, 0.1]), rho=0.25, rule="threshold")
    assert found.decision.tolist() == ["keep", "drop", "keep", "keep"]


def test_threshold_breaks_ties_by_margin_then_place():
    found = decide(np.array([1.0, -1.0, 1.0, -1.0]), np.full(4, 0.9), rho=0.5, rule="threshold")
    assert found.decision.tolist() == ["keep", "drop", "keep", "drop"]
    found = decide(np.zeros(4), np.full(4, 0.9), rho=0.25, rule="threshold")
    assert found.decision.tolist() == ["keep", "keep", "keep", "drop"]


def test_relabel_flips_the_certain_among_the_dropped():
    margins, p_flip = np.array([3.0, -1.0, -2.0, 0.1, -3.0]), np.array([0.99, 0.7, 0.8, 0.3, 0.97])
    found = decide(margins, p_flip, rho=0.4, rule="relabel")
    assert found.decision.tolist() == ["keep", "keep", "drop", "keep", "flip"]
    assert found.weight.tolist() == [1, 1, 0, 1, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rho": 0.6}, r"needs rho in \[0, 0\.5\]; got 0\.6\. Above one half"),
        ({"rho": float("nan")}, "needs rho in"),
        ({"rho": 0.1, "rule": "lowest_los"}, "Did you mean lowest_loss"),
        ({"rho": 0.1, "rule": "oracle"}, "There are: lowest_loss, posterior, threshold, relabel"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        decide(*pairs(), **options)


def test_wrong_values_are_refused():
    margins, p_flip = pairs()
    with pytest.raises(ValueError, match=r"per margin, 40; got \(39,\)"):
        decide(margins, p_flip[1:], rho=0.1)
    with pytest.raises(ValueError, match=r"\[0, 1\]; got nan at"):
        decide(margins, np.where(np.arange(40) == 4, np.nan, p_flip), rho=0.1)
    with pytest.raises(ValueError, match=r"\[0, 1\]; got 1\.2 at position 0"):
        decide(margins, p_flip * 0 + 1.2, rho=0.1)
    with pytest.raises(ValueError, match=r"finite margins; .* positions 2"):
        decide(np.where(np.arange(40) == 2, np.inf, margins), p_flip, rho=0.1)
