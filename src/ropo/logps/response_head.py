"""From hidden states to the log-probability of each predicted token, without the logits of a whole batch in memory.

In: hidden states, target ids and the language-model head. Out: one log-probability per target.

The one idea: what the backward pass needs of N·V logits is their softmax, and that can be made again from the hidden
states, piece by piece. Where all logits fit into a budget their softmax is kept, which spares one of four products with
the head; else at most a budget's worth exists at any time. Either way no second tensor of that size is made, which
automatic differentiation needs three of.

Shapes: N response tokens, H hidden size, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ropo.logps.sharded import is_sharded

# Most bytes of float32 logits alive at once. On a GPU a piece costs a gradient of the size of the head's weights.
LOGITS_BUDGET_BYTES = {"cpu": 2**28, "cuda": 2**30}
# Tokens whose logits are made in one go. On a CPU a piece is read several times, and the head's weights once for it.
_PIECE_TOKENS = {"cpu": 512}


def round_length(num_tokens: int, device: str, dtype: torch.dtype) -> int:
    """To how many tokens a number of them is best filled up.

    On a CPU, products in half precision compile a kernel for each shape that they have not met, which takes several
    times as long as the product, and only so many kernels are kept; those in float32 take every shape as it comes.

    Args:
        num_tokens: How many there are.
        device: Type of the device.
        dtype: Of the products.

    Returns:
        The number itself, or one of at most eight between two powers of two.

    Examples:
        >>> [round_length(n, "cpu", torch.bfloat16) for n in (3, 65, 1000, 1025, 2048)]
        [16, 80, 1024, 1152, 2048]
    """
    if device != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return num_tokens
    step = max(1 << num_tokens.bit_length() >> 4, 16)
    return -(-num_tokens // step) * step


@dataclass(frozen=True, slots=True)
class LogitMap:
    """What a model does to the output of its head: logits = scale·head(hidden), bounded as cap·tanh(logits/cap).

    Attributes:
        scale: Factor of the logits.
        cap: Bound of the logits, None for none.
    """

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, raw_NV: Tensor) -> Tensor:
        """Logits in float32 of what the head put out."""
        logits_NV = raw_NV.float()
        if self.scale != 1.0:
            logits_NV = logits_NV * self.scale
        return logits_NV if self.cap is None else self.cap * torch.tanh(logits_NV / self.cap)

    def overwrite(self, logits_NV: Tensor) -> Tensor:
        """The same in the tensor given, which is in float32."""
        if self.scale != 1.0:
            logits_NV.mul_(self.scale)
        return logits_NV if self.cap is None else logits_NV.div_(self.cap).tanh_().mul_(self.cap)

    def backward(self, d_logits_NV: Tensor, logits_NV: Tensor | None) -> Tensor:
        """The gradient by what the head put out; written over the one by the logits.

        Args:
            d_logits_NV: Gradient by the logits.
            logits_NV: The logits; needed where they have a bound.
        """
        if self.cap is not None and logits_NV is not None:
            d_logits_NV *= 1 - (logits_NV / self.cap).square_()
        return d_logits_NV if self.scale == 1.0 else d_logits_NV.mul_(self.scale)


def response_logps(
    hidden_NH: Tensor,
    target_N: Tensor,
    head: nn.Module,
    *,
    logit_map: LogitMap = LogitMap(),
) -> Tensor:
    """Log-probability of each target token.

    ::

        log π = logits[target] − log Σ exp(logits),   logits = logit_map(head(hidden))

    Args:
        hidden_NH: Hidden states that predict the targets.
        target_N: Token ids.
        head: The language-model head. A plain linear layer, tied or not, takes the fast way; anything else (an
            adapter on the head, quantised or partitioned weights, hooks) is called as it is, in pieces that are made
            again in the backward pass.
        logit_map: What the model does to the head's output.

    Returns:
        Shape (N,), float32.
    """
    if _is_sharded(head):
        logps_N: Tensor = _sharded(hidden_NH, head, partial(_fused, target_N=target_N, head=head, logit_map=logit_map))
        return logps_N
    if not _is_linear(head):
        return _by_calling(hidden_NH, target_N, head, logit_map)
    return _fused(hidden_NH, target_N, head, logit_map)


def projected_logps(
    hidden_NH: Tensor,
    target_N: Tensor,
    head: nn.Module,
    projection_VK: Tensor,
    *,
    logit_map: LogitMap = LogitMap(),
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target token and, from the same logits, its projected gradient by the head's output.

    For inference: neither result carries gradients, and no second product with the head is made.

    Args:
        hidden_NH: Hidden states that predict the targets.
        target_N: Token ids.
        head: As for `response_logps`.
        projection_VK: Float32; K numbers are kept of the V derivatives of each token.
        logit_map: What the model does to the head's output.

    Returns:
        Log-probabilities, shape (N,), and projected gradients as `projected_gradient` gives them, shape (N, K); both
        in float32.
    """
    if _is_sharded(head):
        compute = partial(
            _projected_linear, target_N=target_N, head=head, projection_VK=projection_VK, logit_map=logit_map
        )
        logps_N, gradient_NK = _sharded(hidden_NH, head, compute)
        return logps_N, gradient_NK
    if not _is_linear(head):
        return _projected(hidden_NH, target_N, lambda x_NH: logit_map(head(x_NH)), projection_VK, logit_map)
    return _projected_linear(hidden_NH, target_N, head, projection_VK, logit_map)


