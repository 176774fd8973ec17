"""The answers of judges, kept so that nothing is asked, or paid for, twice.

In: answers under keys that name everything they depend on. Out: JSON lines in a folder, written as answers arrive, so
that a run that is killed asks only for the rest.
"""

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from ropo.processes import meet
from ropo.provenance import RunError, saying_if_full

Answer = str | float | None
UNREADABLE = "unreadable"
"""What is kept of an answer that says nothing: later runs ask again."""

Unit = TypeVar("Unit")


class Answers:
    """Answers by key, in memory and on disk: JSON lines of `key` and `answer`, no texts.

    Each process writes a file of its own, and every process knows all answers. All processes must make it and call
    `share` together.

    Args:
        folder: Where the files are; made when the first answer comes.
        name: Beginning of their names.

    Attributes:
        unreadable: Keys of what earlier runs have asked and could not read. To be asked again, after all that was never
            asked: what cannot be read every time must not keep a run from the rest.
    """

    def __init__(self, folder: Path, name: str) -> None:
        state = PartialState()
        self._path = folder / f"{name}.{state.process_index}.jsonl"
        self._lock = threading.Lock()
        self._new: dict[str, Answer] = {}
        known = [_read(sorted(folder.glob(f"{name}.*.jsonl"))) if state.is_main_process else {}]
        if state.num_processes > 1:
            broadcast_object_list(known)
        self.unreadable = {key for key, answer in known[0].items() if answer == UNREADABLE}
        self._known: dict[str, Answer] = {key: known[0][key] for key in known[0].keys() - self.unreadable}
        meet()  # all is read before anything is written
        # A run that was killed in the middle of a line has left one without an end.
        self._needs_line_end = self._path.exists() and self._path.read_bytes()[-1:] not in (b"", b"\n")

    def __contains__(self, key: str) -> bool:
        return key in self._known

    def get(self, key: str) -> Answer:
        """The answer under `key`; None also where there is none."""
        return self._known.get(key)

    def add(self, answers: Mapping[str, Answer]) -> None:
        """Keep answers; they are in the file when this returns. Threads may call it at the same time."""
        lines = [json.dumps({"key": key, "answer": answer}) + "\n" for key, answer in answers.items()]
        with self._lock, saying_if_full(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write("".join(["\n" * self._needs_line_end, *lines]))
            self._needs_line_end = False
            self._known.update(answers)
            self._new.update(answers)

    def share(self, missing: Mapping[str, Unit], work: Callable[[Mapping[str, Unit]], None]) -> None:
        """Let each process work on its part of what is missing, and share the answers among all.

        Args:
            missing: What to ask, by any name; the same in all processes.
            work: Asks a part of it and calls `add`.

        Raises:
            Exception: What `work` raises, in its own process; in the others a RunError with its text.
        """
        state = PartialState()
        mine = dict(list(missing.items())[state.process_index :: state.num_processes])
        error: Exception | None = None
        try:
            if mine:
                work(mine)
        except Exception as caught:  # the others wait for this process, so it must come to the end first
            error = caught
        meet()  # one may have been asking for much longer than the others
        if state.num_processes > 1:
            for new, message in gather_object([(self._new, None if error is None else str(error))]):
                self._known.update(new)
                if message is not None and error is None:
                    error = RunError(message)
        self._new = {}
        if error is not None:
            raise error


def _read(paths: Sequence[Path]) -> dict[str, Answer]:
    answers: dict[str, Answer] = {}
    for path in paths:
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                row = json.loads(line)
                key, answer = row["key"], row["answer"]
            except (ValueError, TypeError, KeyError):  # the line that a kill has cut, or the empty end
                continue
            if isinstance(answer, Answer) and (answer != UNREADABLE or key not in answers):
                answers[str(key)] = answer
    return answers
