"""Ctrl-C and SIGTERM end a command in one sentence and the exit code that shells know."""

import os
import signal
import sys
import threading
import time
from functools import partial

import pytest

from ropo.cli import main as cli
from ropo.cli.interruption import Interrupted, raising_interrupted
from ropo.endpoint.address import Endpoint
from ropo.endpoint.pool import ASKING
from ropo.judge.endpoint import EndpointJudge
from ropo.sampling.engine import Sampling
from ropo.sampling.server_engine import ServerEngine
from ropo.stages import Stages

NUMBERS = {signal.SIGINT: "interrupted by Ctrl-C", signal.SIGTERM: "interrupted by SIGTERM"}


def send(number):
    os.kill(os.getpid(), number)
    time.sleep(1)  # the handler interrupts it


@pytest.fixture
def command(monkeypatch):
    """Let `ropo losses` do something else, as a process of its own would."""

    def run(do, *, name="losses"):
        monkeypatch.setattr(sys, "argv", ["ropo", name])
        monkeypatch.setattr(f"ropo.cli.{name}.run", lambda _: do() or cli.DONE)
        return cli.main()

    return run


@pytest.mark.parametrize("number", NUMBERS)
def test_one_sentence(number, command, capsys):
    before = signal.getsignal(number)
    assert command(lambda: send(number)) == 128 + number
    assert capsys.readouterr().err == f"ropo losses: {NUMBERS[number]}.\n"
    assert signal.getsignal(number) == before


def test_a_terminal_gets_a_line_of_its_own(command, capsys, monkeypatch):
    """^C stands there, or a line that shows progress."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert command(lambda: send(signal.SIGINT)) == 130
    assert capsys.readouterr().err == f"\nropo losses: {NUMBERS[signal.SIGINT]}.\n"


def test_a_library_that_goes_on_does_not_begin_a_run(monkeypatch, capsys):
    """As where an exception inside an import is swallowed."""
    monkeypatch.setattr(sys, "argv", ["ropo", "losses"])

    def swallow():
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)

    monkeypatch.setattr("ropo.cli.console.log_to_console", swallow)
    monkeypatch.setattr("ropo.cli.losses.run", lambda _: pytest.fail("it began"))
    assert cli.main() == 130
    assert capsys.readouterr().err == f"ropo losses: {NUMBERS[signal.SIGINT]}.\n"


def test_it_says_where_the_same_command_resumes(command, capsys, tmp_path):
    """At the innermost of the stages that were not finished."""

    def train():
        inner = Stages(tmp_path / "models")
        Stages(tmp_path / "audit").run("judge", 0, [], lambda: inner.run("fold 1", 0, [], lambda: send(signal.SIGTERM)))

    assert command(train, name="train") == 143
    said = capsys.readouterr().err
    assert said.startswith(f"ropo train: {NUMBERS[signal.SIGTERM]} in stage")
    assert " models/fold 1. " in said
    assert said.count("\n") == 1
    assert "checkpoint" in said
    assert command(lambda: send(signal.SIGTERM), name="bench") == 143
    assert "what is done." in capsys.readouterr().err


def test_a_library_that_turns_it_into_another_error(command, capsys):
    """As a broken-off collective does, or a worker that got the same signal."""

    def collective():
        try:
            send(signal.SIGTERM)
        except KeyboardInterrupt:
            raise RuntimeError("connection closed by peer") from None

    assert command(collective) == 143
    assert capsys.readouterr().err == f"ropo losses: {NUMBERS[signal.SIGTERM]}.\n"


def test_processes_of_a_launch_speak_once(command, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert command(lambda: send(signal.SIGINT)) == 130
    assert not capsys.readouterr().err


def test_a_second_signal():
    """Launchers send several SIGTERM, which must not break the tidying up; a second Ctrl-C is meant."""
    with raising_interrupted() as received:
        with pytest.raises(Interrupted):
            send(signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    assert received == [signal.SIGTERM]


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with raising_interrupted() as received:
            os.kill(os.getpid(), signal.SIGINT)
        assert received == []
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_caller_in_python_keeps_its_ctrl_c(monkeypatch):
    monkeypatch.setattr("ropo.cli.losses.run", lambda _: send(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt) as caught:
        cli.main(["losses"])
    assert not isinstance(caught.value, Interrupted)


@pytest.mark.parametrize("who", ["judge", "server"])
def test_nobody_waits_for_a_server(who, pairs, tokenizer, tmp_path, monkeypatch):
    """An answer may take ten minutes."""
    has_ended = threading.Event()
    if who == "judge":
        monkeypatch.setattr(EndpointJudge, "_ask_both", lambda *_: has_ended.wait(20))
        asker = EndpointJudge(Endpoint(url="http://localhost:1/v1", model="m"), tmp_path)
        ask = partial(asker, pairs[:3])
    else:
        monkeypatch.setattr(ServerEngine, "_ask", lambda *_: has_ended.wait(20))
        engine = ServerEngine(Endpoint(url="http://localhost:1/v1", model="m"), tokenizer)
        sampling = Sampling(num_candidates=1, max_new_tokens=4)
        ask = partial(engine.sample, [[1, 2], [3]], sampling, lambda *_: None)
    monkeypatch.setattr("ropo.endpoint.pool._GRACE_SECONDS", 0.1)
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        ask()
    assert time.monotonic() - start < 3
    assert any(thread.name.startswith(ASKING) for thread in threading.enumerate())  # so that `ropo` does not, either
    has_ended.set()
