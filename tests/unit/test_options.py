"""A value means the same wherever it is written, and what cannot be meant is one sentence on the option."""

import dataclasses
import json
import math
import typing

import pytest

from ropo.cli.arguments import TrainArguments, parse_train
from ropo.cli.main import main
from ropo.cli.words import check_words
from ropo.config import ROPOConfig
from ropo.evaluate.options import ExportArguments
from ropo.options import read_yaml
from ropo.train.checks import check_training, check_warmup
from ropo_bench.grid_config import read_bench_config

WORDS = ["--model_name_or_path", "M", "--dataset_name", "D", "--output_dir", "O", "--use_cpu"]


def config(tmp_path, **options):
    return ROPOConfig(**{"output_dir": str(tmp_path / "O"), "use_cpu": True, **options})


def recipe(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def of_type(*wanted):
    hints = typing.get_type_hints(ROPOConfig)
    kinds = {name: set(typing.get_args(hint) or (hint,)) - {type(None)} for name, hint in hints.items()}
    return sorted(field.name for field in dataclasses.fields(ROPOConfig) if kinds[field.name] == set(wanted))


@pytest.mark.parametrize("name", of_type(float))
def test_every_number_has_an_end(name, tmp_path):
    assert len(of_type(float)) > 30
    for value in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match=f"^{name} needs a finite number; got"):
            config(tmp_path, **{name: value})
    for value in ("0.1", True, [0.1]):
        with pytest.raises(ValueError, match=f"^{name} needs a number; got"):
            config(tmp_path, **{name: value})


@pytest.mark.parametrize("name", of_type(int))
def test_every_count_is_whole(name, tmp_path):
    assert len(of_type(int)) > 15
    for value in (1.5, math.nan, "1", True):
        with pytest.raises(ValueError, match=f"^{name} needs a whole number; got"):
            config(tmp_path, **{name: value})


