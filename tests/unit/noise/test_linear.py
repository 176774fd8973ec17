"""Linear models: that they solve what they say, that no label judges itself, and that surface is told apart."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit

from ropo.noise import linear
from ropo.noise.linear import LinearModels

STRENGTH = 3.0


def deal(num_pairs, num_folds=4, deals=2, seed=1):
    rng = np.random.default_rng(seed)
    return np.array([rng.permutation(num_pairs) % num_folds for _ in range(deals)])


def known_truth(num_pairs=300, num_features=20, *, size=3.0, seed=0):
    """Features of pairs of which a direction says which response is better; all labels are right."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(num_pairs, num_features))
    direction = rng.normal(size=num_features)
    value = features @ direction / np.linalg.norm(direction)
    keep = np.sign(np.where(np.abs(value) < 1 / size, value, size * value))
    return features * keep[:, None]


def two_kinds(num_pairs=600, num_features=120, *, gap=3.0, seed=0):
    """Features of which one tells the better response apart by far, and the others nothing; all labels are right."""
    features = np.random.default_rng(seed).normal(size=(num_pairs, num_features))
    features[:, 0] = np.abs(features[:, 0] + gap)
    return features


def flip(features, share, seed=5):
    is_flipped = np.random.default_rng(seed).random(len(features)) < share
    return np.where(is_flipped[:, None], -features, features), is_flipped


def auroc(score, is_flipped):
    """Chance that a flipped pair has the higher score."""
    found, rest = score[is_flipped], score[~is_flipped]
    return float(np.mean(found[:, None] > rest[None, :]) + 0.5 * np.mean(found[:, None] == rest[None, :]))


def held_out(features, folds, **options):
    return LinearModels([features], folds, **options).held_out(strengths=(STRENGTH,))


def direct(features, weights, folds):
    """The same by a solver of another kind, one fold after the other."""
    unit = features / np.sqrt((features**2).sum(axis=1).mean())
    margins = np.zeros(folds.shape)
    for number, fold_of in enumerate(folds):
        for fold in range(folds.max() + 1):
            seen = weights * (fold_of != fold)

            def loss(v, seen=seen):
                h = unit @ v
                value = seen @ np.logaddexp(0, -h) + STRENGTH / 2 * v @ v
                return value, -unit.T @ (seen * expit(-h)) + STRENGTH * v

            fit = minimize(loss, np.zeros(features.shape[1]), jac=True, method="L-BFGS-B", options={"gtol": 1e-9}).x
            margins[number, fold_of == fold] = unit[fold_of == fold] @ fit
    return margins.mean(axis=0)


@pytest.mark.parametrize("num_features", [12, 150])
def test_the_fits_are_those_of_another_solver(num_features):
    features, _ = flip(two_kinds(100, num_features), 0.2)
    weights, folds = np.random.default_rng(2).uniform(0, 1, 100), deal(100)
    found = held_out(features, folds, weights=weights)
    np.testing.assert_allclose(found.margins, direct(features, weights, folds), atol=3e-3)
    assert np.abs(found.margins).max() > 0.3
    assert not found.surface.any()


def test_held_out_likelihood_chooses_the_penalty():
    """Noise wants a strong one, a clear rule a weak one; the loss is that of the margins."""
    rng = np.random.default_rng(0)
    noise = LinearModels([rng.normal(size=(200, 50))], deal(200)).held_out()
    clear = LinearModels([known_truth(200, 5)], deal(200)).held_out()
    assert clear.strengths < noise.strengths
    assert clear.loss < 0.35 < noise.loss
    assert clear.loss == pytest.approx(np.logaddexp(0, -clear.margins).mean(), abs=1e-6)


def test_a_label_has_no_say_in_its_own_margin():
    """The other label, the same size; of the pairs of its fold nothing changes, and of the others all do."""
    features, _ = flip(known_truth(120), 0.2)
    length, folds = np.random.default_rng(3).normal(size=(120, 1)), deal(120, deals=1)
    before = held_out(features, folds, covariates=length)
    turn = np.where(np.arange(120) == 7, -1.0, 1.0)
    after = held_out(turn[:, None] * features, folds, covariates=turn[:, None] * length)
    own = folds[0] == folds[0, 7]
    for name in ("margins", "surface"):
        one, other = getattr(before, name), turn * getattr(after, name)
        np.testing.assert_allclose(other[own], one[own], atol=5e-3)  # all fits stop together, at 1e-3
        assert (np.abs(other - one)[~own] > 5e-3).mean() > 0.4


