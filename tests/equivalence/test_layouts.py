"""The fast forward gives the plain forward's numbers: log-probabilities and gradients, on many shapes and models."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from ropo.data.tokenize import TokenizedPair
from ropo.logps import shared_prefix
from ropo.logps.batch import LAYOUTS
from ropo.logps.shared_prefix import FORWARDS, choose_layout, enable_response_logps

VOCABULARY = 100
LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GPT = {"vocab_size": VOCABULARY, "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

MODELS = {
    "llama, grouped queries": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA)),
    "llama, eager": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA, attn_implementation="eager")),
    "qwen2, tied head": lambda: Qwen2ForCausalLM(Qwen2Config(**LLAMA, tie_word_embeddings=True)),
    "mistral, wide window": lambda: MistralForCausalLM(MistralConfig(**LLAMA, sliding_window=4096)),
    "gemma2, capped logits": lambda: Gemma2ForCausalLM(
        Gemma2Config(**LLAMA, head_dim=8, final_logit_softcapping=3.0, sliding_window=4096)
    ),
    "gpt2, learned positions": lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, **GPT)),
    "gpt-neox, bias in attention": lambda: GPTNeoXForCausalLM(
        GPTNeoXConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, **GPT)
    ),
}
SHAPES = {
    "even": [(5, 4, 4), (5, 4, 4)],
    "uneven": [(3, 7, 2), (12, 1, 9), (1, 1, 1), (6, 20, 3)],
    "one pair": [(4, 3, 5)],
    "one token each": [(1, 1, 1)],
    "long prompt": [(60, 2, 3), (2, 2, 3)],
}


def make_tokens(shape, seed=0):
    rng = np.random.default_rng(seed)
    return [
        TokenizedPair(**{
            name: rng.integers(3, VOCABULARY, size).astype(np.int32)
            for name, size in zip(("prompt", "chosen", "rejected"), sizes, strict=True)
        })
        for sizes in shape
    ]  # fmt: skip


def values_and_gradients(model, tokens, layout):
    model.zero_grad()
    logps = FORWARDS[layout](model, LAYOUTS[layout](tokens, pad_token_id=0))
    (2.0 * logps.chosen - logps.rejected).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return logps, gradients


def assert_equal(model, tokens):
    plain, plain_gradients = values_and_gradients(model, tokens, "plain")
    fast, fast_gradients = values_and_gradients(model, tokens, "shared_prefix")
    for name in ("chosen", "rejected", "chosen_tokens", "rejected_tokens"):
        torch.testing.assert_close(getattr(fast, name), getattr(plain, name), rtol=1e-5, atol=1e-5)
    assert plain.chosen.abs().max() > 1
    assert plain_gradients.keys() == fast_gradients.keys()
    assert max(gradient.abs().max() for gradient in plain_gradients.values()) > 1e-2
    for name, gradient in plain_gradients.items():
        scale = gradient.abs().max().item() + 1e-6
        torch.testing.assert_close(fast_gradients[name], gradient, rtol=1e-4, atol=1e-5 * max(scale, 1.0), msg=name)


@pytest.mark.parametrize("name", MODELS)
def test_models(name):
    model = MODELS[name]().eval()
    tokens = make_tokens(SHAPES["uneven"])
    layout, reason = choose_layout(model, tokens, pad_token_id=0, max_length=64)
    assert layout == "shared_prefix", reason
    assert_equal(model, tokens)


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape):
    model = MODELS["llama, grouped queries"]().eval()
    enable_response_logps(model)
    assert_equal(model, make_tokens(SHAPES[shape]))


def test_logits_in_pieces(monkeypatch):
    """Many small pieces of logits, made again in the backward pass, change nothing."""
    monkeypatch.setattr(shared_prefix, "_LOGITS_BUDGET_BYTES", 4 * VOCABULARY * 3)
    model = MODELS["llama, grouped queries"]().eval()
    enable_response_logps(model)
    assert_equal(model, make_tokens(SHAPES["uneven"]))


def test_lora():
    model = get_peft_model(
        MODELS["llama, grouped queries"](), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    ).eval()
    assert choose_layout(model, make_tokens(SHAPES["even"]), pad_token_id=0, max_length=64)[0] == "shared_prefix"
    assert_equal(model, make_tokens(SHAPES["uneven"]))


def test_bfloat16():
    """In bfloat16 the two differ by its rounding, not more."""
    model = MODELS["llama, grouped queries"]().bfloat16().eval()
    enable_response_logps(model)
    tokens = make_tokens(SHAPES["uneven"])
    plain, fast = (FORWARDS[layout](model, LAYOUTS[layout](tokens, pad_token_id=0)) for layout in LAYOUTS)
    torch.testing.assert_close(fast.chosen, plain.chosen, rtol=2e-2, atol=0.2)
    torch.testing.assert_close(fast.rejected, plain.rejected, rtol=2e-2, atol=0.2)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: BloomForCausalLM(BloomConfig(hidden_size=32, n_layer=2, n_head=4, **GPT)), "tree mask"),
        (lambda: MistralForCausalLM(MistralConfig(**LLAMA, sliding_window=4)), "sliding window of 4"),
    ],
)
def test_falls_back(model, reason):
    """Models whose attention depends on more than mask and position ids take the plain way, and say why."""
    layout, said = choose_layout(model(), make_tokens(SHAPES["even"]), pad_token_id=0, max_length=64)
    assert layout == "plain"
    assert reason in said


def test_a_wrong_mask_is_noticed(monkeypatch):
    """If the branches could see each other, the comparison with the plain forward would say so."""

    def causal_only(branch):
        rows, width = branch.shape
        return torch.ones(rows, 1, width, width, dtype=torch.bool).tril()

    monkeypatch.setattr(shared_prefix, "_tree_mask", causal_only)
    layout, said = choose_layout(
        MODELS["llama, grouped queries"](), make_tokens(SHAPES["even"]), pad_token_id=0, max_length=64
    )
    assert layout == "plain"
    assert "changes this model's log-probabilities" in said


def test_generation_is_untouched():
    model = MODELS["llama, grouped queries"]().eval()
    prompt = torch.tensor([[5, 6, 7]])
    before = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=5, do_sample=False)
    enable_response_logps(model)
    enable_response_logps(model)
    after = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=5, do_sample=False)
    assert before.tolist() == after.tolist()
