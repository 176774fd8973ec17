"""`ROPOTrainer`: one noise-tolerant training stage on weighted preference pairs.

In: a model, pairs with weights and reference log-probabilities, a `ROPOConfig`. Out: a trained model, a log, and the
margin each pair had when the model first saw it.

It stands on the public surface of `transformers.Trainer`: `compute_loss`, `get_batch_samples`, `prediction_step`,
`log` and callbacks; the one exception is `_get_train_sampler`, without which an epoch would not resume in its order.
What `Trainer` and `accelerate` give (mixed precision, accumulation, checkpoints, loggers, several devices) is
therefore there.
"""

import contextlib
import copy
import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.fsdp import StateDictType
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    set_seed,
)
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_pt_utils import LengthGroupedSampler

import ropo
from ropo.config import ROPOConfig, check_config
from ropo.data.problems import render
from ropo.data.tokenize import tokenize_pairs
from ropo.data.validate import read_checked
from ropo.logps.batch import Batch
from ropo.logps.cache import reference_logps
from ropo.logps.choose import choose_layout
from ropo.logps.shared_prefix import FORWARDS
from ropo.losses import LOSSES, bind_loss, gradient_weight, re_po_posterior
from ropo.models.files import check_ids, ids_of, not_finite
from ropo.models.source import PolicySource, check_adapter, find_model, load_tokenizer
from ropo.pairs import PairLogps, margin, margin_per_token
from ropo.provenance import DiskFullError, hash_value, put_in_place, saying_if_full
from ropo.spelling import in_trl
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
from ropo.train.dataset import PairCollator, PairDataset
from ropo.train.launch import Launch
from ropo.train.metrics import RunningMeans, of_margins

logger = logging.getLogger(__name__)

# Most unique tokens in one forward pass on a CPU, unless the user says otherwise. More costs memory and gains nothing.
_CPU_TOKENS = 2048

# A pair whose gradient is smaller gets none. It would move no weight; but on a CPU the products behind it meet numbers
# below 1e-38, with which they take up to twenty times as long.
_SMALLEST_GRADIENT = 1e-20

_RELIABILITY_RATE = 0.1  # step of the moving average of annotator reliability (arXiv:2509.24159, eq. 7)
_MOMENTS_RATE = 0.02  # step of the moving moments of margins (arXiv:2608.30597, the main recipe)


