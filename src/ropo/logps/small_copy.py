"""A small model of the same architecture: few layers, narrow, random weights that make every path count.

In: the class and the configuration of a causal language model. Out: models of that class on the CPU, in float32; none
where none can be built.

The one idea: whether a layout is right for an architecture depends on its code, not on its size or its weights. In a
small copy every window and chunk is a few tokens long, so that a mask that ignores them shows on short rows, and
float32 leaves no room to blame rounding.

Sizes are divided by one factor, so that sums and products among them (heads times size of a head, sections of a
rotation) still hold; numbers of heads stay.
"""

import copy
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

logger = logging.getLogger(__name__)

VOCABULARY = 96
WINDOW = 6  # tokens; every window and chunk of a copy is at most this long
_SMALLEST_HEAD, _SMALLEST_WIDTH = 8, 32  # of what is divided, as far as it was larger
_STEP = 4  # widths are multiples of it, which products of experts ask for
_MOST_LAYERS = 12
_MOST_WEIGHTS = 6 * 10**7

_LAYERS = re.compile(r"^(num_hidden_layers|n_layers?|num_layers|num_blocks|(en|de)coder_layers|depth)$")
# The most that is left of a number by this name; the first that fits.
_MOST = (
    (re.compile(r"^(text_)?vocab_size|vocab_size_per_layer_input|unpadded_vocab_size|n_tokens$"), VOCABULARY),
    (re.compile(r"(_token_id|_token_index|_idx)$"), 2),
    (re.compile(r"^(num_(local_|routed_)?experts|n_routed_experts|moe_num_experts|zero_expert_num)$"), 4),
    (re.compile(r"(experts?_per_tok(en)?|^moe_(topk|top_k|k)|^top_k(_experts)?|experts_top_k)$"), 2),
    (re.compile(r"^(n_group|topk_group|num_expert_group)$"), 1),
    (
        re.compile(r"^(?!use_|max_|.*pattern|.*layers).*(window|attention_chunk|local_att|_topk$|block_size|span)"),
        WINDOW,
    ),
    (re.compile(r"^(floor_scale|original_max_position_embeddings)$"), WINDOW),  # from where positions scale scores
    (re.compile(r"(chunk_size|state_size|d_state)$"), 16),  # of recurrent layers
)
_SIZE = re.compile(
    r"hidden_size|_dim$|_dims$|^dim$|^d_|_d_(head|ssm|inner)$|lora_rank|_rank$|intermediate|^n_(embd|inner|hidden)$"
    r"|ffn|embed_size|embedding_size|lru_width|kv_channels|_size_per_head|head_size|hidden_sizes|embed_dim"
)
_NOT_A_SIZE = re.compile(
    r"^(use_|num_|n_heads)|state|d_conv|conv_kernel|_factor|_multiplier|_layers?$|vocab|batch|window|chunk"
)
# Sizes within one head; the others of `_SIZE` are as wide as all heads together.
_OF_ONE_HEAD = re.compile(r"head_dim|head_size|_size_per_head|kv_channels|_d_head|rope|rotary")
_HEADS = re.compile(r"(num|n)_.*heads?$|^n_head$|^num_key_value_heads$|_n_heads?$|(en|de)coder_attention_heads$")
_PERIOD = re.compile(r"(period|interval|pattern|freq|_every|_step|offset|first_k_dense|dense_layers?)")


def small_copies(model_class: type[nn.Module], config: PreTrainedConfig) -> Iterator[nn.Module]:
    """Small models of the same architecture, the smallest first; the caller takes the first one that works.

    The caller's random state is left as it was.
    """
    for small in small_configs(config):
        try:
            with torch.device("meta"):
                num_weights = sum(parameter.numel() for parameter in model_class(small).parameters())
            if num_weights > _MOST_WEIGHTS:
                continue
            with torch.random.fork_rng(devices=[]), torch.device("cpu"):
                torch.manual_seed(0)
                model = model_class(small).float().eval()
                _draw(model)
        except Exception as error:
            logger.debug("No small copy of %s: %s", model_class.__name__, error)
            continue
        yield model


