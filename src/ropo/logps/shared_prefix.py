"""The fast forward: the prompt once, both responses after it, logits only where a response token is predicted.

In: a causal language model and a batch of `LAYOUTS`. Out: `PairLogps`, the same numbers as `forward.plain_logps`.

The one idea: chosen and rejected are two branches that grow from the same prompt. One row holds all three, a mask
keeps the branches from seeing each other, and positions restart at the fork. Which models allow this is found out
by comparing with the plain forward (`choose.choose_layout`), not by a list of names.

Shapes: B rows, T positions, V vocabulary, N response tokens, R positions that predict one, H hidden size.
"""

import contextlib
from collections.abc import Callable
from functools import partial
from types import MappingProxyType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from ropo.logps.batch import Batch
from ropo.logps.forward import plain_logps, sum_by_response
from ropo.logps.last_layer import last_mlp_at
from ropo.logps.load_balance import LoadBalance
from ropo.logps.reach import Reach, answered_masks
from ropo.logps.response_head import LogitMap, response_logps, round_length
from ropo.logps.tree_mask import row_mask, tree_mask
from ropo.pairs import PairLogps

# Packed rows on a GPU are filled up to whole blocks of FlexAttention, and to two at least: one would be a shape of its
# own, while a kernel that has met two lengths takes any.
_GPU_BLOCK = 128


def shared_prefix_logps(model: nn.Module, batch: Batch) -> PairLogps:
    """Summed log-probability of every response, with each prompt encoded once.

    Args:
        model: A causal language model that `enable_response_logps` was called on, or a wrapper around it
            (PEFT, DDP, FSDP): the call goes through the wrapper, so its hooks run.
        batch: What `shared_prefix_batch` returns, on the model's device.

    Returns:
        Log-probabilities in float32 with token counts; carries gradients when they are enabled.
    """
    return _by_response(
        model,
        batch,
        num_pairs=len(batch["input_ids"]),
        position_ids=batch["position_ids"],
        attention_mask=torch.ones_like(batch["input_ids"]),
        response_branch=batch["branch"],
    )


def packed_logps(model: nn.Module, batch: Batch) -> PairLogps:
    """The same with all pairs in one row (`packed_batch`), for models with `tree_attention.NAME`: nothing is padded."""
    return _by_response(
        model,
        batch,
        num_pairs=len(batch["lengths"]),
        position_ids=batch["position_ids"],
        attention_mask=torch.ones_like(batch["input_ids"]),
        response_lengths=batch["lengths"],
    )


def padding_free_logps(model: nn.Module, batch: Batch) -> PairLogps:
    """The same without sharing: every response behind its own copy of the prompt, all in one row.

    For flash-attention, which takes no mask but where each sequence begins; of `padding_free_batch`.
    """
    return _by_response(
        model,
        batch,
        num_pairs=len(batch["lengths"]) // 2,
        position_ids=batch["position_ids"],
        attention_mask=None,
        response_sequences=batch["lengths"],
    )


def plain_rows_logps(model: nn.Module, batch: Batch) -> PairLogps:
    """Two rows per pair as in the plain forward, with logits only where a response token is predicted.

    For models whose layers carry a state along the row, or whose attention takes no tree; of `plain_batch`.
    """
    num_pairs = len(batch["input_ids"]) // 2
    return _by_response(model, batch, num_pairs=num_pairs, attention_mask=batch["attention_mask"])


def _by_response(model: nn.Module, batch: Batch, *, num_pairs: int, **layout: Tensor | None) -> PairLogps:
    logps_N = model(
        input_ids=batch["input_ids"],
        **{f"response_{name}": batch[name] for name in ("source", "read", "target")},
        **layout,
    )
    return sum_by_response(logps_N, batch["response"], num_pairs=num_pairs)


def enable_response_logps(model: nn.Module, logit_map: LogitMap | None = None) -> None:
    """Teach a causal language model to answer `response_source`, `_read` and `_target` with log-probabilities.

    With `response_branch` (pairs, T) each row is a tree, with `response_lengths` (pairs, 3) it is a packed one, with
    `response_sequences` one of so many tokens each.

    Calls without these arguments (generation, plain forward) behave as before. The method is bound on the
    instance that owns the language-model head, inside any PEFT wrapper, so that every outer wrapper's `forward`
    passes through it. Calling it twice does no harm.

    Args:
        model: A causal language model of `transformers`, with or without PEFT.
        logit_map: What the model does to its head's output; None for nothing, or what was said before.
    """
    causal_lm = causal_lm_of(model)
    if logit_map is not None or not hasattr(causal_lm, "_ropo_logit_map"):
        causal_lm._ropo_logit_map = logit_map or LogitMap()
    # Not told by looking at `forward`: mixed precision wraps ours, and must not be wrapped by us again.
    if hasattr(causal_lm, "_ropo_wrapped_forward"):
        return
    is_wrapped = "forward" in vars(causal_lm)  # by device placement hooks
    causal_lm._ropo_wrapped_forward = causal_lm.forward if is_wrapped else None
    causal_lm._ropo_balance = None
    causal_lm.forward = MethodType(_forward, causal_lm)


def balance_load(model: nn.Module, coefficient: float) -> LoadBalance:
    """Compute the auxiliary loss of a model's routers in every forward pass with gradients.

    Args:
        model: As for `enable_response_logps`, which was called on it.
        coefficient: See `LoadBalance`.

    Raises:
        ValueError: If the model has no such loss.
    """
    causal_lm = causal_lm_of(model)
    causal_lm._ropo_balance = LoadBalance(causal_lm, coefficient=coefficient)
    found: LoadBalance = causal_lm._ropo_balance
    return found


