"""The options of one training: the loss, the data, and all of `transformers.TrainingArguments`.

In: what the user wrote. Out: `TrainOptions`, known to be valid before any model is loaded.

The rules of options that `transformers` defines stand in one table, `OF_TRANSFORMERS`: what it takes although it means
nothing, or refuses only when the training begins, and what may change when a run is resumed.
"""

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Self

import torch
from transformers import IntervalStrategy, SchedulerType, TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.trainer_utils import HubStrategy, SaveStrategy
from transformers.training_args import OptimizerNames

from ropo.data.options import DataOptions
from ropo.losses import LOSSES
from ropo.losses.options import LossOptions, in_loss_args
from ropo.options import Rule, check_folder, check_options, choices_of, identifying, option

LIGER_LOSSES = ("cross_entropy", "fused_linear_cross_entropy")
"""Kernels that no loss of preferences can use."""

_FOR_CHECKPOINTS = (
    "use_reentrant", "preserve_rng_state", "determinism_check", "debug", "early_stop", "context_fn", "every_n_layers",
    "offload",
)  # fmt: skip
_FREE = Rule(identifies=False)

OF_TRANSFORMERS: Mapping[str, Rule] = MappingProxyType(
    {
        "train_sampling_strategy": Rule(choices=("random", "sequential", "group_by_length", "batch_rebalance")),
        "lr_scheduler_type": Rule(choices=choices_of(SchedulerType)),
        "lr_scheduler_kwargs": Rule(keys=()),
        "optim": Rule(choices=choices_of(OptimizerNames)),
        "hub_strategy": Rule(choices=choices_of(HubStrategy), identifies=False),
        "activation_checkpointing_kwargs": Rule(keys=_FOR_CHECKPOINTS),
        "gradient_checkpointing_kwargs": Rule(keys=_FOR_CHECKPOINTS),
        "liger_kernel_config": Rule(keys=()),
        "accelerator_config": Rule(keys=tuple(AcceleratorConfig.__dataclass_fields__), may_be_file=True),
        "fsdp_config": Rule(keys=(), may_be_file=True),
        "deepspeed": Rule(keys=(), may_be_file=True),
        "dataloader_multiprocessing_context": Rule(choices=("fork", "spawn", "forkserver")),
        "dataloader_prefetch_factor": Rule(low=1, identifies=False),
        "per_device_train_batch_size": Rule(low=1),
        "per_device_eval_batch_size": Rule(low=1),
        "gradient_accumulation_steps": Rule(low=1),
        "eval_accumulation_steps": Rule(low=1),
        "num_train_epochs": Rule(low=0, high=10_000),
        "max_steps": Rule(low=-1, high=2**31 - 1),
        "warmup_steps": Rule(low=0),
        "learning_rate": Rule(low=0),
        "weight_decay": Rule(low=0),
        "max_grad_norm": Rule(low=0),
        "adam_beta1": Rule(low=0, below=1),
        "adam_beta2": Rule(low=0, below=1),
        "adam_epsilon": Rule(above=0),
        "seed": Rule(low=0),
        "data_seed": Rule(low=0, high=2**32 - 1),
        "ddp_bucket_cap_mb": Rule(low=1),
        "ddp_timeout": Rule(low=1, identifies=False),
        # With another value of these the same numbers are computed.
        "logging_steps": Rule(above=0, identifies=False),
        "logging_strategy": Rule(choices=choices_of(IntervalStrategy), identifies=False),
        "save_steps": Rule(above=0, identifies=False),
        "eval_strategy": Rule(choices=choices_of(IntervalStrategy), identifies=False),
        "eval_steps": Rule(above=0, identifies=False),
        "eval_delay": Rule(low=0, identifies=False),
        "eval_on_start": _FREE,
        "save_strategy": Rule(choices=choices_of(SaveStrategy), identifies=False),
        "save_total_limit": Rule(low=1, identifies=False),
        "dataloader_num_workers": Rule(low=0, identifies=False),
        **dict.fromkeys(
            (
                "output_dir", "resume_from_checkpoint", "report_to", "run_name", "project", "disable_tqdm", "log_level",
                "log_level_replica", "logging_first_step", "hub_token", "push_to_hub",
                "hub_model_id", "hub_private_repo", "hub_revision", "local_rank", "do_train",
                "do_eval", "do_predict", "dataloader_persistent_workers", "dataloader_pin_memory", "log_on_each_node",
            ),
            _FREE,
        ),
    }
)  # fmt: skip
"""What is to be checked of the options of `TrainingArguments`, and which of them do not identify a run."""

# What users of TRL type, and what there is instead.
_IN_TRL = MappingProxyType(
    {
        "loss_type": "It is loss here.",
        "rpo_alpha": "It is sft_weight here.",
        "loss_weights": "It is sft_weight here, for an SFT term beside the loss; other losses are not added up.",
        "label_smoothing": "It is flip_rate here: --loss cdpo or rdpo with --loss_args flip_rate=NUMBER.",
        "max_prompt_length": "A prompt is never cut; max_length bounds prompt and response together.",
        "max_completion_length": "max_length bounds prompt and response together.",
        "precompute_ref_log_probs": "They are always computed first, once; leave it out.",
        "ref_model": "The model that is given is the reference; leave it out.",
        "torch_dtype": "It is dtype here.",
        "split": "It is dataset_split here.",
        "dataset_train_split": "It is dataset_split here.",
        "tokenizer": "It is processing_class here.",
    }
)


