"""Quantized bases, adapters of every kind, runs that start from an adapter: each ends in a folder that PEFT loads."""

import copy
import json
import math
import warnings
from dataclasses import replace

import pytest
import torch
from huggingface_hub import constants
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from ropo.cli.main import main
from ropo.config import ROPOConfig
from ropo.data.tokenize import tokenize_pairs
from ropo.logps import response_head
from ropo.logps.batch import Batching, pad_token_id_of
from ropo.logps.score import score_pairs
from ropo.models.adapters import add_adapter, load_adapter, read_peft_config
from ropo.models.fit import check_adapter
from ropo.models.quantized import compute_as_in_training, quantization
from ropo.models.source import Model
from ropo.run.align import run_audit, run_rounds
from ropo.train.trainer import ROPOTrainer

NUM_BITS = pytest.mark.parametrize("num_bits", [4, 8])


@pytest.fixture(autouse=True)
def _on_a_cpu(monkeypatch):
    monkeypatch.setattr("ropo.models.quantized.is_torch_bf16_gpu_available", lambda: False)


def config(folder, **options):
    common = {
        "output_dir": str(folder), "learning_rate": 1e-2, "per_device_train_batch_size": 5, "logging_steps": 1,
        "warmup_steps": 0, "lr_scheduler_type": "constant", "num_train_epochs": 3, "max_length": 64, "use_cpu": True,
        "disable_tqdm": True, "num_folds": 2, "train_sampling_strategy": "sequential",
    }  # fmt: skip
    return ROPOConfig(**{**common, **options})


def lora(**options):
    return LoraConfig(**{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options})


def loaded_in(num_bits):
    return {"quantization_config": quantization(num_bits=num_bits)}


def assert_trained(result, folder):
    """Margins of the first step are 0, losses fall, and there is a report."""
    log = json.loads((folder / "rounds" / "00" / "training_log.json").read_text())
    losses = [line["loss"] for line in log if "loss" in line]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)
    assert losses[-1] < 0.6
    first = load_file(folder / "rounds" / "00" / "first_margins.safetensors")["margins"]
    assert first[:5].abs().max() < 1e-4
    assert first[-5:].abs().max() > 1e-3
    assert "<html" in (folder / "report.html").read_text()
    assert result.summary["num_pairs"] == 20


def scored_by(model, pairs, tokenizer):
    tokens = tokenize_pairs(pairs, tokenizer, max_length=64).tokens
    return score_pairs(model.eval(), tokens, Batching(pad_token_id=pad_token_id_of(tokenizer)))


