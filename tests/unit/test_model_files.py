"""A model is what its files say: every way in which a folder can hold less, or another model, as a user meets it."""

import json
import logging
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    GPT2Config,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from ropo.cli.main import main
from ropo.config import ROPOConfig
from ropo.data.tokenize import TokenizedPair
from ropo.judge.reward_model import RewardModelJudge
from ropo.models import files as model_files
from ropo.models.files import not_finite
from ropo.models.fit import check_positions
from ropo.models.source import Model
from ropo.run.align import run_audit, run_rounds
from ropo.train.trainer import ROPOTrainer
from ropo_bench import own
from ropo_bench.task import TaskOptions

LAYER = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(autouse=True)
def _warned_never():
    model_files._warn_once.cache_clear()


@pytest.fixture
def dataset(pairs, tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected} for pair in pairs]
    rows[7]["chosen"] += " <tool>"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def settings(**values):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def weights(edit):
    def change(folder):
        path = folder / "model.safetensors"
        save_file(edit(load_file(path)), path, metadata={"format": "pt"})

    return change


def file(name, edit):
    """Change the bytes of a file."""

    def change(folder):
        path = folder / name
        path.write_bytes(edit(path.read_bytes() if path.exists() else b""))

    return change


def half(content):
    return content[: len(content) // 2]


def filled(value):
    def edit(tensors):
        tensors[LAYER][3, 4] = value
        return tensors

    return weights(edit)


def without(*names):
    return weights(lambda tensors: {name: tensor for name, tensor in tensors.items() if name not in names})


def other(make):
    """Another model in the folder, beside the same tokenizer."""

    def change(folder):
        (folder / "model.safetensors").unlink()
        make().save_pretrained(folder)

    return change


SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
BERT = BertConfig(vocab_size=300, **SMALL)
T5 = T5Config(vocab_size=300, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=2)


def classifier(folder):
    config = AutoConfig.from_pretrained(folder)
    config.num_labels = 1
    LlamaForSequenceClassification(config).save_pretrained(folder)


def untied(folder):
    config = AutoConfig.from_pretrained(folder)
    config.tie_word_embeddings = True
    LlamaForCausalLM(config).save_pretrained(folder)
    settings(tie_word_embeddings=False)(folder)


def tokens(**added):
    def change(folder):
        for name in ("tokenizer.json", "tokenizer_config.json"):
            path = folder / name
            found = json.loads(path.read_text())
            for number, (kind, token) in enumerate(added.items()):
                if name == "tokenizer.json":
                    content = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
                    size = len(found["model"]["vocab"])
                    found["added_tokens"].append(
                        {"id": size + number, "content": token, "special": kind != "more", **content}
                    )
                elif kind != "more":
                    found[kind] = token
            path.write_text(json.dumps(found))

    return change


def pickled(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def sharded(folder):
    model = LlamaForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="40KB")


def shard_missing(folder):
    sharded(folder)
    next(iter(sorted(folder.glob("model-00002-of-*.safetensors")))).unlink()


def index(content):
    def change(folder):
        sharded(folder)
        file("model.safetensors.index.json", lambda _: content)(folder)

    return change


INCOMPLETE = "A language model needs trained weights for all its parts; got '"
CASES = {
    "one tensor missing": (without(LAYER), f"without {LAYER}. Copy the model again"),
    "too many layers": (
        settings(num_hidden_layers=4),
        "without model.layers.2.input_layernorm.weight, model.layers.2.mlp.down_proj.weight, "
        "model.layers.2.mlp.gate_proj.weight and 15 more. Copy the model again, or correct its config.json (num_hidden",
    ),
    "no head": (untied, INCOMPLETE, "without lm_head.weight. Copy the model again"),
    "no embedding, tied": (
        lambda folder: (
            untied(folder),
            settings(tie_word_embeddings=True)(folder),
            without("model.embed_tokens.weight")(folder),
        ),
        "without lm_head.weight, model.embed_tokens.weight.",
    ),
    "another shape": (settings(vocab_size=310), "model.embed_tokens.weight [300, 32], not [310, 32]"),
    "a reward model": (
        classifier,
        "A run needs a causal language model; got '",
        " (LlamaForSequenceClassification). Name",
    ),
    "a masked LM": (
        other(lambda: BertForMaskedLM(BERT)),
        "needs a causal language model; got '",
        " (BertForMaskedLM). Name",
    ),
    "an encoder as decoder": (
        other(lambda: BertLMHeadModel(BERT)),
        "(BertLMHeadModel, whose tokens see the ones that follow: is_decoder is not set). Name one",
    ),
    "encoder and decoder": (other(lambda: T5ForConditionalGeneration(T5)), " (T5ForConditionalGeneration). Name one"),
    "unknown type": (settings(model_type="llamma"), "needs a folder with a model", "has model type `llamma` but"),
    "quantized": (
        settings(quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False}),
        "A language model needs weights that are not quantized; got '",
        "(gptq). Name the model that it was made from.",
    ),
    "a number as text": (settings(hidden_size="wide"), "needs a folder with a model", "hidden_size"),
    "pad beyond": (
        tokens(pad_token="<new pad>"),
        "A model needs an embedding for each token; ",
        "has 300, and the pad_token of its tokenizer has the id 300 ('<new pad>'). Take the tokenizer that the model",
    ),
    "eos beyond": (tokens(eos_token="<new end>"), "the eos_token of its tokenizer has the id 300 ('<new end>')"),
    "token beyond": (tokens(more="<tool>"), "has 300, and a token of row 7 has the id 300 ('<tool>')"),
    "cut off": (
        file("model.safetensors", half),
        "model.safetensors of ",
        "bytes is cut off or damaged (",
        "Copy or save",
    ),
    "header flipped": (
        file("model.safetensors", lambda content: content[:20] + bytes([content[20] ^ 255]) + content[21:]),
        "needs whole safetensors files; ",
        "is cut off or damaged (",
    ),
    "empty": (file("model.safetensors", lambda _: b""), "model.safetensors of 0 bytes is cut off or damaged ("),
    "a pointer": (
        file("model.safetensors", lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
        "is a Git LFS pointer, no weights (`git lfs pull`)",
    ),
    "no weights": (
        lambda folder: (folder / "model.safetensors").unlink(),
        "weights as safetensors; ",
        "holds none. Save",
    ),
    "pickled": (
        pickled,
        "A model needs its weights as safetensors; ",
        "holds pytorch_model.bin, a pickle, which can run",
    ),
    "no shard": (shard_missing, "A model needs all its files; ", "model-00002-of-", "is missing. Copy or save"),
    "index cut off": (
        index(b'{"weight_map": {'),
        "A model needs model.safetensors.index.json as JSON; got ",
        "Expecting",
    ),
    "index of nothing": (index(b'{"metadata": {}}'), "A model in shards needs a weight_map of names; "),
    **{
        f"{name} cut off": (file(name, half), f"A model needs {name} as JSON; got ", f"{name}: ", "Copy or save")
        for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
    },
    "empty config": (
        file("config.json", lambda _: b""),
        "config.json: Expecting value: line 1 column 1 (char 0). Copy",
    ),
    "a list as config": (file("config.json", lambda _: b"[]"), "as a JSON object; got ", "config.json with []."),
    "another tokenizer file": (
        file("tokenizer.json", lambda _: b"{}"),
        "needs a model with its tokenizer; got '",
        ". Copy or save the tokenizer there again.",
    ),
    "no such architecture": (
        file("config.json", lambda _: b'{"model_type": "fooformer"}'),
        "needs a folder with a model",
        "a new architecture needs a newer transformers.",
    ),
}


def words(command, folder, dataset, tmp_path):
    common = ["--model_name_or_path", str(folder), "--dataset_name", str(dataset)]
    return [command, *common, *(["--use_cpu", "--output_dir", str(tmp_path / "O")] if command != "validate" else [])]


@pytest.mark.parametrize("name", CASES)
def test_what_is_no_whole_model_is_refused_before_anything_is_computed(
    name, model_folder, dataset, tmp_path, monkeypatch, capsys
):
    damage, *said = CASES[name]
    damage(model_folder)
    monkeypatch.setattr(Model, "load", lambda *_, **__: pytest.fail("weights were read"))
    for command in ("train", "audit", "validate"):
        assert main(words(command, model_folder, dataset, tmp_path)) == 2
        error = capsys.readouterr().err
        assert all(part in error for part in said), error
        assert "Traceback" not in error


def test_tokens_of_pairs_for_evaluation_count_too(model_folder, dataset, tmp_path, monkeypatch, capsys):
    tokens(more="<tool>")(model_folder)
    plain = tmp_path / "plain.jsonl"
    plain.write_text(dataset.read_text().replace(" <tool>", ""))
    dataset.write_text(dataset.read_text().replace("Human:", "Human: please"))
    monkeypatch.setattr(Model, "load", lambda *_, **__: pytest.fail("weights were read"))
    for option in ("--eval_dataset_name", "--trusted"):
        assert main([*words("train", model_folder, plain, tmp_path), option, str(dataset)]) == 2
        assert "7 has the id 300 ('<tool>')" in capsys.readouterr().err


def test_pairs_for_evaluation_need_positions_too(model_folder, dataset, tmp_path, monkeypatch, capsys):
    config = GPT2Config(vocab_size=300, n_embd=32, n_layer=1, n_head=2, n_positions=128)
    other(lambda: AutoModelForCausalLM.from_config(config))(model_folder)
    longer = tmp_path / "longer.jsonl"
    longer.write_text(json.dumps({"prompt": "p" * 200, "chosen": "yes", "rejected": "no"}) + "\n")
    monkeypatch.setattr(Model, "load", lambda *_, **__: pytest.fail("weights were read"))
    for option in ("--eval_dataset_name", "--trusted"):
        assert main([*words("train", model_folder, dataset, tmp_path), option, str(longer)]) == 2
        assert "128 positions; got" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("family", "shape", "most"),
    [
        ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 32}, 64),
        ("bart", {"d_model": 32, "decoder_layers": 1, "decoder_attention_heads": 4}, 64),
        ("roberta", {"intermediate_size": 64, "pad_token_id": 1}, 62),  # positions begin behind that of the padding
        ("llama", {"intermediate_size": 64}, None),
    ],
)
def test_positions_end_where_the_table_of_an_architecture_does(family, shape, most, caplog):
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "is_decoder": True, **shape}
    config = CONFIG_MAPPING[family](vocab_size=300, max_position_embeddings=64, **shape)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    for length in (*((most, most + 1) if most else (64, 65, 90)),):
        parts = {"prompt": [3] * (length - 4), "chosen": [5] * 4, "rejected": [7]}
        pair = TokenizedPair(**{name: np.array(ids, dtype=np.int32) for name, ids in parts.items()})
        asked = partial(check_positions, Model("M"), skeleton, SimpleNamespace(tokens=[pair]))
        if most and length > most:
            with pytest.raises(ValueError, match=f"M has {most} positions; got a pair of {length} tokens"):
                asked()
        else:
            asked()
    assert ("made for 64 positions" in caplog.text) == (most is None)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_named_and_not_the_data(value, model_folder, dataset, tmp_path, capsys):
    filled(value)(model_folder)
    assert main(words("train", model_folder, dataset, tmp_path)) == 2
    error = capsys.readouterr().err
    assert f"finite weights; {model_folder} " in error
    assert f" in {LAYER}. " in error


