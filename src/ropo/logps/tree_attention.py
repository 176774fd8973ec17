"""Attention over a row that holds several pairs: each pair a tree of one prompt and two branches, no pair sees another.

In: queries, keys and values of a packed row, and the lengths of its pairs in the place of a mask. Out: the attention's
output. `transformers` calls it, under the name `NAME`, for models that were given that name; without such lengths it is
the library's own `sdpa`.

The one idea: all products with weights run over the row as it is, without padding, and only attention looks at single
pairs. A mask over the whole row would be a square of its length. On a GPU that square is a FlexAttention block mask,
which skips what is empty; on a CPU short pairs of similar length are attended to together, and long ones one by one
(`block_attention`).

Shapes: P pairs of a group, L positions of its longest pair, T positions of the row, A heads, D size of a head.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ropo.logps.block_attention import Block, block_attention, blocks_of
from ropo.logps.reach import Reach
from ropo.logps.tree_mask import read_lengths_mask, tree_mask

NAME = "ropo_tree"

# One more call of the attention costs as much as about this many more pairs of positions, forward and backward.
_CELLS_PER_CALL = 2400
# A pair of more tokens is attended to by itself, block by block.
_LONGEST_TOGETHER = 200
# What some models hand to their attention beside a mask: a bound on scores, sinks, a bias by distance.
_NOT_IN_PACKED_ROWS = ("softcap", "s_aux", "position_bias")
# Kernels that FlexAttention may compile in a process.
_KERNELS = 64


@dataclass(frozen=True, slots=True)
class _Together:
    """Neighbours of similar length that are attended to in one call, filled up to the longest.

    Attributes:
        num_tokens: Of all its pairs.
        index_PL: Place of each position in the group's part of the row; the last place where a pair is shorter.
        places: Where the tokens stand in the flattened P·L positions.
        mask_P1LL: What is added to the scores, 0 or -inf.
    """

    num_tokens: int
    index_PL: Tensor
    places: Tensor
    mask_P1LL: Tensor


@dataclass(frozen=True, slots=True)
class _Alone:
    """A pair so long that the empty corners of its square cost more than a call for each of its blocks."""

    blocks: list[Block]
    num_tokens: int


def group_pairs(lengths: Sequence[int]) -> list[int]:
    """How many neighbours to attend to together, so that filling up costs less than the calls it saves.

    Args:
        lengths: Tokens of each pair, longest first.

    Returns:
        Number of pairs of each group.

    Examples:
        >>> group_pairs([300, 299, 40, 38, 20])
        [1, 1, 3]
    """
    counts: list[int] = []
    longest = 0
    for length in lengths:
        if counts and longest <= _LONGEST_TOGETHER and longest**2 - length**2 < _CELLS_PER_CALL:
            counts[-1] += 1
        else:
            counts.append(1)
            longest = length
    return counts


def _groups(sizes: list[list[int]], reach: Reach | None) -> list["_Together | _Alone"]:
    """The groups of a row whose pairs have these many tokens of prompt, chosen and rejected."""
    groups: list[_Together | _Alone] = []
    start = 0
    for count in group_pairs([sum(size) for size in sizes]):
        group = sizes[start : start + count]
        num_tokens = sum(group[0])
        if num_tokens > _LONGEST_TOGETHER:
            num_prompt, num_chosen, num_rejected = group[0]
            groups.append(_Alone(blocks_of(num_prompt, num_chosen, num_rejected, reach), num_tokens))
        else:
            groups.append(_together(group, reach))
        start += count
    return groups


def _together(sizes: list[list[int]], reach: Reach | None) -> _Together:
    part = torch.tensor(sizes)
    total_P = part.sum(dim=1)
    width = int(total_P.max())
    place_L = torch.arange(width)
    is_token_PL = place_L < total_P[:, None]
    branch_PL = (place_L >= part[:, :1]).long() + (place_L >= part[:, :2].sum(dim=1, keepdim=True)).long()
    position_PL = place_L - part[:, 1:2] * (branch_PL == 2)  # `rejected` goes on where the prompt ends
    branch_PL[~is_token_PL] = -1
    # Positions without a token see each other, so that no row is empty, and nothing else: `_Choose` relies on it.
    is_alike_P1LL = (is_token_PL[:, :, None] == is_token_PL[:, None, :])[:, None]
    first_P = total_P.cumsum(0) - total_P
    return _Together(
        num_tokens=int(total_P.sum()),
        index_PL=(first_P[:, None] + place_L).clamp(max=int(total_P.sum()) - 1),
        places=is_token_PL.flatten().nonzero().squeeze(1),
        mask_P1LL=torch.zeros(len(sizes), 1, width, width).masked_fill_(
            ~(tree_mask(branch_PL, position_PL, reach) & is_alike_P1LL), -torch.inf
        ),
    )


def tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | BlockMask | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention as `transformers` calls it; a packed row where the mask is one of `row_mask`, else `sdpa`.

    Raises:
        ValueError: If the model wants something of its attention that packed rows do not have.
    """
    if isinstance(attention_mask, BlockMask):
        _allow_kernels()
        # Under autocast rotary embeddings leave queries and keys in float32; not every torch takes both.
        query, key = query.to(value.dtype), key.to(value.dtype)
        found: tuple[Tensor, Tensor | None] = flex_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **options
        )
        return found
    if attention_mask is None or attention_mask.dtype != torch.int32:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    if asked := [name for name in _NOT_IN_PACKED_ROWS if options.get(name) is not None]:
        raise ValueError(f"packed rows have no {asked[0]} in their attention")
    if dropout:
        raise ValueError("packed rows have no dropout in their attention")
    dtype = query.dtype
    with torch.autocast("cpu", enabled=False):
        output_TAD = _attend(query.float(), key.float(), value.float(), attention_mask, scaling)
    return output_TAD.to(dtype)[None], None


