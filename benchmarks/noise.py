"""Does the audit find the noise? The measurement behind the defaults.

    python benchmarks/noise.py                  # fill in the missing cells of noise_detection.csv
    python benchmarks/noise.py --scratch=DIR    # the same; several processes with one folder share the work
    python benchmarks/noise.py --table          # the tables of docs/noise.md, from the rows

Two embedded tasks, 500 to 6,000 pairs, 0 to 40 % of the labels flipped, five seeds; noise with a pattern on one task.
Every audit is `ropo audit` as shipped. What training on the kept pairs gains, `ropo bench` measures (docs/results.md).
"""

import logging
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ropo import Pair, ReviewInputs, ROPOConfig, __version__, flip_labels, run_audit
from ropo.evaluate.measures import auroc, average_precision, precision_recall
from ropo.run.ledger import read_ledger
from ropo_bench.rows import append_row, key_of, read_rows
from ropo_bench.toy import REVIEWS, SUPPORT, gold_reward, make_pairs, save_toy

HERE = Path(__file__).parent
DETECTION = HERE / "noise_detection.csv"
TASKS = {"reviews": REVIEWS, "support": SUPPORT}
RATES, SEEDS = (0.0, 0.1, 0.2, 0.3, 0.4), (1, 2, 3, 4, 5)
PATTERNS, PATTERN_RATE, PATTERN_SEEDS = ("length", "near_tie", "annotator", "topic"), 0.2, (1, 2, 3)
NUM_HELD_OUT, NUM_TRUSTED, MIN_GAP = 2000, 100, 1.5
COMMON: dict[str, Any] = {
    "per_device_train_batch_size": 16, "num_train_epochs": 1, "max_length": 128, "save_strategy": "no",
    "disable_tqdm": True,
}  # fmt: skip
CELL = ("task", "kind", "num_pairs", "flip_rate", "seed", "extra")
DETECTION_COLUMNS = (
    *CELL, "estimate", "low", "high", "is_informative", "auroc",
    "average_precision", "brier", "precision", "recall", "right_dropped", "clean_auroc", "claimed_precision",
    "claimed_recall", "worst_annotator", "refit_helps", "filter_helps", "seconds", "version",
)  # fmt: skip


def planted(task: str, num_pairs: int, rate: float, seed: int, kind: str) -> tuple[list[Pair], list[Pair], np.ndarray]:
    """Right pairs with the held-out ones behind them, the noisy ones, and which are flipped."""
    pairs = make_pairs(num_pairs + NUM_HELD_OUT + NUM_TRUSTED, seed=1000 * seed, min_gap=MIN_GAP, grammar=TASKS[task])
    more: dict[str, Any] = {}
    if kind == "near_tie":
        more["rewards"] = [[gold_reward(p.prompt, y) for y in (p.chosen, p.rejected)] for p in pairs[:num_pairs]]
    if kind == "topic":
        more["words"] = [noun for group in TASKS[task].groups[:1] for noun in group.nouns]
    noisy, is_flipped = flip_labels(pairs[:num_pairs], rate=rate, seed=1000 * seed + 1, kind=kind, **more)
    return pairs, noisy, is_flipped


def judged(folder: Path, is_flipped: np.ndarray) -> tuple[dict[str, float], np.ndarray]:
    """How well the ledger of an audit finds planted flips, and its held-out margins by row."""
    ledger = read_ledger(folder / "ledger.parquet").to_pandas()
    rows = ledger[(ledger["origin"] == "data") & (ledger["round"] == 0)].sort_values("row")
    truth = is_flipped[rows["row"].to_numpy()]
    p_flip, margins = rows["p_flip"].to_numpy(), rows["held_out_margin"].to_numpy()
    is_taken = (rows["decision"] != "keep").to_numpy()
    # Where nothing is flipped p_flip is 0 throughout, and the margin ranks.
    score = p_flip + 1e-9 * np.tanh(-margins)
    precision, recall = precision_recall(is_taken, truth)
    found = {
        "auroc": auroc(score, truth) if truth.any() else np.nan,
        "average_precision": average_precision(score, truth) if truth.any() else np.nan,
        "brier": float(np.mean((p_flip - truth) ** 2)),
        "precision": precision,
        "recall": recall,
        "right_dropped": float(is_taken[~truth].mean()),
    }
    return found, margins