@pytest.mark.parametrize("name", of_type(bool))
def test_every_switch_is_on_or_off(name, tmp_path):
    for value in ("no", 1, [True]):
        with pytest.raises(ValueError, match=f"^{name} needs true or false; got"):
            config(tmp_path, **{name: value})


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"train_sampling_strategy": "nope"}, "train_sampling_strategy needs one of random, sequential"),
        ({"lr_scheduler_type": "cosin"}, "Did you mean cosine"),
        ({"optim": "adamw_troch"}, "Did you mean adamw_torch"),
        ({"save_strategy": "never"}, "save_strategy needs one of no, steps, epoch, best; got 'never'"),
        ({"lr_scheduler_kwargs": "nope"}, """lr_scheduler_kwargs needs JSON like '{"name": 1}'; got 'nope'"""),
        ({"lr_scheduler_kwargs": "{bad"}, "lr_scheduler_kwargs needs JSON"),
        ({"lr_scheduler_kwargs": [1]}, r"lr_scheduler_kwargs needs named values; got \[1\]"),
        ({"lr_scheduler_kwargs": '{"a": ' * 100_000}, "lr_scheduler_kwargs needs JSON"),
        ({"gradient_checkpointing_kwargs": '{"a": 1}'}, "gradient_checkpointing_kwargs needs keys of use_reentrant"),
        (
            {"accelerator_config": "no/such/file"},
            "accelerator_config needs JSON .* name of a JSON file; got 'no",
        ),
        ({"accelerator_config": {"split_batch": True}}, "Did you mean split_batches"),
        ({"fsdp_config": "nope"}, "fsdp_config needs JSON"),
        ({"deepspeed": "nope"}, "deepspeed needs JSON"),
        ({"liger_kernel_config": "nope"}, "liger_kernel_config needs JSON"),
        ({"num_train_epochs": 1e9}, "num_train_epochs needs a number from 0 to 10000"),
        ({"max_steps": -5}, "max_steps needs a number from -1"),
        ({"max_steps": 10**12}, "max_steps needs a number from -1"),
        ({"logging_steps": 0}, "logging_steps needs a number above 0; got 0"),
        ({"save_steps": 0}, "save_steps needs a number above 0; got 0"),
        ({"save_total_limit": 0}, "save_total_limit needs 1 or more; got 0"),
        ({"warmup_steps": -1}, "warmup_steps needs 0 or more; got -1"),
        ({"weight_decay": -1}, "weight_decay needs 0 or more; got -1"),
        ({"adam_beta1": 1.0}, r"adam_beta1 needs a number in \[0, 1\); got 1.0"),
        ({"adam_epsilon": 0.0}, "adam_epsilon needs a number above 0"),  # a gradient of 0 would be 0/0
        ({"data_seed": -1}, "data_seed needs a number from 0"),
        ({"dataloader_num_workers": -1}, "dataloader_num_workers needs 0 or more; got -1"),
        ({"dataloader_persistent_workers": True}, "dataloader_persistent_workers needs dataloader_num_workers of 1"),
        ({"remove_unused_columns": True}, "remove_unused_columns needs false; got true"),
        ({"loss": ["ropo"]}, r"loss needs one text; got \['ropo'\]"),
        ({"rounds": None}, "rounds needs a whole number; got None"),
        ({"fp16": True}, "fp16 needs a GPU; got a CPU"),
    ],
)
def test_values_that_mean_nothing(option, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        config(tmp_path, **option)


def test_values_that_are_meant(tmp_path):
    found = config(tmp_path, lr_scheduler_kwargs='{"num_cycles": 2}', alpha=14, rho=0.2, bf16=True, beta=1)
    assert found.lr_scheduler_kwargs == {"num_cycles": 2}
    assert (found.alpha, found.rho, repr(found.beta)) == ("14", "0.2", "1.0")
    assert dataclasses.replace(found, seed=7).lr_scheduler_kwargs == {"num_cycles": 2}
    (tmp_path / "a.json").write_text('{"split_batches": true}')
    assert config(tmp_path, accelerator_config=str(tmp_path / "a.json")).accelerator_config.split_batches


@pytest.mark.parametrize("option", ["num_train_epochs", "temperature", "top_p", "eval_delay"])
def test_a_default_that_is_written_out_is_the_same_value(option, tmp_path):
    """Its digest, too: or a finished run would be made again."""
    default = getattr(config(tmp_path), option)
    for written in (int(default), float(default)):
        assert repr(getattr(config(tmp_path, **{option: written}), option)) == repr(default)


def test_a_file_of_named_values_holds_them(tmp_path):
    (tmp_path / "a.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"holds named values; got a list in .*a\.json"):
        config(tmp_path, fsdp_config=str(tmp_path / "a.json"))


def test_a_folder_to_write_to(tmp_path):
    (tmp_path / "file").write_text("")
    for name in ("file", "file/below"):
        with pytest.raises(ValueError, match=r"output_dir needs a folder; got .*file.* is a file"):
            ROPOConfig(output_dir=str(tmp_path / name), use_cpu=True)
    with pytest.raises(ValueError, match=r"output_dir needs a folder; got .* is a file"):
        ExportArguments(model_name_or_path="M", benchmark="mt_bench", questions="Q", output_dir=str(tmp_path / "file"))


def test_a_folder_that_may_not_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda *_: False)  # to root everything is allowed
    with pytest.raises(ValueError, match="output_dir needs a folder that may be written; got"):
        config(tmp_path)


# A YAML file.


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("beta: true", "beta needs a number; got 'true'"),
        ("seed: 1:30", "seed needs a whole number; got '1:30'"),
        ("seed: 1.0", "seed needs a whole number; got '1.0'"),
        ("seed: 2026-11-29", "seed needs a whole number; got '2026-11-29'"),
        ("use_cpu: maybe", "use_cpu needs true or false; got 'maybe'"),
        ("beta: 0.1\nbeta: 0.2", "'beta' is there twice; leave one out"),
        ("lr_scheduler_kwargs: {a: 1, a: 2}", "'a' is there twice"),
        ("loss: &a ropo\nrun_name: *a", r"an alias (*) is not read"),
        ("loss: ''", "loss has no value"),
        ("loss:", "loss has no value"),
        ("loss: [[ropo]]", "loss needs one value; got [['ropo']]"),
        ("report_to: [[none]]", "report_to needs a list of texts"),
        ("lr_scheduler_kwargs: [1]", "lr_scheduler_kwargs needs one value; got [1]"),
        ("num_train_epochs: .inf", "num_train_epochs needs a number; got '.inf'"),
        ("num_train_epochs: inf", "num_train_epochs needs a finite number; got inf"),
        ("seed: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        ("a: " + "[" * 5000, "is none"),
        ("beta: \x00", "is none"),
    ],
)
def test_a_recipe_means_what_the_command_line_means(line, said, tmp_path):
    path = recipe(tmp_path, line + "\n")
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the sentence is compared below
        parse_train([*WORDS, "--config", str(path)])
    assert said in str(caught.value)
    assert str(path) in str(caught.value) or "finite" in said


def test_values_of_a_recipe_are_those_of_the_command_line(tmp_path):
    path = recipe(
        tmp_path,
        "seed: 010\nsave_strategy: no\nrun_name: off\nmodel_revision: 0012e45\nlearning_rate: 1e-3\nbf16: yes\n"
        "max_abs_margin:\nlora_target_modules: [q_proj, 1]\nuse_peft: true\nlr_scheduler_kwargs: {num_cycles: 2.5}\n",
    )
    given, args = parse_train([*WORDS, "--config", str(path)])
    assert (args.seed, args.save_strategy.value, args.run_name) == (10, "no", "off")
    assert (given.model_revision, args.learning_rate, args.bf16) == ("0012e45", 1e-3, True)
    assert (args.max_abs_margin, given.lora_target_modules) == (None, ["q_proj", "1"])
    assert args.lr_scheduler_kwargs == {"num_cycles": 2.5}
    assert parse_train([*WORDS, "--seed", "010"])[1].seed == 10


def test_a_bomb_of_aliases_is_not_unfolded(tmp_path):
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    lines += [
        f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]" for before, name in zip("abcdefg", "bcdefgh", strict=True)
    ]
    with pytest.raises(ValueError, match="an alias"):
        read_yaml(recipe(tmp_path, "\n".join(lines)))


