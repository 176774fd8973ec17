"""What this machine reaches: operations a second of a few layers of the model, timed on a few of the pairs.

In: a model's class and configuration, pairs, options. Out: `Rates`, and the layout that reached them.

The one idea: a real training step of at most two layers, with weights that nobody has drawn or loaded, reaches the
operations a second that the whole run will reach. It is a plain module on this process's device, whatever shards the
run, and asks nothing of other processes; so one of them may time it alone.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from peft import PeftConfig
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.initialization import no_init_weights

from ropo.config import ROPOConfig
from ropo.data.tokenize import TokenizedPair
from ropo.logps.batch import LAYOUTS
from ropo.logps.choose import choose_layout
from ropo.logps.dropout import turn_dropout_off
from ropo.logps.shared_prefix import FORWARDS
from ropo.models.adapters import add_adapter
from ropo.run.activations import with_layers
from ropo.run.formats import is_checkpointed
from ropo.train.trainer import CPU_TOKENS

_NUM_STEPS = 2  # that are timed, the fastest counts: the first one warms up
_SECONDS = 0.5  # that one of them may take
_FEW_TOKENS = 64  # of the pair that says how many can be timed
_MOST_WEIGHTS = {"cpu": 2**28, "cuda": 2**30}  # of the model that is timed; more layers or words are left out
_GPU_TOKENS = 2**14  # in a pass that is timed
_ROWS = 64  # that are sampled together
CLOCK = time.perf_counter  # what a shared machine is measured by is another one


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What was timed, and how long it took.

    Attributes:
        layout: Of `LAYOUTS`.
        config: Of the model that was timed.
        pairs: That it was timed on.
        training_seconds: Of a forward and backward pass over them.
        scoring_seconds: Of a forward pass without gradients.
        sampling_seconds: Of one more token for `num_rows` rows, without what it looks back at.
        num_rows: Of the latter.
    """

    layout: str
    config: PretrainedConfig
    pairs: list[TokenizedPair]
    training_seconds: float
    scoring_seconds: float
    sampling_seconds: float
    num_rows: int


def time_steps(
    model_class: Callable[[Any], nn.Module],
    config: PretrainedConfig,
    tokens: Sequence[TokenizedPair],
    args: ROPOConfig,
    *,
    pad_token_id: int,
    peft_config: PeftConfig | None = None,
) -> Rates:
    """Time a training step, a scoring step and a step of sampling.

    Args:
        model_class: Makes the model from a configuration.
        config: Of the model, with its precision and attention.
        tokens: All pairs.
        args: Options, for the size of a batch, the precision and checkpoints.
        pad_token_id: Fills rows.
        peft_config: Of the adapter that is trained, if one is.

    Returns:
        The seconds.
    """
    device = PartialState().device
    small = _small(model_class, config, device.type)
    vocabulary = small.get_text_config(decoder=True).vocab_size
    with torch.random.fork_rng(devices=[]):  # an adapter draws its weights on the CPU
        model = _made(model_class, small, peft_config).to(device)
    turn_dropout_off(model)
    # As in training, pairs come as they lie, not sorted by length; a few are enough.
    order = np.random.default_rng(0).permutation(len(tokens))[: args.per_device_train_batch_size]
    some = [_cut(tokens[i], np.inf, vocabulary) for i in order]
    few = [_cut(some[0], _FEW_TOKENS, vocabulary)]
    layout, _ = choose_layout(model, few, pad_token_id=pad_token_id, use_bf16=args.bf16, is_trained=True)
    if is_checkpointed(args):
        model.activation_checkpointing_enable()
        if peft_config is not None:
            model.enable_input_require_grads()
    model.train()
    most = args.max_tokens_per_batch or (CPU_TOKENS if device.type == "cpu" else _GPU_TOKENS)
    seconds = partial(_seconds, model, layout, pad_token_id, device, use_bf16=args.bf16)
    some = _as_many(some, len(few[0]), min(seconds(few, is_trained=True) for _ in range(2)), vocabulary, most)
    training = min(seconds(some, is_trained=True) for _ in range(_NUM_STEPS))
    scoring = min(seconds(some, is_trained=False) for _ in range(2))
    return Rates(
        layout=layout,
        config=small,
        pairs=some,
        training_seconds=training,
        scoring_seconds=scoring,
        sampling_seconds=_sampling_seconds(model, device, use_bf16=args.bf16),
        num_rows=_ROWS,
    )


