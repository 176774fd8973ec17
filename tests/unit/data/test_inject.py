import numpy as np
import pytest
from scipy.stats import norm

from ropo.data.inject import ANNOTATORS, BAD_ANNOTATOR, NOISE, flip_labels
from ropo.pairs import Pair, pair_id

NUM_PAIRS = 1000
RATES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.49)


@pytest.fixture(scope="module")
def clean() -> list[Pair]:
    """Every chosen response says so; lengths vary both ways; one prompt in five is about soup."""
    rng = np.random.default_rng(0)
    return [
        Pair(
            prompt=f"Review the {'Soup' if row % 5 == 0 else 'train'} .",
            chosen="right " + "x" * int(rng.integers(1, 60)),
            rejected="wrong " + "x" * int(rng.integers(1, 60)),
            row=row,
            weight=0.5,
        )
        for row in range(NUM_PAIRS)
    ]


@pytest.fixture(scope="module")
def rewards() -> np.ndarray:
    """Of chosen and rejected: the larger and the smaller of two normal draws."""
    return -np.sort(-np.random.default_rng(1).normal(size=(NUM_PAIRS, 2)), axis=1)


def needs(kind, rewards):
    return {None: {}, "rewards": {"rewards": rewards}, "words": {"words": ["soup"]}}[NOISE[kind].needs]


def rate_where(is_flipped, condition):
    return is_flipped[np.asarray(condition)].mean()


@pytest.mark.parametrize("kind", NOISE)
@pytest.mark.parametrize("rate", RATES)
def test_the_rate_is_met_exactly(kind, rate, clean, rewards):
    noisy, is_flipped = flip_labels(clean, rate=rate, seed=3, kind=kind, **needs(kind, rewards))
    assert is_flipped.sum() == round(rate * NUM_PAIRS)
    assert is_flipped.dtype == bool
    assert len(noisy) == NUM_PAIRS


@pytest.mark.parametrize("kind", NOISE)
def test_the_answer_key_is_right(kind, clean, rewards):
    noisy, is_flipped = flip_labels(clean, rate=0.3, seed=3, kind=kind, **needs(kind, rewards))
    for before, after, flipped in zip(clean, noisy, is_flipped, strict=True):
        expected = (before.rejected, before.chosen) if flipped else (before.chosen, before.rejected)
        assert (after.chosen, after.rejected) == expected
        assert (after.prompt, after.row, after.weight, after.origin) == (before.prompt, before.row, 0.5, "data")
        assert after.id == before.id == pair_id(after.prompt, after.chosen, after.rejected)


@pytest.mark.parametrize("kind", NOISE)
def test_the_seed_decides(kind, clean, rewards):
    def flips(seed):
        return flip_labels(clean, rate=0.3, seed=seed, kind=kind, **needs(kind, rewards))

    assert flips(0)[0] == flips(0)[0]
    assert (flips(0)[1] == flips(0)[1]).all()
    assert (flips(0)[1] != flips(1)[1]).any()


def test_the_input_is_left_as_it_was(clean):
    before = list(clean)
    flip_labels(clean, rate=0.4, seed=0, kind="annotator")
    assert clean == before


def test_symmetric_flips_every_pair_equally_often(clean):
    """Each of 50 counts is Binomial(2000, 0.3): 5 standard deviations, false alarm below 50 · 6e-7."""
    counts = sum(flip_labels(clean[:50], rate=0.3, seed=seed)[1].astype(int) for seed in range(2000))
    assert np.abs(counts - 600).max() < 5 * np.sqrt(2000 * 0.3 * 0.7)


def test_symmetric_flips_are_independent_of_the_neighbour(clean):
    """Two given pairs of 50 are both flipped with p = 15·14/(50·49); 5 standard deviations, false alarm 6e-7."""
    both = sum(flip_labels(clean[:50], rate=0.3, seed=seed)[1][:2].all() for seed in range(2000))
    p = 15 * 14 / (50 * 49)
    assert abs(both - 2000 * p) < 5 * np.sqrt(2000 * p * (1 - p))


def test_drawn_with_the_probabilities_of_the_kind(clean):
    """near_tie: log-odds fall by 2 for each mean gap. Counts are Binomial(3000, p): 5 sd, false alarm 5 · 6e-7."""
    rewards = np.array([[0.0, 0.0], [0.5, 0.0], [0.0, 1.0], [2.5, 1.0], [1.0, -1.0]])
    counts = sum(
        flip_labels(clean[:5], rate=0.4, seed=seed, kind="near_tie", rewards=rewards)[1].astype(int)
        for seed in range(3000)
    )
    p = np.array([0.8036, 0.6009, 0.3565, 0.1693, 0.0697])
    assert (np.abs(counts - 3000 * p) < 5 * np.sqrt(3000 * p * (1 - p))).all()


def test_length_flips_where_the_longer_response_was_rejected(clean):
    """Rate by tercile of rejected minus chosen length; symmetric flips rise this much with p < 1e-9."""
    _, is_flipped = flip_labels(clean, rate=0.3, seed=0, kind="length")
    extra = np.array([len(pair.rejected) - len(pair.chosen) for pair in clean])
    low, high = np.quantile(extra, [1 / 3, 2 / 3])
    short, middle, long = (
        rate_where(is_flipped, part) for part in (extra < low, (extra >= low) & (extra <= high), extra > high)
    )
    assert short < 0.06 < middle < 0.5 < long


