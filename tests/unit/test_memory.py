"""Bytes of a training: counted as PyTorch, PEFT, bitsandbytes, FSDP and DeepSpeed keep them."""

import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    BitsAndBytesConfig,
    Gemma2Config,
    Gemma3nTextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MixtralConfig,
    MixtralForCausalLM,
)

from ropo import ROPOConfig
from ropo.logps.shared_prefix import FORWARDS, enable_response_logps
from ropo.run import formats
from ropo.run.activations import Kept, Pass, _Batch, kept_for_backward
from ropo.run.memory import Formats, Memory, Shards, scoring_memory, training_memory
from ropo.run.plan import ModelSize

WHOLE = ModelSize(
    layer_weights=8_000, last_mlp_weights=500, head_weights=1_000, num_layers=8, hidden_size=10, intermediate_size=30,
    trained_weights=10_000, total_weights=10_000,
)  # fmt: skip
ADAPTER = replace(WHOLE, trained_weights=100)
CONFIG = LlamaConfig(
    vocab_size=300, hidden_size=32, intermediate_size=80, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2,
)  # fmt: skip
STEP = Pass(num_tokens=64, num_read=10, is_plain=False, use_bf16=False, is_checkpointed=False, device="cpu")
LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


def memory(model=WHOLE, shards=Shards(), activations=0.0, **given):  # noqa: B008 - frozen
    return training_memory(model, Formats(**given), shards, activations=activations)


def test_one_device_holds_weights_gradients_and_two_states():
    assert memory(activations=7) == Memory(weights=40_000, gradients=40_000, optimizer=80_000, activations=7)
    assert memory(activations=7).total == 160_007


@pytest.mark.parametrize(
    ("optim", "dtype", "expected"),
    [
        ("adamw_torch_fused", torch.float32, 80_000),
        ("adamw_torch_fused", torch.bfloat16, 40_000),
        ("adamw_8bit", torch.float32, 20_000),
        ("paged_adamw_32bit", torch.bfloat16, 80_000),
        ("adafactor", torch.float32, 0),
        ("sgd", torch.float32, 0),
        ("lion_8bit", torch.float32, 10_000),
        ("rmsprop", torch.float32, 40_000),
    ],
)
def test_optimizers(optim, dtype, expected, tmp_path):
    args = ROPOConfig(output_dir=str(tmp_path), use_cpu=True, optim=optim)
    found = training_memory(WHOLE, formats.formats_of(args, dtype), Shards(), activations=0)
    assert found.optimizer == expected


@pytest.mark.parametrize(
    ("shards", "weights", "gradients", "optimizer"),
    [
        (Shards(has_buckets=True), 40_000, 80_000, 80_000),
        # Two of eight layers and what lies outside are gathered, in the two bytes that they compute in.
        (Shards(weights=4, gradients=4, optimizer=4), 10_000 + 2 * 4_000, 10_000, 20_000),
        (Shards(weights=4, gradients=4, optimizer=4, gathered_weights=10**9), 10_000 + 20_000, 10_000, 20_000),
        (Shards(gradients=4, optimizer=4, has_masters=True), 40_000, 10_000, 20_000 + 10_000),
    ],
    ids=["ddp", "fsdp", "zero3", "zero2"],
)
def test_shards(shards, weights, gradients, optimizer):
    found = memory(shards=shards, compute_bytes=2)
    assert (found.weights, found.gradients, found.optimizer) == (weights, gradients, optimizer)


def test_what_is_offloaded_is_on_the_host():
    shards = Shards(weights=4, gradients=4, optimizer=4, offloads_optimizer=True)
    found = memory(shards=shards)
    assert (found.optimizer, found.host) == (0, 20_000)
    everything = memory(shards=replace(shards, offloads_weights=True))
    assert (everything.weights, everything.gradients) == (4 * 4_000, 0)
    assert everything.host == 20_000 + 10_000 + 10_000


def test_an_adapter_of_a_quantized_base(tmp_path):
    """The layers in half a byte and their factors, the rest in two, the adapter in float32."""
    args = ROPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=True)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=True)
    for given in (config, config.to_dict()):
        found = training_memory(ADAPTER, formats.formats_of(args, torch.bfloat16, given), Shards(), activations=0)
        assert found.weights == pytest.approx(8_000 * 0.516 + 2_000 * 2 + 100 * 4, rel=1e-3)
        assert (found.gradients, found.optimizer) == (400, 800)
    eight = formats.formats_of(args, torch.bfloat16, BitsAndBytesConfig(load_in_8bit=True))
    assert training_memory(ADAPTER, eight, Shards(), activations=0).weights == 8_000 + 4_000 + 400


def test_scoring_holds_no_gradients():
    found = scoring_memory(ADAPTER, Formats(), Shards(), activations=5)
    assert found == Memory(weights=40_400, activations=5)