def detect(cell: dict[str, Any], scratch: Path, folder: Path) -> dict[str, Any]:
    """One row of the detection table; the audit stays in `folder`."""
    task, num_pairs, seed = cell["task"], cell["num_pairs"], cell["seed"]
    pairs, noisy, is_flipped = planted(task, num_pairs, cell["flip_rate"], seed, cell["kind"])
    start = time.monotonic()
    review = ReviewInputs(trusted=pairs[num_pairs + NUM_HELD_OUT :]) if cell["extra"] == "trusted" else None
    options = ROPOConfig(output_dir=str(folder), seed=seed, reference_cache_dir=str(scratch / "cache"), **COMMON)
    summary = run_audit(scratch / f"{task}_model", noisy, options, review=review).summary
    found, margins = judged(folder, is_flipped)
    clean = scratch / f"clean_{task}_{num_pairs}_{seed}.npy"
    if not cell["flip_rate"]:
        np.save(clean, margins)
    elif clean.exists():  # margins of models trained on the right labels, seen from the noisy ones
        found["clean_auroc"] = auroc(-np.load(clean) * np.where(is_flipped, -1, 1), is_flipped)
    calibration, annotators = summary["calibration"] or {}, summary["annotators"]
    return {
        **cell,
        **summary["flip_rate"],
        **found,
        "is_informative": int(summary["is_informative"]),
        "claimed_precision": calibration.get("precision"),
        "claimed_recall": calibration.get("recall"),
        "worst_annotator": annotators[0]["rate"] if annotators else None,
        "refit_helps": int(summary["refit"]["helps"]),
        "filter_helps": int(summary["filter"]["helps"]),
        "seconds": time.monotonic() - start,
        "version": __version__,
    }


def all_cells() -> list[dict[str, Any]]:
    """Every cell, the most telling first, so that a run that is stopped early has whole seeds."""

    def cell(task: str, kind: str, size: int, rate: float, seed: int, extra: str = "") -> dict[str, Any]:
        return dict(zip(CELL, (task, kind, size, rate, seed, extra), strict=True))

    large = [[cell(task, "symmetric", 6000, rate, seed) for rate in RATES for task in TASKS] for seed in SEEDS]
    small = [
        [cell(task, "symmetric", size, rate, seed) for size in (1500, 500) for rate in RATES for task in TASKS]
        for seed in SEEDS
    ]
    patterns = [cell("reviews", kind, 6000, 0.2, seed) for seed in PATTERN_SEEDS for kind in PATTERNS]
    helped = [cell("reviews", "symmetric", 6000, 0.4, seed, "trusted") for seed in SEEDS[:3]]
    helped += [cell("reviews", "annotator", 6000, 0.4, seed, "annotators") for seed in SEEDS[:3]]
    groups = [*large[:2], small[0], patterns[:4], large[2], helped, small[1], *large[3:], patterns[4:], *small[2:]]
    return [one for group in groups for one in group]


def measure(cell: dict[str, Any], scratch: Path) -> None:
    """Fill in a cell that is missing."""
    if key_of(cell, CELL) in {key_of(row, CELL) for row in read_rows(DETECTION)}:
        return
    with tempfile.TemporaryDirectory(dir=scratch) as name:
        row = detect(cell, scratch, Path(name))
    append_row(DETECTION, row, DETECTION_COLUMNS)
    print(row, flush=True)


