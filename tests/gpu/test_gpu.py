"""What only a GPU can show: its kernels give the plain forward's numbers, and runs in bf16 and 4 bits train there.

`pytest -m gpu tests/gpu`, or benchmarks/gpu.sh, which measures too.
"""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig

from ropo.cli.main import main
from ropo.data.tokenize import TokenizedPair
from ropo.logps.batch import LAYOUTS
from ropo.logps.choose import choose_layout
from ropo.logps.shared_prefix import FORWARDS
from ropo.provenance import read_json
from ropo.run.ledger import read_ledger

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DEVICE = "cuda"
SIZES = {
    "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "initializer_range": 0.05,
}  # fmt: skip
CONFIGS = {
    "llama": lambda: LlamaConfig(**SIZES),
    "gemma3, windows of 64": lambda: Gemma3TextConfig(**SIZES, sliding_window=64, query_pre_attn_scalar=64),
}


def make_tokens(num_pairs=12, seed=0):
    rng = np.random.default_rng(seed)
    return [
        TokenizedPair(**{
            name: rng.integers(3, 512, rng.integers(low, high)).astype(np.int32)
            for name, low, high in (("prompt", 20, 300), ("chosen", 4, 150), ("rejected", 4, 150))
        })
        for _ in range(num_pairs)
    ]  # fmt: skip


def values_and_gradients(model, tokens, layout, *, use_bf16):
    model.zero_grad()
    batch = {name: value.to(DEVICE) for name, value in LAYOUTS[layout](tokens, pad_token_id=0).items()}
    with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=use_bf16):
        logps = FORWARDS[layout](model, batch)
    (logps.chosen - logps.rejected).sum().backward()
    return torch.stack([logps.chosen, logps.rejected]).detach(), {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }


@pytest.mark.parametrize("use_bf16", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_fast_forward(name, use_bf16):
    """FlexAttention's own kernels, forward and backward, are chosen and agree with the plain forward."""
    torch.manual_seed(0)
    model, tokens = AutoModelForCausalLM.from_config(CONFIGS[name]()).to(DEVICE).eval(), make_tokens()
    layout, reason = choose_layout(model, tokens, pad_token_id=0, use_bf16=use_bf16, is_trained=True)
    assert layout == "packed", reason
    plain, plain_gradients = values_and_gradients(model, tokens, "plain", use_bf16=use_bf16)
    fast, gradients = values_and_gradients(model, tokens, layout, use_bf16=use_bf16)
    # bf16 keeps 8 bits: sums over 150 tokens differ by a few tenths of a nat whatever the layout.
    torch.testing.assert_close(fast, plain, rtol=5e-3 if use_bf16 else 1e-4, atol=0.5 if use_bf16 else 2e-2)
    for parameter, gradient in plain_gradients.items():
        difference = (gradients[parameter] - gradient).norm()
        assert difference <= (0.08 if use_bf16 else 2e-2) * gradient.norm() + 1e-6, parameter


@pytest.fixture
def words(pairs, model_folder, tmp_path):
    """The beginning of a command on twenty pairs and the tiny model."""
    rows = [{"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected} for pair in pairs]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        "train", f"--model_name_or_path={model_folder}", f"--dataset_name={tmp_path / 'pairs.jsonl'}",
        f"--output_dir={tmp_path / 'run'}", "--max_length=64", "--per_device_train_batch_size=4", "--logging_steps=1",
        "--learning_rate=1e-3", "--num_train_epochs=2", "--train_sampling_strategy=sequential", "--disable_tqdm=True",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "how",
    [
        ["--bf16=True"],
        ["--bf16=True", "--use_peft=True", "--dtype=bfloat16", "--activation_checkpointing=True"],
        ["--bf16=True", "--load_in_4bit=True"],
        ["--bf16=True", "--load_in_8bit=True"],
        ["--bf16=True", "--rounds=2", "--rho=0.2", "--num_candidates=2", "--max_new_tokens=8"],
    ],
    ids=["whole", "LoRA", "4 bits", "8 bits", "resampling"],
)
def test_runs(how, words, tmp_path):
    """The first step's margin is 0 (the model is its reference), losses fall, every pair has a margin."""
    if any("load_in" in word for word in how):
        pytest.importorskip("bitsandbytes")
    assert main([*words, *how]) == 0
    log = read_json(tmp_path / "run" / "rounds" / "00" / "training_log.json")
    losses = [line["loss"] for line in log if "loss" in line]
    assert losses[0] == pytest.approx(np.log(2), abs=0.02)
    assert losses[-1] < losses[0]
    ledger = read_ledger(tmp_path / "run" / "ledger.parquet").to_pandas()
    assert np.isfinite(ledger["held_out_margin"]).all()


def test_vllm(words, tmp_path):
    """Responses of vLLM for the prompts of dropped pairs."""
    pytest.importorskip("vllm")
    more = ["--rounds=2", "--rho=0.2", "--num_candidates=2", "--max_new_tokens=8", "--generation_engine=vllm"]
    assert main([*words, "--bf16=True", *more]) == 0
    assert (tmp_path / "run" / "rounds" / "01").is_dir()
