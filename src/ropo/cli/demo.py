"""`ropo demo`: DPO and ROPO on labels of which a known share is flipped.

In: words. Out: an exit code; a table, on the standard output.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from ropo.cli.faults import DONE
from ropo.cli.parser import SentenceParser
from ropo.options import Rule, check_folder
from ropo.run.lock import owning
from ropo_bench.demo import run_demo

_WIDTH = 120  # of a table in a file


def parser() -> SentenceParser:
    """The options of the command."""
    found = SentenceParser("demo")
    found.add("output_dir", type=Path, default=Path("outputs/demo"), help="Folder that everything is written to.")
    fewest = Rule(low=10, high=10**6)  # ten pairs make five folds
    found.add("num_pairs", type=int, default=4000, rule=fewest, help="Training pairs, 10 or more.")
    rate = Rule(low=0, below=0.5)
    found.add("flip_rate", type=float, default=0.3, rule=rate, help="Share of labels to flip, in [0, 0.5).")
    found.add("seed", type=int, default=0, rule=Rule(low=0, high=2**31), help="Random seed.")
    return found


def run(words: Sequence[str]) -> int:
    """Run the demo."""
    given = parser().read(words)
    check_folder("output_dir", given.output_dir)
    console = Console(width=None if sys.stdout.isatty() else _WIDTH)
    with owning(given.output_dir):
        run_demo(
            given.output_dir,
            flip_rate=given.flip_rate,
            num_pairs=given.num_pairs,
            seed=given.seed,
            console=console,
        )
    return DONE
