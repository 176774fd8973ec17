"""The estimate before a run: sizes are the model's, steps are the trainer's, and it never stops or changes a run."""

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers.modeling_utils
from accelerate import PartialState
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3Config, GPT2Config, LlamaConfig

from ropo import ROPOConfig
from ropo.data.tokenize import TokenizedPair, tokenize_pairs
from ropo.logps.batch import shared_prefix_batch
from ropo.logps.shared_prefix import enable_response_logps, shared_prefix_logps
from ropo.models.source import Model
from ropo.report.costs import ASSUMED
from ropo.run import forecast, probe
from ropo.run.formats import formats_of
from ropo.run.memory import linear_audit_bytes
from ropo.run.plan import PairSize, forward_operations
from ropo_bench.toy import make_pairs, save_toy


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """The initial model, its skeleton, and pairs."""
    folder = tmp_path_factory.mktemp("forecast") / "model"
    save_toy(folder, seed=0, num_texts=32)
    model = Model(folder, tokenizer=AutoTokenizer.from_pretrained(folder))
    return model, model.skeleton(), tokenize_pairs(make_pairs(40, seed=0), model.tokenizer, max_length=128).tokens


def options(tmp_path, **more):
    return ROPOConfig(
        output_dir=str(tmp_path / "out"), max_length=128, per_device_train_batch_size=8, use_cpu=True, **more
    )


@pytest.fixture
def timed(monkeypatch):
    """Nothing is timed; what would have been is listed: dtype, attention, layout, tokens."""
    found = []

    def seconds(model, layout, _pad, _device, some, **_):
        found.append((model.dtype, model.config._attn_implementation, layout, sum(map(len, some))))
        return 0.01 * sum(map(len, some)) / 64

    monkeypatch.setattr(probe, "_seconds", seconds)
    monkeypatch.setattr(probe, "_sampling_seconds", lambda *_, **__: 0.01)
    return found


MODELS = {"scorer": "models"}
LLAMA = LlamaConfig(
    vocab_size=300, hidden_size=32, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2,
)  # fmt: skip
GPT2 = GPT2Config(vocab_size=300, n_embd=32, n_layer=3, n_head=4, n_positions=64)
LORA = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")


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
    adapted = get_peft_model(AutoModelForCausalLM.from_config(LLAMA), LORA)
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert forecast.model_size(LLAMA, LORA).trained_weights == trained < 2000


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
    plan = forecast.forecast(*toy, options(tmp_path, **more), is_audit=is_audit)
    assert [stage.name for stage in plan.stages] == [*stages, "report"]
    assert sum(stage.steps for stage in plan.stages) == steps
    assert 0 < plan.seconds < 3600
    assert 0 < plan.memory.total < 2**30
    assert set(plan.assumed) <= ASSUMED.keys()
    is_trained = not is_audit or more.get("scorer") == "models"
    assert (plan.memory.optimizer > 0) == is_trained


def test_random_state_is_left_alone(toy, tmp_path):
    before = torch.random.get_rng_state()
    forecast.forecast(*toy, options(tmp_path))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert toy[1].config.num_hidden_layers == toy[0].config().num_hidden_layers


