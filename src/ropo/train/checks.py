"""What a training cannot do, found before anything is read.

In: a `TrainOptions`. Out: nothing, or one sentence on the option that stands in the way.

The one idea: optimizer and schedule are made once of a single number, with the options that the training will make
them with. So what a library refuses is known in a millisecond, and not after the reference was scored.
"""

import logging
import math
from typing import Any

import torch
from torch import nn
from transformers import SchedulerType, Trainer, get_scheduler
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.training_args import OptimizerNames
from transformers.utils.import_utils import is_liger_kernel_available

from ropo.losses import LOSSES
from ropo.options import short
from ropo.spelling import did_you_mean
from ropo.train.launch import refuse_other_launch
from ropo.train.options import LIGER_LOSSES, TrainOptions
from ropo.train.sharding import check_sharding

logger = logging.getLogger(__name__)

AFTER_EVALUATION = ("reduce_lr_on_plateau", "greedy")
"""Schedules whose steps need the result of an evaluation."""

_NUM_STEPS = 8  # that a schedule is tried for
_WITHOUT_OPTIONS = ("constant", "constant_with_warmup")  # schedules that read no `lr_scheduler_kwargs`


def check_training(args: TrainOptions) -> None:
    """Refuse what `Trainer` would find out only when the reference has been scored.

    Args:
        args: Options.

    Raises:
        ValueError: If there are several GPUs in this process, a package or a device is missing, optimizer or
            schedule do not take their options, or the model would be compiled.
    """
    if args.n_gpu > 1:  # `Trainer` would split every batch among them, slowly and without our batches
        raise ValueError(
            f"Training needs one process per GPU; got {args.n_gpu} GPUs in this one. Add --accelerate_config ddp (or "
            "start it with `accelerate launch`), or hide the others with CUDA_VISIBLE_DEVICES."
        )
    _check_dealing(args)
    refuse_other_launch(args)
    check_sharding(args)
    _check_equal_batches(args)
    _check_loggers(args)
    _check_liger(args)
    _check_optimizer(args)
    _check_scheduler(args)
    if args.torch_compile:
        raise ValueError(
            "torch_compile needs a model that is run as it is; got one that reads a prompt once for two responses, "
            "which it cannot trace. Leave out torch_compile, its backend and its mode."
        )


def check_warmup(args: TrainOptions, *, num_pairs: int) -> None:
    """Refuse a warm-up that outlasts the training.

    Args:
        args: Options.
        num_pairs: That the shortest training reads.

    Raises:
        ValueError: If the learning rate would never reach `learning_rate`.
    """
    at_once = args.per_device_train_batch_size * max(1, args.world_size)
    if args.dataloader_drop_last and num_pairs < at_once:
        raise ValueError(
            f"dataloader_drop_last needs pairs for a whole batch; got {num_pairs} for {at_once}. Leave it out, or "
            "lower per_device_train_batch_size."
        )
    per_step = at_once * args.gradient_accumulation_steps
    num_steps = args.max_steps if args.max_steps > 0 else math.ceil(num_pairs / per_step * args.num_train_epochs)
    if args.warmup_steps >= max(1, num_steps) and args.warmup_steps > 1:
        raise ValueError(
            f"warmup_steps needs fewer than the {num_steps} steps of the shortest training; got "
            f"{args.warmup_steps:g}, with which the learning rate never reaches learning_rate. Give a share below 1."
        )


def _check_equal_batches(args: TrainOptions) -> None:
    spec = LOSSES[args.loss]
    is_rebalanced = args.train_sampling_strategy == "batch_rebalance" and args.world_size > 1
    if is_rebalanced and (spec.needs_whole_batch or "moments" in spec.inputs):
        raise ValueError(
            f"{args.loss} needs as many pairs in each process, whose margins it collects; got train_sampling_strategy "
            "batch_rebalance. Set it to group_by_length."
        )


def _check_dealing(args: TrainOptions) -> None:
    """Each process is dealt batches of its own, and as many as the others."""
    given, usual = args.accelerator_config, {"split_batches": False, "dispatch_batches": None, "even_batches": True}
    for name, value in usual.items():
        if args.world_size > 1 and (found := getattr(given, name, value)) not in (value, value or False):
            raise ValueError(
                f"accelerator_config needs {name} {value} with several processes, which are dealt batches of their own "
                f"and as many each; got {found}. Leave it out."
            )