def small_configs(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """Configurations of smaller models of the same architecture, the smallest first."""
    text = config.get_text_config(decoder=True)
    numbers = {name: value for name, value in vars(text).items() if type(value) is int and value > 1}
    heads = [value for name, value in numbers.items() if _HEADS.search(name)]
    sizes = [value for name, value in numbers.items() if _is_size(name) and _OF_ONE_HEAD.search(name)]
    widths = [value for name, value in numbers.items() if _is_size(name) and not _OF_ONE_HEAD.search(name)]
    width, most_heads = numbers.get("hidden_size", 0), max(heads, default=1)
    if not sizes and width > most_heads and width % most_heads == 0:
        sizes = [width // most_heads]
    by_size = min(_largest_divisor([*sizes, *widths], _SMALLEST_HEAD), _largest_divisor([width], _SMALLEST_WIDTH))
    by_heads = _largest_divisor(heads, 2)
    while by_heads > 1 and (
        any(value % (by_size * by_heads * _STEP) for value in widths) or width < by_size * by_heads * _SMALLEST_WIDTH
    ):
        by_heads //= 2
    for divisors in dict.fromkeys(((by_size, by_heads), (by_size, 1), (max(by_size // 4, 1), 1), (1, 1))):
        for keeps_layers in (False, True):
            small = copy.deepcopy(config)
            _Shrinking(*divisors, keeps_layers=keeps_layers).apply(small)
            yield small


def _largest_divisor(sizes: Sequence[int], least: int) -> int:
    """Largest power of two that divides all sizes and leaves `least` of each, those that are no larger left aside."""
    divisor = 64
    while divisor > 1 and any(size > least and (size % divisor or size // divisor < least) for size in sizes):
        divisor //= 2
    return divisor


def _is_size(name: str) -> bool:
    return bool(_SIZE.search(name)) and not _NOT_A_SIZE.search(name)


@dataclass(frozen=True, slots=True)
class _Shrinking:
    """How the numbers of a configuration are made small.

    Attributes:
        by_size: Divisor of the size of a head, and of all that is as wide as the heads together.
        by_heads: Divisor of the number of heads, and of all that is as wide as the heads together.
        keeps_layers: Whether all layers stay.
    """

    by_size: int
    by_heads: int
    keeps_layers: bool

    def apply(self, config: PreTrainedConfig) -> None:
        """Make a configuration and those within it small, in place."""
        number = _num_layers(config)
        kept = list(range(number)) if self.keeps_layers else _kept_layers(config)
        for name, value in list(vars(config).items()):
            if isinstance(value, PreTrainedConfig):
                self.apply(value)
                continue
            new = self.of(name, value)
            if isinstance(new, (list, tuple)) and len(new) == number > 1:
                new = type(new)(new[i] for i in kept)
            elif _LAYERS.search(name) and type(value) is int:
                new = len(kept) if value == number else min(value, 2)
            if new is not value:
                vars(config)[name] = new

    def of(self, name: str, value: Any) -> Any:
        """What becomes of one entry, which may hold others."""
        if isinstance(value, dict):
            return {key: self.of(str(key), inner) for key, inner in value.items()}
        if isinstance(value, (list, tuple)):
            if name in ("short_factor", "long_factor"):  # one for each pair of rotated dimensions
                return value[:: self.by_size]
            name = "head_dim" if name == "mrope_section" else name
            return type(value)(self._number(name, one) if type(one) is int else one for one in value)
        return self._number(name, value) if type(value) is int else value

    def _number(self, name: str, value: int) -> int:
        for pattern, most in _MOST:
            if pattern.search(name):
                return min(value, most)
        if _HEADS.search(name):
            return max(value // self.by_heads, 1)
        if _is_size(name) and value > _SMALLEST_HEAD:
            divisor = self.by_size if _OF_ONE_HEAD.search(name) else self.by_size * self.by_heads
            return max(value // divisor, _STEP)
        return value


def _num_layers(config: PreTrainedConfig) -> int:
    return int(getattr(config, "num_hidden_layers", 0) or 0)


def _kept_layers(config: PreTrainedConfig) -> list[int]:
    """Places of layers that show each kind of layer, two at least."""
    number = _num_layers(config)
    lists = [v for v in vars(config).values() if isinstance(v, (list, tuple)) and len(v) == number and number > 1]
    if lists:
        kinds = list(zip(*(map(str, values) for values in lists), strict=True))
        kept = [i for i, kind in enumerate(kinds) if kinds.index(kind) == i]
        # The last layer stands for the others of its kind, so that one of them has a successor.
        more = [i for i in reversed(range(number)) if i not in kept]
        return sorted([*kept, *more[: max(2 - len(kept), 1)]])[:_MOST_LAYERS]
    periods = [v for name, v in vars(config).items() if _PERIOD.search(name) and type(v) is int and 0 < v < number]
    return list(range(min(number, max([1, *periods]) + 1, _MOST_LAYERS)))


def _draw(model: nn.Module) -> None:
    """Weights with which scores and logits are far from flat; vectors (norms, biases, decays) stay as they are made."""
    for parameter in model.parameters():
        if parameter.dim() >= 2 and parameter.is_floating_point():
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.weight is not getattr(head, "weight", None):
            nn.init.normal_(module.weight, std=1.0)
