"""Which forward a model may use: the fastest layout that gives the plain forward's numbers, found out by comparing.

In: a causal language model and the pairs that it will see. Out: the name of a layout and the reason.

The one idea: there are two questions, and each is asked where its answer cannot hide. Whether a layout is right for an
architecture (masks, windows, positions, what becomes of the logits) is a question about code: it is asked of a small
copy in float32 whose rows are longer than every window. Whether this model on this device computes it (kernels,
precision, adapters) is asked of the model itself, on the shortest pairs of use and on the longest one.
"""

import json
import logging
from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from ropo.data.tokenize import TokenizedPair
from ropo.logps.batch import LAYOUTS
from ropo.logps.dropout import turn_dropout_off
from ropo.logps.response_head import LogitMap
from ropo.logps.sharded import class_of, device_of, is_sharded
from ropo.logps.shared_prefix import (
    FORWARDS,
    causal_lm_of,
    decoder_of,
    enable_response_logps,
    has_exact_products,
    vocabulary_size,
)
from ropo.logps.small_copy import small_copies
from ropo.logps.tree_attention import NAME

logger = logging.getLogger(__name__)

# Prompt and responses of pairs that layouts are compared on have this many tokens, if there are such pairs.
_SHORTEST_PART = 8
# Tokens of prompt, chosen and rejected of the pairs that a small copy sees: all longer than its windows, and for packed
# rows one so long that its attention is taken by blocks.
_SMALL_PAIRS = ((19, 11, 14), (7, 17, 9))
_LONG_PAIR = (190, 9, 14)
# By how many nats one token of the prompt must change a response of a small copy, so that mistakes show.
_LEAST_EFFECT = 0.5
_ROUNDING = 1e-4  # nats, of a small copy in float32
# Layers whose attention is causal, within a window or a chunk where they say so; others keep a state or look up blocks.
_TREE_LAYERS = {"full_attention", "sliding_attention", "chunked_attention", "attention"}
# Rows that share nothing are compared on the longest pair where the plain layout has at most so many logits, 1 GiB.
_MOST_LOGITS = 2**28
_SHARED = ("packed", "shared_prefix")
_FAILURES = (TypeError, ValueError, RuntimeError, KeyError, AttributeError, IndexError, AssertionError)


def choose_layout(
    model: nn.Module,
    tokens: Sequence[TokenizedPair],
    *,
    pad_token_id: int,
    use_bf16: bool = False,
    is_trained: bool = False,
    has_weights: bool = True,
) -> tuple[str, str]:
    """Find out which fast forward a model may use, by comparing with the plain one.

    A model that takes the packed layout keeps the attention `tree_attention.NAME`, which is `sdpa` for everything else.

    Args:
        model: A causal language model, not yet wrapped for training by DDP.
        tokens: Pairs that will be seen. Two short ones are tried, with a backward pass if there will be one, and the
            longest, without.
        pad_token_id: For the batches.
        use_bf16: Whether the model will be run under bfloat16 autocast. Kernels of a GPU differ by precision, so there
            it is compared under it; a CPU compares in the precision of the weights, which shows smaller mistakes.
        is_trained: Whether there will be a backward pass, which on a GPU is tried too: its kernels are others.
        has_weights: Whether the model can be run yet. Weights that are sharded later are elsewhere or in parts, and
            then the small copy alone is asked.

    Returns:
        The name of the layout, of `LAYOUTS`, and the reason in one sentence.
    """
    causal_lm = causal_lm_of(model)
    head = getattr(causal_lm, "get_output_embeddings", lambda: None)()
    if getattr(causal_lm, "config", None) is None or head is None:
        return "plain", "the model has no language-model head to read"
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        return "plain", "prompt learning puts virtual tokens before the prompt"
    architecture = _architecture_of(causal_lm)
    if not has_weights:
        return _by_copy(model, architecture)
    trial = _Trial(model, tokens, pad_token_id, use_bf16=use_bf16, is_trained=is_trained)
    was_training = model.training
    model.eval()
    try:
        # Parts of a sharded model cannot be run by themselves.
        can_ask = not architecture.is_known and not is_sharded(model)
        logit_map = trial.logit_map(causal_lm.config) if can_ask else architecture.logit_map
        if logit_map is None:
            return "plain", "its logits are not its head's output times a number of its configuration"
        enable_response_logps(model, logit_map)
        reasons: list[str] = []
        for layout in _candidates(causal_lm):
            longest = architecture.untried(layout, trial, tokens)
            reason = architecture.refusal(layout) or trial.refusal(layout, longest)
            if reason is None:
                architecture.remember(layout, trial, longest)
                is_unshared = layout == "plain_rows" and reasons
                why = f"; prompts are not shared, since {reasons[-1]}" if is_unshared else ""
                return layout, "it agrees with the plain forward" + why
            reasons.append(reason)
    finally:
        model.train(was_training)
    return "plain", reasons[-1]