def _small(model_class: Callable[[Any], nn.Module], config: PretrainedConfig, device: str) -> PretrainedConfig:
    """Two layers of the model, or one if they are so large; words are left out if there are so many."""
    most = _MOST_WEIGHTS.get(device, _MOST_WEIGHTS["cuda"])
    small = with_layers(config, 2)
    text = small.get_text_config(decoder=True)
    if text.vocab_size * text.hidden_size > most:
        text.vocab_size, text.pad_token_id = most // text.hidden_size, None
    with torch.device("meta"):
        num_weights = sum(weight.numel() for weight in model_class(small).parameters())
    return with_layers(small, 1) if num_weights > most else small


def _made(model_class: Callable[[Any], Any], config: PretrainedConfig, peft_config: PeftConfig | None) -> Any:
    """The model with an adapter; drawing weights would take longer than the step."""
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    with no_init_weights():
        model = model_class(config).to(dtype)
    model.tie_weights()
    for weight in model.parameters():
        nn.init.constant_(weight, 0.01)
    return model if peft_config is None else add_adapter(model, peft_config)


def _cut(pair: TokenizedPair, most: float, vocabulary: int) -> TokenizedPair:
    """A pair of at most so many tokens, each part cut by the same share, with ids that the model has."""
    share = min(1.0, most / len(pair))
    parts = {name: getattr(pair, name) for name in ("prompt", "chosen", "rejected")}
    return TokenizedPair(**{name: ids[: max(2, int(len(ids) * share))] % vocabulary for name, ids in parts.items()})


def _as_many(
    some: list[TokenizedPair], num_few: int, seconds_of_few: float, vocabulary: int, most: int
) -> list[TokenizedPair]:
    """The first of some pairs, so many that a step is not too long; the last one may be cut."""
    room = min(max(num_few * _SECONDS / seconds_of_few, num_few), most)
    taken: list[TokenizedPair] = []
    for pair in some:
        if room < _FEW_TOKENS and taken:
            break
        taken.append(_cut(pair, max(room, _FEW_TOKENS), vocabulary))
        room -= len(pair)
    return taken


def _seconds(
    model: nn.Module,
    layout: str,
    pad_token_id: int,
    device: torch.device,
    some: Sequence[TokenizedPair],
    *,
    is_trained: bool,
    use_bf16: bool,
) -> float:
    """Of one pass, with its backward pass if it is one of training."""
    batch = {name: tensor.to(device) for name, tensor in LAYOUTS[layout](some, pad_token_id=pad_token_id).items()}
    model.zero_grad()

    def step() -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=use_bf16):
            logps = FORWARDS[layout](model, batch)
        if is_trained:
            (logps.rejected - logps.chosen).sum().backward()

    with torch.set_grad_enabled(is_trained):
        return _timed(step, device)


@torch.no_grad()
def _sampling_seconds(model: nn.Module, device: torch.device, *, use_bf16: bool) -> float:
    ids_B1: Tensor = torch.zeros(_ROWS, 1, dtype=torch.long, device=device)

    def step() -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=use_bf16):
            model(input_ids=ids_B1, use_cache=False)

    model.eval()
    return min(_timed(step, device) for _ in range(_NUM_STEPS))


def _timed(step: Callable[[], None], device: torch.device) -> float:
    _wait_for(device)
    start = CLOCK()
    step()
    _wait_for(device)
    return CLOCK() - start


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
