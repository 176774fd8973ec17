"""The fast forward: the prompt once, both responses after it, logits only where a response token is predicted.

In: a causal language model and a `shared_prefix_batch`. Out: `PairLogps`, the same numbers as `forward.plain_logps`.

The one idea: chosen and rejected are two branches that grow from the same prompt. One row holds all three, a mask
keeps the branches from seeing each other, and positions restart at the fork. Which models allow this is found out
by comparing with the plain forward (`choose_layout`), not by a list of names.

Shapes: B rows, T positions, V vocabulary, N response tokens, R positions that predict one, H hidden size.
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
from ropo.logps.last_layer import last_mlp_at
from ropo.logps.response_head import response_logps, round_length
from ropo.logps.tree_attention import NAME, row_mask, tree_mask
from ropo.pairs import PairLogps

logger = logging.getLogger(__name__)

# Packed rows on a GPU are filled up to whole blocks of FlexAttention, and to two at least: one would be a shape of its
# own, while a kernel that has met two lengths takes any.
_GPU_BLOCK = 128
# Prompt and responses of pairs that layouts are compared on have this many tokens, if there are such pairs.
_SHORTEST_PART = 8


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
        response_read=batch["read"],
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
    logps_N = model(
        input_ids=batch["input_ids"],
        position_ids=batch["position_ids"],
        attention_mask=None,
        response_lengths=batch["lengths"],
        response_source=batch["source"],
        response_read=batch["read"],
        response_target=batch["target"],
    )
    return sum_by_response(logps_N, batch["response"], num_pairs=len(batch["lengths"]))


def padding_free_logps(model: nn.Module, batch: Batch) -> PairLogps:
    """The same without sharing: every response behind its own copy of the prompt, all in one row.

    For flash-attention, which takes no mask but where each sequence begins.

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
        response_sequences=batch["lengths"],
        response_source=batch["source"],
        response_read=batch["read"],
        response_target=batch["target"],
    )
    return sum_by_response(logps_N, batch["response"], num_pairs=len(batch["lengths"]) // 2)


def enable_response_logps(model: nn.Module) -> None:
    """Teach a causal language model to answer `response_source`, `_read` and `_target` with log-probabilities.

    With `response_lengths` (pairs, 3) the row is a packed one, with `response_sequences` one of so many tokens each.

    Calls without these arguments (generation, plain forward) behave as before. The method is bound on the
    instance that owns the language-model head, inside any PEFT wrapper, so that every outer wrapper's `forward`
    passes through it. Calling it twice does no harm.

    Args:
        model: A causal language model of `transformers`, with or without PEFT.
    """
    causal_lm = _causal_lm(model)
    # Not told by looking at `forward`: mixed precision wraps ours, and must not be wrapped by us again.
    if hasattr(causal_lm, "_ropo_wrapped_forward"):
        return
    is_wrapped = "forward" in vars(causal_lm)  # by device placement hooks
    causal_lm._ropo_wrapped_forward = causal_lm.forward if is_wrapped else None
    causal_lm.forward = MethodType(_forward, causal_lm)


def _forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    names = ("lengths", "sequences", "source", "read", "target")
    lengths_P3, sequences_S, source_N, read_R, target_N = (kwargs.pop(f"response_{name}", None) for name in names)
    if source_N is None:
        wrapped = self._ropo_wrapped_forward
        return wrapped(*args, **kwargs) if wrapped else type(self).forward(self, *args, **kwargs)
    mask = kwargs["attention_mask"]
    # Eager attention adds its mask to the scores instead of selecting by it.
    if mask is not None and self.config._attn_implementation == "eager":
        mask = torch.where(mask, 0.0, torch.finfo(self.dtype).min).to(self.dtype)
    input_ids, position_ids = kwargs["input_ids"], kwargs["position_ids"]
    if lengths_P3 is not None:
        input_ids, position_ids, read_R = _filled_up(input_ids, position_ids, read_R, self.dtype)
        mask = row_mask(lengths_P3, input_ids.shape[1])
    decoder = self.get_decoder()
    with last_mlp_at(decoder, read_R):
        hidden_BTH = decoder(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=mask,
            use_cache=False,
            **({} if sequences_S is None else _starts(sequences_S)),
        ).last_hidden_state
    hidden_NH = hidden_BTH.flatten(0, 1)[source_N]
    cap = getattr(self.config, "final_logit_softcapping", None)
    return response_logps(hidden_NH, target_N, self.get_output_embeddings(), cap=cap)


def _starts(sequences_S: Tensor) -> dict[str, Any]:
    """Where sequences of these many tokens begin, as flash-attention takes it.

    Otherwise `transformers` finds it out from the positions, in every layer anew, and waits for the device each time.
    """
    starts, longest = nn.functional.pad(sequences_S.cumsum(0, dtype=torch.int32), (1, 0)), int(sequences_S.max())
    return {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": longest, "max_length_k": longest}


def _filled_up(
    input_ids_1T: Tensor, position_ids_1T: Tensor, read_R: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """A packed row of a round length, and as many positions to read, so that few shapes are compiled.

    Called where autocast acts, since a CPU needs it in half precision only.

    Args:
        input_ids_1T: Tokens.
        position_ids_1T: Their positions.
        read_R: Places in the row, each once.
        dtype: Of the model.

    Returns:
        The three with what fills them up behind: nothing that is asked for depends on it.
    """
    num_tokens, device = input_ids_1T.shape[1], input_ids_1T.device.type
    if device != "cpu":
        missing = max(-num_tokens % _GPU_BLOCK, 2 * _GPU_BLOCK - num_tokens)
    else:
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else dtype
        missing = round_length(num_tokens, device, dtype) - num_tokens
        if num_unread := round_length(len(read_R), device, dtype) - len(read_R):
            is_unread_T = torch.ones(num_tokens + missing, dtype=torch.bool).index_fill_(0, read_R, value=False)
            read_R = torch.cat([read_R, is_unread_T.nonzero().squeeze(1)[:num_unread]])
    if missing:
        input_ids_1T, position_ids_1T = (
            nn.functional.pad(row, (0, missing)) for row in (input_ids_1T, position_ids_1T)
        )
    return input_ids_1T, position_ids_1T, read_R


def _causal_lm(model: nn.Module) -> Any:
    """The module that owns the language-model head: the model itself, or what PEFT wraps."""
    return getattr(model, "get_base_model", lambda: model)()


def vocabulary_size(model: nn.Module) -> int:
    """How many logits a position has."""
    return int(_causal_lm(model).config.get_text_config().vocab_size)


def choose_layout(
    model: nn.Module,
    tokens: Sequence[TokenizedPair],
    *,
    pad_token_id: int,
    max_length: int,
    use_bf16: bool = False,
    is_trained: bool = False,
) -> tuple[str, str]:
    """Find out which fast forward a model may use, by comparing with the plain one on real pairs.

    A model that takes the packed layout keeps the attention `tree_attention.NAME`, which is `sdpa` for everything else.

    Args:
        model: A causal language model with its weights in place, not yet wrapped for distributed training.
        tokens: Pairs that will be seen; two of them are tried, short ones, since a backward pass is tried without
            activation checkpoints.
        pad_token_id: For the batches.
        max_length: Longest sequence that will be seen; a sliding window shorter than it rules the fast ways out.
        use_bf16: Whether the model will be run under bfloat16 autocast. Kernels of a GPU differ by precision, so there
            it is compared under it; a CPU compares in the precision of the weights, which shows smaller mistakes.
        is_trained: Whether there will be a backward pass, which on a GPU is tried too: its kernels are others.

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
        trial = _Trial(model, _two_of(tokens), pad_token_id, use_bf16=use_bf16, is_trained=is_trained)
        plain = trial.logps("plain")
        for layout in candidates:
            found = trial.disagreement(layout, plain)
            if found is None:
                return layout, "it agrees with the plain forward"
            reason = found
    finally:
        model.train(was_training)
    return "plain", reason


def _two_of(tokens: Sequence[TokenizedPair]) -> list[TokenizedPair]:
    """The two shortest pairs in which a wrong mask or position would show: one-token parts have nobody to look at."""

    def order(pair: TokenizedPair) -> tuple[bool, int]:
        is_tiny = min(len(pair.prompt), len(pair.chosen), len(pair.rejected)) < _SHORTEST_PART
        return is_tiny, -len(pair) if is_tiny else len(pair)

    return sorted(tokens, key=order)[:2]


class _Trial:
    """Layouts of a few pairs, run as they will be run in earnest.

    Args:
        model: In evaluation mode.
        tokens: The pairs.
        pad_token_id: For the batches.
        use_bf16: As for `choose_layout`.
        is_trained: As for `choose_layout`.
    """

    def __init__(
        self, model: nn.Module, tokens: Sequence[TokenizedPair], pad_token_id: int, *, use_bf16: bool, is_trained: bool
    ) -> None:
        weight = next(model.parameters())
        self.model, self.tokens, self.pad_token_id, self.device = model, tokens, pad_token_id, weight.device
        is_cpu = self.device.type == "cpu"
        # Flash-attention takes no float32; such a model is run under autocast anyway.
        self.to_bf16 = _has_flash_attention(model) or (use_bf16 and not is_cpu)
        self.is_exact = not self.to_bf16 and has_exact_products(model)
        self.has_backward = is_trained and not is_cpu

    def logps(self, layout: str, *, has_backward: bool = False) -> Tensor:
        """Log-probabilities of both responses in one layout, shape (2, pairs)."""
        batch = LAYOUTS[layout](self.tokens, pad_token_id=self.pad_token_id)
        to_bf16 = torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.to_bf16)
        with torch.set_grad_enabled(has_backward), to_bf16:
            found = FORWARDS[layout](self.model, {name: tensor.to(self.device) for name, tensor in batch.items()})
        logps = torch.stack([found.chosen, found.rejected])
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        if has_backward and trained:
            torch.autograd.grad(logps.sum(), trained[0], allow_unused=True)
        return logps.detach()

    def disagreement(self, layout: str, plain: Tensor) -> str | None:
        """Why a layout cannot be used, in one sentence, or None; only where it can does the model keep its attention.

        Args:
            layout: Of `LAYOUTS`.
            plain: What `logps` gives for the plain one.
        """
        config = _causal_lm(self.model).config
        before = config._attn_implementation
        if layout == "packed":
            if before not in ("sdpa", NAME):
                return f"attention {before!r} takes no packed rows; attn_implementation='sdpa' does"
            config._attn_implementation = NAME
        try:
            difference = (self.logps(layout, has_backward=self.has_backward) - plain).abs()
        except torch.OutOfMemoryError:
            raise  # which says nothing about the layout; the plain one needs more
        except (TypeError, ValueError, RuntimeError, KeyError, AttributeError, IndexError) as error:
            config._attn_implementation = before
            return f"the model does not take this layout ({type(error).__name__}: {str(error)[:120]})"
        if bool((difference <= self._tolerance(plain)).all()):
            return None
        config._attn_implementation = before
        return f"the layout {layout!r} changes this model's log-probabilities by up to {difference.max():.3g} nats"

    def _tolerance(self, plain: Tensor) -> Tensor:
        """A wrong mask or position shifts every token alike; rounding in half precision goes either way."""
        if self.is_exact:
            return 1e-3 + 1e-4 * plain.abs()
        num_tokens = torch.tensor([[len(pair.chosen), len(pair.rejected)] for pair in self.tokens]).T
        return 0.25 * num_tokens.to(plain).sqrt()


def has_exact_products(model: nn.Module) -> bool:
    """Whether all products of a model are those of float32: no half precision, no quantised weights, no TF32.

    Args:
        model: A causal language model, with or without PEFT.
    """
    weight = next(model.parameters())
    # The newer name is that of torch 2.9.
    found = getattr(torch.backends.cuda.matmul, "fp32_precision", torch.get_float32_matmul_precision())
    has_tf32 = weight.device.type == "cuda" and found in ("tf32", "high", "medium")
    is_quantized = getattr(_causal_lm(model), "is_quantized", False)
    return weight.dtype == torch.float32 and not has_tf32 and not is_quantized


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
    is_known = next(model.parameters()).device.type in ("cpu", "cuda")  # where packed rows have an attention
    return ("packed", "shared_prefix") if is_known else ("shared_prefix",), ""


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
