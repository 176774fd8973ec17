"""The choice of a layout: what is asked of a small copy, what of the model, and how often."""

import pytest
import torch
from transformers import Gemma3TextConfig, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from ropo.data.tokenize import tokenize_pairs
from ropo.logps import choose, reach, tree_mask
from ropo.logps.choose import choose_layout
from ropo.logps.reach import Reach
from ropo.logps.response_head import LogitMap
from ropo.logps.small_copy import VOCABULARY, WINDOW, small_configs, small_copies
from ropo.logps.tree_attention import NAME

SMALL = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    monkeypatch.setattr(choose, "_ARCHITECTURES", {})


@pytest.fixture
def tokens(pairs, tokenizer):
    return tokenize_pairs(pairs, tokenizer, max_length=128).tokens


def test_small_copies_are_small_and_keep_every_kind_of_layer():
    config = Gemma3TextConfig(num_hidden_layers=26, sliding_window=512, hidden_size=1152, num_attention_heads=4)
    small = next(iter(small_configs(config)))
    assert set(small.layer_types) == set(config.layer_types)
    assert small.num_hidden_layers == len(small.layer_types) < 5
    assert small.sliding_window == WINDOW
    assert small.vocab_size == VOCABULARY
    assert small.hidden_size < 100
    assert config.num_hidden_layers == 26, "the model's own configuration is not touched"


def test_small_copies_leave_the_random_state():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert next(small_copies(LlamaForCausalLM, LlamaConfig(**SMALL)), None) is not None
    assert torch.equal(torch.get_rng_state(), before)


def test_a_copy_is_made_once_for_an_architecture(tokens, monkeypatch):
    """An audit makes a trainer for every fold."""
    made = []
    monkeypatch.setattr(choose, "small_copies", lambda *args: made.append(args) or small_copies(*args))
    for _ in range(3):
        assert choose_layout(LlamaForCausalLM(LlamaConfig(**SMALL)), tokens, pad_token_id=0)[0] == "packed"
    assert len(made) == 1
    choose_layout(LlamaForCausalLM(LlamaConfig(**{**SMALL, "num_key_value_heads": 4})), tokens, pad_token_id=0)
    assert len(made) == 2


def test_the_longest_pair_is_compared_until_one_as_long_agreed(tokens, monkeypatch):
    tried = []
    compared = choose._Trial.refusal
    monkeypatch.setattr(
        choose._Trial, "refusal", lambda self, layout, more=(): tried.append(list(more)) or compared(self, layout, more)
    )
    by_length = sorted(tokens, key=choose._length)
    model = LlamaForCausalLM(LlamaConfig(**SMALL))
    for some in (by_length[:-1], by_length[:-1], by_length):
        choose_layout(model, some, pad_token_id=0)
    ours = [more for more in tried if not more or any(more[0] is pair for pair in tokens)]
    assert [len(more) for more in ours] == [1, 0, 1]
    assert ours[-1][0] is by_length[-1]


def test_a_window_that_is_forgotten_is_noticed_on_the_copy(tokens, monkeypatch):
    """Though no pair is as long as the window, and the model's own weights are flat."""
    forgetful = tree_mask.lengths_mask
    monkeypatch.setattr(tree_mask, "lengths_mask", lambda lengths, _=None: forgetful(lengths))
    model = MistralForCausalLM(MistralConfig(**SMALL, sliding_window=4096))
    layout, _ = choose_layout(model, tokens, pad_token_id=0)
    assert layout == "shared_prefix"
    assert model.config._attn_implementation == "sdpa"


def test_half_precision_hides_no_wrong_logic(tokens, monkeypatch):
    """The loose comparison in bfloat16 is of kernels; the logic was compared in float32 before."""
    monkeypatch.setattr(Reach, "first", lambda self, position: position - self.size)  # one token too many
    monkeypatch.setattr(choose, "reach_of", reach.reach_of, raising=False)
    monkeypatch.setattr(reach, "reach_of", lambda _function, size, _device: size and Reach(size))
    model = MistralForCausalLM(MistralConfig(**SMALL, sliding_window=8)).to(torch.bfloat16)
    assert choose_layout(model, tokens, pad_token_id=0)[0] == "plain_rows"


def test_without_a_copy_nothing_is_shared(tokens, monkeypatch):
    monkeypatch.setattr(choose, "small_copies", lambda *_: iter(()))
    model = LlamaForCausalLM(LlamaConfig(**SMALL))
    layout, reason = choose_layout(model, tokens, pad_token_id=0)
    assert layout == "plain_rows"
    assert "no small copy" in reason
    assert choose_layout(model.to(torch.bfloat16), tokens, pad_token_id=0)[0] == "plain_rows"


def test_heads_that_cannot_be_read_take_the_plain_way(tokens, monkeypatch):
    """Nothing is known of what this model does to its logits."""

    class Odd(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            found = super().forward(*args, **kwargs)
            found.logits = found.logits.abs().sqrt()
            return found

    layout, reason = choose_layout(Odd(LlamaConfig(**SMALL)), tokens, pad_token_id=0)
    assert layout == "plain"
    assert "logits" in reason


@pytest.mark.parametrize(("scale", "cap"), [(0.25, None), (1.0, 3.0), (0.25, 3.0)])
def test_scales_and_bounds_are_found_whatever_their_names(tokens, scale, cap):
    class Scaled(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            found = super().forward(*args, **kwargs)
            if hasattr(found, "logits"):
                found.logits = LogitMap(self.config.its_scale, self.config.its_bound)(found.logits)
            return found

    config = LlamaConfig(**SMALL, initializer_range=0.3)
    config.its_scale, config.its_bound = scale, cap
    model = Scaled(config)
    assert choose_layout(model, tokens, pad_token_id=0)[0] == "packed"
    assert model._ropo_logit_map == LogitMap(scale, cap)
    assert model.config._attn_implementation == NAME
