"""Which engine is made from which options, and what is refused before anything is loaded."""

import dataclasses
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
from accelerate import PartialState

from ropo.config import ROPOConfig
from ropo.options import takers_of
from ropo.sampling.engines import ENGINES, Reach, open_engine
from ropo.sampling.server_engine import ServerEngine
from ropo.sampling.transformers_engine import TransformersEngine
from ropo.sampling.vllm_engine import VllmEngine

SERVER = {
    "generation_engine": "server",
    "generation_url": "http://localhost:8000/v1",
    "generation_model": "policy",
    "num_candidates": 2,
}


@pytest.fixture
def has_vllm(monkeypatch):
    module = ModuleType("vllm")
    module.__spec__ = ModuleSpec("vllm", None)
    monkeypatch.setitem(sys.modules, "vllm", module)


def config(tmp_path, **options):
    return ROPOConfig(output_dir=str(tmp_path), use_cpu=True, **{"rounds": 2, **options})


def test_every_option_of_an_engine_exists():
    assert takers_of(ENGINES) == {
        name: ["server"] for name in ("generation_url", "generation_model", "generation_api_key_env")
    }
    known = {field.name: field for field in dataclasses.fields(ROPOConfig)}
    for option in takers_of(ENGINES):
        assert known[option].default is None
        assert known[option].metadata["help"].startswith("server: ")
    assert all(name in known["generation_engine"].metadata["help"] for name in ENGINES)


def test_defaults(tmp_path):
    args = config(tmp_path)
    assert (args.generation_engine, args.generation_url, args.generation_api_key_env) == ("transformers", None, None)
    assert config(tmp_path, **SERVER).generation_api_key_env == "OPENAI_API_KEY"
    assert config(tmp_path, **SERVER, generation_api_key_env="MY_KEY").generation_api_key_env == "MY_KEY"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"generation_engine": "vlm"}, "generation_engine needs one of transformers, vllm, server; got 'vlm'. Did you"),
        (
            {"generation_url": "http://h/v1"},
            "generation_url needs generation_engine server; got generation_engine trans",
        ),
        ({"generation_model": "m"}, "generation_model needs generation_engine server"),
        ({"generation_api_key_env": "K"}, "generation_api_key_env needs generation_engine server"),
        ({**SERVER, "generation_url": None}, "server needs generation_url and generation_model; got no generation_url"),
        (
            {**SERVER, "generation_model": ""},
            "server needs generation_url and generation_model; got no generation_model",
        ),
        ({**SERVER, "generation_url": "localhost:8000"}, "generation_url needs an http:// or https:// address"),
        ({**SERVER, "num_candidates": 0}, "generation_engine server needs something to sample; got num_candidates 0"),
        ({"top_p": 1.1}, r"top_p needs a number in \(0, 1\]; got 1.1"),
        ({"generation_engine": "vllm", "num_candidates": 2}, "Engine vllm needs the package vllm; got an installation"),
    ],
)
def test_refusals(options, words, tmp_path, monkeypatch):
    monkeypatch.setattr("ropo.sampling.vllm_engine.find_spec", lambda _: None)
    with pytest.raises(ValueError, match=words):
        config(tmp_path, **options)


def test_a_key_in_the_wrong_place_is_not_repeated(tmp_path):
    with pytest.raises(ValueError, match="generation_api_key_env needs") as error:
        config(tmp_path, **SERVER, generation_api_key_env="sk-abc123")
    assert "abc123" not in str(error.value)


def test_a_key_goes_nowhere_unencrypted(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-0123456789abc")
    with pytest.raises(ValueError, match="generation_url needs https"):
        config(tmp_path, **{**SERVER, "generation_url": "http://example.com/v1"}, generation_api_key_env="MY_KEY")


@pytest.mark.usefixtures("has_vllm")
def test_vllm_where_it_is_installed(tmp_path, monkeypatch):
    assert config(tmp_path, generation_engine="vllm", num_candidates=2).generation_engine == "vllm"
    monkeypatch.setattr(ROPOConfig, "world_size", 2)
    with pytest.raises(ValueError, match=r"vllm needs .*; got 2"):
        config(tmp_path, generation_engine="vllm", num_candidates=2)


@pytest.mark.usefixtures("has_vllm")
def test_engines_are_made_of_what_they_need(model, tokenizer, tmp_path):
    """Nothing is loaded, and what is on a hub keeps the revision it was loaded with."""
    (tmp_path / "adapter_config.json").write_text('{"r": 16}')
    PartialState()
    reach = Reach(
        tokenizer=tokenizer,
        load=lambda: pytest.fail("a model was loaded"),
        folder="base",
        adapter=tmp_path,
        load_options={"revision": "v2", "dtype": "float32", "trust_remote_code": False},
        use_bf16=True,
        url="http://localhost:8000/v1",
        name="policy",
    )
    kinds = {"transformers": TransformersEngine, "vllm": VllmEngine, "server": ServerEngine}
    assert set(kinds) == set(ENGINES)
    identities = {}
    for name, kind in kinds.items():
        with open_engine(name, reach) as engine:
            assert isinstance(engine, kind)
            assert engine.tokens_per_shard > 1000
            identities[name] = engine.identity
    assert identities["vllm"]["options"] == {
        "dtype": "bfloat16", "revision": "v2", "enable_lora": True, "max_loras": 1, "max_lora_rank": 16,
    }  # fmt: skip
    with open_engine("vllm", dataclasses.replace(reach, adapter=None)) as engine:
        assert engine.identity["options"] == {"dtype": "bfloat16", "revision": "v2"}
    assert identities["transformers"] == {"engine": "transformers", "use_bf16": True}
    assert identities["server"] == {"engine": "server", "model": "policy"}


def test_engines_are_closed_whatever_happens(tokenizer, monkeypatch):
    closed = []
    monkeypatch.setattr(TransformersEngine, "close", lambda self: closed.append(self))
    with pytest.raises(KeyError), open_engine("transformers", Reach(tokenizer=tokenizer, load=dict, folder="m")):
        raise KeyError
    assert len(closed) == 1
