"""Two real processes: one waits as long as the other works, and ends at once where the other fails."""

import multiprocessing
import os
import platform
import re
import signal
import socket
import threading
import time
from datetime import timedelta

import pytest
import torch
from accelerate import PartialState

from ropo import processes
from ropo.processes import ending_together, meet, on_main
from ropo.provenance import RunError, read_json
from ropo.run import lock
from ropo.run.identity import claim
from ropo.run.lock import owning
from ropo.stages import Stages

HOST = platform.node()


def _child(rank, port, what, outcomes, limit):
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    PartialState._reset_state()
    PartialState(cpu=True, timeout=timedelta(seconds=limit))
    try:
        with ending_together(last=lambda: outcomes.put((rank, "ended", ""))):
            outcomes.put((rank, "done", what(rank)))
    except BaseException as error:
        outcomes.put((rank, type(error).__name__, str(error)))
        time.sleep(getattr(error, "lingers", 0))


def in_two(what, *, limit=60):
    """What became of `what(rank)` in two processes: by rank, a word and a result or a sentence; and the exit codes."""
    context = multiprocessing.get_context("fork")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    outcomes = context.SimpleQueue()
    children = [context.Process(target=_child, args=(rank, port, what, outcomes, limit)) for rank in (0, 1)]
    for child in children:
        child.start()
    found = {}
    while any(child.is_alive() for child in children) or not outcomes.empty():
        while not outcomes.empty():
            rank, *outcome = outcomes.get()
            found[rank] = tuple(outcome)
        time.sleep(0.01)
    return found, [child.exitcode for child in children]


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(processes, "_SECONDS_PER_BEAT", 0.05)
    monkeypatch.setattr(processes, "_GRACE_SECONDS", 1.0)


def test_whoever_waits_has_the_result_however_long_it_takes():
    """A collective of this launch would give up after two seconds."""

    def work(rank):
        return on_main(lambda: time.sleep(3.0) or [rank, "made"])

    assert in_two(work, limit=2)[0] == dict.fromkeys((0, 1), ("done", [0, "made"]))


def test_one_process_needs_no_other():
    with ending_together():
        meet()
        assert on_main(lambda: 3) == 3


@pytest.mark.parametrize("who", [0, 1])
def test_one_fails_and_the_other_says_why(who):
    def fail(rank):
        if rank == who:
            raise OSError("the disk has gone.")
        meet()

    found, _ = in_two(fail)
    assert found[who] == ("OSError", "the disk has gone.")
    assert found[1 - who] == (
        "RunError",
        f"Process {who} on {HOST} has failed, so all processes of this launch end: the disk has gone.",
    )


def test_one_that_looks_late_says_why_too(monkeypatch):
    """The store goes with the main process, as soon as the watch of the other has seen why."""

    def fail(rank):
        if rank == 0:
            time.sleep(0.2)
            raise OSError("the disk has gone.")
        monkeypatch.setattr(processes, "_SHORTEST_WAIT_SECONDS", 0.6)
        meet()

    assert in_two(fail)[0][1] == (
        "RunError",
        f"Process 0 on {HOST} has failed, so all processes of this launch end: the disk has gone.",
    )


def test_failures_that_all_have_stay_what_they_are():
    def fail(rank):
        raise ValueError(f"bad option {rank}")

    assert in_two(fail)[0] == {rank: ("ValueError", f"bad option {rank}") for rank in (0, 1)}


def test_a_collective_is_left_too():
    """Its error says that a connection is closed."""

    def fail(rank):
        if rank == 1:
            raise RunError("no room")
        torch.distributed.barrier()

    assert in_two(fail)[0][0] == (
        "RunError",
        f"Process 1 on {HOST} has failed, so all processes of this launch end: no room.",
    )


def test_a_process_that_no_exception_reaches_is_ended(capfd, monkeypatch):
    monkeypatch.setattr(processes.logger, "error", lambda text: os.write(2, text.encode()))

    def fail(rank):
        if rank == 1:
            error = RunError("no room")
            error.lingers = 2.5  # its connections stay open
            raise error
        torch.distributed.barrier()

    found, codes = in_two(fail)
    assert found[0] == ("ended", "")
    assert codes[0] == 1
    assert f"Process 1 on {HOST} has failed, so all processes of this launch end: no room." in capfd.readouterr().err


@pytest.mark.parametrize(
    ("who", "said"),
    [(1, f"Process 1 on {HOST} has failed, .*: nothing was heard of it for"), (0, "main process has failed, .*lost")],
)
def test_one_is_killed(who, said, monkeypatch):
    monkeypatch.setattr(processes, "_SILENT_SECONDS", 0.5)

    def die(rank):
        if rank == who:
            time.sleep(0.3)
            os.kill(os.getpid(), signal.SIGKILL)
        meet()

    found, codes = in_two(die)
    assert codes[who] == -signal.SIGKILL
    kind, sentence = found[1 - who]
    assert kind == "RunError"
    assert re.search(said, sentence)


def test_a_stage_may_take_long_in_the_main_process(tmp_path):
    """And where it fails there, the others know at once."""

    def work(rank):
        stages = Stages(tmp_path)
        stages.run("first", 1, ["file"], lambda: (time.sleep(2.5), (tmp_path / "file").touch()) if rank == 0 else None)
        stages.run("second", 1, ["none"], lambda: _fail("no room") if rank == 0 else None)

    found, _ = in_two(work, limit=2)
    assert found[0] == ("OSError", "no room")
    assert found[1] == ("RunError", f"Process 0 on {HOST} has failed, so all processes of this launch end: no room.")
    assert read_json(tmp_path / "manifest.json").keys() == {"first"}


def _fail(why):
    raise OSError(why)


@pytest.mark.parametrize("option", ["output_dir", "reference_cache_dir"])
def test_a_folder_that_another_process_does_not_see(option, tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "_VISIBLE_SECONDS", 0.2)

    def work(rank):
        own = tmp_path / str(rank)
        folder, cache = (own, None) if option == "output_dir" else (tmp_path / "O", str(own))
        with owning(folder, cache=cache):
            pass

    found, _ = in_two(work)
    for rank in (0, 1):
        kind, sentence = found[rank]
        assert kind == "ValueError"
        assert sentence.startswith(
            f"{option} needs a folder that every process sees; process 1 on {HOST} does not find in"
        )
    assert not list(tmp_path.iterdir())


def test_a_folder_that_appears_late(tmp_path, monkeypatch):
    """As on a network file system."""
    monkeypatch.setattr(lock, "_leave_token", lambda folder: late(folder / ".token.12345678").name)

    def late(path):
        threading.Timer(0.3, lambda: (path.parent.mkdir(exist_ok=True), path.touch())).start()
        return path

    def work(rank):
        with owning(tmp_path / "O"):
            found = sorted(path.name for path in (tmp_path / "O").iterdir() if path.name != ".token.12345678")
            meet()
            return found

    assert in_two(work)[0] == dict.fromkeys((0, 1), ("done", [lock.LOCK_FILE]))


def test_processes_that_read_different_data(tmp_path):
    def work(rank):
        claim(tmp_path / "O", {"data": "abcdef0123" if rank == 0 else "0123456789"})

    found, _ = in_two(work)
    for rank in (0, 1):
        kind, sentence = found[rank]
        assert kind == "ValueError"
        assert f"process 1 on {HOST} differs from the main one (there):\n  pairs: content abcdef01 there" in sentence
    assert not (tmp_path / "O").exists()
