"""`ROPOConfig`: every option of training, filtering and resampling, as flags, YAML and Python share them.

In: what the user wrote. Out: a configuration that is known to be valid before any model is loaded.
"""

import copy
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from transformers import IntervalStrategy, SchedulerType, TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.trainer_utils import HubStrategy, SaveStrategy
from transformers.training_args import OptimizerNames

from ropo.endpoint import check_key, check_url
from ropo.judge.endpoint import ON_FAILURE
from ropo.judge.make import JUDGES, judge_options
from ropo.losses import LOSSES, bind_loss
from ropo.noise.decide import RULES
from ropo.options import check_choice, check_folder, check_keys, check_types, choices_of, read_object
from ropo.resample.select import SELECTION_RULES, Guards
from ropo.sampling.engine import Sampling
from ropo.sampling.engines import ENGINES, engine_options

# Options of single losses. `None` means the default of the loss; a value that the chosen loss ignores is an error.
LOSS_OPTIONS = (
    "alpha", "gamma", "flip_rate", "target_margin", "beta_prime", "holder_gamma", "reliability", "focal_gamma",
    "max_weight", "mean_target_margin", "evenness", "num_dropped", "direction_temperature", "tie_temperature",
    "correction_warmup", "correction_max", "correction_power",
)  # fmt: skip
_OF_RESAMPLING = (
    "temperature", "top_p", "sample_from", "selection_rule", "max_abs_margin", "max_length_ratio", "max_repetition",
    "max_copies", "max_resampled_share", "resampled_weight", "resampled_decay",
)  # fmt: skip
TEXT_OR_NUMBER = ("alpha", "rho")  # or the text "auto"
ROUND_STARTS = ("restart", "carry_on")
SAMPLE_FROM = ("reference", "policy")
ON_BAD_ROWS = ("refuse", "skip")
SCORERS: Mapping[str, str] = MappingProxyType(
    {
        "features": "linear models on what the reference's forward pass reads of each pair, in seconds",
        "models": "models trained on the other folds, thorough and slow",
    }
)

