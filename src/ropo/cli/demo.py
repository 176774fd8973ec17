"""`ropo demo`: DPO and ROPO on labels of which a known share is flipped.

In: words. Out: an exit code; a table, on the standard output.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from ropo.cli.faults import DONE
from ropo.cli.parser import SentenceParser
from ropo.options import check_folder
from ropo.run.lock import owning
from ropo_bench.demo import run_demo

_WIDTH = 120  # of a table in a file


def parser() -> SentenceParser:
    """The options of the command."""
    found = SentenceParser("demo")
    found.add("output_dir", type=Path, default=Path("outputs/demo"), help="Folder that everything is written to.")
    found.add("num_pairs", type=int, default=4000, help="Training pairs, 10 or more.")
    found.add("flip_rate", type=float, default=0.3, help="Share of labels to flip, in [0, 0.5).")
    found.add("seed", type=int, default=0, help="Random seed.")
    return found


def run(words: Sequence[str]) -> int:
    """Run the demo."""
    given = parser().read(words)
    if not 0 <= given.flip_rate < 0.5:
        raise ValueError(f"flip_rate needs a number in [0, 0.5); got {given.flip_rate}.")
    for name, lowest, highest in (("num_pairs", 10, 10**6), ("seed", 0, 2**31)):  # ten pairs make five folds
        if not lowest <= getattr(given, name) <= highest:
            raise ValueError(f"{name} needs a number from {lowest} to {highest}; got {getattr(given, name)}.")
    check_folder("output_dir", given.output_dir)
    folder, flip_rate, num_pairs, seed = given.output_dir, given.flip_rate, given.num_pairs, given.seed
    with owning(folder):
        run_demo(
            folder,
            flip_rate=flip_rate,
            num_pairs=num_pairs,
            seed=seed,
            console=Console(width=None if sys.stdout.isatty() else _WIDTH),
        )
    return DONE
