"""The planner counts what is really computed, and its costs grow as they must."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from ropo.run.plan import Machine, ModelSize, PairSize, RunSize, forward_operations, plan_stages
from ropo_bench.rows import read_rows

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
    return {stage.name: stage for stage in plan_stages(MODEL, pairs, run, machine)}


def seconds(**given):
    return sum(stage.seconds for stage in plan(**given).values())


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
    once = seconds()
    assert seconds(pairs=replace(PAIRS, num_pairs=2000)) == pytest.approx(2 * once)
    assert 1.5 < seconds(pairs=replace(PAIRS, prompt_tokens=250)) / once < 1.75
    assert seconds(machine=replace(MACHINE, num_devices=8)) == pytest.approx(once / 8)


def test_stages():
    """Each stage reads the pairs as often as it says."""
    run = RunSize(scorer="models", rounds=2, rho=0.2, num_candidates=4, new_tokens=50, num_train_epochs=1)
    stages, tokens = plan(run=run), 218 * 1000
    assert stages["reference"].tokens == tokens
    assert stages["audit"].tokens == pytest.approx((4 + 3) * tokens)
    assert stages["rounds"].tokens == pytest.approx((2 + 2) * tokens)
    assert stages["rounds"].steps == 250
    assert stages["sampling"].tokens == pytest.approx(200 * 125 + 200 * 4 * 50)
    assert "audit" not in plan(run=replace(run, num_folds=0))


def test_an_audit_by_features_reads_the_pairs_in_the_reference_pass():
    """It trains nothing, reads the pairs once if nobody else does, and adds the projected gradient of each response."""
    audit = plan(run=RunSize(scorer="features"))["audit"]
    of_features = 1000 * 2 * (41 + 52) * (1_000_000 / 256) * 64
    assert (audit.tokens, audit.steps) == (0, 0)
    assert audit.seconds == pytest.approx(of_features / 1e11)
    alone = plan(run=RunSize(scorer="features", needs_reference=False))
    assert (alone["audit"].tokens, alone["audit"].steps) == (218 * 1000, 0)
    assert "reference" not in alone


def test_each_kind_of_pass_has_a_speed_of_its_own():
    run = RunSize(num_folds=0, rounds=2, rho=0.2, num_candidates=4, new_tokens=50)
    before = plan(run=run)
    scoring = plan(run=run, machine=replace(MACHINE, scoring_flops=2e11))
    sampling = plan(run=run, machine=replace(MACHINE, sampling_flops=1e9))
    assert scoring["reference"].seconds == pytest.approx(before["reference"].seconds / 2)
    assert scoring["rounds"].seconds == pytest.approx(before["rounds"].seconds * 7 / 8)  # 3 + 1 parts, one of them half
    assert sampling["sampling"].seconds > 20 * before["sampling"].seconds
    assert sampling["rounds"] == before["rounds"]


def test_what_is_not_arithmetic_is_added():
    run, once = RunSize(num_folds=0, rounds=2), plan(run=RunSize(num_folds=0, rounds=2))
    machine = replace(MACHINE, step_seconds=2, load_seconds=100, run_seconds=5, pair_seconds=0.001)
    slow = plan(run=run, machine=machine)
    assert slow["rounds"].seconds - once["rounds"].seconds == pytest.approx(250 * 2 + 4 * 100)
    assert slow["report"].seconds == pytest.approx(5 + 1)


def test_linear_models_take_what_was_measured():
    for row in read_rows(Path(__file__).parents[2] / "benchmarks" / "audit_cost.csv"):
        pairs = replace(PAIRS, num_pairs=int(row["pairs"]))
        both = [seconds(pairs=pairs, machine=replace(MACHINE, has_linear_audit=has)) for has in (True, False)]
        assert both[0] - both[1] == pytest.approx(float(row["linear_s"]), rel=0.25)


def test_steps_that_are_given_are_given_to_each_training():
    stages = plan(run=RunSize(scorer="models", rounds=2, num_folds=5, max_steps=7))
    assert (stages["audit"].steps, stages["rounds"].steps) == (5 * 7, 2 * 7)


def test_refusal():
    with pytest.raises(ValueError, match="num_pairs above 0"):
        plan(replace(PAIRS, num_pairs=0))
