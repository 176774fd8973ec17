"""How far a stage is: one line on a terminal, elsewhere at most one line of the log a minute.

In: what is done, and how much there is of it. Out: the line, with parts done, parts in all and the time left.
"""

import logging
import sys
import time
from types import TracebackType
from typing import ClassVar, Self

from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Line

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN = 60.0  # two lines of the log


class Progress:
    """Shows the progress of one stage while it is open, and nothing of it afterwards.

    Args:
        title: What is being done.
        total: How many parts there are.
        unit: What the parts are called, like " pairs".
        is_shown: False on all but the main process.
        is_line: False for lines of the log even on a terminal.
    """

    _has_line: ClassVar[bool] = False  # a terminal shows one at a time

    def __init__(
        self, title: str, total: float, *, unit: str = "", is_shown: bool = True, is_line: bool = True
    ) -> None:
        self.title, self.total, self.unit = title, total, unit
        self.is_shown, self.is_line = is_shown, is_line
        self.done, self.note = 0.0, ""
        self._line: Line | None = None
        self._start = self._logged = 0.0
        self._already_done = 0.0

    def __enter__(self) -> Self:
        """Start the clock, and the line where there is a terminal."""
        self._start = self._logged = time.monotonic()
        if self.is_shown and self.is_line and sys.stdout.isatty() and not Progress._has_line:
            text = f"{{task.completed:.0f}} of {{task.total:.0f}}{self.unit}{{task.fields[note]}},"
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn(text), TimeRemainingColumn())
            self._line = Line(*columns, TextColumn("left"), transient=True)
            self._line.add_task(self.title, total=self.total, note="")
            self._line.start()
            Progress._has_line = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the line away."""
        if self._line is not None:
            self._line.stop()
            self._line, Progress._has_line = None, False

    def skip(self, count: float) -> None:
        """Count parts that were done before: they say nothing about the time left."""
        self._already_done += count
        self.advance(count)

    def advance(self, count: float = 1, note: str | None = None) -> None:
        """Count parts that have just been done.

        Args:
            count: How many.
            note: Numbers to show beside them from now on; None leaves them as they are.
        """
        self.done += count
        self.note = self.note if note is None else note
        shown = f", {self.note}" if self.note else ""
        if self._line is not None:
            self._line.update(self._line.task_ids[0], completed=self.done, note=shown)
        elif self.is_shown and time.monotonic() - self._logged >= _SECONDS_BETWEEN:
            self._logged = time.monotonic()
            done = f"{self.title}: {self.done:.0f} of {self.total:.0f}{self.unit}{shown}"
            logger.info("%s, %s left", done, _duration(self._seconds_left()))

    def _seconds_left(self) -> float:
        own = self.done - self._already_done
        return (time.monotonic() - self._start) / own * max(self.total - self.done, 0) if own else float("inf")


def _duration(seconds: float) -> str:
    """A time for people.

    Examples:
        >>> [_duration(seconds) for seconds in (40, 90, 5400, float("inf"))]
        ['less than a minute', '2 min', '1 h 30 min', 'an unknown time']
    """
    if seconds == float("inf"):
        return "an unknown time"
    minutes = round(seconds / 60)
    if seconds < 60:
        return "less than a minute"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
