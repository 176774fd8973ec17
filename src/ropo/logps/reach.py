"""How far back a layer's attention looks, and the masks of trees that respect it.

In: what a model asks of `transformers` when it makes its masks. Out: a `Reach`, or None where all that came before is
seen; and a context in which a model's requests for masks are answered with those of a tree.

The one idea: a model's own code says which of its layers have which window, when it makes its masks. It is asked there,
rather than reading names in a configuration that every family spells in its own way; each request is answered with the
same rule on the positions of a tree, in which a branch goes on where its prompt ends.

Shapes: Q queries, K keys.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function

Position = TypeVar("Position", int, Tensor)


@dataclass(frozen=True, slots=True)
class Reach:
    """Attention to a part of what came before.

    Attributes:
        size: Tokens of the window, the query's own among them, or of a chunk.
        is_chunked: Whether only the query's own chunk is seen: positions 0 to size - 1, size to 2·size - 1, ...
    """

    size: int
    is_chunked: bool = False

    def first(self, position: Position) -> Position:
        """Earliest position that a query at `position` sees; below 0 where it sees them all.

        Examples:
            >>> Reach(3).first(7), Reach(3, is_chunked=True).first(7)
            (5, 6)
        """
        return position - position % self.size if self.is_chunked else position - (self.size - 1)


def reach_of(mask_function: Callable[..., Any], size: int | None, device: torch.device) -> Reach | None:
    """Find out which rule a mask function of `transformers` is, by asking it about positions around its borders.

    Args:
        mask_function: Function of batch, head, query and key position.
        size: The size that the model names for it, of a window or of a chunk; None for all.
        device: Where the function's own tensors are.

    Returns:
        None for plain causal attention.

    Raises:
        ValueError: If it is neither that nor a window nor a chunk.
    """
    if mask_function is causal_mask_function:
        return None
    step = size or 100
    asked = sorted({max(multiple * step + more, 0) for multiple in range(4) for more in (-1, 0, 1)})
    query_Q1, key_1K = torch.tensor(asked)[:, None], torch.tensor(asked)[None, :]
    try:  # without waiting for the device
        said_QK = _answers(mask_function, query_Q1, key_1K)
    except RuntimeError:
        said_QK = _answers(mask_function, query_Q1.to(device), key_1K.to(device)).cpu()
    for reach in (None, *([Reach(size), Reach(size, is_chunked=True)] if size else [])):
        sees_QK = key_1K <= query_Q1
        if reach is not None:
            sees_QK = sees_QK & (key_1K >= reach.first(query_Q1))
        if torch.equal(said_QK, sees_QK):
            return reach
    raise ValueError("a layer's attention is neither causal nor a window nor a chunk")


def _answers(mask_function: Callable[..., Any], query_Q1: Tensor, key_1K: Tensor) -> Tensor:
    """What a mask function says of some queries and keys, shape (Q, K)."""
    zero = torch.zeros(1, 1, 1, 1, dtype=torch.long, device=key_1K.device)
    said: Tensor = mask_function(zero, zero, query_Q1[None, None], key_1K[None, None])
    return said.expand(1, 1, len(query_Q1), key_1K.shape[1])[0, 0]


@contextlib.contextmanager
def answered_masks(attention: str, answer: Callable[[Reach | None], Tensor | BlockMask]) -> Iterator[None]:
    """Within it, models with this attention get the masks they ask `transformers` for from `answer`.

    Models are to be given a two-dimensional `attention_mask` of ones: without one `transformers` takes positions that
    restart for the beginning of another sequence.

    Args:
        attention: Name of the attention, as in `config._attn_implementation`.
        answer: The mask of one reach, in booleans where it is a tensor; eager attention gets it as numbers. A request
            that is for something else is answered with NaN, since models ask for masks that no layer uses: what uses it
            puts out NaN.
    """

    def interface(
        *,
        mask_function: Callable[..., Any] = causal_mask_function,
        local_size: int | None = None,
        use_vmap: bool = False,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        **_: Any,
    ) -> Tensor | BlockMask:
        try:
            if use_vmap:
                raise ValueError("the model adds a mask of its own to the causal one")
            reach = reach_of(mask_function, local_size, torch.device(device))
        except ValueError:
            return torch.full((1, 1, 1, 1), torch.nan, dtype=dtype, device=device)
        mask = answer(reach)
        # Eager attention adds its mask to the scores instead of selecting by it.
        if attention == "eager" and isinstance(mask, Tensor):
            return torch.where(mask, 0.0, torch.finfo(dtype).min).to(dtype)
        return mask

    ALL_MASK_ATTENTION_FUNCTIONS[attention] = interface
    try:
        yield
    finally:
        del ALL_MASK_ATTENTION_FUNCTIONS[attention]
