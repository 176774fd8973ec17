"""The reference cache: what is a hit, what is a miss, and what a killed pass leaves behind."""

import os
import resource
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ropo.config import ROPOConfig
from ropo.data.tokenize import tokenize_pairs
from ropo.logps import cache, score
from ropo.logps.batch import Batching
from ropo.logps.cache import reference_features, reference_hash, reference_logps
from ropo.logps.features import FeatureReader, Sketch
from ropo.pairs import PairFeatures
from ropo.provenance import DamagedFileError, RunError
from ropo.train.trainer import ROPOTrainer


@pytest.fixture
def tokens(pairs, tokenizer):
    return tokenize_pairs(pairs, tokenizer, max_length=128).tokens


@pytest.fixture
def computed(monkeypatch):
    """Number of pairs that went through the model in each call."""
    counts = []

    def counting(model, tokens, batching, **options):
        counts.append(len(tokens))
        return score.score_pairs(model, tokens, batching, **options)

    monkeypatch.setattr(cache, "score_pairs", counting)
    return counts


def read(model, tokens, folder, **options):
    return reference_logps(model, tokens, Batching(pad_token_id=0, **options), cache_dir=folder)


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


def test_a_label_that_is_turned_round_costs_nothing(model, tokens, tmp_path, computed):
    logps, features = read_both(model, tokens, tmp_path)
    turned = [replace(pair, chosen=pair.rejected, rejected=pair.chosen) for pair in tokens]
    again, opposite = read_both(model, turned, tmp_path)
    assert computed == [20]
    assert torch.equal(again.chosen, logps.rejected)
    assert torch.equal(again.rejected, logps.chosen)
    assert again.chosen_tokens.tolist() == logps.rejected_tokens.tolist()
    for name, block in features.blocks.items():
        assert np.array_equal(opposite.blocks[name], -block), name


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
    monkeypatch.setitem(score.MAX_TOKENS, "cpu", 200)
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
    monkeypatch.setitem(score.MAX_TOKENS, "cpu", 4096)
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
    assert f"{path} is damaged" in caplog.text
    assert not path.exists()


