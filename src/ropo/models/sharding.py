"""Models that are loaded in parts: by FSDP2 or DeepSpeed's ZeRO-3, which share out the weights over the processes.

In: how a run was launched. Out: whether models are loaded in parts; a context for models that one process builds alone;
the part of a weight that is here.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers.integrations import deepspeed
from transformers.integrations.fsdp import is_fsdp_enabled

_RAM_EFFICIENT = "FSDP_CPU_RAM_EFFICIENT_LOADING"  # read by `transformers` when it loads a model


def loads_in_parts() -> bool:
    """Whether a model that is loaded now is not whole, or not in every process."""
    return bool(deepspeed.is_deepspeed_zero3_enabled() or is_fsdp_enabled())


@contextlib.contextmanager
def whole_models() -> Iterator[None]:
    """Within it `transformers` builds models in this process alone.

    Otherwise a model that is built under ZeRO-3 is partitioned on the way, for which it waits for all processes.
    """
    flag = os.environ.get(_RAM_EFFICIENT)
    os.environ[_RAM_EFFICIENT] = "false"
    try:
        with zero_config_kept():
            deepspeed.unset_hf_deepspeed_config()
            yield
    finally:
        del os.environ[_RAM_EFFICIENT]
        if flag is not None:
            os.environ[_RAM_EFFICIENT] = flag


@contextlib.contextmanager
def zero_config_kept() -> Iterator[None]:
    """At its end models are loaded by the settings of DeepSpeed by which they were at its begin.

    `transformers` holds them by a weak reference, and replaces them with those of each training.
    """
    held = deepspeed._hf_deepspeed_config_weak_ref
    config = None if held is None else held()
    try:
        yield
    finally:
        if config is not None:
            deepspeed.set_hf_deepspeed_config(config)


ENDED: list[Any] = []
"""Engines of DeepSpeed that nobody uses any more when the next model is loaded."""


def forget_engines() -> None:
    """Let go of what earlier engines hold.

    DeepSpeed keeps the root on its list of forward passes under way, and an engine that has run more than once lives on
    as well, with its optimizer; so both are emptied.
    """
    if found := sys.modules.get("deepspeed.runtime.zero.parameter_offload"):
        found.FWD_MODULE_STACK.clear()
    while ENDED:
        engine = ENDED.pop()
        for weight in engine.parameters():
            for held in (weight, getattr(weight, "ds_tensor", weight)):
                held.data, held.grad = held.data.new_empty(0), None
        for optimizer in (engine.optimizer, getattr(engine, "basic_optimizer", None)):
            if optimizer is not None:
                vars(optimizer).clear()


def local_part(weight: Tensor) -> Tensor:
    """What this process holds of a weight, flat under ZeRO-3; the weight itself where it is whole.

    Args:
        weight: A parameter.
    """
    if isinstance(weight, DTensor):
        return weight.to_local()
    part = getattr(weight, "ds_tensor", None)
    if part is None or weight.numel():  # gathered at the moment, or small enough to stay whole
        return weight
    # Parts are of one length; what fills up the last one is any number.
    rank, num_all = int(os.environ.get("RANK", "0")), int(weight.ds_numel)  # type: ignore[attr-defined]
    here: Tensor = part[: max(min(num_all - rank * part.numel(), part.numel()), 0)]
    return here