def varies_in_training(model: nn.Module) -> bool:
    """Whether log-probabilities of an architecture depend on chance in training, even without dropout.

    Some draw experts or blocks of attention then. A model of which there is no small copy is taken to be as others are.
    """
    return _architecture_of(causal_lm_of(model)).varies_in_training


@lru_cache
def log_layout(layout: str, reason: str) -> None:
    """Log which forward a model takes, once in a process.

    Args:
        layout: As `choose_layout` gives it.
        reason: Likewise.
    """
    logger.info("Forward: %s, since %s.", layout, reason)


def _by_copy(model: nn.Module, architecture: "_Architecture") -> tuple[str, str]:
    """What the small copy alone says; the model is given the attention of the layout."""
    causal_lm = causal_lm_of(model)
    if architecture.logit_map is None:
        return "plain", "no small copy of it answers, and its own weights are sharded"
    enable_response_logps(model, architecture.logit_map)
    for layout in _candidates(causal_lm):
        if architecture.refusal(layout) is None:
            if layout == "packed":
                decoder_of(causal_lm).config._attn_implementation = NAME
            return layout, "it agrees with the plain forward on a small copy; the weights are sharded"
    return "plain", "no other layout agrees with it on a small copy"


def _candidates(causal_lm: Any) -> tuple[str, ...]:
    """The layouts worth a try, the fastest first."""
    attention = causal_lm.config._attn_implementation
    if _has_flash_attention(causal_lm):  # which takes no mask, but where each sequence begins
        return ("padding_free", "plain_rows")
    if attention not in ("sdpa", "eager", NAME):
        return ("plain_rows",)
    is_known = device_of(causal_lm).type in ("cpu", "cuda")  # where packed rows have an attention
    return ("packed", "shared_prefix", "plain_rows") if is_known else ("shared_prefix", "plain_rows")


def _has_flash_attention(causal_lm: Any) -> bool:
    """Whatever its version and whoever built its kernel: `flash_attention_2`, `kernels-community/flash-attn3`, ..."""
    return "flash" in str(causal_lm.config._attn_implementation)


def why_not_shared(causal_lm: Any) -> str | None:
    """Why prompts of an architecture cannot be shared, as far as it says so itself, in one sentence, or None."""
    text = causal_lm.config.get_text_config(decoder=True)
    kinds = {str(kind) for name in ("layer_types", "layers_block_type") for kind in getattr(text, name, None) or ()}
    if unknown := sorted(kinds - _TREE_LAYERS):
        return f"it has layers of the kind {unknown[0]!r}"
    if getattr(causal_lm, "_is_stateful", False):
        return "its layers carry a state from token to token"
    return None


