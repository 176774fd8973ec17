"""`ropo win_rate`: how often a judge prefers one model's outputs to another's.

In: words. Out: an exit code; the rate with its interval, on the standard output.
"""

from collections.abc import Sequence
from pathlib import Path

from accelerate import PartialState

from ropo.cli.arguments import parse_options
from ropo.cli.faults import DONE, NOT_ACCEPTABLE
from ropo.cli.outcome import say_win_rate
from ropo.evaluate.options import WinRateArguments
from ropo.evaluate.win_rate import run_win_rate
from ropo.run.lock import owning


def run(words: Sequence[str]) -> int:
    """Compare the outputs.

    Returns:
        Exit code; that of a result that is not acceptable if the judge has preferred no output.
    """
    given = parse_options(WinRateArguments, words, command="win_rate")
    folder = Path(str(given.output_dir))
    with owning(folder):
        found = run_win_rate(given)
    if not PartialState().is_main_process:
        return DONE
    say_win_rate(found, folder)
    return DONE if found.rate else NOT_ACCEPTABLE
