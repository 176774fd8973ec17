"""One run owns an output folder: a file in it names the process that writes there.

In: the folder. Out: a context in which no other run writes there, or a sentence that names the one that does.

The file is the lock (`filelock.SoftFileLock`), since network file systems create a file exclusively but often do not
share the locks of the operating system. A file that a dead process of this machine has left is taken over; whether a
process of another machine or container is alive cannot be asked from here, so that one is left to the user.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from filelock import SoftFileLock, Timeout

LOCK_FILE = "ropo.lock"

_PATIENCE_SECONDS = 0.5  # a file system that cannot exchange two files needs a second try to take over a dead lock


@contextmanager
def owning(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder until the block ends, however it ends.

    Of several processes of one launch the main one holds the lock, and all are refused together.

    Args:
        folder: Made when it is missing, and removed again if nothing is written to it.

    Raises:
        ValueError: If another run holds the folder, or it cannot be written to.
    """
    is_distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    rank = torch.distributed.get_rank() if is_distributed else int(os.environ.get("RANK", "0"))
    lock, made = SoftFileLock(folder / LOCK_FILE), [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        refusal = _take(lock, folder) if rank == 0 else None
        if is_distributed:
            refusal = broadcast_object_list([refusal])[0]
        if refusal is not None:
            raise ValueError(refusal)
        yield
    finally:
        lock.release()
        for path in made if rank == 0 else []:
            with suppress(OSError):  # something was written there
                path.rmdir()


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
        return "a process that has left no name"
    return f"process {pid} on {host.partition('?')[0]}"  # a container's name goes on with its process namespace
