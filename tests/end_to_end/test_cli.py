"""Every command as a user types it: twenty pairs, CPU, offline."""

import json
import os
import subprocess
import sys

import datasets
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, GPTJConfig, LlamaConfig

from ropo import __version__
from ropo.cli.arguments import dataset_of, parse_train
from ropo.cli.main import main
from ropo.cli.outcome import say_rate
from ropo.cli.words import without_secrets
from ropo.config import ROPOConfig
from ropo.data.read import HubDataset
from ropo.run.ledger import SCHEMA
from ropo.train.trainer import ROPOTrainer

SLOW = pytest.mark.slow

RECIPE = """\
learning_rate: 3e-3
per_device_train_batch_size: 4
max_length: 64
max_new_tokens: 24
num_candidates: 8
sample_from: policy
max_repetition: 1.0
max_resampled_share: 1.0
max_length_ratio: 30
use_cpu: true
rho: 0.3
rounds: 2
num_folds: 2
decision_rule: lowest_loss
"""


PLAIN = ("--num_candidates", "0")


@pytest.fixture
def dataset(pairs, tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected} for pair in pairs]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def train(model_folder, dataset, recipe, output, *more):
    words = [
        "--model_name_or_path",
        model_folder,
        "--dataset_name",
        dataset,
        "--output_dir",
        output,
        "--config",
        recipe,
        *more,
    ]
    return main(["train", *map(str, words)])


def test_train_keeps_its_contract(model_folder, dataset, recipe, tmp_path, capsys, pairs):
    output = tmp_path / "O"
    assert train(model_folder, dataset, recipe, output) == 0
    out, error = capsys.readouterr()
    assert str(output / "report.html") in out
    assert error == ""  # without a terminal a stage shows a line a minute at most, and these take seconds
    assert not {"it/s", "{'loss'"} & set(out.split())
    assert len(out.splitlines()) < 60

    AutoModelForCausalLM.from_pretrained(output)
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert tokenizer.chat_template
    assert (output / "generation_config.json").exists()

    ledger = pq.read_table(output / "ledger.parquet")
    assert ledger.schema.names == SCHEMA.names
    rows = ledger.to_pylist()
    first = [row for row in rows if row["round"] == 0]
    assert [row["row"] for row in first] == list(range(20))
    assert [row["pair_id"] for row in first] == [pair.id for pair in pairs]
    assert sum(row["weight"] for row in first) == 14
    dropped = [row for row in first if row["decision"] != "keep"]
    assert len(dropped) == 6
    kept = [row for row in first if row["decision"] == "keep"]
    assert max(row["held_out_margin"] for row in dropped) <= min(row["held_out_margin"] for row in kept)
    assert {row["origin"] for row in rows if row["round"] == 1} == {"data", "resampled"}

    summary = json.loads((output / "summary.json").read_text())
    assert set(summary["flip_rate"]) == {"estimate", "low", "high"}
    assert summary["num_pairs"] == 20
    assert summary["num_kept"] + summary["num_dropped"] + summary["num_flipped"] == 20
    assert summary["problems"] == {"truncated": 2, "text_without_template": 1}
    assert summary["config"]["rho"] == "0.3"
    assert {"torch", "transformers", "ropo"} <= set(summary["versions"])
    assert {"reference", "audit linear", "audit judge", "round 0 train", "round 1 decide"} <= set(summary["seconds"])

    card = (output / "README.md").read_text()
    assert summary["data_sha256"] in card
    assert "learning_rate: 0.003" in card
    assert "<html" in (output / "report.html").read_text()
    assert len((output / "problems.jsonl").read_text().splitlines()) == 3
    assert {path.name for path in (output / "rounds" / "00").iterdir()} >= {
        "manifest.json", "model", "scores.safetensors", "flip_estimate.json", "decisions.json", "resampled.jsonl",
    }  # fmt: skip


