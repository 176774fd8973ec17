"""What this run will cost on this machine, said before it starts.

In: the model's config, tokenized pairs, a `ROPOConfig`. Out: a `Plan`.

The one idea: a real training step of a model with the same config, random weights and at most two layers, on real
pairs, reaches the operations a second that the whole run will reach. So the estimate needs neither the weights nor a
table of machines.
"""

import copy
import logging
import time
from collections.abc import Sequence

import numpy as np
import torch
from accelerate import PartialState
from peft import PeftConfig
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerBase

from ropo.config import ROPOConfig
from ropo.data.tokenize import TokenizedPair
from ropo.logps.batch import LAYOUTS, pad_token_id_of
from ropo.logps.choose import choose_layout
from ropo.logps.last_layer import last_mlp
from ropo.logps.shared_prefix import FORWARDS
from ropo.losses import LOSSES
from ropo.models.adapters import add_adapter
from ropo.models.source import Model
from ropo.run.plan import Machine, ModelSize, PairSize, Plan, RunSize, forward_operations, plan_run
from ropo.train.model import turn_dropout_off

logger = logging.getLogger(__name__)

_NUM_LAYERS = 2  # of the model that is timed
_NUM_STEPS = 3  # that are timed, the fastest counts: the first ones warm up


def tell_forecast(model: Model, tokens: Sequence[TokenizedPair], args: ROPOConfig, *, is_audit: bool) -> None:
    """Log what a run will cost, or why that cannot be said; an estimate stops no run that could go on.

    Args:
        model: The initial one.
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
        config = model.config()
        asked = model.load_options.get("dtype", "auto")
        config.dtype = config.dtype if asked == "auto" else asked
        config._attn_implementation = model.load_options.get("attn_implementation")
        plan = forecast(config, tokens, args, model.tokenizer, model.peft_config, is_audit=is_audit)
    # Another make of model, or too little memory. A package that is not installed stops the run, so it is told at once.
    except (ValueError, AttributeError, RuntimeError, OSError) as error:
        logger.info("What this run will cost cannot be told: %s", error)
        return
    logger.info("This run, if nothing of it is done yet: %s", plan.sentence())


def _dtype(asked: str | torch.dtype | None) -> torch.dtype:
    found = getattr(torch, asked) if isinstance(asked, str) else asked
    return found if isinstance(found, torch.dtype) else torch.float32


def forecast(
    config: PretrainedConfig,
    tokens: Sequence[TokenizedPair],
    args: ROPOConfig,
    tokenizer: PreTrainedTokenizerBase,
    peft_config: PeftConfig | None = None,
    *,
    is_audit: bool = False,
) -> Plan:
    """Count a run, and time a step of it.

    The number of suspects is not known before the audit: without `rho` the plan has none, so it counts no sampling.

    Args:
        config: Of the model.
        tokens: All pairs.
        args: Options.
        tokenizer: The model's.
        peft_config: For adapters.
        is_audit: No model is aligned after the audit.

    Returns:
        The plan.
    """
    num_devices = max(1, args.world_size)
    run = RunSize(
        rounds=0 if is_audit else args.rounds,
        num_train_epochs=args.num_train_epochs,
        max_steps=args.max_steps,
        pairs_per_step=args.per_device_train_batch_size * args.gradient_accumulation_steps * num_devices,
        num_folds=args.num_folds if args.needs_audit or is_audit else 0,
        scorer=args.scorer,
        rho=args.fixed_rho or 0.0,
        num_candidates=args.num_candidates,
        new_tokens=args.max_new_tokens / 2,  # responses end before the limit; half of it is a guess
        needs_reference=LOSSES[args.loss].needs_reference,
    )
    rate, layout = reached_rate(config, tokens, args, tokenizer)
    pairs, size = _pair_size(tokens), model_size(config, peft_config, layout=layout)
    machine = Machine(
        flops=rate,
        share=1.0,
        num_devices=num_devices,
        weight_bytes=_dtype(config.dtype).itemsize,
    )
    at_once = min(args.max_tokens_per_batch or np.inf, args.per_device_train_batch_size * pairs.unique_tokens)
    return plan_run(size, pairs, run, machine, tokens_at_once=float(at_once))


def _pair_size(tokens: Sequence[TokenizedPair]) -> PairSize:
    lengths = np.array([[len(one.prompt), len(one.chosen), len(one.rejected)] for one in tokens], dtype=np.float64)
    prompt, chosen, rejected = lengths.mean(axis=0)
    return PairSize(num_pairs=len(tokens), prompt_tokens=prompt, chosen_tokens=chosen, rejected_tokens=rejected)


def model_size(config: PretrainedConfig, peft_config: PeftConfig | None = None, *, layout: str = "packed") -> ModelSize:
    """Count the weights of a model without making them.

    Args:
        config: Of the model.
        peft_config: Of the adapter that is trained, if one is.
        layout: Of `LAYOUTS`; all but the plain one spare a part of the last layer.

    Returns:
        Its size.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    total = sum(p.numel() for p in model.parameters())
    mlp = None if layout == "plain" else last_mlp(model.get_decoder())
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    outside = embedding.numel() + (0 if head is embedding else head.numel())
    trained = total
    if peft_config is not None:
        adapted = add_adapter(model, peft_config)
        trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    text = config.get_text_config()  # of a model that could take images, too, the numbers stand one level down
    return ModelSize(
        layer_weights=total - outside,
        last_mlp_weights=0 if mlp is None else sum(p.numel() for p in mlp.parameters()),
        head_weights=head.numel(),
        num_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        intermediate_size=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        trained_weights=trained,
        total_weights=total,
    )


