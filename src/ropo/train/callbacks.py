"""What happens beside the steps of a training: scores on the way, what a checkpoint holds, where an epoch is resumed.

In: functions of the trainer. Out: callbacks and a sampler for `transformers.Trainer`.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import Sampler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import IntervalStrategy

from ropo.processes import meet
from ropo.progress import Progress
from ropo.train.checkpoints import complete, remove_older

_STATE_FILE = "ropo_state.safetensors"


class ShowProgress(TrainerCallback):
    """The steps of a training with the newest numbers of its log beside them, in place of what `Trainer` prints.

    Args:
        is_line: False for lines of the log even on a terminal.
    """

    def __init__(self, *, is_line: bool) -> None:
        self.is_line = is_line
        self.title = "Training"
        self._progress: Progress | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:  # noqa: ARG002
        """Begin where the training begins, or resumes."""
        is_shown = state.is_world_process_zero
        self._progress = Progress(self.title, state.max_steps, unit=" steps", is_shown=is_shown, is_line=self.is_line)
        self._progress.__enter__()
        self._progress.skip(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:  # noqa: ARG002
        """Count the step."""
        if self._progress is not None:
            self._progress.advance()

    def on_log(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,  # noqa: ARG002
        control: TrainerControl,  # noqa: ARG002
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Show loss, margin and accuracy."""
        shown = {"loss": "loss", "rewards/margins": "margin", "rewards/accuracies": "accuracy"}
        found = [f"{name} {logs[key]:.3f}" for key, name in shown.items() if logs and key in logs]
        if self._progress is not None and found:
            self._progress.advance(0, ", ".join(found))

    def close(self) -> None:
        """Show nothing any more, whether the training has ended or failed."""
        if self._progress is not None:
            self._progress.__exit__(None, None, None)
            self._progress = None


class AfterStep(TrainerCallback):
    """Calls a function after every optimizer step.

    Args:
        call: What to call.
    """

    def __init__(self, call: Callable[[], None]) -> None:
        self.call = call

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:  # noqa: ARG002
        """Call it."""
        self.call()


class CompleteCheckpoint(TrainerCallback):
    """Adds to every checkpoint what a trainer learns beside the weights, and then calls it complete.

    `Trainer` calls it when everything else is written. A checkpoint of the model alone cannot be resumed from, so it is
    never called complete.

    Args:
        collect: Gives the tensors to save; called on every process, of which one writes.
        limit: Checkpoints that are kept; None for all.
    """

    def __init__(self, collect: Callable[[], dict[str, Tensor]], *, limit: int | None) -> None:
        self.collect, self.limit = collect, limit

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:  # noqa: ARG002
        """Log with every checkpoint: sums that a log is made of begin anew where a training is resumed."""
        control.should_log |= control.should_save and args.logging_strategy != IntervalStrategy.NO

    on_epoch_end = on_step_end

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:  # noqa: ARG002
        """Write them into the checkpoint's folder, then its marker; then remove older checkpoints."""
        tensors = self.collect()
        meet()  # every process has written its part
        if state.is_world_process_zero:
            checkpoint = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
            save_file(tensors, checkpoint / _STATE_FILE)
            if not args.save_only_model:
                complete(checkpoint)
            remove_older(checkpoint, limit=self.limit, best=state.best_model_checkpoint)
        meet()  # the disk may take longer than a collective of the next step waits


def saved_with(checkpoint: Path) -> dict[str, Tensor]:
    """What `CompleteCheckpoint` added to a complete checkpoint."""
    return load_file(checkpoint / _STATE_FILE)


class NoneAtTheEnd(TrainerCallback):
    """No checkpoint is written at the end of a training: its model is saved anyway, and it would take as much room."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:  # noqa: ARG002
        """Withdraw what `Trainer` has decided about the last step."""
        control.should_save = control.should_save and state.global_step < state.max_steps

    on_epoch_end = on_step_end


class Checks(TrainerCallback):
    """Has the evaluation set scored at evenly spaced steps, the last time at the end, and keeps each time's margins.

    Args:
        last_margins: Gives the margins of the last evaluation, shape (pairs,).

    Attributes:
        number: How often; 0 for never.
        margins: Of each check so far, each of shape (pairs,).
    """

    def __init__(self, last_margins: Callable[[], Tensor]) -> None:
        self.number = 0
        self.margins: list[Tensor] = []
        self._last_margins = last_margins

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:  # noqa: ARG002
        """Ask for an evaluation where one is due."""
        if self._num_due(state):
            control.should_evaluate = True

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:  # noqa: ARG002
        """Keep the margins."""
        if self.number:
            self.margins += [self._last_margins()] * self._num_due(state)

    def _num_due(self, state: TrainerState) -> int:
        """Checks that fall on this step; several where there are fewer steps than checks, and none before the first."""
        if state.global_step == 0:
            return 0
        done, before = (step * self.number // state.max_steps for step in (state.global_step, state.global_step - 1))
        return done - before


class Halfway(TrainerCallback):
    """Saves the model once, half way through its training.

    Args:
        save: Saves it.
    """

    def __init__(self, save: Callable[[], None]) -> None:
        self.save = save

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:  # noqa: ARG002
        """Save it where half of the steps are done."""
        if state.global_step == max(state.max_steps // 2, 1):
            self.save()


class Replayable(Sampler[int]):
    """A sampler that draws from the global generator, and can draw the order of a broken-off epoch once more.

    `Trainer` brings the generator back to where the checkpoint left it, which is after the epoch's order was drawn.

    Args:
        sampler: What it draws with.
        replay: State of the generator before the order of the epoch to go on with; None to begin one.
    """

    def __init__(self, sampler: LengthGroupedSampler, *, replay: Tensor | None) -> None:
        self.sampler = sampler
        self.replay = replay
        self.drawn_at: Tensor | None = None  # the same of this epoch

    def __iter__(self) -> Iterator[int]:
        """Positions of pairs."""
        if self.replay is not None:
            torch.set_rng_state(self.replay)
            self.replay = None
        self.drawn_at = torch.get_rng_state()
        return iter(self.sampler)

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.sampler)
