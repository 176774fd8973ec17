"""`ROPOTrainer`: one noise-tolerant training stage on weighted preference pairs.

In: a model, pairs with weights and reference log-probabilities, `TrainOptions`. Out: a trained model, a log, and the
margin each pair had when the model first saw it.

It builds on the public methods of `transformers.Trainer`: `compute_loss`, `get_batch_samples`, `prediction_step`, `log`
and callbacks; the one exception is `_get_train_sampler`, without which an epoch would not resume in its order. So what
`Trainer` and `accelerate` offer is there: mixed precision, accumulation, checkpoints, loggers, several devices.
"""

import logging
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch
from peft import PeftConfig
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
)
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_pt_utils import LengthGroupedSampler

import ropo
from ropo.logps.batch import Batch, pad_token_id_of
from ropo.logps.choose import choose_layout, log_layout
from ropo.logps.shared_prefix import FORWARDS
from ropo.losses import BoundLoss
from ropo.models.sharding import loads_in_parts
from ropo.pairs import PairLogps
from ropo.processes import meet
from ropo.provenance import DiskFullError, hash_value, put_in_place, saying_if_full
from ropo.train.callbacks import (
    AfterStep,
    Checks,
    CompleteCheckpoint,
    Halfway,
    NoneAtTheEnd,
    Replayable,
    ShowProgress,
    saved_with,
)
from ropo.train.checkpoints import find_checkpoint, newest_complete, remove_incomplete, remove_others
from ropo.train.checks import check_training
from ropo.train.dataset import PairCollator, PairDataset, prepare_datasets
from ropo.train.failures import check_finite, how_to_save_memory
from ropo.train.launch import Launch
from ropo.train.metrics import ByPair, RunningMeans, gathered, of_margins
from ropo.train.model import load_balance_of, make_ready, with_adapter
from ropo.train.objective import Objective, warn_about_alpha
from ropo.train.options import TrainOptions, check_kind, instead_of
from ropo.train.sharding import another_accelerator, load_in_parts, settle, whole_weights

logger = logging.getLogger(__name__)

# Most unique tokens in one forward pass on a CPU, unless the user says otherwise. More costs memory and gains nothing.
CPU_TOKENS = 2048


class TrainerOptions(TypedDict, total=False):
    """What is handed on to `transformers.Trainer` as it is."""

    callbacks: list[TrainerCallback] | None
    optimizers: tuple[Any, Any]


