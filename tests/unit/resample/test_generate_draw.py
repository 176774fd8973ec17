"""Tokens are drawn with the right probabilities, and from the noise they are given alone."""

import pytest
import torch
from scipy.stats import chisquare

from ropo.sampling import draw
from ropo.sampling.draw import choose_tokens, draw_noise

LOGITS = torch.tensor([1.2, -0.3, 0.4, 2.0, -1.5, 0.0, 0.9, -0.8])


def choose(logits, noise, temperature=1.0, top_p=1.0):
    return choose_tokens(logits, noise, temperature=temperature, top_p=top_p)


def counts(num=50_000, **options):
    noise = draw_noise(7, num_candidates=num, max_new_tokens=1)[:, 0]
    return torch.bincount(choose(LOGITS.expand(num, -1), noise, **options), minlength=len(LOGITS))


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.6])
def test_distribution(temperature):
    """Chi-square with 7 degrees of freedom against softmax: a false alarm once in 10,000 seeds; the seed is fixed."""
    expected = (LOGITS / temperature).softmax(0).double()
    found = counts(temperature=temperature)
    assert chisquare(found.numpy(), (expected * found.sum() / expected.sum()).numpy()).pvalue > 1e-4


def test_the_test_of_the_distribution_notices():
    """The same counts against a temperature that is 4 % off."""
    expected = (LOGITS / 1.04).softmax(0).double()
    found = counts()
    assert chisquare(found.numpy(), (expected * found.sum() / expected.sum()).numpy()).pvalue < 1e-4


def test_nucleus():
    """The first three of the falling probabilities reach 0.75; they keep their proportions (false alarms as above)."""
    probs = LOGITS.softmax(0)
    kept = probs.argsort(descending=True)[:3]
    assert probs[kept[:2]].sum() < 0.75 < probs[kept].sum()
    found = counts(top_p=0.75)
    assert found.sum() == found[kept].sum()
    expected = (probs[kept] / probs[kept].sum()).double()
    expected = expected / expected.sum() * found.sum()
    assert chisquare(found[kept].numpy(), expected.numpy()).pvalue > 1e-4


@pytest.mark.parametrize(
    ("top_p", "num_kept"),
    [
        (1e-300, 1),
        (1e-10, 1),
        (0.001, 1),
        (0.499, 1),
        (0.501, 2),
        (0.749, 2),
        (0.751, 3),
        (0.874, 3),
        (0.876, 4),
        (1.0, 4),
    ],
)
def test_nucleus_ends_where_it_reaches_top_p(top_p, num_kept):
    """Of 1/2, 1/4, 1/8, 1/8; the greatest noise draws the last token that is kept, the least one the likeliest."""
    logits = torch.tensor([[1 / 2, 1 / 4, 1 / 8, 1 / 8]]).log().repeat(2, 1)
    logits[:, 3] -= 1e-5  # so that the order of the last two is known
    found = choose(logits, torch.tensor([0, 2**30 - 1], dtype=torch.int32), top_p=top_p)
    assert found.tolist() == [0, num_kept - 1]


def test_nucleus_keeps_the_likeliest_token():
    assert counts(top_p=1e-6)[3] == 50_000


def test_nucleus_beyond_the_promising_tokens(monkeypatch):
    """Looking at a few likely tokens first gives what sorting all of them gives, whether they suffice or not."""
    logits = torch.randn(400, 50) * torch.linspace(0.5, 6, 400)[:, None]
    noise = draw_noise(1, num_candidates=400, max_new_tokens=1)[:, 0]
    for top_p in (0.3, 0.9, 0.999):
        found = []
        for promising in (4, 50):
            monkeypatch.setattr(draw, "_PROMISING", promising)
            found.append(choose(logits, noise, top_p=top_p))
        assert torch.equal(*found)


def test_ends_of_the_noise():
    """The least noise draws the first possible token and the greatest the last one, never an impossible one."""
    logits = torch.tensor([[-torch.inf, 0.0, 1.0, 0.5, -torch.inf]] * 2)
    assert choose(logits, torch.tensor([0, 2**30 - 1], dtype=torch.int32)).tolist() == [1, 3]
    assert choose(logits, torch.tensor([0, 2**30 - 1], dtype=torch.int32), top_p=0.6).tolist() == [2, 3]


def test_cold_is_greedy():
    logits = torch.randn(64, 300)
    noise = draw_noise(3, num_candidates=64, max_new_tokens=1)[:, 0]
    assert torch.equal(choose(logits, noise, temperature=1e-4), logits.argmax(1))


def test_pieces_change_nothing(monkeypatch):
    logits, noise = torch.randn(10, 32), draw_noise(3, num_candidates=10, max_new_tokens=1)[:, 0]
    whole = choose(logits, noise)
    monkeypatch.setattr(draw, "_MAX_LOGITS", 96)
    assert torch.equal(choose(logits, noise), whole)


@pytest.mark.parametrize("top_p", [1.0, 0.9])
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_told(broken, top_p):
    logits = torch.randn(3, 8)
    logits[1, 5] = broken
    assert (choose(logits, torch.zeros(3, dtype=torch.int32), top_p=top_p) < 0).tolist() == [False, True, False]


def test_noise_belongs_to_the_seed():
    before = torch.random.get_rng_state()
    noise = draw_noise(2**60 + 1, num_candidates=3, max_new_tokens=5)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(noise, draw_noise(2**60 + 1, num_candidates=3, max_new_tokens=5))
    assert not torch.equal(noise, draw_noise(2**60 + 2, num_candidates=3, max_new_tokens=5))
    assert 0 <= noise.min() <= noise.max() < 2**30
