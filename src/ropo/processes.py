"""What the processes of one launch do together: wait without a time limit, and end when one of them fails.

In: the processes as `accelerate` knows them, and the key-value store that torch's launchers start for them. Out: the
same result in all of them, or a `RunError` in all of them that says which process failed, where and why.

The one idea: a collective ends after its time limit (30 minutes by default) without a word on what it waited for, and a
process that failed on another machine is noticed no earlier. So whoever waits here reads a key again and again, for as
long as all are alive: every process writes a heartbeat there, and the first that fails says why.
"""

import logging
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import distributed
from torch.distributed import DistError, PrefixStore, Store, TCPStore  # type: ignore[attr-defined] # from its C++

from ropo.provenance import RunError

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

_SHORTEST_WAIT_SECONDS, _LONGEST_WAIT_SECONDS = 0.005, 0.5  # between two looks of one that waits
_SECONDS_PER_BEAT = 2.0
_SILENT_SECONDS = 120.0  # loading a large file may keep a process from its heartbeat for a while
_GRACE_SECONDS = 6.0  # for a process that computes to end by itself; whoever failed waits for half of it
_FAILED, _LEFT = "failed", "left"


def meet() -> None:
    """Wait until every process is here, however long one of them works.

    Raises:
        RunError: If another process fails or dies meanwhile.
    """
    if _watch is None:
        PartialState().wait_for_everyone()
    else:
        _watch.meet()


def on_main(act: Callable[[], Result]) -> Result:
    """Have the main process do something while the others wait, however long it takes.

    Args:
        act: What to do; called in the main process only. Its result must be picklable.

    Returns:
        Its result, in every process.

    Raises:
        RunError: In the other processes, if it fails.
    """
    state = PartialState()
    if state.num_processes == 1:
        return act()
    made = [act() if state.is_main_process else None]
    meet()
    found: Result = broadcast_object_list(made)[0]
    return found


