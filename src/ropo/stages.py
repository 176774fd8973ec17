"""A stage is done once: what it wrote is used again as long as what it was made from is the same.

In: the name of a stage, the values it depends on, the files it writes, and a function that writes them. Out: those
files, and `manifest.json` in the same folder, which says what made them, what they hold and how long it took.

Every file is hashed whole, a model's weights, too, when it is written and when a run finds it there: 1.4 GB/s on one
core, less time than loading the model takes. So whatever reads a file of an earlier stage reads what was written.
"""

import logging
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from accelerate import PartialState

import ropo
from ropo.processes import meet, on_main
from ropo.provenance import DamagedFileError, hash_file, hash_value, read_json, write_json

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Made:
    """What the manifest says of a stage that is done.

    Attributes:
        inputs: Digest of what it was made from.
        files: SHA-256 of every file by its name relative to the folder, those in folders, too.
        seconds: How long it took.
        versions: How often it was made again with another result from the same inputs.
    """

    inputs: str
    files: dict[str, str]
    seconds: float
    versions: int = 0

    @property
    def digest(self) -> str:
        return self.inputs if not self.versions else hash_value([self.inputs, self.versions])


class Stages:
    """The stages of one folder."""

    _made_here: ClassVar[set[tuple[Path, str, str]]] = set()  # by this process, which does not log them again

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._path = folder / "manifest.json"
        self._manifest = _read(self._path)

    def run(
        self, name: str, inputs: Any, files: Sequence[str], make: Callable[[], None], *, scratch: str | None = None
    ) -> str:
        """Run `make` unless its files are there, hold what was written, and were made from the same inputs.

        With several processes all call `make`; it must let only the main one write. A stage that is run again makes
        every later stage run again, since their inputs hold this stage's digest; after a damaged file that is so only
        if another content came of it.

        Args:
            name: What the stage is called in the manifest.
            inputs: JSON-able value of everything that changes what the stage writes.
            files: Names of what it writes, relative to the folder; folders are allowed.
            make: Writes them.
            scratch: A folder in the folder from which `make` resumes; removed when the stage is done.

        Returns:
            Digest of the inputs: give it to the stages that read these files.
        """
        digest = hash_value({"stage": name, "inputs": inputs, "version": ropo.__version__})
        before = self._manifest.get(name)
        before = before if before is not None and before.inputs == digest else None
        damage = None if before is None else self._damage(before, files)
        if damage:
            logger.warning("%s. %s/%s is made again.", damage, self.folder.name, name)
        elif before is not None:
            if (self.folder, name, digest) not in self._made_here:
                logger.info("%s/%s: already done, read from disk.", self.folder.name, name)
            self._remove(scratch)
            return before.digest
        logger.info("%s/%s: started.", self.folder.name, name)
        start = time.monotonic()
        try:
            make()
        except KeyboardInterrupt as error:
            error.add_note(f"{self.folder.name}/{name}")  # where the next call resumes
            raise
        meet()
        seconds = round(time.monotonic() - start, 2)
        found = on_main(lambda: _hashes(self.folder, files))
        versions = 0 if before is None else before.versions + (found != before.files)
        made = self._manifest[name] = _Made(inputs=digest, files=found, seconds=seconds, versions=versions)
        self._made_here.add((self.folder, name, digest))
        if PartialState().is_main_process:
            write_json(self._path, {known: asdict(one) for known, one in self._manifest.items()})
        meet()
        self._remove(scratch)
        return made.digest

    def _remove(self, scratch: str | None) -> None:
        """Remove what `make` resumes from; only when the manifest says that the stage is done."""
        if scratch is not None and PartialState().is_main_process:
            shutil.rmtree(self.folder / scratch, ignore_errors=True)

    def check(self, name: str, files: Sequence[str]) -> None:
        """Refuse to read what a finished stage of this folder wrote if it is not there any more.

        Args:
            name: The stage; one that is not finished is not checked.
            files: Names of what is to be read.

        Raises:
            DamagedFileError: If a file is missing or holds other bytes.
        """
        if name in self._manifest and (damage := self._damage(self._manifest[name], files)):
            raise DamagedFileError(f"{damage}. Run the command that made {self.folder} again: it is made anew.")

    def holds(self, name: str, files: Sequence[str]) -> bool:
        """Whether these files of a finished stage are there and hold what it wrote."""
        return name in self._manifest and self._damage(self._manifest[name], files) is None

    def _damage(self, made: _Made, files: Sequence[str]) -> str | None:
        """The first of these files that does not hold what the stage wrote, in words; None where all do."""
        found = on_main(lambda: _hashes(self.folder, files))
        written = {file: content for file, content in made.files.items() if _is_of(file, files)}
        absent = [name for name in files if not any(_is_of(file, [name]) for file in written)]
        for file in [*absent, *sorted(written)]:
            if file not in found:
                return f"{self.folder / file} is missing"
            if found[file] != written.get(file):
                return f"{self.folder / file} is damaged: it holds other bytes than were written"
        return None

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds that each stage took when it was run."""
        return {name: made.seconds for name, made in self._manifest.items()}


def _is_of(file: str, names: Sequence[str]) -> bool:
    """Whether it is one of these files, or in one of these folders."""
    return any(file == name or file.startswith(f"{name}/") for name in names)


def _hashes(folder: Path, files: Sequence[str]) -> dict[str, str]:
    """Hash of each file that is there."""
    paths = [path for name in files for path in (folder / name, *sorted((folder / name).rglob("*")))]
    return {path.relative_to(folder).as_posix(): hash_file(path) for path in paths if path.is_file()}


def _read(path: Path) -> dict[str, _Made]:
    """The manifest; one that is damaged says nothing, so its stages are made again."""
    if not path.exists():
        return {}
    try:
        return {name: _Made(**made) for name, made in read_json(path).items()}
    except (DamagedFileError, AttributeError, TypeError):
        logger.warning("%s is damaged: the stages of %s are made again.", path, path.parent)
        return {}