def test_an_evaluation_set(model_folder, dataset, recipe, tmp_path, capsys):
    """Given to a run that is finished: nothing is trained, and its part of the data is read where there are several."""
    output, unseen = tmp_path / "O", [{"prompt": "Hi", "chosen": " good", "rejected": f" bad {i}"} for i in range(4)]
    DatasetDict({"train": Dataset.from_list(unseen[:1]), "test": Dataset.from_list(unseen)}).save_to_disk(
        tmp_path / "E"
    )
    assert train(model_folder, dataset, recipe, output, *PLAIN) == 0
    assert "Evaluation accuracy" not in capsys.readouterr().out
    made = (output / "rounds" / "01" / "model" / "model.safetensors").stat().st_mtime_ns
    words = ("--eval_dataset_name", tmp_path / "E", "--eval_dataset_split", "test")
    assert train(model_folder, dataset, recipe, output, *PLAIN, *words) == 0
    said = capsys.readouterr().out
    assert "Evaluation accuracy" in said
    assert "on 4 pairs" in said
    assert (output / "rounds" / "01" / "model" / "model.safetensors").stat().st_mtime_ns == made
    summary = json.loads((output / "summary.json").read_text())
    assert [entry["round"] for entry in summary["evaluation"]["rounds"]] == [0, 1]


def test_lora(model_folder, dataset, recipe, tmp_path):
    output = tmp_path / "O"
    assert train(model_folder, dataset, recipe, output, "--use_peft", "--lora_r", "4", "--round_start", "carry_on") == 0
    assert (output / "adapter_model.safetensors").exists()
    assert not (output / "model.safetensors").exists()
    AutoModelForCausalLM.from_pretrained(output)


@pytest.mark.parametrize("loss", ["simpo", *(pytest.param(name, marks=SLOW) for name in ("ipo", "plc_dpo", "rappo"))])
def test_other_losses_run_through(loss, model_folder, dataset, recipe, tmp_path):
    assert train(model_folder, dataset, recipe, tmp_path / "O", "--loss", loss, "--decision_rule", "relabel") == 0


