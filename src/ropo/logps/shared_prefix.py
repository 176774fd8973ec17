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

from ropo.data.tokenize import TokenizedPair
from ropo.logps.batch import LAYOUTS, Batch
from ropo.logps.forward import plain_logps, sum_by_response
from ropo.logps.response_head import response_logps
from ropo.logps.tree_attention import BUCKET_TOKENS, NAME, row_mask, tree_mask
from ropo.pairs import PairLogps

logger = logging.getLogger(__name__)


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
        attention_mask=tree_mask(batch["branch"]),
        response_source=batch["source"],
        response_target=batch["target"],
    )
    return sum_by_response(logps_N, batch["response"], num_pairs=len(batch["input_ids"]))


def packed_logps(model: nn.Module, batch: Batch) -> PairLogps:
    """The same with all pairs in one row, so that nothing is padded.

    Args:
        model: As for `shared_prefix_logps`, with `tree_attention.NAME` as its attention.
        batch: What `packed_batch` returns, on the model's device.

    Returns:
        As `shared_prefix_logps`.
    """
    input_ids, position_ids = batch["input_ids"], batch["position_ids"]
    if input_ids.device.type != "cpu":
        missing = -input_ids.shape[1] % BUCKET_TOKENS
        input_ids, position_ids = (nn.functional.pad(tensor, (0, missing)) for tensor in (input_ids, position_ids))
    logps_N = model(
        input_ids=input_ids,
        position_ids=position_ids,
        attention_mask=row_mask(batch["lengths"], input_ids.shape[1]),
        response_source=batch["source"],
        response_target=batch["target"],
    )
    return sum_by_response(logps_N, batch["response"], num_pairs=len(batch["lengths"]))


