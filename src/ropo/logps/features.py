"""Numbers about every pair that are read in the forward pass that scores it, without a backward pass.

In: a causal language model and a batch of `LAYOUTS`. Out: `PairLogps`, and blocks of numbers per pair, each the number
of the chosen response less that of the rejected one.

::

    gradient       Σ_t (Pᵀ ∂log π(y_t)/∂head(x_t)) ⊗ (Qᵀ x_t)         the gradient by the head's weights, sketched
    hidden_last    mean over t of x_t
    hidden_middle  mean over t of the hidden state after layer ⌈L/2⌉

t runs over the tokens of a response, x_t is the hidden state that predicts token t and is multiplied by the head. The
one idea: the gradient by the head's weights is a sum of outer products of two vectors that the forward pass has
anyway, so both are projected before they are multiplied (arXiv:2303.14186 and arXiv:2402.04333 sketch gradients of all
weights to the same end).

Shapes: B rows, T positions, N response tokens, V vocabulary, H hidden size, K and L numbers that are kept of V and H.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ropo.logps.batch import Batch
from ropo.logps.forward import of_tokens, plain_logits, plain_logps, sum_by_response
from ropo.logps.last_layer import layers_of
from ropo.logps.response_head import LogitMap, projected_gradient, projected_logps
from ropo.logps.shared_prefix import causal_lm_of, decoder_of
from ropo.pairs import PairLogps

Features = dict[str, Tensor]  # by block, each of shape (pairs, numbers)

# Of what is written to caches: to be raised when the same options come to give other numbers.
_VERSION = 1
# Most numbers of outer products alive at once, 64 MiB.
_MAX_PRODUCTS = 2**24


@dataclass(frozen=True, slots=True, kw_only=True)
class Sketch:
    """How the gradient by the head's weights is projected.

    Attributes:
        num_outputs: K, how many numbers are kept of the gradient by the head's output.
        num_inputs: L, how many are kept of the hidden state.
        seed: Of the random matrices.
    """

    num_outputs: int = 64
    num_inputs: int = 32
    seed: int = 0


class FeatureReader:
    """Reads log-probabilities and features of batches in one forward pass each.

    Args:
        model: A causal language model, with or without PEFT, on its device.
        sketch: Of the gradient.

    Raises:
        ValueError: If the model has no language-model head.
    """

    def __init__(self, model: nn.Module, sketch: Sketch = Sketch()) -> None:
        self._model, self._sketch, self._causal_lm = model, sketch, causal_lm_of(model)
        if getattr(self._causal_lm, "get_output_embeddings", lambda: None)() is None:
            raise ValueError(
                f"Features need a model with a language-model head; {type(self._causal_lm).__name__} has none. "
                "Load it with AutoModelForCausalLM."
            )
        layers = layers_of(decoder_of(self._causal_lm))
        self._num_middle = 0 if layers is None else -(-len(layers) // 2)
        self._middle = None if layers is None else layers[self._num_middle - 1]
        self._matrices: tuple[Tensor, Tensor] | None = None
        self._seen: dict[str, Tensor] = {}  # of the batch at hand

    @property
    def name(self) -> str:
        """What the features depend on, beside the model and the pairs; fit for a folder's name."""
        sketch = self._sketch
        size = f"{sketch.num_outputs}x{sketch.num_inputs}"
        return f"features{_VERSION}-{size}-seed{sketch.seed}-layer{self._num_middle}"

    @torch.no_grad()
    def read(self, forward: Callable[[nn.Module, Batch], PairLogps], batch: Batch) -> tuple[PairLogps, Features]:
        """Log-probabilities and features of one batch.

        Args:
            forward: Of `FORWARDS`.
            batch: What it takes, on the model's device.

        Returns:
            What `forward` returns, and the features in float32 on the same device.
        """
        is_plain = forward is plain_logps
        try:
            with self._watching(is_plain=is_plain):
                logps = self._plain_logps(batch) if is_plain else forward(self._model, batch)
            return logps, self._features(batch)
        finally:
            self._seen = {}

    @contextlib.contextmanager
    def _watching(self, *, is_plain: bool) -> Iterator[None]:
        """Within it the parts of the model leave what features are made of."""
        handles = []
        if self._middle is not None:
            handles.append(self._middle.register_forward_hook(self._keep_middle))
        if is_plain:
            handles.append(self._causal_lm.get_output_embeddings().register_forward_pre_hook(self._keep_last))
        else:
            self._causal_lm._ropo_read_head = self._read_head
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            if not is_plain:
                del self._causal_lm._ropo_read_head

    def _keep_middle(self, _layer: nn.Module, _args: Any, output: Any) -> None:
        self._seen["middle"] = output[0] if isinstance(output, tuple) else output

    def _keep_last(self, _head: nn.Module, args: tuple[Any, ...]) -> None:
        self._seen["last"] = args[0]

    def _read_head(self, hidden_NH: Tensor, target_N: Tensor, head: nn.Module, *, logit_map: LogitMap) -> Tensor:
        """In the place of `response_logps`."""
        # The weights may be sharded, quantised or an adapter's, so their shape says nothing.
        projection_VK, _ = self._projections(hidden_NH, lambda: head(hidden_NH[:1]).shape[1])
        logps_N, gradient_NK = projected_logps(hidden_NH, target_N, head, projection_VK, logit_map=logit_map)
        self._seen |= {"last_NH": hidden_NH, "gradient_NK": gradient_NK}
        return logps_N

    def _plain_logps(self, batch: Batch) -> PairLogps:
        logits_NV = plain_logits(self._model, batch)
        self._seen = {name: of_tokens(values_BTH, batch) for name, values_BTH in self._seen.items()}
        last_NH = _at(batch["source"], self._seen["last"])
        projection_VK, _ = self._projections(last_NH, lambda: logits_NV.shape[1])
        # A model whose map from its head's output to its logits is not known counts as one that has none.
        logit_map = getattr(self._causal_lm, "_ropo_logit_map", LogitMap())
        logps_N, gradient_NK = projected_gradient(logits_NV, batch["target"], projection_VK, logit_map)
        self._seen |= {"last_NH": last_NH, "gradient_NK": gradient_NK}
        return sum_by_response(logps_N, batch["response"], num_pairs=len(batch["input_ids"]) // 2)

    def _projections(self, hidden_NH: Tensor, vocabulary: Callable[[], int]) -> tuple[Tensor, Tensor]:
        """P of shape (V, K) and Q of shape (H, L) in float32, made once.

        Not before there are hidden states, since only then sharded weights of a head are sure to be in place.
        """
        if self._matrices is None:
            sketch, num_hidden = self._sketch, hidden_NH.shape[1]
            rng = torch.Generator().manual_seed(sketch.seed)
            q_HL = torch.randn(num_hidden, sketch.num_inputs, generator=rng) / sketch.num_inputs**0.5
            p_VK = torch.randn(vocabulary(), sketch.num_outputs, generator=rng) / sketch.num_outputs**0.5
            self._matrices = p_VK.to(hidden_NH.device), q_HL.to(hidden_NH.device)
        return self._matrices

    def _features(self, batch: Batch) -> Features:
        assert self._matrices is not None  # noqa: S101 - made when the head was read
        response_N = batch["response"]
        sign_N1 = 1.0 - 2.0 * (response_N % 2)[:, None]
        mean_N1 = sign_N1 / response_N.bincount()[response_N, None]
        last_NH, gradient_NK = self._seen["last_NH"].float(), self._seen["gradient_NK"]
        with torch.autocast(last_NH.device.type, enabled=False):
            input_NL = last_NH @ self._matrices[1]
        features = {
            "gradient": _sum_of_products(gradient_NK * sign_N1, input_NL, response_N // 2),
            "hidden_last": _sum_by_pair(last_NH * mean_N1, response_N // 2),
        }
        if self._middle is not None:
            middle_NH = _at(batch["source"], self._seen["middle"]).float()
            features["hidden_middle"] = _sum_by_pair(middle_NH * mean_N1, response_N // 2)
        return features


def _at(source_N: Tensor, hidden_BTH: Tensor) -> Tensor:
    """Hidden states at places in the flattened positions, though a model may be spread over several devices."""
    return hidden_BTH.flatten(0, 1)[source_N.to(hidden_BTH.device)].to(source_N.device)


def _sum_by_pair(values_NH: Tensor, pair_N: Tensor) -> Tensor:
    return values_NH.new_zeros(int(pair_N.max()) + 1, values_NH.shape[1]).index_add_(0, pair_N, values_NH)


def _sum_of_products(first_NK: Tensor, second_NL: Tensor, pair_N: Tensor) -> Tensor:
    """Sum of the outer products of each pair's tokens, shape (pairs, K·L)."""
    num_first, num_second = first_NK.shape[1], second_NL.shape[1]
    sums_PKL = first_NK.new_zeros(int(pair_N.max()) + 1, num_first, num_second)
    size = max(_MAX_PRODUCTS // (num_first * num_second), 1)
    for first, second, pair in zip(first_NK.split(size), second_NL.split(size), pair_N.split(size), strict=True):
        sums_PKL.index_add_(0, pair, first[:, :, None] * second[:, None, :])
    return sums_PKL.flatten(1)