def test_a_shard_that_cannot_be_opened_stays(model, tokens, tmp_path, monkeypatch):
    """It is another user's, or too many files are open: no reason to score for hours, or to remove it."""
    read(model, tokens, tmp_path)
    [path] = tmp_path.rglob("*.safetensors")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
        with pytest.raises(RunError, match=r"needs files that can be read; got .*: Too many open files"):
            read(model, tokens, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert cache._read(path) is not None


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


SKETCH = Sketch(num_outputs=6, num_inputs=5)


def read_both(model, tokens, folder, sketch=SKETCH, **options):
    batching = Batching(pad_token_id=0, **options)
    logps, features = reference_features(model, tokens, batching, sketch=sketch, cache_dir=folder)
    return logps, features.of(tokens)


def assert_same(found, wanted):
    """Kept features are rounded to 11 bits of the largest number of each pair."""
    assert found.blocks.keys() == wanted.blocks.keys() == {"gradient", "hidden_last", "hidden_middle"}
    for name, block in wanted.blocks.items():
        largest = np.abs(block).max(axis=1, keepdims=True)
        assert found.blocks[name].dtype == np.float32
        assert (np.abs(found.blocks[name] - block) <= 2**-11 * largest).all(), name


def test_features_are_those_of_the_pass(model, tokens, tmp_path, computed):
    batches = []
    reader = FeatureReader(model, SKETCH)
    batching = Batching(pad_token_id=0)
    score.score_pairs(model, tokens, batching, reader=reader, on_batch=lambda *batch: batches.append(batch))
    rows = np.concatenate([[row[0] for row in rows] for rows, _ in batches])
    blocks = {name: torch.cat([one[name] for _, one in batches]).numpy() for name in batches[0][1]}
    wanted = PairFeatures(blocks={name: block[np.argsort(rows)] for name, block in blocks.items()})
    logps, features = read_both(model, tokens, tmp_path)
    assert_same(features, wanted)
    again, same = read_both(model, tokens, tmp_path)
    assert computed == [20]
    assert torch.equal(again.chosen, logps.chosen)
    for name, block in features.blocks.items():
        assert np.array_equal(same.blocks[name], block), name


def test_features_that_are_missing_are_read_and_log_probs_stay(model, tokens, tmp_path, computed):
    """Whatever was cached first; rows appended, in another order, or twice among the pairs."""
    first = read(model, tokens[:15], tmp_path)
    logps, features = read_both(model, tokens[:10], tmp_path)
    assert computed == [15, 10]
    assert torch.equal(logps.chosen, first.chosen[:10])
    more, others = read_both(model, [*tokens[::-1], tokens[3]], tmp_path)
    assert computed == [15, 10, 10]
    assert torch.equal(more.chosen[5:20].flip(0), first.chosen)
    for name, block in features.blocks.items():
        assert np.array_equal(others.blocks[name][10:20][::-1], block), name
        assert np.array_equal(others.blocks[name][-1], block[3]), name
    assert torch.equal(read(model, tokens, tmp_path).chosen, more.chosen[:20].flip(0))
    assert sum(len(load_file(path)["logps"]) for path in tmp_path.glob("*/*.safetensors")) == 20
    assert computed == [15, 10, 10]
    read_both(model, tokens, tmp_path, sketch=Sketch(num_outputs=6, num_inputs=5, seed=1))
    assert computed == [15, 10, 10, 20]


def test_a_killed_pass_over_features_goes_on(model, tokens, tmp_path, monkeypatch, computed):
    """Killed between the features of a batch and its log-probabilities, too."""
    monkeypatch.setattr(cache, "_SECONDS_PER_SHARD", -1.0)
    monkeypatch.setitem(score.MAX_TOKENS, "cpu", 200)
    write, written = cache._ShardWriter._write, []

    def write_then_die(self, folder, rows, values):
        written.append((len(rows), "logps" in values))
        if len(written) == 6:
            raise KeyboardInterrupt
        write(self, folder, rows, values)

    monkeypatch.setattr(cache._ShardWriter, "_write", write_then_die)
    with pytest.raises(KeyboardInterrupt):
        read_both(model, tokens, tmp_path)
    assert written[5][1]
    monkeypatch.setattr(cache._ShardWriter, "_write", write)
    _, resumed = read_both(model, tokens, tmp_path)
    assert computed == [20, 20 - written[1][0] - written[3][0]]
    _, fresh = read_both(model, tokens, tmp_path / "fresh")
    for name, block in fresh.blocks.items():
        np.testing.assert_allclose(resumed.blocks[name], block, rtol=1e-3, atol=2e-3 * np.abs(block).max())


def test_a_shard_of_several_batches_in_half_precision(model, tokens, tmp_path, monkeypatch):
    """What is done with finished batches is no part of the forward pass: on a CPU autocast refuses to join float16."""
    monkeypatch.setitem(score.MAX_TOKENS, "cpu", 200)
    alone, features = read_both(model, tokens, tmp_path / "one shard", use_bf16=True)
    add = cache._ShardWriter.add

    def add_every_second(self, rows, features):
        self._last = time.monotonic() if not self._rows else 0.0
        add(self, rows, features)

    monkeypatch.setattr(cache._ShardWriter, "add", add_every_second)
    logps, others = read_both(model, tokens, tmp_path / "shards", use_bf16=True)
    assert len(list(tmp_path.glob("shards/*/features*/*.safetensors"))) > 1
    assert torch.equal(logps.chosen, alone.chosen)
    for name, block in features.blocks.items():
        assert np.array_equal(others.blocks[name], block), name


@pytest.mark.parametrize("how", ["cut", "flipped"])
def test_a_damaged_shard_of_features_is_read_again(how, model, tokens, tmp_path, computed, caplog):
    logps, features = read_both(model, tokens, tmp_path)
    [path] = tmp_path.glob("*/features*/*.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content[:-9] if how == "cut" else content)
    assert torch.equal(read(model, tokens, tmp_path).chosen, logps.chosen)
    assert computed == [20]
    again, same = read_both(model, tokens, tmp_path)
    assert computed == [20, 20]
    assert torch.equal(again.chosen, logps.chosen)
    assert f"{path} is damaged" in caplog.text
    for name, block in features.blocks.items():
        assert np.array_equal(same.blocks[name], block), name


def test_features_lost_while_they_are_read_are_no_numbers(model, tokens, tmp_path, monkeypatch):
    """Another process may find a shard damaged between the two looks at it."""
    read_both(model, tokens, tmp_path)
    monkeypatch.setattr(cache, "_keys", lambda _: {cache._key(pair) for pair in cache._in_order(tokens)[0]})
    [path] = tmp_path.glob("*/features*/*.safetensors")
    path.unlink()
    with pytest.raises(DamagedFileError, match="features of 20 pairs"):
        read_both(model, tokens, tmp_path)


def test_large_and_small_features_are_kept():
    """Half precision ends at 65,504, and hidden states may be larger."""
    block = torch.tensor([[3e6, -1e3], [2e-9, 1e-9], [0.0, 0.0]])
    rounded = cache._rounded({"one": block})
    found = rounded["one"].float() * rounded["one.scale"][:, None]
    torch.testing.assert_close(found, block, rtol=1e-3, atol=0)


TWO = """
import sys
import torch
from pathlib import Path
from accelerate import PartialState
from transformers import AutoModelForCausalLM
from ropo.logps.batch import Batching
from ropo.logps.cache import reference_features
from ropo.logps.features import Sketch
torch.set_num_threads(1)
state = PartialState(cpu=True)
tokens = torch.load(sys.argv[2], weights_only=False)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
folder = Path(sys.argv[3])
logps, features = reference_features(
    model, tokens, Batching(pad_token_id=0, max_tokens=300), sketch=Sketch(num_outputs=6, num_inputs=5),
    cache_dir=folder,
)
assert len(list(folder.glob("*/features*/*.safetensors"))) == state.num_processes == 2
torch.save((logps, features.of(tokens)), f"{sys.argv[4]}.{state.process_index}")
"""


@pytest.mark.slow
def test_two_processes_read_what_one_does(model, model_folder, tokens, tmp_path):
    """Each reads its share and both return everything."""
    (tmp_path / "two.py").write_text(TWO)
    torch.save(tokens, tmp_path / "tokens")
    launch = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29763")
    words = (tmp_path / "two.py", model_folder, tmp_path / "tokens", tmp_path / "two", tmp_path / "found")
    command = [sys.executable, *launch, *map(str, words)]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=120)
    wanted, features = read_both(model, tokens, tmp_path / "one")
    for i in range(2):
        logps, same = torch.load(tmp_path / f"found.{i}", weights_only=False)
        torch.testing.assert_close(logps.chosen, wanted.chosen, rtol=1e-5, atol=1e-4)
        for name, block in features.blocks.items():
            np.testing.assert_allclose(same.blocks[name], block, rtol=1e-3, atol=1e-3 * np.abs(block).max())
