"""Features are those of automatic differentiation, in every layout, whatever the head and its precision."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch.distributed.fsdp import fully_shard
from transformers import (
    Cohere2Config,
    Cohere2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from ropo.data.tokenize import TokenizedPair
from ropo.logps import response_head
from ropo.logps.batch import LAYOUTS
from ropo.logps.choose import choose_layout
from ropo.logps.features import FeatureReader, Sketch
from ropo.logps.response_head import LogitMap, projected_gradient, projected_logps
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
SKETCHES = [Sketch(num_outputs=6, num_inputs=5), Sketch(num_outputs=3, num_inputs=8, seed=1)]


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


@pytest.mark.parametrize("layout", ["plain_rows", "padding_free", "shared_prefix", "packed"])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "lm_head"]])
def test_adapters(layout, targets):
    """On layers and on the head, which is then called as it is; the plain layout is the judge."""
    base = made("own head")
    model = get_peft_model(base, LoraConfig(r=4, target_modules=targets, init_lora_weights=False)).eval()
    found = {}
    for name in ("plain", layout):
        for kind, sketch in enumerate(SKETCHES):
            found[name, kind] = read(model, name, make_tokens(), sketch)[1]
    for kind in range(len(SKETCHES)):
        for name, block in found["plain", kind].items():
            torch.testing.assert_close(found[layout, kind][name], block, rtol=1e-3, atol=1e-4, msg=name)
    with model.disable_adapter():
        reference = read(model, layout, make_tokens())
        assert_as_autograd(base, reference, make_tokens(), SKETCHES[0], LogitMap())
    assert (reference[1]["gradient"] - found["plain", 0]["gradient"]).abs().max() > 0.1


def head_of(kind):
    head = torch.nn.Linear(16, 100, bias=kind == "bias")
    if kind == "hooks":
        head.register_forward_hook(lambda *call: call[2] * 2)
    return head


@pytest.mark.parametrize("has_pieces", [True, False])
@pytest.mark.parametrize("logit_map", [LogitMap(), LogitMap(cap=0.7), LogitMap(scale=0.3), LogitMap(3.0, 0.7)])
@pytest.mark.parametrize("kind", ["plain", "bias", "hooks", "sharded"])
def test_head(kind, logit_map, has_pieces, one_process, monkeypatch):
    """The gradient by the head's output, for every way to call a head and in pieces of any size."""
    if has_pieces:
        monkeypatch.setattr(response_head, "LOGITS_BUDGET_BYTES", {"cpu": 4 * 100 * 2})
    head, hidden, target, projection = (
        head_of(kind),
        torch.randn(11, 16),
        torch.randint(100, (11,)),
        torch.randn(100, 6),
    )
    raw = head(hidden).detach().requires_grad_()
    logps = logit_map(raw).log_softmax(-1).gather(1, target[:, None]).squeeze(1)
    (d_raw,) = torch.autograd.grad(logps.sum(), raw)
    calls = []
    if kind == "sharded":
        fully_shard(head, mesh=one_process)
        head.register_forward_pre_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        found, gradient = projected_logps(hidden, target, head, projection, logit_map=logit_map)
    # Each call gathers, and processes with different numbers of pieces would wait for each other.
    assert len(calls) == (kind == "sharded")
    torch.testing.assert_close(found, logps.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, d_raw @ projection, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """A group of this process alone, which is enough for weights to be sharded."""
    file = tmp_path_factory.mktemp("group") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
    yield torch.distributed.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("has_own_shards", [True, False])
def test_sharded_model(has_own_shards, one_process):
    """The head's weights are whole during the forward only, in a group of their own or in the model's."""
    model, tokens = made("own head"), make_tokens()
    wanted = [read(model, "packed", tokens, sketch)[1] for sketch in SKETCHES]
    if has_own_shards:
        fully_shard(model.lm_head, mesh=one_process)
    fully_shard(model, mesh=one_process)
    for sketch, blocks in zip(SKETCHES, wanted, strict=True):
        _, found = read(model, "packed", tokens, sketch)
        for name, block in blocks.items():
            torch.testing.assert_close(found[name], block, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("sketch", SKETCHES)
@pytest.mark.parametrize("has_autocast", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bfloat16(layout, has_autocast, sketch):
    """Rounding to 8 bits changes features by some percent; what is made of the logits is computed in float32."""
    model, tokens = made("own head"), make_tokens()
    exact = read(model, layout, tokens, sketch)[1]
    model = model if has_autocast else model.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=has_autocast):
        _, features = read(model, layout, tokens, sketch)
    for name, block in exact.items():
        assert features[name].dtype == torch.float32
        assert (features[name] - block).norm() <= 0.03 * block.norm(), name


def test_features_are_computed_in_float32():
    """Autocast is for the model: what it puts out is not rounded again, though products stand behind it."""
    model, tokens = made("own head"), make_tokens()
    wanted = read(model, "plain_rows", tokens)[1]

    def exact(*args):
        with torch.autocast("cpu", enabled=False):
            return FORWARDS["plain_rows"](*args)

    logits, target, projection = torch.randn(5, 100), torch.arange(5), torch.randn(100, 6)
    _, alone = projected_gradient(logits.clone(), target, projection, LogitMap())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, found = FeatureReader(model, SKETCHES[0]).read(exact, LAYOUTS["plain"](tokens, pad_token_id=0))
        _, within = projected_gradient(logits.clone(), target, projection, LogitMap())
    torch.testing.assert_close(within, alone, rtol=1e-6, atol=1e-6)
    for name, block in wanted.items():
        torch.testing.assert_close(found[name], block, rtol=1e-5, atol=1e-5, msg=name)


def test_nothing_is_left_behind():
    """Not after a forward that fails, either: its memory would be missed by the halves of the batch."""
    model, tokens = made("own head"), make_tokens()
    reader = FeatureReader(model, SKETCHES[0])

    def short(*args):
        FORWARDS["plain_rows"](*args)
        raise torch.OutOfMemoryError

    for forward in (FORWARDS["plain_rows"], FORWARDS["plain"], short):
        with pytest.raises(torch.OutOfMemoryError) if forward is short else torch.no_grad():
            reader.read(forward, LAYOUTS["plain"](tokens, pad_token_id=0))
        assert not reader._seen
        assert not hasattr(model, "_ropo_read_head")
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_swapped_pairs_change_sign():
    model, tokens = made("own head"), make_tokens()
    swapped = [TokenizedPair(prompt=one.prompt, chosen=one.rejected, rejected=one.chosen) for one in tokens]
    for name, block in read(model, "packed", tokens)[1].items():
        torch.testing.assert_close(read(model, "packed", swapped)[1][name], -block, rtol=1e-4, atol=1e-5, msg=name)


def test_a_layout_may_be_chosen_while_features_are_read():
    """The layouts that are compared leave features alone, and a model of one layer has its middle at the end."""
    model, tokens = LlamaForCausalLM(LlamaConfig(**{**LLAMA, "num_hidden_layers": 1})).eval(), make_tokens()
    assert choose_layout(model, tokens, pad_token_id=0)[0] == "packed"
    found = [read(model, layout, tokens)[1]["hidden_middle"] for layout in ("plain", "packed")]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_virtual_tokens_come_before_the_prompt():
    """Of a prompt-tuned adapter: log-probabilities and hidden states are read at the tokens of the text."""
    base = made("own head")
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, token_dim=32, num_layers=3)
    model = get_peft_model(base, config).eval()
    tokens = make_tokens()
    batch = LAYOUTS["plain"](tokens, pad_token_id=0)
    found, features = FeatureReader(model, SKETCHES[0]).read(FORWARDS["plain"], batch)
    virtual_VH = model.get_prompt(1)[0]
    for i, pair in enumerate(tokens):
        wanted, middle = [], []
        for response in (pair.chosen, pair.rejected):
            ids = torch.from_numpy(np.concatenate([pair.prompt, response]).astype(np.int64))
            embedded_TH = torch.cat([virtual_VH, base.get_input_embeddings()(ids)])
            said = base(inputs_embeds=embedded_TH[None], output_hidden_states=True)
            where = slice(len(virtual_VH) + len(pair.prompt) - 1, -1)
            logps_TV = said.logits[0, where].log_softmax(-1)
            wanted.append(logps_TV.gather(1, ids[len(pair.prompt) :, None]).sum())
            middle.append(said.hidden_states[2][0, where].mean(0))
        torch.testing.assert_close(found.chosen[i], wanted[0], rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(found.rejected[i], wanted[1], rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(features["hidden_middle"][i], middle[0] - middle[1], rtol=1e-3, atol=1e-4)


def test_a_model_without_a_head_is_refused():
    with pytest.raises(ValueError, match="LlamaModel has none"):
        FeatureReader(made("own head").model, SKETCHES[0])


def test_names_tell_sketches_apart():
    model = made("own head")
    sketches = [Sketch(), Sketch(seed=1), Sketch(num_outputs=32), Sketch(num_inputs=8)]
    assert FeatureReader(model, Sketch()).name == "features1-64x32-seed0-layer2"
    assert len({FeatureReader(model, sketch).name for sketch in sketches}) == len(sketches)
