"""What makes a run repeatable: content hashes, a snapshot of the environment, files that are whole or absent.

In: plain values, files, the tensors of a model. Out: hexadecimal digests and files on disk.
"""

import errno
import hashlib
import json
import logging
import os
import platform
import re
import shutil
import subprocess
import time
import uuid
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

PACKAGES = ("ropo", "torch", "transformers", "accelerate", "datasets", "peft", "numpy", "scipy", "pyarrow")
os.umask(_UMASK := os.umask(0o077))  # there is no other way to ask for it
_NO_FILES = (
    ("a folder", Path.is_dir),
    ("a pipe (FIFO)", Path.is_fifo),
    ("a socket", Path.is_socket),
    ("a device", Path.is_char_device),
    ("a device", Path.is_block_device),
)


Json = dict[str, Any]
"""An object as `json` reads and writes it; everything else that parts hand to each other is a dataclass."""


def hash_value(value: Any) -> str:
    """Digest of a JSON-able value; key order does not matter.

    Args:
        value: Strings, numbers, lists and dicts. Other objects count by their `str`.

    Returns:
        64 hexadecimal digits.

    Examples:
        >>> hash_value({"a": 1, "b": 2}) == hash_value({"b": 2, "a": 1})
        True
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def file_kind(path: Path) -> str:
    """What stands at a path that is no regular file, for a sentence: "not there", "a folder", "a pipe (FIFO)", ..."""
    return next((name for name, is_it in _NO_FILES if is_it(path)), "not there")


def hash_file(path: Path) -> str:
    """Digest of a file's bytes, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Digest of named tensors: names, types, shapes and every bit of the values."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class RunError(RuntimeError):
    """A run cannot continue, for a reason outside its own code, which the message tells."""


class DiskFullError(RunError):
    """A file could not be written whole, since there is no room for it."""


class DamagedFileError(ValueError):
    """A file that we have written is not what was written there."""


@contextmanager
def saying_if_full(path: Path) -> Iterator[None]:
    """Where the disk is full, say so in a sentence, whichever library was writing.

    Args:
        path: The file or folder that is being written, for the message.

    Raises:
        DiskFullError: If what is raised within says that there is no room. Other errors pass.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, DiskFullError) or not _says_full(error):
            raise
        free = shutil.disk_usage(next(here for here in (path, *path.parents) if here.exists())).free
        raise DiskFullError(
            f"{path} needs more room than the disk or a quota leaves ({free / 2**20:,.0f} MiB are free). Make room, "
            "then run the same command again: it continues from what is complete."
        ) from error


# What C++ and Rust leave of the error's number. `torch.save` says only that less was written than it had asked for.
_FULL = re.compile(
    r"os error (27|28|122)\b|No space left on device|File too large|Disk quota exceeded"
    r"|PytorchStreamWriter failed writing|iostream error|inline_container\.cc.*unexpected pos",
    re.DOTALL,
)


def _says_full(error: Exception) -> bool:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
    return _FULL.search(str(error)) is not None


@contextmanager
def write_aside(path: Path) -> Iterator[Path]:
    """Give a temporary path to write to, and put it in the place of `path` only when the block succeeds.

    A reader, a run that is killed, or a machine that loses power sees the old file, the new file, or none; never half
    a file. Works for a folder as well: an existing folder at `path` is replaced.

    Args:
        path: Where the result is to stand.

    Raises:
        DiskFullError: If there is no room for it; nothing is left of it then.
    """
    aside = _aside(path)
    try:
        with saying_if_full(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield aside
            put_in_place(aside, path)
    finally:
        remove(aside)


def put_in_place(aside: Path, path: Path) -> None:
    """Rename a finished file or folder to `path`, after its content has reached the disk.

    Who may read it is what the umask says, as of any file that a command writes: safetensors would have its own read
    by the user alone.
    """
    for file in (aside, *aside.rglob("*")):
        if file.is_file():
            with suppress(OSError):  # some mounts know no modes
                file.chmod(0o666 & ~_UMASK)
    sync(aside)
    if path.is_dir():
        old = _aside(path)
        path.rename(old)
        aside.rename(path)
        remove(old)
    else:
        aside.replace(path)
    sync_entry(path.parent)


def remove(path: Path) -> None:
    """Remove a file, a folder, or a link to either, of which what it leads to stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")