class ROPOTrainer(Trainer):
    """Train a causal language model on preference pairs with one of `ropo.losses.LOSSES`.

    Assumptions: the model given is the reference, unless `train_dataset` is a `PairDataset` that carries reference
    log-probabilities. It does not filter or resample; `ropo.run.rounds.run_rounds` does, and uses this class.

    Args:
        model: A causal language model, or the folder or hub id of one.
        args: Options.
        train_dataset: Pairs, a `PairDataset`, or anything that `ropo.data.load.load_pairs` reads.
        eval_dataset: Likewise.
        processing_class: The tokenizer; loaded from where the model is when not given.
        peft_config: Wraps the model with an adapter; the model without it is then the reference.
        callbacks: As for `Trainer`.
        optimizers: As for `Trainer`.
        halfway_folder: Where the model is saved half way through its training, if anywhere.
        num_checks: How often `eval_dataset` is scored in training, evenly spaced, the last time at its end; the margins
            are then in `check_margins`.
        **unknown: None is taken. It is here so that `ref_model`, which TRL takes, is answered in a sentence.

    Raises:
        TypeError: If `args` is no `ROPOConfig`, or a keyword is unknown.
        ValueError: If the data is empty or not fit for training; if several GPUs are used in one process.
        FloatingPointError: If a loss is not finite; the message names the pairs.
    """

    # Read by `Trainer.training_step`: the loss is already the mean over the pairs of all accumulated batches.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: PreTrainedModel | str,
        args: ROPOConfig,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        *,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: PeftConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        num_checks: int = 0,
        halfway_folder: Path | None = None,
        **unknown: NoReturn,
    ) -> None:
        for name in unknown:
            raise TypeError(f"ROPOTrainer takes no {name}.{in_trl(name)}")
        check_config(args, taker="ROPOTrainer")
        check_training(args)
        model, self.tokenizer = _model_and_tokenizer(model, processing_class)
        self.pad_token_id: int = self.tokenizer.pad_token_id
        if self.pad_token_id is None:
            self.pad_token_id = self.tokenizer.eos_token_id
        turn_dropout_off(model)
        if peft_config is not None:
            check_adapter(model, peft_config)
        model.to(args.device)  # type: ignore[arg-type] # its decorator hides the device from mypy
        train_dataset = self._prepare(train_dataset, model, args)
        eval_dataset = self._prepare(eval_dataset, model, args)
        if train_dataset is not None and eval_dataset is not None:
            eval_dataset = eval_dataset.with_annotators(train_dataset.annotators)
        sample = eval_dataset if train_dataset is None else train_dataset
        if sample is None:
            raise ValueError("ROPOTrainer needs train_dataset or eval_dataset; got neither.")
        if peft_config is not None:
            set_seed(args.seed)  # an adapter begins at random, and `Trainer` sets the seed only later
            model = get_peft_model(model, copy.deepcopy(peft_config))  # type: ignore[assignment] # it writes into it
        self.layout, reason = choose_layout(
            model,
            sample.tokens,
            pad_token_id=self.pad_token_id,
            use_bf16=args.bf16,
            is_trained=train_dataset is not None,
        )
        _tell_once(f"Forward: {self.layout}, since {reason}.")
        self.options = args
        self.pairs = {"train": sample.pairs, "eval": sample.pairs if eval_dataset is None else eval_dataset.pairs}
        self.spec = LOSSES[args.loss]
        if train_dataset is not None:
            _say_which_alpha(args)
        self.loss_of_margin = bind_loss(args.loss, beta=args.beta, options=args.loss_options)
        # The last one is that of annotators who are in the evaluation set only; nothing is learned of them.
        self.reliability = torch.full((len(sample.annotators) + 1,), args.reliability or 0.9, device=args.device)
        self.moments = torch.zeros(3, device=args.device)  # sums of weights, means and variances: `update_moments`
        self._step_margins: list[Tensor] = []
        self.first_margins = torch.full((len(sample),), float("nan"), device=args.device)
        self.eval_margins = torch.full((len(self.pairs["eval"]),), float("nan"), device=args.device)
        self._checks = Checks(num_checks, self.gather_eval_margins)
        self._order: Replayable | None = None
        self._order_to_replay: Tensor | None = None
        self._means = {"train": RunningMeans(), "eval": RunningMeans()}
        self._num_parameters = sum(parameter.numel() for parameter in model.parameters())
        super().__init__(
            model=model,
            args=args,
            data_collator=self._collator(sample),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=self.tokenizer,
            callbacks=[
                *(callbacks or []),
                self._checks,
                AfterStep(self.update_moments),
                CompleteCheckpoint(self._learned, limit=args.save_total_limit),
                *([Halfway(partial(self.save_whole, halfway_folder))] if halfway_folder is not None else []),
            ],
            optimizers=optimizers,
        )
        self.label_names = []
        self._keep_outputs_in_float32()
        self._shown = ShowProgress(is_line=not args.disable_tqdm)
        for kind in (PrinterCallback, ProgressCallback):  # the second prints every line of the log as well
            self.remove_callback(kind)
        self.add_callback(self._shown)

    def _keep_outputs_in_float32(self) -> None:
        """FSDP2 would hand out log-probabilities in half precision, a tenth of a nat from what they are."""
        plugin: Any = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        policy: Any = getattr(plugin, "mixed_precision_policy", None)
        if getattr(policy, "output_dtype", None) is not None:
            plugin.mixed_precision_policy = replace(policy, output_dtype=None)

    def _collator(self, dataset: PairDataset) -> PairCollator:
        """Batches of a dataset, in pieces where a piece is what the loss needs."""
        max_tokens = self.options.max_tokens_per_batch
        if max_tokens is None and self.options.device.type == "cpu":
            max_tokens = _CPU_TOKENS
        if not self.spec.allows_pieces:
            max_tokens = None
        return PairCollator(dataset=dataset, layout=self.layout, pad_token_id=self.pad_token_id, max_tokens=max_tokens)

    def _prepare(self, source: Any, model: PreTrainedModel, args: ROPOConfig) -> PairDataset | None:
        """Whatever was given as data, as a `PairDataset` with reference log-probabilities if the loss needs them."""
        if source is None or isinstance(source, PairDataset):
            return source
        _, pairs, problems = read_checked(source, on_bad_rows=args.on_bad_rows)
        tokenized = tokenize_pairs(pairs, self.tokenizer, max_length=args.max_length)
        if problems := [*problems, *tokenized.problems]:
            logger.warning("Problems of the data:\n%s", render(problems))
        if not tokenized.pairs:
            raise ValueError(f"ROPOTrainer needs at least one pair; got none.\n{render(problems)}")
        name = model.config.name_or_path or type(model).__name__
        check_ids(model, self.tokenizer, ids_of(tokenized.pairs, tokenized.tokens), name_or_path=name)
        reference = None
        if LOSSES[args.loss].needs_reference:
            cache_dir = Path(args.reference_cache_dir or Path(str(args.output_dir)) / "reference_cache")
            reference = reference_logps(model, tokenized.tokens, cache_dir=cache_dir, **batching(args, self.tokenizer))
        return PairDataset(tokenized.pairs, tokenized.tokens, reference=reference)

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
        kept = saved_with(checkpoint)
        self.reliability = kept["reliability"].to(self.args.device)
        self.moments = kept["moments"].to(self.args.device)
        self.first_margins = kept["first_margins"].to(self.args.device)
        self._checks.found = list(kept["check_margins"])
        self._order_to_replay = kept["order"] if len(kept["order"]) else None

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
        found = newest_complete(folder)
        self.train(resume_from_checkpoint=None if found is None else str(found))

    @property
    def check_margins(self) -> list[Tensor]:
        """Margins of the evaluation set at each check so far, each of shape (pairs,)."""
        return self._checks.found

    def _learned(self) -> dict[str, Tensor]:
        """What a checkpoint holds beside weights and optimizer; `train` brings it back."""
        checks = self.check_margins
        return {
            "reliability": self.reliability.cpu(),
            "moments": self.moments.cpu(),
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
                with self._in_one_piece():
                    self.save_model(str(aside))
                self.accelerator.wait_for_everyone()
                if self.is_world_process_zero():
                    (aside / TRAINING_ARGS_NAME).unlink(missing_ok=True)  # a pickle, which nobody should have to open
                    put_in_place(aside, folder)
        except DiskFullError:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        self.accelerator.wait_for_everyone()

    @contextlib.contextmanager
    def _in_one_piece(self) -> Iterator[None]:
        """Within it FSDP saves whole weights: `Trainer` writes none at all where shards are asked for."""
        plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        if plugin is None:
            yield
            return
        before, plugin.state_dict_type = plugin.state_dict_type, StateDictType.FULL_STATE_DICT
        try:
            yield
        finally:
            plugin.state_dict_type = before

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
            raise torch.OutOfMemoryError(f"{self._how_to_save_memory(inputs['pieces'])} ({error})") from error
        return torch.stack(losses).sum()

    def _how_to_save_memory(self, pieces: list[Batch]) -> str:
        """What to change when the largest of these pieces does not fit, in a few sentences."""
        tokens = max(piece["input_ids"].numel() for piece in pieces)
        said = f"Training ran out of the device's memory in a forward and backward pass over {tokens:,} tokens. "
        if max(len(piece["position"]) for piece in pieces) == 1:
            return said + "It was a single pair: lower max_length, use bf16 and gradient_checkpointing, or use_peft."
        if self.spec.allows_pieces and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            said += f"Set max_tokens_per_batch to {tokens // 2} or less: a step and its loss stay the same. "
        else:
            said += "Halve per_device_train_batch_size and double gradient_accumulation_steps. "
        return said + "Or use bf16, gradient_checkpointing or use_peft."

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
        h = self._margin(logps, inputs)
        if h.requires_grad:
            h.register_hook(_without_the_smallest)
        loss = self._loss(h, inputs)
        self._stop_if_not_finite(model, loss, inputs)
        self._remember(h, logps, inputs)
        total = (loss * inputs["weight"]).sum()
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

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """As in `Trainer`; an evaluation set that is not the training set brings its own collator."""
        dataset = eval_dataset if eval_dataset is not None else self.eval_dataset
        if isinstance(dataset, PairDataset):
            self.data_collator, kept = self._collator(dataset), self.data_collator
            try:
                return super().get_eval_dataloader(dataset)
            finally:
                self.data_collator = kept
        return super().get_eval_dataloader(eval_dataset)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the mean of every metric in METRICS over the pairs since the last time."""
        mode, prefix = ("eval", "eval_") if any(name.startswith("eval_") for name in logs) else ("train", "")
        found = self._means[mode].take(partial(self.accelerator.reduce, reduction="sum"))
        logs |= {prefix + name: value for name, value in found.items()}
        super().log(logs, start_time)

    def gather_first_margins(self) -> Tensor:
        """Margin of each training pair when the model first saw it, shape (pairs,); NaN for pairs never seen.

        In the first epoch these come from a model that has not been trained on the pair.
        """
        return self._gather_by_pair(self.first_margins)

    def gather_eval_margins(self) -> Tensor:
        """Margin of each pair of the evaluation set at the last evaluation, shape (pairs,)."""
        return self._gather_by_pair(self.eval_margins)

    def _gather_by_pair(self, values: Tensor) -> Tensor:
        """One value per pair from the processes that have seen it; NaN where none has."""
        mine = values.to(self.args.device)
        if self.accelerator.num_processes == 1:
            return mine.to("cpu", copy=True)  # the buffer goes on changing
        seen: Tensor = self.accelerator.gather(mine[None])
        return seen.nanmean(dim=0).cpu()  # a pair is seen by one process, or by two where the last batch is filled up

    def _margin(self, logps: PairLogps, inputs: Batch) -> Tensor:
        if self.spec.per_token:
            return margin_per_token(logps, beta=self.options.beta)
        if "reference_chosen" not in inputs:
            if self.spec.needs_reference:
                raise ValueError(
                    f"{self.options.loss} needs reference log-probs; the PairDataset has none. Pass reference=."
                )
            return self.options.beta * (logps.chosen - logps.rejected)
        reference = PairLogps(chosen=inputs["reference_chosen"], rejected=inputs["reference_rejected"])
        return margin(logps, reference, beta=self.options.beta)

    def _loss(self, h: Tensor, inputs: Batch) -> Tensor:
        """Loss per pair, given exactly the inputs it names; a loss of the whole batch sees that of all processes."""
        gather = self.accelerator.gather if self.spec.needs_whole_batch else lambda here: here
        known: dict[str, Callable[[], Tensor | float]] = {
            "reliability": lambda: gather(self.reliability[inputs["annotator"]]),
            "moments": lambda: self.moments[1:] / self.moments[0].clamp(min=_MOMENTS_RATE),
            "progress": lambda: self.state.global_step / max(self.state.max_steps, 1),
            "reference_ratio": lambda: gather(inputs["reference_chosen"] - inputs["reference_rejected"]),
        }
        given = {name: known[name]() for name in self.spec.inputs}
        if not self.spec.needs_whole_batch:
            loss = self.loss_of_margin(h, **given)
        else:
            # Pairs of other processes are numbers here; in their own process they have their gradient.
            first, numbers = self.accelerator.process_index * len(h), gather(h.detach())
            whole = torch.cat([numbers[:first], h, numbers[first + len(h) :]])
            loss = self.loss_of_margin(whole, **given)[first : first + len(h)]
        if torch.is_grad_enabled():
            self._learn(h.detach(), inputs)
        return loss

    def _learn(self, h: Tensor, inputs: Batch) -> None:
        if "reliability" in self.spec.inputs:
            self._update_reliability(h, inputs["annotator"])
        if "moments" in self.spec.inputs:
            self._step_margins.append(h)

    def update_moments(self) -> None:
        """Moving mean and variance of the margins of each optimizer step (arXiv:2608.30597), over all processes.

        The paper does not say where they start. Here the averages carry the sum of their weights, which they are
        divided by, so that they start nowhere: after n steps they are averages of n steps.
        """
        if self._step_margins:
            h = self.accelerator.gather(torch.cat(self._step_margins))
            of_step = torch.stack([torch.ones_like(h[0]), h.mean(), h.var(correction=0)])
            self.moments = (1 - _MOMENTS_RATE) * self.moments + _MOMENTS_RATE * of_step
            self._step_margins.clear()

    def _update_reliability(self, h: Tensor, who: Tensor) -> None:
        """Moving average of the posterior that a label is right, per annotator (arXiv:2509.24159, eq. 7)."""
        posterior = re_po_posterior(h, self.reliability[who])
        zeros = torch.zeros_like(self.reliability)
        sums = torch.stack([zeros.index_add(0, who, posterior), zeros.index_add(0, who, torch.ones_like(posterior))])
        total, count = self.accelerator.reduce(sums, reduction="sum")
        moved = (1 - _RELIABILITY_RATE) * self.reliability + _RELIABILITY_RATE * total / count.clamp(min=1)
        self.reliability = torch.where(count > 0, moved, self.reliability)

    def _stop_if_not_finite(self, model: nn.Module, loss: Tensor, inputs: Batch) -> None:
        if bool(torch.isfinite(loss).all()):
            return
        if names := not_finite(model):
            has_learned = self.state.global_step > 0
            remedy = (
                "Lower the learning rate, or use bf16 instead of fp16" if has_learned else "Take another copy of it"
            )
            raise FloatingPointError(
                f"The model has NaN or infinity in {names} at step {self.state.global_step}. {remedy}."
            )
        where = inputs["position"][~torch.isfinite(loss)].tolist()
        pairs = self.pairs["train" if torch.is_grad_enabled() else "eval"]
        names = ", ".join(f"row {pairs[i].row} (pair {pairs[i].id})" for i in where[:10])
        raise FloatingPointError(
            f"The loss is not finite for {names} at step {self.state.global_step}. Lower the learning rate, use "
            "bf16 instead of fp16, or look at these pairs with `ropo validate`."
        )

    def _remember(self, h: Tensor, logps: PairLogps, inputs: Batch) -> None:
        """Add the batch to the running metrics, and keep the margins of pairs that are seen for the first time."""
        h, chosen, rejected = h.detach().float(), logps.chosen.detach(), logps.rejected.detach()
        is_training = torch.is_grad_enabled()
        found = {"logps/chosen": chosen, "logps/rejected": rejected}
        if "reference_chosen" in inputs:
            found["rewards/chosen"] = self.options.beta * (chosen - inputs["reference_chosen"])
            found["rewards/rejected"] = self.options.beta * (rejected - inputs["reference_rejected"])
        found |= of_margins(h)
        if self.spec.is_per_pair:
            found["gradient_weight"] = gradient_weight(self.loss_of_margin, h)
        self._means["train" if is_training else "eval"].add(found)
        # Nothing here asks the device for a value, which would make it wait.
        where = inputs["position"]
        if is_training:
            before = self.first_margins[where]
            self.first_margins[where] = torch.where(before.isnan(), h, before)
        else:
            self.eval_margins[where] = h


def _model_and_tokenizer(
    model: PreTrainedModel | str, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Both, loaded where they are not given."""
    place: str = find_model(model) if isinstance(model, str) else model.config.name_or_path or ""
    if isinstance(model, str):
        model = PolicySource(place).load()
    if tokenizer is None and not place:
        raise ValueError("ROPOTrainer needs processing_class with a model of no folder; got none. Pass its tokenizer.")
    return model, tokenizer or load_tokenizer(place)


def _say_which_alpha(args: ROPOConfig) -> None:
    if args.alpha == "auto":
        logger.warning(
            "alpha is %g, the paper's: a training alone estimates nothing and filters nothing. Give a number, take "
            "loss='dpo', or leave both to run_rounds.",
            LOSSES[args.loss].default("alpha"),
        )


@cache
def _tell_once(sentence: str) -> None:
    """An audit makes a trainer for each fold."""
    logger.info(sentence)


def _without_the_smallest(gradient: Tensor) -> Tensor:
    return torch.where(gradient.abs() < _SMALLEST_GRADIENT, 0.0, gradient)


def turn_dropout_off(model: nn.Module) -> None:
    """A margin compares two probabilities of one text; dropout would make both depend on chance."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "attention_dropout", None), float):  # a number that is given to the kernel
            module.attention_dropout = 0.0  # type: ignore[assignment]


def margins_of(policy: PairLogps, reference: PairLogps | None, args: ROPOConfig) -> NDArray[np.float64]:
    """Margins as the chosen loss reads them, shape (pairs,), nats.

    Args:
        policy: Log-probabilities under the policy.
        reference: The same under the reference; not used by reference-free losses.
        args: `loss` and `beta` count.
    """
    if LOSSES[args.loss].per_token:
        return margin_per_token(policy, beta=args.beta).double().numpy()
    assert reference is not None  # noqa: S101 - `prepare` computes it for every loss that reads it
    return margin(policy, reference, beta=args.beta).double().numpy()


def losses_of(margins: NDArray[np.float64], args: ROPOConfig) -> NDArray[np.float64]:
    """Training loss at each margin, shape (pairs,)."""
    loss = bind_loss(args.loss, beta=args.beta, options=args.loss_options)
    values: NDArray[np.float64] = loss(torch.from_numpy(np.ascontiguousarray(margins))).numpy()
    return values


def batching(args: ROPOConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """How pairs are put into batches for scoring, as keyword arguments."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return {
        "pad_token_id": pad,
        "use_bf16": args.bf16,
        "max_tokens": args.max_tokens_per_batch,
    }
