"""Sampling as a whole: the same call gives the same text, and a killed one resumes after its last finished shard."""

import json
import random

import numpy as np
import pytest
import torch
from accelerate import PartialState
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from ropo.data.tokenize import encode_prompts
from ropo.progress import Progress
from ropo.provenance import hash_file
from ropo.sampling import generate, shared_prompt
from ropo.sampling import transformers_engine as in_transformers
from ropo.sampling.engine import Prompt, Response, Sampling, response_of, seeded, stop_tokens
from ropo.sampling.generate import sample_responses
from ropo.sampling.transformers_engine import TransformersEngine

OPTIONS = {"sampling": Sampling(num_candidates=2, max_new_tokens=8), "seed": 5}


@pytest.fixture
def prompts(pairs, tokenizer):
    return encode_prompts([pair.prompt for pair in pairs[:10]], tokenizer)


@pytest.fixture
def small_shards(monkeypatch):
    """Two or three prompts each."""
    monkeypatch.setattr(in_transformers, "_TOKENS_PER_SHARD", {"cpu": 150})


class EchoEngine:
    """Says what it was asked; dies before a shard if told to."""

    identity = {"engine": "echo"}  # noqa: RUF012 - never changed
    tokens_per_shard = 60

    def __init__(self, dies_at=None):
        self.calls, self.dies_at = [], dies_at

    def sample(self, prompts, sampling, advance):
        if len(self.calls) == self.dies_at:
            raise KeyboardInterrupt
        self.calls.append([len(prompt.ids) for prompt in prompts])
        advance(len(prompts), 1)
        return [
            [Response(text=f"{list(prompt.ids)} {prompt.seed} {k}\u2028\n\x85", num_tokens=3, is_finished=k == 0)]
            for prompt in prompts
            for k in range(1)
        ]

    def close(self):
        pass


def test_the_same_call_gives_the_same_text(model, tokenizer, prompts):
    """Whatever the global generators do in the meantime, and leaving them as they were."""
    states = torch.random.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    first = sample_responses(model, tokenizer, prompts, **OPTIONS)
    assert torch.equal(torch.random.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]  # noqa: NPY002
    torch.manual_seed(99)
    assert sample_responses(model, tokenizer, prompts, **OPTIONS) == first
    assert sample_responses(model, tokenizer, prompts, **{**OPTIONS, "seed": 6}) != first


def test_an_engine_loads_its_model_once(model, tokenizer, prompts, tmp_path, monkeypatch):
    """However many shards there are; and lets go of it at the end."""
    monkeypatch.setattr(in_transformers, "_TOKENS_PER_SHARD", {"cpu": 8, "cuda": 8})
    loaded = []
    engine = TransformersEngine(lambda: loaded.append(1) or model, tokenizer)
    sample_responses(engine, tokenizer, prompts, folder=tmp_path, model_digest="m", **OPTIONS)
    assert len(list(tmp_path.iterdir())) > 1
    assert loaded == [1]
    engine.close()
    assert engine._model is None


def test_chance_belongs_to_the_prompt(model, tokenizer, prompts):
    """The order of the data and other prompts change nothing; the same prompt twice gets different responses."""

    def texts(given):
        found = sample_responses(model, tokenizer, given, **OPTIONS)
        return [tuple(each.text for each in found[i : i + 2]) for i in range(0, len(found), 2)]

    whole = texts(prompts)
    assert texts(prompts[::-1]) == whole[::-1]
    assert texts(prompts[3:5]) == whole[3:5]
    twice = texts([prompts[0], prompts[1], prompts[0]])
    assert twice[:2] == whole[:2]
    assert twice[2] != twice[0]


