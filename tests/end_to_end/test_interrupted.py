"""A run that Ctrl-C or a scheduler ends says how to go on, leaves nothing behind, and goes on."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ropo.run.lock import LOCK_FILE

pytestmark = pytest.mark.slow

OPTIONS = {
    "learning_rate": 1e-3, "max_length": 64, "use_cpu": True, "disable_tqdm": True, "num_folds": 0, "rho": "0",
    "per_device_train_batch_size": 1, "num_train_epochs": 10, "save_strategy": "steps", "save_steps": 2,
    "hub_token": "hf_secret",
}  # fmt: skip

SAID = {signal.SIGINT: "interrupted by Ctrl-C", signal.SIGTERM: "interrupted by SIGTERM"}
NOTHING_LOST = "The same command resumes from what is done."


@pytest.fixture
def words(pairs, model_folder, tmp_path):
    rows = [{"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected} for pair in pairs]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = (f"--model_name_or_path={model_folder}", f"--dataset_name={tmp_path / 'pairs.jsonl'}")
    options = (f"--{name}={value}" for name, value in {"output_dir": tmp_path / "O", **OPTIONS}.items())
    return ["-m", "ropo.cli.main", "train", *data, *options]


def start(*words):
    return subprocess.Popen(
        [sys.executable, *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # what a terminal signals together
    )


def wait_for_a_checkpoint(folder, process):
    while not list(folder.glob("rounds/00/checkpoints/checkpoint-*/trainer_state.json")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)


def wait_for_its_handler(process):
    """SIGTERM is caught once the command has begun, and by nobody before; what it imports then takes seconds."""
    status = Path(f"/proc/{process.pid}/status")
    while not int(re.search(r"SigCgt:\s*(\w+)", status.read_text())[1], 16) >> (signal.SIGTERM - 1) & 1:
        time.sleep(0.005)


@pytest.mark.parametrize("wait", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_while_it_imports(number, wait, words):
    process = start(*words)
    wait_for_its_handler(process)
    time.sleep(wait)
    process.send_signal(number)
    assert process.communicate(timeout=60) == ("", f"ropo train: {SAID[number]}. {NOTHING_LOST}\n")
    assert process.returncode == 128 + number


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_while_it_trains(number, words, tmp_path):
    folder = tmp_path / "O"
    first = start(*words)
    wait_for_a_checkpoint(folder, first)
    first.send_signal(signal.SIGSTOP)  # or it would be done before the second one has begun
    second = start(*words)
    _, said = second.communicate(timeout=100)
    assert second.returncode == 2
    assert f"by process {first.pid} on " in said
    first.send_signal(number)
    first.send_signal(signal.SIGCONT)
    _, said = first.communicate(timeout=20)
    assert first.returncode == 128 + number
    assert said.splitlines()[-1].startswith("ropo train: interrupted")
    assert "stage 00/train." in said.splitlines()[-1]
    assert "Traceback" not in said
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    assert not [path for path in files if path.name == LOCK_FILE or any(p.startswith(".") for p in path.parts[-3:])]
    assert not [path for path in files if b"hf_secret" in path.read_bytes()]
    again = start(*words)
    assert again.communicate(timeout=200)
    assert again.returncode == 0
    assert (folder / "model.safetensors").exists()
    assert not (folder / LOCK_FILE).exists()
    assert not list(folder.rglob("training_args.bin"))


def test_a_scheduler_ends_two_processes(words, tmp_path):
    """SIGTERM reaches the launcher and both of them."""
    folder = tmp_path / "O"
    how = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29757")
    process = start(*how, *words)
    wait_for_a_checkpoint(folder, process)
    os.killpg(process.pid, signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode != 0
    assert said.count("interrupted by SIGTERM") == said.count("stage 00/train.") == 1
    assert not (folder / LOCK_FILE).exists()
    again = start(*how, *words)
    _, said = again.communicate(timeout=200)
    assert again.returncode == 0, said
