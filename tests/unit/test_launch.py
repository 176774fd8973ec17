"""What the launcher was asked for is what runs, and a change of it between two calls is told."""

import copy
import json
import logging
import pickle
from dataclasses import replace

import pytest

from ropo.config import ROPOConfig
from ropo.run.align import run_rounds
from ropo.train.launch import Launch, refuse_other_launch, tell_other_launch
from ropo.train.trainer import ROPOTrainer

ONE = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_CPU": "True"}  # `accelerate launch --cpu --num_processes 1`


def config(folder="O", **options):
    return ROPOConfig(output_dir=str(folder), use_cpu=True, disable_tqdm=True, **options)


@pytest.mark.parametrize(
    ("environment", "options", "said"),
    [
        ({}, {}, None),
        ({"MASTER_ADDR": "127.0.0.1"}, {}, None),  # a scheduler's
        (ONE, {}, None),
        (ONE, {"bf16": True}, None),
        ({**ONE, "ACCELERATE_MIXED_PRECISION": "bf16"}, {"bf16": True}, None),
        ({**ONE, "MASTER_ADDR": "127.0.0.1"}, {}, "needs GPUs .* asked for several .* has started 1. Use `torchrun"),
        ({"WORLD_SIZE": "4", "RANK": "1"}, {}, "WORLD_SIZE needs the number of processes of this run, 1; got 4"),
        ({**ONE, "ACCELERATE_MIXED_PRECISION": "bf16"}, {}, "asks for bf16, the options for no. Add --bf16, or launch"),
        ({**ONE, "ACCELERATE_MIXED_PRECISION": "fp16"}, {"bf16": True}, "for fp16, the options for bf16. Add --fp16"),
        ({**ONE, "ACCELERATE_MIXED_PRECISION": "fp8"}, {}, "for no. Launch with --mixed_precision no."),
    ],
)
def test_launched_as_asked(environment, options, said, monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", *ONE):
        monkeypatch.delenv(name, raising=False)
    args = config(**options)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if said is None:
        refuse_other_launch(args)
    else:
        with pytest.raises(ValueError, match=said):
            refuse_other_launch(args)


def test_runs_and_trainers_refuse_it(monkeypatch, pairs, model, tokenizer, tmp_path):
    args = config(tmp_path / "O")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(ValueError, match="Add --bf16"):
        run_rounds("no/such/model", pairs, args)
    with pytest.raises(ValueError, match="Add --bf16"):
        ROPOTrainer(model, args, pairs, processing_class=tokenizer)


def test_first_line(pairs, tmp_path, caplog, monkeypatch):
    """Before anything is read. Of several processes one tells it."""
    args = config(tmp_path / "O", per_device_train_batch_size=4, gradient_accumulation_steps=2)
    with caplog.at_level(logging.INFO, "ropo"), pytest.raises(FileNotFoundError):
        run_rounds("no/such/model", pairs, args)
    for part in ("1 process on cpu, ", "8 pairs per step (1 process x 4 x 2 ", "no/such/model, "):
        assert part in caplog.messages[0]
    assert f"{tmp_path / 'O' / 'reference_cache'}." in caplog.messages[0]
    two = replace(Launch.of(args), num_processes=2)
    for part in ("2 processes on cpu, each with the whole model, ", "16 pairs per step"):
        assert part in str(two)


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, "weights, gradients and optimizer state sharded by fsdp"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "gradients and optimizer state sharded by deepspeed"),
        (
            {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
            "weights, gradients and optimizer state sharded by deepspeed",
        ),
        (
            {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"},
            "optimizer state sharded by deep",
        ),
    ],
)
def test_the_line_says_what_is_sharded(environment, said, monkeypatch):
    args = config()
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    text = str(replace(Launch.of(args), num_processes=2))
    assert f", {said}" in text
    assert "whole model" not in text


@pytest.mark.parametrize(
    "name", ["save_only_model", "ignore_data_skip", "auto_find_batch_size", "enable_jit_checkpoint"]
)
def test_options_that_break_resuming(name, pairs, tmp_path):
    with pytest.raises(ValueError, match=f"got {name}, "):
        run_rounds("no/such/model", pairs, config(tmp_path / "O", **{name: True}))


def test_no_token_is_pickled():
    """`Trainer` pickles its options beside every model and checkpoint, and uploads them with the model."""
    args = config(hub_token="hf_secret")
    assert b"hf_secret" not in pickle.dumps(args)
    assert copy.copy(args).hub_token == args.hub_token == "hf_secret"
    assert pickle.loads(pickle.dumps(args)).to_dict() == config().to_dict()


def test_another_number_of_processes(model_folder, pairs, tmp_path, monkeypatch, caplog):
    """A checkpoint of one process does not go on in two, which would take other steps; and that is told."""
    steps, step, of = [], ROPOTrainer.training_step, Launch.of

    def dying(self, *args, **kwargs):
        steps.append(self.state.global_step)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(ROPOTrainer, "training_step", dying)
    options = {
        "num_folds": 0, "rho": "0", "per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 2,
        "logging_steps": 1, "max_length": 64,
    }  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        run_rounds(model_folder, pairs, config(tmp_path / "O", **options))
    monkeypatch.setattr(Launch, "of", lambda args: replace(of(args), num_processes=2))
    with caplog.at_level(logging.WARNING, "ropo.run.prepare"):
        run_rounds(model_folder, pairs, config(tmp_path / "O", **options))
    assert steps == [0, 1, 2, 3, 0, 1, 2, 3, 4]
    assert "1 process on cpu" in caplog.text
    assert "2 processes on cpu" in caplog.text
    caplog.clear()
    run_rounds(model_folder, pairs, config(tmp_path / "O", **options))
    assert "was last run" not in caplog.text


def test_a_note_of_an_earlier_launch_that_says_nothing_is_written_anew(tmp_path, caplog):
    (tmp_path / "launch.json").write_text("{}")
    tell_other_launch(tmp_path, Launch.of(config()))
    assert json.loads((tmp_path / "launch.json").read_text())["last"] == str(Launch.of(config()))
    assert not caplog.text
