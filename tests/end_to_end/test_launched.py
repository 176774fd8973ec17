"""Runs that accelerate launches: the shipped configs, a process that is killed, Ctrl-C, and two hosts of one network.

The hosts are network namespaces of this machine with a cable between them; they need root and `ip`.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from ropo.cli.launcher import CONFIGS
from ropo.run.lock import LOCK_FILE

pytestmark = pytest.mark.distributed

OPTIONS = {
    "learning_rate": 1e-3, "max_length": 64, "use_cpu": True, "disable_tqdm": True, "num_folds": 0, "rho": "0",
    "per_device_train_batch_size": 2, "logging_steps": 1,
}  # fmt: skip
LONG = {"num_train_epochs": 30, "save_strategy": "steps", "save_steps": 10}
LAUNCHER = Path(__file__).with_name("sharded_launcher.py")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture
def words(pairs, model_folder, tmp_path):
    """`train` with its options; launch options come behind them."""
    rows = [{"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected} for pair in pairs]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def made(output="O", data="pairs.jsonl", **options):
        given = {
            "model_name_or_path": model_folder, "dataset_name": tmp_path / data, "output_dir": tmp_path / output,
            **OPTIONS, **options,
        }  # fmt: skip
        return ["train", *(f"--{name}={value}" for name, value in given.items())]

    return made


def ropo(words, **launch):
    """The command that starts its own processes."""
    return [sys.executable, "-m", "ropo", *words, *(f"--{name}={value}" for name, value in launch.items())]


TWO = {"accelerate_config": "ddp", "num_processes": 2}


def start(command):
    return subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def run(command):
    """Exit code and what was said."""
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=250)
    return done.returncode, done.stdout + done.stderr


def wait_for_a_checkpoint(folder, process):
    while not list(folder.glob("rounds/00/checkpoints/checkpoint-*/complete.json")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def workers_of(process):
    """The processes that have a rank, in its order."""
    found = psutil.Process(process.pid).children(recursive=True)
    return sorted((one for one in found if "LOCAL_RANK" in one.environ()), key=lambda one: one.environ()["RANK"])


@pytest.mark.parametrize(("name", "said"), [("ddp", "each with the whole model"), ("fsdp2", "sharded by fsdp")])
def test_accelerate_launches_the_configs(name, said, words, tmp_path):
    how = ("--config_file", str(CONFIGS / f"{name}.yaml"), "--num_processes", "2", "--main_process_port", "0")
    what = ("-m", "ropo") if name == "ddp" else (str(LAUNCHER),)
    code, output = run([sys.executable, "-m", "accelerate.commands.launch", *how, *what, *words()])
    assert code == 0, output
    assert re.search(f"2 processes on cpu, .*{said}.*, 4 pairs per step", output)
    assert (tmp_path / "O" / "model.safetensors").exists()


def test_a_killed_process_ends_the_launch_and_the_same_command_resumes(words, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    code, output = run(ropo(words("whole", **LONG), **TWO))
    assert code == 0, output
    command = ropo(words("killed", **LONG), **TWO)
    first = start(command)
    wait_for_a_checkpoint(killed, first)
    workers_of(first)[1].kill()
    _, output = first.communicate(timeout=200)
    assert first.returncode == 128 + signal.SIGKILL
    assert "ropo train: process 1 was ended by SIGKILL. The same command resumes." in output
    assert not (killed / LOCK_FILE).exists()
    assert not (killed / "rounds" / "00" / "model").exists()
    code, output = run(command)
    assert code == 0, output
    models = [load_file(folder / "model.safetensors") for folder in (whole, killed)]
    for weight, found in models[0].items():
        assert found.numpy() == pytest.approx(models[1][weight].numpy(), abs=1e-6), weight


def test_another_number_of_processes_starts_the_training_again(words, tmp_path):
    """With the reference's log-probs as they are; the model is that of a run with one process throughout."""
    folder = tmp_path / "O"
    first = start(ropo(words(**LONG), **TWO))
    wait_for_a_checkpoint(folder, first)
    workers_of(first)[0].kill()
    first.communicate(timeout=200)
    code, output = run(ropo(words(**LONG)))
    assert code == 0, output
    assert "was last run with 2 processes" in output
    assert "reference/reference: already done" in output
    code, output = run(ropo(words("alone", **LONG)))
    assert code == 0, output
    models = [load_file(one / "model.safetensors") for one in (folder, tmp_path / "alone")]
    for weight, found in models[0].items():
        assert found.numpy() == pytest.approx(models[1][weight].numpy(), abs=1e-5), weight


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_reach_the_processes(number, words, tmp_path):
    process = start(ropo(words(**LONG), **TWO))
    wait_for_a_checkpoint(tmp_path / "O", process)
    process.send_signal(number)
    _, output = process.communicate(timeout=200)
    assert process.returncode == 128 + number
    assert output.count("interrupted by") == output.count("stage 00/train.") == 1
    assert "Traceback" not in output
    assert not (tmp_path / "O" / LOCK_FILE).exists()