# What `transformers` takes of the options that are its own, or finds wrong only when the training begins.
_CHOICES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "round_start": ROUND_STARTS,
        "on_bad_rows": ON_BAD_ROWS,
        "scorer": tuple(SCORERS),
        "selection_rule": tuple(SELECTION_RULES),
        "sample_from": SAMPLE_FROM,
        "train_sampling_strategy": ("random", "sequential", "group_by_length", "batch_rebalance"),
        "lr_scheduler_type": choices_of(SchedulerType),
        "optim": choices_of(OptimizerNames),
        "save_strategy": choices_of(SaveStrategy),
        "eval_strategy": choices_of(IntervalStrategy),
        "logging_strategy": choices_of(IntervalStrategy),
        "hub_strategy": choices_of(HubStrategy),
        "dataloader_multiprocessing_context": ("fork", "spawn", "forkserver"),
    }
)
# Options that hold named values: whether a JSON file may be named, and the names that are read, where these are known.
_FOR_CHECKPOINTS = (
    "use_reentrant", "preserve_rng_state", "determinism_check", "debug", "early_stop", "context_fn", "every_n_layers",
    "offload",
)  # fmt: skip
_OBJECTS: Mapping[str, tuple[bool, tuple[str, ...]]] = MappingProxyType(
    {
        "lr_scheduler_kwargs": (False, ()),
        "activation_checkpointing_kwargs": (False, _FOR_CHECKPOINTS),
        "gradient_checkpointing_kwargs": (False, _FOR_CHECKPOINTS),
        "liger_kernel_config": (False, ()),
        "accelerator_config": (True, tuple(AcceleratorConfig.__dataclass_fields__)),
        "fsdp_config": (True, ()),
        "deepspeed": (True, ()),
    }
)
# The smallest and the largest value of each number that must lie between two; None: no bound.
_BOUNDS: Mapping[str, tuple[float, float | None]] = MappingProxyType(
    {
        "rounds": (1, None),
        "max_length": (2, None),
        "num_candidates": (0, None),
        "num_folds": (0, None),
        "max_new_tokens": (1, None),
        "max_copies": (1, None),
        "max_repetition": (0, 1),
        "resampled_weight": (0, 1),
        "resampled_decay": (0, 1),
        "per_device_train_batch_size": (1, None),
        "per_device_eval_batch_size": (1, None),
        "gradient_accumulation_steps": (1, None),
        "eval_accumulation_steps": (1, None),
        "num_train_epochs": (0, 10_000),
        "max_steps": (-1, 2**31 - 1),
        "warmup_steps": (0, None),
        "learning_rate": (0, None),
        "weight_decay": (0, None),
        "max_grad_norm": (0, None),
        "neftune_noise_alpha": (0, None),
        "eval_delay": (0, None),
        "save_total_limit": (1, None),
        "seed": (0, None),
        "data_seed": (0, 2**32 - 1),
        "dataloader_num_workers": (0, None),
        "dataloader_prefetch_factor": (1, None),
        "ddp_bucket_cap_mb": (1, None),
        "ddp_timeout": (1, None),
    }
)
LIGER_LOSSES = ("cross_entropy", "fused_linear_cross_entropy")  # kernels that no loss of preferences can use
_ABOVE_ZERO = (
    "temperature", "top_p", "max_abs_margin", "max_length_ratio", "max_resampled_share", "logging_steps", "save_steps",
    "eval_steps", "adam_epsilon",
)  # fmt: skip


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class ROPOConfig(TrainingArguments):
    """Options of one alignment run; those of `transformers.TrainingArguments` are all there too.

    Raises:
        ValueError: If an option is out of range, unknown, or ignored by the chosen loss.
    """

    # Defaults of `TrainingArguments` that differ here.
    learning_rate: float = _option(
        1e-6, "Peak learning rate. Usual 5e-7 to 5e-6 for a whole model, 1e-5 to 1e-4 for LoRA."
    )
    num_train_epochs: float = _option(1.0, "Passes over the pairs in each round.")
    warmup_steps: float = _option(0.1, "Steps of warm-up, or their share of all steps if below 1.")
    lr_scheduler_type: str = _option("cosine", "How the learning rate falls.")
    logging_steps: float = _option(10, "Steps between two lines of the training log.")
    logging_first_step: bool = _option(default=True, text="Log the first step too: its loss is known in advance.")
    save_strategy: str = _option("epoch", "When to write a checkpoint: no, steps, epoch.")
    save_total_limit: int | None = _option(1, "Checkpoints kept in a training stage; they go when the stage is done.")
    train_sampling_strategy: str = _option(
        "group_by_length", "random, sequential, batch_rebalance or group_by_length (fastest)."
    )
    disable_tqdm: bool | None = _option(default=False, text="Show no progress bar in training.")
    remove_unused_columns: bool = _option(default=False, text="Kept for `transformers`; pairs are not columns.")

    liger_kernel_config: dict[str, Any] | str | None = field(  # type: ignore[assignment] # as text on a command line
        default=None,
        metadata={"help": "Which of Liger's kernels to take, as JSON of true and false; never its losses of tokens."},
    )

    # The loss.
    loss: str = _option("ropo", "Loss of the training stages: one of the names that `ropo losses` lists.")
    beta: float = _option(0.3, "Strength of the pull to the reference, per nat. Usual 0.01-0.5.")
    alpha: str | None = _option(
        None,
        "ropo, ropo_v1: weight of the noise-tolerant part, or auto (ropo's default): 0, DPO on what is kept.",
    )
    gamma: float | None = _option(None, "ropo_v1: weight of the DPO part.")
    flip_rate: float | None = _option(None, "cdpo, rdpo, forward_corrected: share of labels assumed wrong, [0, 0.5).")
    target_margin: float | None = _option(None, "simpo: margin to reach, nats per token times beta.")
    beta_prime: float | None = _option(None, "dr_dpo: temperature over the pairs of a batch.")
    holder_gamma: float | None = _option(None, "holder: how fast contradicted pairs lose weight.")
    reliability: float | None = _option(None, "re_po: share of labels believed right at the start.")
    focal_gamma: float | None = _option(None, "focalpo: how fast contradicted pairs lose weight; the paper uses 0.05.")
    max_weight: float | None = _option(None, "clipped: the largest weight of a pair, between 0 and 1.")
    mean_target_margin: float | None = _option(None, "gamma_po: mean of the pairs' target margins, nats.")
    evenness: float | None = _option(None, "gamma_po: how strongly target margins are held together.")
    num_dropped: int | None = _option(
        None, "rappo: pairs dropped at each step, of those that the reference contradicts."
    )
    direction_temperature: float | None = _option(
        None, "plc_dpo: smaller tells right labels from flipped ones more sharply."
    )
    tie_temperature: float | None = _option(None, "plc_dpo: smaller calls fewer pairs ties.")
    correction_warmup: float | None = _option(None, "plc_dpo: share of training before labels are corrected.")
    correction_max: float | None = _option(
        None, "plc_dpo: largest share of the corrected loss, reached at the end of training."
    )
    correction_power: float | None = _option(None, "plc_dpo: larger corrects only what is sure.")

    # The data.
    max_length: int = _option(1024, "Most tokens of prompt and one response together; longer responses lose their end.")
    max_tokens_per_batch: int | None = _option(
        None,
        "Most tokens in one forward pass, each prompt counted once. A larger training batch is taken in pieces; the "
        "pairs of a step and their loss stay the same. Default in training: 2048 on a CPU, no limit on a GPU; in "
        "scoring, which never takes more: 4096 and 32768.",
    )
    on_bad_rows: str = _option("refuse", "What to do with rows that cannot be read: refuse, or skip and count them.")
    reference_cache_dir: str | None = _option(
        None, "Where reference log-probs are kept. Default: in the output folder."
    )

    # The rounds.
    rounds: int = _option(1, "Rounds of train, score, decide, resample. Resampling needs two or more.")
    round_start: str = _option("restart", "Each round's model: restart from the given one, or carry_on with the last.")
    rho: str = _option("auto", "Share of pairs to filter out, 0 to 0.5, or auto: what the estimate says.")
    num_folds: int = _option(
        5,
        "Parts of the data, each judged by what was learned from the others; 0: no audit, each round filters by the "
        "trained model's own margins.",
    )
    scorer: str = _option(
        "features",
        "What gives the margins that an audit judges labels by: "
        + ", ".join(f"{name} ({meaning})" for name, meaning in SCORERS.items())
        + ".",
    )
    length_is_evidence: bool = _option(
        False,  # noqa: FBT003
        "Let a pair be judged by the lengths of its responses, too; scorer features only.",
    )
    audit_from: str | None = _option(
        None,
        "Output folder of an audit of the same pairs by the same model: its margins are read instead of training.",
    )
    decision_rule: str = _option(
        "auto",
        "How the pairs to filter out are chosen: " + ", ".join(RULES) + "; or auto: lowest_loss, which takes away just "
        "that share, where rho is given or a filter of all that is contradicted helps; else threshold.",
    )

    # Resampling.
    num_candidates: int = _option(0, "Responses sampled for each dropped prompt, for example 4; 0: no resampling.")
    max_new_tokens: int = _option(256, "Longest sampled response.")
    temperature: float = _option(1.0, "Sampling temperature.")
    top_p: float = _option(1.0, "Nucleus sampling: smallest set of tokens with this much probability.")
    generation_engine: str = _option(
        "transformers",
        "What samples: " + ", ".join(f"{name} ({spec.meaning})" for name, spec in ENGINES.items()) + ".",
    )
    generation_url: str | None = _option(
        None, "server: base address, like http://localhost:8000/v1. Prompts are sent there, as token ids."
    )
    generation_model: str | None = _option(
        None, "server: name of the model there: the one that is to answer, or at least one with its tokens."
    )
    generation_api_key_env: str | None = _option(
        None,
        "server: environment variable that holds the key; default OPENAI_API_KEY. No key is sent if it is not set.",
    )
    sample_from: str = _option(
        "reference", "Model to sample from: the reference, whose samples the policy judges best, or the policy itself."
    )
    selection_rule: str = _option("min_loss", "How new pairs are chosen: " + ", ".join(SELECTION_RULES) + ".")
    max_abs_margin: float | None = _option(
        None, "Guard: new pairs with a larger absolute margin are refused as self-confirming. Default: none is."
    )
    max_length_ratio: float = _option(3.0, "Guard: most that one response of a new pair may be longer than the other.")
    max_repetition: float = _option(0.5, "Guard: largest share of a response's three-word sequences that are repeats.")
    max_copies: int = _option(10, "Guard: most prompts that may be answered by one and the same sampled text.")
    max_resampled_share: float = _option(0.5, "Guard: most new pairs in a round, as a share of the kept ones.")
    resampled_weight: float = _option(1.0, "Weight of a new pair in training.")
    resampled_decay: float = _option(0.5, "What a new pair's weight is multiplied by in every further round.")

    # A judge, optional.
    judge: str = _option(
        "none",
        "Who is asked about pairs that the rules cannot settle: none, "
        + ", ".join(f"{name} ({spec.meaning})" for name, spec in JUDGES.items())
        + ".",
    )
    judge_model: str | None = _option(None, "reward_model: folder or hub id; endpoint: name of the model there.")
    judge_url: str | None = _option(
        None, "endpoint: base address, like http://localhost:8000/v1. Prompts and responses are sent there."
    )
    judge_api_key_env: str | None = _option(
        None,
        "endpoint: environment variable that holds the key; default OPENAI_API_KEY. No key is sent if it is not set.",
    )
    judge_on_failure: str | None = _option(
        None,
        "endpoint: what to do when it fails for good: go_on without it and warn (default), or stop; the same command "
        "then goes on from what was judged.",
    )

    def __post_init__(self) -> None:
        self._check_values()
        try:
            super().__post_init__()  # type: ignore[no-untyped-call]
        except ValueError as error:
            if "use_cpu" not in str(error):
                raise
            raise ValueError("bf16 needs a GPU; got none. Add --use_cpu to train on a CPU.") from None
        if self.fp16 and self.device.type == "cpu":
            raise ValueError("fp16 needs a GPU; got a CPU. Use bf16 with use_cpu, or leave both out.")
        if self.use_liger_kernel:
            given = self.liger_kernel_config or {}
            self.liger_kernel_config = {**dict.fromkeys(LIGER_LOSSES, False), **dict(given)}  # type: ignore[arg-type]
        self._check_filter()
        self._check_numbers()
        self._check_audit()
        if self.num_candidates and self.rounds == 1:
            raise ValueError(
                f"num_candidates needs rounds of 2 or more; got {self.num_candidates} with one round. What is "
                "resampled is trained on in the next round."
            )
        self._check_judge()
        self._check_generation()
        if self.dataloader_pin_memory and not torch.cuda.is_available():
            self.dataloader_pin_memory = False  # there is nothing to pin for
        if self.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor needs 0; got {self.label_smoothing_factor}. It belongs to language-model "
                "training; for preference labels use --loss cdpo --flip_rate."
            )
        self._check_losses()
        if self.fixed_rho and not self.num_folds and self.rounds == 1:
            raise ValueError(
                f"rho {self.rho} needs margins to filter by before the last training; got num_folds 0 and one round. "
                "Use rounds of 2 or more, or num_folds of 2 or more."
            )

    def _check_values(self) -> None:
        """Each option for itself: its type, its range, its table; before `TrainingArguments` computes with them."""
        check_types(self, either=TEXT_OR_NUMBER)
        for name, choices in _CHOICES.items():
            if getattr(self, name) is not None:
                check_choice(name, getattr(self, name), choices)
        for name, (may_be_file, keys) in _OBJECTS.items():
            value = read_object(name, getattr(self, name), may_be_file=may_be_file)
            setattr(self, name, value)
            if keys and isinstance(value, dict):
                check_keys(name, value, keys)
        if self.output_dir is not None:
            check_folder("output_dir", self.output_dir)
        self._check_ranges()

    def _check_ranges(self) -> None:
        for name, (lowest, highest) in _BOUNDS.items():
            value = getattr(self, name)
            if value is None or (lowest <= value and (highest is None or value <= highest)):
                continue
            needs = f"a number from {lowest} to {highest}" if highest is not None else f"{lowest} or more"
            raise ValueError(f"{name} needs {needs}; got {value}.")
        for name in _ABOVE_ZERO:
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"{name} needs a number above 0; got {getattr(self, name)}.")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} needs a number in [0, 1); got {getattr(self, name)}.")

    def _check_numbers(self) -> None:
        if self.seed + self.rounds > 2**32:  # each round has its own seed
            raise ValueError(f"seed needs a number below {2**32 - self.rounds + 1}; got {self.seed}.")
        if self.num_train_epochs <= 0 and self.max_steps <= 0:
            raise ValueError(f"num_train_epochs needs a number above 0; got {self.num_train_epochs}.")
        if self.max_steps == 0:
            raise ValueError("max_steps needs 1 or more, or -1 for as many as the epochs have; got 0.")
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns needs false; got true. A row of training is a place, not columns.")
        if self.dataloader_persistent_workers and not self.dataloader_num_workers:
            raise ValueError("dataloader_persistent_workers needs dataloader_num_workers of 1 or more; got 0.")

    def _check_generation(self) -> None:
        """An engine can run here and has what it needs, and no option is ignored or holds a key."""
        check_engine(self)
        engine = self.generation_engine
        if engine != "transformers" and not self.num_candidates:
            raise ValueError(
                f"generation_engine {engine} needs something to sample; got num_candidates 0. Set it, or leave the "
                "engine out."
            )
        Sampling(  # refuses what it could not sample by
            num_candidates=max(self.num_candidates, 1),
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
        )
        if engine == "server" and self.sample_from == "policy":
            raise ValueError(
                "sample_from policy needs an engine that loads the model in training; got generation_engine server, "
                "which serves a fixed one. Leave sample_from out, or use another engine."
            )
        ENGINES[engine].check(self.world_size)

    def _check_losses(self) -> None:
        self.alpha = "auto" if self.alpha is None and self.loss == "ropo" else self.alpha
        self.alpha = None if self.alpha is None else str(self.alpha)
        if self.alpha == "auto" and self.loss != "ropo":
            raise ValueError(f"alpha needs a number for {self.loss}; got 'auto'. Only ropo chooses it by the noise.")
        if self.alpha not in (None, "auto"):
            try:
                float(self.alpha)
            except ValueError:
                raise ValueError(f"alpha needs a number or 'auto'; got {self.alpha!r}.") from None
        bind_loss(self.loss, beta=self.beta, options=self.loss_options)
        if self.decision_rule != "auto" and RULES[self.decision_rule].needs_checks and not self.needs_audit:
            raise ValueError(
                f"decision_rule {self.decision_rule} needs held-out margins; got num_folds={self.num_folds} and "
                f"rho={self.rho}. Use num_folds of 2 or more and a rho above 0, or another rule."
            )
        self._check_pieces()
        if LOSSES[self.loss].needs_whole_batch and self.gradient_accumulation_steps > 1:
            raise ValueError(
                f"{self.loss} needs the whole batch at once; got gradient_accumulation_steps="
                f"{self.gradient_accumulation_steps}. Set it to 1 and raise per_device_train_batch_size."
            )

    def _check_pieces(self) -> None:
        """A batch may be taken in pieces only where every process may have a number of its own, and the loss allows."""
        if self.max_tokens_per_batch is None:
            return
        if self.max_tokens_per_batch < 1:
            raise ValueError(f"max_tokens_per_batch needs 1 or more; got {self.max_tokens_per_batch}.")
        if not LOSSES[self.loss].allows_pieces:
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

    def _check_audit(self) -> None:
        if self.num_folds == 1:
            raise ValueError(
                "num_folds needs 2 or more, or 0 for none; got 1. One fold would leave nothing to train on."
            )
        if self.length_is_evidence and not (self.scorer == "features" and self.num_folds):
            raise ValueError(
                f"length_is_evidence needs an audit by scorer features; got scorer {self.scorer} and num_folds "
                f"{self.num_folds}. Leave it out, or change them."
            )

    def _check_judge(self) -> None:
        """A judge has what it needs and something to do, and no option is ignored or holds a key."""
        check_judge(self)
        takes_judge = self.decision_rule != "auto" and RULES[self.decision_rule].takes_judge
        if self.judge != "none" and not takes_judge and not self.num_candidates:
            raise ValueError(
                f"judge {self.judge} needs something to settle; got decision_rule {self.decision_rule} and "
                "num_candidates 0. Use decision_rule hard_or_noisy, or resampling."
            )

    def _check_filter(self) -> None:
        """A share that was given is taken away; one that follows the estimate is a ceiling."""
        self.rho = str(self.rho)
        if self.rho != "auto":
            self._check_rho()
        if self.decision_rule != "auto":
            check_choice("decision_rule", self.decision_rule, RULES)

    def _check_rho(self) -> None:
        try:
            is_valid = 0 <= float(self.rho) <= 0.5
        except ValueError:
            is_valid = False
        if not is_valid:
            raise ValueError(
                f"rho needs 'auto' or a share in [0, 0.5]; got {self.rho!r}. Past a half, labels mean the opposite."
            )

    def __getstate__(self) -> dict[str, Any]:
        """Without access tokens: `Trainer` pickles its options beside every model and checkpoint."""
        return {name: None if name.endswith("_token") else value for name, value in self.__dict__.items()}

    def __copy__(self) -> "ROPOConfig":
        """With everything: nothing is written."""
        made = object.__new__(type(self))
        made.__dict__.update(self.__dict__)
        return made

    def with_alpha(self, alpha: float) -> "ROPOConfig":
        """These options with α resolved; at 0 ROPO's loss is DPO's, exactly.

        Args:
            alpha: 0 or more; ignored by losses without it.
        """
        args = copy.copy(self)
        if args.loss == "ropo":
            args.alpha = str(alpha)
            if alpha == 0:
                args.loss, args.alpha = "dpo", None
        return args

    @property
    def guards(self) -> Guards:
        """What every candidate must pass in resampling."""
        return Guards(
            max_abs_margin=math.inf if self.max_abs_margin is None else self.max_abs_margin,
            max_length_ratio=self.max_length_ratio,
            max_repetition=self.max_repetition,
            max_copies=self.max_copies,
            max_share=self.max_resampled_share,
        )

    @property
    def without_effect(self) -> list[str]:
        """Options of resampling that were given although nothing is sampled.

        Not an error: `--num_candidates 0` beside a recipe is how resampling is switched off.
        """
        defaults = ROPOConfig.__dataclass_fields__
        given = [name for name in _OF_RESAMPLING if getattr(self, name) != defaults[name].default]
        return [] if self.num_candidates else given

    @property
    def loss_options(self) -> dict[str, float]:
        """The options of single losses that were given, by name."""
        given = {name: getattr(self, name) for name in LOSS_OPTIONS}
        return {name: float(value) for name, value in given.items() if value not in (None, "auto")}

    def to_dict(self) -> dict[str, Any]:
        """All options by name, as plain values."""
        plain: dict[str, Any] = super().to_dict()  # type: ignore[no-untyped-call]
        return plain

    @property
    def fixed_alpha(self) -> float | None:
        """α as given, or None when it follows the noise; 0 for losses without it."""
        if self.alpha == "auto":
            return None
        return 0.0 if self.alpha is None else float(self.alpha)

    @property
    def reads_features(self) -> bool:
        """Whether an audit judges by what the reference pass reads of each pair, and reads it itself."""
        return self.scorer == "features" and self.audit_from is None

    @property
    def needs_audit(self) -> bool:
        """Whether anything depends on held-out margins."""
        return bool(self.num_folds) and (self.fixed_rho != 0.0 or self.alpha == "auto")

    @property
    def reads_reference(self) -> bool:
        """Whether the loss compares with the reference."""
        return LOSSES[self.loss].needs_reference

    @property
    def sharding(self) -> str:
        """Who shards the weights, by these options or by `accelerate launch`: none, fsdp or deepspeed."""
        for name in ("fsdp", "deepspeed"):
            if getattr(self, name) or os.environ.get(f"ACCELERATE_USE_{name.upper()}", "").lower() in ("1", "true"):
                return name
        return "none"

    @property
    def fixed_rho(self) -> float | None:
        """The share of pairs to filter out, or None when it follows the estimate."""
        return None if self.rho == "auto" else float(self.rho)