def test_nothing_is_partitioned_under_zero3(toy, tmp_path, monkeypatch):
    """Whatever `transformers` makes by itself is partitioned there, which every process must take part in."""
    monkeypatch.setattr(transformers.modeling_utils, "is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ImportError, match="deepspeed"):
        AutoModelForCausalLM.from_config(LLAMA)
    assert forecast.forecast(*toy, options(tmp_path)).memory.total > 0


@pytest.mark.parametrize("most", [2**28, 20_000])
def test_few_weights_and_tokens_are_timed(toy, tmp_path, timed, monkeypatch, most):
    """So many tokens as take a second, here at 6,400 a second; two layers, or one and few words of a large model."""
    monkeypatch.setitem(probe._MOST_WEIGHTS, "cpu", most)
    monkeypatch.setattr(probe, "_SECONDS", 0.03)
    _, skeleton, tokens = toy
    rates = probe.time_steps(type(skeleton), skeleton.config, tokens, options(tmp_path), pad_token_id=0)
    assert 64 <= timed[-1][3] <= 256 < sum(map(len, tokens[:8]))
    config = rates.config
    expected = (2, skeleton.config.vocab_size) if most == 2**28 else (1, most // config.hidden_size)
    assert (config.num_hidden_layers, config.vocab_size) == expected


def test_checkpoints_adafactor_and_accumulation_change_the_memory(toy, tmp_path, timed):
    def memory(**more):
        return forecast.forecast(*toy, options(tmp_path, **more)).memory

    before = memory()
    assert memory(activation_checkpointing=True).activations < before.activations
    assert memory(optim="adafactor").optimizer == 0
    assert memory(gradient_accumulation_steps=4).activations > before.activations  # beside gradients that are there


def test_disk_holds_models_and_checkpoints(toy, tmp_path, timed):
    """40 pairs in batches of 8: five steps an epoch, and a checkpoint after each epoch but the last."""
    one = forecast.forecast(*toy, options(tmp_path, num_folds=0, rho="0", save_strategy="no"))
    assert one.disk_bytes == 2 * one.memory.weights
    more = options(tmp_path, num_folds=0, rho="0", num_train_epochs=3, save_total_limit=1)
    assert forecast.forecast(*toy, more).disk_bytes == (2 + 2 * 3) * one.memory.weights
    # What a filter takes away is made up for by a part of a second epoch, which follows on a checkpoint.
    filtered = options(tmp_path, rho="0.2")
    features = 2 * 40 * (2048 + 2 * toy[1].config.hidden_size)
    assert forecast.forecast(*toy, filtered).disk_bytes == (2 + 3) * one.memory.weights + features
    halfway = {"num_candidates": 2, "selection_rule": "uncertainty_aware", "num_folds": 0, "rho": "0", "rounds": 2}
    sampled = options(tmp_path, save_strategy="no", **halfway)
    assert forecast.forecast(*toy, sampled).disk_bytes == (3 + 1) * one.memory.weights


def test_the_host_holds_the_features_of_an_audit():
    """`audit_cost.csv`: 3.6 GiB more at 60,000 pairs than at 500, of a model of hidden size 128."""
    assert linear_audit_bytes(128, num_pairs=59_500) == pytest.approx(3.6 * 2**30, rel=0.2)


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16, "auto"])
def test_a_step_is_timed_as_the_model_will_be_loaded(toy, tmp_path, timed, dtype):
    """In the precision and with the attention that are asked for; weights of two bytes take half the memory."""
    model, skeleton, tokens = toy
    asked = Model(
        model.name_or_path, tokenizer=model.tokenizer, load_options={"dtype": dtype, "attn_implementation": "eager"}
    )
    plans = [forecast.forecast(one, skeleton, tokens, options(tmp_path)) for one in (model, asked)]
    is_half = dtype != "auto"
    assert timed[-1][:3] == (torch.bfloat16 if is_half else torch.float32, "eager", "shared_prefix")
    assert (plans[1].memory.weights == plans[0].memory.weights / 2) == is_half


def test_a_model_whose_forward_reads_its_data_is_guessed(toy, tmp_path, timed, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("depends on the data")

    counted = forecast.forecast(*toy, options(tmp_path))
    monkeypatch.setattr(forecast, "kept_for_backward", fail)
    guessed = forecast.forecast(*toy, options(tmp_path))
    assert "activations" in guessed.assumed
    assert "activations" not in counted.assumed
    assert 0.5 < guessed.memory.activations / counted.memory.activations < 2


def test_it_is_told(toy, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="ropo.run.forecast"):
        forecast.tell_forecast(*toy, options(tmp_path), is_audit=True)
    assert "this run takes about" in caplog.text
    assert "GB on each device" in caplog.text


def test_a_model_that_it_cannot_size_stops_nothing(toy, tmp_path, caplog, monkeypatch):
    model, _, tokens = toy
    with caplog.at_level(logging.INFO, logger="ropo.run.forecast"):
        forecast.tell_forecast(model, torch.nn.Linear(1, 1), tokens, options(tmp_path), is_audit=False)
    assert "cannot be told" in caplog.text
    with pytest.raises(ValueError, match="cannot be told"):
        forecast.forecast_everywhere(model, torch.nn.Linear(1, 1), tokens, options(tmp_path), is_audit=False)


def test_a_missing_package_is_not_passed_over(toy, tmp_path, monkeypatch, caplog):
    """The run would stop for it, too."""

    def miss(*_, **__):
        raise ImportError("FlashAttention2 has been toggled on, but it cannot be used")

    caplog.set_level("INFO")  # nothing is timed where nobody reads it
    monkeypatch.setattr(forecast, "forecast", miss)
    with pytest.raises(ImportError, match="FlashAttention2"):
        forecast.tell_forecast(*toy, options(tmp_path), is_audit=False)


@pytest.mark.parametrize("who", ["nobody", "another process"])
def test_nothing_is_timed_where_nobody_reads_it(toy, tmp_path, monkeypatch, who):
    monkeypatch.setattr(forecast, "forecast", lambda *_, **__: pytest.fail("timed"))
    forecast.logger.setLevel(logging.WARNING if who == "nobody" else logging.INFO)
    monkeypatch.setattr(PartialState, "is_main_process", property(lambda _: who == "nobody"))
    try:
        forecast.tell_forecast(*toy, options(tmp_path), is_audit=False)
    finally:
        forecast.logger.setLevel(logging.NOTSET)


def test_an_audit_that_is_only_read_costs_nothing(tmp_path):
    for audit_from, num_folds in ((None, 5), (str(tmp_path / "A"), 0)):
        assert forecast.run_size(options(tmp_path, audit_from=audit_from), is_audit=False).num_folds == num_folds


def test_a_quantized_base_is_said_to_be_slower(tmp_path):
    formats = formats_of(options(tmp_path), torch.bfloat16, {"load_in_4bit": True})
    run = forecast.run_size(options(tmp_path), is_audit=False)
    assert "dequantization" in forecast._assumed(options(tmp_path), formats, run, is_counted=True)
