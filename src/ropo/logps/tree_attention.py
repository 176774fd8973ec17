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

from collections.abc import Callable, Sequence
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

NAME = "ropo_tree"

# One more call of the attention costs as much as about this many more pairs of positions, forward and backward.
_CELLS_PER_CALL = 2400
# A pair of more tokens is attended to by itself, block by block.
_LONGEST_TOGETHER = 200
_BLOCK = 128  # positions in a block of FlexAttention
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


def _groups(lengths_P3: Tensor) -> list["_Together | _Alone"]:
    """The groups of a row whose pairs have these many tokens of prompt, chosen and rejected."""
    sizes = lengths_P3.tolist()
    groups: list[_Together | _Alone] = []
    start = 0
    for count in group_pairs([sum(size) for size in sizes]):
        group = sizes[start : start + count]
        num_tokens = sum(group[0])
        groups.append(_Alone(blocks_of(*group[0]), num_tokens) if num_tokens > _LONGEST_TOGETHER else _together(group))
        start += count
    return groups


def _together(sizes: list[list[int]]) -> _Together:
    part = torch.tensor(sizes)
    total_P = part.sum(dim=1)
    width = int(total_P.max())
    place_L = torch.arange(width)
    is_token_PL = place_L < total_P[:, None]
    branch_PL = (place_L >= part[:, :1]).long() + (place_L >= part[:, :2].sum(dim=1, keepdim=True)).long()
    branch_PL[~is_token_PL] = -1
    # Positions without a token see each other, so that no row is empty, and nothing else: `_Choose` relies on it.
    is_alike_P1LL = (is_token_PL[:, :, None] == is_token_PL[:, None, :])[:, None]
    first_P = total_P.cumsum(0) - total_P
    return _Together(
        num_tokens=int(total_P.sum()),
        index_PL=(first_P[:, None] + place_L).clamp(max=int(total_P.sum()) - 1),
        places=is_token_PL.flatten().nonzero().squeeze(1),
        mask_P1LL=torch.zeros(len(sizes), 1, width, width).masked_fill_(
            ~(tree_mask(branch_PL) & is_alike_P1LL), -torch.inf
        ),
    )


def tree_mask(branch_BT: Tensor) -> Tensor:
    """Who may look at whom, shape (B, 1, T, T), True where row position q may see k.

    Earlier positions of the prompt (0) or of one's own branch (1 chosen, 2 rejected). Padding (-1) forms a branch of
    its own, so that no row of the mask is empty, which would make its softmax undefined.

    Args:
        branch_BT: Branch of every position.

    Returns:
        Booleans.
    """
    width = branch_BT.shape[1]
    is_prompt_B1T = branch_BT[:, None, :] == 0
    is_same_BTT = branch_BT[:, :, None] == branch_BT[:, None, :]
    is_past_TT = torch.ones(width, width, dtype=torch.bool, device=branch_BT.device).tril()
    return ((is_prompt_B1T | is_same_BTT) & is_past_TT)[:, None]


