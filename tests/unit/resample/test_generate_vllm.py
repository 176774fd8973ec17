"""What vLLM is told and how its answers are read, with a stand-in of the parts of its interface that are used."""

import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from accelerate import PartialState
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig

from ropo.provenance import RunError
from ropo.sampling.engine import Prompt, Response, Sampling
from ropo.sampling.generate import sample_responses
from ropo.sampling.vllm_engine import VllmEngine

SAMPLING = Sampling(num_candidates=2, max_new_tokens=5, temperature=0.7, top_p=0.9)


@pytest.fixture
def vllm(monkeypatch):
    """Answers every prompt with its last token, then the number of the candidate; the first candidate ends."""
    made = ModuleType("vllm")
    made.__spec__ = ModuleSpec("vllm", None)
    made.started, made.asked, made.events = [], [], []

    class LLM:
        def __init__(self, model, **options):
            made.started.append({"model": model, **options})
            made.events.append("start")
            core = SimpleNamespace(shutdown=lambda: made.events.append("shutdown"))
            self.llm_engine = SimpleNamespace(engine_core=core)

        def generate(self, prompts, sampling_params, *, use_tqdm, lora_request):
            assert use_tqdm is False
            made.asked += zip(prompts, sampling_params, [lora_request] * len(prompts), strict=True)
            return [
                SimpleNamespace(outputs=made.outputs(prompt["prompt_token_ids"][-1], params))
                for prompt, params in zip(prompts, sampling_params, strict=True)
            ]

    def outputs(token, params):
        return [
            SimpleNamespace(
                index=k,
                token_ids=[token, 70 + k, *([2] if k == 0 else [])],
                finish_reason="length" if k else "stop",
            )
            for k in reversed(range(params.n))
        ]

    made.LLM, made.SamplingParams, made.outputs = LLM, SimpleNamespace, outputs
    request = ModuleType("vllm.lora.request")
    request.LoRARequest = lambda name, number, path: (name, number, path)
    for name, module in (("vllm", made), ("vllm.lora", ModuleType("vllm.lora")), ("vllm.lora.request", request)):
        monkeypatch.setitem(sys.modules, name, module)
    return made


def sample(engine, *prompts, sampling=SAMPLING):
    advanced = []
    return engine.sample(
        [Prompt(ids, 11 + i) for i, ids in enumerate(prompts)], sampling, lambda *n: advanced.append(n)
    )


def test_what_is_told(vllm, tokenizer, model_folder):
    engine = VllmEngine(model_folder, tokenizer, options={"trust_remote_code": True})
    assert vllm.started == []
    found = sample(engine, [5, 6, 80], [81])
    given = Path(vllm.started[0].pop("tokenizer"))
    assert AutoTokenizer.from_pretrained(given).get_vocab() == tokenizer.get_vocab()
    assert vllm.started == [
        {
            "model": str(model_folder),
            "max_model_len": 8,
            "dtype": "auto",
            "trust_remote_code": True,
        }
    ]
    assert [(prompt, lora) for prompt, _, lora in vllm.asked] == [
        ({"prompt_token_ids": [5, 6, 80]}, None),
        ({"prompt_token_ids": [81]}, None),
    ]
    assert [vars(params) for _, params, _ in vllm.asked] == [
        {
            "seed": seed,
            "n": 2,
            "max_tokens": 5,
            "temperature": 0.7,
            "top_p": 0.9,
            "stop_token_ids": [2],
            "detokenize": False,
        }
        for seed in (11, 12)
    ]
    assert found == [
        [
            Response(text=tokenizer.decode([token, 70]), num_tokens=2, is_finished=True, ids=(token, 70, 2)),
            Response(text=tokenizer.decode([token, 71]), num_tokens=2, is_finished=False, ids=(token, 71)),
        ]
        for token in (80, 81)
    ]
    engine.close()
    assert not given.exists()


def test_started_once_and_again_for_longer_texts(vllm, tokenizer):
    engine = VllmEngine("m", tokenizer)
    for prompt in ([3] * 9, [3] * 4, [3] * 20):
        sample(engine, prompt)
    engine.close()
    assert [options["max_model_len"] for options in vllm.started] == [14, 25]
    assert vllm.events == ["start", "shutdown", "start", "shutdown"]
    engine.close()
    assert vllm.events == ["start", "shutdown", "start", "shutdown"]