def sync(path: Path) -> None:
    """Have a file, or every file in a folder, reach the disk before anything says that it is there."""
    for here, _, names in os.walk(path):
        for name in names:
            sync_entry(Path(here) / name)
        sync_entry(Path(here))
    if not path.is_dir():
        sync_entry(path)


def sync_entry(path: Path) -> None:
    """Have one file, or the names in one folder, reach the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems cannot, for a folder
            raise
    finally:
        os.close(descriptor)


_SECONDS_OF_A_DAY = 86_400.0
# Of `write_aside`, of a model that several processes write, and of safetensors, which writes aside as well.
_LEFTOVER = re.compile(r"\..+\.(?:[0-9a-f]{8}|partial)|\.tmp[A-Za-z0-9]{6}")


def is_leftover(path: Path) -> bool:
    """Whether it is a temporary file or folder that a killed run has left."""
    return _LEFTOVER.fullmatch(path.name) is not None


def remove_leftovers(folder: Path, *, lock_file: str, caches: Collection[Path] = ()) -> None:
    """Remove what killed runs have left under a folder, which must be ours alone.

    Args:
        folder: Searched in all its depth, but for folders of other runs; it need not exist.
        lock_file: Name of the file by which another run holds a folder in it.
        caches: Folders to which other runs may be writing; in them, only what is a day old is removed.
    """
    in_caches: set[Path] = {path.absolute() for path in caches}
    for here, folders, files in os.walk(folder):
        is_shared = Path(here).absolute() in in_caches
        for name in [*folders, *files]:
            path = Path(here) / name
            if is_leftover(path) and not (is_shared and time.time() - path.lstat().st_mtime < _SECONDS_OF_A_DAY):
                logger.info("%s is left of a run that was killed; it is removed.", path)
                remove(path)
        inside = {name: Path(here) / name for name in folders}
        folders[:] = [name for name, path in inside.items() if path.exists() and not (path / lock_file).exists()]
        if is_shared:
            in_caches |= {inside[name].absolute() for name in folders}


def write_json(path: Path, value: Any) -> None:
    """Write `value` as readable JSON, whole or not at all."""
    with write_aside(path) as aside:
        aside.write_text(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")


def read_json(path: Path, *, remedy: str = "Delete it and run the same command again: it is made anew.") -> Any:
    """Read what `write_json` wrote.

    Args:
        path: The file.
        remedy: What to do where it is damaged, for the message.

    Raises:
        DamagedFileError: If it is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DamagedFileError(f"{path} is damaged and cannot be read as JSON ({error}). {remedy}") from error


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that numbers depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # a package that is only on the path has no metadata
            continue
    return found


def commit() -> str:
    """Commit of the code that runs, with a plus if files differ from it; empty outside a checkout."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True, check=False)
        return done.stdout.strip()

    found = git("rev-parse", "--short=10", "HEAD")
    return found + ("+" if found and git("status", "--porcelain", "--", str(here)) else "")


_COMMAND: ContextVar[str] = ContextVar("command", default="")


@contextmanager
def typed(command: str) -> Iterator[None]:
    """Within, `command()` is what the user typed."""
    token = _COMMAND.set(command)
    try:
        yield
    finally:
        _COMMAND.reset(token)


def command() -> str:
    """What the user typed; empty where Python was called."""
    return _COMMAND.get()


def machine() -> dict[str, str]:
    """What a speed figure depends on: processor, cores, threads, accelerator. No host name, no user name."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "platform": f"{platform.system()} {platform.machine()}",
        "cores": str(os.cpu_count()),
        "torch_threads": str(torch.get_num_threads()),
        "device": device,
    }