class _Architecture:
    """What holds for every model of a class and a configuration, found out on a small copy in float32."""

    def __init__(self, causal_lm: Any) -> None:
        self.not_shared = why_not_shared(causal_lm)
        self._refusals: dict[str, str | None] = {}
        self._tried: dict[tuple[Any, ...], int] = {}  # tokens of the longest pair, by layout and `_Trial.kind`
        self.logit_map: LogitMap | None = None
        self._trial: _Trial | None = None
        config = causal_lm.config
        copy: Any
        for copy in small_copies(class_of(causal_lm), config):
            copy.config._attn_implementation = "eager" if config._attn_implementation == "eager" else "sdpa"
            trial = _Trial(copy, _made_up_pairs(copy, _SMALL_PAIRS), 0, use_bf16=False, is_trained=False)
            if trial.shows_mistakes():
                self._trial, self.logit_map = trial, trial.logit_map(config)
                break
        if self.logit_map is not None:
            enable_response_logps(copy, self.logit_map)

    @property
    def is_known(self) -> bool:
        """Whether there is a copy that answers."""
        return self._trial is not None

    @cached_property
    def varies_in_training(self) -> bool:
        """Whether the copy says in training what it does not say otherwise."""
        return self._trial is not None and self._trial.varies_in_training()

    def refusal(self, layout: str) -> str | None:
        """Why a layout is not right for this architecture, in one sentence, or None."""
        if layout in _SHARED and self.not_shared is not None:
            return self.not_shared
        if self._trial is None:
            # A model's own weights may be too flat to show a wrong mask, and training makes them less so.
            return "no small copy of it can be made to compare on" if layout != "plain_rows" else None
        if layout not in self._refusals:
            more = _made_up_pairs(self._trial.model, [_LONG_PAIR]) if layout == "packed" else []
            self._refusals[layout] = self._trial.refusal(layout, more)
        return self._refusals[layout]

    def untried(self, layout: str, trial: "_Trial", tokens: Sequence[TokenizedPair]) -> list[TokenizedPair]:
        """The longest pair, unless one as long was tried in this process already in the same way; or none."""
        length, longest = max(((_length(pair), pair) for pair in tokens), key=lambda one: one[0])
        # The judge of rows that share nothing is the plain layout, with the logits of all positions.
        if layout == "plain_rows" and 2 * length * vocabulary_size(trial.model) > _MOST_LOGITS:
            return []
        return [longest] if length > self._tried.get((layout, *trial.kind), 0) else []

    def remember(self, layout: str, trial: "_Trial", agreed: Sequence[TokenizedPair]) -> None:
        """Note the pairs on which a layout agreed."""
        for pair in agreed:
            self._tried[layout, *trial.kind] = _length(pair)


_ARCHITECTURES: dict[Any, _Architecture] = {}


def _architecture_of(causal_lm: Any) -> _Architecture:
    """Asked once in a process, which makes many models of one architecture."""
    config: PreTrainedConfig = causal_lm.config
    is_eager = config._attn_implementation == "eager"
    key = (class_of(causal_lm), json.dumps(config.to_dict(), sort_keys=True, default=str), is_eager)
    if key not in _ARCHITECTURES:
        _ARCHITECTURES[key] = _Architecture(causal_lm)
    return _ARCHITECTURES[key]


def _made_up_pairs(model: Any, sizes: Sequence[tuple[int, int, int]]) -> list[TokenizedPair]:
    rng = np.random.default_rng(0)
    top = min(model.get_input_embeddings().weight.shape[0], model.config.get_text_config(decoder=True).vocab_size)
    parts = [[rng.integers(min(3, top - 1), top, num).astype(np.int32) for num in three] for three in sizes]
    return [TokenizedPair(prompt=prompt, chosen=chosen, rejected=rejected) for prompt, chosen, rejected in parts]


def _two_of(tokens: Sequence[TokenizedPair]) -> list[TokenizedPair]:
    """The two shortest pairs in which a wrong mask or position would show: one-token parts have nobody to look at."""

    def order(pair: TokenizedPair) -> tuple[bool, int]:
        is_tiny = min(len(pair.prompt), len(pair.chosen), len(pair.rejected)) < _SHORTEST_PART
        return is_tiny, -len(pair) if is_tiny else len(pair)

    return sorted(tokens, key=order)[:2]


