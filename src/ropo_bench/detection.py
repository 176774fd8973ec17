"""How well a run has found flips whose truth is known.

In: the folder of a run, the answer key. Out: plain numbers.
"""

from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from ropo.evaluate.measures import auroc, precision_recall
from ropo.run.ledger import read_ledger


def detection(folder: Path, is_flipped: ArrayLike) -> dict[str, float]:
    """How well the ledger of a run finds planted flips.

    Args:
        folder: Output folder of the run.
        is_flipped: The answer key, by row.

    Returns:
        `auroc` of −margin, of models that have not seen the pair where there were any; `precision` and `recall` of the
        pairs that were not kept; `kept`, the share of the others.
    """
    ledger = read_ledger(folder / "ledger.parquet").to_pandas()
    rows = ledger[(ledger["origin"] == "data") & (ledger["round"] == 0)].sort_values("row")
    truth = np.asarray(is_flipped, dtype=bool)[rows["row"].to_numpy()]
    margins = rows["held_out_margin"].fillna(rows["margin"]).to_numpy()
    is_taken = (rows["decision"] != "keep").to_numpy()
    precision, recall = precision_recall(is_taken, truth)
    return {
        "auroc": auroc(-margins, truth),
        "precision": precision,
        "recall": recall,
        "kept": float(1 - is_taken.mean()),
    }
