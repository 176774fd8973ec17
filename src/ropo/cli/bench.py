"""`ropo bench`: compare methods on noise whose truth is known.

In: words. Out: an exit code; where rows, tables and figures are, on the standard output.
"""

import time
from collections.abc import Sequence
from pathlib import Path

from ropo.cli.faults import DONE
from ropo.cli.parser import SentenceParser
from ropo.options import Rule, check_folder
from ropo_bench.grid import run_bench
from ropo_bench.grid_config import read_bench_config
from ropo_bench.publish import publish_bench

_USAGE = "Usage: ropo bench --config grid.yaml --output_dir O"


def parser() -> SentenceParser:
    """The options of the command."""
    found = SentenceParser("bench")
    found.add("config", type=Path, help="YAML file of the grid, like benchmarks/quick.yaml.")
    found.add("output_dir", type=Path, help="Folder of rows, tables and figures; rows that are there are kept.")
    help_ = "Trainings at a time. Default: one per GPU or core."
    found.add("num_processes", type=int, rule=Rule(low=1), help=help_)
    return found


def run(words: Sequence[str]) -> int:
    """Measure every cell of the grid that has no row."""
    given = parser().read(words)
    for name in ("config", "output_dir"):
        if getattr(given, name) is None:
            raise ValueError(f"--{name} is missing. {_USAGE}")
    config = read_bench_config(given.config)
    check_folder("output_dir", given.output_dir)
    start = time.monotonic()
    run_bench(
        config,
        given.output_dir,
        num_processes=given.num_processes,
        on_row=lambda what, number, total: print(f"[{number}/{total}] {what}", flush=True),
    )
    tables, *pictures = publish_bench(given.output_dir)
    print(
        f"Measured in {time.monotonic() - start:.0f} s.\nRows:     {given.output_dir / 'results.csv'}\n"
        f"Pictures: {', '.join(path.name for path in pictures)}\nTables:   {tables}   <- look here next"
    )
    return DONE
