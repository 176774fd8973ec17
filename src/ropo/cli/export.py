"""`ropo export`: a model's answers to the questions of a benchmark, in its own format.

In: words. Out: an exit code; where the answers are, on the standard output.
"""

from collections.abc import Sequence
from pathlib import Path

from accelerate import PartialState

from ropo.cli.arguments import parse_options
from ropo.cli.faults import DONE
from ropo.cli.outcome import say_export
from ropo.evaluate.answers import export_answers
from ropo.evaluate.options import ExportArguments
from ropo.run.lock import owning


def run(words: Sequence[str]) -> int:
    """Answer the questions."""
    given = parse_options(ExportArguments, words, command="export")
    with owning(Path(str(given.output_dir)) / "export" / str(given.name)):  # other models may answer beside it
        found = export_answers(given)
    if PartialState().is_main_process:
        say_export(found, given)
    return DONE
