"""The estimate before a run: sizes are the model's, steps are the trainer's, and it never stops or changes a run."""

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3Config, GPT2Config, LlamaConfig

from ropo import ROPOConfig
from ropo.data.tokenize import TokenizedPair, tokenize_pairs
from ropo.logps.batch import shared_prefix_batch
from ropo.logps.shared_prefix import enable_response_logps, shared_prefix_logps
from ropo.models.source import Model
from ropo.run import forecast
from ropo.run.plan import PairSize, forward_operations
from ropo_bench.toy import make_pairs, save_toy


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("forecast") / "model"
    save_toy(folder, seed=0, num_texts=32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return folder, tokenizer, tokenize_pairs(make_pairs(40, seed=0), tokenizer, max_length=128).tokens


def options(tmp_path, **more):
    return ROPOConfig(output_dir=str(tmp_path / "out"), max_length=128, per_device_train_batch_size=8, **more)


MODELS = {"scorer": "models"}
LLAMA = LlamaConfig(
    vocab_size=300, hidden_size=32, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2,
)  # fmt: skip
GPT2 = GPT2Config(vocab_size=300, n_embd=32, n_layer=3, n_head=4, n_positions=64)


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["untied", "tied"])
def test_sizes_are_those_of_the_model(config):
    model = AutoModelForCausalLM.from_config(config)
    size = forecast.model_size(config)
    total = sum(p.numel() for p in model.parameters())
    assert size.total_weights == size.trained_weights == total
    assert size.layer_weights == total - (300 * 32 if config is GPT2 else 2 * 300 * 32)
    assert (size.num_layers, size.hidden_size, size.head_weights) == (3, 32, 300 * 32)
    assert size.intermediate_size == (128 if config is GPT2 else 80)
    layers = model.transformer.h if config is GPT2 else model.model.layers
    assert size.last_mlp_weights == sum(p.numel() for p in layers[-1].mlp.parameters())
    assert forecast.model_size(config, layout="plain").last_mlp_weights == 0