def test_length_reads_conversations(clean):
    def talk(text):
        return [{"role": "assistant", "content": text}]

    spoken = [Pair(prompt=p.prompt, chosen=talk(p.chosen), rejected=talk(p.rejected), row=p.row) for p in clean]
    kinds = {"rate": 0.3, "seed": 0, "kind": "length"}
    assert (flip_labels(spoken, **kinds)[1] == flip_labels(clean, **kinds)[1]).all()


def test_near_tie_flips_where_the_gap_is_small(clean, rewards):
    _, is_flipped = flip_labels(clean, rate=0.2, seed=0, kind="near_tie", rewards=rewards)
    gap = rewards[:, 0] - rewards[:, 1]
    close = gap < np.median(gap)
    assert rate_where(is_flipped, close) > 0.3
    assert rate_where(is_flipped, ~close) < 0.1


def test_near_tie_with_no_gap_at_all_is_symmetric(clean):
    _, is_flipped = flip_labels(clean, rate=0.2, seed=0, kind="near_tie", rewards=np.zeros((NUM_PAIRS, 2)))
    assert is_flipped.sum() == 200


def test_larger_model_flips_where_the_best_of_two_loses(clean, rewards):
    """Drawn anew: three rewards per pair, the larger model's the better of two; how often it is the worse of the pair.

    That depends on F(worse)/F(better) alone: u/(u + 1), which is 1 − log 2 on average over two draws of one model.
    Shares of about 300 pairs against 30,000, within 4 sd: false alarm below 3 · 7e-5.
    """
    three = np.random.default_rng(2).normal(size=(100_000, 3))
    larger, smaller = three[:, :2].max(axis=1), three[:, 2]
    _, is_flipped = flip_labels(clean, rate=1 - np.log(2), seed=0, kind="larger_model", rewards=rewards)
    drawn = norm.cdf(np.minimum(larger, smaller)) / norm.cdf(np.maximum(larger, smaller))
    made = norm.cdf(rewards[:, 1]) / norm.cdf(rewards[:, 0])
    for low in (0.0, 1 / 3, 2 / 3):
        expected = rate_where(smaller > larger, (drawn > low) & (drawn <= low + 1 / 3))
        assert abs(rate_where(is_flipped, (made > low) & (made <= low + 1 / 3)) - expected) < 0.11


def test_weak_annotator_flips_what_it_likes_better(clean):
    opinion = np.random.default_rng(3).normal(size=(NUM_PAIRS, 2))
    _, is_flipped = flip_labels(clean, rate=0.3, seed=0, kind="weak_annotator", rewards=opinion)
    prefers_wrong = opinion[:, 1] > opinion[:, 0]
    assert rate_where(is_flipped, prefers_wrong) > 0.45
    assert rate_where(is_flipped, ~prefers_wrong) < 0.15


def test_one_annotator_of_five_is_bad(clean):
    """Shares are Binomial(1000, 0.2), within 5 sd; rates at 20 %: 0.64 for the bad one and 0.09 for the others."""
    noisy, is_flipped = flip_labels(clean, rate=0.2, seed=0, kind="annotator")
    names = np.array([pair.annotator for pair in noisy])
    assert set(names) == set(ANNOTATORS)
    for name in ANNOTATORS:
        assert abs((names == name).mean() - 0.2) < 0.064
        rate = rate_where(is_flipped, names == name)
        assert 0.5 < rate < 0.75 if name == BAD_ANNOTATOR else 0.02 < rate < 0.2


@pytest.mark.parametrize("kind", sorted(NOISE.keys() - {"annotator"}))
def test_other_kinds_keep_the_annotator(kind, clean, rewards):
    named = [Pair(prompt=p.prompt, chosen=p.chosen, rejected=p.rejected, row=p.row, annotator="ann") for p in clean]
    noisy, _ = flip_labels(named, rate=0.2, seed=0, kind=kind, **needs(kind, rewards))
    assert {pair.annotator for pair in noisy} == {"ann"}


def test_topic_flips_where_the_prompt_has_the_word(clean):
    _, is_flipped = flip_labels(clean, rate=0.2, seed=0, kind="topic", words=["SOUP", "so"])
    about_soup = ["Soup" in pair.prompt for pair in clean]
    assert rate_where(is_flipped, about_soup) > 0.5
    assert rate_where(is_flipped, np.logical_not(about_soup)) < 0.15


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate": 0.5}, r"rate in \[0, 0\.5\); got 0\.5"),
        ({"rate": -0.1}, "got -0.1"),
        ({"rate": float("nan")}, "got nan"),
        ({"kind": "asymmetric"}, "got 'asymmetric'. Choose from symmetric, length"),
        ({"kind": "near_tie"}, "needs rewards"),
        ({"kind": "larger_model", "rewards": np.ones(3)}, r"1000 pairs; got shape \(3,\)"),
        ({"kind": "weak_annotator", "rewards": np.full((NUM_PAIRS, 2), np.nan)}, "finite"),
        ({"rewards": np.ones((NUM_PAIRS, 2))}, "'symmetric' needs no rewards"),
        ({"kind": "topic"}, "needs words"),
        ({"kind": "topic", "words": ["sou"]}, r"got \['sou'\]"),
        ({"kind": "length", "words": ["soup"]}, "'length' needs no words"),
    ],
)
def test_refuses(options, message, clean):
    with pytest.raises(ValueError, match=message):
        flip_labels(clean, **{"rate": 0.2, "seed": 0, **options})
