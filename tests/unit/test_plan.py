"""The planner counts what is really computed, and its costs grow as they must."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from ropo.run.plan import Machine, ModelSize, PairSize, RunSize, forward_operations, plan_run, training_bytes

MODEL = ModelSize(
    layer_weights=4_800_000,
    last_mlp_weights=540_000,
    head_weights=1_000_000,
    num_layers=6,
    hidden_size=256,
    intermediate_size=704,
    trained_weights=6_900_000,
    total_weights=6_900_000,
)
PAIRS = PairSize(num_pairs=1000, prompt_tokens=125, chosen_tokens=41, rejected_tokens=52)
MACHINE = Machine(flops=2e11)


def plan(pairs=PAIRS, run=RunSize(), machine=MACHINE):  # noqa: B008 - frozen
    return plan_run(MODEL, pairs, run, machine, tokens_at_once=2048)


def test_operations_are_those_of_the_model():
    """Counted by hand and by torch, for rows without a branch: a prompt of one token, and everything is predicted."""
    config = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4
    )
    config._attn_implementation = "eager"  # whose products torch counts
    model = LlamaForCausalLM(config)
    layers = sum(p.numel() for p in model.model.layers.parameters() if p.ndim == 2)
    size = replace(MODEL, layer_weights=layers, head_weights=512 * 64, num_layers=3, hidden_size=64)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=torch.ones(1, 60, dtype=torch.long), use_cache=False)
    ours = forward_operations(size, PairSize(num_pairs=1, prompt_tokens=0, chosen_tokens=60, rejected_tokens=0))
    square = 4 * 3 * 64 * 60 * 60  # torch counts the scores that the mask hides too
    assert ours + square / 2 == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_growth():
    """Twice the pairs, twice the work; twice the tokens, twice the layers' work and a little more attention."""
    once, twice = plan(), plan(replace(PAIRS, num_pairs=2000))
    assert twice.seconds == pytest.approx(2 * once.seconds)
    longer = plan(replace(PAIRS, prompt_tokens=250))
    assert 1.5 < longer.seconds / once.seconds < 1.75
    assert plan(machine=replace(MACHINE, num_devices=8)).seconds == pytest.approx(once.seconds / 8)


def test_stages():
    """Each stage reads the pairs as often as it says."""
    run = RunSize(scorer="models", rounds=2, rho=0.2, num_candidates=4, new_tokens=50, num_train_epochs=1)
    stages = {stage.name: stage for stage in plan(run=run).stages}
    tokens = 218 * 1000
    assert stages["reference"].tokens == tokens
    assert stages["audit"].tokens == pytest.approx((4 + 3) * tokens)
    assert stages["rounds"].tokens == pytest.approx((2 + 2) * tokens)
    assert stages["rounds"].steps == 250
    assert stages["sampling"].tokens == pytest.approx(200 * 125 + 200 * 4 * 50)
    assert "audit" not in {stage.name for stage in plan(run=replace(run, num_folds=0)).stages}


def test_an_audit_by_features_is_part_of_the_reference_pass():
    """It trains nothing, and reads the pairs once if nobody else does."""
    found = plan(run=RunSize(scorer="features"))
    assert found.seconds == pytest.approx(plan(run=RunSize(num_folds=0)).seconds)
    assert "with the reference, " in found.sentence()
    alone = {stage.name: stage for stage in plan(run=RunSize(scorer="features", needs_reference=False)).stages}
    assert (alone["audit"].tokens, alone["audit"].steps) == (218 * 1000, 0)
    assert "reference" not in alone


def test_steps_that_are_given_are_given_to_each_training():
    stages = {
        stage.name: stage for stage in plan(run=RunSize(scorer="models", rounds=2, num_folds=5, max_steps=7)).stages
    }
    assert (stages["audit"].steps, stages["rounds"].steps) == (5 * 7, 2 * 7)


def test_memory():
    """Weights, gradients and optimizer; with an adapter only its own; more tokens at once, more activations."""
    adapter = replace(MODEL, trained_weights=0)
    whole = training_bytes(MODEL, MACHINE, tokens_at_once=0)
    assert whole == 16 * MODEL.total_weights
    assert training_bytes(adapter, MACHINE, tokens_at_once=0) == 4 * MODEL.total_weights
    more = training_bytes(MODEL, MACHINE, tokens_at_once=2048) - whole
    assert training_bytes(MODEL, MACHINE, tokens_at_once=4096) - whole == pytest.approx(2 * more)


def test_sentence():
    assert plan(run=RunSize(num_folds=0)).sentence().startswith("About ")
    assert "GiB" in plan().sentence()


def test_refusal():
    with pytest.raises(ValueError, match="num_pairs above 0"):
        plan(replace(PAIRS, num_pairs=0))