def assert_scores(model, folder, pairs, tokenizer):
    """A model that somebody else has loaded gives the log-probabilities of the trained one."""
    trained, found = load_file(folder / "rounds" / "00" / "scores.safetensors"), scored_by(model, pairs, tokenizer)
    torch.testing.assert_close(found.chosen, trained["chosen"], rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(found.rejected, trained["rejected"], rtol=1e-4, atol=1e-3)


@NUM_BITS
def test_a_quantized_base(num_bits, model_folder, pairs, tokenizer, tmp_path):
    folder = tmp_path / "O"
    source = Model(model_folder, adapter=lora(), load_options=loaded_in(num_bits))
    assert_trained(run_rounds(source, pairs, config(folder)), folder)
    settings = quantization(num_bits=num_bits)
    by_peft = AutoPeftModelForCausalLM.from_pretrained(folder, quantization_config=settings, dtype="float32")
    compute_as_in_training(by_peft)
    assert_scores(by_peft, folder, pairs, tokenizer)
    merged = source.merged(folder)
    assert not hasattr(merged.config, "quantization_config")
    merged.save_pretrained(tmp_path / "merged")
    assert_scores(Model(tmp_path / "merged").load(), folder, pairs, tokenizer)


def test_quantization_identifies_a_run(model_folder, pairs, tmp_path, monkeypatch):
    """An audit needs no adapter; the same call takes it up again, another quantization does not."""
    folder = tmp_path / "O"
    run_audit(Model(model_folder, load_options=loaded_in(4)), pairs, config(folder))
    assert json.loads((folder / "ropo_config.json").read_text())["model"][1]["quantization_config"]["load_in_4bit"]
    with pytest.raises(ValueError, match="other settings"):
        run_audit(Model(model_folder), pairs, config(folder))
    with pytest.raises(ValueError, match="other settings"):
        run_audit(Model(model_folder, load_options=loaded_in(8)), pairs, config(folder))
    monkeypatch.setattr(Model, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    run_audit(Model(model_folder, load_options=loaded_in(4)), pairs, config(folder))
    with pytest.raises(ValueError, match="cannot be trained; got quantization_config and no adapter"):
        run_rounds(Model(model_folder, load_options=loaded_in(4)), pairs, config(tmp_path / "P"))


@pytest.mark.slow
def test_references_of_other_precisions_are_kept_apart(model_folder, pairs, tmp_path):
    for name, options in (("32", {}), ("4", loaded_in(4)), ("8", loaded_in(8))):
        source = Model(model_folder, load_options=options)
        run_audit(source, pairs, config(tmp_path / name, reference_cache_dir=tmp_path / "R"))
    assert len([*(tmp_path / "R").iterdir()]) == 3


@pytest.mark.slow
def test_killed_in_4_bits(model_folder, pairs, tmp_path, monkeypatch):
    steps, step = [], ROPOTrainer.training_step

    def dying(self, *args, **kwargs):
        steps.append(self.state.global_step)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    def run(folder):
        source = Model(model_folder, adapter=lora(), load_options=loaded_in(4))
        run_rounds(source, pairs, config(folder, save_strategy="steps", save_steps=2, num_folds=0, rho="0"))
        return load_file(folder / "adapter_model.safetensors")

    whole = run(tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(ROPOTrainer, "training_step", dying)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "killed")
        resumed = run(tmp_path / "killed")
    assert steps[:5] == [0, 1, 2, 3, 2]
    for name, weight in whole.items():
        torch.testing.assert_close(resumed[name], weight, rtol=0, atol=0)


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"use_rslora": True},
        {"modules_to_save": ["lm_head"]},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "orthogonal"},
        {"init_lora_weights": "mica"},
    ],
)
def test_kinds_of_lora(options, model_folder, pairs, tokenizer, tmp_path):
    """PiSSA and OLoRA change the weights below them; the reference is the model as it was."""
    folder = tmp_path / "O"
    assert_trained(run_rounds(Model(model_folder, adapter=lora(**options)), pairs, config(folder)), folder)
    assert_scores(AutoPeftModelForCausalLM.from_pretrained(folder), folder, pairs, tokenizer)


@pytest.mark.parametrize("begin", [False, "pissa_niter_4", "corda"])
def test_adapters_that_begin_elsewhere(begin, model_folder, model, tokenizer, pairs, tmp_path):
    adapter = lora()
    adapter.init_lora_weights = begin
    with pytest.raises(ValueError, match=f"init_lora_weights .*; got {begin!r}, with which training begins elsewhere"):
        Model(model_folder, adapter=adapter)
    with pytest.raises(ValueError, match="init_lora_weights"):
        ROPOTrainer(model, config(tmp_path), train_dataset=pairs, processing_class=tokenizer, peft_config=adapter)


def test_an_adapter_of_a_part_of_each_text(model_folder):
    """Packed rows hold several texts, and PEFT looks for the tokens that switch it on once in a row."""
    with pytest.raises(ValueError, match="got alora_invocation_tokens"):
        Model(model_folder, adapter=lora(alora_invocation_tokens=[5, 6]))


@pytest.mark.parametrize("given", [{"modules_to_save": ["lm_head"]}, {"bias": "all"}])
def test_what_is_trained_in_16_bits_is_refused(given, model_folder, pairs, tmp_path, model, tokenizer):
    """LoRA's own weights are kept in 32, whatever the model has; whatever else is trained would hardly move."""
    adapter = lora(**given)
    model.model.layers[0].self_attn.q_proj.bias = torch.nn.Parameter(torch.zeros(32))
    with pytest.raises(ValueError, match=r"needs 32 bits, .*; got .* of an adapter in 16"):
        check_adapter(model.bfloat16(), adapter)
    check_adapter(model.float(), adapter)
    if "modules_to_save" in given:
        source = Model(model_folder, adapter=adapter, load_options={"dtype": "bfloat16"})
        with pytest.raises(ValueError, match=r"got lm_head.*weight of an adapter in 16"):
            run_rounds(source, pairs, config(tmp_path / "O"))
    check_adapter(model.bfloat16(), lora())


