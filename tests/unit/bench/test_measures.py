"""Measures against values worked out by hand."""

import math

import numpy as np
import pytest

from ropo.evaluate.measures import auroc, average_precision, mean_of, precision_recall, share_of
from ropo_bench import toy
from ropo_bench.policy_score import score_policy
from ropo_bench.task import GoldStandard, each


def test_auroc_counts_ties_half():
    assert auroc([3.0, 2.0, 2.0, 1.0], [True, True, False, False]) == pytest.approx((1 + 1 + 0.5 + 1) / 4)
    assert auroc([1.0, 2.0], [True, False]) == 0.0
    assert math.isnan(auroc([1.0, 2.0], [False, False]))


def test_average_precision():
    assert average_precision([4.0, 3.0, 2.0, 1.0], [True, False, True, False]) == pytest.approx((1 + 2 / 3) / 2)


def test_precision_recall():
    assert precision_recall([True, False, True, True], [True, True, False, False]) == pytest.approx((1 / 3, 1 / 2))
    assert math.isnan(precision_recall([False], [True])[0])


def test_intervals_cover():
    """90 % intervals cover the truth in 90 % of 400 draws: p < 0.001 outside 0.85 to 0.94."""
    rng = np.random.default_rng(0)
    means = [mean_of(rng.normal(2.0, 3.0, size=60)) for _ in range(400)]
    shares = [share_of(rng.random(60) < 0.8) for _ in range(400)]
    for found, truth in ((means, 2.0), (shares, 0.8)):
        assert 0.85 <= np.mean([mean.low <= truth <= mean.high for mean in found]) <= 0.95


def test_share_stays_inside():
    found = share_of([1, 1, 1, 0.5])
    assert 0 < found.low < found.value < found.high <= 1


def test_a_tokenizer_without_a_pad_token_is_scored():
    """Base models of the hub have none."""
    tokenizer = toy.make_tokenizer()
    model, pairs = toy.make_model(tokenizer), toy.make_pairs(8, seed=1)
    gold = GoldStandard(pairs=pairs, rewards=each(toy.gold_reward), max_length=128, max_new_tokens=4)
    scores = []
    for pad_token in (tokenizer.pad_token, None):
        tokenizer.pad_token = pad_token
        scores.append(score_policy(model, model, tokenizer, gold, num_samples=4))
    assert scores[0].accuracy == scores[1].accuracy


def test_a_mean_of_nothing_is_not_a_number():
    """A policy of which no sample ever ends has no distance."""
    found = mean_of([])
    assert np.isnan(found.value)
    assert found.count == 0


def test_a_sample_without_a_verdict_has_no_part_in_the_gold_reward():
    """Nor is it as good as the best response, which a reward of 0 would say."""
    tokenizer = toy.make_tokenizer()
    model, pairs = toy.make_model(tokenizer), toy.make_pairs(8, seed=1)
    rewards = [-2.0, np.nan, -4.0, np.nan]
    gold = GoldStandard(pairs=pairs, rewards=lambda *_: rewards, max_length=128, max_new_tokens=4)
    found = score_policy(model, model, tokenizer, gold, num_samples=4)
    assert (found.gold.value, found.gold.count) == (-3.0, 2)
