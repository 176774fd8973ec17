"""The routers' loss of each layout is that of `transformers` on the tokens that are read, each prompt once or twice."""

import numpy as np
import pytest
import torch
from peft import LoraConfig
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from ropo.config import ROPOConfig
from ropo.data.tokenize import TokenizedPair
from ropo.logps.batch import LAYOUTS
from ropo.logps.shared_prefix import FORWARDS, balance_load, enable_response_logps
from ropo.logps.tree_attention import NAME
from ropo.train.trainer import ROPOTrainer

SHAPE = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
MODELS = {
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SHAPE, num_local_experts=4)),
    "qwen2_moe": lambda: Qwen2MoeForCausalLM(Qwen2MoeConfig(**SHAPE, **EXPERTS)),
    "olmoe": lambda: OlmoeForCausalLM(OlmoeConfig(**SHAPE, num_experts=4, num_experts_per_tok=2)),
    "gpt_oss": lambda: GptOssForCausalLM(GptOssConfig(**SHAPE, num_local_experts=4, head_dim=8)),
}


def make_tokens():
    rng = np.random.default_rng(0)
    return [
        TokenizedPair(**{
            name: rng.integers(3, 300, size).astype(np.int32)
            for name, size in zip(("prompt", "chosen", "rejected"), sizes, strict=True)
        })
        for sizes in ((9, 4, 7), (5, 8, 3), (12, 2, 2))
    ]  # fmt: skip


def by_transformers(model, tokens, *, is_shared):
    """Each response in a row of its own, without padding; of a shared prompt the first row's tokens count."""
    layers = []
    for pair in tokens:
        for begin, response in ((0, pair.chosen), (len(pair.prompt) if is_shared else 0, pair.rejected)):
            ids = torch.from_numpy(np.concatenate([pair.prompt, response])).long()[None]
            found = model(input_ids=ids, output_router_logits=True).router_logits
            end = ids.shape[1] - is_shared
            layers.append([layer[begin:end] for layer in found])
    joined = tuple(torch.cat(layer) for layer in zip(*layers, strict=True))
    return load_balancing_loss_func(joined, model.num_experts, model.num_experts_per_tok)


@pytest.mark.parametrize("layout", ["plain_rows", "shared_prefix", "packed"])
@pytest.mark.parametrize("name", MODELS)
def test_it_is_that_of_transformers(name, layout):
    model, tokens = MODELS[name]().eval(), make_tokens()
    with torch.no_grad():
        wanted = by_transformers(model, tokens, is_shared=layout != "plain_rows")
    if layout == "packed":
        if name == "gpt_oss":
            pytest.skip("its attention takes no packed rows")
        model.set_attn_implementation(NAME)
    enable_response_logps(model)
    balance = balance_load(model, 0.1)
    FORWARDS[layout](model, LAYOUTS[layout](tokens, pad_token_id=0))
    assert balance.loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    before = balance.loss
    with torch.no_grad():  # scoring computes none
        FORWARDS[layout](model, LAYOUTS[layout](tokens, pad_token_id=0))
    assert balance.loss is before


def config(folder, **options):
    return ROPOConfig(
        output_dir=str(folder), use_cpu=True, disable_tqdm=True, loss="dpo", learning_rate=0, max_steps=1,
        per_device_train_batch_size=20, save_strategy="no", max_length=64, logging_steps=1, **options,
    )  # fmt: skip


@pytest.mark.parametrize("use_peft", [False, True])
def test_a_step_with_it(use_peft, tokenizer, pairs, tmp_path):
    """By option, or as the configuration asks; by default there is none."""
    found = []
    for asks, coefficient in ((False, None), (False, 0.5), (True, None), (True, 0.0)):
        torch.manual_seed(0)
        model = MODELS["mixtral"]()
        model.config.output_router_logits, model.config.router_aux_loss_coef = asks, 0.25
        trainer = ROPOTrainer(
            model, config(tmp_path, router_aux_loss_coef=coefficient), train_dataset=pairs, processing_class=tokenizer,
            peft_config=LoraConfig(r=2, target_modules=["q_proj"]) if use_peft else None,
        )  # fmt: skip
        trainer.train()
        found.append(trainer.state.log_history[0])
    plain, given, asked, off = found
    assert "loss/router" not in plain
    assert plain["loss"] == off["loss"]
    assert given["loss/router"] == asked["loss/router"] > 2  # two experts to a token
    assert given["loss"] - plain["loss"] == pytest.approx(0.5 * given["loss/router"], rel=1e-4)
    assert asked["loss"] - plain["loss"] == pytest.approx(0.25 * asked["loss/router"], rel=1e-4)


def test_no_model_of_experts(model, tokenizer, pairs, tmp_path):
    with pytest.raises(ValueError, match="LlamaForCausalLM"):
        ROPOTrainer(model, config(tmp_path, router_aux_loss_coef=0.1), train_dataset=pairs, processing_class=tokenizer)


def test_checkpoints_that_would_take_its_gradient(tokenizer, pairs, tmp_path):
    """Reentrant ones read the routers in a pass without gradients."""
    again = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}}
    with pytest.raises(ValueError, match="needs activation checkpoints that are not reentrant"):
        ROPOTrainer(
            MODELS["mixtral"](), config(tmp_path, router_aux_loss_coef=0.5, **again), train_dataset=pairs,
            processing_class=tokenizer,
        )  # fmt: skip
