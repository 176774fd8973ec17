"""Whether a model fits what it is to read and to learn: ids of tokens, positions, an adapter.

In: a model or its skeleton, tokens, an adapter's configuration. Out: nothing, or a refusal before anything is computed.
"""

import contextlib
import copy
import itertools
import logging
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftConfig
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ropo.data.tokenize import TokenizedPair, TokenizedPairs
from ropo.logps.sharded import class_of
from ropo.logps.shared_prefix import causal_lm_of
from ropo.logps.small_copy import small_copies
from ropo.models.adapters import add_adapter
from ropo.models.files import some
from ropo.models.source import Model
from ropo.pairs import Pair

logger = logging.getLogger(__name__)

_FEW_POSITIONS = 40  # of the copy that is asked whether its positions end
_MOST_UNUSED = 4  # positions of a table that no token gets, as where they begin behind the padding's
_FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError, AssertionError)


def check_positions(model: Model, skeleton: PreTrainedModel, *parts: TokenizedPairs) -> None:
    """A model with a table of positions has none for longer texts; others go on, less well.

    Args:
        model: The initial one.
        skeleton: The same without weights.
        parts: The pairs, cut to `max_length`.

    Raises:
        ValueError: If a pair is longer than the table of the model's positions.
    """
    limit = getattr(skeleton.config.get_text_config(), "max_position_embeddings", None)
    longest = max(len(ids.prompt) + max(len(ids.chosen), len(ids.rejected)) for part in parts for ids in part.tokens)
    if not isinstance(limit, int) or limit < 1 or longest <= limit - _MOST_UNUSED:
        return
    num_unused = _unused_positions(skeleton)
    if num_unused is not None and longest > limit - num_unused:
        raise ValueError(
            f"{model.name_or_path} has {limit - num_unused} positions; got a pair of {longest} tokens. Set max_length "
            f"to {limit - num_unused}."
        )
    if longest > limit:
        logger.warning(
            "%s was made for %d positions (max_position_embeddings); the longest pair has %d tokens. It may know "
            "little of what lies beyond: set max_length to %d, or look whether its card says that it can.",
            model.name_or_path,
            limit,
            longest,
            limit,
        )


def _unused_positions(model: PreTrainedModel) -> int | None:
    """By how many tokens a text must be shorter than a model's table of positions; None if there is no such table.

    A small copy with few positions is asked, since it depends on the code of an architecture.
    """
    causal_lm = causal_lm_of(model)
    config = copy.deepcopy(causal_lm.config)
    config.get_text_config().max_position_embeddings = _FEW_POSITIONS
    for small in small_copies(class_of(causal_lm), config):
        if not _reads(small, 1):
            continue
        if _reads(small, _FEW_POSITIONS + 1):
            return None
        return next((num for num in range(_MOST_UNUSED) if _reads(small, _FEW_POSITIONS - num)), None)
    return None


def _reads(model: nn.Module, num_tokens: int) -> bool:
    """Whether a model reads a text of so many tokens."""
    try:
        with torch.no_grad():
            model(input_ids=torch.full((1, num_tokens), 3), use_cache=False)
    except _FAILURES:
        return False
    return True


def check_adapter(model: nn.Module, peft_config: PeftConfig, *, dtype: torch.dtype | None = None) -> None:
    """Refuse an adapter that the model cannot take: it is put on a copy without weights, and on a small one with some.

    Args:
        model: With or without weights; it is left as it is.
        peft_config: Of the adapter.
        dtype: Of the weights as they will be loaded; None for those of `model`.

    Raises:
        ValueError: If a module is not there, a number is out of range, what is trained would have 16 bits, or the
            adapter changes the model before it is trained.
    """
    no_weights = {
        id(one): nn.Parameter(torch.empty_like(one, device="meta"), requires_grad=False) for one in model.parameters()
    }
    skeleton: Any = copy.deepcopy(model, no_weights)
    wanted: Any = copy.deepcopy(peft_config)
    adapted: nn.Module | None = None
    if hasattr(wanted, "init_lora_weights"):
        wanted.init_lora_weights = True  # other ways to begin read the weights
    try:
        with contextlib.suppress(RuntimeError, AttributeError, TypeError):  # it reads weights, and may yet fit
            adapted = add_adapter(skeleton if dtype is None else skeleton.to(dtype), wanted)
    except ValueError as error:
        linear = {
            name.rpartition(".")[2]
            for name, module in model.named_modules()
            if type(module).__name__ in ("Linear", "Conv1D") and name
        }
        raise ValueError(
            f"An adapter (peft_config, lora_*) needs to fit its model; got: {error} Linear layers of this model: "
            f"{', '.join(sorted(linear))}."
        ) from error
    if adapted is not None:
        _check_precision(adapted)
    # Of a usual LoRA adapter, `init_lora_weights` says it (`check_beginning`).
    is_usual = isinstance(peft_config, LoraConfig) and not peft_config.layer_replication
    if not is_usual and (peft_config.is_prompt_learning or _begins_elsewhere(model, peft_config)):
        name = str(getattr(peft_config.peft_type, "value", peft_config.peft_type))
        raise ValueError(
            f"An adapter needs to begin at the reference, from which margins are measured; got peft_type {name}, "
            "which changes the model before it is trained. Take LORA, or options with which it begins there."
        )


