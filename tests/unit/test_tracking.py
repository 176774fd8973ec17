"""What loggers of `report_to` write outlives the checkpoints."""

import os
import sys
import types
from pathlib import Path

import pytest
from transformers.integrations import integration_utils

from ropo.config import ROPOConfig
from ropo.run.align import run_rounds
from ropo.train.tracking import tracked


class Writer:
    """Stands in for the `SummaryWriter` of tensorboard, which need not be installed."""

    def __init__(self, log_dir):
        self.path = Path(log_dir) / "events"
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def add_text(self, *words):
        with self.path.open("a") as file:
            print(*words, file=file)

    add_scalar = add_text

    def flush(self):
        pass

    close = flush


@pytest.fixture
def _tensorboard(monkeypatch):
    for name in ("tensorboardX", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(SummaryWriter=Writer))
    monkeypatch.setattr(integration_utils, "is_tensorboard_available", lambda: True)
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)


def config(folder, **options):
    common = {
        "output_dir": str(folder), "learning_rate": 3e-3, "per_device_train_batch_size": 4, "logging_steps": 1,
        "max_length": 64, "use_cpu": True, "disable_tqdm": True, "rho": "0.2", "num_folds": 2, "scorer": "models",
        "report_to": ["tensorboard"],
    }  # fmt: skip
    return ROPOConfig(**{**common, **options})


STAGES = {"audit/models/fold_0", "audit/models/fold_1", "rounds/00"}


@pytest.mark.usefixtures("_tensorboard")
def test_every_training_has_its_log(model_folder, pairs, tmp_path):
    folder = tmp_path / "O"
    run_rounds(model_folder, pairs, config(folder, hub_token="hf_secret"))
    logs = {path.parent.relative_to(folder / "logs").as_posix(): path for path in folder.rglob("events")}
    assert set(logs) == STAGES
    assert all("rewards/margins" in path.read_text() for path in logs.values())
    assert "TENSORBOARD_LOGGING_DIR" not in os.environ
    assert not [path for path in folder.rglob("*") if path.is_file() and b"hf_secret" in path.read_bytes()]


@pytest.mark.usefixtures("_tensorboard")
def test_the_folder_of_the_user(model_folder, pairs, tmp_path, monkeypatch):
    """Each training has a folder of its own there, or their curves would be one."""
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    run_rounds(model_folder, pairs, config(tmp_path / "O"))
    logs = {path.parent.relative_to(tmp_path / "board").as_posix() for path in tmp_path.rglob("events")}
    assert logs == STAGES
    assert os.environ["TENSORBOARD_LOGGING_DIR"] == str(tmp_path / "board")


@pytest.mark.parametrize("is_of_user", [False, True])
def test_each_training_is_a_run_of_wandb(is_of_user, tmp_path, monkeypatch):
    """Of the run that a caller has begun it takes no notice."""
    for name in ("WANDB_DIR", "WANDB_NAME", "WANDB_RUN_GROUP"):
        monkeypatch.delenv(name, raising=False)
    seen = []
    wandb = types.SimpleNamespace(run="the user's" if is_of_user else None, finish=lambda: setattr(wandb, "run", None))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    args = config(tmp_path / "O")
    args.report_to = ["wandb"]
    for fold in (0, 1):
        with tracked(args, tmp_path / "O" / "audit" / f"fold_{fold}"):
            wandb.run = wandb.run or f"run {fold}"
            seen.append((wandb.run, os.environ["WANDB_NAME"], Path(os.environ["WANDB_DIR"]).is_dir()))
    assert [name for _, name, _ in seen] == ["O/audit/fold_0", "O/audit/fold_1"]
    assert [run for run, *_ in seen] == (["the user's"] * 2 if is_of_user else ["run 0", "run 1"])
    assert wandb.run == ("the user's" if is_of_user else None)
    assert "WANDB_DIR" not in os.environ


def test_nobody_asked(tmp_path):
    args = config(tmp_path / "O", report_to=[])
    with tracked(args, tmp_path / "O" / "rounds" / "00"):
        assert "TENSORBOARD_LOGGING_DIR" not in os.environ
    assert not (tmp_path / "O").exists()
