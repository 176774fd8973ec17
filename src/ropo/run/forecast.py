"""What this run will cost on this machine, known before it starts.

In: a model's skeleton and how it is loaded, tokenized pairs, a `ROPOConfig`. Out: a `Plan`: seconds of each stage,
bytes on each device and on the disk, and what was assumed.

The one idea: what can be counted is counted (weights, shards, optimizer, activations, disk), and what depends on the
machine is timed on a few layers. So the forecast needs neither the weights nor a table of machines.
"""

import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from peft import PeftConfig
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig

from ropo.config import ROPOConfig
from ropo.data.tokenize import TokenizedPair
from ropo.logps.batch import LAYOUTS, pad_token_id_of, split_by_tokens
from ropo.logps.last_layer import last_mlp
from ropo.logps.score import MAX_TOKENS
from ropo.losses import LOSSES
from ropo.models.adapters import add_adapter
from ropo.models.source import Model
from ropo.processes import on_main
from ropo.report.costs import cost_sentence
from ropo.resample.select import SELECTION_RULES
from ropo.run.activations import Kept, Pass, kept_for_backward
from ropo.run.formats import formats_of, is_checkpointed, shards_of
from ropo.run.memory import Formats, Memory, Shards, linear_audit_bytes, scoring_memory, training_memory
from ropo.run.plan import NUM_FEATURES, Machine, ModelSize, PairSize, RunSize, Stage, forward_operations, plan_stages
from ropo.run.probe import Rates, time_steps
from ropo.train.trainer import CPU_TOKENS

logger = logging.getLogger(__name__)