def _check_precision(adapted: nn.Module) -> None:
    """PEFT keeps LoRA's weights in 32 bits whatever the model has, and whatever else is trained in those of the model.

    Raises:
        ValueError: If what is trained has fewer: small steps are rounded away.
    """
    short = [
        name.removeprefix("base_model.model.")
        for name, weight in adapted.named_parameters()
        if weight.requires_grad and weight.is_floating_point() and weight.itemsize < 4
    ]
    if short:
        raise ValueError(
            f"What is trained needs 32 bits, or small steps are rounded away; got {some(short)} of an adapter in 16. "
            "Train LoRA's own weights alone (no modules_to_save, bias or other kind), or leave out dtype; with bf16 "
            "the model computes in 16 bits all the same."
        )


def _begins_elsewhere(model: nn.Module, peft_config: PeftConfig) -> bool:
    """Whether a small copy of the model says something else with the adapter; no, where none takes the adapter."""
    causal_lm = causal_lm_of(model)
    for small in small_copies(class_of(causal_lm), causal_lm.config):
        ids_BT = torch.arange(3, 15)[None]
        try:
            with torch.no_grad(), warnings.catch_warnings(action="ignore"):  # sizes of the copy are no user's fault
                wanted = small(ids_BT, use_cache=False).logits
                adapted: Any = add_adapter(small, copy.deepcopy(peft_config)).eval()
                found = adapted(ids_BT, use_cache=False).logits[:, -ids_BT.shape[1] :]
        except _FAILURES:
            continue
        return not torch.allclose(found, wanted, rtol=1e-4, atol=1e-4)
    return False


def check_ids(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    used: Iterable[tuple[str, Sequence[int] | np.ndarray]],
    *,
    name_or_path: str,
) -> None:
    """Refuse tokens for which a model has no embedding.

    Args:
        model: With or without weights.
        tokenizer: The one that it is used with; its padding and its end of a sequence count.
        used: Where a text stands, and its token ids.
        name_or_path: Of the model, for the message.

    Raises:
        ValueError: If an id is too large.
    """
    limit = _num_embeddings(model)
    ends = {"pad_token": tokenizer.pad_token_id, "eos_token": tokenizer.eos_token_id}
    own = ((f"the {name} of its tokenizer", [i]) for name, i in ends.items() if i is not None)
    for where, ids in itertools.chain(own, used):
        largest = int(np.max(ids, initial=-1))
        if largest >= limit:
            raise ValueError(
                f"A model needs an embedding for each token; {name_or_path} has {limit}, and {where} has the id "
                f"{largest} ({tokenizer.convert_ids_to_tokens(largest)!r}). Take the tokenizer that the model was "
                f"trained with, or call model.resize_token_embeddings({len(tokenizer)}) and save both."
            )


def ids_of(pairs: Sequence[Pair], tokens: Sequence[TokenizedPair]) -> Iterator[tuple[str, np.ndarray]]:
    """The token ids of pairs, for `check_ids`.

    Args:
        pairs: The pairs.
        tokens: Their tokens, in the same order.
    """
    for pair, ids in zip(pairs, tokens, strict=True):
        for part in (ids.prompt, ids.chosen, ids.rejected):
            yield f"a token of {pair.place}", part


def _num_embeddings(model: PreTrainedModel) -> int:
    """How many tokens a model can read and score."""
    try:
        found = [model.get_input_embeddings().num_embeddings]
    except (AttributeError, NotImplementedError):  # made otherwise
        found = [model.config.get_text_config().vocab_size]
    return int(min(found + [size for size in [getattr(model.get_output_embeddings(), "out_features", None)] if size]))
