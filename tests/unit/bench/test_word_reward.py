"""A reward that looks at words: planted weights are found again, from labels and from pairs."""

import json

import numpy as np
import pytest
from scipy.special import expit

from ropo.pairs import Pair
from ropo_bench.word_reward import WordReward, fit_on_pairs, fit_on_texts, terms

PLANTED = {"superb": 2.0, "fine": 1.0, "plain": 0.0, "dull": -1.0, "awful": -2.0}


def texts(num, *, seed):
    """Each planted word by a coin, with a word between them that never comes twice, so that no two are neighbours."""
    rng = np.random.default_rng(seed)
    return [
        " ".join(f"{word} filler{seed}x{i}x{word}" for word in PLANTED if rng.random() < 0.5) or "nothing"
        for i in range(num)
    ]


def value_of(text):
    return sum(PLANTED.get(word, 0.0) for word in text.split())


def test_terms_are_words_and_neighbours():
    assert terms("It's GOOD, not bad") == {"it's", "good", "not", "bad", "it's good", "good not", "not bad"}
    assert terms([{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}]) == {
        "a", "b", "c", "a b", "b c",
    }  # fmt: skip
    assert terms(" ") == set()


def test_each_term_counts_once_and_the_prompt_never():
    reward = WordReward({"good": 2.0, "good good": 0.5}, bias=-1.0)
    assert reward("", "good") == 1.0
    assert reward("", "good good good") == 1.5
    assert reward("good", "") == -1.0


def test_labels_give_the_planted_weights():
    """8,000 labels drawn with σ(sum + ½): standard errors near 0.06, so 0.3 fails by chance with p < 1e-5."""
    given = texts(8000, seed=0)
    is_positive = np.random.default_rng(1).random(len(given)) < expit([value_of(text) + 0.5 for text in given])
    reward = fit_on_texts(given, is_positive, l2=1.0)
    assert set(reward.weights) == {*PLANTED, "nothing"}  # what came once is left out
    assert {word: reward.weights[word] for word in PLANTED} == pytest.approx(PLANTED, abs=0.3)
    assert reward.bias == pytest.approx(0.5, abs=0.3)


def test_pairs_give_the_planted_weights():
    """8,000 Bradley-Terry labels: tolerance and false alarms as above."""
    first, second = texts(8000, seed=2), texts(8000, seed=3)
    gap = np.array([value_of(a) - value_of(b) for a, b in zip(first, second, strict=True)])
    is_first = np.random.default_rng(4).random(len(gap)) < expit(gap)
    pairs = [
        Pair(prompt="p", chosen=a if better else b, rejected=b if better else a, row=row)
        for row, (a, b, better) in enumerate(zip(first, second, is_first, strict=True))
    ]
    reward = fit_on_pairs(pairs, l2=10.0)
    assert {word: reward.weights[word] for word in PLANTED} == pytest.approx(PLANTED, abs=0.3)
    assert reward.bias == 0.0
    swapped = [Pair(prompt="p", chosen=p.rejected, rejected=p.chosen, row=p.row) for p in pairs]
    assert fit_on_pairs(swapped, l2=10.0).weights["superb"] == pytest.approx(-reward.weights["superb"], abs=1e-2)


def test_the_fit_is_where_the_penalised_loss_is_flat():
    """d/dw [Σ loss + ½·l2·w²] = 0: a weight is the sum of what is left unexplained where its term stands, over l2."""
    given, l2 = ["good", "good", "good", "bad", "bad", "bad good"], 0.7
    labels = np.array([True, True, False, False, False, True])
    reward = fit_on_texts(given, labels, l2=l2, min_count=1)
    rest = labels - expit([reward("", text) for text in given])
    for term, weight in reward.weights.items():
        has_term = np.array([term in terms(text) for text in given])
        assert weight == pytest.approx(rest[has_term].sum() / l2, abs=1e-3)
    assert rest.sum() == pytest.approx(0.0, abs=1e-3)


def test_penalty_shrinks_and_rare_terms_are_left_out():
    given = ["good"] * 30 + ["bad"] * 30 + ["odd good"]
    labels = [True] * 30 + [False] * 30 + [True]
    mild, strong = (fit_on_texts(given, labels, l2=l2) for l2 in (1.0, 100.0))
    assert mild.weights["good"] > 2 * strong.weights["good"] > 0
    assert "odd" not in mild.weights
    assert "odd" in fit_on_texts(given, labels, min_count=1).weights


def test_saved_and_loaded_is_the_same(tmp_path):
    reward = WordReward({"naïve": 0.1 + 0.2, "not good": -1e-17}, bias=1 / 3)
    reward.save(tmp_path / "reward.json")
    assert WordReward.load(tmp_path / "reward.json") == reward
    assert json.loads((tmp_path / "reward.json").read_text("utf-8"))["bias"] == 1 / 3
