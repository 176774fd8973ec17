"""`ropo train`: align a model on what is right.

In: words. Out: an exit code; what was trained on, and where the model is, on the standard output.
"""

from collections.abc import Sequence
from pathlib import Path

from accelerate import PartialState

from ropo.cli.arguments import check_sources, evaluation_of, model_of, pairs_of, parse_train, review_of
from ropo.cli.faults import DONE
from ropo.cli.outcome import say_plan, say_training
from ropo.cli.words import typed_as
from ropo.provenance import typed
from ropo.run.align import dry_run, run_rounds


def run(words: Sequence[str]) -> int:
    """Align a model.

    Args:
        words: What follows the command.

    Returns:
        Exit code.
    """
    given, args = parse_train(words)
    check_sources(given)
    if given.dry_run:
        say_plan(
            dry_run(model_of(given), pairs_of(given), args, eval_dataset=evaluation_of(given), review=review_of(given))
        )
        return DONE
    with typed(typed_as("train", words)):
        result = run_rounds(
            model_of(given), pairs_of(given), args, eval_dataset=evaluation_of(given), review=review_of(given)
        )
    if PartialState().is_main_process:
        say_training(result.summary, Path(str(args.output_dir)))
    return DONE