@dataclass
class TrainOptions(LossOptions, DataOptions, TrainingArguments):
    """Options of one training; those of `transformers.TrainingArguments` are all there too.

    Raises:
        ValueError: If an option is out of range, unknown, or ignored by the chosen loss.
    """

    library_rules: ClassVar[Mapping[str, Rule]] = OF_TRANSFORMERS

    # Defaults of `TrainingArguments` that differ here.
    learning_rate: float = option(
        1e-6, "Peak learning rate. Usual 5e-7 to 5e-6 for a whole model, 1e-5 to 1e-4 for LoRA."
    )
    num_train_epochs: float = option(1.0, "Passes over the pairs in each round.")
    warmup_steps: float = option(0.1, "Steps of warm-up, or their share of all steps if below 1.")
    lr_scheduler_type: str = option("cosine", "How the learning rate falls.")
    logging_steps: float = option(10, "Steps between two lines of the training log.")
    logging_first_step: bool = option(default=True, text="Log the first step too: its loss is known in advance.")
    save_strategy: str = option("epoch", "When to write a checkpoint: no, steps, epoch.")
    save_total_limit: int | None = option(1, "Checkpoints kept in a training stage; they go when the stage is done.")
    train_sampling_strategy: str = option(
        "group_by_length", "random, sequential, batch_rebalance or group_by_length (fastest)."
    )
    disable_tqdm: bool | None = option(default=False, text="Show no progress bar in training.")
    remove_unused_columns: bool = option(default=False, text="Kept for `transformers`; pairs are not columns.")
    liger_kernel_config: dict[str, Any] | str | None = option(  # type: ignore[assignment] # as text on a command line
        None, "Which of Liger's kernels to take, as JSON of true and false; never its losses of tokens."
    )

    # Who lowers the first for want of memory resumes from the last checkpoint; the last digits may change.
    max_tokens_per_batch: Annotated[int | None, Rule(low=1, identifies=False)] = option(
        None,
        "Most tokens in one forward pass, each prompt counted once. A larger training batch is taken in pieces; the "
        "pairs of a step and their loss stay the same. Default in training: 2048 on a CPU, no limit on a GPU; in "
        "scoring, which never takes more: 4096 and 32768.",
    )
    router_aux_loss_coef: Annotated[float | None, Rule(low=0)] = option(
        None,
        "Weight of the load-balancing loss of a mixture-of-experts model. Default: that of its config.json where "
        "output_router_logits is true, else 0.",
    )
    reference_cache_dir: Annotated[str | None, Rule(identifies=False)] = option(
        None, "Where reference log-probs are kept. Default: in the output folder."
    )

    def __post_init__(self) -> None:
        check_options(self)  # before `TrainingArguments` computes with them
        if self.output_dir is not None:
            check_folder("output_dir", self.output_dir)
        self._check_devices()
        self.check_loss()
        self._check_steps()
        self._check_batches()

    def _check_devices(self) -> None:
        """Let `TrainingArguments` find the device, and refuse what this one cannot do."""
        try:
            TrainingArguments.__post_init__(self)
        except ValueError as error:
            if "use_cpu" not in str(error):
                raise
            raise ValueError("bf16 needs a GPU; got none. Add --use_cpu to train on a CPU.") from None
        if self.fp16 and self.device.type == "cpu":
            raise ValueError("fp16 needs a GPU; got a CPU. Use bf16 with use_cpu, or leave both out.")
        if self.use_liger_kernel:
            given = self.liger_kernel_config or {}
            self.liger_kernel_config = {**dict.fromkeys(LIGER_LOSSES, False), **dict(given)}  # type: ignore[arg-type]
        if self.dataloader_pin_memory and not torch.cuda.is_available():
            self.dataloader_pin_memory = False  # there is nothing to pin for

    def _check_steps(self) -> None:
        if self.num_train_epochs <= 0 and self.max_steps <= 0:
            raise ValueError(f"num_train_epochs needs a number above 0; got {self.num_train_epochs}.")
        if self.max_steps == 0:
            raise ValueError("max_steps needs 1 or more, or -1 for as many as the epochs have; got 0.")
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns needs false; got true. A row of training is a place, not columns.")
        if self.dataloader_persistent_workers and not self.dataloader_num_workers:
            raise ValueError("dataloader_persistent_workers needs dataloader_num_workers of 1 or more; got 0.")
        if self.neftune_noise_alpha:
            raise ValueError(
                f"neftune_noise_alpha needs to be left out; got {self.neftune_noise_alpha:g}. Noise on a policy's "
                "embeddings would make its margins depend on chance."
            )
        if self.data_seed is not None and self.train_sampling_strategy != "random":
            raise ValueError(
                f"data_seed needs train_sampling_strategy random; got {self.train_sampling_strategy}, whose order "
                "follows seed. Leave it out, or change the other."
            )
        if self.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor needs 0; got {self.label_smoothing_factor}. It belongs to language-model "
                "training; for preference labels use --loss cdpo --loss_args flip_rate=NUMBER."
            )

    def _check_batches(self) -> None:
        """A batch may be taken in pieces only where every process may have a number of its own, and the loss allows."""
        spec = LOSSES[self.loss]
        if spec.needs_whole_batch and self.gradient_accumulation_steps > 1:
            raise ValueError(
                f"{self.loss} needs the whole batch at once; got gradient_accumulation_steps="
                f"{self.gradient_accumulation_steps}. Set it to 1 and raise per_device_train_batch_size."
            )
        if self.max_tokens_per_batch is None:
            return
        if spec.needs_whole_batch:
            raise ValueError(
                f"{self.loss} needs the whole batch at once; got max_tokens_per_batch={self.max_tokens_per_batch}. "
                "Leave it out and lower per_device_train_batch_size."
            )
        if self.sharding != "none":
            raise ValueError(
                "max_tokens_per_batch needs processes that hold the whole model; got fsdp or deepspeed, where all must "
                "make the same number of forward passes. Lower per_device_train_batch_size and raise "
                "gradient_accumulation_steps."
            )

    def __getstate__(self) -> dict[str, Any]:
        """Without access tokens: `Trainer` pickles its options beside every model and checkpoint."""
        return {name: None if name.endswith("_token") else value for name, value in self.__dict__.items()}

    def __copy__(self) -> Self:
        """With access tokens: nothing is written."""
        made = object.__new__(type(self))
        made.__dict__.update(self.__dict__)
        return made

    def of_stage(
        self,
        folder: Path,
        *,
        seed: int | None = None,
        num_train_epochs: float | None = None,
        per_device_eval_batch_size: int | None = None,
        evaluates: bool = True,
    ) -> Self:
        """The options of one training of a run.

        `Trainer` reads from its options where it writes checkpoints and how long it trains, so every training has
        options of its own. Nothing else differs from those of the run.

        Args:
            folder: For checkpoints.
            seed: Random seed; by default the run's, and so on.
            num_train_epochs: Passes over the pairs.
            per_device_eval_batch_size: Pairs in a batch of evaluation.
            evaluates: Whether an evaluation set is scored when these options say; else only when the trainer is asked.

        Returns:
            The options; these stay as they are.
        """
        changed = {
            "output_dir": str(folder),
            "seed": seed,
            "num_train_epochs": num_train_epochs,
            "per_device_eval_batch_size": per_device_eval_batch_size,
            **({} if evaluates else {"eval_strategy": "no", "eval_on_start": False}),
        }
        made = copy.copy(self)  # `replace` would look for devices again
        made.push_to_hub = False  # checkpoints stay here
        made.__dict__.update({name: value for name, value in changed.items() if value is not None})
        # DeepSpeed's settings are filled in by the training that reads them; two of them may be one object.
        names = [name for name in ("deepspeed_plugin", "hf_deepspeed_config") if name in vars(self)]
        made.__dict__.update(copy.deepcopy({name: getattr(self, name) for name in names}))
        return made

    def to_dict(self) -> dict[str, Any]:
        """All options by name, as plain values."""
        plain: dict[str, Any] = super().to_dict()  # type: ignore[no-untyped-call]
        return plain

    def identity(self) -> dict[str, Any]:
        """The options with which another value makes another run, by name, as plain values."""
        plain = self.to_dict()
        return {name: plain[name] for name in identifying(self)}

    @property
    def sharding(self) -> str:
        """Who shards the weights, by these options or by `accelerate launch`: none, fsdp or deepspeed."""
        for name in ("fsdp", "deepspeed"):
            if getattr(self, name) or os.environ.get(f"ACCELERATE_USE_{name.upper()}", "").lower() in ("1", "true"):
                return name
        return "none"


def instead_of(name: str) -> str:
    """A sentence on where an option is that goes by another name here, in TRL or in earlier versions; or nothing.

    Args:
        name: What was written.

    Returns:
        " It is ... here." or the like, or an empty string.

    Examples:
        >>> instead_of("loss_type"), instead_of("holder_gamma")
        (' It is loss here.', ' It is in loss_args: --loss_args holder_gamma=NUMBER.')
    """
    return f" {_IN_TRL[name]}" if name in _IN_TRL else in_loss_args(name)


def renamed() -> dict[str, str]:
    """What `instead_of` says, of every name that it knows."""
    names = {*_IN_TRL, *(name for spec in LOSSES.values() for name in spec.params if name != "alpha")}
    return {name: instead_of(name).strip() for name in sorted(names)}


def check_kind(args: Any, kind: type, *, taker: str) -> None:
    """Refuse the options of another trainer, which lack what is read here.

    Args:
        args: What was given.
        kind: What is read.
        taker: Who was called.

    Raises:
        TypeError: If it is something else.
    """
    if not isinstance(args, kind):
        raise TypeError(
            f"{taker} needs a ROPOConfig as args; got {type(args).__name__}. ROPOConfig takes all options of "
            "TrainingArguments, with loss and beta beside them."
        )
