"""`ropo train`: align a model on what is right.

In: words. Out: an exit code; what was trained on, and where the model is, on the standard output.
"""

from collections.abc import Sequence
from pathlib import Path

from accelerate import PartialState

from ropo.cli.arguments import check_sources, dataset_of, inputs_of, parse_train
from ropo.cli.faults import DONE
from ropo.cli.outcome import say_training
from ropo.run.align import run_rounds


def run(words: Sequence[str]) -> int:
    """Align a model.

    Args:
        words: What follows the command.

    Returns:
        Exit code.
    """
    given, args = parse_train(words)
    check_sources(given)
    summary = run_rounds(
        str(given.model_name_or_path),
        dataset_of(given, given.dataset_name),
        args,
        eval_dataset=dataset_of(given, given.eval_dataset_name),
        eval_split=given.eval_dataset_split,
        **inputs_of(given, words, command="train"),
    )
    if PartialState().is_main_process:
        say_training(summary, Path(str(args.output_dir)))
    return DONE
