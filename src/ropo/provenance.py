"""What makes a run repeatable: content hashes, a snapshot of the environment, files that are whole or absent.

In: plain values, files, the tensors of a model. Out: hexadecimal digests and files on disk.
"""

import hashlib
import json
import os
import platform
import shutil
import subprocess
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PACKAGES = ("ropo", "torch", "transformers", "accelerate", "datasets", "peft", "numpy", "scipy", "pyarrow")


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


def hash_file(path: Path) -> str:
    """Digest of a file's bytes, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Digest of named tensors: names, types, shapes and every bit of the values.

    Args:
        tensors: A state dict. Order does not matter, nor does the device.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextmanager
def write_aside(path: Path) -> Iterator[Path]:
    """Give a temporary path to write to, and put it in the place of `path` only when the block succeeds.

    A reader, or a run that is killed, sees the old file, the new file, or none; never half a file.
    Works for a folder as well: an existing folder at `path` is replaced.

    Args:
        path: Where the result is to stand.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        yield aside
        if aside.is_dir() and path.exists():
            shutil.rmtree(path)
        aside.replace(path)
    finally:
        if aside.is_dir():
            shutil.rmtree(aside)
        else:
            aside.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as readable JSON, whole or not at all."""
    with write_aside(path) as aside:
        aside.write_text(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read what `write_json` wrote."""
    return json.loads(path.read_text(encoding="utf-8"))


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


def machine() -> dict[str, str]:
    """What a speed figure depends on: processor, cores, threads, accelerator. No host name, no user name."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "platform": f"{platform.system()} {platform.machine()}",
        "cores": str(os.cpu_count()),
        "torch_threads": str(torch.get_num_threads()),
        "device": device,
    }
