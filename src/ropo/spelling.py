"""What may have been meant by a name that does not exist.

In: a name as it was written, and the names that exist. Out: a sentence to append to a refusal, or nothing.

Imports the standard library only: the command line answers a typing mistake before anything else is imported.
"""

from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

_MANY = 1000  # entries of a folder beyond which none is suggested


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A sentence that suggests the closest known names, or nothing.

    Returns:
        " Did you mean ...?" or an empty string.

    Examples:
        >>> did_you_mean("lowest_los", ["lowest_loss", "posterior"])
        ' Did you mean lowest_loss?'
    """
    close = get_close_matches(str(name), list(known), n=2)
    return f" Did you mean {' or '.join(close)}?" if close else ""


def is_misspelt_path(name: str) -> bool:
    """Whether a name of the form "folder/name", which may be a hub id, is close to what a local folder holds.

    A folder alone does not make it a path: people keep downloads in folders that are called like the owner on the hub.
    """
    parent = Path(name).expanduser().parent
    return parent != Path() and parent.is_dir() and bool(did_you_mean_path(Path(name)))


def did_you_mean_path(path: Path) -> str:
    """A sentence that suggests the closest neighbours of a path that does not exist, or says that its folder does not.

    Returns:
        " Did you mean ...?", " There is no folder ..." or an empty string.
    """
    parent = path.expanduser().parent
    if not parent.is_dir():
        return f" There is no folder {path.parent}."
    try:
        there = sorted(entry.name for entry in parent.iterdir())
    except OSError:
        return ""
    close = get_close_matches(path.name, there, n=2) if len(there) <= _MANY else []
    return f" Did you mean {' or '.join(str(path.parent / name) for name in close)}?" if close else ""
