"""Bytes that a backward pass needs of its forward pass, counted without data.

In: a model's class and configuration, an adapter, the precision, tokens in one forward pass. Out: `Kept`, bytes.

The one idea: PyTorch runs the forward pass of one and of two layers on tensors that have shapes and no memory
(`FakeTensorMode`), and hands over everything that autograd keeps. So adapters, frozen weights, casts of mixed precision
and the head are counted as they are, for any architecture and any size, on any device.

Shapes: B rows, T positions of a row, N response tokens.
"""

import contextlib
import copy
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PretrainedConfig

from ropo.logps.dropout import turn_dropout_off
from ropo.logps.response_head import piece_tokens
from ropo.logps.shared_prefix import FORWARDS, enable_response_logps
from ropo.models.adapters import add_adapter

_ROW = 128  # tokens of a row of the forward pass that is counted; the mask of longer ones would be counted, too


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """One forward and backward pass of a training.

    Attributes:
        num_tokens: Positions of its batch, padding included.
        num_read: Response tokens.
        is_plain: Whether the model makes the logits of all positions.
        use_bf16: Under bfloat16 autocast.
        is_checkpointed: Whether layers run again in the backward pass.
        device: Kind of device.
    """

    num_tokens: int
    num_read: int
    is_plain: bool = False
    use_bf16: bool = False
    is_checkpointed: bool = False
    device: str = "cpu"


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """Bytes that autograd keeps.

    Attributes:
        layer: Of each layer.
        outside: Of everything else: embeddings, last norm, head, less what the last layer spares.
        hidden: The input of a layer, all that is kept of one that runs again.
        head: Logits for a moment, when the backward pass begins.
    """

    layer: float
    outside: float
    hidden: float
    head: float

    def bytes(self, num_layers: int, *, is_checkpointed: bool) -> float:
        """At the moment when most is in use.

        Args:
            num_layers: Of the model.
            is_checkpointed: Whether layers run again in the backward pass, one at a time.
        """
        if is_checkpointed:
            return num_layers * self.hidden + max(self.layer, self.head) + max(self.outside, 0.0)
        return num_layers * self.layer + self.outside + self.head


def kept_for_backward(
    model_class: Callable[[Any], nn.Module],
    config: PretrainedConfig,
    step: Pass,
    *,
    dtype: torch.dtype,
    peft_config: PeftConfig | None = None,
) -> Kept:
    """Count what autograd keeps of one forward pass.

    Args:
        model_class: Makes the model from a configuration.
        config: Of the model.
        step: The pass.
        dtype: Of the weights while they compute.
        peft_config: Of the adapter that is trained, if one is.

    Returns:
        Bytes by place.

    Raises:
        RuntimeError: If the forward pass depends on the data (layers of experts).
    """
    rows = -(-step.num_tokens // (2 * _ROW)) * 2
    width = -(-step.num_tokens // rows)
    batch = _Batch(rows, width, min(step.num_read, rows * width))
    one, two = (_saved_bytes(model_class, with_layers(config, n), step, batch, dtype, peft_config) for n in (1, 2))
    text = config.get_text_config(decoder=True)
    share = step.num_tokens / (rows * width)
    itemsize = 2 if step.use_bf16 else dtype.itemsize
    return Kept(
        layer=share * (two - one),
        outside=share * (2 * one - two),
        hidden=step.num_tokens * text.hidden_size * itemsize,
        head=_head_bytes(text.vocab_size, step),
    )


def with_layers(config: PretrainedConfig, number: int) -> PretrainedConfig:
    """The same configuration with fewer layers.

    Args:
        config: Of a model; not changed.
        number: Of layers.
    """
    small = copy.deepcopy(config)
    text = small.get_text_config(decoder=True)
    text.num_hidden_layers = min(number, text.num_hidden_layers)
    if getattr(text, "layer_types", None):
        with contextlib.suppress(AttributeError):  # where it follows from the number
            text.layer_types = text.layer_types[: text.num_hidden_layers]
    if getattr(text, "num_kv_shared_layers", 0):
        text.num_kv_shared_layers = 0  # with layers that are not there any more
    return small


@dataclass(frozen=True, slots=True)
class _Batch:
    """A batch of rows without padding, as `plain_batch` makes it."""

    rows: int
    width: int
    num_read: int

    def tensors(self) -> dict[str, Tensor]:
        ids_BT, read_N = torch.zeros(self.rows, self.width, dtype=torch.long), torch.arange(self.num_read)
        owner_N = torch.zeros(self.num_read, dtype=torch.long)
        return {
            "input_ids": ids_BT,
            "attention_mask": torch.ones_like(ids_BT),
            "source": read_N,
            "read": read_N,
            "target": owner_N,
            "response": owner_N,
        }


def _saved_bytes(
    model_class: Callable[[Any], Any],
    config: PretrainedConfig,
    step: Pass,
    batch: _Batch,
    dtype: torch.dtype,
    peft_config: PeftConfig | None,
) -> int:
    """Of everything that autograd keeps, weights left out, each storage once."""
    # Keeps as much as every attention that makes no square of scores.
    config._attn_implementation = "sdpa" if getattr(model_class, "_supports_sdpa", True) else "eager"
    with torch.device("meta"):
        model = model_class(config).to(dtype)
        if peft_config is not None:
            model = add_adapter(model, peft_config)
    turn_dropout_off(model)
    enable_response_logps(model)
    weights: set[int] = set()
    found: dict[int, Any] = {}  # holds the storages, whose places would be used again

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            found[storage._cdata] = storage
        return tensor

    with _quiet(), FakeTensorMode():
        _without_memory(model)
        weights |= {weight.untyped_storage()._cdata for weight in model.parameters()}
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", dtype=torch.bfloat16, enabled=step.use_bf16),
        ):
            logps = FORWARDS["plain" if step.is_plain else "plain_rows"](model, batch.tensors())
        del logps
        return sum(storage.nbytes() for storage in found.values())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """`torch` logs what it cannot count with its traceback; whoever asked is told by the error."""
    fake = logging.getLogger("torch._subclasses.fake_tensor")
    level = fake.level
    fake.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        fake.setLevel(level)


def _without_memory(model: nn.Module) -> None:
    """Put tensors of the present mode in the place of those on the meta device; what was tied stays tied."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    empty = torch.empty(tensor.shape, dtype=tensor.dtype)
                    is_weight = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if is_weight else empty
                tensors[name] = made[id(tensor)]  # type: ignore[assignment]


def _head_bytes(vocabulary: int, step: Pass) -> float:
    """Logits, softmax and gradient of a piece in float32; in the plain layout of all positions."""
    if step.is_plain:
        return 2 * 4.0 * vocabulary * step.num_tokens
    return 3 * 4.0 * vocabulary * min(step.num_read, piece_tokens(vocabulary, step.device))