def test_labels_that_follow_length_are_found():
    """Truth ignores length, and a third of the labels was flipped towards the longer response.

    Length agrees with most labels, so it would be taken for evidence.
    """
    rng = np.random.default_rng(0)
    truth, length = two_kinds(600, 20), rng.normal(size=(600, 1))
    is_flipped = (length[:, 0] < 0) & (rng.random(600) < 0.6)
    turn = np.where(is_flipped, -1.0, 1.0)[:, None]
    features = truth + 4 * length  # every number of it knows length
    assert 0.25 < is_flipped.mean() < 0.35
    found = LinearModels([turn * features], deal(600), covariates=turn * length).held_out()
    alone = LinearModels([turn * length], deal(600)).held_out().margins
    assert (alone > 0).mean() > 0.7
    assert auroc(-found.margins, is_flipped) > 0.98
    assert abs(np.corrcoef(turn[:, 0] * found.margins, length[:, 0])[0, 1]) < 0.15
    assert auroc(-(found.margins + found.surface), is_flipped) < auroc(-found.margins, is_flipped) - 0.05
    assert auroc(-LinearModels([turn * features], deal(600)).held_out().margins, is_flipped) < 0.85


def test_the_unit_of_a_covariate_does_not_matter():
    features, length = known_truth(100), np.random.default_rng(3).normal(size=(100, 1))
    one, other = (held_out(features, deal(100), covariates=unit * length) for unit in (1.0, 1000.0))
    np.testing.assert_allclose(other.margins, one.margins, atol=2e-3)
    np.testing.assert_allclose(other.surface, one.surface, atol=2e-3)


@pytest.mark.parametrize("has_covariate", [False, True])
def test_wide_and_tall_features_give_the_same(has_covariate):
    """Only the products of pairs matter, so a rotation into more dimensions than there are pairs changes nothing."""
    rng = np.random.default_rng(0)
    tall, _ = flip(known_truth(80, 15), 0.2)
    rotation = np.linalg.qr(rng.normal(size=(200, 15)))[0].T
    options = {"covariates": rng.normal(size=(80, 1))} if has_covariate else {}
    one, other = (held_out(features, deal(80), **options) for features in (tall, tall @ rotation))
    np.testing.assert_allclose(other.margins, one.margins, atol=2e-3)
    np.testing.assert_allclose(other.surface, one.surface, atol=2e-3)
    assert np.abs(one.margins).max() > 0.5


def test_many_pairs_are_taken_by_parts(monkeypatch):
    """The last part is shorter than the others."""
    features, _ = flip(two_kinds(100, 12), 0.2)
    whole = held_out(features, deal(100))
    monkeypatch.setattr(linear, "_ROWS", 16)
    np.testing.assert_allclose(held_out(features, deal(100)).margins, whole.margins, atol=1e-4)


def test_on_right_labels_there_is_nothing_to_gain():
    """Ten draws: a filter that asked labels which had a say in it would gain in most of them."""
    gains = []
    for seed in range(10):
        folds = deal(200, seed=seed)
        models = LinearModels([known_truth(200, 100, seed=seed)], folds)
        tried = models.without_suspects(models.held_out(strengths=(STRENGTH,))).of_training
        gains.append(tried.gain)
        assert tried.gain <= tried.error
    assert np.mean(gains) <= 0


def test_without_flipped_pairs_more_is_known():
    features, is_flipped = flip(two_kinds(600, 200, seed=3), 0.2)
    models = LinearModels([features], deal(600))
    judged = models.held_out()
    refit = models.without_suspects(judged)
    assert refit.of_training.gain > refit.of_training.error > 0
    assert refit.of_judges == refit.of_training  # there is one kind
    assert auroc(-refit.held_out.margins, is_flipped) >= auroc(-judged.margins, is_flipped) > 0.95