def row_mask_mod(lengths_P3: Tensor, num_positions: int) -> Callable[..., Tensor]:
    """The same rule for a whole packed row, as FlexAttention asks for it.

    Args:
        lengths_P3: Tokens of prompt, chosen and rejected of each pair.
        num_positions: Of the row; those behind the last pair see each other only.

    Returns:
        A function of batch, head, query and key position that tells whether the one may see the other.
    """
    part_T = _parts(lengths_P3, num_positions)

    # A lambda: FlexAttention counts the arguments, which a checked function (see tests) hides.
    return lambda _b, _h, q, k: (
        (q >= k) & ((part_T[q] == part_T[k]) | ((part_T[k] % 3 == 0) & (part_T[q] // 3 == part_T[k] // 3)))
    )


def _parts(lengths_P3: Tensor, num_positions: int) -> Tensor:
    """Part of the row that each position stands in, shape (T,): 3·pair + 0, 1 or 2 for prompt, chosen, rejected.

    What fills the row up is the prompt of a pair that does not exist.
    """
    sizes = torch.cat([lengths_P3.flatten(), (num_positions - lengths_P3.sum()).reshape(1)])
    return torch.arange(len(sizes), device=lengths_P3.device).repeat_interleave(sizes, output_size=num_positions)


def row_mask(lengths_P3: Tensor, num_positions: int) -> Tensor | BlockMask:
    """What `tree_attention` takes as the mask of a packed row: lengths on a CPU, a block mask elsewhere.

    Args:
        lengths_P3: Tokens of prompt, chosen and rejected of each pair, on the model's device.
        num_positions: Of the row.
    """
    if lengths_P3.device.type == "cpu":
        return lengths_P3[None, None]  # four dimensions, which models hand on untouched
    return block_mask(lengths_P3, num_positions)


def block_mask(lengths_P3: Tensor, num_positions: int) -> BlockMask:
    """The rule of `row_mask_mod` for FlexAttention, with the blocks that it may leave out and those it need not test.

    `create_block_mask` may make every cell of the square first, 2^30 for a row of 32,768 positions. Here blocks are
    told by the parts that they begin and end in. A few blocks of two branches side by side are tested although they
    are empty.

    Args:
        lengths_P3: Tokens of prompt, chosen and rejected of each pair.
        num_positions: Of the row.
    """
    part_T = _parts(lengths_P3, num_positions)
    num_blocks = -(-num_positions // _BLOCK)
    first_K = torch.arange(num_blocks, device=part_T.device) * _BLOCK
    last_K = (first_K + _BLOCK - 1).clamp(max=num_positions - 1)
    begin_K, end_K = part_T[first_K], part_T[last_K]
    pair_begin_K, pair_end_K = begin_K // 3, end_K // 3
    is_one_part_K = begin_K == end_K
    is_past_QK = torch.ones(num_blocks, num_blocks, dtype=torch.bool, device=part_T.device).tril(-1)
    is_here_QK = torch.eye(num_blocks, dtype=torch.bool, device=part_T.device)
    shares_pair_QK = pair_end_K[None, :] >= pair_begin_K[:, None]
    # All of a block sees all of an earlier one that lies in the same part, or in the prompt of the same pair.
    same_part_QK = is_one_part_K[:, None] & (begin_K[:, None] == begin_K[None, :])
    in_its_prompt_QK = (
        (begin_K % 3 == 0)[None, :]
        & (pair_begin_K == pair_end_K)[:, None]
        & (pair_begin_K[:, None] == pair_begin_K[None, :])
    )
    is_full_QK = is_past_QK & is_one_part_K[None, :] & (same_part_QK | in_its_prompt_QK)
    is_tested_QK = (is_past_QK & shares_pair_QK | is_here_QK) & ~is_full_QK
    (num_tested, tested), (num_full, full) = _as_lists(is_tested_QK), _as_lists(is_full_QK)
    return BlockMask.from_kv_blocks(
        num_tested,
        tested,
        num_full,
        full,
        BLOCK_SIZE=_BLOCK,
        mask_mod=row_mask_mod(lengths_P3, num_positions),
        seq_lengths=(num_positions, num_positions),
    )


def _as_lists(is_block_QK: Tensor) -> tuple[Tensor, Tensor]:
    """For each block of queries the number of its blocks of keys, and their places, first."""
    order = is_block_QK.to(torch.int32).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    return is_block_QK.sum(-1, dtype=torch.int32)[None, None], order[None, None].contiguous()


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
    """Attention as `transformers` calls it; a packed row where the mask is one of `row_mask`, else `sdpa`."""
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
    if options.get("softcap") is not None or dropout:
        raise ValueError("tree_attention needs attention without softcap and dropout.")
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
        mask.ropo_groups = _groups(mask[0, 0])  # type: ignore[attr-defined]
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
