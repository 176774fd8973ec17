"""What one process can show of a run that shards weights; end_to_end/test_sharded.py starts several."""

import os
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.fsdp import FSDPModule
from transformers.integrations import deepspeed

from ropo.config import ROPOConfig
from ropo.data.tokenize import tokenize_pairs
from ropo.logps import score
from ropo.logps.batch import Batching, batches_by_length
from ropo.logps.choose import choose_layout
from ropo.logps.score import score_pairs
from ropo.logps.sharded import WholeTensors, class_of, device_of, is_sharded
from ropo.logps.tree_attention import NAME
from ropo.models.sharding import ENDED, forget_engines, loads_in_parts, local_part, whole_models
from ropo.provenance import hash_tensors
from ropo.run import checks
from ropo.run.checks import check_run
from ropo.train import sharding
from ropo.train.dataset import prepare_datasets
from ropo.train.sharding import check_sharding, let_go, settle, sharder

FLAG = "FSDP_CPU_RAM_EFFICIENT_LOADING"


class Zero3Config:
    """What `transformers` asks of the settings of DeepSpeed."""

    config: dict = {}  # noqa: RUF012

    def is_zero3(self):
        return True


@pytest.fixture
def zero3():
    config = Zero3Config()
    deepspeed.set_hf_deepspeed_config(config)
    yield config
    deepspeed.unset_hf_deepspeed_config()


def config(**options):
    return ROPOConfig(output_dir="O", use_cpu=True, disable_tqdm=True, **options)


def test_one_process_shards_nothing(model):
    assert not loads_in_parts()
    assert sharder(config(fsdp=True)) is None
    assert not is_sharded(model)
    assert device_of(model).type == "cpu"
    assert Batching(pad_token_id=0).sharded(model) is model


def test_models_that_one_process_builds_are_whole(zero3, monkeypatch):
    """Under ZeRO-3 `transformers` would wait for the other processes, of which none builds any."""
    monkeypatch.setenv(FLAG, "true")
    assert loads_in_parts()
    with whole_models():
        assert not loads_in_parts()
        assert os.environ[FLAG] == "false"
    assert loads_in_parts()
    assert deepspeed._hf_deepspeed_config_weak_ref() is zero3
    assert os.environ[FLAG] == "true"


def test_a_whole_model_hashes_as_its_state_dict(model):
    """Caches of a sharded reference and of one process are the same."""
    assert hash_tensors(WholeTensors(model)) == hash_tensors(model.state_dict())
    engine = torch.nn.Module()
    engine.module = model
    assert hash_tensors(WholeTensors(engine)) == hash_tensors(model.state_dict())


def test_the_class_is_that_before_sharding(model):
    kind = type(model)
    model.__class__ = type("FSDPModel", (FSDPModule, kind), {})
    assert class_of(model) is kind
    assert is_sharded(model)  # also within a forward, where the weights are whole


@pytest.mark.parametrize(("rank", "expected"), [(0, [0.0, 1.0, 2.0]), (1, [3.0, 4.0])])
def test_the_end_of_the_last_part_is_no_weight(rank, expected, monkeypatch):
    """ZeRO-3 fills the last part up with anything, NaN as well."""
    monkeypatch.setenv("RANK", str(rank))
    weight, parts = torch.zeros(0), torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, float("nan")]).split(3)
    weight.ds_tensor, weight.ds_numel = parts[rank], 5
    assert local_part(weight).tolist() == expected


def test_processes_of_a_sharded_model_run_as_many_passes(model, pairs, tokenizer, monkeypatch):
    """One with a smaller share helps the others along; what it computes then counts nowhere."""
    tokens = tokenize_pairs(pairs, tokenizer, max_length=128).tokens
    forward, passes, gathered = score._forward_if_it_fits, [], []
    monkeypatch.setattr(score, "is_sharded", lambda _: True)
    everything = [(i, 0.0, 0.0, 1, 1) for i in range(len(tokens))]
    monkeypatch.setattr(score, "gather_object", lambda rows: gathered.append(rows) or everything)
    monkeypatch.setattr(score, "_forward_if_it_fits", lambda *given: passes.append(1) or forward(*given))
    counts = []
    for rank in range(3):
        monkeypatch.setattr(score, "PartialState", lambda r=rank: state(r))
        passes.clear()
        score_pairs(model, tokens, Batching(pad_token_id=0, max_tokens=100))
        counts.append(len(passes))
    assert counts[0] == counts[1] == counts[2] > 1
    assert sorted(row[0] for rows in gathered for row in rows) == list(range(len(tokens)))
    assert len(list(batches_by_length([len(pair) for pair in tokens], max_tokens=100))) % 3