def two_halves(num_pairs=400, num_features=30, *, seed=0):
    """Two kinds of features that know different things about the same labels, all right; neither knows all."""
    rng = np.random.default_rng(seed)
    kinds = [rng.normal(size=(num_pairs, num_features)) for _ in range(2)]
    sign = np.sign(kinds[0][:, :1] + kinds[1][:, :1])
    return [sign * one for one in kinds]


def test_kinds_that_know_different_things_are_added_up():
    kinds, folds = two_halves(), deal(400)
    together = LinearModels(kinds, folds).held_out()
    alone = [LinearModels([one], folds).held_out() for one in kinds]
    assert together.loss < min(one.loss for one in alone) - 0.1
    assert (together.margins > 0).mean() > max((one.margins > 0).mean() for one in alone) + 0.05
    assert (together.shares > 0.5).all()
    for one, total in zip(alone, together.totals, strict=True):
        np.testing.assert_allclose(total, one.margins, atol=1e-6)
    assert all((one.shares == 1).all() for one in alone)


def test_weights_are_those_of_another_solver():
    """Weighted pairs, and covariates in the margins by which the weights are chosen."""
    rng = np.random.default_rng(1)
    kinds, weights, length = two_halves(200), rng.uniform(0, 1, 200), rng.normal(size=(200, 1))
    found = LinearModels(kinds, deal(200), covariates=length, weights=weights).held_out()

    def loss(shares):
        return np.average(np.logaddexp(0, -(shares @ found.totals)), weights=weights)

    best = minimize(loss, np.ones(2), method="Nelder-Mead", options={"xatol": 1e-6, "fatol": 1e-12}).x
    np.testing.assert_allclose(found.shares, best, rtol=1e-2)
    assert found.loss == pytest.approx(loss(found.shares))
    np.testing.assert_allclose(found.margins + found.surface, found.shares @ found.totals, atol=1e-9)
    assert np.abs(found.surface).max() > 1e-3


def test_a_kind_that_knows_nothing_gets_no_weight():
    """Its margins do not follow the labels, and what is left is what the other says."""
    noise = np.random.default_rng(2).normal(size=(400, 200))
    known = known_truth(400, 10)
    together, alone = (LinearModels(kinds, deal(400)).held_out() for kinds in ([noise, known], [known]))
    assert together.shares[0] * together.totals[0].std() < 0.1 * together.margins.std()
    assert np.corrcoef(together.margins, alone.margins)[0, 1] > 0.99


def test_where_nothing_is_known_one_kind_is_taken_as_it_is():
    """Held-out margins that go against the labels would get weights below 0; none is taken for its opposite."""
    for seed in range(30):
        kinds = [np.random.default_rng(10 * seed + i).normal(size=(100, 40)) for i in range(2)]
        found = LinearModels(kinds, deal(100, seed=seed)).held_out(strengths=(0.3,))
        losses = [np.logaddexp(0, -one).mean() for one in found.totals]
        assert (found.shares >= 0).all()
        if min(losses) > np.log(2) and (found.totals.mean(axis=1) < 0).all():
            assert found.shares[np.argmin(losses)] == 1
            assert found.shares.sum() == 1
            return
    pytest.fail("no draw in which both kinds contradict the labels")


def test_suspects_are_what_all_kinds_together_contradict():
    """One kind knows the labels and the other nothing: the other is fitted without the same pairs."""
    features, is_flipped = flip(two_kinds(600, 200, seed=3), 0.2)
    noise = np.random.default_rng(4).normal(size=(600, 200))
    models = LinearModels([features, noise], deal(600))
    judged = models.held_out()
    refit = models.without_suspects(judged)
    assert refit.of_judges.gain > refit.of_judges.error > 0
    assert np.array_equal(refit.held_out.shares, judged.shares)
    assert auroc(-refit.held_out.margins, is_flipped) >= auroc(-judged.margins, is_flipped) > 0.95


