"""Where the loggers of `report_to` write: a folder for each training, which outlives its checkpoints.

In: options, the folder of a training stage in `O/`. Out: a context in which TensorBoard and Weights & Biases write to
the same place under `O/logs/`, each training as a run of its own.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ropo.train.options import TrainOptions

_FOLDER = "logs"


@contextmanager
def tracked(args: TrainOptions, stage: Path) -> Iterator[None]:
    """Name the places of loggers for one training; also to be used as a decorator of it.

    What the user has set in the environment stays: TensorBoard gets a folder for each training in the one that
    `TENSORBOARD_LOGGING_DIR` names.

    Args:
        args: Options of the run.
        stage: Folder in the output folder that is named after the training.
    """
    if not args.report_to:
        yield
        return
    output = Path(str(args.output_dir))
    name = stage.relative_to(output) if stage.is_relative_to(output) else Path(stage.name)
    place = output / _FOLDER / name
    place.mkdir(parents=True, exist_ok=True)  # W&B takes only a folder that is there
    board = os.environ.get("TENSORBOARD_LOGGING_DIR")
    defaults = {
        "WANDB_DIR": str(place),
        "WANDB_NAME": f"{output.name}/{name.as_posix()}",
        "WANDB_RUN_GROUP": args.run_name or output.name,
    }
    ours = {name: value for name, value in defaults.items() if name not in os.environ}
    ours["TENSORBOARD_LOGGING_DIR"] = str(place if board is None else Path(board) / name)
    before = {name: os.environ.get(name) for name in ours}
    wandb = sys.modules.get("wandb")
    is_of_user = wandb is not None and getattr(wandb, "run", None) is not None
    os.environ.update(ours)
    try:
        yield
    finally:
        for variable, value in before.items():
            if value is None:
                os.environ.pop(variable, None)
            else:
                os.environ[variable] = value
        wandb = sys.modules.get("wandb")
        if not is_of_user and wandb is not None and getattr(wandb, "run", None) is not None:
            wandb.finish()  # or the next training would go on in this run, with its steps from the start
