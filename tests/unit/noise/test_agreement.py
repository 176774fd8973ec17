"""Two judges and a label: the rate of wrong labels is found where they err independently, and nothing is made up."""

import numpy as np
import pytest

from ropo.noise.agreement import annotators_by_agreement, rate_by_agreement
from ropo.noise.estimate import estimate_flips
from ropo.weighing import raise_by_agreement


def judged(rng, num_pairs, rate, errors):
    """Margins as signs: of each judge, against labels of which a share is wrong."""
    label = np.where(rng.random(num_pairs) < rate, -1.0, 1.0)
    return [label * np.where(rng.random(num_pairs) < error, -1.0, 1.0) for error in errors]


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.3, 0.45])
def test_planted_rates_are_found_and_covered(rate):
    """The mean of many draws is right, and the interval covers as often as it says."""
    found = [rate_by_agreement(*judged(np.random.default_rng(seed), 3000, rate, (0.15, 0.08))) for seed in range(200)]
    rates = np.array([one.rate for one in found])
    assert rates.mean() == pytest.approx(rate, abs=0.004 if rate else 0.008)  # at 0 it cannot err downwards
    disagreement = 0.15 + 0.08 - 2 * 0.15 * 0.08
    assert np.mean([one.disagreement for one in found]) == pytest.approx(disagreement, abs=0.005)
    covered = np.mean([one.low <= rate <= one.high for one in found])
    assert covered >= 0.9 if rate == 0 else 0.84 <= covered <= 0.96


def test_judges_that_err_alike_read_too_high():
    """The documented weakness: it is an upper reading."""
    (margins,) = judged(np.random.default_rng(0), 20_000, 0.1, (0.2,))
    assert rate_by_agreement(margins, margins).rate == pytest.approx(0.1 + 0.2 - 2 * 0.1 * 0.2, abs=0.01)


def test_coins_tell_nothing():
    rng = np.random.default_rng(1)
    coin = np.where(rng.random(1000) < 0.55, -1.0, 1.0)
    assert rate_by_agreement(coin, np.ones(1000)) is None
    assert rate_by_agreement(np.zeros(10), np.ones(10)) is None


def test_shapes_that_differ():
    with pytest.raises(ValueError, match="needs both margins of the same pairs"):
        rate_by_agreement(np.ones(3), np.ones(4))


def two_views(rng, num_pairs, wrong):
    """Margins of a weaker and a better judge of truths of different strength, against labels wrong where `wrong`."""
    strength = rng.gamma(3.0, 1.0, num_pairs)
    label = np.where(wrong(strength, rng), -1.0, 1.0)
    return [label * (strength + rng.normal(0, noise, num_pairs)) for noise in (0.9, 0.7)]


def test_errors_between_close_responses_are_raised_and_flips_at_random_are_not():
    """One judge reads both as doubt; two tell that the near ties of the one are wrong labels."""
    rng = np.random.default_rng(2)
    near = two_views(rng, 6000, lambda strength, rng: rng.random(len(strength)) < 1.1 / (1 + np.exp(0.55 * strength)))
    first = estimate_flips(near[0]).to_dict()
    found = raise_by_agreement(first, *near)
    assert first["high"] < 0.2
    assert found["is_raised"]
    assert found["rate"] == rate_by_agreement(*near).rate > first["high"] + 0.03
    assert found["low"] == first["low"]
    assert f"two judges of different training together contradict {100 * found['rate']:.1f} %" in found["reason"]
    assert found["low"] <= found["rate"] <= found["high"]
    random = two_views(rng, 6000, lambda strength, rng: rng.random(len(strength)) < 0.2)
    first = estimate_flips(random[0]).to_dict()
    found = raise_by_agreement(first, *random)
    assert found == {**first, "is_raised": False}
    assert rate_by_agreement(*random).rate == pytest.approx(0.2, abs=0.02)


def test_judges_that_contradict_each_other_raise_nothing():
    """They share errors: a rule that counts what both contradict would count right labels."""
    rng = np.random.default_rng(3)
    label, shared = (np.where(rng.random(6000) < rate, -1.0, 1.0) for rate in (0.1, 0.12))
    first, second = (label * shared * np.where(rng.random(6000) < error, -1.0, 1.0) for error in (0.14, 0.02))
    both = rate_by_agreement(first, second, level=0.99)
    assert both.low > 0.15
    assert both.disagreement > 0.1
    estimate = {"rate": 0.1, "low": 0.05, "high": 0.15, "reason": ""}
    assert raise_by_agreement(estimate, first, second) == {**estimate, "is_raised": False}


def test_rates_of_annotators_average_to_the_rate_of_two_judges():
    """600 labels of four annotators, as many of each: what the total says, they say together."""
    rng = np.random.default_rng(4)
    margins = two_views(rng, 600, lambda strength, rng: rng.random(len(strength)) < 1.1 / (1 + np.exp(0.55 * strength)))
    names = [f"a{i % 4}" for i in range(600)]
    first = estimate_flips(margins[0], annotators=names).to_dict()
    trial = {"helps": True, "left_out": 0.2, "tried": 0.8, "as_is": 0.7}
    found = raise_by_agreement(first, *margins, trial=trial, annotators=names)
    assert np.mean([one["rate"] for one in found["annotators"]]) == pytest.approx(found["rate"], abs=1e-9)
    assert {one["name"] for one in found["annotators"]} == set(names)
    for one in found["annotators"]:
        assert one["low"] <= min(
            one["rate"], *(two["low"] for two in first["annotators"] if two["name"] == one["name"])
        )
        assert one["high"] > found["rate"]
    assert raise_by_agreement(first, *margins, trial=trial)["annotators"] == []


def test_intervals_of_annotators_by_agreement_cover_as_often_as_they_say():
    """60 data sets of four annotators: of 240 intervals of 90 % more than 36 miss once in 500."""
    rates, missed = np.array([0.15, 0.2, 0.3, 0.35]), 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        who = np.arange(1000) % 4
        label = np.where(rng.random(1000) < rates[who], -1.0, 1.0)
        one, other = (label * np.where(rng.random(1000) < error, -1.0, 1.0) for error in (0.1, 0.05))
        found = annotators_by_agreement(one, other, [str(name) for name in who])
        missed += sum(not one.low <= rates[int(one.name)] <= one.high for one in found)
    assert missed <= 36