def state(rank):
    return SimpleNamespace(process_index=rank, num_processes=3, is_main_process=rank == 0)


def test_a_batch_that_does_not_fit_is_not_halved_where_others_wait(model, pairs, tokenizer, monkeypatch):
    def small(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    tokens = tokenize_pairs(pairs, tokenizer, max_length=128).tokens
    layout, _ = choose_layout(model, tokens, pad_token_id=0)
    monkeypatch.setattr(score, "choose_layout", lambda *_, **__: (layout, "the test says so"))
    monkeypatch.setattr(score, "FORWARDS", {layout: small})
    monkeypatch.setattr(score, "is_sharded", lambda _: True)
    with pytest.raises(torch.OutOfMemoryError, match="CUDA"):
        score_pairs(model, tokens, Batching(pad_token_id=0))


def test_a_layout_is_chosen_without_weights(model, pairs, tokenizer):
    tokens = tokenize_pairs(pairs, tokenizer, max_length=128).tokens
    meta = model.to("meta")
    layout, reason = choose_layout(meta, tokens, pad_token_id=0, has_weights=False)
    assert (layout, meta.config._attn_implementation) == ("packed", NAME)
    assert "small copy" in reason


@pytest.mark.parametrize(("version", "is_refused"), [("1", True), ("2", False), (None, True)])
def test_the_earlier_fsdp_is_refused(version, is_refused, monkeypatch):
    args = config()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.delenv("FSDP_VERSION", raising=False)
    if version is not None:
        monkeypatch.setenv("FSDP_VERSION", version)
    check_sharding(args)  # one process
    monkeypatch.setattr(sharding, "PartialState", lambda: SimpleNamespace(num_processes=2))
    if is_refused:
        with pytest.raises(ValueError, match="fsdp needs version 2; got 1"):
            check_sharding(args)
    else:
        check_sharding(args)
        assert sharder(args) is not None


def test_sampling_in_processes_with_parts_is_refused(monkeypatch):
    args = config(num_candidates=2, rounds=2)
    check_run(args, has_evaluation=False)
    monkeypatch.setattr(checks, "sharder", lambda _: lambda model: model)
    with pytest.raises(ValueError, match=r"generation_engine transformers needs the whole model .* num_candidates 2"):
        check_run(args, has_evaluation=False)


def test_every_training_has_settings_of_deepspeed_of_its_own(tmp_path):
    """Those of the run are not filled in by its first training."""
    args = config()
    args.deepspeed_plugin = SimpleNamespace(deepspeed_config={"train_batch_size": "auto"})
    args.hf_deepspeed_config = args.deepspeed_plugin
    made = args.of_stage(tmp_path)
    made.deepspeed_plugin.deepspeed_config["train_batch_size"] = 8
    assert args.deepspeed_plugin.deepspeed_config == {"train_batch_size": "auto"}
    assert made.hf_deepspeed_config is made.deepspeed_plugin


def test_zero3_saves_whole_models():
    plugin = SimpleNamespace(deepspeed_config={"zero_optimization": {"stage": 3}})
    settle(SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin)))
    assert plugin.deepspeed_config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"]


def test_a_training_of_deepspeed_is_let_go(model):
    let_go(model)  # of others nothing is asked
    calls = []
    engine = SimpleNamespace(destroy=lambda: calls.append(1))
    let_go(engine)
    assert calls == [1]
    assert [engine] == ENDED
    ENDED.clear()


def test_a_trainer_of_zero3_scores_nothing(zero3, model, tokenizer, pairs):
    with pytest.raises(ValueError, match="ROPOTrainer needs reference log-probabilities"):
        prepare_datasets(pairs, None, model, tokenizer, config(), needs_reference=True)


def test_models_of_earlier_engines_are_let_go(monkeypatch):
    offload = SimpleNamespace(FWD_MODULE_STACK=["a model"])
    monkeypatch.setitem(sys.modules, "deepspeed.runtime.zero.parameter_offload", offload)
    engine = torch.nn.Linear(2, 2)
    engine.optimizer = SimpleNamespace(state=1)
    engine.weight.ds_tensor = part = torch.zeros(2)
    ENDED.append(engine)
    forget_engines()
    assert offload.FWD_MODULE_STACK == ENDED == []
    assert vars(engine.optimizer) == {}
    assert part.numel() == engine.weight.numel() == engine.bias.numel() == 0