@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings:UserWarning")  # the trouble that is tested
@pytest.mark.filterwarnings("ignore:Setting .save_embedding_layers:UserWarning")
@pytest.mark.parametrize("where", ["embed_tokens", "lm_head"])
def test_an_adapter_of_one_side_of_tied_embeddings_is_merged_there(where, model_folder, model, tmp_path):
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(model_folder)
    adapted = add_adapter(AutoModelForCausalLM.from_pretrained(model_folder), lora(target_modules=["q_proj", where]))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name or "lora_embedding_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    adapted.save_pretrained(tmp_path / "trained")
    merged = Model(model_folder, adapter=lora(target_modules=["q_proj", where])).merged(tmp_path / "trained")
    merged.save_pretrained(tmp_path / "merged")
    ids = torch.tensor([[5, 9, 33, 7]])
    with torch.no_grad():
        wanted = adapted.eval()(input_ids=ids).logits
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(input_ids=ids).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-3)


def test_pissa_of_quantized_weights(model_folder):
    with pytest.raises(ValueError, match="init_lora_weights pissa needs weights that are not quantized"):
        Model(model_folder, adapter=lora(init_lora_weights="pissa"), load_options=loaded_in(4))


@pytest.fixture
def sft(model_folder, tmp_path):
    """An adapter that somebody has trained: dropout, an odd scale, no tokenizer beside it."""
    adapted = add_adapter(AutoModelForCausalLM.from_pretrained(model_folder), lora(lora_alpha=12, lora_dropout=0.1))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    adapted.save_pretrained(tmp_path / "sft")
    return tmp_path / "sft"


@pytest.mark.parametrize("options", [{}, "4 bits"])
def test_a_run_from_an_adapter(options, sft, model_folder, pairs, tokenizer, tmp_path, caplog):
    caplog.set_level("INFO")
    folder, options = tmp_path / "O", loaded_in(4) if options else {}
    source = Model(sft, load_options=options)
    assert_trained(run_rounds(source, pairs, config(folder)), folder)
    assert f"{sft} is an adapter of {model_folder}: it is trained further" in caplog.text
    reference = load_file(folder / "reference" / "reference_logps.safetensors")
    below = AutoModelForCausalLM.from_pretrained(model_folder, dtype="float32", **options)
    compute_as_in_training(below)
    assert (scored_by(below, pairs, tokenizer).chosen - reference["chosen"]).abs().max() > 0.5
    by_peft = scored_by(PeftModel.from_pretrained(below, sft), pairs, tokenizer)
    torch.testing.assert_close(by_peft.chosen, reference["chosen"], rtol=1e-4, atol=1e-3)
    written = PeftConfig.from_pretrained(folder)
    assert (written.base_model_name_or_path, written.lora_alpha) == (str(model_folder), 12)
    below = AutoModelForCausalLM.from_pretrained(model_folder, dtype="float32", **options)
    compute_as_in_training(below)
    assert_scores(PeftModel.from_pretrained(below, folder), folder, pairs, tokenizer)
    before, after = (load_file(one / "adapter_model.safetensors") for one in (sft, folder))
    assert before.keys() == after.keys()
    assert all((before[name] - after[name]).abs().max() > 0 for name in before)


def test_the_scale_of_an_adapter_is_part_of_the_reference(sft, pairs, tmp_path):
    """Its tensors are the same, the model with it is another."""
    for alpha in (12, 24):
        path = sft / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "lora_alpha": alpha}))
        run_audit(sft, pairs, config(tmp_path / f"{alpha}", reference_cache_dir=tmp_path / "R"))
    assert len([*(tmp_path / "R").iterdir()]) == 2


def test_an_adapter_of_fold_models_starts_there_too(sft, pairs, tmp_path, monkeypatch):
    loaded, load = [], Model.load
    monkeypatch.setattr(Model, "load", lambda self, *args, **how: loaded.append(how) or load(self, *args, **how))
    run_audit(sft, pairs, config(tmp_path / "O", scorer="models", num_train_epochs=1))
    assert {"is_trainable": True} in loaded


def test_an_adapter_on_the_hub(sft, pairs, tmp_path, monkeypatch):
    """Its base is found as its settings say; a revision is the adapter's."""
    repository = tmp_path / "hub" / "models--someone--adapter"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    sft.rename(snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "v2").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    source = Model("someone/adapter", load_options={"revision": "v2"})
    assert source.start == snapshot
    assert source.base[1]["revision"] is None
    assert len(run_audit(source, pairs, config(tmp_path / "O")).summary["flip_rate"]) == 3