def test_sizes_of_a_model_whose_text_stands_one_level_down():
    text = {"hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 3, "head_dim": 8, "vocab_size": 300}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    size = forecast.model_size(Gemma3Config(text_config=text, vision_config=vision))
    assert (size.num_layers, size.hidden_size, size.intermediate_size) == (3, 32, 80)


def test_operations_of_a_pass_are_counted_as_they_are_done():
    """By torch, for a prompt and its two responses; it also counts the scores that the mask hides."""
    config = LlamaConfig(**{**LLAMA.to_dict(), "intermediate_size": 400, "attn_implementation": "eager"})
    model, size, lengths = AutoModelForCausalLM.from_config(config), forecast.model_size(config), (50, 8, 9)
    enable_response_logps(model)
    prompt, chosen, rejected = (np.ones(length, dtype=np.int32) for length in lengths)
    pair = TokenizedPair(prompt=prompt, chosen=chosen, rejected=rejected)
    batch = shared_prefix_batch([pair], pad_token_id=0)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        shared_prefix_logps(model, batch)
    rows = batch["input_ids"].numel()
    hidden = 4 * 3 * 32 * (rows**2 - (50**2 / 2 + 8 * (50 + 4) + 9 * (50 + 4.5)))
    pairs = PairSize(num_pairs=1, prompt_tokens=50, chosen_tokens=8, rejected_tokens=9)
    counted = counter.get_total_flops() - hidden
    assert forward_operations(size, pairs) == pytest.approx(counted, rel=0.04)  # the last tokens are not read
    assert forward_operations(replace(size, last_mlp_weights=0), pairs) > 1.1 * counted


def test_an_adapter_trains_few_weights():
    adapter = LoraConfig(r=4, target_modules=["q_proj"])
    adapted = get_peft_model(AutoModelForCausalLM.from_config(LLAMA), adapter)
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert forecast.model_size(LLAMA, adapter).trained_weights == trained < 2000


@pytest.mark.parametrize(
    ("more", "is_audit", "stages", "steps"),
    [
        ({"loss": "dpo", "rho": "0", "num_folds": 0}, False, ["reference", "rounds"], 5),
        ({"num_folds": 2}, False, ["reference", "audit", "rounds"], 5),
        ({}, True, ["reference", "audit"], 0),
        ({"loss": "simpo", "loss_args": {"target_margin": 0.5}, "rho": "0.2"}, False, ["audit", "rounds"], 5),
        ({**MODELS, "num_folds": 2}, False, ["reference", "audit", "rounds"], 5 + 5),
        ({**MODELS, "num_folds": 2, "max_steps": 3}, False, ["reference", "audit", "rounds"], 6 + 3),
        ({**MODELS, "num_folds": 2, "gradient_accumulation_steps": 2}, True, ["reference", "audit"], 3),
        (
            {"num_folds": 0, "rho": "0.2", "rounds": 2, "num_candidates": 2},
            False,
            ["reference", "rounds", "sampling"],
            10,
        ),
    ],
)
def test_stages_and_steps_are_those_of_the_run(toy, tmp_path, more, is_audit, stages, steps):
    """40 pairs in batches of 8; a fold of two trains on 20 of them."""
    folder, tokenizer, tokens = toy
    config = AutoModelForCausalLM.from_pretrained(folder).config
    plan = forecast.forecast(config, tokens, options(tmp_path, **more), tokenizer, is_audit=is_audit)
    assert [stage.name for stage in plan.stages] == stages
    assert sum(stage.steps for stage in plan.stages) == steps
    assert 0 < plan.seconds < 3600
    assert 0 < plan.memory_bytes < 2**30


def test_random_state_is_left_alone(toy, tmp_path):
    folder, tokenizer, tokens = toy
    config = AutoModelForCausalLM.from_pretrained(folder).config
    before = torch.random.get_rng_state()
    forecast.reached_rate(config, tokens, options(tmp_path), tokenizer)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert config.num_hidden_layers == AutoModelForCausalLM.from_pretrained(folder).config.num_hidden_layers


def test_it_is_told(toy, tmp_path, caplog):
    folder, tokenizer, tokens = toy
    with caplog.at_level(logging.INFO, logger="ropo.run.forecast"):
        forecast.tell_forecast(Model(str(folder), tokenizer=tokenizer), tokens, options(tmp_path), is_audit=True)
    assert "done yet: About" in caplog.text
    assert "GiB of memory" in caplog.text


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16, "auto"])
def test_the_step_is_timed_as_the_model_will_be_loaded(toy, tmp_path, monkeypatch, caplog, dtype):
    """In the precision and with the attention that are asked for; weights of two bytes take half the memory."""
    folder, tokenizer, tokens = toy
    asked = Model(str(folder), tokenizer=tokenizer, load_options={"dtype": dtype, "attn_implementation": "eager"})
    timed, plans = [], []

    def seconds(model, layout, *_, **__):
        timed.append((model.dtype, model.config._attn_implementation, layout))
        return 1.0

    whole = forecast.forecast
    monkeypatch.setattr(forecast, "_seconds", seconds)
    monkeypatch.setattr(forecast, "forecast", lambda *given, **more: plans.append(whole(*given, **more)) or plans[-1])
    caplog.set_level(logging.INFO, logger="ropo.run.forecast")
    for source in (Model(str(folder), tokenizer=tokenizer), asked):
        forecast.tell_forecast(source, tokens, options(tmp_path), is_audit=True)
    is_half = dtype != "auto"
    assert timed[-1] == (torch.bfloat16 if is_half else torch.float32, "eager", "shared_prefix")
    assert (plans[1].memory_bytes < 0.9 * plans[0].memory_bytes) == is_half


def test_a_model_that_it_cannot_size_stops_nothing(toy, tmp_path, caplog):
    _, tokenizer, tokens = toy
    source = Model(str(tmp_path / "nothing_here"), tokenizer=tokenizer)
    with caplog.at_level(logging.INFO, logger="ropo.run.forecast"):
        forecast.tell_forecast(source, tokens, options(tmp_path), is_audit=False)
    assert "cannot be told" in caplog.text


def test_a_missing_package_is_not_passed_over(toy, tmp_path, monkeypatch, caplog):
    """The run would stop for it, too."""
    folder, tokenizer, tokens = toy

    def miss(*_, **__):
        raise ImportError("FlashAttention2 has been toggled on, but it cannot be used")

    caplog.set_level("INFO")  # nothing is timed where nobody reads it
    monkeypatch.setattr(forecast, "forecast", miss)
    with pytest.raises(ImportError, match="FlashAttention2"):
        forecast.tell_forecast(Model(str(folder), tokenizer=tokenizer), tokens, options(tmp_path), is_audit=False)


def test_nothing_is_timed_where_nobody_reads_it(toy, tmp_path, monkeypatch):
    folder, tokenizer, tokens = toy
    monkeypatch.setattr(forecast, "forecast", lambda *_, **__: pytest.fail("timed"))
    forecast.logger.setLevel(logging.WARNING)
    try:
        forecast.tell_forecast(Model(str(folder), tokenizer=tokenizer), tokens, options(tmp_path), is_audit=False)
    finally:
        forecast.logger.setLevel(logging.NOTSET)
