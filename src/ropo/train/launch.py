"""How a run was started: processes, device, precision and the pairs of a step, and whether that is what was asked for.

In: a `TrainOptions`, the environment that a launcher leaves. Out: a `Launch`, or a sentence that says what differs.
"""

import logging
import os
from dataclasses import dataclass
from pathlib import Path

from accelerate import PartialState

from ropo.provenance import read_json, write_json
from ropo.train.options import TrainOptions

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """How the pairs of a training step are distributed; another launch makes other steps of the same pairs.

    Attributes:
        num_processes: Of the whole launch, over all machines.
        device: Kind of device that each process computes on.
        mixed_precision: Of the forward and backward pass: bf16, fp16, or no.
        sharding: Who shards the weights: none, fsdp or deepspeed.
        zero_stage: What deepspeed shards: 1 optimizer state, 2 gradients as well, 3 weights, too; 0 without deepspeed.
        batch_size: Pairs of each process in one forward and backward pass.
        num_accumulated: Passes of one step.
    """

    num_processes: int
    device: str
    mixed_precision: str
    sharding: str
    batch_size: int
    num_accumulated: int
    zero_stage: int = 0

    @classmethod
    def of(cls, args: TrainOptions) -> "Launch":
        """The launch that these options belong to."""
        return cls(
            num_processes=args.world_size,
            device=args.device.type,
            mixed_precision=_mixed_precision(args),
            sharding=args.sharding,
            batch_size=args.per_device_train_batch_size,
            num_accumulated=args.gradient_accumulation_steps,
            zero_stage=_zero_stage(args),
        )

    def __str__(self) -> str:
        """As the log says it."""
        parts = ("optimizer state", "gradients", "weights")[: self.zero_stage or 3][::-1]
        what = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
        shards = f", {what} sharded by {self.sharding}" if self.sharding != "none" else ""
        whole = ", each with the whole model" if self.sharding == "none" and self.num_processes > 1 else ""
        processes = f"{self.num_processes} process{'' if self.num_processes == 1 else 'es'}"
        num_pairs = self.num_processes * self.batch_size * self.num_accumulated
        return (
            f"{processes} on {self.device}{whole}{shards}, mixed precision {self.mixed_precision}, "
            f"{num_pairs} pairs per step ({processes} x {self.batch_size} x {self.num_accumulated} accumulated)"
        )


def refuse_other_launch(args: TrainOptions) -> None:
    """Refuse to run as something else than the launcher was asked for.

    Raises:
        ValueError: If there are other processes, or another precision.
    """
    environment, num_processes = os.environ, args.world_size
    num_asked = environment.get("WORLD_SIZE", "1")
    # With several processes `accelerate launch` names their meeting point; on a CPU it then starts one all the same.
    is_alone = "ACCELERATE_MIXED_PRECISION" in environment and "MASTER_ADDR" in environment and num_processes == 1
    if is_alone and "WORLD_SIZE" not in environment:
        raise ValueError(
            "accelerate launch needs GPUs (or MPI) to start several processes; it was asked for several (MASTER_ADDR "
            "is set) and has started 1. Use `torchrun --nproc_per_node N -m ropo ...` on a CPU, or --num_processes "
            "1."
        )
    if num_asked != str(num_processes):
        raise ValueError(
            f"WORLD_SIZE needs the number of processes of this run, {num_processes}; got {num_asked}. Start it with "
            "`accelerate launch` or `torchrun`, or unset WORLD_SIZE."
        )
    ours, asked = _mixed_precision(args), environment.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked not in ("no", ours):
        add = f"Add --{asked}, or launch" if asked in ("bf16", "fp16") else "Launch"
        raise ValueError(
            f"Mixed precision needs to be the same for training and for scoring the reference; accelerate launch asks "
            f"for {asked}, the options for {ours}. {add} with --mixed_precision {ours}."
        )


def tell_other_launch(folder: Path, launch: Launch) -> None:
    """Warn if a folder was last written to with another launch, and record this one.

    It is the same run: finished stages are used as they are.

    Args:
        folder: The output folder, claimed by this run.
        launch: Of this call.
    """
    path, state = folder / "launch.json", PartialState()
    if state.is_main_process:
        before = read_json(path).get("last", str(launch)) if path.exists() else str(launch)
        if before != str(launch):
            logger.warning(
                "%s was last run with %s; this run has %s. Finished stages stay as they are; a training that was "
                "stopped half way starts again from its beginning, since its checkpoints belong to other steps.",
                folder,
                before,
                launch,
            )
        write_json(path, {"last": str(launch)})


def _zero_stage(args: TrainOptions) -> int:
    if args.sharding != "deepspeed":
        return 0
    given = args.hf_deepspeed_config.config["zero_optimization"]["stage"] if args.deepspeed else None
    return int(given or os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))


def _mixed_precision(args: TrainOptions) -> str:
    return "bf16" if args.bf16 else "fp16" if args.fp16 else "no"
