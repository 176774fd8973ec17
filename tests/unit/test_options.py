"""A value means the same wherever it is written, and what cannot be meant is one sentence on the option."""

import dataclasses
import json
import math
import typing

import pytest
from transformers import HfArgumentParser, TrainingArguments

from ropo.cli.arguments import TrainArguments, parse_train
from ropo.cli.main import main
from ropo.cli.words import check_words
from ropo.config import ROPOConfig
from ropo.data.options import DataOptions
from ropo.evaluate.options import ExportArguments
from ropo.judge.options import JudgeOptions
from ropo.losses import LOSSES
from ropo.losses.options import LossOptions
from ropo.options import Rule, check_options, identifying, option, read_yaml, rules_of
from ropo.resample.options import ResampleOptions
from ropo.run.checks import check_run
from ropo.sampling.options import EngineOptions
from ropo.train.checks import check_training, check_warmup
from ropo.train.options import OF_TRANSFORMERS
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
    assert len(of_type(float)) > 20
    for value in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match=f"^{name} needs a finite number"):
            config(tmp_path, **{name: value})
    for value in ("0.1", True, [0.1]):
        with pytest.raises(ValueError, match=f"^{name} needs a number; got"):
            config(tmp_path, **{name: value})


@pytest.mark.parametrize("name", of_type(int))
def test_every_count_is_whole(name, tmp_path):
    assert len(of_type(int)) > 15
    for value in (1.5, math.nan, "1", True):
        with pytest.raises(ValueError, match=f"^{name} needs a whole number"):
            config(tmp_path, **{name: value})


@pytest.mark.parametrize("name", of_type(bool))
def test_every_switch_is_on_or_off(name, tmp_path):
    for value in ("no", 1, [True]):
        with pytest.raises(ValueError, match=f"^{name} .*true or false"):
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
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha needs to be left out; got 5"),
        ({"data_seed": 1}, "data_seed needs train_sampling_strategy random; got group_by_length"),
        ({"scorer": "models", "num_folds": 0}, "scorer models needs an audit; got num_folds 0"),
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


