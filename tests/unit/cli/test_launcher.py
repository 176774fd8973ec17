"""`--accelerate_config`: which processes are started, with which words, and what their end becomes."""

import os
import signal
from argparse import Namespace

import accelerate.commands.launch
import pytest
import torch
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from ropo.cli import launcher
from ropo.cli.launcher import LaunchArguments, arguments_of, launch

WORDS = ["--accelerate_config", "ddp", "--num_processes", "2", "--beta", "0.1"]


@pytest.fixture(autouse=True)
def _not_launched(monkeypatch):
    for name in ("LOCAL_RANK", "ACCELERATE_MIXED_PRECISION", launcher._LAUNCHED, "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "")  # to be restored
        monkeypatch.delenv(name)


@pytest.fixture
def launched(monkeypatch):
    """What `accelerate launch` was told."""
    seen: list[Namespace] = []
    monkeypatch.setattr(accelerate.commands.launch, "launch_command", seen.append)
    return seen


def test_every_process_has_the_same_words(launched):
    assert launch("train", WORDS) == 0
    [told] = launched
    assert (told.training_script, told.training_script_args) == ("ropo", ["train", *WORDS])
    assert (told.num_processes, told.num_machines, told.main_process_port) == (2, 1, 0)
    assert told.num_cpu_threads_per_process == max(1, os.cpu_count() // 2)
    assert launcher._LAUNCHED not in os.environ


def test_a_recipe_may_name_it(launched, tmp_path):
    (tmp_path / "recipe.yaml").write_text("accelerate_config: ddp\nnum_processes: 4\n")
    assert launch("train", ["--config", str(tmp_path / "recipe.yaml"), "--num-processes", "2"]) == 0
    assert launched[0].num_processes == 2


def test_a_launched_process_launches_nothing(launched, monkeypatch):
    monkeypatch.setenv(launcher._LAUNCHED, "1")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert launch("train", WORDS) is None
    assert launch("train", []) is None
    assert not launched


def test_one_process_is_this_one(launched, tmp_path, monkeypatch):
    assert launch("train", ["--accelerate_config", "one_gpu"]) is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    own = tmp_path / "own.yaml"
    own.write_text("distributed_type: 'NO'\nmixed_precision: bf16\ngpu_ids: '3'\n")
    assert launch("train", ["--accelerate_config", str(own)]) is None
    assert (os.environ["ACCELERATE_MIXED_PRECISION"], os.environ["CUDA_VISIBLE_DEVICES"]) == ("bf16", "3")
    assert not launched


def test_processes_are_one_per_gpu_on_all_machines(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    given = LaunchArguments(accelerate_config="fsdp2", num_machines=2, machine_rank=1, main_process_ip="10.0.0.1")
    told = arguments_of(given, "train", [])
    assert (told.num_processes, told.machine_rank, told.main_process_port) == (16, 1, 29500)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--num_processes", "2"], "num_processes needs accelerate_config, which .* Add it"),
        (["--accelerate_config", "fsdp"], r"needs one of ddp, .*, or a file; got 'fsdp'\. Did you mean fsdp2"),
        (["--accelerate_config", "ddp"], "accelerate_config ddp needs num_processes where no GPU is"),
        (["--accelerate_config", "one_gpu", "--num_processes", "2"], "one_gpu starts one process; got more"),
        (["--accelerate_config", "ddp", "--num_processes", "0"], "num_processes needs"),
        (["--accelerate_config", "ddp", "--num_processes", "x"], "num_processes needs a whole number; got 'x'"),
        ([*WORDS, "--num_machines", "2"], "num_machines 2 needs machine_rank; got none"),
        ([*WORDS, "--machine_rank", "1"], "machine_rank needs num_machines; got it alone"),
        (
            ["--accelerate_config", "one_gpu", "--main_process_ip", "h"],
            "main_process_ip needs num_machines; got it alone",
        ),
        ([*WORDS, "--num_machines", "2", "--machine_rank", "0"], "num_machines 2 needs main_process_ip; got none"),
        (
            [*WORDS, "--num_machines", "3", "--machine_rank", "0", "--main_process_ip", "h"],
            "multiple of num_machines, 3; got 2",
        ),
        (["--accelerate_config", __file__], "needs a file of `accelerate config`; .*test_launcher.py is none"),
    ],
)
def test_refused_before_anything_starts(words, said, launched):
    with pytest.raises(ValueError, match=said):
        launch("train", words)
    assert not launched


@pytest.mark.parametrize("name", ["LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"])
def test_no_launcher_within_another(name, launched, monkeypatch):
    monkeypatch.setenv(name, "0")
    with pytest.raises(ValueError, match=r"was started by `accelerate launch` or torchrun\. Leave it out"):
        launch("train", WORDS)


def failed(exit_code):
    failure = ProcessFailure(local_rank=1, pid=1, exitcode=exit_code, error_file="none")
    return ChildFailedError("ropo", {1: failure})


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (failed(2), 2, ""),
        (failed(-9), 137, "ropo train: process 1 was ended by SIGKILL. The same command resumes.\n"),
        (SignalException("", signal.SIGTERM), 143, ""),
        (SignalException("", signal.SIGINT), 130, ""),
    ],
)
def test_exit_codes(error, code, said, monkeypatch, capsys):
    def fail(_):
        raise error

    monkeypatch.setattr(accelerate.commands.launch, "launch_command", fail)
    assert launch("train", WORDS) == code
    assert capsys.readouterr().err == said
