"""What FSDP2 and DeepSpeed's ZeRO-3 need of a run that scores as well as trains.

In: a `TrainOptions`, a model as it was loaded. Out: the model in parts, fit for scoring; settings of `accelerate`
changed where a training of preferences needs others.
"""

import contextlib
import copy
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.fsdp import FSDPModule, StateDictType
from transformers.integrations import is_deepspeed_zero3_enabled

from ropo.models.sharding import zero_config_kept
from ropo.train.options import TrainOptions


def load_in_parts(args: TrainOptions) -> None:
    """Have models loaded in parts from here on, where a launch shards them.

    `accelerate` says so to `transformers` only when the first training begins, and by then the reference has been
    loaded.

    Args:
        args: Options.
    """
    if args.sharding == "fsdp" and PartialState().num_processes > 1:
        os.environ["ACCELERATE_USE_FSDP"] = "true"
        os.environ.setdefault("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")


def sharder(args: TrainOptions) -> Callable[[Any], nn.Module] | None:
    """What gives each process its part of a loaded model; None where every process holds the whole.

    Args:
        args: Options.
    """
    if is_deepspeed_zero3_enabled():
        return partial(_by_deepspeed, args)
    if args.sharding == "fsdp" and PartialState().num_processes > 1:
        return partial(_by_fsdp, args)
    return None


def _by_fsdp(args: TrainOptions, model: nn.Module) -> nn.Module:
    if isinstance(model, FSDPModule):
        return model
    plugin = None if args.fsdp_plugin_args is None else FullyShardedDataParallelPlugin(**args.fsdp_plugin_args)
    accelerator = Accelerator(mixed_precision=args.mixed_precision, fsdp_plugin=plugin)
    settle(accelerator)
    # It shards a model only together with an optimizer; this one makes no step and holds nothing.
    sharded, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.0))
    found: nn.Module = sharded.eval()
    return found


def _by_deepspeed(args: TrainOptions, model: nn.Module) -> nn.Module:
    import deepspeed  # noqa: PLC0415 - only where a launch uses it

    if isinstance(model, deepspeed.DeepSpeedEngine):
        return model
    wanted = copy.deepcopy(args.deepspeed_plugin.deepspeed_config)
    kept = {name: wanted[name] for name in ("zero_optimization", "bf16", "fp16") if name in wanted}
    # Sizes of buffers that `Trainer` derives from the model are left to their defaults.
    kept["zero_optimization"] = {name: value for name, value in kept["zero_optimization"].items() if value != "auto"}
    config = {**kept, "train_micro_batch_size_per_gpu": 1}
    engine, *_ = deepspeed.initialize(model=model, config=config)
    engine.eval()  # which returns nothing
    found: nn.Module = engine
    return found


@contextlib.contextmanager
def one_more_training() -> Iterator[None]:
    """Within it a `Trainer` may be made, although this process has made one before.

    `accelerate` takes the settings of DeepSpeed once, and each training has its own.
    """
    if PartialState().distributed_type == DistributedType.DEEPSPEED:
        AcceleratorState._reset_state()
    with zero_config_kept():
        yield


def settle(accelerator: Accelerator) -> None:
    """Change the settings with which numbers would be rounded or nothing saved.

    Args:
        accelerator: Before it has prepared a model.
    """
    fsdp, deepspeed = (getattr(accelerator.state, f"{name}_plugin", None) for name in ("fsdp", "deepspeed"))
    # FSDP2 would hand out log-probabilities in half precision, a tenth of a nat from what they are.
    policy: Any = getattr(fsdp, "mixed_precision_policy", None)
    if getattr(policy, "output_dtype", None) is not None:
        fsdp.mixed_precision_policy = replace(policy, output_dtype=None)
    if deepspeed is not None:  # else `Trainer` saves no model of ZeRO-3, but a checkpoint that only DeepSpeed reads
        deepspeed.deepspeed_config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True


@contextlib.contextmanager
def whole_weights(plugin: Any) -> Iterator[None]:
    """Within it FSDP saves whole weights: `Trainer` writes none at all where shards are asked for."""
    if plugin is None:
        yield
        return
    before, plugin.state_dict_type = plugin.state_dict_type, StateDictType.FULL_STATE_DICT
    try:
        yield
    finally:
        plugin.state_dict_type = before
