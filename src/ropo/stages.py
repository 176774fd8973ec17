"""A stage is done once: what it wrote is used again as long as what it was made from is the same.

In: the name of a stage, the values it depends on, the files it writes, and a function that writes them. Out: those
files, and `manifest.json` in the same folder, which says what made them and how long it took.
"""

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from accelerate import PartialState

import ropo
from ropo.provenance import hash_value, read_json, write_json

logger = logging.getLogger(__name__)


class Stages:
    """The stages of one folder.

    Args:
        folder: Where the stages write; made when it is missing.
    """

    _made_here: ClassVar[set[tuple[Path, str, str]]] = set()  # by this process, which need not be told so

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._path = folder / "manifest.json"
        self._manifest: dict[str, Any] = read_json(self._path) if self._path.exists() else {}

    def run(self, name: str, inputs: Any, files: Sequence[str], make: Callable[[], None]) -> str:
        """Run `make` unless its files are there and were made from the same inputs.

        With several processes all call `make`; it must let only the main one write. A stage that is run again makes
        every later stage run again, since their inputs hold this stage's digest.

        Args:
            name: What the stage is called in the manifest.
            inputs: JSON-able value of everything that changes what the stage writes.
            files: Names of what it writes, relative to the folder; folders are allowed.
            make: Writes them.

        Returns:
            Digest of the inputs: give it to the stages that read these files.
        """
        state = PartialState()
        digest = hash_value({"stage": name, "inputs": inputs, "version": ropo.__version__})
        known = self._manifest.get(name, {})
        if known.get("inputs") == digest and all((self.folder / file).exists() for file in files):
            if (self.folder, name, digest) not in self._made_here:
                logger.info("%s/%s: done before, read from disk.", self.folder.name, name)
            return digest
        logger.info("%s/%s: begins.", self.folder.name, name)
        start = time.monotonic()
        try:
            make()
        except KeyboardInterrupt as error:
            error.add_note(f"{self.folder.name}/{name}")  # where the next call resumes
            raise
        state.wait_for_everyone()
        seconds = round(time.monotonic() - start, 2)
        self._manifest[name] = {"inputs": digest, "files": list(files), "seconds": seconds}
        self._made_here.add((self.folder, name, digest))
        if state.is_main_process:
            write_json(self._path, self._manifest)
        state.wait_for_everyone()
        return digest

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds that each stage took when it was run."""
        return {name: entry["seconds"] for name, entry in self._manifest.items()}
