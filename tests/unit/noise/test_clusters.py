"""Copies of a pair are one piece of evidence: data given twice has the estimate and interval of data given once."""

import numpy as np
import pytest

from ropo.noise.calibrate import calibrate
from ropo.noise.estimate import Obstacle, estimate_flips
from ropo.noise.shares import cluster_weights

NUM_PAIRS = 600
RNG = np.random.default_rng(0)
CLEAN = RNG.normal(2.0, 1.0, size=NUM_PAIRS)
MARGINS = np.where(RNG.random(NUM_PAIRS) < 0.2, -CLEAN, CLEAN)
ANNOTATORS = [f"a{i % 3}" for i in range(NUM_PAIRS)]
NAMES = np.array([f"pair {i}" for i in range(NUM_PAIRS)])
TWICE = np.tile(np.arange(NUM_PAIRS), 2)
PARTLY = np.concatenate([np.arange(NUM_PAIRS), np.flatnonzero(MARGINS < 0), np.arange(0, NUM_PAIRS, 5)])
COPIED = pytest.mark.parametrize("rows", [TWICE, PARTLY], ids=["twice", "partly"])


def numbers(found):
    return [value for name in ("rate", "low", "high") for value in [getattr(found, name)]]


def test_a_cluster_weighs_one():
    weights = cluster_weights(["a", "b", "a", "c", "a"], 5)
    np.testing.assert_allclose(weights, [1 / 3, 1, 1 / 3, 1, 1 / 3])
    assert cluster_weights(np.arange(3), 3).tolist() == cluster_weights(None, 3).tolist() == [1.0] * 3
    with pytest.raises(ValueError, match="per pair, 3; got 2"):
        cluster_weights(["a", "b"], 3)


@COPIED
def test_the_estimate_of_copied_data_is_that_of_the_data(rows):
    once = estimate_flips(MARGINS, annotators=ANNOTATORS)
    annotators = [ANNOTATORS[i] for i in rows]
    more = estimate_flips(MARGINS[rows], annotators=annotators, clusters=NAMES[rows])
    assert numbers(more) == pytest.approx(numbers(once), abs=1e-5)
    assert more.scale == pytest.approx(once.scale, rel=1e-5)
    assert [one.name for one in more.annotators] == [one.name for one in once.annotators]
    for one, other in zip(more.annotators, once.annotators, strict=True):
        assert numbers(one) == pytest.approx(numbers(other), abs=1e-3)  # they are looked up on a grid
    np.testing.assert_allclose(more.p_flip, once.p_flip[rows], atol=1e-5)
    assert more.num_pairs == len(rows)
    assert (more.num_labels, more.num_different) == (len(rows), 600)
    blind = estimate_flips(MARGINS[rows], annotators=annotators)
    assert numbers(blind) != pytest.approx(numbers(once), abs=1e-3)


def test_data_given_twice_has_the_interval_of_data_given_once():
    is_trusted = np.arange(NUM_PAIRS) % 10 == 0
    once = estimate_flips(MARGINS, is_trusted=is_trusted)
    more = estimate_flips(MARGINS[TWICE], is_trusted=is_trusted[TWICE], clusters=NAMES[TWICE])
    assert numbers(more) == pytest.approx(numbers(once), abs=1e-7)
    assert estimate_flips(MARGINS[TWICE], is_trusted=is_trusted[TWICE]).high < once.high - 1e-3


def test_clusters_of_one_change_nothing():
    assert estimate_flips(MARGINS, clusters=NAMES) == estimate_flips(MARGINS)


def test_opposite_labels_of_one_pair_are_one_piece_of_evidence():
    rows = np.concatenate([MARGINS, -MARGINS])
    assert estimate_flips(rows, clusters=NAMES[TWICE]).rate == pytest.approx(estimate_flips(rows).rate)
    few = np.tile(MARGINS[:40], 3)
    found = estimate_flips(few, clusters=np.tile(NAMES[:40], 3))
    assert found.obstacle is Obstacle.TOO_FEW
    assert found.num_different == 40
    assert not found.is_informative


def test_labels_of_other_annotators_are_no_copies_of_ones_own():
    """Three labels of each pair by three annotators: each interval is that of their own 600 labels."""
    rows = np.tile(np.arange(NUM_PAIRS), 3)
    rng = np.random.default_rng(1)
    who = np.repeat(["ann", "bob", "cid"], NUM_PAIRS)
    wrong = rng.random(len(rows)) < np.repeat([0.05, 0.1, 0.3], NUM_PAIRS)
    margins = np.where(wrong, -CLEAN[rows], CLEAN[rows])
    found = estimate_flips(margins, annotators=who.tolist(), clusters=NAMES[rows])
    rates = found.annotators
    assert [one.name for one in rates] == ["cid", "bob", "ann"]
    assert {one.num_pairs for one in rates} == {NUM_PAIRS}
    assert rates[0].low < 0.3 < rates[0].high
    assert rates[0].rate > 0.28  # 200 labels would draw it further towards all


@COPIED
def test_calibration_on_copied_data_is_that_on_the_data(rows):
    once = calibrate(MARGINS, estimate_flips(MARGINS), MARGINS <= 0.0, seed=3)
    estimate = estimate_flips(MARGINS[rows], clusters=NAMES[rows])
    more = calibrate(MARGINS[rows], estimate, MARGINS[rows] <= 0.0, seed=3, clusters=NAMES[rows])
    assert (more.num_injected, more.num_turned) == (once.num_injected, once.num_turned) == (60, NUM_PAIRS)
    assert (more.share_found, more.share_others) == pytest.approx((once.share_found, once.share_others), abs=1e-9)
    assert more.recall_range == pytest.approx(once.recall_range, abs=1e-4)
    assert more.precision_range == pytest.approx(once.precision_range, abs=1e-4)
    assert [one.num_pairs for one in more.bins] == [one.num_pairs for one in once.bins]
    assert [one.observed for one in more.bins] == pytest.approx([one.observed for one in once.bins])


def test_names_for_other_pairs_are_refused():
    with pytest.raises(ValueError, match="per margin, 600; got 3"):
        estimate_flips(MARGINS, clusters=["a", "b", "c"])