# Options of the loss.


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("mean_target_margin=0.5,evenness=2", {"mean_target_margin": 0.5, "evenness": 2.0}),
        (" evenness = 2 ", {"evenness": 2.0}),
        ('{"evenness": 2}', {"evenness": 2.0}),
        ({"evenness": 2}, {"evenness": 2.0}),
        ({"evenness": "2e0"}, {"evenness": 2.0}),
        ({}, None),
        (None, None),
    ],
)
def test_loss_args_mean_the_same_however_they_are_written(written, meant, tmp_path):
    """Whole numbers and fractions, too: a run is told from another by them."""
    args = config(tmp_path, loss="gamma_po", loss_args=written)
    assert args.loss_args == meant
    assert json.dumps(args.identity()["loss_args"]) == json.dumps(meant)
    loss = args.bound_loss()
    assert (loss.name, loss.options) == ("gamma_po", meant or {})


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"loss_args": "0.1"}, "loss_args needs name=value, several with commas between them, or JSON; got '0.1'"),
        ({"loss_args": "flip_rate=0.1,"}, "loss_args needs name=value"),
        ({"loss_args": "flip_rate=0.1,flip_rate=0.2"}, "loss_args needs each name once"),
        ({"loss_args": "{flip_rate"}, "loss_args needs JSON"),
        ({"loss_args": [0.1]}, r"loss_args needs named values; got \[0.1\]"),
        ({"loss_args": 0.1}, "loss_args needs named values; got 0.1"),
        ({"loss_args": "flip_rate=x"}, "loss_args needs a finite number for flip_rate; got 'x'"),
        ({"loss_args": "flip_rate=nan"}, "loss_args needs a finite number for flip_rate; got 'nan'"),
        ({"loss_args": {"flip_rate": True}}, "loss_args needs a finite number for flip_rate; got True"),
        ({"loss_args": {"flip_rate": 0.6}}, r"rdpo needs flip_rate in \[0, 0.5\); got 0.6"),
        ({"loss_args": {"flip_rat": 0.1}}, "got flip_rat. Did you mean flip_rate"),
        ({"loss_args": None}, "rdpo needs flip_rate; got none"),
        ({"loss": "dpo", "loss_args": {"evenness": 1}}, "choose a loss that takes it: gamma_po"),
        ({"loss": "ropo", "loss_args": {"alpha": 6}}, "alpha is an option of its own"),
    ],
)
def test_loss_args_that_mean_nothing(option, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        config(tmp_path, **{"loss": "rdpo", **option})


@pytest.mark.parametrize("name", sorted({param for spec in LOSSES.values() for param in spec.params} - {"alpha"}))
def test_the_options_of_single_losses_say_where_they_are(name, tmp_path, capsys):
    assert main(["train", *WORDS, f"--{name}", "0.1"]) == 2
    assert f"--loss_args {name}=" in capsys.readouterr().err
    with pytest.raises(ValueError, match=f"--loss_args {name}="):
        parse_train([*WORDS, "--config", str(recipe(tmp_path, f"{name}: 0.1\n"))])


def test_loss_args_of_a_recipe_and_of_a_command_line(tmp_path):
    for line in ("loss_args: {flip_rate: 1e-1}", "loss_args: flip_rate=0.1"):
        path = recipe(tmp_path, f"loss: rdpo\n{line}\n")
        assert parse_train([*WORDS, "--config", str(path)])[1].loss_args == {"flip_rate": 0.1}
        words = [*WORDS, "--config", str(path), "--loss_args", "flip_rate=0.3"]
        assert parse_train(words)[1].loss_args == {"flip_rate": 0.3}


def test_alpha_of_0_is_dpo_and_other_losses_keep_theirs(tmp_path):
    args = config(tmp_path)
    assert (args.bound_loss(0.0).name, args.bound_loss(6.0).options) == ("dpo", {"alpha": 6.0})
    assert config(tmp_path, loss="hinge").bound_loss(6.0).options == {}
    old = config(tmp_path, loss="ropo_v1", alpha=2, loss_args={"gamma": 0.1})
    assert old.bound_loss(6.0).options == {"alpha": 2.0, "gamma": 0.1}
    assert (args.loss, args.alpha) == ("ropo", "auto"), "nothing is written back"


# What a dataclass of options says of itself.


@dataclasses.dataclass
class Some:
    count: typing.Annotated[int, Rule(low=1, high=5)] = option(1, "A number.")
    share: typing.Annotated[float, Rule(above=0, below=1, identifies=False)] = option(0.5, "A share.")
    kind: typing.Annotated[str | None, Rule(choices=("a", "b"))] = option(None, "A kind.")
    size: typing.Annotated[str, Rule(may_be_number=True)] = option("auto", "A size.")
    plain: str = option("", "A text.")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"count": 0}, "count needs a number from 1 to 5; got 0"),
        ({"count": 6}, "count needs a number from 1 to 5; got 6"),
        ({"share": 0.0}, r"share needs a number in \(0, 1\); got 0.0"),
        ({"share": 1}, r"share needs a number in \(0, 1\); got 1"),
        ({"kind": "c"}, "kind needs one of a, b; got 'c'"),
        ({"size": [1]}, r"size needs one text; got \[1\]"),
        ({"plain": 1}, "plain needs one text; got 1"),
    ],
)
def test_rules(given, said):
    with pytest.raises(ValueError, match=said):
        check_options(Some(**given))


def test_what_rules_allow():
    for some in (Some(count=5, share=0.01, kind="b", size=3), Some(kind=None, size="auto")):
        check_options(some)
    assert identifying(Some()) == ["count", "kind", "size", "plain"]


def test_every_rule_is_of_an_option_there_is():
    assert set(rules_of(ROPOConfig)) <= {field.name for field in dataclasses.fields(ROPOConfig)}
    assert set(OF_TRANSFORMERS) <= {field.name for field in dataclasses.fields(TrainingArguments)}


def test_a_run_is_told_from_another_by_what_changes_its_numbers(tmp_path):
    found = config(tmp_path).identity()
    for name in ("seed", "loss", "loss_args", "learning_rate", "max_length", "judge_model", "num_folds"):
        assert name in found
    for name in ("output_dir", "rounds", "max_tokens_per_batch", "save_steps", "judge_url", "audit_from"):
        assert name not in found


