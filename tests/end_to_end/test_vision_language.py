"""Vision-language models: pairs of text train the language model, and what reads images stays as it is."""

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import (
    AutoModelForImageTextToText,
    Blip2Config,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Kosmos2Config,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    T5Gemma2Config,
)

from ropo.config import ROPOConfig
from ropo.data.tokenize import tokenize_pairs
from ropo.logps.batch import plain_batch
from ropo.logps.forward import plain_logps
from ropo.models.source import Model
from ropo.pairs import margin
from ropo.run.align import run_rounds
from ropo.run.ledger import read_ledger
from ropo.train.model import make_ready, parts_beside_language

TEXT = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
IMAGE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def qwen2_vl():
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2}
    return Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(text_config={**TEXT, "rope_parameters": rope}, vision_config=vision)
    )


def llava():
    vision = CLIPVisionConfig(**IMAGE, image_size=28, patch_size=14, projection_dim=16)
    return LlavaForConditionalGeneration(LlavaConfig(text_config=LlamaConfig(**TEXT), vision_config=vision))


def gemma3():
    vision = {**IMAGE, "image_size": 28, "patch_size": 14}
    text = {**TEXT, "head_dim": 8, "sliding_window": 16}
    return Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4))


MODELS = {"qwen2_vl": qwen2_vl, "gemma3": gemma3}


def config(folder):
    return ROPOConfig(
        output_dir=str(folder), use_cpu=True, disable_tqdm=True, learning_rate=1e-3, per_device_train_batch_size=10,
        max_length=64, num_folds=0, rho="0", loss="dpo", save_strategy="no", beta=0.1,
    )  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_the_language_model_is_trained(name, tokenizer, pairs, tmp_path):
    """The margins of the ledger are those of the whole model's own forward; no other weight moves."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    folder = tmp_path / name
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"size": 28}')  # what reads images is loaded with it
    run_rounds(folder, pairs, config(tmp_path / "O"))
    assert (tmp_path / "O" / "preprocessor_config.json").read_text() == '{"size": 28}'
    trained = AutoModelForImageTextToText.from_pretrained(tmp_path / "O", dtype=torch.float32).eval()
    assert type(trained) is type(model)
    beside = parts_beside_language(model)
    assert beside
    after = trained.state_dict()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, after[name])}
    assert moved
    assert not any(weight.startswith(f"{part}.") for weight in moved for part in beside)
    batch = plain_batch(tokenize_pairs(pairs, tokenizer, max_length=64).tokens, pad_token_id=0)
    with torch.no_grad():
        h = margin(plain_logps(trained, batch), plain_logps(model, batch), beta=0.1)
    ledger = read_ledger(tmp_path / "O" / "ledger.parquet")
    assert ledger["margin"].to_pylist() == pytest.approx(h.tolist(), abs=1e-4)


@pytest.mark.parametrize("kind", [Blip2Config, Kosmos2Config, T5Gemma2Config])
def test_no_language_model_by_itself(kind, tmp_path):
    """Refused by its configuration: it is called with an image only, or encodes the prompt both ways."""
    kind().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="needs a causal language model"):
        Model(tmp_path).config()


def test_what_no_loss_depends_on_is_not_trained(tokenizer):
    """Processes that share gradients would wait for them."""
    model, _ = make_ready(llava(), tokenizer, None)
    frozen = {name for name, one in model.named_parameters() if not one.requires_grad}
    assert frozen == {name for name, _ in model.named_parameters() if "language_model" not in name} - {"lm_head.weight"}


def test_an_adapter_of_the_language_model(tokenizer, pairs, tmp_path):
    llava().save_pretrained(tmp_path / "M")
    tokenizer.save_pretrained(tmp_path / "M")
    adapter = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    run_rounds(tmp_path / "M", pairs, config(tmp_path / "O"), peft_config=adapter)
    names = [*load_file(tmp_path / "O" / "adapter_model.safetensors")]
    assert len(names) == 28  # A and B of seven layers in each of two blocks
    assert all(".language_model." in name for name in names)
