"""Many requests at a time, and how they end when one fails or on Ctrl-C.

In: a function that makes one request, items. Out: its answers.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed, wait
from typing import TypeVar

ASKING = "ropo-asking"  # name of the threads that wait for answers
_GRACE_SECONDS = 3.0  # for answers that are on their way when a user or a scheduler ends the process

Item = TypeVar("Item")
Answer = TypeVar("Answer")


class StoppedError(Exception):
    """Requests were stopped while this one waited to be repeated."""


def ask_many(
    ask: Callable[[Item], Answer],
    items: Sequence[Item],
    *,
    num_threads: int,
    stop: threading.Event,
    on_answer: Callable[[Answer], object],
) -> list[Answer]:
    """Make many requests, several at a time.

    The first exception ends it: `stop` is set, no further request begins, and those that run may finish; after Ctrl-C
    for a few seconds only.

    Args:
        ask: Makes one request.
        items: What to ask about.
        num_threads: Requests at a time.
        stop: Set when requests that wait to be repeated shall give up, see `pause_until`.
        on_answer: Called in this thread with each answer as it comes.

    Returns:
        The answers, in the order of the items.
    """
    pool = ThreadPoolExecutor(num_threads, ASKING)
    futures = [pool.submit(ask, item) for item in items]
    try:
        for future in as_completed(futures):
            on_answer(future.result())
    except BaseException as error:
        stop.set()
        pool.shutdown(wait=False, cancel_futures=True)
        running = [future for future in futures if not future.cancelled()]
        wait(running, timeout=_GRACE_SECONDS if isinstance(error, KeyboardInterrupt) else None)
        raise
    pool.shutdown()
    return [future.result() for future in futures]


def pause_until(stop: threading.Event) -> Callable[[float], None]:
    """A `sleep` for `post_json` that raises `StoppedError` as soon as `stop` is set."""

    def pause(seconds: float) -> None:
        if stop.wait(seconds):
            raise StoppedError

    return pause