def test_fsdp_by_the_environment(monkeypatch):
    """As `accelerate launch` leaves it."""
    args = SimpleNamespace(world_size=4, deepspeed_plugin=None, sharding="fsdp", fsdp_plugin_args=None)
    for name, value in {"FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}.items():
        monkeypatch.setenv(name, value)
    assert formats.shards_of(args) == Shards(weights=4, gradients=4, optimizer=4)
    monkeypatch.setenv("FSDP_RESHARD_AFTER_FORWARD", "false")
    assert formats.shards_of(args).gathered_weights > 10**12
    args.activation_checkpointing = False
    assert not formats.is_checkpointed(args)
    monkeypatch.setenv("FSDP_ACTIVATION_CHECKPOINTING", "true")
    assert formats.is_checkpointed(args)
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "true")
    assert formats.shards_of(args).offloads_weights


@pytest.mark.parametrize(("stage", "shared"), [(1, (1, 1, 4)), (2, (1, 4, 4)), (3, (4, 4, 4))])
def test_stages_of_zero(stage, shared):
    plugin = SimpleNamespace(
        zero_stage=stage, offload_optimizer_device="cpu", offload_param_device="none",
        deepspeed_config={"zero_optimization": {"stage": stage}},
    )  # fmt: skip
    found = formats.shards_of(SimpleNamespace(world_size=4, deepspeed_plugin=plugin, sharding="deepspeed"))
    assert (found.weights, found.gradients, found.optimizer) == shared
    assert (found.has_masters, found.offloads_optimizer, found.offloads_weights) == (True, True, False)
    assert found.gathered_weights == (10**9 if stage == 3 else 0)


def test_several_processes_without_shards_copy_their_gradients():
    assert formats.shards_of(SimpleNamespace(world_size=2, deepspeed_plugin=None, sharding="none")).has_buckets


def saved_in_earnest(num_layers, adapter, step):
    """What autograd keeps of a model that has memory."""
    model = LlamaForCausalLM(LlamaConfig(**{**CONFIG.to_dict(), "num_hidden_layers": num_layers}))
    if adapter is not None:
        model = get_peft_model(model, adapter)
    enable_response_logps(model)
    weights, found = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=step.use_bf16),
    ):
        batch = _Batch(4, 128, step.num_read).tensors()
        batch["attention_mask"][0, -1] = 0  # padding, without which there would be no mask
        FORWARDS["plain_rows"](model, batch)
    return sum(storage.nbytes() for storage in found.values())


@pytest.mark.parametrize("adapter", [None, LORA], ids=["whole", "adapter"])
@pytest.mark.parametrize("use_bf16", [False, True])
def test_activations_are_those_that_autograd_keeps(adapter, use_bf16):
    """Of one and two layers without memory, and of four with."""
    step = Pass(num_tokens=512, num_read=200, use_bf16=use_bf16)
    kept = kept_for_backward(LlamaForCausalLM, CONFIG, step, dtype=torch.float32, peft_config=adapter)
    counted = kept.bytes(4, is_checkpointed=False) - kept.head
    assert counted == pytest.approx(saved_in_earnest(4, adapter, step), rel=0.02)


def test_a_large_model_takes_no_memory_to_count():
    large = LlamaConfig(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64)
    kept = kept_for_backward(
        LlamaForCausalLM, large, Pass(num_tokens=4096, num_read=2048), dtype=torch.bfloat16, peft_config=LORA
    )
    assert 1e9 < kept.layer < 4e9
    assert kept.hidden == 4096 * 8192 * 2


def test_layers_that_run_again_keep_their_inputs():
    kept = Kept(layer=100, outside=7, hidden=3, head=50)
    assert kept.bytes(10, is_checkpointed=False) == 1057
    assert kept.bytes(10, is_checkpointed=True) == 30 + 100 + 7


@pytest.mark.parametrize(
    "config",
    [
        MambaConfig(hidden_size=32, num_hidden_layers=4, vocab_size=300),
        Gemma2Config(hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, head_dim=8,
                     num_key_value_heads=2, vocab_size=300),
        Gemma3nTextConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=4, head_dim=8,
                          num_key_value_heads=2, vocab_size=300, vocab_size_per_layer_input=300, laurel_rank=4,
                          hidden_size_per_layer_input=8, num_kv_shared_layers=2),
    ],
    ids=["layers follow from their number", "no sdpa", "layers share keys"],
)  # fmt: skip
def test_families_with_layers_of_their_own_are_counted(config):
    kept = kept_for_backward(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], config, STEP, dtype=torch.float32)
    assert kept.layer > 0


def test_what_cannot_be_counted_logs_no_traceback(caplog):
    config = MixtralConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=300,
    )  # fmt: skip
    torchs = logging.getLogger("torch._subclasses.fake_tensor")
    torchs.addHandler(caplog.handler)
    try:
        with pytest.raises(RuntimeError):
            kept_for_backward(MixtralForCausalLM, config, STEP, dtype=torch.float32)
    finally:
        torchs.removeHandler(caplog.handler)
    assert not caplog.records
