"""Models of which every process holds a part: sharded by FSDP2, or by DeepSpeed's ZeRO-3.

In: a causal language model, wrapped or not. Out: whether it is sharded, where its inputs go, its whole tensors.

The one idea: each forward pass of such a model gathers its weights layer by layer, and every process takes part. So all
processes run the same number of forward passes, and what is asked of the weights is asked by all of them together.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def is_part(tensor: Tensor) -> bool:
    """Whether a parameter is held in parts: a DTensor of FSDP2, or partitioned by ZeRO-3."""
    return isinstance(tensor, DTensor) or hasattr(tensor, "ds_id")


def is_sharded(model: nn.Module) -> bool:
    """Whether each process holds a part of a model's weights, or of a module's; FSDP2's are whole within a forward."""
    return isinstance(model, FSDPModule) or any(is_part(parameter) for parameter in model.parameters())


def device_of(model: nn.Module) -> torch.device:
    """Where the inputs of a model go; weights that are sharded may be on the CPU, or yet to come.

    Args:
        model: With or without weights.
    """
    first = next(model.parameters())
    return torch.device(PartialState().device) if is_part(first) or first.is_meta else first.device


def class_of(model: nn.Module) -> type[nn.Module]:
    """The class that a model was made as: FSDP2 makes a class of its own of each."""
    kinds: Any = type(model).__mro__
    found: type[nn.Module] = next(kind for kind in kinds if not issubclass(kind, FSDPModule))
    return found


class WholeTensors(Mapping[str, Tensor]):
    """The state dict of a model as one process would have it, gathered tensor by tensor as it is read.

    Every process reads it to the end, in the same order; no two tensors are held at once.

    Args:
        model: Sharded or not.
    """

    def __init__(self, model: nn.Module) -> None:
        inner: Any = getattr(model, "module", model)  # DeepSpeed's engine hands on its module's parameters in parts
        self._parts: dict[str, Any] = inner.state_dict(keep_vars=True)

    def __getitem__(self, name: str) -> Tensor:
        part = self._parts[name]
        if isinstance(part, DTensor):
            here: Any = part.detach().to(PartialState().device)
            found: Tensor = here.full_tensor()
            return found
        if hasattr(part, "ds_id"):
            from deepspeed.runtime.zero import GatheredParameters  # noqa: PLC0415 - only where a launch uses it

            with GatheredParameters([part]):
                whole: Tensor = part.detach().to("cpu", copy=True)
            return whole
        return part.detach()  # type: ignore[no-any-return]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)
