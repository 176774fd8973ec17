"""The fast forwards give the plain forward's numbers: log-probabilities and gradients, on many shapes and models."""

import copy

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch._dynamo.utils import counters
from torch.nn.attention import flex_attention as torch_flex_attention
from torch.nn.attention.flex_attention import flex_attention
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    Cohere2Config,
    Cohere2ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    modeling_flash_attention_utils,
)
from transformers.integrations import flex_attention as transformers_flex_attention

from ropo.data.tokenize import TokenizedPair, tokenize_pairs
from ropo.logps import choose, response_head, shared_prefix, tree_attention
from ropo.logps.batch import LAYOUTS
from ropo.logps.choose import choose_layout
from ropo.logps.reach import Reach
from ropo.logps.response_head import LogitMap, response_logps
from ropo.logps.shared_prefix import FORWARDS, enable_response_logps
from ropo.logps.tree_attention import NAME, group_pairs
from ropo.logps.tree_mask import block_mask, lengths_mask, row_mask_mod

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
    "mixtral, layers of experts": lambda: MixtralForCausalLM(MixtralConfig(**LLAMA, num_local_experts=4)),
    "gpt2, learned positions": lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, **GPT)),
    "gpt-neox, bias in attention": lambda: GPTNeoXForCausalLM(
        GPTNeoXConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, **GPT)
    ),
}
WINDOW = {**LLAMA, "head_dim": 8, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
GPT_NEO = GPTNeoConfig(
    hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=6, **GPT
)
WITH_WINDOWS = {
    "mistral": lambda: MistralForCausalLM(MistralConfig(**LLAMA, sliding_window=6)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**WINDOW)),
    "gemma3, nested": lambda: AutoModelForCausalLM.from_config(NESTED),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**WINDOW, final_logit_softcapping=3.0)),
    "gpt-oss, sinks": lambda: GptOssForCausalLM(GptOssConfig(**WINDOW, num_local_experts=4, num_experts_per_tok=2)),
    "cohere2, scaled logits": lambda: Cohere2ForCausalLM(Cohere2Config(**WINDOW, logit_scale=0.5)),
    "llama4, chunks": lambda: Llama4ForCausalLM(Llama4TextConfig(**LLAMA4, attn_temperature_tuning=False)),
}
LLAMA4 = {
    **LLAMA,
    "head_dim": 8,
    "attention_chunk_size": 6,
    "intermediate_size_mlp": 64,
    "num_local_experts": 4,
    "layer_types": ["chunked_attention", "full_attention"],
    "no_rope_layers": [1, 0],
}
# As Gemma 3 is published from 4B on: a text model beside one for images.
NESTED = Gemma3Config(
    text_config=Gemma3TextConfig(**WINDOW),
    vision_config={"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                   "image_size": 28, "patch_size": 14},
    mm_tokens_per_image=4, image_token_id=99, boi_token_id=98, eoi_token_id=97,
)  # fmt: skip
SHAPES = {
    "even": [(5, 4, 4), (5, 4, 4)],
    "uneven": [(3, 7, 2), (12, 1, 9), (1, 1, 1), (6, 20, 3)],
    "one pair": [(4, 3, 5)],
    "one token each": [(1, 1, 1)],
    "long prompt": [(60, 2, 3), (2, 2, 3)],
    "pairs taken by blocks": [(150, 40, 30), (3, 4, 5), (4, 3, 4), (20, 90, 99), (2, 120, 90), (205, 1, 9)],
}
FAST = ("shared_prefix", "packed", "padding_free", "plain_rows")
# Tracing looks at this attribute of every tensor.
DYNAMO = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


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


def ready(model, layout):
    """The model as `choose_layout` leaves it when it has chosen this layout; `padding_free` runs on sdpa, too."""
    enable_response_logps(model)
    if layout == "packed":
        model.config._attn_implementation = NAME
    return model.eval()


def assert_equal(model, tokens, layout):
    plain, plain_gradients = values_and_gradients(model, tokens, "plain")
    fast, fast_gradients = values_and_gradients(model, tokens, layout)
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
    layout, reason = choose_layout(model, tokens, pad_token_id=0)
    assert layout == ("shared_prefix" if model.config._attn_implementation == "eager" else "packed"), reason
    assert_equal(model, tokens, layout)


@pytest.mark.parametrize("name", WITH_WINDOWS)
def test_pairs_longer_than_the_window(name):
    """Windows and chunks go on over the fork, in models of several kinds of layer, wherever their names are written."""
    model, tokens = WITH_WINDOWS[name]().eval(), make_tokens(SHAPES["pairs taken by blocks"])
    layout, reason = choose_layout(model, tokens, pad_token_id=0)
    assert layout == ("shared_prefix" if model.config._attn_implementation == "eager" else "packed"), reason
    assert_equal(model, tokens, layout)


def test_a_nested_window_is_not_missed():
    """Short pairs agree whatever the mask; the longest pair and a small copy's rows are longer than the window."""
    config = copy.deepcopy(NESTED)
    config.text_config.sliding_window = 40
    model = AutoModelForCausalLM.from_config(config).eval()
    tokens = make_tokens([(9, 9, 9), (8, 8, 8), (150, 20, 30)])
    layout, _ = choose_layout(model, tokens, pad_token_id=0)
    found = []
    with torch.no_grad():
        for name in ("plain", layout):
            logps = FORWARDS[name](model, LAYOUTS[name](tokens, pad_token_id=0))
            found.append(torch.stack([logps.chosen, logps.rejected]))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("layout", FAST)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape, layout):
    assert_equal(ready(MODELS["llama, grouped queries"](), layout), make_tokens(SHAPES[shape]), layout)