def test_a_half_precision_that_is_too_small_for_a_weight(model_folder):
    filled(1e30)(model_folder)
    assert not not_finite(Model(str(model_folder)).load())
    with pytest.raises(ValueError, match=r"finite weights; .*float16\)"):
        Model(str(model_folder), load_options={"dtype": "float16"}).load()


def test_a_trainer_blames_weights_for_what_they_do(model, tokenizer, pairs, tmp_path):
    args = ROPOConfig(output_dir=str(tmp_path / "O"), use_cpu=True, loss="simpo", report_to="none")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0] = float("nan")
    trainer = ROPOTrainer(model, args, train_dataset=pairs, processing_class=tokenizer)
    with pytest.raises(FloatingPointError, match=rf"model has .* in {LAYER} at step 0\."):
        trainer.train()


def test_tensors_without_a_place_are_told_once(model_folder, caplog):
    settings(num_hidden_layers=1)(model_folder)
    source = Model(str(model_folder))
    with caplog.at_level(logging.WARNING):
        source.skeleton()
        source.load()
        source.load()
    told = [record.message for record in caplog.records if record.name == "ropo.models.files"]
    assert len(told) == 1
    assert f"{model_folder} holds tensors" in told[0]
    assert "model.layers.1.input_layernorm.weight" in told[0]
    assert "and 6 more." in told[0]


