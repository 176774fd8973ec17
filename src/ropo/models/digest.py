"""Which model a name means: the commit of a hub id, and a digest of what its files hold.

In: a folder or hub id, and how it is loaded. Out: options that name the commit; a digest.
"""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file, extract_commit_hash

from ropo.models.files import IN_OTHER_FILES, SETTINGS, TOKENIZER_SETTINGS
from ropo.provenance import hash_file, hash_value

_NAMED = (*SETTINGS, *TOKENIZER_SETTINGS, "merges.txt")
_WEIGHTS = (".safetensors", ".gguf", ".model", ".jinja", ".py")  # code, too, where it is trusted


def at_commit(name_or_path: str, load_options: Mapping[str, Any]) -> dict[str, Any]:
    """Options with the commit of a hub id in place of a branch, which may move while a run goes on.

    Args:
        name_or_path: Folder or hub id.
        load_options: As for the model.

    Returns:
        The options; as they were for a folder, and where the hub cannot be reached and its cache holds nothing.
    """
    options, file = dict(load_options), None
    if not Path(name_or_path).is_dir():
        with contextlib.suppress(OSError, ValueError):  # no such model, which is told when its configuration is read
            file = cached_file(name_or_path, "config.json", revision=options.get("revision"))
    commit = extract_commit_hash(file, None)
    return options if commit is None else {**options, "revision": commit}


def model_digest(name_or_path: str, load_options: Mapping[str, Any]) -> str:
    """Name a model by the bytes of its files: another training may have left files of the same names and sizes.

    A hub id is named by itself and its commit.

    Args:
        name_or_path: Folder or hub id.
        load_options: As for the model, see `at_commit`.

    Returns:
        64 hexadecimal digits.
    """
    which = [load_options.get(name) for name in IN_OTHER_FILES]
    folder = Path(name_or_path)
    if not folder.is_dir():
        return hash_value([name_or_path, load_options.get("revision"), *which])
    folders = dict.fromkeys((folder, folder / (load_options.get("subfolder") or "")))
    files = [path for one in folders for path in sorted(one.iterdir()) if _is_of_model(path)]
    return hash_value([*((path.name, hash_file(path)) for path in files), *filter(None, which)])


def _is_of_model(path: Path) -> bool:
    return path.name in _NAMED or path.suffix in _WEIGHTS
