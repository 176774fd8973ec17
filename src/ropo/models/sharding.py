"""Models that are loaded in parts: by FSDP2 or DeepSpeed's ZeRO-3, which share out the weights over the processes.

In: how a run was launched. Out: whether models are loaded in parts; a context for models that one process builds alone;
the part of a weight that is here.
"""

import contextlib
import os
import sys
from collections.abc import Iterator

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


def forget_roots() -> None:
    """Let go of the models of earlier engines, which ZeRO-3 keeps on its list of forward passes under way."""
    if found := sys.modules.get("deepspeed.runtime.zero.parameter_offload"):
        found.FWD_MODULE_STACK.clear()


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