LLAMA = {**SMALL, "vocab_size": 300, "num_hidden_layers": 2}
WHOLE = {
    "tied": GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=2),
    "tied, rotary": AutoConfig.for_model("llama", tie_word_embeddings=True, **LLAMA),
    "experts": AutoConfig.for_model("mixtral", num_local_experts=4, num_key_value_heads=2, **LLAMA),
    "a decoder from an encoder": BertConfig(vocab_size=300, is_decoder=True, **SMALL),
    "a text model within": AutoConfig.for_model(
        "gemma3",
        text_config={**LLAMA, "model_type": "gemma3_text", "head_dim": 16, "num_key_value_heads": 1},
        vision_config={**SMALL, "image_size": 28, "patch_size": 14},
    ),
    "recurrent": AutoConfig.for_model("mamba", vocab_size=300, hidden_size=32, num_hidden_layers=2, state_size=4),
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_model_is_taken_without_a_word(name, tmp_path, caplog):
    """Whatever ties its weights, stacks them when it is loaded, or leaves buffers out of its files."""
    AutoModelForCausalLM.from_config(WHOLE[name]).save_pretrained(tmp_path)
    source = Model(str(tmp_path))
    skeleton, model = source.skeleton(), source.load()
    assert skeleton.state_dict().keys() == model.state_dict().keys()
    assert all(weight.is_meta for weight in skeleton.parameters())
    assert not [record for record in caplog.records if record.name.startswith("ropo")]