def _forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    names = ("branch", "lengths", "sequences", "source", "read", "target")
    branch_BT, lengths_P3, sequences_S, source_N, read_R, target_N = (
        kwargs.pop(f"response_{name}", None) for name in names
    )
    if source_N is None:
        wrapped = self._ropo_wrapped_forward
        return wrapped(*args, **kwargs) if wrapped else type(self).forward(self, *args, **kwargs)
    balance = self._ropo_balance if torch.is_grad_enabled() else None
    num_tokens = kwargs["input_ids"].shape[1]
    if lengths_P3 is not None:
        kwargs, read_R = _filled_up(kwargs, read_R, self.dtype)
    if sequences_S is not None:
        kwargs |= _starts(sequences_S)
    decoder = decoder_of(self)
    masks: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    answer: Callable[[Reach | None], Tensor | BlockMask]
    if lengths_P3 is not None:
        answer = partial(row_mask, lengths_P3, kwargs["input_ids"].shape[1])
        masks = answered_masks(decoder.config._attn_implementation, answer)
    elif branch_BT is not None:
        answer = partial(tree_mask, branch_BT, kwargs["position_ids"])
        masks = answered_masks(decoder.config._attn_implementation, answer)
    routed = {} if balance is None else {"output_router_logits": True}
    last = last_mlp_at(decoder, read_R) if balance is None else contextlib.nullcontext()  # routers read all positions
    with masks, last:
        outputs = decoder(**kwargs, **routed, use_cache=False)
    if balance is not None:
        is_token_BT = kwargs["attention_mask"] if branch_BT is None else branch_BT >= 0
        if is_token_BT is None or lengths_P3 is not None:  # one row without padding, but for what fills it up
            is_token_BT = torch.arange(kwargs["input_ids"].shape[1], device=self.device)[None] < num_tokens
        balance.read(outputs.router_logits, is_token_BT)
    hidden_NH = outputs.last_hidden_state.flatten(0, 1)[source_N]
    head, logit_map = self.get_output_embeddings(), self._ropo_logit_map
    # Set while features are read from the same hidden states and logits (`features.FeatureReader`).
    read_head = getattr(self, "_ropo_read_head", response_logps)
    return read_head(hidden_NH, target_N, head, logit_map=logit_map)


def _starts(sequences_S: Tensor) -> dict[str, Any]:
    """Where sequences of these many tokens begin, as flash-attention takes it.

    Otherwise `transformers` finds it out from the positions, in every layer anew, and waits for the device each time.
    """
    starts, longest = nn.functional.pad(sequences_S.cumsum(0, dtype=torch.int32), (1, 0)), int(sequences_S.max())
    return {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": longest, "max_length_k": longest}


def _filled_up(inputs: dict[str, Any], read_R: Tensor, dtype: torch.dtype) -> tuple[dict[str, Any], Tensor]:
    """A packed row of a round length, and as many positions to read, so that few shapes are compiled.

    Called where autocast acts, since a CPU needs it in half precision only.

    Args:
        inputs: Tokens, their positions and a mask of ones, each of shape (1, T); None for what PEFT names in vain.
        read_R: Places in the row, each once.
        dtype: Of the model.

    Returns:
        Both with what fills them up behind: nothing that is asked for depends on it.
    """
    num_tokens, device = inputs["input_ids"].shape[1], inputs["input_ids"].device.type
    if device != "cpu":
        missing = max(-num_tokens % _GPU_BLOCK, 2 * _GPU_BLOCK - num_tokens)
    else:
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else dtype
        missing = round_length(num_tokens, device, dtype) - num_tokens
        if num_unread := round_length(len(read_R), device, dtype) - len(read_R):
            is_unread_T = torch.ones(num_tokens + missing, dtype=torch.bool).index_fill_(0, read_R, value=False)
            read_R = torch.cat([read_R, is_unread_T.nonzero().squeeze(1)[:num_unread]])
    if missing:
        fills = {"attention_mask": 1}
        inputs = {
            name: None if row_1T is None else nn.functional.pad(row_1T, (0, missing), value=fills.get(name, 0))
            for name, row_1T in inputs.items()
        }
    return inputs, read_R


def causal_lm_of(model: nn.Module) -> Any:
    """The module that owns the language-model head: the model itself, or what PEFT or DeepSpeed wraps.

    Args:
        model: A causal language model, with or without PEFT.
    """
    inner = getattr(model, "module", model)
    return getattr(inner, "get_base_model", lambda: inner)()


def decoder_of(causal_lm: Any) -> Any:
    """The module between the tokens and the last hidden states."""
    decoder = causal_lm.get_decoder()
    # Some classes (Llama 4) name it after a larger model that they may be a part of, and are not found out.
    return getattr(causal_lm, "model", decoder) if decoder is causal_lm else decoder


def vocabulary_size(model: nn.Module) -> int:
    """How many logits a position has."""
    return int(causal_lm_of(model).config.get_text_config().vocab_size)


def has_exact_products(model: nn.Module) -> bool:
    """Whether all products of a model are those of float32: no half precision, no quantised weights, no TF32."""
    weight = next(model.parameters())
    # The newer name is that of torch 2.9.
    found = getattr(torch.backends.cuda.matmul, "fp32_precision", torch.get_float32_matmul_precision())
    has_tf32 = weight.device.type == "cuda" and found in ("tf32", "high", "medium")
    is_quantized = getattr(causal_lm_of(model), "is_quantized", False)
    return weight.dtype == torch.float32 and not has_tf32 and not is_quantized


FORWARDS: MappingProxyType[str, Callable[[nn.Module, Batch], PairLogps]] = MappingProxyType(
    {
        "plain": plain_logps,
        "plain_rows": plain_rows_logps,
        "padding_free": padding_free_logps,
        "shared_prefix": shared_prefix_logps,
        "packed": packed_logps,
    }
)