def padding_free_logps(model: nn.Module, batch: Batch) -> PairLogps:
    """The same without sharing: every response behind its own copy of the prompt, all in one row.

    For flash-attention, which takes no mask; `transformers` finds the sequences by their positions.

    Args:
        model: As for `shared_prefix_logps`.
        batch: What `padding_free_batch` returns, on the model's device.

    Returns:
        As `shared_prefix_logps`.
    """
    logps_N = model(
        input_ids=batch["input_ids"],
        position_ids=batch["position_ids"],
        attention_mask=None,
        response_source=batch["source"],
        response_target=batch["target"],
    )
    return sum_by_response(logps_N, batch["response"], num_pairs=len(batch["lengths"]) // 2)


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
    # Eager attention adds its mask to the scores instead of selecting by it.
    if mask is not None and self.config._attn_implementation == "eager":
        mask = torch.where(mask, 0.0, torch.finfo(self.dtype).min).to(self.dtype)
    hidden_BTH = self.get_decoder()(
        input_ids=kwargs["input_ids"], position_ids=kwargs["position_ids"], attention_mask=mask, use_cache=False
    ).last_hidden_state
    hidden_NH = hidden_BTH.flatten(0, 1)[source_N]
    cap = getattr(self.config, "final_logit_softcapping", None)
    return response_logps(hidden_NH, target_N, self.get_output_embeddings(), cap=cap)


def _causal_lm(model: nn.Module) -> Any:
    """The module that owns the language-model head: the model itself, or what PEFT wraps."""
    return getattr(model, "get_base_model", lambda: model)()


def vocabulary_size(model: nn.Module) -> int:
    """How many logits a position has."""
    return int(_causal_lm(model).config.get_text_config().vocab_size)


def choose_layout(
    model: nn.Module, tokens: Sequence[TokenizedPair], *, pad_token_id: int, max_length: int
) -> tuple[str, str]:
    """Find out which fast forward a model may use, by comparing with the plain one on real pairs.

    A model that takes the packed layout keeps the attention `tree_attention.NAME`, which is `sdpa` for everything else.

    Args:
        model: A causal language model with its weights in place, not yet wrapped for distributed training.
        tokens: A few pairs; two are enough.
        pad_token_id: For the batches.
        max_length: Longest sequence that will be seen; a sliding window shorter than it rules the fast ways out.

    Returns:
        The name of the layout, of `LAYOUTS`, and the reason in one sentence.
    """
    candidates, reason = _candidates(model, max_length=max_length)
    if not candidates:
        return "plain", reason
    enable_response_logps(model)
    was_training = model.training
    model.eval()
    try:
        plain = _logps(model, tokens, "plain", pad_token_id)
        for layout in candidates:
            found = _disagreement(model, tokens, layout, plain, pad_token_id)
            if found is None:
                return layout, "it agrees with the plain forward"
            reason = found
    finally:
        model.train(was_training)
    return "plain", reason


def _logps(model: nn.Module, tokens: Sequence[TokenizedPair], layout: str, pad_token_id: int) -> Tensor:
    """Log-probabilities of both responses in one layout, shape (2, pairs)."""
    batch = LAYOUTS[layout](tokens, pad_token_id=pad_token_id)
    device = next(model.parameters()).device
    # Flash-attention takes no float32; such a model is trained under autocast, so it is compared under autocast.
    to_bf16 = torch.autocast(device.type, dtype=torch.bfloat16, enabled=_has_flash_attention(model))
    with torch.no_grad(), to_bf16:
        found = FORWARDS[layout](model, {name: tensor.to(device) for name, tensor in batch.items()})
    return torch.stack([found.chosen, found.rejected])


def _disagreement(
    model: nn.Module, tokens: Sequence[TokenizedPair], layout: str, plain: Tensor, pad_token_id: int
) -> str | None:
    """Why a layout cannot be used, in one sentence, or None; only where it can does the model keep its attention."""
    config = _causal_lm(model).config
    before = config._attn_implementation
    if layout == "packed":
        if before not in ("sdpa", NAME):
            return f"attention {before!r} takes no packed rows; attn_implementation='sdpa' does"
        config._attn_implementation = NAME
    try:
        difference = (_logps(model, tokens, layout, pad_token_id) - plain).abs()
    except (TypeError, ValueError, RuntimeError, KeyError, AttributeError, IndexError) as error:
        config._attn_implementation = before
        return f"the model does not take this layout ({type(error).__name__}: {str(error)[:120]})"
    # A wrong mask or position shifts a log-probability by nats; rounding in half precision by a per cent or so.
    is_exact = next(model.parameters()).dtype == torch.float32 and not _has_flash_attention(model)
    relative, absolute = (1e-4, 1e-3) if is_exact else (2e-2, 0.5)
    if bool((difference <= absolute + relative * plain.abs()).all()):
        return None
    config._attn_implementation = before
    return f"the layout {layout!r} changes this model's log-probabilities by up to {difference.max():.3g} nats"


def _candidates(model: nn.Module, *, max_length: int) -> tuple[tuple[str, ...], str]:
    """The fast layouts worth a try, the fastest first, or none and what rules them out, in one sentence."""
    causal_lm = _causal_lm(model)
    config = getattr(causal_lm, "config", None)
    if config is None or getattr(causal_lm, "get_output_embeddings", lambda: None)() is None:
        return (), "the model has no language-model head to read"
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        return (), "prompt learning puts virtual tokens before the prompt"
    attention = getattr(config, "_attn_implementation", None)
    if _has_flash_attention(model):
        return ("padding_free",), ""
    if attention not in ("sdpa", "eager", NAME):
        return (), f"attention {attention!r} takes no tree mask; attn_implementation='sdpa' does"
    window = getattr(config, "sliding_window", None)
    if window is not None and getattr(config, "use_sliding_window", True) and window < max_length:
        return (), f"the model's sliding window of {window} tokens is shorter than max_length={max_length}"
    return ("packed", "shared_prefix"), ""


def _has_flash_attention(model: nn.Module) -> bool:
    """Whatever its version and whoever built its kernel: `flash_attention_2`, `kernels-community/flash-attn3`, ..."""
    return "flash" in str(_causal_lm(model).config._attn_implementation)


FORWARDS: MappingProxyType[str, Callable[[nn.Module, Batch], PairLogps]] = MappingProxyType(
    {
        "plain": plain_logps,
        "padding_free": padding_free_logps,
        "shared_prefix": shared_prefix_logps,
        "packed": packed_logps,
    }
)