def test_a_recipe_that_is_not_text(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"loss: \xff")
    with pytest.raises(ValueError, match=r"recipe\.yaml is none: 'utf-8' codec"):
        read_yaml(path)
    path.write_bytes(b"\xef\xbb\xbfloss: dpo")
    assert read_yaml(path) == {"loss": "dpo"}


# A command line.


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--beta", "0.1", "--beta=0.2"], "--beta needs one value; got it 2 times"),
        (["--max-length", "9", "--max_length", "8"], "--max_length needs one value; got it 2 times"),
        (["--run_name", ""], "--run_name needs a value; got an empty one"),
        (["--run_name="], "--run_name needs a value; got an empty one"),
        (["--run_name", "\udcff"], "UTF-8"),
        (["--beta", "much"], "beta needs a number; got 'much'"),
        (["--seed", "1e3"], "seed needs a whole number; got '1e3'"),
        (["--bf16", "2"], "bf16 needs true or false; got '2'"),
        (["--save_steps"], "--save_steps"),
        (["--conf", "recipe.yaml"], "unknown option --conf."),
    ],
)
def test_words_that_mean_nothing(words, said, capsys):
    assert main(["train", *WORDS, *words]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) == 2  # the sentence, and how to see more


def test_words_of_every_command():
    check_words(["pairs.jsonl", "--dataset_split", "test", "--", "--x", "-1"])


