"""Where the log goes while a command runs.

In: nothing. Out: the log of the main process on the standard output, that of the others only where it is an error.
"""

import logging
import os
import sys

from rich.logging import RichHandler
from transformers.utils import logging as transformers_logging


class _Lines(logging.Handler):
    """One line of the file for each entry, whatever its length; a terminal would wrap it."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), flush=True)


def log_to_console() -> None:
    """Write the log to the standard output, and no progress bars of libraries."""
    is_terminal = sys.stdout.isatty()
    form = "%(message)s" if is_terminal else "[%(asctime)s] %(levelname)-7s %(message)s"
    logging.basicConfig(
        level=logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR,
        format=form,
        datefmt="%Y-%m-%d %H:%M:%S",
        handlers=[RichHandler(show_path=False, markup=False) if is_terminal else _Lines()],
        force=True,
    )
    logging.getLogger("httpx").setLevel(logging.WARNING)
    # It warns of a kernel that no run takes (`models.quantized`), and of casts in every product.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
