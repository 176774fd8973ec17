"""Which rule a model's mask is, and what a tree makes of it."""

import pytest
import torch
from transformers import LlamaConfig, masking_utils
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    causal_mask_function,
    chunked_causal_mask_function,
    create_bidirectional_mask,
    create_causal_mask,
    sliding_window_bidirectional_mask_function,
    sliding_window_causal_mask_function,
)

from ropo.logps.reach import Reach, answered_masks, reach_of
from ropo.logps.tree_mask import lengths_mask, read_lengths_mask, row_mask_mod, tree_mask

CPU = torch.device("cpu")


@pytest.mark.parametrize("size", [1, 2, 6, 512])
def test_windows_and_chunks_are_told_apart(size):
    """The window's size counts the query itself, as `transformers` has it."""
    window = sliding_window_causal_mask_function(size)
    chunk = chunked_causal_mask_function(size, torch.zeros(1, dtype=torch.long))
    assert reach_of(window, size, CPU) == Reach(size)
    assert reach_of(chunk, size, CPU) in (Reach(size, is_chunked=True), Reach(size) if size == 1 else None)
    assert reach_of(causal_mask_function, size, CPU) is None


@pytest.mark.parametrize(
    ("function", "size"),
    [
        (sliding_window_causal_mask_function(5), None),
        (sliding_window_causal_mask_function(5), 6),
        (sliding_window_bidirectional_mask_function(5), 5),
        (lambda _b, _h, q, k: (q + 0 * k) >= 0, None),
        (lambda _b, _h, q, k: (k <= q) & (k % 2 == 0), None),
    ],
)
def test_other_rules_are_refused(function, size):
    with pytest.raises(ValueError, match="neither causal nor"):
        reach_of(function, size, CPU)


@pytest.mark.parametrize("reach", [None, Reach(1), Reach(4), Reach(5, is_chunked=True), Reach(100)])
def test_a_branch_sees_what_its_own_sequence_would(reach):
    """The mask of a tree, cut down to prompt and one branch, is the mask of that sequence."""
    num_prompt, num_chosen, num_rejected = 7, 6, 9
    branch = torch.tensor([[0] * num_prompt + [1] * num_chosen + [2] * num_rejected])
    position = torch.cat([torch.arange(num_prompt + num_chosen), num_prompt + torch.arange(num_rejected)])[None]
    mask = tree_mask(branch, position, reach)[0, 0]
    for one, other in ((1, 2), (2, 1)):
        places = (branch[0] != other).nonzero().squeeze(1)
        q, k = torch.arange(len(places))[:, None], torch.arange(len(places))[None]
        wanted = k <= q
        if reach is not None:
            function = (
                chunked_causal_mask_function(reach.size, torch.zeros(1, dtype=torch.long))
                if reach.is_chunked
                else sliding_window_causal_mask_function(reach.size)
            )
            wanted = function(torch.tensor(0), torch.tensor(0), q, k)
        assert torch.equal(mask[places][:, places], wanted)
        assert not mask[branch[0] == one][:, branch[0] == other].any()
    lengths = torch.tensor([[num_prompt, num_chosen, num_rejected]], dtype=torch.int32)
    place = torch.arange(branch.shape[1])
    assert torch.equal(row_mask_mod(lengths, len(place), reach)(0, 0, place[:, None], place[None]), mask)


def test_lengths_carry_the_window_through_a_model():
    """In the tensor itself, since attributes of tensors are lost on the way; and not where no pair is so long."""
    lengths = torch.tensor([[7, 3, 4], [2, 1, 1]], dtype=torch.int32)
    for reach in (Reach(5), Reach(10, is_chunked=True)):
        mask = lengths_mask(lengths, reach)
        assert mask.dim() == 4
        assert read_lengths_mask(mask.clone()) == (lengths.tolist(), reach)
    for reach in (None, Reach(11), Reach(11, is_chunked=True)):
        assert read_lengths_mask(lengths_mask(lengths, reach)) == (lengths.tolist(), None)


def test_masks_are_answered_within_the_context_only():
    config, inputs = LlamaConfig(attn_implementation="eager"), torch.zeros(1, 3, 4)
    asked = {"config": config, "inputs_embeds": inputs, "attention_mask": torch.ones(1, 3), "past_key_values": None}
    with answered_masks("eager", lambda _: torch.eye(3, dtype=torch.bool)[None, None]):
        answered = create_causal_mask(**asked)
        assert create_causal_mask(**asked, or_mask_function=causal_mask_function).isnan().all()
        assert create_bidirectional_mask(config, inputs, torch.ones(1, 3)).isnan().all()
    assert answered[0, 0].tolist() == [
        [0 if q == k else torch.finfo(torch.float32).min for k in range(3)] for q in range(3)
    ]
    assert ALL_MASK_ATTENTION_FUNCTIONS["eager"] is masking_utils.eager_mask
