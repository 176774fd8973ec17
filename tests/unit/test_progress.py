"""A line on a terminal; elsewhere a line of the log a minute."""

import io
import logging
import sys

import pytest
import rich

from ropo import progress
from ropo.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_one_line_a_minute(clock, caplog):
    with caplog.at_level(logging.INFO), Progress("Round 0: training", 600, unit=" steps") as shown:
        for _ in range(600):
            clock[0] += 0.5  # five minutes in all
            shown.advance(1, "loss 0.693")
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 5
    assert lines[0].split(": ")[:2] == ["Round 0", "training"]
    assert "120 of 600 steps, loss 0.693, 4 " in lines[0]
    assert "480 of 600 steps, loss 0.693, 1 " in lines[3]


def test_a_short_stage_says_nothing(clock, caplog):
    with caplog.at_level(logging.INFO), Progress("Scoring", 10) as shown:
        for _ in range(10):
            clock[0] += 5.9
            shown.advance()
    assert not caplog.records


def test_what_was_done_before_does_not_make_it_faster(clock, caplog):
    with caplog.at_level(logging.INFO), Progress("Sampling", 100) as shown:
        shown.skip(80)
        clock[0] += 60
        shown.advance(10)
    (said,) = caplog.messages
    assert said.startswith("Sampling: 90 of 100, 1 min")


def test_other_processes_say_nothing(clock, caplog):
    with caplog.at_level(logging.INFO), Progress("Scoring", 10, is_shown=False) as shown:
        clock[0] += 999
        shown.advance()
    assert not caplog.records


def test_a_terminal_shows_one_line_and_takes_it_away(monkeypatch, caplog):
    """Also where a stage within another one shows its progress, and after an exception."""
    written = io.StringIO()
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(rich.get_console(), "_file", written)
    monkeypatch.setattr(rich.get_console(), "_force_terminal", True)

    def stage():
        with Progress("Scoring pairs", 40, unit=" pairs") as outer:
            with Progress("Within", 3) as inner:
                assert inner._line is None
                inner.advance()
            outer.advance(30, "fast")
            outer._line.refresh()
            raise KeyError

    with pytest.raises(KeyError):
        stage()
    assert "30 of 40 pairs, fast" in written.getvalue()
    assert written.getvalue().endswith("\x1b[2K")  # the line is erased
    with Progress("Again", 1) as again:
        assert again._line is not None
    assert not caplog.records