def test_conversations(model_folder, recipe, tmp_path, pairs):
    def say(role, text):
        return {"role": role, "content": text}

    rows = [
        {
            "chosen": [say("user", pair.prompt), say("assistant", pair.chosen)],
            "rejected": [say("user", pair.prompt), say("assistant", pair.rejected)],
        }
        for pair in pairs
    ]
    dataset = tmp_path / "chat.json"
    dataset.write_text(json.dumps(rows))
    assert train(model_folder, dataset, recipe, tmp_path / "O", "--max_length", "96") == 0


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--los", "dpo"], "unknown option --los. Did you mean loss?"),
        (["--loss", "dop"], "Did you mean dpo?"),
        (["--loss", "dpo", "--alpha", "14"], "dpo needs no options; got alpha"),
        (["--loss", "rdpo", "--loss_args", "flip_rate=0.6"], "rdpo needs flip_rate in [0, 0.5)"),
        (["--loss", "rdpo", "--flip_rate", "0.1"], "unknown option --flip_rate. It is in loss_args"),
        (["--rho", "0.7"], "rho needs 'auto' or a share in [0, 0.5]"),
        (["--alpha", "much"], "alpha needs a number or 'auto'; got 'much'"),
        (
            ["--loss", "ropo_v1", "--loss_args", "gamma=1", "--alpha", "auto"],
            "alpha needs a number for ropo_v1; got 'auto'",
        ),
        (["--alpha", "-1"], "alpha"),
        (["--rounds", "1"], "num_candidates needs rounds of 2 or more; got 8 with one round"),
        (["--num_folds", "1"], "num_folds needs 2 or more, or 0 for none"),
        (["--num_folds", "30"], "num_folds needs at least as many different pairs; got 30 folds and 20 pairs"),
        (["--decision_rule", "lowest_los"], "Did you mean lowest_loss?"),
        (["--label_smoothing_factor", "0.1"], "--loss cdpo --loss_args flip_rate="),
        (["--beta", "-1"], "beta"),
        (["--loss", "dr_dpo", "--gradient_accumulation_steps", "2"], "whole batch at once"),
        (["--max_repetition", "2"], "max_repetition needs a number from 0 to 1; got 2.0"),
        (["--max_copies", "0"], "max_copies needs 1 or more; got 0"),
        (["--max_resampled_share", "0"], "max_resampled_share needs a number above 0; got 0"),
        (
            ["--num_folds", "0", "--rounds", "1", *PLAIN],
            "rho 0.3 needs margins to filter by before the last training; got num_folds 0 and one round",
        ),
        (
            ["--eval_strategy", "epoch"],
            "eval_strategy epoch needs an evaluation set; got none",
        ),
        (["--lora_r", "8"], "lora_r needs use_peft, without which the whole model is trained"),
        (
            ["--dtype", "bf16"],
            "dtype needs one of float32, bfloat16, float16, auto; got 'bf16'. Did you mean bfloat16?",
        ),
        (["--num_train_epochs", "0"], "num_train_epochs needs a number above 0; got 0.0"),
        (["--max_steps", "0"], "max_steps needs 1 or more, or -1"),
        (
            [],
            "model_name_or_path needs a folder with a model, or the id of one on the hub; got 'no/such/model': no such",
        ),
        (["--loss", "sigmoid"], "It is dpo here."),
        (["--loss_type", "sigmoid"], "unknown option --loss_type. It is loss here."),
        (["--load-in-4bit", "--load_in_8bit"], "load_in_4bit needs load_in_8bit left out; got both"),
        (["--bnb_4bit_quant_type", "fp4"], "bnb_4bit_quant_type needs load_in_4bit; got it alone"),
        (["--load_in_4bit", "--bnb_4bit_quant_type", "nf5"], "bnb_4bit_quant_type needs one of nf4, fp4; got 'nf5'"),
        (["--peft_config", "no/such.yaml"], "--peft_config needs a YAML file; no/such.yaml is"),
        (["--use_dora"], "use_dora needs use_peft, without which the whole model is trained"),
        (["--split", "test"], "unknown option --split. It is dataset_split here."),
        (["--dataset_split", "test"], "Leave split (--dataset_split) at 'train'"),
        (["--push_to_hub"], "push_to_hub needs the hub; got HF_HUB_OFFLINE=1"),
        (["--resume_from_checkpoint", "C"], "Rerun the same command to resume a run; got resume"),
        (["--per_device_train_batch_size", "0"], "per_device_train_batch_size needs 1 or more; got 0"),
        (["--seed", "-1"], "seed needs 0 or more; got -1"),
        (["--seed", "4294967295"], "seed needs a number below 4294967295; got 4294967295"),
        (["--learning_rate", "-1"], "learning_rate needs 0 or more; got -1"),
        (["--use_peft", "--lora_r", "0"], "lora_r needs 1 or more; got 0"),
        (["--use_peft", "--lora_dropout", "1"], "lora_dropout needs a number in [0, 1); got 1.0"),
        (["--report_to", "wand"], "Did you mean wandb?"),
        (["--eval_dataset_split", "test"], "eval_dataset_split needs eval_dataset_name, of which it is a part"),
        (["--sample_from", "referenc"], "Did you mean reference?"),
        (
            ["--generation_engine", "server", "--generation_url", "http://localhost:1/v1", "--generation_model", "m"],
            "sample_from policy needs an engine that loads the model in training",
        ),
    ],
)
def test_misuse_is_told_before_anything_is_loaded(more, said, dataset, recipe, tmp_path, capsys):
    assert train("no/such/model", dataset, recipe, tmp_path / "O", *more) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "O").exists()


def test_a_folder_of_something_else_is_refused_before_anything_is_read(
    model_folder, dataset, recipe, capsys, monkeypatch
):
    monkeypatch.setattr("ropo.run.prepare.read_checked", lambda *_, **__: pytest.fail("the data was read"))
    for folder in (model_folder, dataset.parent):
        before = sorted(path.name for path in folder.iterdir())
        assert train(model_folder, dataset, recipe, folder) == 2
        assert f"{folder} holds other files" in capsys.readouterr().err
        assert sorted(path.name for path in folder.iterdir()) == before


