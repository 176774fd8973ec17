"""`ropo audit`: how many labels are wrong, and which.

In: words. Out: an exit code; what was found, on the standard output.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

from accelerate import PartialState

from ropo.cli.arguments import check_sources, dataset_of, inputs_of, parse_train
from ropo.cli.faults import DONE
from ropo.cli.outcome import say_audit
from ropo.run.align import run_audit

logger = logging.getLogger(__name__)


def run(words: Sequence[str]) -> int:
    """Audit a dataset.

    Args:
        words: What follows the command.

    Returns:
        Exit code.
    """
    given, args = parse_train(words, command="audit")
    if given.eval_dataset_name is not None:
        logger.warning("An audit keeps no model, so eval_dataset_name does nothing here.")
    check_sources(given)
    summary = run_audit(
        str(given.model_name_or_path),
        dataset_of(given, given.dataset_name),
        args,
        **inputs_of(given, words, command="audit"),
    )
    if PartialState().is_main_process:
        say_audit(summary, Path(str(args.output_dir)))
    return DONE
