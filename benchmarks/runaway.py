"""Do a few responses that never end blind an audit? The measurement behind `ropo.audit.features.MOST`.

    python benchmarks/runaway.py            # fill in the missing rows of runaway.csv
    python benchmarks/runaway.py --table    # the table of docs/noise.md

Both embedded tasks, 1,500 pairs, 20 % of the labels flipped, two seeds. In some pairs the last token of the chosen
response is repeated 1,000 times. AUROC is that of the other pairs.
"""

import itertools
import json
import logging
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ropo import ROPOConfig, flip_labels, run_audit
from ropo.audit import features
from ropo.evaluate.measures import auroc
from ropo.run.ledger import read_ledger
from ropo_bench.rows import append_row, key_of, read_rows
from ropo_bench.toy import REVIEWS, SUPPORT, make_pairs, save_toy

ROWS = Path(__file__).with_suffix(".csv")
TASKS = {"reviews": REVIEWS, "support": SUPPORT}
NUM_PAIRS, RATE, SEEDS = 1500, 0.2, (1, 2)
RUNAWAYS, MOST = (0, 1, 5), (2, 3, 5, 10**9)
CELL = ("task", "seed", "runaways", "most")
COLUMNS = (*CELL, "auroc", "estimate", "low", "high")


def measured(cell: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """One audit."""
    right = make_pairs(NUM_PAIRS, seed=1000 * cell["seed"], min_gap=1.5, grammar=TASKS[cell["task"]])
    pairs, is_flipped = flip_labels(right, rate=RATE, seed=1000 * cell["seed"] + 1)
    chosen = np.random.default_rng(cell["seed"]).choice(NUM_PAIRS, size=cell["runaways"], replace=False)
    for row in chosen.tolist():
        last = pairs[row].chosen.split()[-1]
        pairs[row] = replace(pairs[row], chosen=pairs[row].chosen + f" {last}" * 1000)
    features.MOST = cell["most"]
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        options = ROPOConfig(
            output_dir=folder, seed=cell["seed"], max_length=2048, disable_tqdm=True,
            reference_cache_dir=str(scratch / "cache"),
        )  # fmt: skip
        summary = run_audit(scratch / cell["task"], pairs, options).summary
        rows = read_ledger(Path(folder) / "ledger.parquet").to_pandas().sort_values("row")
    is_usual = ~np.isin(rows["row"], chosen)
    margins, truth = rows["held_out_margin"].to_numpy(), is_flipped[rows["row"].to_numpy()]
    return {**cell, "auroc": auroc(-margins[is_usual], truth[is_usual]), **summary["flip_rate"]}


def table() -> str:
    """AUROC and how often a rate is told, for each task and number of such responses."""
    found = read_rows(ROWS)
    titles = [f"at most {most:g} times the median" for most in MOST[:-1]] + ["no limit"]
    lines = [f"| task | endless responses | {' | '.join(titles)} |", "|---" * (2 + len(MOST)) + "|"]
    for task, count in itertools.product(TASKS, RUNAWAYS):
        shown = []
        for most in MOST:
            names = [task, str(count), str(most)]
            cells = [row for row in found if [row["task"], row["runaways"], row["most"]] == names]
            mean = np.mean([float(row["auroc"]) for row in cells])
            shown.append(f"{mean:.3f} ({sum(row['estimate'] != '' for row in cells)})")
        lines.append(f"| {task} | {count} | {' | '.join(shown)} |")
    return "\n".join(lines)


def main() -> None:
    """Fill in the missing rows."""
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        for task, grammar in TASKS.items():
            save_toy(scratch / task, seed=0, grammar=grammar)
            for name, option in (("config", "max_position_embeddings"), ("tokenizer_config", "model_max_length")):
                path = scratch / task / f"{name}.json"  # its positions are rotations, so they have no end
                path.write_text(json.dumps({**json.loads(path.read_text()), option: 2048}))
        for values in itertools.product(TASKS, SEEDS, RUNAWAYS, MOST):
            cell = dict(zip(CELL, values, strict=True))
            if key_of(cell, CELL) not in {key_of(row, CELL) for row in read_rows(ROWS)}:
                append_row(ROWS, measured(cell, scratch), COLUMNS)


if __name__ == "__main__":
    print(table()) if "--table" in sys.argv else main()
