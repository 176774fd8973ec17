"""One pass over many pairs without gradients: the stage that reads the reference and the filter's margins.

In: a model and `TokenizedPair`s. Out: `PairLogps` in the order of the pairs, on the CPU, in float32; features of the
pairs batch by batch, where a reader is given.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import nn

from ropo.data.tokenize import TokenizedPair
from ropo.logps.batch import LAYOUTS, Batch, Batching, batches_by_length
from ropo.logps.choose import choose_layout, log_layout
from ropo.logps.features import FeatureReader, Features
from ropo.logps.sharded import device_of, is_sharded
from ropo.logps.shared_prefix import FORWARDS, vocabulary_size
from ropo.pairs import PairLogps
from ropo.processes import meet
from ropo.progress import Progress

logger = logging.getLogger(__name__)

Rows = list[tuple[int, float, float, int, int]]  # position, chosen, rejected, chosen tokens, rejected tokens

# Positions per batch. On a CPU small batches keep activations in its cache; a GPU wants to be filled.
MAX_TOKENS = {"cpu": 4096, "cuda": 32768}
# The plain layout holds the logits of all positions, three times: at most so many of them, 2 GiB in float32.
_MAX_LOGITS = 2**29


def score_pairs(
    model: nn.Module,
    tokens: Sequence[TokenizedPair],
    batching: Batching,
    *,
    title: str = "Scoring pairs",
    reader: FeatureReader | None = None,
    on_batch: Callable[[Rows, Features], None] | None = None,
) -> PairLogps:
    """Log-probabilities of all pairs under one model, in evaluation mode.

    With several processes each scores its share of the batches and all return everything. A batch that does not fit
    into the device's memory is halved, and so are those after it, unless the model is sharded.

    Args:
        model: A causal language model on its device.
        tokens: The pairs.
        batching: Padding, precision and size of the batches.
        title: Of the progress that is shown.
        reader: Of this model; reads features in the same pass.
        on_batch: Called in each process with the rows and features, on the CPU, of every batch it finishes (the cache
            writes them). Features of all pairs may be more than fits in memory, so they are not kept here.

    Returns:
        One value per pair, in the order of `tokens`.

    Raises:
        torch.OutOfMemoryError: If not even one pair fits.
    """
    if not tokens:
        return logps_of_rows([])
    model = batching.sharded(model)
    state, device = PartialState(), device_of(model)
    layout, batches = _choose_batches(model, tokens, batching)
    mine = batches[state.process_index :: state.num_processes]

    def forward(where: Sequence[int]) -> tuple[PairLogps, Features] | None:
        batch = LAYOUTS[layout]([tokens[i] for i in where], pad_token_id=batching.pad_token_id)
        return _forward_if_it_fits(model, batch, layout, device, reader)

    rows: Rows = []
    was_training = model.training
    model.eval()
    with (
        torch.no_grad(),
        torch.autocast(device.type, dtype=torch.bfloat16) if batching.use_bf16 else contextlib.nullcontext(),
        Progress(title, sum(map(len, mine)), unit=" pairs", is_shown=state.is_main_process) as progress,
    ):
        for where, (logps, features) in _finished(mine, forward, tokens):
            scored = _rows(where, logps)
            if on_batch is not None:
                with torch.autocast(device.type, enabled=False):  # on a CPU it refuses to join what is in float16
                    on_batch(scored, features)
            rows += scored
            progress.advance(len(where))
        for _ in range(_num_idle(model, len(batches))):  # the others need its part of the weights
            forward(batches[0][:1])
    model.train(was_training)
    meet()  # one may have had the longer pairs
    return logps_of_rows(gather_object(rows) if state.num_processes > 1 else rows)


def _choose_batches(
    model: nn.Module, tokens: Sequence[TokenizedPair], batching: Batching
) -> tuple[str, list[list[int]]]:
    """The layout of the forward passes, which is logged, and the positions of the pairs of each."""
    layout, reason = choose_layout(model, tokens, pad_token_id=batching.pad_token_id, use_bf16=batching.use_bf16)
    log_layout(layout, reason)
    limit = _max_tokens(model, layout, device_of(model), batching.max_tokens)
    return layout, list(batches_by_length([len(pair) for pair in tokens], max_tokens=limit))


def _num_idle(model: nn.Module, num_batches: int) -> int:
    """How many forward passes fewer than another process this one needs; they matter if the model is sharded."""
    state = PartialState()
    num_own = len(range(state.process_index, num_batches, state.num_processes))
    return -(-num_batches // state.num_processes) - num_own if is_sharded(model) else 0


def _max_tokens(model: nn.Module, layout: str, device: torch.device, asked: int | None) -> int:
    """Most positions in a batch: what was asked for, but never more than the device and the logits allow."""
    limit = MAX_TOKENS.get(device.type, MAX_TOKENS["cuda"])
    limit = min(limit, asked or limit)
    return min(limit, max(1, _MAX_LOGITS // vocabulary_size(model))) if layout == "plain" else limit


def _finished(
    batches: list[list[int]],
    forward: Callable[[Sequence[int]], tuple[PairLogps, Features] | None],
    tokens: Sequence[TokenizedPair],
) -> Iterator[tuple[list[int], tuple[PairLogps, Features]]]:
    """What `forward` makes of the batches, in turn; where memory is short, it and all after it are halved."""
    while batches:
        where, *rest = batches
        if (result := forward(where)) is not None:
            yield where, result
            batches = rest
        else:
            _check_halves(where, tokens)
            batches = [half for some in batches for half in (some[: len(some) // 2], some[len(some) // 2 :]) if half]


def _forward_if_it_fits(
    model: nn.Module, batch: Batch, layout: str, device: torch.device, reader: FeatureReader | None
) -> tuple[PairLogps, Features] | None:
    """None where memory is short; by then the failed pass and its tensors are gone."""
    try:
        placed = {name: tensor.to(device) for name, tensor in batch.items()}
        if reader is None:
            return FORWARDS[layout](model, placed), {}
        logps, features = reader.read(FORWARDS[layout], placed)
        return logps, {name: block.cpu() for name, block in features.items()}
    except torch.OutOfMemoryError:
        if is_sharded(model):  # the others wait in the middle of this forward pass
            raise
    torch.cuda.empty_cache()
    return None


def _check_halves(where: list[int], tokens: Sequence[TokenizedPair]) -> None:
    if len(where) == 1:
        raise torch.OutOfMemoryError(
            f"Scoring needs memory for a pair of {len(tokens[where[0]])} tokens; the device has none left. Lower "
            "max_length, use bf16, or take a larger device."
        )
    logger.info(
        "A batch of %d pairs does not fit into the device's memory; batches are halved from here on.", len(where)
    )


def _rows(where: list[int], logps: PairLogps) -> Rows:
    assert logps.chosen_tokens is not None  # noqa: S101 - both forwards count tokens
    assert logps.rejected_tokens is not None  # noqa: S101
    columns = (logps.chosen, logps.rejected, logps.chosen_tokens, logps.rejected_tokens)
    return list(zip(where, *(column.tolist() for column in columns), strict=True))


def logps_of_rows(rows: Rows) -> PairLogps:
    """Put rows back into the order of their positions."""
    _, chosen, rejected, chosen_tokens, rejected_tokens = zip(*sorted(rows), strict=True) if rows else [()] * 5
    return PairLogps(
        chosen=torch.tensor(chosen, dtype=torch.float32),
        rejected=torch.tensor(rejected, dtype=torch.float32),
        chosen_tokens=torch.tensor(chosen_tokens, dtype=torch.int64),
        rejected_tokens=torch.tensor(rejected_tokens, dtype=torch.int64),
    )
