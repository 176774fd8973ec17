"""Pairs to one batch of tensors, in one of several layouts.

In: `TokenizedPair`s. Out: a dict of tensors for the function of the same name in `shared_prefix.FORWARDS`.

All layouts describe their response tokens alike, with flat tensors over all response tokens N of the batch:
`source` (place in the flattened B·T positions whose output predicts the token), `target` (the token id) and
`response` (2·pair for a token of `chosen`, 2·pair + 1 for one of `rejected`); `read` holds the places of `source`, each
once.

Shapes: B rows, T positions, N response tokens, R positions that predict one.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ropo.data.tokenize import TokenizedPair

Batch = dict[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Batching:
    """How pairs are put into batches when they are scored.

    Attributes:
        pad_token_id: Fills rows; its value has no influence.
        use_bf16: Compute in bfloat16 by autocast, as training with `bf16` does.
        max_tokens: Most unique tokens in a forward pass; None for the default of the device. One pair may have more.
        shard: Gives each process its part of a model as it was loaded, and a model that is in parts back as it is; None
            where every process holds the whole.
    """

    pad_token_id: int
    use_bf16: bool = False
    max_tokens: int | None = None
    shard: Callable[[Any], nn.Module] | None = None

    def sharded(self, model: Any) -> Any:
        """The model as it is to be scored."""
        return model if self.shard is None else self.shard(model)


def pad_token_id_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that fills rows: the end of a text where the tokenizer has no padding token of its own."""
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((int(number) for number in ids if number is not None), 0)


def plain_batch(tokens: Sequence[TokenizedPair], *, pad_token_id: int) -> Batch:
    """Two rows per pair, prompt and one response each: what every causal language model understands.

    Returns:
        `input_ids`, `attention_mask` (2·pairs, T), `source`, `target`, `response` (N,) and `read` (R,).
    """
    rows = [(pair.prompt, response) for pair in tokens for response in (pair.chosen, pair.rejected)]
    width = max(len(prompt) + len(response) for prompt, response in rows)
    input_ids_BT = np.full((len(rows), width), pad_token_id, dtype=np.int64)
    attention_mask_BT = np.zeros((len(rows), width), dtype=np.int64)
    source, target, owner = [], [], []
    for i, (prompt, response) in enumerate(rows):
        length = len(prompt) + len(response)
        input_ids_BT[i, :length] = np.concatenate([prompt, response])
        attention_mask_BT[i, :length] = 1
        source.append(i * width + np.arange(len(prompt) - 1, length - 1))
        target.append(response)
        owner.append(np.full(len(response), i))
    return {
        "input_ids": torch.from_numpy(input_ids_BT),
        "attention_mask": torch.from_numpy(attention_mask_BT),
        **_response_tokens(source, target, owner),
    }


def shared_prefix_batch(tokens: Sequence[TokenizedPair], *, pad_token_id: int) -> Batch:
    """One row per pair: the prompt once, then `chosen`, then `rejected`, as two branches of one tree.

    Positions restart after the prompt in each branch, and `branch` says who may see whom. The last token of a
    response predicts nothing, so it is not part of the input.

    Returns:
        `input_ids`, `position_ids`, `branch` (pairs, T; 0 prompt, 1 chosen, 2 rejected, -1 padding),
        `source`, `target`, `response` (N,) and `read` (R,).
    """
    width = max(len(pair) - 2 for pair in tokens)
    input_ids_BT = np.full((len(tokens), width), pad_token_id, dtype=np.int64)
    position_ids_BT = np.zeros((len(tokens), width), dtype=np.int64)
    branch_BT = np.full((len(tokens), width), -1, dtype=np.int64)
    source, target, owner = [], [], []
    for i, pair in enumerate(tokens):
        num_prompt, num_chosen, num_rejected = len(pair.prompt), len(pair.chosen), len(pair.rejected)
        end_chosen = num_prompt + num_chosen - 1
        length = end_chosen + num_rejected - 1
        input_ids_BT[i, :length] = np.concatenate([pair.prompt, pair.chosen[:-1], pair.rejected[:-1]])
        position_ids_BT[i, :end_chosen] = np.arange(end_chosen)
        position_ids_BT[i, end_chosen:length] = np.arange(num_prompt, num_prompt + num_rejected - 1)
        branch_BT[i, :num_prompt] = 0
        branch_BT[i, num_prompt:end_chosen] = 1
        branch_BT[i, end_chosen:length] = 2
        first = i * width + num_prompt - 1  # the last prompt token predicts the first token of both responses
        source += [
            np.arange(first, first + num_chosen),
            np.concatenate([[first], i * width + np.arange(end_chosen, length)]),
        ]
        target += [pair.chosen, pair.rejected]
        owner += [np.full(num_chosen, 2 * i), np.full(num_rejected, 2 * i + 1)]
    return {
        "input_ids": torch.from_numpy(input_ids_BT),
        "position_ids": torch.from_numpy(position_ids_BT),
        "branch": torch.from_numpy(branch_BT),
        **_response_tokens(source, target, owner),
    }