def test_a_warm_up_without_end_costs_no_reference(model_folder, dataset, recipe, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("ropo.models.source.Model.load", lambda *_, **__: pytest.fail("a model was loaded"))
    assert train(model_folder, dataset, recipe, tmp_path / "O", "--warmup_steps", "1e9") == 2
    said = capsys.readouterr().err
    for part in ("warmup_steps", "the 5 steps", "1e+09"):
        assert part in said


@pytest.mark.parametrize(
    ("more", "hidden", "said"),
    [
        (
            ["--report_to", "wandb"],
            "ropo.train.checks.get_available_reporting_integrations",
            "report_to wandb needs its",
        ),
        (["--use_liger_kernel"], "ropo.train.checks.is_liger_kernel_available", "use_liger_kernel needs the package"),
        (
            ["--optim", "adamw_bnb_8bit"],
            "transformers.trainer_optimizer.is_bitsandbytes_available",
            "optim adamw_bnb_8bit needs a package",
        ),
    ],
)
def test_a_missing_package_is_told_before_anything_is_loaded(
    more, hidden, said, dataset, recipe, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(hidden, list)  # nothing is there
    assert train("no/such/model", dataset, recipe, tmp_path / "O", *more) == 2
    assert said in capsys.readouterr().err


def test_a_package_that_a_library_misses_is_one_sentence(dataset, recipe, tmp_path, capsys, monkeypatch):
    def miss(*_, **__):
        raise ImportError("deepspeed is not installed")

    monkeypatch.setattr("ropo.cli.train.run_rounds", miss)
    assert train("M", dataset, recipe, tmp_path / "O") == 2
    assert "deepspeed is not installed" in capsys.readouterr().err


@pytest.mark.parametrize("modules", ["c_attn", "foo"])
def test_an_adapter_that_does_not_fit_costs_no_reference(
    modules, model_folder, dataset, recipe, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("ropo.models.source.Model.load", lambda *_, **__: pytest.fail("a model was loaded"))
    words = ["--use_peft", "--lora_target_modules", modules]
    assert train(model_folder, dataset, recipe, tmp_path / "O", *words) == 2
    out, error = capsys.readouterr()
    assert f"modules {{'{modules}'}} not found" in error
    for layer in ("down_proj", "gate_proj", "k_proj", "lm_head", "o_proj", "q_proj"):
        assert layer in error
    assert "cannot be told" not in out


@pytest.mark.parametrize("more", [[], ["--use_peft"]])
def test_an_attention_that_is_not_there_is_told_once(more, model_folder, dataset, recipe, tmp_path, capsys):
    assert train(model_folder, dataset, recipe, tmp_path / "O", "--attn_implementation", "foo", *more) == 2
    out, error = capsys.readouterr()
    assert 'attn_implementation="foo"`' in error
    assert "cannot be told" not in " ".join(out.split())


def test_several_gpus_in_one_process(dataset, recipe, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ROPOConfig, "n_gpu", 2)
    assert train("no/such/model", dataset, recipe, tmp_path / "O") == 2
    assert "per GPU; got 2" in capsys.readouterr().err


def test_missing_arguments(dataset, capsys):
    assert main(["train", "--dataset_name", str(dataset)]) == 2
    assert "--model_name_or_path is missing" in capsys.readouterr().err
    assert main(["trian"]) == 2
    assert "mean train?" in capsys.readouterr().err
    assert main([]) == 2


def test_recipe_is_checked(dataset, tmp_path, capsys):
    recipe = tmp_path / "r.yaml"
    for line, said in (("learning_rat: 1e-3", "Did you mean learning_rate"), ("torch_dtype: auto", "It is dtype here")):
        recipe.write_text(f"{line}\n")
        assert train("m", dataset, recipe, tmp_path / "O") == 2
        assert f"unknown option {line.split(':')[0]!r}. {said}" in capsys.readouterr().err


def test_recipe_that_is_no_yaml(dataset, tmp_path, capsys):
    recipe = tmp_path / "bad.yaml"
    recipe.write_text("beta: [1, 2\nrho: 0.2\n")
    for command in ("train", "bench"):
        words = ["--model_name_or_path", "M", "--dataset_name", str(dataset)] if command == "train" else []
        assert main([command, *words, "--output_dir", str(tmp_path / "O"), "--config", str(recipe)]) == 2
        first, *_ = capsys.readouterr().err.splitlines()  # one sentence with the place, and how to see more
        assert first.startswith(f"ropo {command}: --config ")
        assert f"{recipe}, line 2, column 4: " in first


@pytest.mark.parametrize(
    ("line", "said"), [("loss: [ropo]", "loss needs one value; got ['ropo']"), ("num_folds:", "num_folds has no value")]
)
def test_values_of_a_recipe(line, said, dataset, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"{line}\n")
    assert train("no/such/model", dataset, recipe, tmp_path / "O") == 2
    assert f"{recipe}: {said}" in capsys.readouterr().err


def test_bf16_without_a_gpu(dataset, tmp_path, capsys):
    words = ["--model_name_or_path", "M", "--dataset_name", str(dataset), "--output_dir", str(tmp_path / "O"), "--bf16"]
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert main(["train", *words]) == 2
    assert "bf16 needs a GPU" in capsys.readouterr().err


def test_no_token_in_the_report(model_folder, dataset, recipe, tmp_path):
    more = [*PLAIN, "--rounds", "1", "--hub_token", "hf_secret1", "--push_to_hub_token=hf_secret2"]
    assert train(model_folder, dataset, recipe, tmp_path / "O", *more[:6]) == 0
    assert without_secrets(more)[4:] == ["--hub_token", "...", "--push_to_hub_token=..."]
    hyphens = ["--hub-token", "hf_secret1", "--hub-token=hf_secret2", "--max_new_tokens", "7"]
    assert without_secrets(hyphens) == ["--hub-token", "...", "--hub-token=...", "--max_new_tokens", "7"]
    for name in ("summary.json", "report.html", "report.md", "README.md", "ropo_config.json"):
        assert "hf_secret1" not in (tmp_path / "O" / name).read_text()
    summary = json.loads((tmp_path / "O" / "summary.json").read_text())
    assert "--hub_token ..." in summary["command"]
    assert {"max_new_tokens", "max_tokens_per_batch"} <= set(summary["config"])
    assert not {"hub_token", "push_to_hub_token"} & set(summary["config"])


def test_command_line_wins_over_recipe(recipe):
    words = ["--model_name_or_path", "m", "--dataset_name", "d", "--output_dir", "o", "--config", str(recipe)]
    assert parse_train(words)[1].learning_rate == 3e-3  # YAML alone reads this as text
    assert parse_train([*words, "--learning_rate", "1e-5"])[1].learning_rate == 1e-5


def test_bad_rows(dataset, model_folder, recipe, tmp_path, capsys):
    lines = dataset.read_text().splitlines()
    lines[3] = '{"prompt": "x", "chosen": "y"}'
    lines[7] = "not json"
    dataset.write_text("\n".join(lines) + "\n")
    assert main(["validate", str(dataset)]) == 1
    out = capsys.readouterr().out
    assert "missing_field" in out
    assert "row 3" in out
    assert "line 8" in out
    assert train(model_folder, dataset, recipe, tmp_path / "O") == 1
    assert "2 of 20 rows" in capsys.readouterr().err
    assert train(model_folder, dataset, recipe, tmp_path / "O", "--on_bad_rows", "skip", "--rounds", "1", *PLAIN) == 0
    summary = json.loads((tmp_path / "O" / "summary.json").read_text())
    assert summary["num_pairs"] == 18
    assert summary["problems"]["missing_field"] == 1
    said = " ".join("".join(capsys.readouterr()).split())
    assert "(num_candidates 0)" in said
    assert "nothing: sample_from, max_length_ratio," in said


def test_validate_clean_file(dataset, model_folder, capsys):
    assert main(["validate", str(dataset)]) == 0
    assert "No problems found" in capsys.readouterr().out
    assert main(["validate", str(dataset), "--model_name_or_path", str(model_folder), "--max_length", "64"]) == 0
    assert "truncated" in capsys.readouterr().out


def _say_nothing(folder):
    """A folder without the files that a model has."""
    folder.mkdir()


def _without_tokenizer(folder):
    GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=32, n_layer=1, n_head=2)).save_pretrained(folder)


@pytest.mark.parametrize(
    ("make", "name", "said"),
    [
        (
            _say_nothing,
            "made",
            "model_name_or_path needs a folder with a model, or the id of one on the hub; got 'made'",
        ),
        (_say_nothing, "made", "which holds no config.json"),
        (_without_tokenizer, "made", "A model needs its tokenizer beside it; made holds none. Save it there, too"),
        (_say_nothing, "nope", "got 'nope': We couldn't connect to"),
        (_say_nothing, "../nope", "got '../nope': no such folder"),
    ],
)
def test_a_name_without_a_model(make, name, said, dataset, tmp_path, monkeypatch, capsys):
    """`transformers` names neither option nor value, or asks for another package."""
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "made")
    words = ["--dataset_name", str(dataset), "--model_name_or_path", name]
    for command in (["validate"], ["train", "--use_cpu", "--output_dir", "O"]):
        assert main([*command, *words]) == 2
        assert said in capsys.readouterr().err
    with pytest.raises((ValueError, OSError)) as caught:
        ROPOTrainer(name, ROPOConfig(output_dir="O", use_cpu=True), train_dataset=str(dataset))
    assert said in str(caught.value)
    assert str(caught.value).count("model_name_or_path") <= 1


