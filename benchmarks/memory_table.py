"""Memory that training needs on each device, by size of the model, way of training and number of devices.

    python benchmarks/memory_table.py    # prints the table of docs/performance.md

Nothing here is measured: the functions are those of the forecast, which `benchmarks/forecast.py` compares with runs on
a CPU. Shapes are those that the models' authors publish. Each device takes one pass of 4 pairs of 512 + 2 x 256 tokens
at a time, several in a step, under bfloat16 with activation checkpoints; several devices shard by FSDP2. Full training
keeps float32 weights and AdamW's states; LoRA has rank 16 on all linear layers of a bfloat16 base, QLoRA of one in 4
bits with double quantization.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import cache

import torch
from peft import LoraConfig
from transformers import LlamaConfig, Qwen2Config

from ropo.run.activations import Kept, Pass, kept_for_backward, with_layers
from ropo.run.forecast import class_of, memory_of, model_size
from ropo.run.memory import Formats, Memory, Shards, quantized_bytes
from ropo.run.plan import ModelSize

NUM_DEVICES = (1, 8, 64)
STEP = Pass(num_tokens=4 * 1024, num_read=4 * 512, use_bf16=True, is_checkpointed=True, device="cuda")
MODELS = {
    "Llama 3.2 1B": LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, tie_word_embeddings=True,
    ),
    "Qwen 2.5 7B": Qwen2Config(
        vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, tie_word_embeddings=False,
    ),
    "Llama 3 70B": LlamaConfig(
        vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8, tie_word_embeddings=False,
    ),
}  # fmt: skip
WAYS: Mapping[str, Formats] = {
    "full": Formats(compute_bytes=2),
    "LoRA": Formats(weight_bytes=2, compute_bytes=2),
    "QLoRA": Formats(weight_bytes=2, compute_bytes=2, quantized_bytes=quantized_bytes(4, is_double=True)),
}


@cache
def _size(name: str, *, has_adapter: bool) -> ModelSize:
    """Counted with one and two layers, since all are alike."""
    adapter = _adapter(has_adapter=has_adapter)
    one, two = (model_size(with_layers(MODELS[name], number), adapter) for number in (1, 2))
    num_layers = MODELS[name].num_hidden_layers

    def grown(of_two: int, of_one: int) -> int:
        return of_one + (num_layers - 1) * (of_two - of_one)

    return replace(
        two,
        num_layers=num_layers,
        layer_weights=grown(two.layer_weights, one.layer_weights),
        trained_weights=grown(two.trained_weights, one.trained_weights),
        total_weights=grown(two.total_weights, one.total_weights),
    )


@cache
def _kept(name: str, dtype: torch.dtype, *, has_adapter: bool) -> Kept:
    config = MODELS[name]
    return kept_for_backward(class_of(config), config, STEP, dtype=dtype, peft_config=_adapter(has_adapter=has_adapter))


def _adapter(*, has_adapter: bool) -> LoraConfig | None:
    return LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM") if has_adapter else None


def memory(name: str, way: str, num_devices: int) -> Memory:
    """Of one device."""
    has_adapter = way != "full"
    # A whole float32 model is cast for each pass; shards are gathered in bfloat16.
    kept = _kept(name, torch.float32 if way == "full" and num_devices == 1 else torch.bfloat16, has_adapter=has_adapter)
    shards = Shards(weights=num_devices, gradients=num_devices, optimizer=num_devices)
    size = _size(name, has_adapter=has_adapter)
    return memory_of(size, WAYS[way], shards, kept, STEP, num_passes=2)


def table() -> str:
    """GB of each device; by kind on eight."""
    lines = [
        "| model | training | 1 device | 8 devices | 64 devices | 8: weights | gradients | optimizer | activations |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in MODELS:
        for way in WAYS:
            found = [memory(name, way, num) for num in NUM_DEVICES]
            kinds = [getattr(found[1], kind) for kind in ("weights", "gradients", "optimizer", "activations")]
            cells = [f"{value / 1e9:,.1f}" for value in (*(one.total for one in found), *kinds)]
            lines.append(f"| {name} | {way} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
