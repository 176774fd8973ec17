"""The ledger: one row per pair and round, with everything that was known and decided.

In: pairs, margins, losses, weights, flip probabilities, decisions. Out: an Arrow table, saved as Parquet.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ropo.pairs import Pair
from ropo.provenance import write_aside

SCHEMA = pa.schema(
    [
        pa.field("pair_id", pa.string(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
        pa.field("round", pa.int32(), nullable=False),
        pa.field("margin", pa.float64(), nullable=False),
        pa.field("loss", pa.float64(), nullable=False),
        pa.field("weight", pa.float64(), nullable=False),
        pa.field("p_flip", pa.float64(), nullable=False),
        pa.field("decision", pa.string(), nullable=False),
        pa.field("origin", pa.string(), nullable=False),
        pa.field("held_out_margin", pa.float64()),
        pa.field("annotator", pa.string()),
        pa.field("parent_id", pa.string()),
        pa.field("source", pa.string()),
    ],
    metadata={
        "pair_id": "hash of prompt and unordered responses",
        "row": "place in the input, from 0; of the parent for resampled pairs",
        "margin": "implicit-reward margin in nats, as the data labels the pair",
        "loss": "training loss at that margin; DPO's for losses that see more than the margin",
        "weight": "weight given for the next round",
        "p_flip": "probability that the label is wrong at the likeliest flip rate; says nothing where none can be told",
        "decision": "keep, drop, flip, or resample (dropped, and replaced by a new pair)",
        "origin": "data, trusted or resampled",
        "held_out_margin": "margin under a model that was not trained on the pair; p_flip comes from it; null if none",
        "annotator": "who labelled the pair, if the data says so",
        "parent_id": "pair_id of the pair that a resampled pair replaces; null for others",
        "source": "dataset and row in it where several are mixed, and row counts on through all; else null",
    },
)


def ledger_table(
    pairs: Sequence[Pair],
    *,
    round_number: int,
    margins: NDArray[np.float64],
    losses: NDArray[np.float64],
    weights: NDArray[np.float64],
    p_flip: NDArray[np.float64],
    decisions: Sequence[str],
    held_out_margins: NDArray[np.float64] | None = None,
) -> pa.Table:
    """Rows of one round.

    Args:
        pairs: The pairs, as the data labels them.
        round_number: From 0.
        margins: Shape (pairs,), nats.
        losses: Shape (pairs,).
        weights: Shape (pairs,).
        p_flip: Shape (pairs,).
        decisions: One of keep, drop, flip, resample for each pair.
        held_out_margins: Of the first pairs, as many as were judged; the others get null.

    Returns:
        A table with `SCHEMA`.
    """
    held_out = [] if held_out_margins is None else held_out_margins.tolist()
    columns = {
        "pair_id": [pair.id for pair in pairs],
        "row": [pair.row for pair in pairs],
        "round": [round_number] * len(pairs),
        "margin": margins,
        "loss": losses,
        "weight": weights,
        "p_flip": p_flip,
        "decision": list(decisions),
        "origin": [pair.origin for pair in pairs],
        "held_out_margin": [*held_out, *[None] * (len(pairs) - len(held_out))],
        "annotator": [pair.annotator for pair in pairs],
        "parent_id": [pair.parent_id for pair in pairs],
        "source": [pair.source for pair in pairs],
    }
    return pa.table(columns, schema=SCHEMA)


def write_ledger(path: Path, table: pa.Table) -> None:
    """Write a ledger as Parquet, whole or not at all."""
    with write_aside(path) as aside:
        pq.write_table(table, aside)


def read_ledger(path: Path) -> pa.Table:
    """Read what `write_ledger` wrote."""
    return pq.read_table(path)