def test_any_parser_of_dataclasses_takes_the_options(tmp_path):
    """Those who write scripts around `HfArgumentParser`: what stands in our fields must not reach `argparse`."""
    words = ["--output_dir", str(tmp_path / "O"), "--use_cpu", "--loss", "rdpo", "--loss_args", "flip_rate=0.1"]
    [args] = HfArgumentParser((ROPOConfig,)).parse_args_into_dataclasses(words)
    assert args.loss_args == {"flip_rate": 0.1}


@pytest.mark.parametrize(
    ("kind", "given", "said"),
    [
        (LossOptions, {"loss": "dop"}, "Did you mean dpo"),
        (DataOptions, {"max_length": 1}, "max_length needs 2 or more; got 1"),
        (EngineOptions, {"generation_engine": "server"}, "server needs generation_url and generation_model"),
        (ResampleOptions, {"generation_engine": "vllm"}, "vllm needs something to sample"),
        (JudgeOptions, {"judge": "endpoint"}, "endpoint needs judge_model and judge_url"),
    ],
)
def test_each_package_checks_its_own(kind, given, said):
    kind()
    with pytest.raises(ValueError, match=said):
        kind(**given)


def test_a_stage_has_options_of_its_own(tmp_path):
    args = config(tmp_path, hub_token="hf_secret", seed=3)
    stage = args.of_stage(tmp_path / "stage", num_train_epochs=2.5)
    assert (stage.output_dir, stage.num_train_epochs, stage.seed) == (str(tmp_path / "stage"), 2.5, 3)
    assert (args.output_dir, args.num_train_epochs) == (str(tmp_path / "O"), 1.0)
    assert stage.hub_token == "hf_secret"


@pytest.mark.parametrize("option", ["num_train_epochs", "temperature", "top_p", "eval_delay"])
def test_a_default_that_is_written_out_is_the_same_value(option, tmp_path):
    """Its digest, too: or a finished run would be made again."""
    default = getattr(config(tmp_path), option)
    for written in (int(default), float(default)):
        assert repr(getattr(config(tmp_path, **{option: written}), option)) == repr(default)


def test_a_file_of_named_values_holds_them(tmp_path):
    (tmp_path / "a.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"got a list .*a\.json"):
        config(tmp_path, fsdp_config=str(tmp_path / "a.json"))


def test_a_folder_to_write_to(tmp_path):
    (tmp_path / "file").write_text("")
    for name in ("file", "file/below"):
        with pytest.raises(ValueError, match=r"output_dir .*file.* a file"):
            ROPOConfig(output_dir=str(tmp_path / name), use_cpu=True)
    with pytest.raises(ValueError, match=r"output_dir .* is a file"):
        ExportArguments(model_name_or_path="M", benchmark="mt_bench", questions="Q", output_dir=str(tmp_path / "file"))


def test_a_folder_that_may_not_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda *_: False)  # to root everything is allowed
    with pytest.raises(ValueError, match=r"output_dir .*be written"):
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
    with pytest.raises(ValueError, match=r"recipe\.yaml .*'utf-8' codec"):
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
    assert len(error.splitlines()) == 1


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
    with pytest.raises(ValueError, match="use_liger_kernel needs a GPU"):
        check_training(args)
    args = config(tmp_path, use_liger_kernel=True, liger_kernel_config={"fused_linear_cross_entropy": True})
    with pytest.raises(ValueError, match="fused_linear_cross_entropy false; "):
        check_training(args)
    args = config(tmp_path, use_liger_kernel=True, liger_kernel_config={"rope": "no"})
    with pytest.raises(ValueError, match=r"liger_kernel_config .*rope; .*'no'"):
        check_training(args)


@pytest.mark.parametrize("name", ["split_batches", "dispatch_batches", "even_batches"])
def test_several_processes_are_dealt_as_many_batches_each(name, tmp_path, monkeypatch):
    """Otherwise they wait for each other for ever, or train on other steps than the log says."""
    args = config(tmp_path, accelerator_config={name: name != "even_batches"})
    check_training(args)
    monkeypatch.setattr(ROPOConfig, "world_size", 2)
    with pytest.raises(ValueError, match=f"accelerator_config needs {name}"):
        check_training(args)


def test_a_batch_that_is_dropped_leaves_something(tmp_path):
    args = config(tmp_path, dataloader_drop_last=True, per_device_train_batch_size=8)
    check_warmup(args, num_pairs=8)
    with pytest.raises(ValueError, match="dataloader_drop_last needs pairs for a whole batch; got 7 for 8"):
        check_warmup(args, num_pairs=7)


