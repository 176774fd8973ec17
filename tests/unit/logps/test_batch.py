"""Batches by hand: what stands where in either layout."""

import numpy as np
import torch

from ropo.data.tokenize import TokenizedPair
from ropo.logps.batch import batches_by_length, plain_batch, shared_prefix_batch
from ropo.logps.tree_mask import tree_mask


def pair(prompt, chosen, rejected):
    return TokenizedPair(
        prompt=np.array(prompt, np.int32), chosen=np.array(chosen, np.int32), rejected=np.array(rejected, np.int32)
    )


PAIRS = [pair([10, 11], [20, 21, 22], [30, 31]), pair([12], [23], [32, 33, 34])]


def test_plain():
    batch = plain_batch(PAIRS, pad_token_id=0)
    assert batch["input_ids"].tolist() == [
        [10, 11, 20, 21, 22],
        [10, 11, 30, 31, 0],
        [12, 23, 0, 0, 0],
        [12, 32, 33, 34, 0],
    ]
    assert batch["attention_mask"].sum(dim=1).tolist() == [5, 4, 2, 4]
    assert batch["source"].tolist() == [1, 2, 3, 6, 7, 10, 15, 16, 17]
    assert batch["target"].tolist() == [20, 21, 22, 30, 31, 23, 32, 33, 34]
    assert batch["response"].tolist() == [0, 0, 0, 1, 1, 2, 3, 3, 3]


def test_shared_prefix():
    batch = shared_prefix_batch(PAIRS, pad_token_id=0)
    assert batch["input_ids"].tolist() == [[10, 11, 20, 21, 30], [12, 32, 33, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 2], [0, 1, 2, 0, 0]]
    assert batch["branch"].tolist() == [[0, 0, 1, 1, 2], [0, 2, 2, -1, -1]]
    assert batch["source"].tolist() == [1, 2, 3, 1, 4, 5, 5, 6, 7]
    assert batch["target"].tolist() == [20, 21, 22, 30, 31, 23, 32, 33, 34]


def testtree_mask():
    mask = tree_mask(torch.tensor([[0, 1, 1, 2, -1]]), torch.tensor([[0, 1, 2, 1, 0]]))
    assert mask.shape == (1, 1, 5, 5)
    assert mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 0, 0, 1, 0],
        [1, 0, 0, 0, 1],
    ]


def test_batches_by_length():
    batches = list(batches_by_length([3, 9, 1, 4, 4], max_tokens=8))
    assert batches == [[1], [3, 4], [0, 2]]
    assert sorted(i for batch in batches for i in batch) == list(range(5))
    assert max(len(batch) for batch in batches_by_length([1] * 10, max_tokens=1000, max_pairs=4)) == 4