def test_a_refusal_is_said_once_and_keeps_its_code(words):
    code, output = run(ropo(words(beta=-1), **TWO))
    assert (code, output.count("needs a finite beta > 0; got -1.0")) == (2, 1)
    assert "Traceback" not in output


HOSTS = ("ropo-a", "ropo-b")
needs_root = pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("unshare"), reason="needs root, ip and unshare"
)


def ip(*words):
    return subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def hosts():
    """Two network namespaces that see each other and nothing else."""
    try:
        for name in HOSTS:
            ip("netns", "add", name)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces: {error.stderr.decode()}")
    try:
        ip("link", "add", "cable", "netns", HOSTS[0], "type", "veth", "peer", "name", "cable", "netns", HOSTS[1])
        for number, name in enumerate(HOSTS, start=1):
            ip("-n", name, "addr", "add", f"10.213.7.{number}/24", "dev", "cable")
            for device in ("cable", "lo"):
                ip("-n", name, "link", "set", device, "up")
        yield
    finally:
        for name in HOSTS:
            ip("netns", "del", name)


@contextmanager
def on_hosts(*commands):
    """A launcher on each host."""
    started = []
    for rank, (name, command) in enumerate(zip(HOSTS, commands, strict=True)):
        launch = {
            **TWO, "num_machines": 2, "machine_rank": rank, "main_process_ip": "10.213.7.1",
        }  # fmt: skip
        there = f'hostname {name}; exec ip netns exec {name} env GLOO_SOCKET_IFNAME=cable "$@"'
        started.append(start(["unshare", "--uts", "sh", "-c", there, "sh", *ropo(command, **launch)]))
    try:
        yield started
    finally:
        for name in HOSTS:  # also what has left its launcher's session
            for pid in ip("netns", "pids", name).stdout.split():
                os.kill(int(pid), signal.SIGKILL)
        for process in started:
            process.communicate()


def ends_of(processes):
    """Exit codes, and what each has said."""
    said = [process.communicate(timeout=250) for process in processes]
    return [process.returncode for process in processes], [out + err for out, err in said]


@needs_root
def test_two_hosts(hosts, words, tmp_path):
    with on_hosts(words(), words()) as started:
        codes, said = ends_of(started)
    assert codes == [0, 0], said
    assert "2 processes on cpu, each with the whole model" in said[0]
    assert (tmp_path / "O" / "model.safetensors").exists()


@needs_root
@pytest.mark.parametrize(
    ("ours", "theirs", "sentence"),
    [
        (
            {"output": "A"},
            {"output": "B"},
            "output_dir needs a folder that every process sees; process 1 on ropo-b does",
        ),
        ({}, {"data": "none.jsonl"}, "file not found"),
    ],
)
def test_two_hosts_that_share_too_little(ours, theirs, sentence, hosts, words, tmp_path):
    """Every host says so, and nothing is left."""
    with on_hosts(words(**ours), words(**theirs)) as started:
        codes, said = ends_of(started)
    assert all(codes), said
    for one in said:
        assert sentence in one
        assert "Traceback" not in one
    assert not list(tmp_path.glob("*/rounds"))
    assert not list(tmp_path.glob(f"*/{LOCK_FILE}"))


@needs_root
def test_a_host_that_dies_ends_the_other_and_both_resume(hosts, words, tmp_path):
    command = words(**LONG)
    with on_hosts(command, command) as started:
        wait_for_a_checkpoint(tmp_path / "O", started[0])
        begin = time.monotonic()
        for pid in ip("netns", "pids", HOSTS[1]).stdout.split():
            os.kill(int(pid), signal.SIGKILL)
        _, said = started[0].communicate(timeout=200)
        assert time.monotonic() - begin < 60  # a collective waits for half an hour
    assert started[0].returncode == 1
    assert "has failed, so all processes of this launch end" in said
    with on_hosts(command, command) as started:
        codes, said = ends_of(started)
    assert codes == [0, 0], said
    assert (tmp_path / "O" / "model.safetensors").exists()