def test_many_small_pairs_and_random_shapes():
    """Every way to group pairs is met: together, filled up, alone, with branches of a single token."""
    model, rng = ready(MODELS["qwen2, tied head"](), "packed"), np.random.default_rng(3)
    for seed in range(4):
        shape = [tuple(rng.integers(1, high, 3)) for high in rng.choice([3, 12, 70], size=9)]
        assert_equal(model, make_tokens(shape, seed), "packed")


@pytest.mark.parametrize("layout", FAST)
def test_pieces_add_up(layout):
    """A batch in two pieces gives the numbers and gradients of the whole."""
    model, tokens = ready(MODELS["llama, grouped queries"](), layout), make_tokens(SHAPES["uneven"])
    whole, gradients = values_and_gradients(model, tokens, layout)
    first, some = values_and_gradients(model, tokens[:1], layout)
    rest, others = values_and_gradients(model, tokens[1:], layout)
    torch.testing.assert_close(torch.cat([first.chosen, rest.chosen]), whole.chosen, rtol=1e-5, atol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(some[name] + others[name], gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", FAST)
def test_last_mlp_runs_where_it_is_read(layout):
    """Each position that predicts a response token once; layers before it, and the plain way, run everywhere."""
    model, tokens = ready(MODELS["llama, grouped queries"](), layout), make_tokens(SHAPES["long prompt"])
    seen = []
    for layer in model.model.layers:
        layer.mlp.gate_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[:-1].numel()))
    batches = {name: LAYOUTS[name](tokens, pad_token_id=0) for name in ("plain", layout)}
    for name, batch in batches.items():
        FORWARDS[name](model, batch)
    num_plain, num_fast = (batch["input_ids"].numel() for batch in batches.values())
    # Of the prompt's last token, which predicts two first ones.
    copies = 2 if layout in ("padding_free", "plain_rows") else 1
    assert seen == [num_plain, num_plain, num_fast, 2 * (copies + 1 + 2)]