# Before anything is read.


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lr_scheduler_kwargs": {"num_cycle": 2}}, "lr_scheduler_type cosine needs lr_scheduler_kwargs that it takes"),
        ({"lr_scheduler_kwargs": {"num_cycles": "x"}}, "lr_scheduler_type cosine needs lr_scheduler_kwargs"),
        ({"lr_scheduler_type": "constant", "lr_scheduler_kwargs": {"a": 1}}, "needs a schedule with options; got"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "lr_scheduler_type warmup_stable_decay needs"),
        ({"optim_args": "nope"}, "optim_args needs name=value, several with commas between them; got 'nope'"),
        ({"optim_args": "rank=8"}, "optim_args needs options that adamw_torch_fused reads; got rank=8"),
        (
            {"optim": "sgd", "optim_args": "momentum=x"},
            "optim sgd needs options that it takes; got optim_args mom",
        ),
        ({"optim": "sgd", "optim_args": "nesterov=true"}, "optim sgd refuses its options: Nesterov"),
        ({"optim": "galore_adamw"}, "optim galore_adamw needs"),
        (
            {"optim_target_modules": "q_proj"},
            "optim_target_modules needs a galore or apollo optimizer; got",
        ),
        ({"torch_compile": True}, "torch_compile needs a model that is run as it is"),
        ({"torch_compile_mode": "nope"}, "torch_compile needs a model that is run as it is"),
        ({"liger_kernel_config": {"rope": True}}, "liger_kernel_config needs use_liger_kernel"),
        ({"report_to": "nope"}, "report_to needs one of"),
    ],
)
def test_what_a_library_would_refuse_late(options, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        check_training(config(tmp_path, **options))


def test_what_is_meant_passes(tmp_path):
    check_training(config(tmp_path))
    check_training(config(tmp_path, optim="sgd", optim_args="momentum=0.9, nesterov=true"))
    check_training(config(tmp_path, lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr_rate": 0.1}))
    check_training(
        config(tmp_path, lr_scheduler_type="warmup_stable_decay", lr_scheduler_kwargs={"num_decay_steps": 2})
    )


def test_ligers_losses_are_never_asked_for(tmp_path, monkeypatch):
    """Its fused loss replaces the model's forward pass, of which our losses read the logits."""
    monkeypatch.setattr("ropo.train.checks.is_liger_kernel_available", lambda: True)
    args = config(tmp_path, use_liger_kernel=True, liger_kernel_config='{"rope": false}')
    assert args.liger_kernel_config == {"cross_entropy": False, "fused_linear_cross_entropy": False, "rope": False}
    with pytest.raises(ValueError, match="use_liger_kernel needs a GPU; got a CPU"):
        check_training(args)
    args = config(tmp_path, use_liger_kernel=True, liger_kernel_config={"fused_linear_cross_entropy": True})
    with pytest.raises(ValueError, match="liger_kernel_config needs fused_linear_cross_entropy false; got true"):
        check_training(args)
    args = config(tmp_path, use_liger_kernel=True, liger_kernel_config={"rope": "no"})
    with pytest.raises(ValueError, match="liger_kernel_config needs true or false for rope; got 'no'"):
        check_training(args)


def test_a_warm_up_ends(tmp_path):
    args = config(tmp_path, warmup_steps=1e9, num_folds=0, rho=0, alpha="14")
    with pytest.raises(ValueError, match=r"warmup_steps needs fewer than the 13 steps .*; got 1e\+09"):
        check_warmup(args, num_pairs=100)
    check_warmup(config(tmp_path, warmup_steps=12, num_folds=0, rho=0, alpha="14"), num_pairs=100)
    with pytest.raises(ValueError, match="the 10 steps of the shortest training"):  # a fold has four fifths
        check_warmup(config(tmp_path, warmup_steps=12), num_pairs=100)
    check_warmup(config(tmp_path, warmup_steps=0.5), num_pairs=1)


# A grid of a benchmark.

GRID = {"task": "reviews", "seeds": "[1]", "noise": "{symmetric: [0.2]}", "methods": "[dpo]"}


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("seeds", "[010]", "seeds needs whole numbers from 0"),
        ("seeds", "[1.5]", "seeds needs whole numbers from 0"),
        ("seeds", "[true]", "seeds needs whole numbers from 0"),
        ("seeds", "[1, 1]", r"each once; got \[1, 1\]"),
        ("seeds", "[]", "seeds needs"),
        ("methods", "[]", "methods needs names of methods, each once"),
        ("noise", "{symmetric: 0.2}", "for symmetric; got 0.2"),
        ("noise", "{symmetric: [x]}", r"noise needs a list of rates in \[0, 0.5\) for symmetric; got \['x'\]"),
        ("num_pairs", "1e3", "num_pairs needs a whole number; got 1000.0"),
        ("num_trials", "true", "num_trials needs a whole number; got True"),
        ("learning_rates", "[.inf]", "learning_rates needs finite numbers above 0"),
        ("tuning_rate", "0.9", r"tuning_rate needs a number in \[0, 0.5\); got 0.9"),
        ("tuned", "{dpo: 1}", "tuned dpo needs named values; got 1"),
        ("options", "1", "options needs named values; got 1"),
        ("options", "{beta: true}", "beta needs a number; got True"),
        ("source", "3", "source needs one text; got 3"),
    ],
)
def test_a_grid_that_means_nothing(key, value, said, tmp_path):
    path = recipe(tmp_path, "".join(f"{name}: {text}\n" for name, text in {**GRID, key: value}.items()))
    with pytest.raises(ValueError, match=said):
        read_bench_config(path)


def test_a_grid_that_is_meant(tmp_path):
    more = {"learning_rates": "[2e-4]", "tuning_rate": 0, "options": "{alpha: 14, loss: ropo}"}
    path = recipe(tmp_path, "".join(f"{name}: {text}\n" for name, text in {**GRID, **more}.items()))
    assert read_bench_config(path).learning_rates == (2e-4,)  # a text for YAML 1.1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["demo", "--flip_rate", "nan"], "flip_rate needs a number in [0, 0.5); got nan"),
        (["demo", "--num_pairs", "0"], "num_pairs needs a number from 10"),
        (["demo", "--seed", "-1"], "seed needs a number from 0"),
        (["export", "--seed", "-1"], "seed needs a number from 0"),
        (["export", "--temperature", "nan"], "temperature needs a finite number; got nan"),
    ],
)
def test_other_commands(words, said, tmp_path, capsys):
    more = ["--model_name_or_path", "M", "--benchmark", "mt_bench", "--questions", "Q"] if words[0] == "export" else []
    assert main([*words, *more, "--output_dir", str(tmp_path / "O")]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "O").exists()


