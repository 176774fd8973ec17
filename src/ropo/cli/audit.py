"""`ropo audit`: how many labels are wrong, and which.

In: words. Out: an exit code; what was found, on the standard output.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

from accelerate import PartialState

from ropo.cli.arguments import check_sources, model_of, pairs_of, parse_train, review_of
from ropo.cli.faults import DONE
from ropo.cli.outcome import say_audit, say_plan
from ropo.cli.words import typed_as
from ropo.processes import ending_together
from ropo.provenance import typed
from ropo.run.align import dry_run, run_audit

logger = logging.getLogger(__name__)


def run(words: Sequence[str]) -> int:
    """Audit a dataset."""
    given, args = parse_train(words, command="audit")
    if given.eval_dataset_name is not None:
        logger.warning("An audit keeps no model, so eval_dataset_name does nothing here.")
    with ending_together(), typed(typed_as("audit", words)):
        check_sources(given)
        if given.dry_run:
            say_plan(dry_run(model_of(given), pairs_of(given), args, is_audit=True, review=review_of(given)))
            return DONE
        result = run_audit(model_of(given), pairs_of(given), args, review=review_of(given))
    if PartialState().is_main_process:
        say_audit(result.summary, Path(str(args.output_dir)))
    return DONE
