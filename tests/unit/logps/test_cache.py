"""The reference cache: what is a hit, what is a miss, and what a killed pass leaves behind."""

import pytest
import torch

from ropo.config import ROPOConfig
from ropo.data.tokenize import tokenize_pairs
from ropo.logps import cache, score
from ropo.logps.cache import reference_hash, reference_logps
from ropo.trainer import ROPOTrainer


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
    return reference_logps(model, tokens, cache_dir=folder, pad_token_id=0, **options)


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


@pytest.mark.parametrize("how", ["cut", "flipped"])
def test_a_damaged_shard_is_scored_again(how, model, tokens, tmp_path, computed, caplog):
    first = read(model, tokens, tmp_path)
    [path] = tmp_path.rglob("*.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content[:-9] if how == "cut" else content)
    second = read(model, tokens, tmp_path)
    assert computed == [20, 20]
    assert torch.equal(first.rejected, second.rejected)
    assert f"{path} is damaged: it is removed, and its pairs are scored again." in caplog.text
    assert not path.exists()


def test_options_do_not_matter_and_templates_do(model, tokenizer, pairs, tmp_path, computed, monkeypatch):
    """Another learning rate, batch or output folder costs no forward pass; another template or truncation does."""
    rows = [
        {
            "prompt": [{"role": "user", "content": pair.prompt}],
            "chosen": [{"role": "assistant", "content": pair.chosen}],
            "rejected": [{"role": "assistant", "content": pair.rejected}],
        }
        for pair in pairs
    ]

    def make(**options):
        common = {"output_dir": str(tmp_path / "a"), "max_length": 128, "use_cpu": True}
        args = ROPOConfig(**{**common, "reference_cache_dir": str(tmp_path / "cache"), **options})
        return ROPOTrainer(model, args, train_dataset=rows, processing_class=tokenizer)

    make()
    make(learning_rate=1e-2, output_dir=str(tmp_path / "b"), beta=1.0, per_device_train_batch_size=2)
    make(max_tokens_per_batch=100, gradient_accumulation_steps=4, seed=5)
    assert computed == [20]
    shorter = sum(len(pair.chosen) > 3 or len(pair.rejected) > 3 for pair in make().train_dataset.tokens)
    longest = max(len(pair.prompt) for pair in make().train_dataset.tokens)
    make(max_length=longest + 3)
    assert shorter > 0
    assert len(computed) == 2
    monkeypatch.setattr(tokenizer, "chat_template", tokenizer.chat_template.replace("<s>", "<s>the "))
    make()
    assert computed[2:] == [20]


def test_the_attention_that_training_leaves_is_the_same_reference(model, tokens, tmp_path, computed):
    """The first pass gives the model the attention of packed rows; its name must not make it another model."""
    read(model, tokens, tmp_path)
    assert model.config._attn_implementation == "ropo_tree"
    read(model, tokens, tmp_path)
    assert computed == [20]
