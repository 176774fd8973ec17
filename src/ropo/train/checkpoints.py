"""A checkpoint counts only when its marker is there, which is written last.

In: a folder in which `transformers.Trainer` has left checkpoints. Out: `complete.json` in each that is whole, which
lists its files; the newest of these.

`Trainer` takes the checkpoint with the highest number, removes the one with the oldest date before the new one is
known to be whole, and reads whatever files are there. Here a checkpoint with a file missing or of other bytes is no
checkpoint, and an older one goes only when the next one is complete.
"""

import logging
import re
import shutil
from pathlib import Path

from accelerate import PartialState

from ropo.processes import meet, on_main
from ropo.provenance import DamagedFileError, hash_file, read_json, remove, sync, write_aside, write_json

logger = logging.getLogger(__name__)

MARKER = "complete.json"
_OWNER_FILE = "made_from"  # beside the checkpoints: the digest of what they depend on
_NAME = re.compile(r"checkpoint-(\d+)")


def complete(checkpoint: Path) -> None:
    """Call a checkpoint complete: bring its files to the disk, then write the marker that lists them.

    Args:
        checkpoint: Its folder, into which every process has written its part.

    Raises:
        DiskFullError: If there is no room for the marker.
    """
    sync(checkpoint)
    write_json(checkpoint / MARKER, {"sha256": _hashes(checkpoint)})


def why_incomplete(checkpoint: Path) -> str | None:
    """What keeps a checkpoint from being resumed, as a clause; None where it is complete."""
    path = checkpoint / MARKER
    if not path.exists():
        return f"it has no {MARKER}, which is written last"
    try:
        listed: dict[str, str] = read_json(path)["sha256"]
    except (DamagedFileError, KeyError, TypeError):
        return f"its {MARKER} is damaged"
    found = _hashes(checkpoint)
    wrong = sorted(name for name, content in listed.items() if found.get(name) != content)
    return f"{wrong[0]} is missing, or holds other bytes than were written" if wrong else None


def newest_complete(folder: Path) -> Path | None:
    """The complete checkpoint of the highest step; those above it that are not complete are removed.

    Every process must call it; one of them looks.

    Args:
        folder: `output_dir` of a `Trainer`; it need not exist.
    """
    return on_main(lambda: _newest_complete(folder))


def _newest_complete(folder: Path) -> Path | None:
    for checkpoint in reversed(_by_step(folder)):
        reason = why_incomplete(checkpoint)
        if reason is None:
            return checkpoint
        logger.warning("%s cannot be resumed from, since %s; it is removed.", checkpoint, reason)
        remove(checkpoint)
    return None


def find_checkpoint(asked: str | Path | bool | None, folder: Path) -> Path | None:  # noqa: FBT001 - as `Trainer` takes it
    """The checkpoint that a `resume_from_checkpoint` means.

    Args:
        asked: A checkpoint; True for the newest in `folder`; nothing for none.
        folder: `output_dir` of a `Trainer`.

    Raises:
        ValueError: If that checkpoint is not complete, or there is none.
    """
    if not asked:
        return None
    if asked is not True:
        if reason := why_incomplete(Path(asked)):
            raise ValueError(f"resume_from_checkpoint needs a complete checkpoint; got {asked}, but {reason}.")
        return Path(asked)
    found = newest_complete(folder)
    if found is None:
        raise ValueError(
            f"resume_from_checkpoint needs a complete checkpoint; {folder} has none. Leave it out to start anew."
        )
    return found


def remove_others(folder: Path, *, made_from: str) -> None:
    """Remove the checkpoints of another training, and note whose those are that follow.

    Args:
        folder: `output_dir` of a `Trainer`; made when it is missing.
        made_from: Digest of everything that this training depends on.
    """
    path = folder / _OWNER_FILE
    if PartialState().is_main_process and not (path.exists() and path.read_text("utf-8") == made_from):
        for checkpoint in _by_step(folder):
            logger.warning("%s belongs to another training, with other pairs or options; it is removed.", checkpoint)
            remove(checkpoint)
        with write_aside(path) as aside:
            aside.write_text(made_from, encoding="utf-8")
    meet()


def remove_incomplete(folder: Path) -> None:
    """Remove every checkpoint without a marker: what a full disk has left."""
    for checkpoint in _by_step(folder):
        if not (checkpoint / MARKER).exists():
            shutil.rmtree(checkpoint, ignore_errors=True)


def remove_older(checkpoint: Path, *, limit: int | None, best: str | None = None) -> None:
    """Keep so many checkpoints at most, by their steps; the clock does not count.

    Args:
        checkpoint: The one just completed.
        limit: How many stay, with this one; None for all.
        best: One that stays in any case.
    """
    if limit is None or limit < 1:
        return
    older = [one for one in _by_step(checkpoint.parent) if _step(one) < _step(checkpoint)]
    kept = max(limit - 1, 0)
    for one in older[: len(older) - kept]:
        if best is None or one.name != Path(best).name:
            shutil.rmtree(one, ignore_errors=True)


def _by_step(folder: Path) -> list[Path]:
    return sorted((one for one in folder.glob("checkpoint-*") if _NAME.fullmatch(one.name)), key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.partition("-")[2])


def _hashes(checkpoint: Path) -> dict[str, str]:
    files = (path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path.name != MARKER)
    return {path.relative_to(checkpoint).as_posix(): hash_file(path) for path in files}