def test_what_a_training_gains_is_asked_of_what_it_works_with():
    """One kind knows the labels so well that flips do not mislead it; the other is misled, and gains without them."""
    rng = np.random.default_rng(5)
    wide = two_kinds(600, 200, seed=3)
    narrow = np.concatenate([np.ones((600, 1)), 0.1 * rng.normal(size=(600, 2))], axis=1)
    flipped = [flip(one, 0.3)[0] for one in (wide, narrow)]
    models = LinearModels(flipped, deal(600))
    judged = models.held_out()
    wins, ties = (models.without_suspects(judged, trained=kind) for kind in (0, 1))
    assert wins.of_training.gain > 2 * wins.of_training.error > 0
    assert not ties.of_training.helps
    assert wins.of_judges == ties.of_judges
    assert not wins.of_judges.helps


def test_a_kind_that_judges_nothing_is_fitted_again_where_a_training_works_with_it():
    wide, narrow = two_kinds(400, 300, seed=3), np.ones((400, 1))
    models = LinearModels([flip(one, 0.3)[0] for one in (wide, narrow)], deal(400))
    judged = replace(models.held_out(), shares=np.array([0.0, 1.0]))
    assert models.without_suspects(judged).of_training.gain > 0
    assert models.without_suspects(judged, trained=1).of_training.gain == 0


def test_a_known_label_is_never_left_out():
    """All known, nothing is left out; one open to doubt and contradicted, it alone is."""
    features, _ = flip(known_truth(200), 0.2)
    folds = deal(200)
    models = LinearModels([features], folds)
    judged = models.held_out(strengths=(STRENGTH,))
    refit = models.without_suspects(judged, is_known=np.ones(200, dtype=bool))
    assert (refit.of_judges.gain, refit.of_judges.error) == (0, 0)
    np.testing.assert_allclose(refit.held_out.margins, judged.margins, atol=2e-3)
    worst = int(np.argmin(judged.margins))
    without = held_out(features, folds, weights=(np.arange(200) != worst).astype(float))
    margins = models.without_suspects(judged, is_known=np.arange(200) != worst).held_out.margins
    np.testing.assert_allclose(margins, without.margins, atol=2e-3)
    assert np.abs(margins - judged.margins).max() > 0.01


def test_a_pair_without_weight_is_judged_and_teaches_nothing():
    features, _ = flip(known_truth(100), 0.2)
    weights, folds = np.where(np.arange(100) < 10, 0.0, 1.0), deal(100)
    kept = held_out(features, folds, weights=weights)
    other = np.where(np.arange(100) < 10, -1.0, 1.0)[:, None] * features
    np.testing.assert_allclose(held_out(other, folds, weights=weights).margins[:10], -kept.margins[:10], atol=2e-3)
    assert np.abs(kept.margins[:10]).min() > 0


@pytest.mark.parametrize(
    "folds", [np.zeros((2, 30), dtype=int), deal(29), deal(30)[0]], ids=["one fold", "other pairs", "no deals"]
)
def test_folds_must_be_those_of_the_pairs(folds):
    with pytest.raises(Exception, match=r"folds of 30 pairs|Type-check error"):
        LinearModels([np.ones((30, 2))], folds).held_out()


def test_a_stronger_penalty_makes_smaller_margins():
    features = known_truth(100)
    sizes = [
        np.abs(LinearModels([features], deal(100)).held_out(strengths=(strength,)).margins).mean()
        for strength in (0.1, 3.0, 100.0)
    ]
    assert all(more > less for more, less in pairwise(sizes))


def test_pairs_that_do_not_differ_are_not_judged():
    """All responses of one length, or features that are all the same: margins of 0, and no warning."""
    zeros = np.zeros((60, 1))
    nothing = LinearModels([zeros], deal(60)).held_out()
    assert not nothing.margins.any()
    assert nothing.loss == pytest.approx(np.log(2))
    features = np.random.default_rng(0).normal(size=(60, 8))
    alike = LinearModels([features], deal(60), covariates=zeros).held_out()
    np.testing.assert_allclose(alike.margins, LinearModels([features], deal(60)).held_out().margins, atol=3e-3)
    assert not alike.surface.any()