def test_last_mlp_is_left_alone_where_there_is_none():
    """Some models have their MLP's layers side by side with the attention."""
    config = OPTConfig(
        hidden_size=32, word_embed_proj_dim=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, **GPT
    )
    tokens = make_tokens(SHAPES["long prompt"])
    assert_equal(ready(OPTForCausalLM(config), "shared_prefix"), tokens, "shared_prefix")


@pytest.mark.parametrize("shape", ["uneven", "pairs taken by blocks"])
def test_gradient_checkpointing(shape):
    """Layers that are run again in the backward pass get the same mask again."""
    model, tokens = ready(MODELS["llama, grouped queries"](), "packed"), make_tokens(SHAPES[shape])
    model.activation_checkpointing_enable()
    assert_equal(model.train(), tokens, "packed")


@pytest.mark.parametrize("layout", FAST)
def test_logits_in_pieces(layout, monkeypatch):
    """Many small pieces of logits, made again in the backward pass, change nothing."""
    monkeypatch.setattr(response_head, "LOGITS_BUDGET_BYTES", {"cpu": 4 * VOCABULARY * 3})
    monkeypatch.setattr(response_head, "_PIECE_TOKENS", {"cpu": 2})
    assert_equal(ready(MODELS["llama, grouped queries"](), layout), make_tokens(SHAPES["uneven"]), layout)


@pytest.mark.parametrize("layout", FAST)
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "lm_head"]])
def test_lora(layout, targets):
    """Adapters on the layers, and on the head, which is then called as it is."""
    model = get_peft_model(
        MODELS["llama, grouped queries"](), LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    ).eval()
    assert choose_layout(model, make_tokens(SHAPES["even"]), pad_token_id=0)[0] == "packed"
    assert_equal(model, make_tokens(SHAPES["uneven"]), layout)


@pytest.mark.parametrize("shape", ["uneven", "pairs taken by blocks"])
@pytest.mark.parametrize("has_autocast", [False, True])
@pytest.mark.parametrize("layout", FAST)
def test_bfloat16(layout, has_autocast, shape):
    """In bfloat16 values and gradients differ by its rounding (8 bits: 0.4 % of each number), not more."""
    model = MODELS["llama, grouped queries"]()
    model = ready(model if has_autocast else model.bfloat16(), layout)
    tokens = make_tokens(SHAPES[shape])
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=has_autocast):
        plain, plain_gradients = values_and_gradients(model, tokens, "plain")
        fast, fast_gradients = values_and_gradients(model, tokens, layout)
    torch.testing.assert_close(fast.chosen, plain.chosen, rtol=2e-2, atol=0.2)
    torch.testing.assert_close(fast.rejected, plain.rejected, rtol=2e-2, atol=0.2)
    for name, gradient in plain_gradients.items():
        error, size = (fast_gradients[name] - gradient).float().norm(), gradient.float().norm()
        assert error <= 0.05 * size, f"{name}: {error / size:.3f}"


@pytest.mark.parametrize("shape", SHAPES)
def test_filled_up_rows(shape, monkeypatch):
    """What fills a row up to a round length has no part in values or gradients."""
    for module in (shared_prefix, response_head):
        monkeypatch.setattr(module, "round_length", lambda num_tokens, *_: num_tokens + -num_tokens % 16)
    for name in ("llama, grouped queries", "mixtral, layers of experts", "gpt2, learned positions"):
        assert_equal(ready(MODELS[name](), "packed"), make_tokens(SHAPES[shape]), "packed")
    # As the command line makes it: with a task, PEFT names inputs that there are none of.
    adapter = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(MODELS["llama, grouped queries"](), adapter)
    assert_equal(ready(model, "packed"), make_tokens(SHAPES[shape]), "packed")