@contextmanager
def ending_together(last: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Within it, all processes of the launch end when one of them fails or dies, and say which and why.

    A process that is waiting for it in a collective, where no exception reaches it, is ended from a thread. May be
    entered within itself.

    Args:
        last: What such a process does before it is ended.

    Raises:
        RunError: If another process has failed or died.
    """
    global _watch
    is_alone = not distributed.is_initialized() or distributed.get_world_size() == 1
    if is_alone or _watch is not None or "MASTER_ADDR" not in os.environ:
        if _watch is not None:
            _watch.last.append(last)
        yield
        return
    watch = _watch = _Watch()
    watch.last.append(last)
    try:
        yield
        watch.meet()
        watch.leave()
    except BaseException as error:
        failure = watch.tell(error)
        if _is_of_collective(error):
            raise RunError(failure) from error
        raise
    finally:
        watch.end()
        _watch = None


class _Watch:
    """The heartbeat of this process, and its eye on the others.

    Attributes:
        last: See `ending_together`.
    """

    _number = 0  # of watches in this process: each has keys of its own

    def __init__(self) -> None:
        state = PartialState()
        self._rank, self._size = state.process_index, state.num_processes
        self.last: list[Callable[[], object]] = []
        _Watch._number += 1
        # A launcher may start all processes anew, with the same store.
        self._prefix = f"ropo/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{_Watch._number}"
        self._store = self._connected()
        self._num_meetings = 0
        self._failure = ""  # of any process, once this one knows it
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._look, name="ropo-watch", daemon=True)
        self._thread.start()

    def _connected(self) -> Store:
        """A connection of its own, since one that is waited on keeps all others of it waiting."""
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        return PrefixStore(self._prefix, TCPStore(host, port, is_master=False, timeout=timedelta(seconds=60)))

    def meet(self) -> None:
        """See the function of this name."""
        self._num_meetings += 1
        self._wait_for(f"meeting {self._num_meetings}", self._size)

    def _wait_for(self, key: str, number: int) -> None:
        """Count this process, and wait until so many are counted."""
        wait, place = _SHORTEST_WAIT_SECONDS, 1
        try:
            while self._store.add(key, place) < number:
                if failure := self._failure_in(self._store):
                    raise RunError(failure)
                time.sleep(wait)
                wait, place = min(2 * wait, _LONGEST_WAIT_SECONDS), 0
        except DistError as error:
            raise RunError(self._failure or _LOST) from error

    def _failure_in(self, store: Store) -> str:
        """What was said of a failure, if anything. Kept, since whoever said it takes the store along once all know."""
        self._failure = self._failure or _said_in(store)
        if self._failure:
            store.set(_noticed_by(self._rank), "")
        return self._failure

    def leave(self) -> None:
        """End after a success: the main process, which may hold the store, goes last."""
        self.end()
        with suppress(DistError):  # all is done
            if self._rank:
                self._store.add(_LEFT, 1)
            else:
                self._await(lambda: self._store.add(_LEFT, 0) >= self._size - 1, seconds=10 * _GRACE_SECONDS)

    def tell(self, error: BaseException) -> str:
        """Say that this process has failed, unless another has said so before.

        Args:
            error: Why.

        Returns:
            What was said first.
        """
        self.end()
        name = f"process {self._rank} on {platform.node()}"
        why = "it was interrupted" if isinstance(error, KeyboardInterrupt) else str(error) or type(error).__name__
        own = _failure_of(name, why)
        try:
            if _is_of_collective(error):
                own = _failure_of("another process", f"{name} has lost it ({why.splitlines()[0]})")
                self._await(lambda: bool(self._failure_in(self._store)), seconds=_GRACE_SECONDS / 2)
            self._store.compare_set(_FAILED, "", own)
            self._failure_in(self._store)
            everyone = [_noticed_by(rank) for rank in range(self._size)]
            # The store may be gone with this process.
            self._await(lambda: self._store.check(everyone), seconds=_GRACE_SECONDS / 2)
        except DistError:
            self._failure = self._failure or (own if self._rank == 0 else _LOST)
        return self._failure

    def end(self) -> None:
        """Look no more."""
        self._is_over.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(_GRACE_SECONDS)

    @staticmethod
    def _await(is_so: Callable[[], bool], *, seconds: float) -> None:
        """Wait for something, for so long at most."""
        end = time.monotonic() + seconds
        while not is_so() and time.monotonic() < end:
            time.sleep(_SHORTEST_WAIT_SECONDS)

    def _look(self) -> None:
        """Write a heartbeat and look for those of others, until it is over or one has failed."""
        heard: dict[int, tuple[bytes, float]] = {}
        others = range(1, self._size) if self._rank == 0 else (0,)
        beat, failure = 0, ""
        store = self._connected()
        while not failure and not self._is_over.wait(_SECONDS_PER_BEAT):
            beat += 1
            try:
                store.set(_beat_of(self._rank), f"{beat} {platform.node()}")
                for rank in others:
                    self._listen(store, rank, heard)
                failure = self._failure_in(store)
            except DistError:
                failure = self._failure or _LOST
        if failure and not self._is_over.wait(_GRACE_SECONDS):
            logger.error(failure)
            for act in self.last:
                act()
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            os._exit(1)  # the main thread waits in a collective, for a process that is gone

    @staticmethod
    def _listen(store: Store, rank: int, heard: dict[int, tuple[bytes, float]]) -> None:
        """Tell all if a process has been silent for too long."""
        now = time.monotonic()
        beat = store.get(_beat_of(rank)) if store.check([_beat_of(rank)]) else b""
        last, when = heard.get(rank, (None, now))
        if beat != last:
            heard[rank] = (beat, now)
        elif now - when > _SILENT_SECONDS:
            host = beat.decode().partition(" ")[2] or "a machine that has never been heard of"
            silence = f"nothing was heard of it for {_SILENT_SECONDS:.0f} seconds, so it was killed or cut off"
            store.compare_set(_FAILED, "", _failure_of(f"process {rank} on {host}", silence))


def _is_of_collective(error: BaseException) -> bool:
    """Whether it says no more than that another process is gone."""
    return isinstance(error, DistError) or (type(error) is RuntimeError and "gloo" in str(error))


def _beat_of(rank: int) -> str:
    return f"beat {rank}"


def _noticed_by(rank: int) -> str:
    return f"noticed {rank}"


def _said_in(store: Store) -> str:
    return store.get(_FAILED).decode() if store.check([_FAILED]) else ""


def _failure_of(name: str, why: str) -> str:
    return f"{name[0].upper()}{name[1:]} has failed, so all processes of this launch end: {why.rstrip('.')}."


_LOST = _failure_of("the main process", "its connection is lost")
_watch: _Watch | None = None