FAMILIES = {
    "roberta": {"intermediate_size": 64, "is_decoder": True},
    "pegasus": {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 64},
    "llama": {"intermediate_size": 64},
    "rwkv": {"attention_hidden_size": 32, "intermediate_size": 64},  # whose `generate` mixes up the rows of a batch
    "xlm": {"emb_dim": 32, "n_layers": 2, "n_heads": 2},  # whose `generate` says something else than its forward pass
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_likeliest_tokens_are_those_of_the_model_alone(family, tokenizer):
    """Without neighbours, padding, cache and positions; RoBERTa counts on from its padding, Pegasus reads it."""
    torch.manual_seed(0)
    sizes = {"max_position_embeddings": 64}
    if family != "pegasus":
        sizes |= {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {"vocab_size": len(tokenizer), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = CONFIG_MAPPING[family](**special, **sizes, **FAMILIES[family])
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)  # so that no two tokens are about as likely
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(5, len(tokenizer), (n,), generator=generator).tolist() for n in (3, 9, 20, 9)]
    sampling = Sampling(num_candidates=1, max_new_tokens=6, temperature=1e-4)
    for prompt, found in zip(prompts, sample_responses(model, tokenizer, prompts, sampling), strict=True):
        for place, token in enumerate(found.ids):
            text = torch.tensor([[*prompt, *found.ids[:place]]])
            with torch.no_grad():
                logps = model(input_ids=text).logits[0, -1].log_softmax(-1)
            assert logps[token] > logps.max() - 1e-2


def test_texts_and_counts(model, tokenizer, prompts):
    """What is drawn is decoded up to the token that ended it, which is not counted."""
    found = sample_responses(model, tokenizer, prompts, Sampling(num_candidates=8, max_new_tokens=60))
    ended = [each for each in found if each.is_finished]
    assert len(ended) > 3
    assert all(each.num_tokens < 60 for each in ended)
    assert all(each.num_tokens == 60 for each in found if not each.is_finished)
    assert not any("</s>" in each.text for each in found)


def test_response_of(tokenizer):
    ids = tokenizer("the soup was good", add_special_tokens=False)["input_ids"]
    end = tokenizer.eos_token_id
    assert response_of([*ids, end, 77, 78], (end,), tokenizer) == Response(
        text="the soup was good", num_tokens=len(ids), is_finished=True, ids=(*ids, end)
    )
    assert response_of(ids, (end,), tokenizer) == Response(
        text="the soup was good", num_tokens=len(ids), is_finished=False, ids=tuple(ids)
    )
    assert response_of([end], (end,), tokenizer).text == ""


def test_every_published_end_ends(model, tokenizer, prompts):
    """Chat models name the end of a turn in their generation_config.json."""
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, 100]
    assert stop_tokens(tokenizer, model.generation_config) == (2, 100)
    model.generation_config.eos_token_id = 101
    assert stop_tokens(tokenizer, model.generation_config) == (2, 101)
    assert stop_tokens(tokenizer, None) == (2,)
    few = sum(each.is_finished for each in sample_responses(model, tokenizer, prompts, **OPTIONS))
    model.generation_config.eos_token_id = list(range(100, 200))
    assert sum(each.is_finished for each in sample_responses(model, tokenizer, prompts, **OPTIONS)) > few


