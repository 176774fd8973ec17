"""Ctrl-C and SIGTERM end a command as an exception of the main thread, so that it leaves nothing half written.

In: signals. Out: `Interrupted`, and a sentence that says how to go on.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(KeyboardInterrupt):
    """A signal that asks the process to end."""


@contextmanager
def raising_interrupted() -> Iterator[list[int]]:
    """Within it SIGINT and SIGTERM raise `Interrupted` in the main thread; before and after it they do what they did.

    After the first signal another SIGTERM is ignored, since schedulers and launchers send several; another Ctrl-C ends
    the process at once.

    Yields:
        The number of the signal, once there was one: a library may turn the exception into another.
    """
    received: list[int] = []
    before = {
        number: signal.getsignal(number)
        for number in (signal.SIGINT, signal.SIGTERM)
        if threading.current_thread() is threading.main_thread()
        # `nohup` and the like ignore one, and a host may have a handler of its own.
        and signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)
    }

    def stop(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - the signature of a handler
        received.append(number)
        for known in before:
            signal.signal(known, signal.SIG_IGN if known == signal.SIGTERM else signal.SIG_DFL)
        raise Interrupted(signal.Signals(number).name)

    for number in before:
        signal.signal(number, stop)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def how_to_resume(command: str, number: int, stage: str) -> str:
    """What a command that was interrupted has kept."""
    what = f"interrupted by {'Ctrl-C' if number == signal.SIGINT else signal.Signals(number).name}"
    if stage:
        return f"{what} in stage {stage}. The same command resumes there, from its last checkpoint if it has one."
    return f"{what}." if command in ("validate", "losses") else f"{what}. The same command resumes from what is done."