def projected_gradient(
    logits_NV: Tensor, target_N: Tensor, projection_VK: Tensor, logit_map: LogitMap
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target token and its gradient by the head's output, projected.

    ::

        Σ_v P[v] · (onehot(target) − softmax(logits))[v] · ∂logits[v]/∂head(hidden)[v]

    Args:
        logits_NV: In float32, after the logit map.
        target_N: Token ids.
        projection_VK: P, in float32.
        logit_map: What the model did to the head's output.

    Returns:
        Shapes (N,) and (N, K), float32.
    """
    logps_NV = logits_NV.log_softmax(dim=-1)
    logps_N = logps_NV.gather(1, target_N[:, None]).squeeze(1)
    minus_NV = logps_NV.exp_().scatter_add_(1, target_N[:, None], -torch.ones_like(logps_N)[:, None])
    with torch.autocast(logits_NV.device.type, enabled=False):
        return logps_N, (logit_map.backward(minus_NV, logits_NV) @ projection_VK).neg_()


def _is_sharded(head: nn.Module) -> TypeGuard[nn.Linear]:
    """By FSDP2, which makes a class of its own of each class, or by ZeRO-3."""
    return isinstance(head, nn.Linear) and is_sharded(head)


def _is_linear(head: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether calling the head is a product with its weights, which are at hand, and nothing else."""
    has_hooks = bool(head._forward_hooks or head._forward_pre_hooks or hasattr(head, "_hf_hook"))
    return type(head) is nn.Linear and bool(head.weight.numel()) and not has_hooks


def _fused(hidden_NH: Tensor, target_N: Tensor, head: nn.Linear, logit_map: LogitMap) -> Tensor:
    num_tokens = len(target_N)
    hidden_NH, weight_VH, bias_V, target_N = _cast(hidden_NH, target_N, head)
    if not torch.is_grad_enabled():
        # A parameter counts as one that needs a gradient even then. Without, the numbers are those of `projected_logps`
        # to the last bit, and no softmax is kept.
        weight_VH, bias_V = weight_VH.detach(), None if bias_V is None else bias_V.detach()
    logps_N: Tensor = _LinearLogps.apply(hidden_NH, weight_VH, bias_V, target_N, logit_map)  # type: ignore[no-untyped-call]
    # FSDP wants no views of what a module returns.
    return logps_N if len(logps_N) == num_tokens else logps_N[:num_tokens].clone()


def _projected_linear(
    hidden_NH: Tensor, target_N: Tensor, head: nn.Linear, projection_VK: Tensor, logit_map: LogitMap
) -> tuple[Tensor, Tensor]:
    num_tokens = len(target_N)
    hidden_NH, weight_VH, bias_V, target_N = _cast(hidden_NH, target_N, head)
    logps_N, gradient_NK = _projected(
        hidden_NH, target_N, lambda x_NH: _logits(x_NH, weight_VH, bias_V, logit_map), projection_VK, logit_map
    )
    return logps_N[:num_tokens].clone(), gradient_NK[:num_tokens].clone()


def _projected(
    hidden_NH: Tensor,
    target_N: Tensor,
    logits_of: Callable[[Tensor], Tensor],
    projection_VK: Tensor,
    logit_map: LogitMap,
) -> tuple[Tensor, Tensor]:
    pieces = _pieces(len(target_N), len(projection_VK), hidden_NH.device.type)
    found = [
        projected_gradient(logits_of(hidden_NH[piece]), target_N[piece], projection_VK, logit_map) for piece in pieces
    ]
    logps, gradients = zip(*found, strict=True)
    return torch.cat(logps), torch.cat(gradients)


def _cast(hidden_NH: Tensor, target_N: Tensor, head: nn.Linear) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Hidden states, weights, bias and targets as the product takes them: of one type, tokens filled up.

    Inside a function of our own autocast does not act, so its casts are made here, where they are differentiated.
    """
    device = hidden_NH.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.weight.dtype
    if missing := round_length(len(target_N), device, dtype) - len(target_N):
        hidden_NH = nn.functional.pad(hidden_NH, (0, 0, 0, missing))
        target_N = nn.functional.pad(target_N, (0, missing))
    bias_V = None if head.bias is None else head.bias.to(dtype)
    return hidden_NH.to(dtype), head.weight.to(dtype), bias_V, target_N


def _sharded(hidden_NH: Tensor, head: nn.Linear, compute: Callable[[Tensor], Any]) -> Any:
    """What is computed of a head whose weights are gathered for the time of a call.

    One call, however many tokens a process has: each call gathers, and processes that do not make the same number of
    calls wait for each other for ever.
    """
    head.forward = compute  # type: ignore[method-assign, assignment]
    try:
        return head(hidden_NH)
    finally:
        del head.forward


def _num_at_once(vocabulary: int, device: str) -> int:
    """Tokens whose logits the budget allows."""
    budget = LOGITS_BUDGET_BYTES["cpu" if device == "cpu" else "cuda"]
    return max(budget // (4 * max(vocabulary, 1)), 1)


def piece_tokens(vocabulary: int, device: str) -> int:
    """Most tokens whose logits are made in one go.

    Args:
        vocabulary: Logits of a token.
        device: Type of the device.
    """
    size = _num_at_once(vocabulary, device)
    return min(size, _PIECE_TOKENS.get(device, size))


def _pieces(num_tokens: int, vocabulary: int, device: str) -> list[slice]:
    size = piece_tokens(vocabulary, device)
    return [slice(start, start + size) for start in range(0, num_tokens, size)]


class _LinearLogps(torch.autograd.Function):
    """Linear layer, cap, log-softmax and choice of the target in one; the gradient is written out below."""

    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, target_N: Tensor, logit_map: LogitMap
    ) -> Tensor:
        num_tokens, vocabulary = len(hidden_NH), len(weight_VH)
        ctx.needs_softmax = any(ctx.needs_input_grad[:3])
        is_kept = ctx.needs_softmax and num_tokens <= _num_at_once(vocabulary, hidden_NH.device.type)
        logps_N = torch.empty(num_tokens, dtype=torch.float32, device=hidden_NH.device)
        softmax_NV = hidden_NH.new_empty(num_tokens, vocabulary, dtype=torch.float32) if is_kept else None
        for piece in _pieces(num_tokens, vocabulary, hidden_NH.device.type):
            logits_NV = _logits(hidden_NH[piece], weight_VH, bias_V, logit_map)
            if softmax_NV is None:
                logps_N[piece] = logits_NV.log_softmax(dim=-1).gather(1, target_N[piece, None]).squeeze(1)
            else:
                torch.softmax(logits_NV, dim=-1, out=softmax_NV[piece])
                # The largest softmax, 1/V at least, is exp of the largest logit less the sum's logarithm.
                lse_N = logits_NV.amax(dim=-1) - softmax_NV[piece].amax(dim=-1).log_()
                logps_N[piece] = logits_NV.gather(1, target_N[piece, None]).squeeze(1) - lse_N
        ctx.logit_map = logit_map
        ctx.save_for_backward(hidden_NH, weight_VH, bias_V, target_N, softmax_NV)
        return logps_N

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """∂logp/∂logits = onehot(target) − softmax; a bound multiplies it by 1 − (logits/cap)², a factor by itself."""
        hidden_NH, weight_VH, bias_V, target_N, softmax_NV = ctx.saved_tensors
        (gradient_N,) = gradients
        d_hidden_NH = torch.empty_like(hidden_NH) if ctx.needs_input_grad[0] else None
        d_weight_VH = torch.zeros_like(weight_VH, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        d_bias_V = torch.zeros_like(bias_V, dtype=torch.float32) if ctx.needs_input_grad[2] else None
        for piece in _pieces(len(hidden_NH), len(weight_VH), hidden_NH.device.type):
            logits_NV = None
            if softmax_NV is None or ctx.logit_map.cap is not None:
                logits_NV = _logits(hidden_NH[piece], weight_VH, bias_V, ctx.logit_map)
            d_logits_NV = (
                softmax_NV[piece] if logits_NV is None or softmax_NV is not None else logits_NV.softmax(dim=-1)
            )
            d_logits_NV = d_logits_NV * -gradient_N[piece, None]
            d_logits_NV.scatter_add_(1, target_N[piece, None], gradient_N[piece, None])
            d_logits_NV = ctx.logit_map.backward(d_logits_NV, logits_NV).to(weight_VH.dtype)
            if d_hidden_NH is not None:
                torch.mm(d_logits_NV, weight_VH, out=d_hidden_NH[piece])
            if d_weight_VH is not None:
                if weight_VH.dtype == torch.float32:
                    d_weight_VH.addmm_(d_logits_NV.t(), hidden_NH[piece])
                else:
                    d_weight_VH += d_logits_NV.t() @ hidden_NH[piece]
            if d_bias_V is not None:
                d_bias_V += d_logits_NV.sum(dim=0)
        return (
            d_hidden_NH,
            None if d_weight_VH is None else d_weight_VH.to(weight_VH.dtype),
            None if d_bias_V is None else d_bias_V.to(weight_VH.dtype),
            None,
            None,
        )


def _logits(hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, logit_map: LogitMap) -> Tensor:
    return logit_map.overwrite(nn.functional.linear(hidden_NH, weight_VH, bias_V).float())


def _by_calling(hidden_NH: Tensor, target_N: Tensor, head: nn.Module, logit_map: LogitMap) -> Tensor:
    """The same through the head's own `forward`; in one call where its weights are gathered, see `_sharded`."""
    size = _num_at_once(_num_outputs(head), hidden_NH.device.type)
    if len(target_N) <= size or is_sharded(head):
        return _token_logps(hidden_NH, target_N, head, logit_map)
    pieces = zip(hidden_NH.split(size), target_N.split(size), strict=True)
    return torch.cat(
        [checkpoint(_token_logps, hidden, target, head, logit_map, use_reentrant=False) for hidden, target in pieces]
    )


def _num_outputs(head: nn.Module) -> int:
    """Of whatever kind; quantized weights are packed, so their shape does not tell."""
    known = getattr(head, "out_features", None)
    return int(head.get_parameter("weight").shape[0]) if known is None else int(known)


def _token_logps(hidden_NH: Tensor, target_N: Tensor, head: nn.Module, logit_map: LogitMap) -> Tensor:
    logits_NV = logit_map(head(hidden_NH))
    return logits_NV.gather(1, target_N[:, None]).squeeze(1) - logits_NV.logsumexp(dim=-1)