def test_a_model_in_shards_is_taken(model_folder):
    whole = Model(str(model_folder)).load().state_dict()
    sharded(model_folder)
    assert len([*model_folder.glob("model-*.safetensors")]) > 1
    source = Model(str(model_folder))
    source.skeleton()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in source.load().state_dict().items())


def test_every_door_is_guarded(model_folder, pairs, dataset, tmp_path, tokenizer, capsys):
    """The trainer alone, answers for a benchmark, a task of the benchmark: none makes weights up."""
    without(LAYER)(model_folder)
    args = ROPOConfig(output_dir=str(tmp_path / "O"), use_cpu=True, report_to="none")
    match = f"without {LAYER}"
    with pytest.raises(ValueError, match=match):
        ROPOTrainer(str(model_folder), args, train_dataset=pairs)
    with pytest.raises(ValueError, match=match):
        Model(str(model_folder)).load()
    questions = tmp_path / "questions.json"
    questions.write_text(json.dumps([{"instruction": "hi", "dataset": "d"}]))
    export = ["export", "--model_name_or_path", str(model_folder), "--benchmark", "alpaca_eval"]
    assert main([*export, "--questions", str(questions), "--output_dir", str(tmp_path / "E")]) == 2
    assert match in capsys.readouterr().err
    judge = {"judge": "endpoint", "judge_model": "m", "judge_url": "http://127.0.0.1:9/v1"}
    with pytest.raises(ValueError, match=match):
        own.make(
            tmp_path / "own",
            TaskOptions(num_pairs=2, num_held_out=2, seed=0, source=dataset, model=str(model_folder), judge=judge),
        )
    model = LlamaForCausalLM(AutoConfig.from_pretrained(model_folder))
    model.resize_token_embeddings(200)
    with pytest.raises(ValueError, match=r"tiny_model has 200, .*row \d+"):
        ROPOTrainer(model, args, train_dataset=pairs, processing_class=tokenizer)