def test_a_warm_up_ends(tmp_path):
    args = config(tmp_path, warmup_steps=1e9, num_folds=0, rho=0, alpha="14")
    with pytest.raises(ValueError, match=r"warmup_steps .* 13 steps .*; got 1e\+09"):
        check_warmup(args, num_pairs=100)
    check_warmup(config(tmp_path, warmup_steps=12, num_folds=0, rho=0, alpha="14"), num_pairs=100)
    args = config(tmp_path, warmup_steps=12, scorer="models")
    with pytest.raises(ValueError, match="the 10 steps"):  # a fold has four fifths
        check_warmup(args, num_pairs=args.fewest_trained_on(100))
    args = config(tmp_path, warmup_steps=12)  # no model of a fold is trained
    check_warmup(args, num_pairs=args.fewest_trained_on(100))
    check_warmup(config(tmp_path, warmup_steps=0.5), num_pairs=1)


@pytest.mark.parametrize("schedule", ["reduce_lr_on_plateau", "greedy"])
def test_no_evaluation_decides_about_the_model_of_a_run(schedule, tmp_path):
    args = config(tmp_path, lr_scheduler_type=schedule, eval_strategy="epoch")
    with pytest.raises(ValueError, match=f"got lr_scheduler_type {schedule}"):
        check_run(args, has_evaluation=True)


def test_what_a_run_waits_for_does_not_identify_it(tmp_path):
    other = {"ddp_timeout": 9000, "dataloader_pin_memory": False, "log_on_each_node": False}
    assert config(tmp_path, **other).identity() == config(tmp_path).identity()


@pytest.mark.parametrize(("loss", "is_refused"), [("dr_dpo", True), ("plc_dpo", True), ("dpo", False)])
def test_batches_of_other_sizes_are_refused_where_margins_are_collected(loss, is_refused, tmp_path, monkeypatch):
    args = config(tmp_path, loss=loss, train_sampling_strategy="batch_rebalance")
    check_training(args)
    monkeypatch.setattr(ROPOConfig, "world_size", 2)
    monkeypatch.setattr("ropo.train.checks.refuse_other_launch", lambda _: None)
    if is_refused:
        with pytest.raises(ValueError, match=f"{loss} needs .*batch_rebalance"):
            check_training(args)
    else:
        check_training(args)


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
        ("tuned", "{holder: {holder_gamma: x}}", "loss_args needs a finite number for holder_gamma; got 'x'"),
        ("tuned", "{dpo: {holder_gamma: 1}}", "unknown option 'holder_gamma'. It is in loss_args"),
        ("options", "{seed: -1}", "seed needs 0 or more; got -1"),
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
        (["win_rate", "--outputs", "A", "--baseline", "B", "--judge", "endpont"], "Did you mean endpoint"),
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
    assert "(KeyError: 'lost ... of ...')" in error
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


def test_where_in_the_code_is_no_matter_of_a_typing_mistake(tmp_path, capsys, monkeypatch):
    """What ropo refuses says what to do; what a library raises may need its traceback."""
    for words in (["--no_such_option", "1"], [*WORDS[:2], "--dataset_name", "no.jsonl", *WORDS[4:]]):
        assert main(["train", *words]) == 2
        assert "ROPO_DEBUG" not in capsys.readouterr().err
    monkeypatch.setattr("ropo.cli.train.run_rounds", lambda *_, **__: json.loads("{"))
    assert main(["train", *WORDS]) == 2
    assert "ROPO_DEBUG" in capsys.readouterr().err


def test_options_of_model_and_data_are_checked(tmp_path):
    path = recipe(tmp_path, "lora_dropout: nan\nuse_peft: true\n")
    with pytest.raises(ValueError, match=r"lora_dropout .*got nan"):
        parse_train([*WORDS, "--config", str(path)])
    assert {field.name for field in dataclasses.fields(TrainArguments)} >= {"lora_dropout"}


def test_alpha_of_0_is_dpo(tmp_path):
    """It is what an audit chooses, so it can be given."""
    args = ROPOConfig(output_dir=str(tmp_path / "O"), use_cpu=True, alpha=0)
    assert args.bound_loss().name == "dpo"
    assert args.fixed_alpha == 0.0