@pytest.mark.parametrize("has_autocast", [False, True])
def test_few_shapes_in_bfloat16(has_autocast, monkeypatch):
    """Products in bfloat16 compile a kernel for each shape: many batches must have few."""
    model, sizes, rng = MODELS["llama, grouped queries"](), set(), np.random.default_rng(0)
    model = ready(model if has_autocast else model.bfloat16(), "packed")
    if has_autocast:  # as `accelerate` does: within the model, not around it
        model.forward = torch.autocast("cpu", dtype=torch.bfloat16)(model.forward)
    for module in model.model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, args: sizes.add(args[0].shape[:-1].numel()))
    logits = response_head._logits
    monkeypatch.setattr(response_head, "_logits", lambda x_NH, *rest: sizes.add(len(x_NH)) or logits(x_NH, *rest))
    lengths = set()
    for seed in range(20):
        tokens = make_tokens([tuple(rng.integers(20, 40, 3)) for _ in range(7)], seed)
        lengths.add(sum(map(len, tokens)))
        values_and_gradients(model, tokens, "packed")
    assert len(lengths) > 15
    assert all(size % 32 == 0 for size in sizes), sizes
    assert len(sizes) < 12, sizes


def head_of(kind):
    head = torch.nn.Linear(16, VOCABULARY, bias=kind == "bias")
    if kind == "hooks":
        head.register_forward_hook(lambda *call: call[2] * 2)
    return head


