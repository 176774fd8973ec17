"""Attention of one long pair on a CPU, block of queries by block, each over the keys that it sees and no others.

In: queries, keys and values of the pair, and how many of its tokens are prompt, chosen and rejected. Out: the
attention's output, with its gradient.

The one idea: the fused kernel makes every score of the rectangle that it is given, hidden by the mask or not; more than
half of a long pair's square is hidden. Scores are made again in the backward pass, so what is kept grows with the
tokens and not with their square.

Shapes: T tokens of the pair, A heads, D size of a head, Q queries of a block, K keys.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ropo.logps.reach import Reach

# More queries leave larger corners empty, fewer make products too small to be fast.
_BLOCK = 128


@dataclass(frozen=True, slots=True)
class Block:
    """Some queries of one part of a pair, and the keys that they see.

    Attributes:
        queries: Their places in the pair.
        keys: Places of the keys, one stretch or two, which end with the queries themselves.
        too_early_QK: -inf where one of the first keys comes before what a query reaches, else 0; None without such.
    """

    queries: slice
    keys: tuple[slice, ...]
    too_early_QK: Tensor | None = None


def blocks_of(num_prompt: int, num_chosen: int, num_rejected: int, reach: Reach | None = None) -> list[Block]:
    """The blocks of a pair, whose prompt, chosen and rejected tokens stand in this order.

    Args:
        num_prompt: Tokens of the prompt.
        num_chosen: Tokens of `chosen`.
        num_rejected: Tokens of `rejected`.
        reach: How far back a query looks; None for everything.

    Examples:
        >>> [(b.queries.start, [(k.start, k.stop) for k in b.keys]) for b in blocks_of(130, 5, 6)]
        [(0, [(0, 128)]), (128, [(0, 130)]), (130, [(0, 135)]), (135, [(0, 130), (135, 141)])]
        >>> [(b.queries.start, [(k.start, k.stop) for k in b.keys]) for b in blocks_of(130, 5, 6, Reach(10))]
        [(0, [(0, 128)]), (128, [(119, 130)]), (130, [(121, 135)]), (135, [(121, 130), (135, 141)])]
    """
    prompt = slice(0, num_prompt)
    chosen = slice(num_prompt, num_prompt + num_chosen)
    rejected = slice(chosen.stop, chosen.stop + num_rejected)
    blocks = []
    for part in (prompt, chosen, rejected):
        for first in range(part.start, part.stop, _BLOCK):
            queries = slice(first, min(first + _BLOCK, part.stop))
            # Positions of `rejected` go on where the prompt ends, its places where `chosen` does.
            shift = num_chosen if part is rejected else 0
            start = 0 if reach is None else max(reach.first(first - shift), 0)
            # `chosen` stands right behind the prompt, so that one stretch holds both.
            keys = (
                (slice(start, num_prompt), slice(max(start + shift, part.start), queries.stop))
                if part is rejected and start < num_prompt
                else (slice(start + shift, queries.stop),)
            )
            blocks.append(Block(queries, keys, None if reach is None else _too_early(queries, keys, shift, reach)))
    return blocks


def _too_early(queries: slice, keys: tuple[slice, ...], shift: int, reach: Reach) -> Tensor | None:
    """-inf where a key comes before what a query reaches, over the first keys, as many as any query misses."""
    query_Q1 = torch.arange(queries.start, queries.stop)[:, None] - shift
    # The last stretch holds the branch; one before it is prompt.
    shifts = (0, shift)[-len(keys) :]
    stretches = zip(keys, shifts, strict=True)
    key_1K = torch.cat([torch.arange(some.start, some.stop) - less for some, less in stretches])[None]
    num_early = int((key_1K < reach.first(query_Q1[-1:])).sum())
    if not num_early:
        return None
    is_early_QK = key_1K[:, :num_early] < reach.first(query_Q1)
    return torch.zeros(is_early_QK.shape).masked_fill_(is_early_QK, -torch.inf)


def block_attention(
    query_ATD: Tensor, key_ATD: Tensor, value_ATD: Tensor, blocks: list[Block], *, scaling: float
) -> Tensor:
    """softmax(scaling·q·kᵀ)·v over the keys that each query of one pair sees; as many heads of each.

    Returns:
        Shape (A, T, D), of the type of the values.
    """
    output_ATD: Tensor = _BlockAttention.apply(query_ATD * scaling, key_ATD, value_ATD, blocks)  # type: ignore[no-untyped-call]
    return output_ATD


class _BlockAttention(torch.autograd.Function):
    # The decorators give the backward pass the precision of the forward pass, wherever it is called.
    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")  # type: ignore[untyped-decorator]
    def forward(ctx: Any, query_ATD: Tensor, key_ATD: Tensor, value_ATD: Tensor, blocks: list[Block]) -> Tensor:
        output_ATD = _empty_like(value_ATD)
        for block in blocks:
            probs_AQK = _probs(query_ATD[:, block.queries], _take(key_ATD, block.keys), block.too_early_QK)
            output_ATD[:, block.queries] = torch.bmm(probs_AQK, _take(value_ATD, block.keys))
        ctx.save_for_backward(query_ATD, key_ATD, value_ATD, output_ATD)
        ctx.blocks = blocks
        return output_ATD

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *gradients: Any) -> Any:
        """∂scores = probs·(∂probs − Σₖ ∂probs·probs); the sum is that of ∂output·output over D."""
        (d_output_ATD,) = gradients
        query_ATD, key_ATD, value_ATD, output_ATD = ctx.saved_tensors
        sum_AT1 = (d_output_ATD * output_ATD).sum(dim=-1, keepdim=True)
        d_query_ATD = _empty_like(query_ATD)
        d_key_ATD, d_value_ATD = _empty_like(key_ATD).zero_(), _empty_like(value_ATD).zero_()
        for block in ctx.blocks:
            query_AQD, d_AQD = query_ATD[:, block.queries], d_output_ATD[:, block.queries]
            key_AKD, value_AKD = _take(key_ATD, block.keys), _take(value_ATD, block.keys)
            probs_AQK = _probs(query_AQD, key_AKD, block.too_early_QK)
            _add(d_value_ATD, block.keys, torch.bmm(probs_AQK.transpose(1, 2), d_AQD))
            d_scores_AQK = torch.bmm(d_AQD, value_AKD.transpose(1, 2))
            d_scores_AQK.sub_(sum_AT1[:, block.queries]).mul_(probs_AQK)
            d_query_ATD[:, block.queries] = torch.bmm(d_scores_AQK, key_AKD)
            _add(d_key_ATD, block.keys, torch.bmm(d_scores_AQK.transpose(1, 2), query_AQD))
        return d_query_ATD, d_key_ATD, d_value_ATD, None


def _probs(query_AQD: Tensor, key_AKD: Tensor, too_early_QK: Tensor | None) -> Tensor:
    """Softmax of the scores of a block; the last keys are the queries' own, of which later ones are hidden."""
    scores_AQK = torch.bmm(query_AQD, key_AKD.transpose(1, 2))
    size = query_AQD.shape[1]
    scores_AQK[..., -size:] += _later(size)
    if too_early_QK is not None:
        scores_AQK[..., : too_early_QK.shape[1]] += too_early_QK
    return scores_AQK.softmax(dim=-1)


@cache
def _later(size: int) -> Tensor:
    """-inf where a key comes after its query, else 0."""
    return torch.full((size, size), -torch.inf).triu_(1)


def _take(x_ATD: Tensor, places: tuple[slice, ...]) -> Tensor:
    return x_ATD[:, places[0]] if len(places) == 1 else torch.cat([x_ATD[:, some] for some in places], dim=1)


def _add(x_ATD: Tensor, places: tuple[slice, ...], found_AKD: Tensor) -> None:
    sizes = [some.stop - some.start for some in places]
    for some, found in zip(places, found_AKD.split(sizes, dim=1), strict=True):
        x_ATD[:, some] += found


def _empty_like(x_ATD: Tensor) -> Tensor:
    """Of the same shape, with the heads of a token side by side in memory, as the layers around have them."""
    heads, tokens, size = x_ATD.shape
    return x_ATD.new_empty(tokens, heads, size).transpose(0, 1)