def test_validate_says_what_training_would_refuse(dataset, tokenizer, tmp_path, capsys):
    """A model with a table of positions has none for longer pairs, learned or not; others go on."""
    learned = {"vocab_size": len(tokenizer), "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 24}
    for name, config in (("gpt2", GPT2Config(**learned)), ("gptj", GPTJConfig(**learned, rotary_dim=4))):
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / name)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    rotary = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=24, **shape)
    AutoModelForCausalLM.from_config(rotary).save_pretrained(tmp_path / "llama")
    words = ["validate", str(dataset), "--max_length", "64", "--model_name_or_path"]
    for name, code in (("gpt2", 2), ("gptj", 2), ("llama", 0)):
        tokenizer.save_pretrained(tmp_path / name)
        assert main([*words, str(tmp_path / name)]) == code
        out, error = capsys.readouterr()
        assert (f"{name} has 24 positions; " in error and "max_length to 24" in error) == (code == 2)
        assert ("24 positions (max_position_embeddings)" in " ".join(out.split())) == (name == "llama")
        assert main([*words[:3], "24", *words[4:], str(tmp_path / name)]) == 0
        assert "positions" not in "".join(capsys.readouterr())


def test_validate_takes_the_spellings_of_train(dataset, tmp_path, capsys):
    rows = [json.loads(line) for line in dataset.read_text().splitlines()]
    datasets.DatasetDict({"test": datasets.Dataset.from_list(rows)}).save_to_disk(tmp_path / "D")
    for name in ("--split", "--dataset_split", "--dataset-split"):
        words = ["--dataset_name", str(tmp_path / "D"), "--prompt-column", "prompt", name]
        assert main(["validate", *words, "test"]) == 0
        assert main(["validate", *words, "tset"]) == 2
        assert "test; got 'tset'." in capsys.readouterr().err
    assert main(["validate", "a.jsonl", "--dataset_name", "b.jsonl"]) == 2
    assert "a.jsonl and b.jsonl" in capsys.readouterr().err
    assert main(["validate"]) == 2
    assert "dataset; got none." in capsys.readouterr().err
    assert main(["validate", str(dataset), "--dataset_spli", "test"]) == 2
    assert "mean dataset_split" in capsys.readouterr().err