@pytest.mark.parametrize("is_kept", [True, False])
@pytest.mark.parametrize("logit_map", [LogitMap(), LogitMap(cap=0.7), LogitMap(scale=0.3), LogitMap(3.0, 0.7)])
@pytest.mark.parametrize("kind", ["plain", "bias", "hooks", "frozen"])
def test_head(kind, logit_map, is_kept, monkeypatch):
    """Value and gradients of the head are those of automatic differentiation, whether the softmax is kept or not."""
    if not is_kept:
        monkeypatch.setattr(response_head, "LOGITS_BUDGET_BYTES", {"cpu": 4 * VOCABULARY * 2})
    head = head_of(kind)
    head.requires_grad_(kind != "frozen")
    target, weights = torch.randint(VOCABULARY, (11,)), torch.randn(11)
    hidden = torch.randn(11, 16, requires_grad=True)

    def plain():
        logits = logit_map.scale * head(hidden)
        logits = logits if logit_map.cap is None else logit_map.cap * torch.tanh(logits / logit_map.cap)
        return torch.log_softmax(logits, dim=-1).gather(1, target[:, None]).squeeze(1)

    found = []
    for logps in (plain(), response_logps(hidden, target, head, logit_map=logit_map)):
        wanted = [hidden, *(p for p in head.parameters() if p.requires_grad)]
        found.append([logps.detach(), *torch.autograd.grad((logps * weights).sum(), wanted)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


REACHES = [None, Reach(4), Reach(3, is_chunked=True), Reach(90), Reach(130, is_chunked=True)]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")  # slow is right here
@pytest.mark.parametrize("reach", REACHES)
@pytest.mark.parametrize("shape", [[(7, 3, 2), (1, 0, 4), (5, 5, 5)], [(150, 70, 60), (2, 120, 90), (90, 30, 30)]])
def test_block_mask_is_the_same_rule(shape, reach):
    """What FlexAttention would be told on a GPU: run uncompiled, its output is that of the packed row on the CPU."""
    sizes = torch.tensor(shape, dtype=torch.int32)
    num_positions = int(sizes.sum()) + 13
    query, key, value = (torch.randn(1, 2, num_positions, 8) for _ in range(3))
    flex = flex_attention(query, key, value, block_mask=block_mask(sizes, num_positions, reach))
    length = int(sizes.sum())
    ours, _ = tree_attention.tree_attention(
        torch.nn.Module(), query[:, :, :length], key[:, :, :length], value[:, :, :length], lengths_mask(sizes, reach)
    )
    torch.testing.assert_close(ours, flex[:, :, :length].transpose(1, 2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reach", [None, Reach(300), Reach(100), Reach(400, is_chunked=True)])
@pytest.mark.parametrize("seed", range(4))
def test_blocks_that_are_left_out_are_empty_and_those_not_tested_are_full(seed, reach):
    """The kernel takes the mask's word for both, so every cell is looked at here."""
    rng = np.random.default_rng(seed)
    sizes = torch.from_numpy(rng.integers(0, (900, 400, 300), size=(6, 3)).astype(np.int32))
    num_positions = -(-int(sizes.sum()) // 256) * 256
    mask, at = block_mask(sizes, num_positions, reach), torch.arange(num_positions)
    sees = row_mask_mod(sizes, num_positions, reach)(0, 0, at[:, None], at[None, :])
    sees_QaKb = sees.unflatten(0, (-1, 128)).unflatten(2, (-1, 128))
    found = []
    for numbers, places in ((mask.kv_num_blocks, mask.kv_indices), (mask.full_kv_num_blocks, mask.full_kv_indices)):
        listed = torch.zeros(len(places[0, 0]), len(places[0, 0]), dtype=torch.bool)
        for row, number in enumerate(numbers[0, 0].tolist()):
            listed[row, places[0, 0, row, :number].long()] = True
        found.append(listed)
    tested, full = found
    assert not (tested & full).any()
    assert not (sees_QaKb.any(3).any(1) & ~(tested | full)).any()
    assert sees_QaKb.all(3).all(1)[full].all()
    assert full.any() or reach == Reach(100)  # which is shorter than a block
    assert (tested | full).sum() < len(full) ** 2 / 2.5  # most of the square is never looked at


def test_block_masks_of_long_rows_are_small():
    """A square of 32,768 positions would have a thousand million cells."""
    sizes = torch.full((40, 3), 273, dtype=torch.int32)
    mask = block_mask(sizes, 32768)
    assert sum(tensor.numel() for tensor in mask.as_tuple() if torch.is_tensor(tensor)) < 10**6


def test_flex_attention_gets_one_dtype(monkeypatch):
    """Under autocast rotary embeddings are float32 and values are not; not every FlexAttention takes both."""
    seen = []

    def watching(_module, query, key, value, _mask, **_):
        seen.append((query.dtype, key.dtype, value.dtype))
        return value, None

    monkeypatch.setattr(tree_attention, "flex_attention_forward", watching)
    query, key, value = (torch.randn(1, 2, 128, 8) for _ in range(3))
    mask = block_mask(torch.tensor([(64, 32, 32)], dtype=torch.int32), 128)
    tree_attention.tree_attention(torch.nn.Module(), query, key, value.bfloat16(), mask)
    assert seen == [(torch.bfloat16,) * 3]


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Packed rows as a GPU gets them: FlexAttention with block masks and rows of round lengths, compiled.

    Tracing, guards and the gradient's graph are those of a GPU; what the graph is run by is not its kernel.
    """
    compiled = torch.compile(torch_flex_attention.flex_attention, backend="aot_eager")
    monkeypatch.setattr(torch_flex_attention, "_validate_device", lambda *_: None)  # "no backward on CPU"
    monkeypatch.setattr(transformers_flex_attention, "WrappedFlexAttention", lambda _training: lambda: compiled)
    monkeypatch.setattr(shared_prefix, "row_mask", block_mask)
    monkeypatch.setattr(shared_prefix, "round_length", lambda num_tokens, *_: num_tokens + -num_tokens % 256)
    torch._dynamo.reset()
    counters.clear()
    yield counters
    torch._dynamo.reset()


@DYNAMO
@pytest.mark.parametrize("shape", SHAPES)
def test_flex_attention(as_on_a_gpu, shape):
    """Through the whole model, values and gradients are those of the plain forward."""
    assert_equal(ready(MODELS["llama, grouped queries"](), "packed"), make_tokens(SHAPES[shape]), "packed")
    assert as_on_a_gpu["stats"]["unique_graphs"] == 1


@DYNAMO
@pytest.mark.slow
@pytest.mark.parametrize("name", ["mistral", "gemma3, nested", "llama4, chunks"])
def test_flex_attention_within_windows(as_on_a_gpu, name):
    """Block masks with windows and chunks, several kinds of them in one model."""
    model, tokens = WITH_WINDOWS[name]().eval(), make_tokens(SHAPES["pairs taken by blocks"])
    layout, reason = choose_layout(model, tokens, pad_token_id=0)
    assert layout == "packed", reason
    assert_equal(model, tokens, layout)
    assert as_on_a_gpu["stats"]["unique_graphs"] > 0


@DYNAMO
@pytest.mark.parametrize("name", MODELS)
def test_flex_attention_of_models(as_on_a_gpu, name):
    """Whatever their attention, where it takes a block mask at all."""
    model, tokens = MODELS[name]().eval(), make_tokens(SHAPES["uneven"])
    layout, reason = choose_layout(model, tokens, pad_token_id=0)
    assert layout == ("shared_prefix" if model.config._attn_implementation == "eager" else "packed"), reason
    assert_equal(model, tokens, layout)


@DYNAMO
def test_flex_attention_compiles_once_for_a_length(as_on_a_gpu):
    """Lengths of pairs and their number change in every batch; only another length of the row is another graph."""
    model, rng = ready(MODELS["llama, grouped queries"](), "packed"), np.random.default_rng(0)
    for seed in range(4):
        shape = [tuple(rng.integers(8, 16, 3)) for _ in range(4 + seed % 3)]
        assert_equal(model, make_tokens(shape, seed), "packed")
    assert as_on_a_gpu["stats"]["unique_graphs"] == 1
    for num_pairs in (10, 17, 24):
        assert_equal(model, make_tokens([(12, 12, 12)] * num_pairs), "packed")
    assert as_on_a_gpu["stats"]["unique_graphs"] == 2, "after two lengths a graph takes any"


@DYNAMO
@pytest.mark.parametrize("is_peft", [False, True])
def test_flex_attention_in_bfloat16_with_checkpoints(as_on_a_gpu, is_peft):
    """As large models are trained: autocast, layers run again in the backward pass, adapters."""
    model, tokens = MODELS["qwen2, tied head"](), make_tokens(SHAPES["pairs taken by blocks"])
    if is_peft:
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
        model.enable_input_require_grads()
    model.activation_checkpointing_enable({"use_reentrant": False})
    enable_response_logps(model)
    model.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain, plain_gradients = values_and_gradients(model, tokens, "plain")
        getattr(model, "get_base_model", lambda: model)().config._attn_implementation = NAME
        found, gradients = values_and_gradients(model, tokens, "packed")
    torch.testing.assert_close(found.chosen, plain.chosen, rtol=2e-2, atol=0.2)
    for name, gradient in plain_gradients.items():
        assert (gradients[name] - gradient).norm() <= 0.05 * gradient.norm(), name
    assert as_on_a_gpu["stats"]["unique_graphs"] > 0


def test_groups():
    """Equal pairs share a call; a hole costs more than a call; long pairs are taken block by block, equal or not."""
    assert group_pairs([40] * 16) == [16]
    assert group_pairs([180, 179, 40]) == [2, 1]
    assert group_pairs([500, 500, 500]) == [1, 1, 1]


def test_left_padding_changes_nothing(tokenizer, pairs):
    """The tokenizer's side of padding is not ours: rows are made from ids."""
    model, found = ready(MODELS["llama, grouped queries"](), "packed"), []
    model.resize_token_embeddings(len(tokenizer))
    for side in ("left", "right"):
        tokenizer.padding_side = side
        tokens = tokenize_pairs(pairs, tokenizer, max_length=48).tokens
        found += [
            FORWARDS[layout](model, LAYOUTS[layout](tokens, pad_token_id=0)).chosen.detach() for layout in LAYOUTS
        ]
    for values in found[1:]:
        torch.testing.assert_close(values, found[0], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: BloomForCausalLM(BloomConfig(hidden_size=32, n_layer=2, n_head=4, **GPT)), "by up to"),
        (lambda: MambaForCausalLM(MambaConfig(hidden_size=32, num_hidden_layers=2, state_size=4, **GPT)), "linear"),
        (lambda: GPTNeoForCausalLM(GPT_NEO), "by up to"),
        # From its 8,192nd place in a row on, scores are scaled; a packed row is longer than its pairs.
        (lambda: Llama4ForCausalLM(Llama4TextConfig(**LLAMA4)), "by up to"),
    ],
)
def test_falls_back(model, reason):
    """Models whose attention depends on more than mask and position ids share nothing, and say why."""
    model, tokens = model().eval(), make_tokens(SHAPES["uneven"])
    layout, said = choose_layout(model, tokens, pad_token_id=0)
    assert layout == "plain_rows", said
    assert reason in said
    assert_equal(model, tokens, layout)


@pytest.fixture
def flash_attention(monkeypatch):
    """The library's own way to flash-attention, with a kernel that a CPU can run at its end; counts its calls."""
    calls = []

    def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=False, softmax_scale=None):
        assert causal
        assert q.dtype == torch.bfloat16, "as the kernel says it"
        calls.append(len(cu_seqlens_q) - 1)
        repeats, sizes = q.shape[1] // k.shape[1], cu_seqlens_q.diff().tolist()
        k, v = (tensor.repeat_interleave(repeats, dim=1) for tensor in (k, v))
        parts = zip(*(tensor.transpose(0, 1).split(sizes, dim=1) for tensor in (q, k, v)), strict=True)
        found = [
            torch.nn.functional.scaled_dot_product_attention(*part, is_causal=True, scale=softmax_scale)
            for part in parts
        ]
        return torch.cat(found, dim=1).transpose(0, 1)

    utils = modeling_flash_attention_utils
    kernels = (None, varlen, None, utils._pad_input, utils._unpad_input)
    monkeypatch.setattr(utils, "_lazy_imports", lambda *_, **__: kernels)
    monkeypatch.setattr(utils, "_loaded_implementation", None)  # whatever it becomes is undone
    return calls


def test_flash_attention_takes_rows_without_padding(flash_attention):
    """Every response is a sequence of its own in one row; values and gradients are those of padded rows."""
    model, tokens = MODELS["llama, grouped queries"](), make_tokens(SHAPES["uneven"])
    model.config._attn_implementation = "flash_attention_2"
    layout, reason = choose_layout(model, tokens, pad_token_id=0)
    assert layout == "padding_free", reason
    flash_attention.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, gradients = values_and_gradients(model.eval(), tokens, layout)
        assert flash_attention == [2 * len(tokens)] * model.config.num_hidden_layers
        plain, plain_gradients = values_and_gradients(model, tokens, "plain")
    torch.testing.assert_close(found.chosen, plain.chosen, rtol=2e-2, atol=0.2)
    torch.testing.assert_close(found.rejected, plain.rejected, rtol=2e-2, atol=0.2)
    for name, gradient in plain_gradients.items():
        assert (gradients[name] - gradient).norm() <= 0.05 * gradient.norm(), name


def test_a_wrong_mask_is_noticed(monkeypatch):
    """If the branches could see each other, the comparison with the plain forward would say so."""

    def causal_only(branch, *_):
        rows, width = branch.shape
        return torch.ones(rows, 1, width, width, dtype=torch.bool).tril()

    monkeypatch.setattr(tree_attention, "tree_mask", causal_only)
    monkeypatch.setattr(shared_prefix, "tree_mask", causal_only)
    monkeypatch.setattr(choose, "_ARCHITECTURES", {})
    model = MODELS["llama, grouped queries"]()
    layout, said = choose_layout(model, make_tokens(SHAPES["even"]), pad_token_id=0)
    assert layout == "plain_rows"
    assert "this model's log-probabilities" in said
    assert model.config._attn_implementation == "sdpa"  # as it was


def test_memory_that_is_short_says_nothing_about_a_layout(monkeypatch):
    """The plain layout needs more, so it would be no way out."""

    def short(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(choose, "FORWARDS", {**FORWARDS, "packed": short})
    with pytest.raises(torch.OutOfMemoryError):
        choose_layout(MODELS["llama, grouped queries"](), make_tokens(SHAPES["even"]), pad_token_id=0)


def test_layouts_are_tried_on_short_pairs_that_show_a_mistake():
    """Where a response has one token, nobody looks past the fork; where all are so short, the longest are taken."""
    shape = [(300, 90, 90), (1, 1, 1), (20, 9, 8), (8, 30, 30), (50, 50, 1)]
    found = choose._two_of(make_tokens(shape))
    assert [len(pair.prompt) for pair in found] == [20, 8]
    found = choose._two_of(make_tokens([(1, 1, 1), (5, 4, 4), (9, 7, 7)]))
    assert [len(pair.prompt) for pair in found] == [9, 5]


def test_a_wrong_mask_is_noticed_in_half_precision():
    """Rounding goes either way and averages out over tokens, a mistake does not; other models round more than it."""
    model, tokens = MODELS["llama, grouped queries"]().to(torch.bfloat16), make_tokens(SHAPES["even"])
    assert choose_layout(model, tokens, pad_token_id=0)[0] == "packed"
    model.config._attn_implementation = "sdpa"
    trial = choose._Trial(model.eval(), tokens, 0, use_bf16=True, is_trained=True)
    assert trial.refusal("shared_prefix") is None
    num_tokens = torch.tensor([[len(pair.chosen), len(pair.rejected)] for pair in tokens]).T
    trial.plain().add_(0.3 * num_tokens)
    assert "by up to" in trial.refusal("shared_prefix")


def test_a_backward_pass_that_fails_rules_a_layout_out(monkeypatch):
    """A GPU has other kernels for it, and finding out in the first step of a training is too late."""
    model, tokens = MODELS["llama, grouped queries"](), make_tokens(SHAPES["even"])
    enable_response_logps(model)
    trial = choose._Trial(model.eval(), tokens, 0, use_bf16=False, is_trained=True)
    trial.has_backward = True
    assert trial.refusal("packed") is None

    def refusing(*_, **__):
        raise RuntimeError("no kernel")

    monkeypatch.setattr(choose.torch.autograd, "grad", refusing)
    model.config._attn_implementation = "sdpa"
    assert "RuntimeError: no kernel" in trial.refusal("packed")
    assert model.config._attn_implementation == "sdpa"


def test_a_model_whose_forward_was_wrapped_since_is_asked_again():
    """Mixed precision wraps the forward of a model that is trained; it may be scored or trained once more."""
    model, tokens = MODELS["llama, grouped queries"](), make_tokens(SHAPES["even"])
    choose_layout(model, tokens, pad_token_id=0)
    inner = model.forward
    model.forward = lambda *args, **options: inner(*args, **options)
    assert choose_layout(model, tokens, pad_token_id=0)[0] == "packed"
    assert model(input_ids=torch.tensor([[5, 6]])).logits.shape == (1, 2, VOCABULARY)


def test_generation_is_untouched():
    model = MODELS["llama, grouped queries"]().eval()
    prompt = torch.tensor([[5, 6, 7]])
    before = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=5, do_sample=False)
    choose_layout(model, make_tokens(SHAPES["even"]), pad_token_id=0)
    enable_response_logps(model)
    assert model.config._attn_implementation == NAME
    assert NAME not in model.config.to_json_string()
    after = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=5, do_sample=False)
    assert before.tolist() == after.tolist()
