"""The fast forward: the prompt once, both responses after it, logits only where a response token is predicted.

In: a causal language model and a `shared_prefix_batch`. Out: `PairLogps`, the same numbers as `forward.plain_logps`.

The one idea: chosen and rejected are two branches that grow from the same prompt. One row holds all three, a mask
keeps the branches from seeing each other, and positions restart at the fork. Which models allow this is found out
by comparing with the plain forward (`choose_layout`), not by a list of names.

Shapes: B rows, T positions, V vocabulary, N response tokens, H hidden size.
"""

import logging
from collections.abc import Callable, Sequence
from types import MappingProxyType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ropo.data.tokenize import TokenizedPair
from ropo.logps.batch import LAYOUTS, Batch
from ropo.logps.forward import plain_logps, sum_by_response
from ropo.pairs import PairLogps

logger = logging.getLogger(__name__)

# Most bytes of float32 logits alive at once. Above it they are made in pieces and made again in the backward pass.
_LOGITS_BUDGET_BYTES = 256 * 2**20


def shared_prefix_logps(model: nn.Module, batch: Batch) -> PairLogps:
    """Summed log-probability of every response, with each prompt encoded once.

    Args:
        model: A causal language model that `enable_response_logps` was called on, or a wrapper around it
            (PEFT, DDP, FSDP): the call goes through the wrapper, so its hooks run.
        batch: What `shared_prefix_batch` returns, on the model's device.

    Returns:
        Log-probabilities in float32 with token counts; carries gradients when they are enabled.
    """
    logps_N = model(
        input_ids=batch["input_ids"],
        position_ids=batch["position_ids"],
        attention_mask=_tree_mask(batch["branch"]),
        response_source=batch["source"],
        response_target=batch["target"],
    )
    return sum_by_response(logps_N, batch["response"], num_pairs=len(batch["input_ids"]))


def _tree_mask(branch_BT: Tensor) -> Tensor:
    """Who may look at whom, shape (B, 1, T, T), True where row position q may see k.

    Earlier positions of the prompt or of one's own branch. Padding (-1) forms a branch of its own, so that no row
    of the mask is empty, which would make its softmax undefined.
    """
    width = branch_BT.shape[1]
    is_prompt_B1T = branch_BT[:, None, :] == 0
    is_same_BTT = branch_BT[:, :, None] == branch_BT[:, None, :]
    is_past_TT = torch.ones(width, width, dtype=torch.bool, device=branch_BT.device).tril()
    return ((is_prompt_B1T | is_same_BTT) & is_past_TT)[:, None]


def enable_response_logps(model: nn.Module) -> None:
    """Teach a causal language model to answer `response_source` and `response_target` with log-probabilities.

    Calls without these two arguments (generation, plain forward) behave as before. The method is bound on the
    instance that owns the language-model head, inside any PEFT wrapper, so that every outer wrapper's `forward`
    passes through it. Calling it twice does no harm.

    Args:
        model: A causal language model of `transformers`, with or without PEFT.
    """
    causal_lm = _causal_lm(model)
    if getattr(causal_lm.forward, "__func__", None) is not _forward:
        if "forward" in vars(causal_lm):  # somebody (device placement hooks) has wrapped this instance already
            causal_lm._ropo_wrapped_forward = causal_lm.forward
        causal_lm.forward = MethodType(_forward, causal_lm)


def _forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    source_N, target_N = kwargs.pop("response_source", None), kwargs.pop("response_target", None)
    if source_N is None:
        wrapped = getattr(self, "_ropo_wrapped_forward", None)
        return wrapped(*args, **kwargs) if wrapped else type(self).forward(self, *args, **kwargs)
    mask = kwargs["attention_mask"]
    if self.config._attn_implementation == "eager":  # adds its mask to the scores instead of selecting by it
        mask = torch.where(mask, 0.0, torch.finfo(self.dtype).min).to(self.dtype)
    hidden_BTH = self.get_decoder()(
        input_ids=kwargs["input_ids"], position_ids=kwargs["position_ids"], attention_mask=mask, use_cache=False
    ).last_hidden_state
    hidden_NH = hidden_BTH.flatten(0, 1)[source_N]
    cap = getattr(self.config, "final_logit_softcapping", None)
    return _response_logps(hidden_NH, target_N, self.get_output_embeddings(), cap)