# What nobody has foreseen.


def test_an_unexpected_exception_is_one_sentence(tmp_path, capsys, monkeypatch):
    def fail(*_, **__):
        raise KeyError(f"lost hf_secret1 of {sk}")

    sk = "sk-12345"
    monkeypatch.setenv("SOME_API_KEY", sk)
    monkeypatch.setattr("ropo.cli.train.run_rounds", fail)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    words = ["train", *WORDS[:-2], str(tmp_path / "O"), "--use_cpu", "--hub_token", "hf_secret1"]
    assert main(words) == 70
    error = capsys.readouterr().err
    [file] = tmp_path.glob("ropo-train-*.txt")
    assert error.startswith("ropo train stopped by a fault of its own (KeyError: 'lost ... of ...'). Please report it")
    assert str(file) in error
    text = file.read_text()
    assert "in fail" in text
    assert "--hub_token ..." in text
    assert not any(secret in text + error for secret in ("hf_secret1", sk))
    monkeypatch.setenv("ROPO_DEBUG", "1")
    with pytest.raises(KeyError):
        main(words)


@pytest.mark.parametrize(
    "kind",
    [TypeError, AttributeError, IndexError, AssertionError, LookupError, RuntimeError, json.JSONDecodeError],
)
def test_no_exception_is_a_traceback(kind, tmp_path, capsys, monkeypatch):
    error = kind("x", "", 0) if kind is json.JSONDecodeError else kind("x")

    def fail(*_, **__):
        raise error

    monkeypatch.setattr("ropo.cli.train.run_rounds", fail)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert main(["train", *WORDS]) == (2 if isinstance(error, ValueError) else 70)
    assert len(capsys.readouterr().err.strip().splitlines()) <= 2


def test_options_of_model_and_data_are_checked(tmp_path):
    path = recipe(tmp_path, "lora_dropout: nan\nuse_peft: true\n")
    with pytest.raises(ValueError, match="lora_dropout needs a finite number; got nan"):
        parse_train([*WORDS, "--config", str(path)])
    assert {field.name for field in dataclasses.fields(TrainArguments)} >= {"lora_dropout"}
