"""Bytes that a training needs on each device, by what they hold, and on the disk.

In: sizes of the model, formats of its numbers, over how many devices they are sharded, activations. Out: `Memory`.

The one idea: weights, gradients and the optimizer's state are counted, each divided by the devices that share it;
activations come from `ropo.run.activations`.
"""

from dataclasses import dataclass

from ropo.run.plan import NUM_FEATURES, ModelSize

# States that an optimizer keeps of each trained weight, by the first part of its name; 2 for all others (AdamW).
_NUM_STATES = {"sgd": 0, "adafactor": 0, "lomo": 0, "adagrad": 1, "rmsprop": 1, "lion": 1, "ademamix": 3}
# Bytes of a quantized weight: blocks of 64 share a factor in float32 (4 bits), rows share one (8 bits).
QUANTIZED_BYTES = {4: 0.5 + 4 / 64, 8: 1.0}
_DOUBLE_QUANTIZED = 0.5 + 1 / 64 + 4 / (64 * 256)  # the factors of 256 blocks are quantized themselves


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes on each device while the most expensive stage runs.

    `host` is of the CPU's memory: what is offloaded there, or what the linear models of an audit hold there while no
    model is loaded, whichever is more.
    """

    weights: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    activations: float = 0.0
    host: float = 0.0

    @property
    def total(self) -> float:
        """Of the device, without the host."""
        return self.weights + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True, slots=True, kw_only=True)
class Formats:
    """How the numbers of a training are kept.

    Attributes:
        weight_bytes: Of a weight that is not quantized.
        quantized_bytes: Of a weight of a layer, where the base is quantized; None where it is not.
        compute_bytes: Of a weight while its layer computes (2 under mixed precision).
        num_states: That the optimizer keeps of each trained weight.
        state_bytes: Of one of them.
    """

    weight_bytes: float = 4
    quantized_bytes: float | None = None
    compute_bytes: float = 4
    num_states: int = 2
    state_bytes: float = 4

    def trained_bytes(self, model: ModelSize) -> float:
        """Of a trained weight: PEFT keeps adapters of a base in half precision in float32."""
        return max(self.weight_bytes, 4) if model.has_adapter else self.weight_bytes

    def model_bytes(self, model: ModelSize) -> float:
        """Of all weights that a device with the whole model holds."""
        quantized = model.layer_weights if self.quantized_bytes is not None else 0
        base = (model.total_weights - quantized) * self.weight_bytes + quantized * (self.quantized_bytes or 0.0)
        return base + (model.trained_weights * self.trained_bytes(model) if model.has_adapter else 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shards:
    """Over how many devices a training distributes what it holds; 1 for a copy on each.

    Attributes:
        weights: Devices that share the weights; each gathers them layer by layer.
        gradients: Devices that share the gradients.
        optimizer: Devices that share the optimizer's state.
        gathered_weights: Most weights gathered at a time beside two layers (ZeRO-3 keeps up to 10^9).
        has_buckets: Whether gradients are copied to be averaged (DDP).
        has_masters: Whether float32 copies of trained weights belong to the optimizer (DeepSpeed).
        offloads_optimizer: Whether optimizer state and master weights lie in the CPU's memory.
        offloads_weights: Whether shards of weights and gradients do, too.
    """

    weights: int = 1
    gradients: int = 1
    optimizer: int = 1
    gathered_weights: int = 0
    has_buckets: bool = False
    has_masters: bool = False
    offloads_optimizer: bool = False
    offloads_weights: bool = False


def num_states(optim: str) -> int:
    """States that an optimizer keeps of each trained weight.

    Args:
        optim: As `TrainingArguments.optim` names it.

    Examples:
        >>> num_states("adamw_torch_fused"), num_states("paged_lion_8bit"), num_states("sgd")
        (2, 1, 0)
    """
    return _NUM_STATES.get(optim.removeprefix("paged_").partition("_")[0], 2)


def state_bytes(optim: str, weight_bytes: float) -> float:
    """Bytes of one state of one weight: torch keeps it as the weight, bitsandbytes in 8 or 32 bits.

    Args:
        optim: As `TrainingArguments.optim` names it.
        weight_bytes: Of a trained weight.

    Examples:
        >>> state_bytes("adamw_8bit", 4), state_bytes("adamw_torch", 2), state_bytes("paged_adamw_32bit", 2)
        (1.0, 2, 4.0)
    """
    known = {"8bit": 1.0, "4bit": 0.5, "32bit": 4.0}
    return next((value for name, value in known.items() if name in optim), weight_bytes)


def training_memory(model: ModelSize, formats: Formats, shards: Shards, *, activations: float) -> Memory:
    """Memory of a training on each device.

    ::

        weights      base / n_w + adapter / n_w + what is gathered
        gradients    trained / n_g, twice under DDP
        optimizer    trained · states / n_o, and float32 copies of trained weights under DeepSpeed

    Args:
        model: The model.
        formats: Of its numbers.
        shards: Over how many devices each kind is distributed.
        activations: Bytes that a backward pass needs of its forward pass.
    """
    trained_bytes = formats.trained_bytes(model)
    weights = formats.model_bytes(model) / shards.weights
    gradients = model.trained_weights * trained_bytes / shards.gradients * (2 if shards.has_buckets else 1)
    optimizer = model.trained_weights * formats.num_states * formats.state_bytes / shards.optimizer
    if shards.has_masters:
        optimizer += 4 * model.trained_weights / shards.optimizer
    gathered = _gathered(model, shards) * formats.compute_bytes if shards.weights > 1 else 0.0
    host = (optimizer if shards.offloads_optimizer else 0.0) + (weights + gradients if shards.offloads_weights else 0.0)
    return Memory(
        weights=gathered + (0.0 if shards.offloads_weights else weights),
        gradients=0.0 if shards.offloads_weights else gradients,
        optimizer=0.0 if shards.offloads_optimizer else optimizer,
        activations=activations,
        host=host,
    )


def _gathered(model: ModelSize, shards: Shards) -> float:
    """Weights in use at a time: two layers, one of them prefetched, with embeddings and head; or what may stay."""
    outside = model.total_weights - model.layer_weights
    return min(model.total_weights, max(outside + 2 * model.layer_weights / model.num_layers, shards.gathered_weights))


def scoring_memory(model: ModelSize, formats: Formats, shards: Shards, *, activations: float) -> Memory:
    """Memory of a pass without gradients on each device.

    Args:
        model: The model.
        formats: Of its numbers.
        shards: Over how many devices its weights are distributed.
        activations: Bytes of one layer and of the logits.
    """
    whole = training_memory(model, formats, shards, activations=activations)
    return Memory(weights=whole.weights, activations=activations, host=whole.host if shards.offloads_weights else 0.0)


def linear_audit_bytes(hidden_size: int, *, num_pairs: int) -> float:
    """Memory of the linear models of an audit, which are fitted in float32 on the CPU.

    The features of all pairs stay, as does what each kind is written in (its eigenbasis); a kind is in memory three
    times while it is scaled and put together.

    Args:
        hidden_size: Of the model.
        num_pairs: Of the data.
    """
    widths = (NUM_FEATURES, 2 * hidden_size, NUM_FEATURES)  # gradients, hidden states, n-grams
    return 4.0 * num_pairs * (2 * sum(widths) + 3 * max(widths))


def quantized_bytes(bits: int, *, is_double: bool) -> float:
    """Bytes of a quantized weight with its share of the factors.

    Args:
        bits: 4 or 8.
        is_double: Whether the factors are quantized themselves.
    """
    return _DOUBLE_QUANTIZED if bits == 4 and is_double else QUANTIZED_BYTES[bits]