def test_export_knows_its_tokens_before_it_asks(model_folder, tmp_path, capsys):
    tokens(more="<tool>")(model_folder)
    questions = tmp_path / "questions.json"
    questions.write_text(json.dumps([{"instruction": "call <tool>", "dataset": "d"}]))
    export = ["export", "--model_name_or_path", str(model_folder), "--benchmark", "alpaca_eval"]
    assert main([*export, "--questions", str(questions), "--output_dir", str(tmp_path / "E")]) == 2
    assert "1 has the id 300 ('<tool>')" in capsys.readouterr().err


def test_a_reward_model_is_checked_like_a_policy(model_folder, pairs, tmp_path):
    classifier(model_folder)
    filled(float("nan"))(model_folder)
    judge = RewardModelJudge(str(model_folder), tmp_path / "kept")
    with pytest.raises(ValueError, match=f"reward model .*finite .* {LAYER}"):
        judge(pairs)
    tokens(pad_token="<new pad>")(model_folder)
    filled(0.0)(model_folder)
    with pytest.raises(ValueError, match=r"pad_token .*id 300"):
        judge(pairs)
    without(LAYER)(model_folder)
    with pytest.raises(ValueError, match=f"reward model .*trained .* {LAYER}"):
        RewardModelJudge(str(model_folder), tmp_path / "kept")
    file("model.safetensors", half)(model_folder)
    with pytest.raises(ValueError, match="whole safetensors files"):
        RewardModelJudge(str(model_folder), tmp_path / "kept")


