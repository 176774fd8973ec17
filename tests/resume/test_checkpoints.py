"""A training is resumed from complete checkpoints only, and never changed by it."""

import json
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from ropo.config import ROPOConfig
from ropo.provenance import DiskFullError
from ropo.train import callbacks
from ropo.train.checkpoints import MARKER, newest_complete, why_incomplete
from ropo.train.trainer import ROPOTrainer

LOSSES = ("dpo", "ropo", "re_po", "gamma_po", "plc_dpo")  # two without a state of their own, three with one


@pytest.fixture
def made(model_folder, tokenizer, pairs, tmp_path):
    """A trainer of ten steps that writes a checkpoint after every second one."""

    def make(folder, **options):
        common = {
            "output_dir": str(tmp_path / folder), "learning_rate": 3e-3, "per_device_train_batch_size": 4,
            "num_train_epochs": 2, "save_strategy": "steps", "save_steps": 2, "logging_steps": 1, "max_length": 64,
            "use_cpu": True, "disable_tqdm": True,
        }  # fmt: skip
        args = ROPOConfig(**{**common, **options})
        args.reference_cache_dir = str(tmp_path / "reference")
        policy = AutoModelForCausalLM.from_pretrained(model_folder)
        return ROPOTrainer(policy, args, train_dataset=pairs, processing_class=tokenizer)

    return make


def result_of(trainer):
    """Everything that a training leaves, as numbers."""
    weights = torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])
    return torch.cat(
        [
            weights,
            trainer.gather_first_margins(),
            trainer.training_objective.reliability,
            trainer.training_objective.moments,
        ]
    )


def train(trainer):
    trainer.train_or_resume("these pairs")
    return result_of(trainer)


def killed(trainer, monkeypatch, owner, name, *, when):
    """Train until `owner.name` is called for the `when`-th time, as a kill just before it does."""
    calls, inner = [], getattr(owner, name)

    def dying(*args, **kwargs):
        calls.append(1)
        if len(calls) == when:
            raise KeyboardInterrupt
        return inner(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, dying)
        with pytest.raises(KeyboardInterrupt):
            trainer.train_or_resume("these pairs")


def steps_in(folder: Path) -> list[int]:
    return sorted(int(one.name.split("-")[1]) for one in folder.glob("checkpoint-*"))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("place", [(callbacks, "save_file"), (callbacks, "complete")], ids=["state", "marker"])
def test_killed_before_a_checkpoint_is_complete(place, loss, made, monkeypatch, tmp_path, caplog):
    """All that `Trainer` writes is there, with our state missing or not: it is no checkpoint, the one before is."""
    killed(made("killed", loss=loss), monkeypatch, *place, when=3)
    assert steps_in(tmp_path / "killed") == [4, 6]
    resumed = made("killed", loss=loss)
    steps, step = [], resumed.training_step
    resumed.training_step = lambda *given: steps.append(resumed.state.global_step) or step(*given)
    assert torch.equal(train(resumed), train(made("whole", loss=loss)))
    assert steps == list(range(4, 10))
    assert "has no complete.json" in caplog.text


def test_killed_in_the_first_checkpoint(made, monkeypatch, tmp_path):
    killed(made("killed", loss="re_po"), monkeypatch, callbacks, "complete", when=1)
    assert steps_in(tmp_path / "killed") == [2]
    assert torch.equal(train(made("killed", loss="re_po")), train(made("whole", loss="re_po")))


@pytest.mark.parametrize(
    "name",
    [
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "model.safetensors",
        "ropo_state.safetensors",
        "trainer_state.json",
        MARKER,
    ],
)
@pytest.mark.parametrize("how", ["cut short", "missing", "of other bytes"])
def test_a_damaged_checkpoint_is_none(how, name, made, monkeypatch, tmp_path):
    """A file that is missing would be left out by `Trainer` without a word, and another model come of it."""
    killed(made("killed"), monkeypatch, callbacks, "complete", when=3)
    path = tmp_path / "killed" / "checkpoint-4" / name
    if how == "missing":
        path.unlink()
    elif how == "cut short":
        path.write_bytes(path.read_bytes()[:-7])
    else:
        path.write_bytes(path.read_bytes()[:-7] + b"\0\1\2\3\4\5\6")
    assert name in str(why_incomplete(path.parent))
    assert newest_complete(tmp_path / "killed") is None
    assert steps_in(tmp_path / "killed") == []


def test_a_disk_that_fills_up(made, tmp_path):
    """The checkpoint before stays, what is left of the new one goes, and the training resumes to the same model."""
    whole = train(made("whole"))
    folder = tmp_path / "full"
    largest = max(path.stat().st_size for path in (tmp_path / "whole").rglob("*") if path.is_file())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (100, 3_000, largest // 2, largest - 1):
        shutil.rmtree(folder, ignore_errors=True)
        trainer = made("full")
        step = trainer.training_step

        def limited(*given, trainer=trainer, step=step, size=size):
            if trainer.state.global_step == 5:
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
            return step(*given)

        trainer.training_step = limited
        try:
            with pytest.raises(DiskFullError, match=r"full.* more room"):
                train(trainer)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert steps_in(folder) == [4]
        assert torch.equal(train(made("full")), whole)


def test_the_clock_does_not_say_which_checkpoint_is_old(made, tmp_path):
    """Set back by an hour it would have the newest one removed."""
    trainer = made("run", save_total_limit=2)
    step, folder = trainer.training_step, tmp_path / "run"

    def in_the_future(*given):
        for checkpoint in folder.glob("checkpoint-*"):
            os.utime(checkpoint, (4e9 - trainer.state.global_step * 1e6,) * 2)
        return step(*given)

    trainer.training_step = in_the_future
    trainer.train()
    assert steps_in(folder) == [8, 10]


def test_no_checkpoint_at_the_end_where_the_model_is_saved_anyway(made, tmp_path):
    for strategy, expected in (("steps", [8]), ("epoch", [5])):
        train(made(strategy, save_strategy=strategy))
        assert steps_in(tmp_path / strategy) == expected
    made("alone").train()
    assert steps_in(tmp_path / "alone") == [10]


def test_resuming_by_name_needs_a_complete_checkpoint(made, tmp_path):
    made("run").train()
    checkpoint = tmp_path / "run" / "checkpoint-10"
    assert json.loads((checkpoint / MARKER).read_text())["sha256"]["optimizer.pt"]
    (checkpoint / MARKER).unlink()
    with pytest.raises(ValueError, match=r"checkpoint-10, .*no complete.js"):
        made("run").train(resume_from_checkpoint=str(checkpoint))
    with pytest.raises(ValueError, match=r"got .*checkpoint-10, but"):  # a path is a name
        made("run").train(resume_from_checkpoint=checkpoint)
    with pytest.raises(ValueError, match=r"complete checkpoint; .*none\."):
        made("run").train(resume_from_checkpoint=True)


def test_a_checkpoint_of_the_model_alone_is_not_resumed_from(made, monkeypatch, tmp_path):
    """Without the optimizer's state other weights would come of it."""
    killed(made("killed", save_only_model=True), monkeypatch, callbacks, "save_file", when=2)
    assert torch.equal(train(made("killed", save_only_model=True)), train(made("whole")))


def test_checkpoints_of_another_training_go_with_a_word(made, monkeypatch, tmp_path, caplog):
    killed(made("run"), monkeypatch, callbacks, "complete", when=3)
    trainer = made("run")
    trainer.train_or_resume("other pairs")
    assert f"{tmp_path / 'run' / 'checkpoint-4'} belongs to another training" in caplog.text