def check_engine(args: Any) -> None:
    """Check the options of an engine, and fill in what it can do without.

    Args:
        args: Options named as in `ROPOConfig`: `generation_engine` and those that engines take.

    Raises:
        ValueError: If one is unknown, missing, ignored by the engine, or holds a key.
    """
    check_choice("generation_engine", args.generation_engine, ENGINES)
    engine, spec = args.generation_engine, ENGINES[args.generation_engine]
    for name, takers in engine_options().items():
        if getattr(args, name) is not None and engine not in takers:
            raise ValueError(
                f"{name} needs generation_engine {' or '.join(takers)}; got generation_engine {engine}. Leave it "
                "out, or change the engine."
            )
    for name in spec.needs:
        if not getattr(args, name):
            raise ValueError(
                f"generation_engine {engine} needs {' and '.join(spec.needs)}; got no {name}. Add --{name}."
            )
    _fill_in(args, spec.takes)
    _check_access(args, "generation_url", "generation_api_key_env")


def check_judge(args: Any) -> None:
    """Check the options of a judge, and fill in what it can do without.

    Args:
        args: Options named as in `ROPOConfig`: `judge` and those that judges take.

    Raises:
        ValueError: If one is unknown, missing, ignored by the judge, or holds a key.
    """
    check_choice("judge", args.judge, ("none", *JUDGES))
    for name, takers in judge_options().items():
        if getattr(args, name) is not None and args.judge not in takers:
            raise ValueError(
                f"{name} needs judge {' or '.join(takers)}; got judge {args.judge}. Leave it out, or name one."
            )
    if args.judge == "none":
        return
    spec = JUDGES[args.judge]
    for name in spec.needs:
        if not getattr(args, name):
            raise ValueError(f"judge {args.judge} needs {' and '.join(spec.needs)}; got no {name}. Add --{name}.")
    _fill_in(args, spec.takes)
    if args.judge_on_failure is not None:
        check_choice("judge_on_failure", args.judge_on_failure, ON_FAILURE)
    _check_access(args, "judge_url", "judge_api_key_env")