def test_validate_where_nothing_is_left(tmp_path, capsys):
    path = tmp_path / "same.jsonl"
    path.write_text(json.dumps({"prompt": "1 + 1 =", "chosen": " 2", "rejected": " 2", "score": 1}) + "\n")
    assert main(["validate", str(path)]) == 1
    out = capsys.readouterr().out
    assert "No pair is" in out
    assert "nothing reads: score." in out


def test_validate_takes_names_of_columns(tmp_path, capsys):
    path = tmp_path / "other.jsonl"
    path.write_text(json.dumps({"question": "1 + 1 =", "better": " 2", "worse": " 3"}) + "\n")
    assert main(["validate", str(path)]) == 1
    names = ["--prompt_column", "question", "--chosen_column", "better", "--rejected_column", "worse"]
    capsys.readouterr()
    assert main(["validate", str(path), *names]) == 0
    assert "1 rows, 1 pairs" in capsys.readouterr().out


def test_validate_says_what_could_not_be_read(tmp_path, capsys):
    path = tmp_path / "cut.json"
    path.write_text('[{"instruction": "p", "chosen": "c", "rejected": "r"},\n{"instruction": "q"')
    assert main(["validate", str(path)]) == 1
    out = capsys.readouterr().out
    assert "2 rows, 1 pairs, " in out
    assert "unread: 1 error" in out
    path.write_text('[{"prompt": "p", "completion": "c", "label": true}]')
    assert main(["validate", str(path)]) == 2
    assert "as KTO takes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("validate {}.jsonl", "needs a regular file; got {}.jsonl, a pipe (FIFO)"),
        ("audit --model_name_or_path M --dataset_name {}.jsonl --output_dir O", "needs a regular file"),
        ("train --model_name_or_path M --dataset_name D --output_dir O --config {}.yaml", "{}.yaml is a pipe (FIFO)"),
        (
            "export --model_name_or_path M --benchmark alpaca_eval --output_dir O --questions {}.json",
            "{}.json is a pipe (FIFO)",
        ),
        (
            "win_rate --outputs {}.json --baseline B --output_dir O --judge reward_model --judge_model M",
            "{}.json is a pipe (FIFO)",
        ),
    ],
)
def test_no_command_waits_for_a_pipe(tmp_path, capsys, words, message):
    pipe = tmp_path / "pipe"
    for ending in ("jsonl", "yaml", "json"):
        os.mkfifo(f"{pipe}.{ending}")
    assert main(words.format(pipe).split()) == 2
    assert message.format(pipe) in capsys.readouterr().err


