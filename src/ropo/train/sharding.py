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
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from ropo.models.sharding import ENDED, zero_config_kept
from ropo.train.options import TrainOptions


def check_sharding(args: TrainOptions) -> None:
    """Refuse the earlier FSDP, which hands out weights flattened and in another order.

    Args:
        args: Options.

    Raises:
        ValueError: If that is what was asked for.
    """
    if args.sharding != "fsdp" or PartialState().num_processes == 1:
        return
    version = (args.fsdp_plugin_args or {}).get("fsdp_version", os.environ.get("FSDP_VERSION", "1"))
    if int(version) != 2:
        raise ValueError(
            f"fsdp needs version 2; got {version}. Set fsdp_version: 2 in the configuration of accelerate "
            "(FSDP_VERSION=2), or leave version out of fsdp_config."
        )


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
    if hasattr(model, "zero_optimization_stage"):  # an engine already
        return model
    plugin: Any = copy.deepcopy(args.deepspeed_plugin)
    for name in ("optimizer", "scheduler", "train_batch_size"):  # of a training
        plugin.deepspeed_config.pop(name, None)
    plugin.deepspeed_config |= {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
    with another_accelerator():
        engine: nn.Module = Accelerator(deepspeed_plugin=plugin).prepare(model)
    engine.eval()  # which returns nothing
    ENDED.append(engine)
    return engine


def let_go(model: Any) -> None:
    """Let go of what a training has made of a model, once it is saved.

    DeepSpeed's optimizer and the weights hold each other by hooks that Python's garbage collection does not see.

    Args:
        model: As it was trained.
    """
    if hasattr(model, "destroy"):
        model.destroy()
        ENDED.append(model)


@contextlib.contextmanager
def another_accelerator() -> Iterator[None]:
    """Within it an `Accelerator` may be given settings of DeepSpeed, although this process has made one before.

    Each training has settings of its own, since they are filled in on the way.
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
    if fsdp is not None and getattr(policy, "output_dtype", None) is not None:
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
