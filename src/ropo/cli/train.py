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
from ropo.processes import ending_together
from ropo.provenance import typed
from ropo.run.align import dry_run, run_rounds
from ropo.run.outputs import publish_merged


def run(words: Sequence[str]) -> int:
    """Align a model."""
    given, args = parse_train(words)
    with ending_together(), typed(typed_as("train", words)):
        check_sources(given)
        model = model_of(given)
        if given.merge_adapter and model.peft_config is None:
            raise ValueError("merge_adapter needs an adapter; got the training of a whole model. Add --use_peft.")
        data, held_out, review = pairs_of(given), evaluation_of(given), review_of(given)
        if given.dry_run:
            say_plan(dry_run(model, data, args, eval_dataset=held_out, review=review))
            return DONE
        result = run_rounds(model, data, args, eval_dataset=held_out, review=review)
        if given.merge_adapter:
            publish_merged(model, Path(str(args.output_dir)))
    if PartialState().is_main_process:
        say_training(result.summary, Path(str(args.output_dir)))
    return DONE
