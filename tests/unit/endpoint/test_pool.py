"""Many requests at a time: order of the answers, and what a failure ends."""

import threading
import time

import pytest

from ropo.endpoint.pool import StoppedError, ask_many, pause_until


def test_answers_stand_in_the_order_of_the_items():
    seen, stop = [], threading.Event()

    def ask(number):
        time.sleep(0.02 * (5 - number))
        return -number

    assert ask_many(ask, range(5), num_threads=5, stop=stop, on_answer=seen.append) == [0, -1, -2, -3, -4]
    assert sorted(seen) == [-4, -3, -2, -1, 0]
    assert seen != [0, -1, -2, -3, -4]  # as they come
    assert not stop.is_set()


def test_a_failure_ends_waits_and_what_has_not_begun():
    stop, asked, stopped = threading.Event(), [], []
    pause = pause_until(stop)

    def ask(number):
        asked.append(number)
        if number == 1:
            time.sleep(0.05)
            raise ValueError("no")
        try:
            pause(20.0)
        except StoppedError:
            stopped.append(number)
            raise

    start = time.monotonic()
    with pytest.raises(ValueError, match="no"):
        ask_many(ask, range(50), num_threads=2, stop=stop, on_answer=lambda _: None)
    assert time.monotonic() - start < 5
    assert len(asked) < 10
    assert 0 in stopped
