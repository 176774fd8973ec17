"""The scoring pass: how much goes through the model at once, and that it makes no difference."""

import pytest
import torch

from ropo.data.tokenize import tokenize_pairs
from ropo.logps import score
from ropo.logps.batch import Batching
from ropo.logps.features import FeatureReader, Sketch
from ropo.logps.score import score_pairs


@pytest.fixture
def tokens(pairs, tokenizer):
    return tokenize_pairs(pairs, tokenizer, max_length=128).tokens


def scored(model, tokens, **options):
    """Log-probabilities of the chosen responses, and the most unique tokens in a batch of several pairs."""
    batches = []
    batching = Batching(pad_token_id=0, **options)
    found = score_pairs(model, tokens, batching, on_batch=lambda rows, _: batches.append(rows))
    sizes = [sum(len(tokens[row[0]]) for row in batch) for batch in batches if len(batch) > 1]
    return found.chosen, max(sizes, default=0)


def test_a_limit_is_kept(model, tokens):
    whole, largest = scored(model, tokens)
    parts, limited = scored(model, tokens, max_tokens=150)
    assert limited <= 150 < largest
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-4)


def test_the_plain_layout_holds_so_many_logits(model, tokens, monkeypatch):
    """A vocabulary of 262,144 would make 40 GB of logits of what a packed batch takes with ease."""
    monkeypatch.setattr(score, "choose_layout", lambda *_, **__: ("plain", "the test says so"))
    whole, largest = scored(model, tokens)
    monkeypatch.setattr(score, "_MAX_LOGITS", 200 * model.config.vocab_size)
    parts, limited = scored(model, tokens)
    assert limited <= 200 < largest
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-4)


class SmallDevice:
    """A forward that only so many unique tokens fit into; notes how many pairs each call has."""

    def __init__(self, monkeypatch, fits):
        self.asked, forward = [], score.FORWARDS["packed"]

        def small(model, batch):
            self.asked.append(len(batch["lengths"]))
            if int(batch["lengths"].sum()) > fits:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return forward(model, batch)

        monkeypatch.setattr(score, "FORWARDS", {"packed": small})


def test_batches_that_do_not_fit_are_halved(model, tokens, monkeypatch):
    """All of them at the first shortage, not each for itself; every pair is scored once, and the numbers stay."""
    size, seen = len(tokens[0]), []
    alike = [tokens[0]] * 14 + [tokens[1]]
    whole, _ = scored(model, alike)
    device = SmallDevice(monkeypatch, fits=2 * max(size, len(tokens[1])))
    found = score_pairs(
        model, alike, Batching(pad_token_id=0, max_tokens=4 * max(size, len(tokens[1]))),
        on_batch=lambda rows, _: seen.extend(row[0] for row in rows),
    )  # fmt: skip
    torch.testing.assert_close(found.chosen, whole, rtol=1e-5, atol=1e-4)
    assert sorted(seen) == list(range(15))
    assert device.asked == [4, 2, 2, 2, 2, 2, 2, 1, 2]


def test_a_pair_that_does_not_fit_is_an_error(model, tokens, monkeypatch):
    SmallDevice(monkeypatch, fits=5)
    longest = max(map(len, tokens))
    with pytest.raises(torch.OutOfMemoryError, match=f"memory .* {longest} tokens.*max_length"):
        scored(model, tokens)


def test_features_of_batches_that_are_halved(model, tokens, monkeypatch):
    """Each pair's once, beside its row, as without the shortage."""
    found, reader = [], FeatureReader(model, Sketch(num_outputs=3, num_inputs=2))
    for fits in (10**6, max(map(len, tokens))):
        device, batches = SmallDevice(monkeypatch, fits=fits), []
        batching = Batching(pad_token_id=0)
        score_pairs(model, tokens, batching, reader=reader, on_batch=lambda *batch, to=batches: to.append(batch))
        rows = torch.tensor([row[0] for rows, _ in batches for row in rows])
        blocks = torch.cat([torch.cat(list(features.values()), dim=1) for _, features in batches])
        assert sorted(rows.tolist()) == list(range(len(tokens)))
        found.append(blocks[rows.argsort()])
    assert len(device.asked) > len(tokens)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