def main() -> None:
    """Fill in the missing cells; several processes with one --scratch= folder share the work."""
    if "--table" in sys.argv:
        show()
        return
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    kept = [word.removeprefix("--scratch=") for word in sys.argv[1:] if word.startswith("--scratch=")]
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(kept[0] if kept else name)
        scratch.mkdir(exist_ok=True)
        for task, grammar in TASKS.items():
            if not (scratch / f"{task}_model" / "tokenizer.json").exists():
                save_toy(scratch / f"{task}_model", seed=0, grammar=grammar)
        for number, cell in enumerate(all_cells()):
            try:
                (scratch / f"claimed_{number}").mkdir()
            except FileExistsError:
                continue  # another process has it, or had it: remove the folder to have it measured again
            measure(cell, scratch)


def show() -> None:
    """Print the tables of docs/noise.md as Markdown."""
    print(detection_table(), end="\n\n")
    print(pattern_table())


def detection_table() -> str:
    """One line per task, size and rate: means over seeds."""
    found = [row for row in read_rows(DETECTION) if row["kind"] == "symmetric" and not row["extra"]]
    names = ("task", "pairs", "flipped", "seeds", "can tell", "covered", "estimate", "AUROC", "AUROC of clean models")
    lines = [
        f"| {' | '.join(names)} | right pairs dropped | flips dropped | refit judges | filter helps |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for task, size, rate in sorted({(row["task"], -int(row["num_pairs"]), float(row["flip_rate"])) for row in found}):
        cells = [
            row for row in found
            if (row["task"], -int(row["num_pairs"]), float(row["flip_rate"])) == (task, size, rate)
        ]  # fmt: skip
        told = [row for row in cells if row["is_informative"] == "1"]
        covered = sum(float(row["low"]) <= rate <= float(row["high"]) for row in cells)
        estimates = [float(row["estimate"]) for row in told]
        shown = f"{np.mean(estimates):.3f} ({min(estimates):.3f}-{max(estimates):.3f})" if told else "-"
        lines.append(
            f"| {task} | {-size:,} | {rate:.0%} | {len(cells)} | {len(told)} | {covered} | {shown} "
            f"| {_average(cells, 'auroc')} | {_average(cells, 'clean_auroc')} | {_average(cells, 'right_dropped')} "
            f"| {_average(cells, 'recall')} | {_count(cells, 'refit_helps')} | {_count(cells, 'filter_helps')} |"
        )
    return "\n".join(lines)


def pattern_table() -> str:
    """Noise that does not fall at random, one line per kind."""
    found = [row for row in read_rows(DETECTION) if row["kind"] != "symmetric" or row["extra"]]
    names = ("noise", "flipped", "seeds", "estimate", "AUROC", "precision", "recall", "precision claimed")
    lines = [
        f"| {' | '.join(names)} | recall claimed | worst annotator | refit judges | filter helps |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for kind, rate, extra in sorted({(row["kind"], float(row["flip_rate"]), row["extra"]) for row in found}):
        cells = [row for row in found if (row["kind"], float(row["flip_rate"]), row["extra"]) == (kind, rate, extra)]
        title = f"{kind}, {NUM_TRUSTED} trusted pairs" if extra == "trusted" else kind
        shown = " | ".join(
            _average(cells, key)
            for key in (
                "estimate",
                "auroc",
                "precision",
                "recall",
                "claimed_precision",
                "claimed_recall",
                "worst_annotator",
            )
        )
        helps = f"{_count(cells, 'refit_helps')} | {_count(cells, 'filter_helps')}"
        lines.append(f"| {title} | {rate:.0%} | {len(cells)} | {shown} | {helps} |")
    return "\n".join(lines)


def _average(cells: list[dict[str, str]], key: str) -> str:
    values = [float(row[key]) for row in cells if row[key] not in ("", "nan")]
    return f"{np.mean(values):.3f}" if values else "-"


def _count(cells: list[dict[str, str]], key: str) -> int:
    return sum(row[key] == "1" for row in cells)


if __name__ == "__main__":
    main()