def _check_loggers(args: TrainOptions) -> None:
    for name in args.report_to or []:
        if name not in INTEGRATION_TO_CALLBACK:
            raise ValueError(
                f"report_to needs one of none, all, {', '.join(INTEGRATION_TO_CALLBACK)}; got {name!r}."
                f"{did_you_mean(name, INTEGRATION_TO_CALLBACK)}"
            )
        # The two that `transformers` does not list when they are there.
        if name not in ("azure_ml", "flyte", *get_available_reporting_integrations()):
            raise ValueError(f"report_to {name} needs its package; got none. Install it, or leave report_to out.")


def _check_liger(args: TrainOptions) -> None:
    given = args.liger_kernel_config or {}
    if not args.use_liger_kernel:
        if given:
            raise ValueError(
                "liger_kernel_config needs use_liger_kernel; got it alone. Add the one, or drop the other."
            )
        return
    if not is_liger_kernel_available():
        raise ValueError("use_liger_kernel needs the package liger-kernel; got none. Install it, or leave it out.")
    for name, value in dict(given).items():  # type: ignore[arg-type] # a text was read before
        if not isinstance(value, bool):
            raise ValueError(f"liger_kernel_config needs true or false for {name}; got {short(value)}.")
        if value and name in LIGER_LOSSES:
            raise ValueError(
                f"liger_kernel_config needs {name} false; got true. It computes another loss than those of preference "
                "pairs, and leaves no logits to compute these from."
            )
    if args.device.type == "cpu":
        raise ValueError("use_liger_kernel needs a GPU; got a CPU. Leave it out.")


def _optimizer(args: TrainOptions) -> tuple[Any, dict[str, Any]] | None:
    """Class and arguments of the optimizer; None where only a model could tell.

    Raises:
        ValueError: If there is none of these options.
    """
    name = OptimizerNames(args.optim).value
    try:
        made: tuple[Any, dict[str, Any]] = Trainer.get_optimizer_cls_and_kwargs(args)
    except ImportError as error:
        raise ValueError(f"optim {name} needs a package that is not there: {error}") from error
    except (ValueError, AttributeError, KeyError) as error:
        if "need to pass a" in str(error):
            return None
        raise ValueError(
            f"optim {name} needs options that it takes; got optim_args {args.optim_args}: {error}"
        ) from None
    return made


def _check_optimizer(args: TrainOptions) -> None:
    name = OptimizerNames(args.optim).value
    given = [part.strip() for part in (args.optim_args or "").split(",")] if args.optim_args else []
    if wrong := next((part for part in given if part.count("=") != 1), None):
        raise ValueError(f"optim_args needs name=value, several with commas between them; got {short(wrong)}.")
    if args.optim_target_modules is not None and not name.startswith(("galore", "apollo")):
        raise ValueError(f"optim_target_modules needs a galore or apollo optimizer; got optim {name}. Leave it out.")
    made = _optimizer(args)
    if made is None:
        return
    for part in given:
        if not _is_read(args, part):
            raise ValueError(f"optim_args needs options that {name} reads; got {part}, which changes nothing there.")
    kind, options = made
    if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
        return
    try:
        kind([nn.Parameter(torch.zeros(1, 1, device=args.device))], **options)
    except (ValueError, TypeError, RuntimeError, AssertionError) as error:
        raise ValueError(f"optim {name} refuses its options: {error}. Correct them, or take another optim.") from None


def _is_read(args: TrainOptions, part: str) -> bool:
    """Whether an optimizer's options differ by this one, or it minds what is written there."""
    given, found = args.optim_args, []
    try:
        for text in (None, part, part.split("=")[0] + "=?"):
            args.optim_args = text
            found.append(_optimizer(args))
    except ValueError:
        return True
    finally:
        args.optim_args = given
    return any(one != found[0] for one in found)


def _check_scheduler(args: TrainOptions) -> None:
    name, options = SchedulerType(args.lr_scheduler_type).value, args.lr_scheduler_kwargs
    if options and name in _WITHOUT_OPTIONS:
        raise ValueError(f"lr_scheduler_kwargs needs a schedule with options; got lr_scheduler_type {name}. Drop one.")
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=args.learning_rate or 1.0)
    try:
        scheduler = get_scheduler(
            name,
            optimizer,
            num_warmup_steps=1,
            num_training_steps=_NUM_STEPS,
            scheduler_specific_kwargs=dict(options or {}),  # type: ignore[arg-type] # a text was read before
        )
        for _ in range(0 if name in AFTER_EVALUATION else _NUM_STEPS):
            optimizer.step()
            scheduler.step()
            if not math.isfinite(optimizer.param_groups[0]["lr"]):
                raise ValueError("the learning rate is not finite")
    except (ValueError, TypeError, ArithmeticError, AttributeError) as error:
        raise ValueError(
            f"lr_scheduler_type {name} needs lr_scheduler_kwargs that it takes; got {short(options)}: {error}."
        ) from None
