"""`ropo losses`: the losses, their formulas, papers and options.

In: nothing. Out: a table on the standard output.
"""

from collections.abc import Sequence

from ropo.cli.faults import DONE
from ropo.cli.parser import SentenceParser
from ropo.losses import methods_table


def parser() -> SentenceParser:
    """The options of the command: none."""
    return SentenceParser("losses")


def run(words: Sequence[str]) -> int:
    """Print the table."""
    parser().read(words)
    print(methods_table())
    return DONE