def settings_of(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_an_adapter_whose_base_is_not_there(sft, pairs, tmp_path):
    for name, said in (
        ("./no/such/base", r"names './no/such/base': no such folder.* Write there where it is"),
        (None, "needs base_model_name_or_path"),
        (str(sft), "a whole model under it; .* an adapter itself"),
    ):
        settings_of(sft, base_model_name_or_path=name)
        with pytest.raises((ValueError, FileNotFoundError), match=said):
            run_rounds(sft, pairs, config(tmp_path / "O"))


def train(model, dataset, output, *words):
    common = ["--max_length", 64, "--use_cpu", "--num_folds", 2, "--max_steps", 1, "--warmup_steps", 0]
    places = ["--model_name_or_path", model, "--dataset_name", dataset, "--output_dir", output]
    return main(["train", *map(str, [*places, *common, *words])])


@pytest.fixture
def dataset(pairs, tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [{name: getattr(pair, name) for name in ("prompt", "chosen", "rejected")} for pair in pairs]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_command_line(model_folder, dataset, tmp_path, pairs, tokenizer, capsys):
    """4 bits imply an adapter; what was written is trained further, and then answers as a whole model."""
    first, second = tmp_path / "first", tmp_path / "second"
    assert train(model_folder, dataset, first, "--load_in_4bit", "--lora_r", 2, "--merge_adapter") == 0
    said = capsys.readouterr().out
    assert "An adapter is trained, as if use_peft had been given." in said
    assert "Linear layers of the base: 4 bits (nf4, its scales in 8), products in float32." in said
    assert PeftConfig.from_pretrained(first).r == 2
    assert_scores(Model(first / "merged").load(), first, pairs, tokenizer)
    assert train(model_folder, dataset, first, "--load_in_4bit", "--lora_r", 2) == 0
    assert (first / "merged").exists()  # of the same adapter
    assert train(model_folder, dataset, first, "--load_in_4bit", "--lora_r", 2, "--rounds", 2) == 0
    assert not (first / "merged").exists()  # of the one before
    assert train(first, dataset, second, "--use_peft", "--load_in_4bit") == 0
    assert "is trained further, and the reference is that model with it" in capsys.readouterr().out
    assert PeftConfig.from_pretrained(second).base_model_name_or_path == str(model_folder)
    assert train(first, dataset, tmp_path / "third", "--use_peft", "--lora_r", 2) == 2
    assert "lora_r needs a whole model, which gets a new adapter; got" in capsys.readouterr().err


def test_settings_in_a_file(model_folder, dataset, tmp_path, capsys):
    path, folder = tmp_path / "adapter.yaml", tmp_path / "O"
    path.write_text("peft_type: LORA\nr: 2\ntarget_modules: [q_proj]\nuse_dora: true\ninference_mode: true\n")
    assert train(model_folder, dataset, folder, "--peft_config", path) == 0
    found = PeftConfig.from_pretrained(folder)
    assert (found.r, found.use_dora, found.target_modules) == (2, True, {"q_proj"})
    assert any("magnitude" in name for name in load_file(folder / "adapter_model.safetensors"))
    assert read_peft_config(folder / "adapter_config.json").inference_mode is False  # as PEFT saves it
    assert train(model_folder, dataset, tmp_path / "P", "--peft_config", path, "--lora_r", 2) == 2
    assert "lora_r needs peft_config left out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rank: 2", "LORA of PEFT has no option 'rank'"),
        ("peft_type: lorra", "peft_type needs one of .*LORA.*; got 'lorra'"),
        ("task_type: SEQ_CLS", "task_type needs CAUSAL_LM"),
        ("layers_to_transform: [1]\ntarget_modules: x.*", "PEFT refuses it"),
        ("[1]", "--peft_config needs a YAML file"),
    ],
)
def test_settings_that_peft_does_not_take(text, said, tmp_path):
    path = tmp_path / "adapter.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=said):
        read_peft_config(path)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_an_adapter_with_tokens_of_its_own(model_folder, tokenizer, pairs, tmp_path, caplog):
    """As a training with a new chat template leaves it: its tokenizer has more tokens than its base."""
    caplog.set_level("INFO")  # else nothing is forecast
    base, longer = AutoModelForCausalLM.from_pretrained(model_folder), copy.deepcopy(tokenizer)
    longer.add_tokens(["<|im_start|>"])
    base.resize_token_embeddings(len(longer), mean_resizing=False)
    adapted = add_adapter(base, lora(modules_to_save=["embed_tokens", "lm_head"]))
    for one in (adapted, longer):
        one.save_pretrained(tmp_path / "sft")
    asked = [replace(pair, prompt=f"<|im_start|>{pair.prompt}") for pair in pairs]
    folder = tmp_path / "O"
    assert_trained(run_rounds(tmp_path / "sft", asked, config(folder)), folder)
    assert "this run takes about" in caplog.text
    assert_scores(AutoPeftModelForCausalLM.from_pretrained(folder), folder, asked, longer)


