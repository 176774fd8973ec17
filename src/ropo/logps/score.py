"""One pass over many pairs without gradients: the stage that reads the reference and the filter's margins.

In: a model and `TokenizedPair`s. Out: `PairLogps` in the order of the pairs, on the CPU, in float32; features of the
pairs batch by batch, where a reader is given.
"""

import contextlib
import logging
from collections.abc import Callable, Sequence

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import nn

from ropo.data.tokenize import TokenizedPair
from ropo.logps.batch import LAYOUTS, Batch, batches_by_length
from ropo.logps.choose import choose_layout
from ropo.logps.features import FeatureReader, Features
from ropo.logps.shared_prefix import FORWARDS, vocabulary_size
from ropo.pairs import PairLogps
from ropo.progress import Progress

logger = logging.getLogger(__name__)

Rows = list[tuple[int, float, float, int, int]]  # position, chosen, rejected, chosen tokens, rejected tokens

# Positions per batch. On a CPU small batches keep activations in its cache; a GPU wants to be filled.
_MAX_TOKENS = {"cpu": 4096, "cuda": 32768}
# The plain layout holds the logits of all positions, three times: at most so many of them, 2 GiB in float32.
_MAX_LOGITS = 2**29


def score_pairs(
    model: nn.Module,
    tokens: Sequence[TokenizedPair],
    *,
    pad_token_id: int,
    title: str = "Scoring pairs",
    use_bf16: bool = False,
    max_tokens: int | None = None,
    reader: FeatureReader | None = None,
    on_batch: Callable[[Rows, Features], None] | None = None,
) -> PairLogps:
    """Log-probabilities of all pairs under one model, in evaluation mode.

    With several processes each scores its share of the batches and all return everything. A batch that does not fit
    into the device's memory is halved, and so are those after it.

    Args:
        model: A causal language model on its device.
        tokens: The pairs.
        pad_token_id: For the batches.
        title: Of the progress that is shown.
        use_bf16: Compute in bfloat16 by autocast, as training with `bf16` does.
        max_tokens: Most unique tokens in a forward pass; default by device. One pair may have more.
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
    state = PartialState()
    device = next(model.parameters()).device
    layout, _ = choose_layout(
        model,
        tokens,
        pad_token_id=pad_token_id,
        use_bf16=use_bf16,
    )
    limit = _MAX_TOKENS.get(device.type, _MAX_TOKENS["cuda"])
    limit = min(limit, max_tokens or limit)
    if layout == "plain":
        limit = min(limit, max(1, _MAX_LOGITS // vocabulary_size(model)))
    batches = list(batches_by_length([len(pair) for pair in tokens], max_tokens=limit))
    mine = batches[state.process_index :: state.num_processes]
    rows: Rows = []
    was_training = model.training
    model.eval()
    precision = torch.autocast(device.type, dtype=torch.bfloat16) if use_bf16 else contextlib.nullcontext()
    with (
        torch.no_grad(),
        precision,
        Progress(title, sum(map(len, mine)), unit=" pairs", is_shown=state.is_main_process) as progress,
    ):
        while mine:
            where, *rest = mine
            batch = LAYOUTS[layout]([tokens[i] for i in where], pad_token_id=pad_token_id)
            read = _forward_if_it_fits(model, batch, layout, device, reader)
            if read is None:
                _check_halves(where, tokens)
                mine = [half for some in mine for half in (some[: len(some) // 2], some[len(some) // 2 :]) if half]
                continue
            logps, features = read
            found, mine = _rows(where, logps), rest
            if on_batch is not None:
                on_batch(found, features)
            rows += found
            progress.advance(len(where))
    model.train(was_training)
    if state.num_processes > 1:
        rows = gather_object(rows)
    return logps_of_rows(rows)


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
        pass
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
    """Put rows back into the order of their positions.

    Args:
        rows: Every position from 0 on, once, in any order.

    Returns:
        Log-probabilities by position.
    """
    _, chosen, rejected, chosen_tokens, rejected_tokens = zip(*sorted(rows), strict=True) if rows else [()] * 5
    return PairLogps(
        chosen=torch.tensor(chosen, dtype=torch.float32),
        rejected=torch.tensor(rejected, dtype=torch.float32),
        chosen_tokens=torch.tensor(chosen_tokens, dtype=torch.int64),
        rejected_tokens=torch.tensor(rejected_tokens, dtype=torch.int64),
    )