def test_a_configuration_of_a_hub_dataset(monkeypatch, tmp_path, capsys):
    """It is that of the evaluation set as well where this is another part of the same dataset."""
    asked = []

    def load_dataset(path, name=None, **options):
        asked.append((path, name, options))
        return Dataset.from_list([{"prompt": "p", "chosen": "c", "rejected": "r"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    more = ["--dataset_config", "prefs", "--dataset_data_dir", "data/en"]
    assert main(["validate", "owner/name", *more]) == 0
    assert asked == [("owner/name", "prefs", {"split": "train", "data_dir": "data/en"})]
    given = parse_train(["--model_name_or_path", "m", "--dataset_name", "owner/name", "--output_dir", "o", *more])[0]
    found = HubDataset(name="owner/name", config="prefs", data_dir="data/en")
    assert [dataset_of(given, name) for name in ("owner/name", "other/name", None)] == [found, "other/name", None]
    assert main(["validate", str(tmp_path), *more]) == 2
    assert "dataset_config and dataset_data_dir" in capsys.readouterr().err


def test_validate_lists_columns_that_cannot_be_printed(tmp_path, capsys):
    path = tmp_path / "odd.jsonl"
    path.write_text(json.dumps({"prompt": "p", "chosen": "c", "rejected": "r", "x\ud800": 1}) + "\n")
    assert main(["validate", str(path)]) == 0
    assert r"nothing reads: x\ud800." in capsys.readouterr().out


def test_audit_keeps_its_contract(model_folder, dataset, recipe, tmp_path, capsys, pairs):
    """Audit, a person's verdict, training that obeys it."""
    output = tmp_path / "O"
    words = ["--model_name_or_path", model_folder, "--dataset_name", dataset, "--config", recipe, "--output_dir"]
    assert main(["audit", *map(str, words), str(output)]) == 0
    out = capsys.readouterr().out
    assert "cannot tell" in out
    assert str(output / "report.html") in out
    assert {path.name for path in output.iterdir()} >= {
        "audit", "cleaned.jsonl", "dropped.jsonl", "ledger.parquet", "problems.jsonl", "report.html", "report.json",
        "report.md", "review.csv", "summary.json",
    }  # fmt: skip
    assert not (output / "model.safetensors").exists()
    summary = json.loads((output / "summary.json").read_text())
    assert (summary["task"], summary["is_informative"]) == ("audit", False)
    assert [summary[f"num_{done}"] for done in ("kept", "dropped", "flipped")] == [14, 6, 0]
    assert summary["token_lengths"]["num_truncated"] == 2
    review = (output / "review.csv").read_text().splitlines()
    first = review[1].split(",")
    (tmp_path / "mine.csv").write_text(f"row,pair_id,verdict\n{first[3]},{first[4]},wrong\n")
    verdict = (output / "review.csv").read_text().replace("\n,", "\nwrong,", 1)
    (output / "review.csv").write_text(verdict)  # somebody has begun
    assert main(["audit", *map(str, words), str(output)]) == 0
    assert (output / "review.csv").read_text() == verdict
    (output / "review.csv").write_text(verdict.replace("wrong", "wrogn"))
    assert main(["audit", *map(str, words), str(output)]) == 0
    assert "wrogn" in (output / "review.before.csv").read_text()
    assert (output / "review.csv").read_text().splitlines() == review
    (output / "review.csv").write_text(verdict.replace("wrong", "rihgt"))
    assert main(["audit", *map(str, words), str(output)]) == 0
    assert "wrogn" in (output / "review.before.csv").read_text()  # what is there already is somebody's work, too
    assert "rihgt" in (output / "review.before.2.csv").read_text()
    more = ["--decisions", str(tmp_path / "mine.csv")]
    capsys.readouterr()
    assert main(["train", *map(str, words), str(tmp_path / "T"), *more]) == 0
    assert "1 verdict read: 1 wrong." in capsys.readouterr().out
    assert main(["train", *map(str, words), str(tmp_path / "U"), "--decisions", str(output / "review.csv")]) == 2
    assert "--decisions needs" in capsys.readouterr().err
    rows = pq.read_table(tmp_path / "T" / "ledger.parquet").to_pylist()
    assert next(row["decision"] for row in rows if row["row"] == int(first[3]) and row["round"] == 0) == "flip"
    assert main(["audit", *map(str, words[:4]), "--output_dir", str(tmp_path / "N"), "--num_folds", "0"]) == 2
    assert "num_folds of 2" in capsys.readouterr().err
    assert main(["audit", *map(str, words), str(tmp_path / "M"), "--decisions", str(tmp_path / "nowhere.csv")]) == 2
    assert "--decisions needs a table" in capsys.readouterr().err


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"ropo {__version__}\n"


def test_a_reader_that_goes_away_is_no_success():
    """As for other commands, so that `set -o pipefail` notices what was not said to the end."""
    for words in ("losses", "train --help_all"):
        command = f"{sys.executable} -m ropo.cli.main {words} | true; echo ${{PIPESTATUS[0]}}"
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
        assert (done.stdout, done.stderr) == ("141\n", "")


def test_losses(capsys):
    assert main(["losses"]) == 0
    assert "ropo" in capsys.readouterr().out


def test_the_console_says_what_is_to_be_read_where_the_rate_cannot_be_told(capsys):
    """And names no annotator then: their rates are as unknown as that of all."""
    annotators = [{"name": "a", "rate": 0.1, "low": 0.0, "high": 0.2, "num_pairs": 9}]
    told = {"task": "audit", "is_informative": False, "reason": "Too weak.", "annotators": annotators}
    told |= {"flip_rate": {"estimate": None, "low": 0.0, "high": 0.5}, "num_contradicted": 150}
    say_rate(told)
    out = capsys.readouterr().out
    assert "150 of the labels" in out
    assert "in review.csv: " in out
    assert "9 pairs" not in out
    say_rate(told | {"num_contradicted": None})
    assert "contradicted" not in capsys.readouterr().out
    wide = {"estimate": 0.0, "low": 0.0, "high": 0.19}
    say_rate(told | {"is_informative": True, "flip_rate": wide})
    out = capsys.readouterr().out
    assert "150 of the labels" in out
    assert "a: 10.0% (0.0% to 20.0%), 9 pairs" in out