def test_files_that_are_quantized(model_folder, tokenizer, pairs, tmp_path):
    """They are taken where that is asked for, in as many bits."""
    AutoModelForCausalLM.from_pretrained(model_folder, **loaded_in(4)).save_pretrained(tmp_path / "M")
    tokenizer.save_pretrained(tmp_path / "M")
    for options in ({}, loaded_in(8)):
        with pytest.raises(ValueError, match=r"not quantized; got .*\(bitsandbytes\).*, or add load_in_4bit"):
            Model(tmp_path / "M", load_options=options).skeleton()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You passed `quantization_config`", UserWarning)
        found = [Model(folder, load_options=loaded_in(4)) for folder in (tmp_path / "M", model_folder)]
        first, second = (scored_by(source.load(), pairs, tokenizer) for source in found)
    assert found[0].skeleton() is not None
    torch.testing.assert_close(first.chosen, second.chosen)


def test_bitsandbytes_is_missing(monkeypatch):
    monkeypatch.setattr("ropo.models.quantized.find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"load_in_4bit needs bitsandbytes; got none. pip install 'ropo\[quantized\]'"):
        quantization(num_bits=4)


def test_a_quantized_head(model_folder, pairs, tokenizer, monkeypatch):
    """Its packed weights have another shape than the head; every layout agrees with the plain one all the same."""
    settings = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["nothing"])
    model = Model(model_folder, load_options={"quantization_config": settings}).load()
    assert type(model.lm_head).__name__ == "Linear4bit"
    plain = Batching(pad_token_id=pad_token_id_of(tokenizer))
    tokens = tokenize_pairs(pairs, tokenizer, max_length=64).tokens
    found = score_pairs(model, tokens, plain)
    ids = torch.tensor([[*tokens[0].prompt, *tokens[0].chosen]])
    with torch.no_grad():
        logps = model(input_ids=ids).logits.log_softmax(-1)[0]
    first = len(tokens[0].prompt)
    wanted = sum(logps[first + i - 1, token] for i, token in enumerate(tokens[0].chosen))
    assert found.chosen[0] == pytest.approx(float(wanted), abs=1e-2)
    calls = []
    model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    monkeypatch.setattr(response_head, "LOGITS_BUDGET_BYTES", {"cpu": 4 * 40 * len(tokenizer)})
    response_head.response_logps(torch.randn(40, 32), torch.zeros(40).long(), model.lm_head)
    assert len(calls) == 1


def test_quantized_layers_stay_as_in_training(model_folder, tokenizer):
    """On a CPU with instructions for bfloat16 the weights would be packed anew, and the numbers others."""
    for num_bits in (4, 8):
        model = Model(model_folder, load_options=loaded_in(num_bits)).load()
        ids = torch.tensor([tokenizer("the soup was good")["input_ids"]])
        with torch.no_grad():
            in_training, in_evaluation = (model.train(mode)(input_ids=ids).logits for mode in (True, False))
        assert torch.equal(in_training, in_evaluation)


def test_no_deprecation_is_shown(model_folder, sft):
    """The one that PEFT raises is ignored by all tests, so it is looked for here."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        base = AutoModelForCausalLM.from_pretrained(model_folder)
        add_adapter(base, lora())
        load_adapter(AutoModelForCausalLM.from_pretrained(model_folder), sft, is_trainable=True, advice="")


@NUM_BITS
def test_gradient_checkpoints_of_a_quantized_base(num_bits, model_folder, pairs, tmp_path):
    """Gradients reach the adapters of every layer, though the embeddings are frozen."""
    found = []
    for is_on in (False, True):
        source = Model(model_folder, adapter=lora(), load_options=loaded_in(num_bits))
        folder = tmp_path / str(is_on)
        options = {"activation_checkpointing": is_on, "max_steps": 2, "num_folds": 0, "rho": "0"}
        run_rounds(source, pairs, config(folder, **options))
        found.append(load_file(folder / "adapter_model.safetensors"))
    for name, weight in found[0].items():
        torch.testing.assert_close(found[1][name], weight, rtol=1e-3, atol=1e-5)
        assert "lora_B" not in name or weight.abs().max() > 0
