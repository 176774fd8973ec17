"""Attention by blocks against all scores of the square with the tree's mask: values and gradients."""

import pytest
import torch

from ropo.logps import block_attention as room
from ropo.logps.block_attention import block_attention, blocks_of
from ropo.logps.tree_mask import tree_mask

SIZES = [(9, 4, 6), (1, 0, 0), (1, 5, 0), (3, 0, 7), (4, 8, 12), (13, 1, 1), (300, 140, 129)]


def by_the_square(query, key, value, sizes, scaling):
    branch = torch.arange(3).repeat_interleave(torch.tensor(sizes))[None]
    scores = (query @ key.transpose(1, 2) * scaling).masked_fill(~tree_mask(branch, branch)[0], -torch.inf)
    return scores.softmax(dim=-1) @ value


@pytest.mark.parametrize("block", [1, 4, 48, 128])
@pytest.mark.parametrize("sizes", SIZES)
def test_values_and_gradients(sizes, block, monkeypatch):
    monkeypatch.setattr(room, "_BLOCK", block)
    tensors = [torch.randn(3, sum(sizes), 8, requires_grad=True) for _ in range(3)]
    weights, found = torch.randn(3, sum(sizes), 8), []
    for output in (
        block_attention(*tensors, blocks_of(*sizes), scaling=0.3),
        by_the_square(*tensors, sizes, 0.3),
    ):
        found.append([output.detach(), *torch.autograd.grad((output * weights).sum(), tensors)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sizes", SIZES)
def test_every_query_is_in_one_block_and_sees_what_the_tree_lets_it(sizes):
    """Places are counted, so that a block that is never computed or computed twice shows."""
    seen = torch.zeros(sum(sizes), sum(sizes), dtype=torch.int64)
    for block in blocks_of(*sizes):
        keys = torch.cat([torch.arange(some.start, some.stop) for some in block.keys])
        queries = torch.arange(block.queries.start, block.queries.stop)
        assert keys[-len(queries) :].tolist() == queries.tolist()
        seen[queries[:, None], keys] += (keys <= queries[:, None]).long()
    branch = torch.arange(3).repeat_interleave(torch.tensor(sizes))[None]
    assert torch.equal(seen, tree_mask(branch, branch)[0, 0].long())


def test_long_pairs_make_fewer_scores():
    """What the room is for: about half of the square."""
    cells = sum(
        (block.queries.stop - block.queries.start) * sum(some.stop - some.start for some in block.keys)
        for block in blocks_of(300, 100, 120)
    )
    assert cells < 0.6 * 520**2
