"""The reference cache: what is a hit, what is a miss, and what a killed pass leaves behind."""

import pytest
import torch

from ropo.data.tokenize import tokenize_pairs
from ropo.logps import cache, score
from ropo.logps.cache import reference_hash, reference_logps


@pytest.fixture
def tokens(pairs, tokenizer):
    return tokenize_pairs(pairs, tokenizer, max_length=128).tokens


@pytest.fixture
def computed(monkeypatch):
    """Number of pairs that went through the model in each call."""
    counts = []

    def counting(model, tokens, **options):
        counts.append(len(tokens))
        return score.score_pairs(model, tokens, **options)

    monkeypatch.setattr(cache, "score_pairs", counting)
    return counts


def read(model, tokens, folder, **options):
    return reference_logps(model, tokens, cache_dir=folder, pad_token_id=0, max_length=128, **options)


def test_second_time_costs_nothing(model, tokens, tmp_path, computed):
    first = read(model, tokens, tmp_path)
    second = read(model, tokens, tmp_path)
    assert computed == [20]
    assert torch.equal(first.chosen, second.chosen)
    assert torch.equal(first.rejected, second.rejected)
    assert second.chosen_tokens.tolist() == [len(pair.chosen) for pair in tokens]


def test_appended_rows_are_the_only_new_ones(model, tokens, tmp_path, computed):
    part = read(model, tokens[:15], tmp_path)
    whole = read(model, tokens, tmp_path)
    assert computed == [15, 5]
    assert torch.equal(whole.chosen[:15], part.chosen)


def test_order_does_not_matter(model, tokens, tmp_path, computed):
    forward = read(model, tokens, tmp_path)
    backward = read(model, tokens[::-1], tmp_path)
    assert computed == [20]
    assert torch.equal(backward.chosen.flip(0), forward.chosen)


def test_changed_tokens_or_weights_are_a_miss(model, tokenizer, pairs, tokens, tmp_path, computed):
    read(model, tokens, tmp_path)
    shorter = tokenize_pairs(pairs, tokenizer, max_length=40).tokens
    changed = sum(len(a) != len(b) for a, b in zip(tokens, shorter, strict=True))
    assert changed > 0
    read(model, shorter, tmp_path)
    assert computed == [20, changed]
    with torch.no_grad():
        next(model.parameters())[5, 5] += 1e-3
    read(model, tokens, tmp_path)
    assert computed == [20, changed, 20]


def test_hash_sees_config_and_precision(model):
    plain = reference_hash(model, use_bf16=False)
    assert reference_hash(model, use_bf16=False) == plain
    assert reference_hash(model, use_bf16=True) != plain
    model.config.rms_norm_eps *= 10
    assert reference_hash(model, use_bf16=False) != plain


def test_killed_pass_goes_on(model, tokens, tmp_path, monkeypatch, computed):
    """Every finished shard survives; the next pass computes the rest."""
    monkeypatch.setattr(cache, "_SECONDS_PER_SHARD", -1.0)
    monkeypatch.setitem(score._MAX_TOKENS, "cpu", 200)
    flush = cache._ShardWriter.flush
    written = []

    def flush_then_die(self):
        written.append(len(self._rows))
        flush(self)
        if len(written) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(cache._ShardWriter, "flush", flush_then_die)
    with pytest.raises(KeyboardInterrupt):
        read(model, tokens, tmp_path)
    monkeypatch.setattr(cache._ShardWriter, "flush", flush)
    resumed = read(model, tokens, tmp_path)
    assert computed == [20, 20 - sum(written)]
    monkeypatch.setitem(score._MAX_TOKENS, "cpu", 4096)
    fresh = read(model, tokens, tmp_path / "fresh")
    torch.testing.assert_close(resumed.chosen, fresh.chosen, rtol=1e-5, atol=1e-4)