_BYTES_LOADED_PER_SECOND = 0.5e9  # read, checked and hashed
_LOAD_SECONDS = 0.5  # of a load beside its bytes
_RUN_SECONDS, _PAIR_SECONDS = 1.0, 1e-3  # of folds, tables and the report
_STEP_SECONDS = 0.008  # of the trainer's own work in a step
_STEP_SECONDS_PER_WEIGHT = 2e-9  # of the optimizer's, on one core; what a GPU takes is nothing beside a backward pass
_HEAP_HOLES = 1.2  # resident memory of a CPU's heap to what is in use, where tensors of many sizes come and go
# Made for the arithmetic of models that cannot be run without data; see Korthikanti et al., arXiv:2205.05198.
_NUMBERS_OF_HIDDEN, _NUMBERS_OF_INTERMEDIATE = 18, 5
# Another make of model, or too little memory. A package that is not installed stops the run, so it is told at once.
_UNKNOWN = (ValueError, AttributeError, RuntimeError, OSError, KeyError, TypeError)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a run will cost if nothing of it is done yet.

    Attributes:
        stages: In order.
        memory: Of each device, while the most expensive stage runs.
        disk_bytes: That the output folder takes, with the checkpoints that a training has at a time.
        layout: Of `ropo.logps.batch.LAYOUTS`, that few layers of the model took.
        assumed: What was not known, by the names that `ropo.report.costs.ASSUMED` explains.
    """

    stages: list[Stage]
    memory: Memory
    disk_bytes: float
    layout: str
    assumed: tuple[str, ...]

    @property
    def seconds(self) -> float:
        """Of all stages."""
        return sum(stage.seconds for stage in self.stages)


def tell_forecast(
    model: Model, skeleton: nn.Module, tokens: Sequence[TokenizedPair], args: ROPOConfig, *, is_audit: bool
) -> None:
    """Log what a run will cost, or why that cannot be said; an estimate stops no run that could go on.

    One process times a few plain layers by itself, which asks nothing of the others.

    Args:
        model: The initial one.
        skeleton: The same without weights.
        tokens: All pairs.
        args: Options.
        is_audit: No model is aligned after the audit.

    Raises:
        ImportError: If the model needs a package that is not installed.
    """
    # Several processes would time each other; where nobody reads the log, nothing is timed.
    if not logger.isEnabledFor(logging.INFO) or not PartialState().is_main_process:
        return
    try:
        plan = forecast(model, skeleton, tokens, args, is_audit=is_audit)
    except _UNKNOWN as error:
        logger.info("What this run will cost cannot be told: %s", error)
        return
    costs = {stage.name: stage.seconds for stage in plan.stages}
    steps = sum(stage.steps for stage in plan.stages)
    logger.info(cost_sentence(costs, steps=steps, memory_bytes=plan.memory.total, disk_bytes=plan.disk_bytes))


def forecast_everywhere(
    model: Model, skeleton: nn.Module, tokens: Sequence[TokenizedPair], args: ROPOConfig, *, is_audit: bool
) -> Plan:
    """The plan that the main process makes, in every process; arguments as for `forecast`.

    Raises:
        ValueError: In every process, if the model cannot be forecast.
    """

    def made() -> Plan | str:
        try:
            return forecast(model, skeleton, tokens, args, is_audit=is_audit)
        except _UNKNOWN as error:
            return f"What this run will cost cannot be told: {error}"

    found = on_main(made)
    if isinstance(found, str):
        raise ValueError(found)
    return found


def forecast(
    model: Model, skeleton: nn.Module, tokens: Sequence[TokenizedPair], args: ROPOConfig, *, is_audit: bool = False
) -> Plan:
    """Count a run, and time a few layers of its model.

    The number of suspects is not known before the audit: without `rho` the plan has none, so it counts no sampling.

    Args:
        model: The initial one.
        skeleton: The same without weights.
        tokens: All pairs.
        args: Options.
        is_audit: No model is aligned after the audit.

    Returns:
        The plan.
    """
    config: Any = copy.deepcopy(skeleton.config)
    asked = model.load_options["dtype"]
    config.dtype = _dtype(config.dtype if asked == "auto" else asked)
    config._attn_implementation = model.load_options.get("attn_implementation")
    quantization = model.load_options.get("quantization_config") or getattr(config, "quantization_config", None)
    shards, formats = shards_of(args), formats_of(args, config.dtype, quantization)
    pad_token_id, make = pad_token_id_of(model.tokenizer), type(skeleton)
    rates = time_steps(make, config, tokens, args, pad_token_id=pad_token_id, peft_config=model.peft_config)
    size = model_size(config, model.peft_config, layout=rates.layout, model_class=make)
    step, num_passes = largest_pass(tokens, args, rates.layout, pad_token_id)
    kept = _kept(make, config, step, model.peft_config, is_sharded=shards.weights > 1 or shards.has_masters)
    is_trained = not is_audit or (args.scorer == "models" and bool(args.num_folds))
    memory = memory_of(size, formats, shards, kept or _guessed(size, step, formats), step, num_passes=num_passes)
    if not is_trained:
        memory = _scoring(size, formats, shards, kept or _guessed(size, step, formats), step)
    run, pairs = run_size(args, is_audit=is_audit), _pair_size(tokens)
    if run.has_linear_audit:
        memory = replace(memory, host=max(memory.host, linear_audit_bytes(size.hidden_size, num_pairs=len(tokens))))
    machine = _machine(rates, size, formats, model.peft_config, args, make)
    return Plan(
        stages=plan_stages(size, pairs, run, machine),
        memory=memory,
        disk_bytes=disk_bytes(size, formats, args, run, num_pairs=len(tokens)),
        layout=rates.layout,
        assumed=_assumed(args, formats, run, is_counted=kept is not None),
    )


def run_size(args: ROPOConfig, *, is_audit: bool) -> RunSize:
    """How often a run reads every pair.

    Args:
        args: Options.
        is_audit: No model is aligned after the audit.
    """
    per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * max(1, args.world_size)
    return RunSize(
        rounds=0 if is_audit else args.rounds,
        num_train_epochs=args.num_train_epochs,
        max_steps=args.max_steps,
        pairs_per_step=per_step,
        num_folds=args.num_folds if (args.needs_audit or is_audit) and args.audit_from is None else 0,
        scorer=args.scorer,
        rho=args.fixed_rho or 0.0,
        num_candidates=args.num_candidates,
        new_tokens=args.max_new_tokens / 2,  # responses end before the limit; half of it is a guess
        needs_reference=LOSSES[args.loss].needs_reference,
    )


def model_size(
    config: PretrainedConfig,
    peft_config: PeftConfig | None = None,
    *,
    layout: str = "packed",
    model_class: Callable[[Any], Any] | None = None,
) -> ModelSize:
    """Count the weights of a model without making them.

    Args:
        config: Of the model.
        peft_config: Of the adapter that is trained, if one is.
        layout: Of `LAYOUTS`; all but the plain one spare a part of the last layer.
        model_class: Makes the model; default what `transformers` has for the configuration.

    Returns:
        Its size.
    """
    make: Callable[[Any], Any] = model_class or class_of(config)
    with torch.device("meta"):  # not `from_config`, which ZeRO-3 would partition
        model = make(config)
    total = sum(p.numel() for p in model.parameters())
    mlp = None if layout == "plain" else last_mlp(model.get_decoder())
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    outside = embedding.numel() + (0 if head is embedding else head.numel())
    trained, last = total, 0 if mlp is None else sum(p.numel() for p in mlp.parameters())
    if peft_config is not None:
        adapted = add_adapter(model, peft_config)
        trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    text = config.get_text_config()  # of a model that could take images, too, the numbers stand one level down
    return ModelSize(
        layer_weights=total - outside,
        last_mlp_weights=last,
        head_weights=head.numel(),
        num_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        intermediate_size=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        trained_weights=trained,
        total_weights=total,
    )


def class_of(config: PretrainedConfig) -> Callable[[Any], Any]:
    """What `transformers` makes a language model of this configuration with.

    Args:
        config: Of the model.
    """
    found: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return found  # type: ignore[no-any-return]


def largest_pass(tokens: Sequence[TokenizedPair], args: ROPOConfig, layout: str, pad_token_id: int) -> tuple[Pass, int]:
    """The forward pass of training with the most tokens, which decides its memory, and the passes of a step.

    Args:
        tokens: All pairs.
        args: Options.
        layout: Of `LAYOUTS`.
        pad_token_id: Fills rows.
    """
    device = args.device.type
    limit = args.max_tokens_per_batch or (CPU_TOKENS if device == "cpu" else None)
    longest = sorted(tokens, key=len)[-args.per_device_train_batch_size :]
    lengths = [len(pair) for pair in longest]
    pieces = split_by_tokens(lengths, max_tokens=None if LOSSES[args.loss].needs_whole_batch else limit)
    batches = [LAYOUTS[layout]([longest[i] for i in piece], pad_token_id=pad_token_id) for piece in pieces]
    largest = max(batches, key=lambda batch: batch["input_ids"].numel())
    step = Pass(
        num_tokens=largest["input_ids"].numel(),
        num_read=len(largest["target"]),
        is_plain=layout == "plain",
        use_bf16=args.bf16,
        is_checkpointed=is_checkpointed(args),
        device=device,
    )
    return step, len(pieces) * args.gradient_accumulation_steps


def memory_of(size: ModelSize, formats: Formats, shards: Shards, kept: Kept, step: Pass, *, num_passes: int) -> Memory:
    """Memory of training on each device; in a step of one pass gradients take the place of activations.

    Args:
        size: Of the model.
        formats: Of its numbers.
        shards: Over how many devices each kind is distributed.
        kept: Of the largest forward pass.
        step: That pass.
        num_passes: Of a step.
    """
    of_head = 0.0 if size.has_adapter else 4.0 * size.head_weights  # its gradient, the first and the last to be made
    activations = of_head + kept.bytes(size.num_layers, is_checkpointed=step.is_checkpointed)
    activations *= _HEAP_HOLES if step.device == "cpu" else 1.0
    if num_passes == 1:
        made = training_memory(size, formats, replace(shards, has_buckets=False), activations=0.0).gradients
        activations = max(activations - made, of_head + kept.layer)
    return training_memory(size, formats, shards, activations=activations)


def disk_bytes(size: ModelSize, formats: Formats, args: ROPOConfig, run: RunSize, *, num_pairs: int) -> float:
    """Bytes of the output folder: models of all rounds, the last one once more, and checkpoints of a training.

    A new checkpoint is whole before an older one is removed; none is written at the end of a training. Where pairs may
    be filtered, the last epoch may be a part of another one, so that one more checkpoint is written. A model half way
    through a training, which resampling asks, stands beside them.

    Args:
        size: Of the model.
        formats: Of its numbers.
        args: Options.
        run: The same, as they are planned.
        num_pairs: Of the data.
    """
    saved = size.trained_weights * formats.trained_bytes(size) if size.has_adapter else formats.model_bytes(size)
    state = size.trained_weights * formats.num_states * formats.state_bytes
    steps = run.max_steps if run.max_steps > 0 else num_pairs * run.num_train_epochs / run.pairs_per_step
    every = {"epoch": steps / max(run.num_train_epochs, 1e-9), "steps": args.save_steps}
    strategy = str(getattr(args.save_strategy, "value", args.save_strategy))
    if strategy in every:
        every_steps = every[strategy] * (steps if strategy == "steps" and args.save_steps < 1 else 1)
        may_filter = args.needs_audit and run.max_steps <= 0
        num_checkpoints = max(0, int(np.ceil(steps / every_steps)) - 1) + may_filter
    else:
        num_checkpoints = 0
    num_kept = min(num_checkpoints, (args.save_total_limit or num_checkpoints) + 1)
    trains = bool(run.rounds) or run.scorer == "models"
    features = num_pairs * 2 * (NUM_FEATURES + 2 * size.hidden_size) if run.has_linear_audit else 0
    has_halfway = bool(run.rounds and run.num_candidates and SELECTION_RULES[args.selection_rule].needs_views)
    num_models = run.rounds + bool(run.rounds) + has_halfway
    return num_models * saved + trains * num_kept * (saved + state) + features


def _dtype(asked: str | torch.dtype | None) -> torch.dtype:
    found = getattr(torch, asked) if isinstance(asked, str) else asked
    return found if isinstance(found, torch.dtype) else torch.float32


def _pair_size(tokens: Sequence[TokenizedPair]) -> PairSize:
    lengths = np.array([[len(one.prompt), len(one.chosen), len(one.rejected)] for one in tokens], dtype=np.float64)
    prompt, chosen, rejected = lengths.mean(axis=0)
    return PairSize(num_pairs=len(tokens), prompt_tokens=prompt, chosen_tokens=chosen, rejected_tokens=rejected)


def _machine(
    rates: Rates,
    size: ModelSize,
    formats: Formats,
    peft_config: PeftConfig | None,
    args: ROPOConfig,
    make: Callable[[Any], Any],
) -> Machine:
    """Operations a second from what was timed, as `forward_operations` counts them."""
    timed = model_size(rates.config, peft_config, layout=rates.layout, model_class=make)
    once = len(rates.pairs) * forward_operations(timed, _pair_size(rates.pairs))
    new = 2 * rates.num_rows * (timed.layer_weights + timed.head_weights)
    is_cpu = args.device.type == "cpu"
    return Machine(
        flops=3 * once / rates.training_seconds,
        share=1.0,
        scoring_flops=once / rates.scoring_seconds,
        sampling_flops=new / rates.sampling_seconds,
        num_devices=max(1, args.world_size),
        step_seconds=_STEP_SECONDS + is_cpu * size.trained_weights * _STEP_SECONDS_PER_WEIGHT,
        load_seconds=_LOAD_SECONDS + formats.model_bytes(size) / _BYTES_LOADED_PER_SECOND,
        run_seconds=_RUN_SECONDS,
        pair_seconds=_PAIR_SECONDS,
        has_linear_audit=True,
    )


def _kept(
    make: Callable[[Any], Any],
    config: PretrainedConfig,
    step: Pass,
    peft_config: PeftConfig | None,
    *,
    is_sharded: bool,
) -> Kept | None:
    """What autograd keeps; None where that depends on the data, or the model does not run so."""
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    if is_sharded and step.use_bf16:  # gathered weights are cast already, and are gathered again for the backward pass
        dtype = torch.bfloat16
    try:
        return kept_for_backward(make, config, step, dtype=dtype, peft_config=peft_config)
    except Exception as error:  # whatever an architecture does with shapes that hold nothing
        logger.debug("Activations of %s cannot be counted: %s", type(config).__name__, error)
        return None


def _guessed(size: ModelSize, step: Pass, formats: Formats) -> Kept:
    """About 18 numbers of the hidden size and 5 of the MLP's for each token and layer."""
    numbers = _NUMBERS_OF_HIDDEN * size.hidden_size + _NUMBERS_OF_INTERMEDIATE * size.intermediate_size
    return Kept(
        layer=step.num_tokens * numbers * formats.compute_bytes,
        outside=0.0,
        hidden=step.num_tokens * size.hidden_size * formats.compute_bytes,
        head=12.0 * step.num_read * size.head_weights / size.hidden_size,
    )


def _scoring(size: ModelSize, formats: Formats, shards: Shards, kept: Kept, step: Pass) -> Memory:
    """Of a pass without gradients: one layer's activations at a time."""
    share = MAX_TOKENS.get(step.device, MAX_TOKENS["cuda"]) / step.num_tokens
    return scoring_memory(size, formats, shards, activations=share * kept.layer + kept.head)


def _assumed(args: ROPOConfig, formats: Formats, run: RunSize, *, is_counted: bool) -> tuple[str, ...]:
    is_sampled = bool(run.num_candidates and run.rounds > 1)
    found = {
        "few_layers": True,
        "no_communication": args.world_size > 1,
        "dequantization": formats.quantized_bytes is not None,
        "suspects": is_sampled and not run.rho,
        "new_tokens": is_sampled and bool(run.rho),
        "activations": not is_counted,
    }
    return tuple(name for name, is_it in found.items() if is_it)