def _length(pair: TokenizedPair) -> int:
    """Tokens of the longer of a pair's two sequences."""
    return len(pair.prompt) + max(len(pair.chosen), len(pair.rejected))


class _Trial:
    """Layouts of a few pairs, run as they will be run in earnest."""

    def __init__(
        self, model: nn.Module, tokens: Sequence[TokenizedPair], pad_token_id: int, *, use_bf16: bool, is_trained: bool
    ) -> None:
        weight = next(model.parameters())
        self.model, self.pad_token_id, self.device = model, pad_token_id, device_of(model)
        self.few = _two_of(tokens)
        is_cpu = self.device.type == "cpu"
        # Flash-attention takes no float32; such a model is run under autocast anyway.
        self.to_bf16 = _has_flash_attention(causal_lm_of(model)) or (use_bf16 and not is_cpu)
        self.is_exact = not self.to_bf16 and has_exact_products(model)
        self.has_backward = is_trained and not is_cpu
        self.kind = (type(model), self.device.type, weight.dtype, self.to_bf16)
        self._plain: Tensor | None = None

    def logps(self, layout: str, tokens: Sequence[TokenizedPair], *, has_backward: bool = False) -> Tensor:
        """Log-probabilities of both responses in one layout, shape (2, pairs)."""
        batch = LAYOUTS[layout](tokens, pad_token_id=self.pad_token_id)
        to_bf16 = torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.to_bf16)
        with torch.set_grad_enabled(has_backward), to_bf16:
            found = FORWARDS[layout](self.model, {name: tensor.to(self.device) for name, tensor in batch.items()})
        logps = torch.stack([found.chosen, found.rejected])
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        if has_backward and trained:
            torch.autograd.grad(logps.sum(), trained[0], allow_unused=True)
        return logps.detach()

    def plain(self) -> Tensor:
        """Those of the short pairs in the plain layout, computed once."""
        if self._plain is None:
            self._plain = self.logps("plain", self.few)
        return self._plain

    def shows_mistakes(self) -> bool:
        """Whether the model, a small copy, runs at all, and its responses depend on their prompt.

        Where they depend too little (Cohere divides its logits by 16), the weights of the head are made larger.
        """
        try:
            for _ in range(4):
                effect = self._effect_of_a_token()
                if not np.isfinite(effect) or effect >= _LEAST_EFFECT:
                    return effect >= _LEAST_EFFECT
                head = causal_lm_of(self.model).get_output_embeddings()
                # Not in place: embeddings that are tied to it stay as they are.
                head.weight = nn.Parameter(head.weight.detach() * (2 * _LEAST_EFFECT / max(effect, 0.01)))
                self._plain = None
        except _FAILURES:
            pass
        return False

    def varies_in_training(self) -> bool:
        """Whether log-probabilities in training differ from the others by more than rounding, without dropout."""
        turn_dropout_off(self.model)
        self.model.train()
        try:
            return bool(((self.logps("plain", self.few) - self.plain()).abs() > _ROUNDING).any())
        finally:
            self.model.eval()

    def _effect_of_a_token(self) -> float:
        """Change of a response's log-probability by the last token but one of its prompt, in nats."""
        pair = self.few[0]
        prompt = pair.prompt.copy()
        prompt[-2] = pair.chosen[0]
        other = TokenizedPair(prompt=prompt, chosen=pair.chosen, rejected=pair.rejected)
        return float((self.logps("plain", [other])[:, 0] - self.plain()[:, 0]).abs().max())

    def logit_map(self, config: PreTrainedConfig) -> LogitMap | None:
        """What the model does to its head's output, with numbers of a configuration, or None if it is not that."""
        causal_lm = causal_lm_of(self.model)
        batch = {k: v.to(self.device) for k, v in LAYOUTS["plain"](self.few, pad_token_id=self.pad_token_id).items()}
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        try:
            with torch.no_grad():
                said_BTV = self.model(**inputs, use_cache=False).logits
                hidden_BTH = decoder_of(causal_lm)(**inputs, use_cache=False).last_hidden_state
                raw_BTV = causal_lm.get_output_embeddings()(hidden_BTH)
        except _FAILURES:
            return None
        if said_BTV.shape != raw_BTV.shape:
            return None
        said_NV, raw_NV = (x.flatten(0, 1)[batch["source"]].float() for x in (said_BTV, raw_BTV))
        numbers = _numbers_of(config)
        scales = dict.fromkeys((1.0, *numbers, *(1 / number for number in numbers)))
        maps = [LogitMap(scale, cap) for cap in (None, *numbers) for scale in scales]
        errors = {one: float((one(raw_NV[:4]) - said_NV[:4]).abs().max()) for one in maps}
        best = min(maps, key=lambda one: errors[one] > 1e-5 * float(said_NV[:4].abs().max()))
        return best if torch.allclose(best(raw_NV), said_NV, rtol=1e-4, atol=1e-4) else None

    def refusal(self, layout: str, more: Sequence[TokenizedPair] = ()) -> str | None:
        """Why a layout cannot be used, in one sentence, or None; only where it can does the model keep its attention.

        Args:
            layout: Of `LAYOUTS`.
            more: Pairs to try beside the short ones, each by itself and without a backward pass, for which a long
                one may leave no memory.
        """
        config = decoder_of(causal_lm_of(self.model)).config
        before = config._attn_implementation
        if layout == "packed":
            if before not in ("sdpa", NAME):
                return f"attention {before!r} takes no packed rows; attn_implementation='sdpa' does"
            config._attn_implementation = NAME
        try:
            reason = self._disagreement(layout, more)
        except torch.OutOfMemoryError:
            config._attn_implementation = before
            raise  # which says nothing about the layout; the plain one needs more
        except _FAILURES as error:
            reason = f"the model does not take this layout ({type(error).__name__}: {str(error)[:120]})"
        if reason is not None:
            config._attn_implementation = before
        return reason

    def _disagreement(self, layout: str, more: Sequence[TokenizedPair]) -> str | None:
        found = self.logps(layout, self.few, has_backward=self.has_backward)
        if reason := self._difference(layout, found, self.plain(), self.few):
            return reason
        for pair in more:
            # Not the plain layout, which has the logits of all positions: it may not fit where others do.
            judge = self.logps("plain" if layout == "plain_rows" else "plain_rows", [pair])
            if reason := self._difference(layout, self.logps(layout, [pair]), judge, [pair]):
                return reason
        return None

    def _difference(self, layout: str, found: Tensor, wanted: Tensor, tokens: Sequence[TokenizedPair]) -> str | None:
        difference = (found - wanted).abs()
        if bool((difference <= self._tolerance(wanted, tokens)).all()):
            return None
        if not found.isfinite().all():
            return "its attention is neither causal nor within a window or a chunk"
        return f"the layout {layout!r} changes this model's log-probabilities by up to {difference.max():.3g} nats"

    def _tolerance(self, wanted: Tensor, tokens: Sequence[TokenizedPair]) -> Tensor:
        """A wrong mask or position shifts every token alike; rounding in half precision goes either way."""
        if self.is_exact:
            return 1e-3 + 1e-4 * wanted.abs()
        num_tokens = torch.tensor([[len(pair.chosen), len(pair.rejected)] for pair in tokens]).T
        return 0.25 * num_tokens.to(wanted).sqrt()


def _numbers_of(config: PreTrainedConfig) -> list[float]:
    """Numbers that a configuration holds and that may be a scale or a bound of logits, each once."""
    values = [value for part in (config, config.get_text_config(decoder=True)) for value in vars(part).values()]
    found = [float(value) for value in values if type(value) in (int, float) and 0 < abs(value) < 1e4]
    return list(dict.fromkeys(found))
