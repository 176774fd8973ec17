"""Features are those of automatic differentiation, in every layout, whatever the head and its precision."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.distributed.fsdp import fully_shard
from transformers import (
    Cohere2Config,
    Cohere2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    PhiConfig,
    PhiForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from ropo.data.tokenize import TokenizedPair
from ropo.logps import response_head
from ropo.logps.batch import LAYOUTS
from ropo.logps.choose import choose_layout
from ropo.logps.features import FeatureReader, Sketch
from ropo.logps.response_head import LogitMap, projected_logps
from ropo.logps.shared_prefix import FORWARDS, enable_response_logps
from ropo.logps.tree_attention import NAME

SIZE = {"vocab_size": 100, "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LLAMA = {**SIZE, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2}  # fmt: skip
MODELS = {
    "own head": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA)),
    "tied head": lambda: Qwen2ForCausalLM(Qwen2Config(**LLAMA, tie_word_embeddings=True)),
    "capped": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**LLAMA, head_dim=8, final_logit_softcapping=3.0)),
    "scaled": lambda: Cohere2ForCausalLM(Cohere2Config(**LLAMA, logit_scale=0.5)),
    "bias": lambda: PhiForCausalLM(PhiConfig(**LLAMA)),
}
MAPS = {"capped": LogitMap(cap=3.0), "scaled": LogitMap(scale=0.5)}
SHAPE = [(3, 7, 2), (12, 1, 9), (1, 1, 1), (6, 20, 3)]
SKETCHES = [Sketch(num_outputs=6, num_inputs=5), Sketch(num_outputs=6, num_inputs=5, is_by_hidden=True, seed=1)]


def make_tokens(shape=SHAPE, seed=0):
    rng = np.random.default_rng(seed)
    names = ("prompt", "chosen", "rejected")
    return [
        TokenizedPair(**{
            name: rng.integers(3, 100, size).astype(np.int32) for name, size in zip(names, sizes, strict=True)
        })
        for sizes in shape
    ]  # fmt: skip


def made(name):
    model = MODELS[name]().eval()
    head = model.get_output_embeddings()
    if head.bias is not None:
        torch.nn.init.normal_(head.bias)
    enable_response_logps(model, MAPS.get(name, LogitMap()))
    return model


def read(model, layout, tokens, sketch=SKETCHES[0]):
    causal_lm = getattr(model, "get_base_model", lambda: model)()
    causal_lm.config._attn_implementation = NAME if layout == "packed" else "sdpa"
    logps, features = FeatureReader(model, sketch).read(FORWARDS[layout], LAYOUTS[layout](tokens, pad_token_id=0))
    with torch.no_grad():
        alone = FORWARDS[layout](model, LAYOUTS[layout](tokens, pad_token_id=0))
    torch.testing.assert_close(logps.chosen, alone.chosen, rtol=1e-6, atol=1e-5)
    return logps, features


def sketched_by_autograd(model, prompt, response, sketch, logit_map):
    """Log-probability and features of one response, from one row, the model's own logits and `torch.autograd`."""
    head = model.get_output_embeddings()
    ids = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))[None]
    with torch.no_grad():
        output = model(input_ids=ids, output_hidden_states=True, use_cache=False)
    where = slice(len(prompt) - 1, ids.shape[1] - 1)
    middle_TH, last_TH = output.hidden_states[2][0, where], output.hidden_states[-1][0, where].requires_grad_()
    weight_VH = head.weight.detach().clone().requires_grad_()
    logits_TV = logit_map(torch.nn.functional.linear(last_TH, weight_VH, head.bias))
    torch.testing.assert_close(logits_TV, output.logits[0, where], rtol=1e-4, atol=1e-5)
    logps_T = logits_TV.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])
    rng = torch.Generator().manual_seed(sketch.seed)
    q_HL = torch.randn(32, sketch.num_inputs, generator=rng) / sketch.num_inputs**0.5
    if sketch.is_by_hidden:  # no product of the head with a random matrix, but the gradient by the hidden state
        r_HK = torch.randn(sketch.num_outputs, 32, generator=rng).T / sketch.num_outputs**0.5
        (d_last_TH,) = torch.autograd.grad(logps_T.sum(), last_TH)
        gradient_KL = r_HK.T @ d_last_TH.T @ last_TH.detach() @ q_HL
    else:
        p_VK = torch.randn(len(weight_VH), sketch.num_outputs, generator=rng) / sketch.num_outputs**0.5
        (d_weight_VH,) = torch.autograd.grad(logps_T.sum(), weight_VH)
        gradient_KL = p_VK.T @ d_weight_VH @ q_HL
    return logps_T.sum().detach(), {
        "gradient": gradient_KL.flatten(),
        "hidden_last": last_TH.detach().mean(0),
        "hidden_middle": middle_TH.mean(0),
    }


def assert_as_autograd(model, found, tokens, sketch, logit_map, **tolerance):
    logps, features = found
    for i, pair in enumerate(tokens):
        chosen, of_chosen = sketched_by_autograd(model, pair.prompt, pair.chosen, sketch, logit_map)
        _, of_rejected = sketched_by_autograd(model, pair.prompt, pair.rejected, sketch, logit_map)
        torch.testing.assert_close(logps.chosen[i], chosen, rtol=1e-4, atol=1e-3)
        assert features.keys() == of_chosen.keys()
        for name, block in features.items():
            wanted = of_chosen[name] - of_rejected[name]
            assert (block[i] - wanted).norm() <= 1e-3 * (wanted.norm() + of_chosen[name].norm()), (i, name)


@pytest.mark.parametrize("sketch", SKETCHES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_gradient_is_that_of_autograd(name, layout, sketch):
    """By the head's weights in their place as a head, though they may be tied to the embeddings."""
    model, tokens = made(name), make_tokens()
    found = read(model, layout, tokens, sketch)
    assert_as_autograd(model, found, tokens, sketch, MAPS.get(name, LogitMap()))