def reached_rate(
    config: PretrainedConfig, tokens: Sequence[TokenizedPair], args: ROPOConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[float, str]:
    """Operations a second in training, measured on some of the pairs with a model of few layers.

    Args:
        config: Of the model.
        tokens: All pairs.
        args: Options, for the size of a batch and the precision.
        tokenizer: The model's.

    Returns:
        Operations a second, as `forward_operations` counts them, and the layout that reached them.
    """
    device = PartialState().device
    small = copy.deepcopy(config)
    small.num_hidden_layers = min(_NUM_LAYERS, config.num_hidden_layers)
    if getattr(small, "layer_types", None):
        small.layer_types = small.layer_types[: small.num_hidden_layers]
    with torch.random.fork_rng(devices=[]):  # the weights are drawn on the CPU
        model = AutoModelForCausalLM.from_config(small).to(device)
    turn_dropout_off(model)
    pad_token_id = pad_token_id_of(tokenizer)
    layout, _ = choose_layout(
        model,
        tokens,
        pad_token_id=pad_token_id,
        use_bf16=args.bf16,
        is_trained=True,
    )
    # As in training, pairs come as they lie, not sorted by length; a few are enough.
    some = [tokens[i] for i in np.random.default_rng(0).permutation(len(tokens))[: args.per_device_train_batch_size]]
    batch = {name: tensor.to(device) for name, tensor in LAYOUTS[layout](some, pad_token_id=pad_token_id).items()}
    fastest = min(_seconds(model, layout, batch, use_bf16=args.bf16) for _ in range(_NUM_STEPS))
    pairs = _pair_size(some)
    return 3 * len(some) * forward_operations(model_size(small, layout=layout), pairs) / fastest, layout


def _seconds(model: torch.nn.Module, layout: str, batch: dict[str, torch.Tensor], *, use_bf16: bool) -> float:
    """Of one forward and backward pass."""
    device = batch["input_ids"].device
    model.zero_grad()
    _wait_for(device)
    start = time.perf_counter()
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=use_bf16):
        logps = FORWARDS[layout](model, batch)
    (logps.rejected - logps.chosen).sum().backward()
    _wait_for(device)
    return time.perf_counter() - start


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
