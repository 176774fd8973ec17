"""Weights sharded over processes (FSDP2) as on GPUs, but on CPUs: the steps of one process, and what stops it."""

import json
import os
import subprocess
import sys
import time

import psutil
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file

from ropo.provenance import read_json

pytestmark = pytest.mark.slow

# `accelerate` takes FSDP only where it sees several GPUs. The head's logits are made in pieces of ten tokens, of which
# the processes then have different numbers.
LAUNCHER = """
import sys
from accelerate import state
from accelerate.utils import DistributedType
from ropo.logps import response_head

begin = state.PartialState.__init__

def as_on_gpus(self, *args, **options):
    begin(self, *args, **options)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU

state.PartialState.__init__ = as_on_gpus
response_head.LOGITS_BUDGET_BYTES["cpu"] = 4 * 300 * 10
from ropo.cli.main import main
sys.exit(main())
"""
FSDP = {
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}  # fmt: skip
OPTIONS = {
    "learning_rate": 1e-3, "max_length": 64, "rho": "0.2", "logging_steps": 1, "use_cpu": True, "disable_tqdm": True,
    "train_sampling_strategy": "sequential", "rounds": 2, "num_folds": 0, "num_train_epochs": 2, "save_steps": 2,
    "sft_weight": 0.1,
}  # fmt: skip


@pytest.fixture
def command(pairs, model_folder, tmp_path):
    rows = [
        {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected, "weight": 0.25 + pair.row % 3}
        for pair in pairs
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    unseen = [{**row, "prompt": f"And then? {row['prompt']}"} for row in rows[:7]]
    (tmp_path / "unseen.jsonl").write_text("".join(json.dumps(row) + "\n" for row in unseen))
    (tmp_path / "launcher.py").write_text(LAUNCHER)

    def made(output, *, num_processes, **options):
        batch = {"per_device_train_batch_size": 4 // num_processes}
        words = [f"--{name}={value}" for name, value in {**OPTIONS, **batch, **options}.items()]
        how = ("torch.distributed.run", f"--nproc_per_node={num_processes}", "--master_port=29741")
        begin = ("-m", *how, str(tmp_path / "launcher.py")) if num_processes > 1 else (str(tmp_path / "launcher.py"),)
        data = (f"--model_name_or_path={model_folder}", f"--dataset_name={tmp_path / 'pairs.jsonl'}")
        return [sys.executable, *begin, "train", *data, f"--output_dir={output}", *words]

    return made


def environment(*, is_sharded):
    return {**os.environ, "OMP_NUM_THREADS": "1", **(FSDP if is_sharded else {})}


def logged(folder, name):
    log = read_json(folder / "rounds" / "00" / "training_log.json")
    return [line[name] for line in log if name in line]


@pytest.mark.parametrize("use_peft", [False, True])
def test_sharded_weights_take_the_same_steps(use_peft, command, tmp_path):
    """Losses, margins and the saved model are those of one process with batches twice as large."""
    one, two = tmp_path / "one", tmp_path / "two"
    for output, num_processes in ((one, 1), (two, 2)):
        words = command(
            output, num_processes=num_processes, use_peft=use_peft, eval_strategy="epoch",
            eval_dataset_name=tmp_path / "unseen.jsonl", per_device_eval_batch_size=2,
        )  # fmt: skip
        subprocess.run(words, check=True, env=environment(is_sharded=num_processes > 1), timeout=200)
    assert logged(two, "loss") == pytest.approx(logged(one, "loss"), abs=1e-5)
    assert len(logged(two, "loss")) == 10
    for name in ("eval_loss", "eval_rewards/margins", "eval_rewards/accuracies"):  # of 7 pairs: one is scored twice
        assert logged(two, name) == pytest.approx(logged(one, name), abs=1e-4)
        assert len(logged(two, name)) == 2
    margins = [pq.read_table(folder / "ledger.parquet")["margin"].to_numpy() for folder in (one, two)]
    assert margins[1] == pytest.approx(margins[0], abs=1e-3)
    name = "adapter_model.safetensors" if use_peft else "model.safetensors"
    models = [load_file(folder / "rounds" / "00" / "model" / name) for folder in (one, two)]
    for weight, found in models[0].items():
        assert found.numpy() == pytest.approx(models[1][weight].numpy(), abs=1e-3), weight


def test_a_killed_sharded_run_ends_at_the_same_model(command, tmp_path):
    """Checkpoints hold shards; the run goes on from them and not from the start."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    env, options = environment(is_sharded=True), {"num_processes": 2, "num_train_epochs": 6}
    how = {
        "check": True,
        "env": env,
        "timeout": 200,
        "text": True,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
    }
    unbroken = subprocess.run(command(whole, **options), **how)
    process = subprocess.Popen(command(killed, **options), env=env)
    checkpoints = killed / "rounds" / "00" / "checkpoints"
    while not list(checkpoints.glob("checkpoint-*[0-9]/complete.json")):
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.05)
    for one in [process, *psutil.Process(process.pid).children(recursive=True)]:  # workers have sessions of their own
        one.kill()
    process.wait()
    assert not (killed / "rounds" / "00" / "model").exists()
    again = subprocess.run(command(killed, **options), **how)
    # Every epoch of both rounds writes a checkpoint; from the start, the same model would come of it as well.
    saved = "Optimizer state saved"
    assert 0 < again.stdout.count(saved) < unbroken.stdout.count(saved)
    models = [load_file(folder / "model.safetensors") for folder in (whole, killed)]
    for weight, found in models[0].items():
        assert found.numpy() == pytest.approx(models[1][weight].numpy(), abs=1e-6), weight
