"""Who sees whom among the tokens of pairs, each a tree of one prompt and two branches.

In: which branch each position belongs to, or how long the parts of each pair are, and how far back a layer looks. Out:
the mask in the form that an attention takes: booleans of a padded row, lengths for `tree_attention` on a CPU, a block
mask of FlexAttention elsewhere.

Shapes: B rows, T positions, P pairs of a packed row, Q and K blocks of queries and keys.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from ropo.logps.reach import Reach

_BLOCK = 128  # positions in a block of FlexAttention


def tree_mask(branch_BT: Tensor, position_BT: Tensor, reach: Reach | None = None) -> Tensor:
    """Who may look at whom, shape (B, 1, T, T), True where row position q may see k.

    Earlier positions of the prompt (0) or of one's own branch (1 chosen, 2 rejected), as far as a query reaches.
    Padding (-1) forms a branch of its own; whatever its positions are, each sees itself, so that no row of the mask is
    empty, which would make its softmax undefined.

    Args:
        branch_BT: Branch of every position.
        position_BT: How many tokens come before it in the prompt and its branch.
        reach: How far back a query looks; None for everything.

    Returns:
        Booleans.
    """
    width = branch_BT.shape[1]
    is_prompt_B1T = branch_BT[:, None, :] == 0
    is_same_BTT = branch_BT[:, :, None] == branch_BT[:, None, :]
    is_past_TT = torch.ones(width, width, dtype=torch.bool, device=branch_BT.device).tril()
    sees_BTT = (is_prompt_B1T | is_same_BTT) & is_past_TT
    if reach is not None:
        sees_BTT &= position_BT[:, None, :] >= reach.first(position_BT)[:, :, None]
    return sees_BTT[:, None]


def row_mask(lengths_P3: Tensor, num_positions: int, reach: Reach | None = None) -> Tensor | BlockMask:
    """What `tree_attention` takes as the mask of a packed row: lengths on a CPU, a block mask elsewhere.

    Args:
        lengths_P3: Tokens of prompt, chosen and rejected of each pair, on the model's device.
        num_positions: Of the row.
        reach: How far back a query looks; None for everything.
    """
    if lengths_P3.device.type == "cpu":
        return lengths_mask(lengths_P3, reach)
    return block_mask(lengths_P3, num_positions, reach)


def lengths_mask(lengths_P3: Tensor, reach: Reach | None = None) -> Tensor:
    """The lengths of a packed row's pairs and the reach, in a tensor of four dimensions, which models hand on.

    Args:
        lengths_P3: Tokens of prompt, chosen and rejected of each pair.
        reach: How far back a query looks; None for everything, and the same where no pair is longer than that.
    """
    longest = int((lengths_P3[:, 0] + lengths_P3[:, 1:].amax(dim=1)).max())
    is_all = reach is None or reach.size >= longest
    last = lengths_P3.new_tensor([[0, 0, 0] if is_all or reach is None else [reach.size, int(reach.is_chunked), 0]])
    return torch.cat([lengths_P3, last])[None, None]


def read_lengths_mask(mask: Tensor) -> tuple[list[list[int]], Reach | None]:
    """What `lengths_mask` was given."""
    *lengths, (size, is_chunked, _) = mask[0, 0].tolist()
    return lengths, Reach(size, is_chunked=bool(is_chunked)) if size else None


def row_mask_mod(lengths_P3: Tensor, num_positions: int, reach: Reach | None = None) -> Callable[..., Tensor]:
    """The rule of `tree_mask` for a whole packed row, as FlexAttention asks for it.

    Args:
        lengths_P3: Tokens of prompt, chosen and rejected of each pair.
        num_positions: Of the row; those behind the last pair see each other only.
        reach: How far back a query looks; None for everything.

    Returns:
        A function of batch, head, query and key position that tells whether the one may see the other.
    """
    part_T, position_T = _parts(lengths_P3, num_positions)

    # Lambdas: FlexAttention counts the arguments, which a checked function (see tests) hides.
    if reach is None:
        return lambda _b, _h, q, k: (
            (q >= k) & ((part_T[q] == part_T[k]) | ((part_T[k] % 3 == 0) & (part_T[q] // 3 == part_T[k] // 3)))
        )
    first_T = reach.first(position_T)
    return lambda _b, _h, q, k: (
        (q >= k)
        & ((part_T[q] == part_T[k]) | ((part_T[k] % 3 == 0) & (part_T[q] // 3 == part_T[k] // 3)))
        & (position_T[k] >= first_T[q])
    )


def _parts(lengths_P3: Tensor, num_positions: int) -> tuple[Tensor, Tensor]:
    """Part of the row that each position stands in, and its place in prompt and branch, each of shape (T,).

    Parts are 3·pair + 0, 1 or 2 for prompt, chosen, rejected. What fills the row up is the prompt of a pair that does
    not exist.
    """
    lengths_P3 = lengths_P3.long()
    total_P = lengths_P3.sum(dim=1)
    start_P = total_P.cumsum(0) - total_P
    end = total_P.sum().reshape(1)
    sizes = torch.cat([lengths_P3.flatten(), num_positions - end])
    # Where a part's positions are counted from: `rejected` goes on where the prompt ends, not `chosen`.
    origin = torch.cat([torch.stack([start_P, start_P, start_P + lengths_P3[:, 1]], dim=1).flatten(), end])
    place_T = torch.arange(num_positions, device=lengths_P3.device)
    part_T = torch.arange(len(sizes), device=lengths_P3.device).repeat_interleave(sizes, output_size=num_positions)
    return part_T, place_T - origin[part_T]


def block_mask(lengths_P3: Tensor, num_positions: int, reach: Reach | None = None) -> BlockMask:
    """The rule of `row_mask_mod` for FlexAttention, with the blocks that it may leave out and those it need not test.

    `create_block_mask` may make every cell of the square first, 2^30 for a row of 32,768 positions. Here blocks are
    told by the parts that they begin and end in. A few blocks of two branches side by side are tested although they
    are empty.
    """
    part_T, position_T = _parts(lengths_P3, num_positions)
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
    is_tested_QK = is_past_QK & shares_pair_QK | is_here_QK
    if reach is not None:
        low_K, high_K = _ranges(position_T, num_blocks)
        # The later a query, the later the first position that it reaches.
        is_full_QK &= low_K[None, :] >= reach.first(high_K)[:, None]
        is_tested_QK &= high_K[None, :] >= reach.first(low_K)[:, None]
    is_tested_QK &= ~is_full_QK
    (num_tested, tested), (num_full, full) = _as_lists(is_tested_QK), _as_lists(is_full_QK)
    return BlockMask.from_kv_blocks(
        num_tested,
        tested,
        num_full,
        full,
        BLOCK_SIZE=_BLOCK,
        mask_mod=row_mask_mod(lengths_P3, num_positions, reach),
        seq_lengths=(num_positions, num_positions),
    )


def _ranges(position_T: Tensor, num_blocks: int) -> tuple[Tensor, Tensor]:
    """Smallest and largest position in each block."""
    missing = num_blocks * _BLOCK - len(position_T)
    filled_T = torch.cat([position_T, position_T[-1:].expand(missing)])
    low_K, high_K = filled_T.unflatten(0, (num_blocks, _BLOCK)).aminmax(dim=1)
    return low_K, high_K


def _as_lists(is_block_QK: Tensor) -> tuple[Tensor, Tensor]:
    """For each block of queries the number of its blocks of keys, and their places, first."""
    order = is_block_QK.to(torch.int32).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    return is_block_QK.sum(-1, dtype=torch.int32)[None, None], order[None, None].contiguous()
