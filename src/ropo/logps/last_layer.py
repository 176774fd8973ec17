"""The last layer's MLP, run only where its output is read.

In: the decoder of a language model and the positions that predict a response token. Out: a context in which the
decoder's hidden states are right at these positions, and of no use elsewhere.

The one idea: of what the last layer puts out only the positions are read that predict a response token. Its keys and
values are needed of every position, but its MLP, two thirds of a layer's work, looks at each position by itself; and
most positions of a pair are prompt.

Shapes: T positions of all rows, R of them that are read, H hidden size.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def last_mlp_at(decoder: nn.Module, read_R: Tensor) -> Iterator[None]:
    """Within it the last layer's MLP is run at some positions only, and puts out 0 at the others.

    Decoders without a list of layers whose last one has an `mlp` run as they are, and so do layers that are run again
    in the backward pass (activation checkpoints), which comes when the context is left.

    Args:
        decoder: What `get_decoder` of a causal language model returns.
        read_R: Places in the flattened T positions, each once.
    """
    mlp = last_mlp(decoder)
    if mlp is None or torch.compiler.is_compiling():
        yield
        return
    shape = torch.Size()

    def narrow(_mlp: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        nonlocal shape
        shape = args[0].shape
        # Beside its input it may get something else of every position, as a residual that it adds.
        is_by_position = [isinstance(one, Tensor) and one.shape[:-1] == shape[:-1] for one in args]
        return tuple(
            one.flatten(0, -2).index_select(0, read_R)[None] if is_it else one
            for one, is_it in zip(args, is_by_position, strict=True)
        )

    def widen(_mlp: nn.Module, _args: tuple[Any, ...], found: Any) -> Any:
        # Layers of experts may put out how they were chosen, too.
        found_1RH, *others = found if isinstance(found, tuple) else (found,)
        nothing_TH = found_1RH.new_zeros(shape).flatten(0, -2)
        everywhere = nothing_TH.index_copy(0, read_R, found_1RH.flatten(0, -2)).view(shape)
        return (everywhere, *others) if isinstance(found, tuple) else everywhere

    handles = [mlp.register_forward_pre_hook(narrow), mlp.register_forward_hook(widen)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def last_mlp(decoder: Any) -> nn.Module | None:
    """The MLP of the layer that runs last, or None."""
    layers = layers_of(decoder)
    if layers is None:
        return None
    runs_again = any(getattr(module, "gradient_checkpointing", False) for module in (decoder, layers[-1]))
    if runs_again and torch.is_grad_enabled():
        return None
    # A child by name: a wrapper that makes checkpoints hands its module's attributes on, but not its children.
    return dict(layers[-1].named_children()).get("mlp")


def layers_of(decoder: Any) -> nn.ModuleList | None:
    """The layers of a decoder in the order in which they run, or None if there is no single list of them."""
    number = getattr(getattr(decoder, "config", None), "num_hidden_layers", None)
    lists = [child for child in decoder.children() if isinstance(child, nn.ModuleList) and len(child) == number]
    return lists[0] if len(lists) == 1 else None