@pytest.mark.usefixtures("small_shards")
def test_shards_change_nothing(model, tokenizer, prompts, tmp_path):
    inside = sample_responses(model, tokenizer, prompts, folder=tmp_path, model_digest="m", **OPTIONS)
    assert len(list(tmp_path.iterdir())) > 3
    assert inside == sample_responses(model, tokenizer, prompts, **OPTIONS)


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_killed_between_any_two_steps(share, model, tokenizer, prompts, tmp_path, monkeypatch):
    """What was finished is not sampled again, and all files and samples are those of a run that was never killed."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    steps, lives, step = [], [], shared_prompt._Flight.step

    def dying(self):
        steps.append(len(list(killed.glob("*.jsonl"))))
        if lives and len(steps) == lives[0]:
            raise KeyboardInterrupt
        step(self)

    monkeypatch.setattr(shared_prompt._Flight, "step", dying)
    expected = sample_responses(model, tokenizer, prompts, folder=whole, model_digest="m", **OPTIONS)
    lives.append(int(share * len(steps)))
    steps.clear()
    with pytest.raises(KeyboardInterrupt):
        sample_responses(model, tokenizer, prompts, folder=killed, model_digest="m", **OPTIONS)
    num_done = steps[-1]
    num_shards = len(list(whole.iterdir()))
    assert num_shards > 3
    assert num_done == pytest.approx(share * num_shards, abs=1)
    steps.clear()
    lives.clear()
    monkeypatch.setattr(in_transformers, "choose_decoder", lambda *_, **__: ("share_prompts", "", 0))
    assert sample_responses(model, tokenizer, prompts, folder=killed, model_digest="m", **OPTIONS) == expected
    assert steps[0] == num_done
    assert {p.name: hash_file(p) for p in killed.iterdir()} == {p.name: hash_file(p) for p in whole.iterdir()}


def echo(folder, prompts, engine=None, *, seed=0, model_digest="m", **sampling):
    engine = engine or EchoEngine()
    sampling = Sampling(**{"num_candidates": 1, "max_new_tokens": 8, **sampling})
    found = sample_responses(engine, None, prompts, sampling, seed=seed, folder=folder, model_digest=model_digest)
    return engine.calls, found


NUMBERS = [[7] * length for length in (3, 30, 9, 12, 5, 21)]


def test_dealing(tmp_path):
    """The longest first, in shards of about so many tokens, responses included."""
    calls, found = echo(None, NUMBERS)
    assert calls == [[30], [21, 12], [9, 5, 3]]
    assert [sample.prompt for sample in found] == list(range(6))
    assert [sample.text.count("7,") + 1 for sample in found] == [3, 30, 9, 12, 5, 21]


def test_finished_shards_are_read(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        echo(tmp_path, NUMBERS, EchoEngine(dies_at=2))
    calls, found = echo(tmp_path, NUMBERS)
    assert calls == [[9, 5, 3]]
    calls, again = echo(tmp_path, NUMBERS)
    assert calls == []
    assert again == found == echo(None, NUMBERS)[1]
    rows = [json.loads(line) for path in tmp_path.iterdir() for line in path.read_text("utf-8").split("\n") if line]
    assert sorted(row["text"] for row in rows if "text" in row) == sorted(sample.text for sample in found)


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"temperature": 0.5},
        {"top_p": 0.9},
        {"max_new_tokens": 9},
        {"model_digest": "n"},
        {"num_candidates": 1},
    ],
)
def test_shards_of_others_are_not_used(change, tmp_path):
    echo(tmp_path, NUMBERS)
    calls, _ = echo(tmp_path, NUMBERS, **change)
    assert (len(calls) == 3) == (change != {"num_candidates": 1})


def test_shards_of_other_prompts_or_engines_are_not_used(tmp_path):
    echo(tmp_path, NUMBERS)
    assert echo(tmp_path, [*NUMBERS[:5], [8] * 21])[0] == [[21, 12]]
    engine = EchoEngine()
    engine.identity = {"engine": "other"}
    assert len(echo(tmp_path, NUMBERS, engine)[0]) == 3


@pytest.mark.parametrize("damage", ["", "{", '{"prompt": 9}\n', "[]\n", "another text"])
def test_damaged_shards_are_sampled_again(damage, tmp_path, caplog):
    _, expected = echo(tmp_path, NUMBERS)
    path = sorted(tmp_path.iterdir())[0]
    before = path.read_text()
    changed = before.replace('"text": "', '"text": "!', 1)
    assert changed != before
    path.write_text(changed if damage == "another text" else damage)
    calls, found = echo(tmp_path, NUMBERS)
    assert len(calls) == 1
    assert found == expected
    assert "not what was" in caplog.text


def test_processes_share_the_work(monkeypatch, tmp_path):
    """Each samples every second shard, all get as many, and together they have everything once."""
    monkeypatch.setattr(generate, "gather_object", lambda samples: samples)
    found, calls = [], []
    PartialState()  # makes the shared state
    for index in range(2):
        monkeypatch.setitem(PartialState._shared_state, "num_processes", 2)
        monkeypatch.setitem(PartialState._shared_state, "process_index", index)
        asked, samples = echo(tmp_path, NUMBERS)
        calls.append(asked)
        found += samples
    assert calls == [[[30], [12, 9]], [[21], [5, 3]]]
    assert sorted(sample.prompt for sample in found) == list(range(6))


def test_refusals(model, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="needs model_digest"):
        echo(tmp_path, NUMBERS, model_digest=None)
    with pytest.raises(ValueError, match="none in prompt 1"):
        echo(tmp_path, [[3], []])
    for option, value, words in (
        ("num_candidates", 0, "1 or more; got 0"),
        ("max_new_tokens", 0, "1 or more; got 0"),
        ("temperature", 0.0, "above 0; got 0.0"),
        ("top_p", 1.5, r"in \(0, 1\]; got 1.5"),
    ):
        with pytest.raises(ValueError, match=f"{option} needs .*{words}"):
            echo(None, NUMBERS, **{option: value})
    assert sample_responses(model, tokenizer, [], **OPTIONS) == []


def test_progress_says_tokens_per_second(monkeypatch):
    clock = iter(range(0, 1000, 2))
    progress = Progress("Sampling", 10, is_shown=False)
    monkeypatch.setattr(generate.time, "monotonic", lambda: float(next(clock)))
    advance = generate._with_rate(progress)
    for prompts in (1, 2):
        advance(prompts, 100)
        assert (progress.done, progress.note) == ({1: 1, 2: 3}[prompts], "50 tokens/s")


def engine(model, tokenizer, **options):
    return TransformersEngine(lambda: model, tokenizer, **options)


SAMPLING = Sampling(num_candidates=2, max_new_tokens=8)


def test_out_of_memory_halves_the_rows(model, tokenizer, prompts, monkeypatch, caplog):
    """What was drawn is kept, each prompt counts once, and the others are drawn as they would have been."""
    given = seeded(prompts, 0)
    expected = engine(model, tokenizer).sample(given, SAMPLING, lambda *_: None)
    sizes, asked, advanced = [], [], []

    def narrow(job):
        sizes.append(job.num_rows)
        asked.append(len(job.places))
        found = list(shared_prompt.share_prompts(job))
        if job.num_rows == 4:
            yield from found
        else:  # an odd number: of some prompt one candidate has come, the last one
            yield from found[::-1][:5]
            raise torch.OutOfMemoryError

    monkeypatch.setattr(in_transformers, "DECODERS", {"share_prompts": narrow})
    monkeypatch.setattr(in_transformers, "_MAX_ROWS", {"cpu": 16})
    found = engine(model, tokenizer).sample(given, SAMPLING, lambda *counts: advanced.append(counts))
    assert found == expected
    assert sizes == [16, 8, 4]
    assert asked[0] == 10 > asked[1] > asked[2]
    assert len(advanced) == 10
    assert "4 rows at a" in caplog.text
    monkeypatch.setattr(shared_prompt._Flight, "_read", lambda *_: exec("raise torch.OutOfMemoryError"))
    with pytest.raises(torch.OutOfMemoryError, match="memory for 2 rows"):
        engine(model, tokenizer).sample(given, SAMPLING, lambda *_: None)


def test_learned_positions_limit_responses(tokenizer):
    """A prompt and its response have at most as many tokens as there are positions, whoever else is in the batch."""
    torch.manual_seed(0)
    shape = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 24}
    small = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), eos_token_id=2, bos_token_id=1, **shape)).eval()
    given = [[70 + i] * length for i, length in enumerate((9, 16, 23, 3, 3, 3, 3, 3, 3))]
    found = engine(small, tokenizer).sample(
        seeded(given, 0), Sampling(num_candidates=5, max_new_tokens=18), lambda *_: None
    )
    for responses, most in zip(found, (15, 8, 1, *[18] * 6), strict=True):
        assert {response.num_tokens for response in responses if not response.is_finished} == {most}
        assert all(response.num_tokens < most for response in responses if response.is_finished)


def test_rows_follow_the_budget(model, tokenizer, monkeypatch):
    call = in_transformers.Caller(model, tokenizer)
    monkeypatch.setattr(in_transformers, "_TOKENS_TOGETHER", 1000)
    assert in_transformers._num_rows(call, 100, 0, 3) == 9
    assert in_transformers._num_rows(call, 5, 0, 3) == 63
    assert in_transformers._num_rows(call, 5000, 0, 3) == 3


def test_training_mode_comes_back(model, tokenizer, prompts):
    model.train()
    engine(model, tokenizer).sample(seeded(prompts[:2], 0), SAMPLING, lambda *_: None)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_bf16(model, tokenizer, prompts, monkeypatch):
    """Computed in bfloat16, cache included, by weights that stay in float32; another shard than in float32."""
    dtypes = set()
    joined = shared_prompt.regroup

    def note(cache, *args, **kwargs):
        joined(cache, *args, **kwargs)
        dtypes.update(part.dtype for layer in cache.layers for part in layer.used)

    monkeypatch.setattr(shared_prompt, "regroup", note)
    half, single = engine(model, tokenizer, use_bf16=True), engine(model, tokenizer)
    half.sample(seeded(prompts, 0), SAMPLING, lambda *_: None)
    assert dtypes == {torch.bfloat16}
    assert half.identity != single.identity
    first = Sampling(num_candidates=8, max_new_tokens=1)  # later ones differ as soon as one did
    found = [each.sample(seeded(prompts, 0), first, lambda *_: None) for each in (half, single)]
    same = [a == b for ours, theirs in zip(*found, strict=True) for a, b in zip(ours, theirs, strict=True)]
    assert 0.8 < np.mean(same) < 1
    assert next(model.parameters()).dtype == torch.float32


def test_prompts_of_one_token_and_many_candidates(model, tokenizer):
    many = Sampling(num_candidates=200, max_new_tokens=3)
    (found,) = engine(model, tokenizer).sample([Prompt([70], 3)], many, lambda *_: None)
    assert len(found) == 200
    assert len({response.text for response in found}) > 20