def _allow_kernels() -> None:
    """Precision, gradients and number of heads have a kernel each; beyond eight, dense attention is run instead.

    Each thread has a limit of its own, and layers may be run again in the thread of the backward pass.
    """
    if torch._dynamo.config.recompile_limit < _KERNELS:
        torch._dynamo.config.recompile_limit = _KERNELS


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None) -> Tensor:
    """Attention over a packed row on a CPU, shape (T, A, D); in float32, whose kernel is the faster one there."""
    groups = _groups_of(mask)
    repeats = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, repeats), repeat_kv(value, repeats)
    sizes = [group.num_tokens for group in groups]
    num_unused = query.shape[2] - sum(sizes)  # fill the row up; nobody reads what is put out there
    parts = [tensor[0].split([*sizes, num_unused], dim=1)[: len(sizes)] for tensor in (query, key, value)]
    output: list[Tensor] = []
    for group, q_ATD, k_ATD, v_ATD in zip(groups, *parts, strict=True):
        if isinstance(group, _Together):
            output.append(_attend_together(q_ATD, k_ATD, v_ATD, group, scaling))
        else:
            factor = q_ATD.shape[2] ** -0.5 if scaling is None else scaling
            output.append(block_attention(q_ATD, k_ATD, v_ATD, group.blocks, scaling=factor).transpose(0, 1))
    if num_unused:
        output.append(query.new_zeros(num_unused, query.shape[1], value.shape[3]))
    return output[0] if len(output) == 1 else torch.cat(output)


def _groups_of(mask: Tensor) -> list["_Together | _Alone"]:
    """The groups of a packed row, made once for all layers, which get the same mask."""
    if not hasattr(mask, "ropo_groups"):
        mask.ropo_groups = _groups(*read_lengths_mask(mask))  # type: ignore[attr-defined]
    groups: list[_Together | _Alone] = mask.ropo_groups  # type: ignore[attr-defined]
    return groups


def _attend_together(q_ATD: Tensor, k_ATD: Tensor, v_ATD: Tensor, group: _Together, scaling: float | None) -> Tensor:
    """Attention within each pair of a group, shape (T, A, D)."""
    num_pairs, width = group.index_PL.shape
    is_even = num_pairs * width == group.num_tokens
    index = group.index_PL.flatten()

    def by_pair(x_ATD: Tensor) -> Tensor:
        x_TAD = x_ATD.transpose(0, 1)
        filled_TAD = x_TAD if is_even else _Choose.apply(x_TAD, index, group.places)  # type: ignore[no-untyped-call]
        x_PALD: Tensor = filled_TAD.unflatten(0, (num_pairs, width)).transpose(1, 2)
        return x_PALD

    output_PALD = scaled_dot_product_attention(
        by_pair(q_ATD), by_pair(k_ATD), by_pair(v_ATD), attn_mask=group.mask_P1LL, scale=scaling
    )
    output_TAD: Tensor = output_PALD.transpose(1, 2).flatten(0, 1)
    if not is_even:
        output_TAD = _Choose.apply(output_TAD, group.places, index)  # type: ignore[no-untyped-call]
    return output_TAD


class _Choose(torch.autograd.Function):
    """Rows of a tensor, with a gradient that chooses, too, instead of adding up.

    Filling up and taking out again undo each other. Where no pair has a token, what comes in and what its gradient is
    do not matter: nobody but such places sees it.
    """

    @staticmethod
    def forward(ctx: Any, x_TAD: Tensor, there: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return x_TAD.index_select(0, there)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (back,) = ctx.saved_tensors
        return gradients[0].index_select(0, back), None, None


AttentionInterface.register(NAME, tree_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
