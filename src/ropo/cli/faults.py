"""How a command that failed ends: an exit code and one sentence.

In: an exception. Out: the code and the sentence; the traceback of what nobody has foreseen in a file.

Imports the standard library only: nothing else may be there yet, or the import itself has failed.
"""

import os
import sys
import tempfile
import traceback
from collections.abc import Sequence
from typing import Any

from ropo import __version__
from ropo.cli.words import secrets_in, typed_as

DONE, NOT_ACCEPTABLE, MISUSE, OUR_FAULT = 0, 1, 2, 70

# Exceptions by the module that defines them: where that was never imported, none can have been raised.
_OF_DATA = (
    ("ropo.data.validate", "DataError"),
    ("ropo.endpoint.client", "EndpointError"),
)
_OF_RUN = (("ropo.provenance", "RunError"), ("torch", "OutOfMemoryError"))


def explain(error: Exception, words: Sequence[str]) -> tuple[int, str]:
    """Exit code and sentence of a command that failed.

    Raises:
        Exception: `error` itself, with ROPO_DEBUG=1 unless it is about the data or an endpoint.
    """
    if isinstance(error, _known(_OF_DATA)):
        return NOT_ACCEPTABLE, f"ropo {words[0]}: {error}"
    if os.environ.get("ROPO_DEBUG"):
        raise error
    if isinstance(error, (*_known(_OF_RUN), FloatingPointError, MemoryError)):
        return NOT_ACCEPTABLE, f"ropo {words[0]}: {str(error) or 'the memory of this machine is not enough.'}"
    if isinstance(error, ValueError | OSError | ImportError):  # an option may need a package that is not there
        hint = "" if _is_ours(error) else "\n(ROPO_DEBUG=1 shows where in the code this was found.)"
        return MISUSE, f"ropo {words[0]}: {error}{hint}"
    return OUR_FAULT, _say_fault(error, words)


def _is_ours(error: Exception) -> bool:
    """Whether our own code has raised it, with a sentence that says what to do; a library's may need a traceback."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__", "")).startswith("ropo")


def if_imported(module: str, name: str) -> Any:
    """What a module calls so, or None if nobody has imported it; this does not."""
    return getattr(sys.modules.get(module), name, None)


def _known(homes: Sequence[tuple[str, str]]) -> tuple[type[Exception], ...]:
    return tuple(kind for module, name in homes if (kind := if_imported(module, name)) is not None)


def _say_fault(error: Exception, words: Sequence[str]) -> str:
    """One sentence on what nobody has foreseen; where it came from is kept in a file, without tokens."""
    head, *rest = f"{type(error).__name__}: {error}".splitlines()
    lines = "".join(traceback.format_exception(error))
    report = f"ropo {__version__}: {typed_as(words[0], words[1:])}\n\n{lines}"
    for secret in secrets_in(words):
        head, report = head.replace(secret, "..."), report.replace(secret, "...")
    with tempfile.NamedTemporaryFile(
        "w", prefix=f"ropo-{words[0]}-", suffix=".txt", delete=False, encoding="utf-8", errors="backslashreplace"
    ) as file:
        file.write(report)
    return (
        f"ropo {words[0]} stopped by a fault of its own ({head[:300]}{' ...' if rest or head[300:] else ''}). Please "
        f"report it with {file.name}, which holds the traceback; ROPO_DEBUG=1 shows it at once."
    )