def test_the_likeliest_tokens_are_asked_for_by_0(vllm, tokenizer):
    """vLLM raises a temperature below 0.01 to that, at which others are drawn, too."""
    sample(VllmEngine("m", tokenizer), [3], sampling=Sampling(num_candidates=1, max_new_tokens=5, temperature=1e-4))
    assert vllm.asked[0][1].temperature == 0


def test_responses_end_where_positions_do(vllm, tokenizer, model_folder):
    LlamaConfig(max_position_embeddings=10).save_pretrained(model_folder)
    engine = VllmEngine(model_folder, tokenizer)
    sample(engine, [3] * 8, [3] * 2)
    assert [options["max_model_len"] for options in vllm.started] == [10]
    assert [params.max_tokens for _, params, _ in vllm.asked] == [2, 5]
    with pytest.raises(RunError, match="shorter than the model's 10 positions; got one of 10 tokens"):
        sample(engine, [3] * 10)


def test_adapters_are_handed_over(vllm, tokenizer, tmp_path):
    for rank, pattern, told in ((4, {}, 8), (16, {"layers.0": 40}, 64)):
        (tmp_path / "adapter_config.json").write_text(json.dumps({"r": rank, "rank_pattern": pattern}))
        sample(VllmEngine("base", tokenizer, adapter=tmp_path, use_bf16=True), [80])
        started = vllm.started[-1]
        assert (started["model"], started["enable_lora"], started["max_lora_rank"]) == ("base", True, told)
        assert started["dtype"] == "bfloat16"
        assert vllm.asked[-1][2] == ("policy", 1, str(tmp_path))
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 1024}))
    with pytest.raises(ValueError, match=r"LoRA rank .*512; got 1024"):
        VllmEngine("base", tokenizer, adapter=tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "init_lora_weights": "pissa"}))
    with pytest.raises(ValueError, match=r"adapter of the model as it is; got .* began by pissa"):
        VllmEngine("base", tokenizer, adapter=tmp_path)


def test_published_ends_are_told(vllm, tokenizer, model_folder):
    GenerationConfig(eos_token_id=[2, 77]).save_pretrained(model_folder)
    sample(VllmEngine(model_folder, tokenizer), [80])
    assert vllm.asked[-1][1].stop_token_ids == [2, 77]


def test_memory_that_is_free(vllm, tokenizer, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (30, 80))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    sample(VllmEngine("m", tokenizer), [80])
    assert vllm.started[0]["gpu_memory_utilization"] == pytest.approx(0.3375, abs=1e-3)


def test_wrong_number_of_responses(vllm, tokenizer):
    vllm.outputs = lambda *_: []
    with pytest.raises(RuntimeError, match=r"2 responses .*got 1 answers of \[0\]"):
        sample(VllmEngine("m", tokenizer), [80])


def test_shards(vllm, tokenizer, tmp_path):
    """It serves `sample_responses` as any engine does; what is finished starts no vLLM."""
    options = {"sampling": SAMPLING, "folder": tmp_path, "model_digest": "m"}
    prompts = [[80], [81, 82]]
    first = sample_responses(VllmEngine("m", tokenizer), tokenizer, prompts, **options)
    assert [each.prompt for each in first] == [0, 0, 1, 1]
    assert len(vllm.started) == 1
    assert sample_responses(VllmEngine("m", tokenizer), tokenizer, prompts, **options) == first
    assert len(vllm.started) == 1


def test_missing_package(tokenizer, monkeypatch):
    monkeypatch.setattr("ropo.sampling.vllm_engine.find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"pip install 'ropo\[vllm\]'"):
        VllmEngine("m", tokenizer)


@pytest.mark.usefixtures("vllm")
def test_several_processes(tokenizer, monkeypatch):
    PartialState()
    monkeypatch.setitem(PartialState._shared_state, "num_processes", 2)
    with pytest.raises(ValueError, match=r"got 2\. .*`vllm serve`"):
        VllmEngine("m", tokenizer)