class ROPOTrainer(Trainer):
    """Train a causal language model on preference pairs with one of `ropo.losses.LOSSES`.

    Assumptions: the model given is the reference, unless `train_dataset` is a `PairDataset` that carries reference
    log-probabilities. It does not filter or resample; `ropo.run.align.run_rounds` does, and uses this class.

    Args:
        model: A causal language model, or the folder or hub id of one.
        args: Options, such as a `ROPOConfig`.
        train_dataset: Pairs, a `PairDataset`, or anything that `ropo.data.load.load_pairs` reads.
        eval_dataset: Likewise.
        processing_class: The tokenizer; loaded from where the model is when not given.
        peft_config: Wraps the model with an adapter; the model without it is then the reference.
        loss: The loss; by default that of `args`.
        **others: `callbacks` and `optimizers`, as for `Trainer`.

    Raises:
        TypeError: If `args` is no `TrainOptions`, or a keyword is unknown.
        ValueError: If the data is empty or not fit for training; if several GPUs are used in one process.
        FloatingPointError: If a loss is not finite; the message names the pairs.
    """

    loss_is_scaled_for_ga = True  # read by `Trainer.training_step`: it is the mean over all accumulated batches

    def __init__(
        self,
        model: PreTrainedModel | str,
        args: TrainOptions,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        *,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: PeftConfig | None = None,
        loss: BoundLoss | None = None,
        **others: Unpack[TrainerOptions],
    ) -> None:
        for name in others.keys() - TrainerOptions.__annotations__:  # `ref_model`, which TRL takes, is answered
            raise TypeError(f"ROPOTrainer takes no {name}.{instead_of(name)}")
        check_kind(args, TrainOptions, taker="ROPOTrainer")
        check_training(args)
        load_in_parts(args)
        model, self.tokenizer = make_ready(model, processing_class, peft_config)
        # One that is quantized is where it was loaded, one that is sharded yet to come.
        if not getattr(model, "is_quantized", False) and not loads_in_parts():
            model.to(args.device)  # type: ignore[arg-type] # its decorator hides the device from mypy
        bound_loss = loss or args.bound_loss()
        train_dataset, eval_dataset = prepare_datasets(
            train_dataset, eval_dataset, model, self.tokenizer, args, needs_reference=bound_loss.spec.needs_reference
        )
        sample = eval_dataset if train_dataset is None else train_dataset
        model = with_adapter(model, peft_config, seed=args.seed)
        self.options = args
        self.layout = self._choose_layout(model, sample, is_trained=train_dataset is not None)
        if train_dataset is not None and loss is None:
            warn_about_alpha(args)
        self.training_objective = Objective(
            bound_loss, num_annotators=len(sample.annotators), device=args.device,
            balance=load_balance_of(model, args, layout=self.layout),
        )  # fmt: skip
        self.pairs = {"train": sample.pairs, "eval": sample.pairs if eval_dataset is None else eval_dataset.pairs}
        self.first_margins = torch.full((len(sample),), float("nan"), device=args.device)
        self._evaluated, self._eval_prefix = ByPair(len(self.pairs["eval"])), "eval_"
        self._checks = Checks(self.gather_eval_margins)
        self._order: Replayable | None = None
        self._order_to_replay: Tensor | None = None
        self._means = RunningMeans()
        self._num_parameters = sum(getattr(one, "ds_numel", one.numel()) for one in model.parameters())
        with another_accelerator():
            super().__init__(
                model=model,
                args=args,
                data_collator=self._collator(sample),
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=self.tokenizer,
                callbacks=[*(others.get("callbacks") or []), *self._own_callbacks()],
                optimizers=others.get("optimizers", (None, None)),
            )
        self.label_names = []
        settle(self.accelerator)
        self._shown = ShowProgress(is_line=not args.disable_tqdm)
        for kind in (PrinterCallback, ProgressCallback):  # the second prints every line of the log as well
            self.remove_callback(kind)
        self.add_callback(self._shown)

    def _choose_layout(self, model: nn.Module, sample: PairDataset, *, is_trained: bool) -> str:
        """The fastest forward that agrees with the plain one; which, is logged."""
        layout, reason = choose_layout(
            model, sample.tokens, pad_token_id=pad_token_id_of(self.tokenizer), use_bf16=self.options.bf16,
            is_trained=is_trained, has_weights=not loads_in_parts(),
        )  # fmt: skip
        log_layout(layout, reason)
        return layout

    def _own_callbacks(self) -> list[TrainerCallback]:
        return [
            self._checks,
            AfterStep(self.training_objective.after_step),
            CompleteCheckpoint(self._learned, limit=self.options.save_total_limit),
        ]

    def check_evenly(self, num_checks: int) -> None:
        """Score `eval_dataset` in training, too.

        Args:
            num_checks: How often, evenly spaced, the last time at the end; the margins are then in `check_margins`.
        """
        self._checks.number = num_checks

    def save_halfway(self, folder: Path) -> None:
        """Save the model half way through its training, too.

        Args:
            folder: Where.
        """
        self.add_callback(Halfway(partial(self.save_whole, folder)))

    @property
    def _sharding(self) -> Any:
        """The settings of FSDP; None where the model is not sharded by it."""
        return self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None

    def _collator(self, dataset: PairDataset) -> PairCollator:
        """Batches of a dataset, in pieces where a piece is what the loss needs."""
        max_tokens = self.options.max_tokens_per_batch
        if max_tokens is None and self.options.device.type == "cpu":
            max_tokens = CPU_TOKENS
        if self.training_objective.spec.needs_whole_batch or self.options.sharding != "none":
            max_tokens = None  # processes that gather weights for each other run as many forward passes as each other
        pad_token_id = pad_token_id_of(self.tokenizer)
        return PairCollator(dataset=dataset, layout=self.layout, pad_token_id=pad_token_id, max_tokens=max_tokens)

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, **options: Any) -> Any:  # type: ignore[override]  # noqa: FBT001
        """As in `Trainer`; a checkpoint also brings back reliability, moments, margins and the epoch's order.

        Raises:
            ValueError: If `resume_from_checkpoint` names a checkpoint that is not complete, or is True where there is
                no complete one.
            DiskFullError: If there is no room for a checkpoint. What is left of it is removed.
        """
        folder = Path(str(self.args.output_dir))
        checkpoint = find_checkpoint(resume_from_checkpoint, folder)
        if checkpoint is not None:
            self._restore(checkpoint)
        # `CompleteCheckpoint` removes older ones, when the new one is complete and not before.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            with saying_if_full(folder):
                return super().train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint), **options)
        except DiskFullError:
            if self.is_world_process_zero():
                remove_incomplete(folder)
            raise
        finally:
            self.args.save_total_limit = limit
            self._shown.close()

    def _restore(self, checkpoint: Path) -> None:
        """Bring back what `_learned` saved."""
        saved = saved_with(checkpoint)
        self.training_objective.restore(saved)
        self.first_margins = saved["first_margins"].to(self.args.device)
        self._checks.margins = list(saved["check_margins"])
        self._order_to_replay = saved["order"] if len(saved["order"]) else None

    def train_or_resume(self, made_from: Any, *, title: str = "Training") -> None:
        """Train; go on from the last complete checkpoint in the output folder if one of this training is there.

        The caller saves what it wants of the trained model, so no checkpoint is written at the end.

        Args:
            made_from: JSON-able value of everything that the training depends on; checkpoints of another are removed.
            title: Of the progress that is shown.
        """
        self._shown.title = title
        folder = Path(str(self.args.output_dir))
        remove_others(folder, made_from=hash_value([made_from, asdict(Launch.of(self.options)), ropo.__version__]))
        self.add_callback(NoneAtTheEnd)
        newest = newest_complete(folder)
        self.train(resume_from_checkpoint=None if newest is None else str(newest))

    @property
    def check_margins(self) -> list[Tensor]:
        """Margins of the evaluation set at each check so far, each of shape (pairs,)."""
        return self._checks.margins

    def _learned(self) -> dict[str, Tensor]:
        """What a checkpoint holds beside weights and optimizer; `train` brings it back."""
        checks = self.check_margins
        return {
            **self.training_objective.state(),
            "first_margins": self.gather_first_margins(),
            "check_margins": torch.stack(checks) if checks else torch.zeros(0, 1),
            "order": self._order_of_epoch(),
        }

    def save_whole(self, folder: Path) -> None:
        """Save the model so that `folder` holds all of it or is not there.

        Several processes may write one model together, so the name that is put in place later is known to all.
        """
        aside = folder.with_name(f".{folder.name}.partial")
        try:
            with saying_if_full(folder):
                with whole_weights(self._sharding):
                    self.save_model(str(aside))
                meet()
                if self.is_world_process_zero():
                    (aside / TRAINING_ARGS_NAME).unlink(missing_ok=True)  # a pickle, which nobody should have to open
                    put_in_place(aside, folder)
        except DiskFullError:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        meet()

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """As in `Trainer`; grouped by length, the order of an epoch can be drawn once more.

        The other samplers resume by themselves.
        """
        sampler = super()._get_train_sampler(train_dataset)
        if isinstance(sampler, LengthGroupedSampler):
            sampler = self._order = Replayable(sampler, replay=self._order_to_replay)
        return sampler

    def _order_of_epoch(self) -> Tensor:
        """What the order of this epoch was drawn from, shape (bytes,); empty at an epoch's end, or if nothing was."""
        is_within = abs(self.state.epoch - round(self.state.epoch)) > 1e-9
        drawn_at = self._order.drawn_at if self._order is not None and is_within else None
        return torch.zeros(0, dtype=torch.uint8) if drawn_at is None else drawn_at

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Tensor | int | None]:
        """Collect the batches of one optimizer step and count their pairs over all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        num_pairs = torch.full((), sum(len(batch["position"]) for batch in batches), device=device)
        return batches, self.accelerator.gather(num_pairs).sum()

    def _prepare_input(self, data: Any) -> Any:
        """As in `Trainer`, which under DeepSpeed would round reference log-probabilities to half precision."""
        return data.to(self.args.device) if torch.is_tensor(data) else super()._prepare_input(data)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Forward and backward pass of each piece in turn; processes share their gradients after the last.

        Raises:
            torch.OutOfMemoryError: If memory is short; the message says what to change, and what is lost: nothing but
                the steps since the last checkpoint.
        """
        *pieces, last = inputs["pieces"]
        losses = []
        try:
            for piece in pieces:
                with self.accelerator.no_sync(model):
                    losses.append(super().training_step(model, piece, num_items_in_batch))
            losses.append(super().training_step(model, last, num_items_in_batch))
        except torch.OutOfMemoryError as error:
            is_sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
            needs_whole_batch = self.training_objective.spec.needs_whole_batch
            remedy = how_to_save_memory(inputs["pieces"], needs_whole_batch=needs_whole_batch, is_sharded=is_sharded)
            raise torch.OutOfMemoryError(f"{remedy} ({error})") from error
        return torch.stack(losses).sum()

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Six operations for each token of the input and each parameter, which are counted once."""
        return 6 * self._num_parameters * sum(int(piece["input_ids"].numel()) for piece in inputs["pieces"])

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,  # noqa: FBT001, FBT002 - the signature of Trainer
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Weighted mean loss over the pairs of the whole step: every accumulated batch of every process."""
        logps = FORWARDS[self.layout](model, inputs)
        h = self.training_objective.margin(logps, inputs)
        step = self.state.global_step
        loss = self.training_objective.loss(h, inputs, progress=step / max(self.state.max_steps, 1))
        loss = self.training_objective.with_sft(loss, logps)
        pairs = self.pairs["train" if torch.is_grad_enabled() else "eval"]
        check_finite(model, loss, pairs, inputs["position"], step=step)
        self._remember(h, loss, logps, inputs)
        total = self.training_objective.total(loss, inputs["weight"])
        if num_items_in_batch is None:
            mean = total / len(loss)
        else:
            # Processes average their gradients, so each gives its share of the global mean times their number.
            mean = total / num_items_in_batch * self.accelerator.num_processes
        return (mean, {"margins": h.detach()}) if return_outputs else mean

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,  # noqa: FBT001, ARG002 - the signature of Trainer
        ignore_keys: list[str] | None = None,  # noqa: ARG002
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Loss of one evaluation batch; the metrics are collected on the way."""
        inputs = self._prepare_inputs(inputs)
        num_pairs = len(inputs["position"])
        with torch.no_grad(), self.compute_loss_context_manager():
            losses = [
                self.compute_loss(model, piece) * len(piece["position"]) / num_pairs for piece in inputs["pieces"]
            ]
        return torch.stack(losses).sum(), None, None

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """As in `Trainer`; in a run, random numbers and the model are what they would be without."""
        before = torch.get_rng_state()
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, PairDataset):
            if eval_dataset is not None and isinstance(self.train_dataset, PairDataset):
                eval_dataset = dataset = dataset.with_annotators(self.train_dataset.annotators)
            self.pairs["eval"], self._evaluated = dataset.pairs, ByPair(len(dataset))
            self._eval_prefix = f"{metric_key_prefix}_"
        found: dict[str, float] = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        if self.options.eval_strategy != "no":
            torch.set_rng_state(before)  # a data loader draws a seed, and the order of an epoch comes after it
        return found

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """As in `Trainer`; of all pairs, and an evaluation set that is not the training set brings its own collator."""
        dataset = eval_dataset if eval_dataset is not None else self.eval_dataset
        before = self.data_collator, self.args.dataloader_drop_last
        self.args.dataloader_drop_last = False  # which is of the batches of a step
        if isinstance(dataset, PairDataset):
            self.data_collator = self._collator(dataset)
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator, self.args.dataloader_drop_last = before

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the mean of every metric in METRICS over the pairs since the last time."""
        prefix = self._eval_prefix
        if any(name.startswith(prefix) for name in logs):
            logs |= {f"{prefix}{name}": mean for name, mean in self._evaluated.means(self.accelerator.gather).items()}
        else:
            logs |= self._means.take(partial(self.accelerator.reduce, reduction="sum"))
        super().log(logs, start_time)

    def gather_first_margins(self) -> Tensor:
        """Margin of each training pair when the model first saw it, shape (pairs,); NaN for pairs never seen.

        In the first epoch these come from a model that has not been trained on the pair.
        """
        return gathered(self.first_margins, self.accelerator.gather)

    def gather_eval_margins(self) -> Tensor:
        """Margin of each pair of the evaluation set at the last evaluation, shape (pairs,)."""
        return self._evaluated.take("rewards/margins", self.accelerator.gather)

    def _remember(self, h: Tensor, loss: Tensor, logps: PairLogps, inputs: Batch) -> None:
        """Add the batch to the running metrics, and keep the margins of pairs that are seen for the first time."""
        h, detached = h.detach().float(), logps.detach()
        values = (
            {"logps/chosen": detached.chosen, "logps/rejected": detached.rejected}
            | self.training_objective.rewards(detached, inputs)
            | of_margins(h)
            | self.training_objective.gradient_weight(h)
            | self.training_objective.terms(detached)
        )
        where = inputs["position"]  # nothing here asks the device for a value, which would make it wait
        if torch.is_grad_enabled():
            self._means.add(values)
            before = self.first_margins[where]
            self.first_margins[where] = torch.where(before.isnan(), h, before)
            return
        self._evaluated.put(where, {"loss": loss * inputs["weight"], **values})