def _response_logps(hidden_NH: Tensor, target_N: Tensor, head: nn.Module, cap: float | None) -> Tensor:
    """Log-probability of each target, shape (N,), without ever holding all logits when they are many."""
    vocabulary = int(head.get_parameter("weight").shape[0])
    piece = max(_LOGITS_BUDGET_BYTES // (4 * vocabulary), 1)
    if len(target_N) <= piece:
        return _token_logps(hidden_NH, target_N, head, cap)
    pieces = zip(hidden_NH.split(piece), target_N.split(piece), strict=True)
    return torch.cat(
        [checkpoint(_token_logps, hidden, target, head, cap, use_reentrant=False) for hidden, target in pieces]
    )


def _token_logps(hidden_NH: Tensor, target_N: Tensor, head: nn.Module, cap: float | None) -> Tensor:
    logits_NV: Tensor = head(hidden_NH).float()
    if cap is not None:  # Gemma 2 bounds its logits after the head
        logits_NV = cap * torch.tanh(logits_NV / cap)
    return logits_NV.gather(1, target_N[:, None]).squeeze(1) - logits_NV.logsumexp(dim=-1)


def _causal_lm(model: nn.Module) -> Any:
    """The module that owns the language-model head: the model itself, or what PEFT wraps."""
    return getattr(model, "get_base_model", lambda: model)()


def choose_layout(
    model: nn.Module, tokens: Sequence[TokenizedPair], *, pad_token_id: int, max_length: int
) -> tuple[str, str]:
    """Find out whether a model may use the fast forward, by comparing it with the plain one on real pairs.

    Args:
        model: A causal language model with its weights in place, not yet wrapped for distributed training.
        tokens: A few pairs; two are enough.
        pad_token_id: For the batches.
        max_length: Longest sequence that will be seen; a sliding window shorter than it rules the fast way out.

    Returns:
        The name of the layout, "shared_prefix" or "plain", and the reason in one sentence.
    """
    obstacle = _obstacle(model, max_length=max_length)
    if obstacle:
        return "plain", obstacle
    enable_response_logps(model)
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    logps = {}
    try:
        with torch.no_grad():
            for layout, logps_of in FORWARDS.items():
                batch = LAYOUTS[layout](tokens, pad_token_id=pad_token_id)
                found = logps_of(model, {name: tensor.to(device) for name, tensor in batch.items()})
                logps[layout] = torch.stack([found.chosen, found.rejected])
    except (TypeError, ValueError, RuntimeError, KeyError, AttributeError) as error:
        return "plain", f"the model does not take a tree mask ({type(error).__name__}: {str(error)[:120]})"
    finally:
        model.train(was_training)
    difference = (logps["shared_prefix"] - logps["plain"]).abs()
    # A wrong mask or position shifts a log-probability by nats; rounding in half precision by a per cent or so.
    is_float32 = next(model.parameters()).dtype == torch.float32
    relative, absolute = (1e-4, 1e-3) if is_float32 else (2e-2, 0.5)
    if not bool((difference <= absolute + relative * logps["plain"].abs()).all()):
        return "plain", f"a tree mask changes this model's log-probabilities by up to {difference.max():.3g} nats"
    return "shared_prefix", f"it agrees with the plain forward to {difference.max():.1e} nats"


def _obstacle(model: nn.Module, *, max_length: int) -> str | None:
    """What rules the fast forward out before it is tried, in one sentence, or None."""
    causal_lm = _causal_lm(model)
    config = getattr(causal_lm, "config", None)
    if config is None or getattr(causal_lm, "get_output_embeddings", lambda: None)() is None:
        return "the model has no language-model head to read"
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        return "prompt learning puts virtual tokens before the prompt"
    attention = getattr(config, "_attn_implementation", None)
    if attention not in ("sdpa", "eager"):
        return f"attention {attention!r} takes no tree mask; attn_implementation='sdpa' does"
    window = getattr(config, "sliding_window", None)
    if window is not None and getattr(config, "use_sliding_window", True) and window < max_length:
        return f"the model's sliding window of {window} tokens is shorter than max_length={max_length}"
    return None


FORWARDS: MappingProxyType[str, Callable[[nn.Module, Batch], PairLogps]] = MappingProxyType(
    {"plain": plain_logps, "shared_prefix": shared_prefix_logps}
)