def packed_batch(tokens: Sequence[TokenizedPair], *, pad_token_id: int) -> Batch:  # noqa: ARG001 - there is no padding
    """One row for all pairs: prompt, `chosen`, `rejected` of one pair, then those of the next, and nothing between.

    The longest pair comes first. Positions restart as in `shared_prefix_batch`.

    Returns:
        `input_ids`, `position_ids` (1, T), `lengths` (pairs, 3; tokens of prompt, chosen and rejected in the row),
        `source`, `target`, `response` (N,) and `read` (R,).
    """
    input_ids, position_ids, lengths, source, target, owner = [], [], [], [], [], []
    start = 0
    for i in sorted(range(len(tokens)), key=lambda i: -len(tokens[i])):
        pair = tokens[i]
        num_prompt, num_chosen, num_rejected = len(pair.prompt), len(pair.chosen), len(pair.rejected)
        end_chosen = num_prompt + num_chosen - 1
        length = end_chosen + num_rejected - 1
        input_ids += [pair.prompt, pair.chosen[:-1], pair.rejected[:-1]]
        position_ids += [np.arange(end_chosen), np.arange(num_prompt, num_prompt + num_rejected - 1)]
        lengths.append((num_prompt, num_chosen - 1, num_rejected - 1))
        first = start + num_prompt - 1
        source += [np.arange(first, first + num_chosen), [first], np.arange(start + end_chosen, start + length)]
        target += [pair.chosen, pair.rejected]
        owner += [np.full(num_chosen, 2 * i), np.full(num_rejected, 2 * i + 1)]
        start += length
    return _one_row(input_ids, position_ids, lengths) | _response_tokens(source, target, owner)


def padding_free_batch(tokens: Sequence[TokenizedPair], *, pad_token_id: int) -> Batch:  # noqa: ARG001 - as above
    """One row for all responses, each behind its own copy of the prompt: what flash-attention takes without padding.

    Positions restart at every prompt, which tells `transformers` where a sequence begins.

    Returns:
        `input_ids`, `position_ids` (1, T), `lengths` (2·pairs,), `source`, `target`, `response` (N,) and `read` (R,).
    """
    input_ids, position_ids, lengths, source, target, owner = [], [], [], [], [], []
    start = 0
    for i, (prompt, response) in enumerate(
        (pair.prompt, response) for pair in tokens for response in (pair.chosen, pair.rejected)
    ):
        length = len(prompt) + len(response) - 1  # the last token predicts nothing
        lengths.append(length)
        input_ids += [prompt, response[:-1]]
        position_ids.append(np.arange(length))
        source.append(np.arange(start + len(prompt) - 1, start + length))
        target.append(response)
        owner.append(np.full(len(response), i))
        start += length
    return _one_row(input_ids, position_ids, lengths) | _response_tokens(source, target, owner)


def _one_row(input_ids: list[Any], position_ids: list[np.ndarray], lengths: list[Any]) -> Batch:
    return {
        "input_ids": torch.from_numpy(np.concatenate(input_ids).astype(np.int64))[None],
        "position_ids": torch.from_numpy(np.concatenate(position_ids))[None],
        "lengths": torch.tensor(lengths, dtype=torch.int32),
    }


def _response_tokens(source: list[Any], target: list[np.ndarray], owner: list[np.ndarray]) -> Batch:
    source_N = np.concatenate(source).astype(np.int64)
    return {
        "source": torch.from_numpy(source_N),
        "read": torch.from_numpy(np.unique(source_N)),
        "target": torch.from_numpy(np.concatenate(target).astype(np.int64)),
        "response": torch.from_numpy(np.concatenate(owner)),
    }


def batches_by_length(lengths: Sequence[int], *, max_tokens: int, max_pairs: int = 256) -> Iterator[list[int]]:
    """Group pairs of similar length, longest first, so that little is padded and memory trouble shows at once.

    Args:
        lengths: Unique tokens of each pair.
        max_tokens: Most positions in a batch, padding included. A single pair may exceed it.
        max_pairs: Most pairs in a batch.

    Yields:
        Positions of the pairs of one batch.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    start = 0
    while start < len(order):
        longest = max(lengths[order[start]], 1)
        count = min(max(max_tokens // longest, 1), max_pairs)
        yield order[start : start + count]
        start += count


def split_by_tokens(lengths: Sequence[int], *, max_tokens: int | None) -> list[list[int]]:
    """Split one batch into pieces that a forward pass takes at once, pairs of similar length together.

    Args:
        lengths: Unique tokens of each pair.
        max_tokens: Most tokens in a piece; None for no limit. A single pair may exceed it.

    Returns:
        Positions of the pairs of each piece; every pair is in one, and a batch that fits stays in its order.

    Examples:
        >>> split_by_tokens([3, 9, 1, 4, 4], max_tokens=10)
        [[1], [3, 4], [0, 2]]
    """
    if max_tokens is None or sum(lengths) <= max_tokens:
        return [list(range(len(lengths)))]
    pieces: list[list[int]] = []
    room = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not pieces or lengths[i] > room:
            pieces.append([])
            room = max_tokens
        pieces[-1].append(i)
        room -= lengths[i]
    return pieces


LAYOUTS: MappingProxyType[str, Callable[..., Batch]] = MappingProxyType(
    {
        "plain": plain_batch,
        "plain_rows": plain_batch,
        "padding_free": padding_free_batch,
        "shared_prefix": shared_prefix_batch,
        "packed": packed_batch,
    }
)
