"""How a launch keeps the numbers of a training: their precision, and who shards them.

In: a `ROPOConfig`, as a launcher and its files have completed it. Out: `Shards` and `Formats`.
"""

from typing import Any

import torch
from accelerate import FullyShardedDataParallelPlugin
from torch.distributed.fsdp import CPUOffloadPolicy

from ropo.config import ROPOConfig
from ropo.run.memory import Formats, Shards, num_states, quantized_bytes, state_bytes


def shards_of(args: ROPOConfig) -> Shards:
    """Over how many devices a launch distributes what training holds, by accelerate's plugins.

    Args:
        args: Options.
    """
    num_devices, plugin = max(1, args.world_size), args.deepspeed_plugin
    if plugin is not None:
        stage, zero = int(plugin.zero_stage), plugin.deepspeed_config.get("zero_optimization", {})
        live = zero.get("stage3_max_live_parameters", 1e9)
        offloads_weights = plugin.offload_param_device not in ("none", None)
        return Shards(
            weights=num_devices if stage == 3 else 1,
            gradients=num_devices if stage >= 2 else 1,
            optimizer=num_devices if stage >= 1 else 1,
            gathered_weights=int(1e9 if live == "auto" else live) if stage == 3 else 0,
            has_masters=True,
            offloads_optimizer=plugin.offload_optimizer_device not in ("none", None),
            offloads_weights=offloads_weights,
        )
    if args.sharding != "fsdp":
        return Shards(has_buckets=num_devices > 1)
    fsdp = _fsdp(args)
    after = getattr(fsdp.reshard_after_forward, "name", fsdp.reshard_after_forward)  # FSDP1 has names, FSDP2 a bool
    if after == "NO_SHARD":
        return Shards(has_buckets=True)
    policy = fsdp.cpu_offload  # FSDP1 has a flag in it, FSDP2 another class
    is_offloaded = isinstance(policy, CPUOffloadPolicy) or bool(getattr(policy, "offload_params", False))
    return Shards(
        weights=num_devices,
        gradients=num_devices,
        optimizer=num_devices,
        gathered_weights=0 if after in (True, "FULL_SHARD", "HYBRID_SHARD") else 2**62,
        offloads_weights=is_offloaded,
        offloads_optimizer=is_offloaded,
    )


def is_checkpointed(args: ROPOConfig) -> bool:
    """Whether layers run again in the backward pass, as `Trainer` or FSDP is asked for.

    Args:
        args: Options.
    """
    return bool(args.activation_checkpointing) or (args.sharding == "fsdp" and _fsdp(args).activation_checkpointing)


def _fsdp(args: ROPOConfig) -> Any:
    return FullyShardedDataParallelPlugin(**(getattr(args, "fsdp_plugin_args", None) or {}))


def formats_of(args: ROPOConfig, dtype: torch.dtype, quantization: Any = None) -> Formats:
    """How a training keeps its numbers.

    Args:
        args: Options.
        dtype: Of the weights as they are loaded.
        quantization: `BitsAndBytesConfig` of the base, if it is quantized.
    """
    found: Any = quantization if isinstance(quantization, dict) else getattr(quantization, "__dict__", {})
    bits = next((bits for bits in (4, 8) if found.get(f"load_in_{bits}bit") or found.get(f"_load_in_{bits}bit")), None)
    is_double = bool(found.get("bnb_4bit_use_double_quant"))
    optim = str(getattr(args.optim, "value", args.optim))
    return Formats(
        weight_bytes=dtype.itemsize,
        quantized_bytes=None if bits is None else quantized_bytes(bits, is_double=is_double),
        compute_bytes=2 if args.bf16 or args.fp16 else dtype.itemsize,
        num_states=num_states(optim),
        state_bytes=state_bytes(optim, 4 if bits else dtype.itemsize),
    )
