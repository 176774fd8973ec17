"""Two real processes: one waits as long as the other works, and ends at once where the other fails."""

import multiprocessing
import os
import platform
import re
import signal
import socket
import time
from datetime import timedelta

import pytest
import torch
from accelerate import PartialState

from ropo import processes
from ropo.processes import ending_together, meet, on_main
from ropo.provenance import RunError

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
    """A collective of this launch would give up after a second."""

    def work(rank):
        return on_main(lambda: time.sleep(2.0) or [rank, "made"])

    assert in_two(work, limit=1)[0] == dict.fromkeys((0, 1), ("done", [0, "made"]))


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
