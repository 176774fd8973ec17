"""SelectiveDPO: leave out the half of the pairs that is hardest to predict, and learn the others from easy to hard.

In: pairs, a model, a way to make options. Out: the pairs to train on, in order.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from ropo.config import ROPOConfig
from ropo.pairs import Pair
from ropo.run.align import run_audit
from ropo.run.ledger import read_ledger

_NUM_SPLITS = 3  # of the pairs into halves, each with a seed of its own, as in the paper


def easiest_first(
    model: Path, pairs: list[Pair], config: Callable[..., ROPOConfig], *, share: float = 0.5, seed: int = 0
) -> list[Pair]:
    """Order pairs by how well models that did not see them predict their labels (arXiv:2502.09650).

    ::

        difficulty = mean over 3 splits of −log σ(h), h from a model that was trained on the other half

    The authors keep several checkpoints of each model; ours is the last one.

    Args:
        model: Folder of the initial model.
        pairs: All of them, rows 0, 1, ...
        config: Makes options from the name of a folder and further options.
        share: Of the pairs that are kept, the easiest.
        seed: Of the first split; every further one has its own.
    """
    difficulty = np.zeros(len(pairs))
    for split in range(_NUM_SPLITS):
        args = config(f"split_{split}", scorer="models", num_folds=2, rho="auto", seed=seed + 1000 * split)
        run_audit(model, pairs, args)
        ledger = read_ledger(Path(str(args.output_dir)) / "ledger.parquet").to_pandas()
        ledger = ledger[ledger["origin"] == "data"].sort_values("row")
        difficulty[ledger["row"].to_numpy()] += np.logaddexp(0.0, -ledger["held_out_margin"].to_numpy())
    order = np.argsort(difficulty, kind="stable")[: round(share * len(pairs))]
    return [pairs[i] for i in order]