def test_nobody_is_asked_whether_to_run_the_code_of_a_model(model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a run asks at the terminal"))
    settings(model_type="own", auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"})(model_folder)
    (model_folder / "own.py").write_text("raise SystemExit")
    for read in (
        Model(str(model_folder)).config,
        Model(str(model_folder)).load,
        lambda: RewardModelJudge(str(model_folder), tmp_path / "judge"),
    ):
        with pytest.raises(ValueError, match="custom code"):
            read()


def test_what_a_round_left_damaged_is_named_with_what_to_delete(model_folder, tmp_path):
    source, trained = Model(str(model_folder)), tmp_path / "rounds" / "00" / "model"
    LlamaForCausalLM.from_pretrained(model_folder).save_pretrained(trained)
    without(LAYER)(trained)
    with pytest.raises(ValueError, match=rf"without {LAYER}. Delete {trained}, "):
        source.load(trained)
    filled_again = {**load_file(trained / "model.safetensors"), LAYER: torch.full((64, 32), float("nan"))}
    save_file(filled_again, trained / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FloatingPointError, match=f"{trained} left NaN .* {LAYER}. Lower"):
        source.load(trained)
    file("model.safetensors", half)(trained)
    with pytest.raises(ValueError, match=f"{trained}/model.safetensors of .* damaged"):
        source.load(trained)


def test_an_adapter_of_a_round_is_whole(model_folder, tmp_path):
    source, trained = Model(str(model_folder), adapter=LoraConfig(task_type="CAUSAL_LM")), tmp_path / "model"
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    lora = LoraConfig(r=2, target_modules=["up_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    get_peft_model(base, lora).save_pretrained(trained)
    path = trained / "adapter_model.safetensors"
    source.load(trained, is_trainable=True)
    whole = load_file(path)
    name = next(name for name in whole if "lora_A" in name)
    save_file({one: tensor for one, tensor in whole.items() if one != name}, path, metadata={"format": "pt"})
    with (
        pytest.warns(UserWarning, match="missing adapter keys"),
        pytest.raises(ValueError, match=f"without {name}. Delete"),
    ):
        source.load(trained)
    save_file({**whole, name: whole[name][:1].clone()}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"adapter .*got '{trained}': .*size mismatch"):
        source.load(trained)
    path.write_bytes(half(path.read_bytes()))
    with pytest.raises(ValueError, match=r"adapter_model.safetensors of .* damaged"):
        source.load(trained)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_model.safetensors is missing"):
        source.load(trained)
    file("adapter_config.json", half)(trained)
    with pytest.raises(ValueError, match=r"adapter_config.json as JSON"):
        source.load(trained)


def test_a_model_object_is_checked_too(model, tokenizer, pairs, tmp_path):
    with torch.no_grad():
        model.lm_head.weight[3, 3] = float("nan")
    args = ROPOConfig(output_dir=str(tmp_path / "O"), use_cpu=True, report_to="none", num_folds=0, rho=0.0)
    with pytest.raises(ValueError, match=r"finite .*initial_model .*lm_head.weight"):
        run_rounds(model, pairs, args, processing_class=tokenizer)


def test_a_model_object_is_known_by_its_configuration_too(model, tokenizer, pairs, tmp_path):
    """The same weights with another one are another model, whose run this folder does not hold."""
    args = ROPOConfig(output_dir=str(tmp_path / "O"), use_cpu=True, report_to="none", num_folds=2, max_length=64)
    first = run_audit(model, pairs, args, processing_class=tokenizer)
    assert run_audit(model, pairs, args, processing_class=tokenizer).rho == first.rho
    model.config.rms_norm_eps = 0.5
    with pytest.raises(ValueError, match="began with another model"):
        run_audit(model, pairs, args, processing_class=tokenizer)


def test_where_the_initial_weights_are_says_nothing_of_trained_ones(model_folder, tmp_path, monkeypatch):
    model = Model(str(model_folder), load_options={"variant": "fp16", "revision": "v2", "attn_implementation": "eager"})
    seen = []
    monkeypatch.setattr("ropo.models.source.load_whole", lambda *given: seen.append(given[1:]))
    model._weights(tmp_path / "trained")
    assert seen == [(str(tmp_path / "trained"), {"dtype": "float32", "attn_implementation": "eager"})]
    with pytest.raises(ValueError, match="needs dtype; got torch_dtype"):
        Model("m", load_options={"torch_dtype": "bfloat16"})


def test_an_adapter_remembers_the_revision_of_its_model():
    given = LoraConfig(target_modules=["q_proj"])
    assert Model("someone/tiny", adapter=given, load_options={"revision": "v2"}).adapter.revision == "v2"
    assert given.revision is None


def test_code_that_is_trusted_names_a_model(model_folder):
    before = Model(str(model_folder)).fingerprint()
    (model_folder / "modeling_tiny.py").write_text("SCALE = 2\n")
    assert Model(str(model_folder)).fingerprint() != before


@pytest.mark.parametrize("is_cached", [True, False])
def test_a_hub_id_is_checked_where_it_was_downloaded(is_cached, model_folder, tmp_path, monkeypatch):
    """Its damaged file is a link in the cache: what has to go is what it points to."""
    file("model.safetensors", half)(model_folder)
    link = tmp_path / "snapshot"
    link.mkdir()
    for path in model_folder.iterdir():
        (link / path.name).symlink_to(path)
    found = str(link / "config.json") if is_cached else None
    monkeypatch.setattr(model_files, "try_to_load_from_cache", lambda *_, **__: found)
    monkeypatch.setattr(
        model_files.AutoConfig, "from_pretrained", lambda *_, **__: LlamaForCausalLM.config_class(**LLAMA)
    )
    source = Model("someone/tiny")
    if not is_cached:
        source.skeleton()
        return
    with pytest.raises(ValueError, match=f"{link}/model.safetensors .* Delete {model_folder}/model.safetensors: "):
        source.skeleton()
