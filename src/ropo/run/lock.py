"""One run owns an output folder, which all its processes see: a file in it names the process that writes there.

In: the folder. Out: a context in which no other run writes there, or a sentence that names the one that does.

The file is the lock (`filelock.SoftFileLock`), since network file systems create a file exclusively but often do not
share the locks of the operating system. A file that a dead process of this machine has left is taken over; whether a
process of another machine or container is alive cannot be asked from here, so that one is left to the user.
"""

import os
import platform
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from filelock import SoftFileLock, Timeout

from ropo.processes import ending_together, on_main

LOCK_FILE = "ropo.lock"

_VISIBLE_SECONDS = 10.0  # within which a network file system shows a new file on every machine
_PATIENCE_SECONDS = 0.5  # a file system that cannot exchange two files needs a second try to take over a dead lock


@contextmanager
def owning(folder: Path, *, cache: str | None = None) -> Iterator[None]:
    """Keep other runs out of a folder until the block ends, however it ends.

    Of several processes of one launch the main one holds the lock, and all are refused together; within the block
    they end together, too.

    Args:
        folder: Made when it is missing, and removed again if nothing is written to it.
        cache: A folder beside it that all processes write to; None for none.

    Raises:
        ValueError: If another run holds the folder, it cannot be written to, or not every process sees what is written
            to one of the two.
        RunError: If another process of this launch has failed.
    """
    is_distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    rank = torch.distributed.get_rank() if is_distributed else int(os.environ.get("RANK", "0"))
    lock, made = SoftFileLock(folder / LOCK_FILE), []
    try:
        with ending_together(last=lock.release):
            if rank == 0:
                folders = [folder] if cache is None else [folder, Path(cache)]
                made = [path for one in folders for path in (one, *one.parents) if not path.exists()]
            refusal = _take(lock, folder) if rank == 0 else None
            if is_distributed:
                refusal = on_main(lambda: refusal)
            if refusal is not None:
                raise ValueError(refusal)
            if is_distributed:
                _check_shared("output_dir", folder)
                if cache is not None:
                    _check_shared("reference_cache_dir", Path(cache))
            yield
    finally:
        lock.release()
        for path in made:
            with suppress(OSError):  # something was written there
                path.rmdir()


def _check_shared(option: str, folder: Path) -> None:
    """Refuse a folder in which another process does not find what the main one writes.

    Raises:
        ValueError: In all processes, with the hosts that do not see it.
    """
    main, name = on_main(lambda: (platform.node(), _leave_token(folder)))
    sees_it = _finds(folder, name)
    blind = gather_object([] if sees_it else [f"process {PartialState().process_index} on {platform.node()}"])
    if PartialState().is_main_process:
        (folder / name).unlink(missing_ok=True)
    if blind:
        raise ValueError(
            f"{option} needs a folder that every process sees; {blind[0]} does not find in {folder} what the main "
            f"process on {main} writes there. Name a folder on a file system that all machines share."
        )


def _leave_token(folder: Path) -> str:
    name = f".token.{uuid.uuid4().hex[:8]}"  # a leftover, if this process is killed before it is removed
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).touch()
    return name


def _finds(folder: Path, name: str) -> bool:
    """Whether a file comes to be seen; a network file system may take some seconds."""
    end = time.monotonic() + _VISIBLE_SECONDS
    while not (found := folder.is_dir() and folder / name in folder.iterdir()) and time.monotonic() < end:
        time.sleep(0.1)
    return found


def _take(lock: SoftFileLock, folder: Path) -> str | None:
    """Take the lock; a sentence that says why not, or None."""
    try:
        lock.acquire(timeout=_PATIENCE_SECONDS)
    except Timeout:
        return (
            f"output_dir needs a folder that no other run writes to; {folder} is in use by {_holder(lock)}. Wait for "
            "that run, or use another output_dir; if it has died on another machine or in another container, remove "
            f"{folder / LOCK_FILE}."
        )
    except OSError as error:
        return f"output_dir needs a folder that can be written to; got {folder}: {error.strerror or error}."
    return None


def _holder(lock: SoftFileLock) -> str:
    """The process that the file names."""
    try:
        pid, host, *_ = Path(lock.lock_file).read_text("utf-8").splitlines()
    except (OSError, ValueError):
        return "a process that has left no name (on a full disk there was no room for it)"
    return f"process {pid} on {host.partition('?')[0]}"  # a container's name goes on with its process namespace