def _fill_in(args: Any, defaults: Mapping[str, str]) -> None:
    for name, default in defaults.items():
        setattr(args, name, default if getattr(args, name) is None else getattr(args, name))


def _check_access(args: Any, url_option: str, key_option: str) -> None:
    """Options are logged and written; a key that was put here by mistake must not even be in the message."""
    url, variable = getattr(args, url_option), getattr(args, key_option)
    if variable and not re.fullmatch(r"[A-Z_][A-Z0-9_]{0,63}", variable):
        raise ValueError(
            f"{key_option} needs the name of an environment variable in capitals, like OPENAI_API_KEY; got "
            f"{len(variable)} other characters. Put the key into a variable and give its name."
        )
    if url is not None:
        check_url(url, what=url_option)
        check_key(url, variable, what=url_option)


def check_config(args: Any, *, taker: str) -> None:
    """Refuse the options of another trainer, which lack what is read here.

    Args:
        args: What was given.
        taker: Who was called.

    Raises:
        TypeError: If it is no `ROPOConfig`.
    """
    if not isinstance(args, ROPOConfig):
        raise TypeError(
            f"{taker} needs a ROPOConfig as args; got {type(args).__name__}. ROPOConfig takes all options of "
            "TrainingArguments, with loss and beta beside them."
        )
