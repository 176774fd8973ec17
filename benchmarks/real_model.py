"""What an audit finds, and what training after it gains, on a real pretrained model and real text.

    python benchmarks/real_model.py MODEL PAIRS.jsonl WORK                    # audits, then python ... --table
    python benchmarks/real_model.py MODEL PAIRS.jsonl WORK --test=TEST.jsonl  # audits, then trainings with LoRA
    ... --num_pairs=500 --max_length=256 --rates=0.2 --bf16                   # where time is short

PAIRS (`film_pairs.py` makes some) are prompts with chosen and rejected whose labels are taken to be right. They are
audited as they are, with 20 and 30 % flipped at random, and, where the data has a column `stronger_model_is_chosen`,
with the answer of the stronger model taken for the better one: that is how pairs are made in practice. The reference
reads them once: swapped pairs hit the cache. DPO and ROPO then train a LoRA adapter for one epoch with the options as
shipped, and are asked about the pairs of TEST. Rows go to real_model.csv beside this file; what is there is not made
again.
"""

import argparse
import gzip
import json
import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig

from ropo import Pair, ROPOConfig, __version__, flip_labels, run_audit, run_rounds
from ropo.data.validate import read_checked
from ropo.evaluate.measures import auroc, precision_recall
from ropo.provenance import read_json
from ropo.run.ledger import read_ledger
from ropo_bench.rows import append_row, key_of, read_rows

ROWS = Path(__file__).parent / "real_model.csv"
COLUMNS = (
    "model", "data", "num_pairs", "noise", "flip_rate", "seed", "method", "estimate", "low", "high", "obstacle",
    "taken", "agreement", "length", "ngrams", "auroc", "precision", "recall", "accuracy", "margin", "beta", "dtype",
    "version",
)  # fmt: skip
NAMED = ("model", "data", "noise", "flip_rate", "seed", "method")
RATES, SEEDS = (0.2, 0.3), (1, 2, 3)
TRAINED_SEEDS = (1, 2)
OPTIONS: dict[str, Any] = {
    "per_device_train_batch_size": 8, "save_strategy": "no", "logging_strategy": "no",
    "disable_tqdm": True,
}  # fmt: skip
LEARNING_RATE = 1e-4  # usual for LoRA
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def noisy(pairs: list[Pair], stronger: np.ndarray | None) -> Iterator[tuple[str, float, int, list[Pair], np.ndarray]]:
    """Kind, rate and seed of the noise, the pairs with it, and which of them are flipped."""
    yield "none", 0.0, 1, pairs, np.zeros(len(pairs), dtype=bool)
    if stronger is not None:
        turned = [
            pair if is_right else replace(pair, chosen=pair.rejected, rejected=pair.chosen)
            for pair, is_right in zip(pairs, stronger, strict=True)
        ]
        yield "stronger_model", float((~stronger).mean()), 1, turned, ~stronger
    for seed in SEEDS:
        for rate in RATES:
            yield "symmetric", rate, seed, *flip_labels(pairs, rate=rate, seed=seed)


def audited(folder: Path, is_flipped: np.ndarray) -> dict[str, Any]:
    """What the audit in a folder says, beside the truth."""
    summary = read_json(folder / "summary.json")
    ledger = read_ledger(folder / "ledger.parquet").to_pandas()
    rows = ledger[(ledger["origin"] == "data") & (ledger["round"] == 0)].sort_values("row")
    truth, margins = is_flipped[rows["row"].to_numpy()], rows["held_out_margin"].to_numpy()
    agreement = {row["name"]: row["agreement"] for row in summary["scorers"]}
    taken = next(row["name"] for row in summary["scorers"] if row["is_taken"])
    precision, recall = precision_recall((rows["decision"] != "keep").to_numpy(), truth)
    found = {
        **{name: summary["flip_rate"][name] for name in ("estimate", "low", "high")},
        "obstacle": summary.get("obstacle"),
        "taken": taken,
        "agreement": agreement[taken],
        "length": agreement.get("length"),
        "ngrams": agreement.get("n-grams"),
        "precision": precision,
        "recall": recall,
    }
    return found | ({"auroc": auroc(-margins, truth)} if truth.any() else {})


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to measure.

    Attributes:
        test: Pairs to ask a trained model about; None to train none.
        num_pairs: How many of the data, from its start; None for all.
        rates: Of the flips; None for all, and for the data as they are.
        options: Of `ROPOConfig`.
    """

    test: Path | None
    num_pairs: int | None
    rates: tuple[float, ...] | None
    options: dict[str, Any]


def main(model: str, data: Path, work: Path, plan: Plan) -> None:
    """Fill in the missing rows."""
    logging.disable(logging.WARNING)
    pairs = read_checked(data)[1][: plan.num_pairs]
    stronger = stronger_of(data, pairs)
    common = {**OPTIONS, **plan.options, "reference_cache_dir": str(work / "cache")}
    for kind, rate, seed, given, is_flipped in noisy(pairs, stronger):
        if plan.rates is not None and rate not in plan.rates:
            continue
        cell = {"model": Path(model).name, "data": data.name, "noise": kind, "flip_rate": round(rate, 4), "seed": seed}
        folder = work / f"{kind}_{rate:.2f}_{seed}"
        if is_missing(cell, "audit"):
            run_audit(model, given, ROPOConfig(output_dir=str(folder), **common))
            append({**cell, "method": "audit", "num_pairs": len(given), **audited(folder, is_flipped)})
        if plan.test is None or seed not in TRAINED_SEEDS:
            continue
        for method, options in (("ropo", {}), ("dpo", {"loss": "dpo", "rho": "0", "num_folds": 0})):
            if is_missing(cell, method):
                out = folder.with_name(f"{folder.name}_{method}")
                args = ROPOConfig(output_dir=str(out), learning_rate=LEARNING_RATE, seed=seed, **common, **options)
                run_rounds(model, given, args, peft_config=LoraConfig(**LORA), eval_dataset=plan.test)
                summary = read_json(out / "summary.json")
                last = summary["evaluation"]["rounds"][-1]
                found = {"accuracy": last["accuracy"], "margin": last["margin"], "beta": summary["beta"]}
                found["dtype"] = "bfloat16" if args.bf16 else "float32"
                append({**cell, "method": method, "num_pairs": len(given), **found})


def stronger_of(data: Path, pairs: list[Pair]) -> np.ndarray | None:
    """Whether the chosen response of each pair is the stronger model's, if the file says so."""
    content = data.read_bytes()
    text = (gzip.decompress(content) if data.suffix == ".gz" else content).decode()
    rows = [json.loads(line) for line in text.split("\n") if line]
    if "stronger_model_is_chosen" not in rows[0]:
        return None
    return np.array([bool(rows[pair.row]["stronger_model_is_chosen"]) for pair in pairs])


def is_missing(cell: dict[str, Any], method: str) -> bool:
    """Whether a row is not there yet."""
    return key_of({**cell, "method": method}, NAMED) not in {key_of(row, NAMED) for row in read_rows(ROWS)}


def append(row: dict[str, Any]) -> None:
    """Add a finished row."""
    row = {**row, "version": __version__}
    append_row(ROWS, row, COLUMNS)
    print(row, flush=True)


def table() -> str:
    """The audits as Markdown, means over seeds."""
    found = [row for row in read_rows(ROWS) if row["method"] == "audit"]
    names = (
        "data", "noise", "flipped", "seeds", "can tell", "covered", "agrees with unseen labels", "length alone",
        "n-grams", "AUROC", "precision", "recall",
    )  # fmt: skip
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for data, noise, rate in sorted({(row["data"], row["noise"], row["flip_rate"]) for row in found}):
        cells = [row for row in found if (row["data"], row["noise"], row["flip_rate"]) == (data, noise, rate)]
        told = [row for row in cells if row["estimate"]]
        covered = sum(float(row["low"]) <= float(rate) <= float(row["high"]) for row in cells)
        means = " | ".join(
            _mean(cells, name) for name in ("agreement", "length", "ngrams", "auroc", "precision", "recall")
        )
        shown = f"{len(told)}" + (f" ({_mean(told, 'estimate')})" if told else "")
        lines.append(f"| {data} | {noise} | {float(rate):.0%} | {len(cells)} | {shown} | {covered} | {means} |")
    return "\n".join(lines)


def training_table() -> str:
    """The trainings as Markdown, ROPO beside DPO on the same labels."""
    found = [row for row in read_rows(ROWS) if row["method"] != "audit"]
    names = ("data", "noise", "flipped", "seed", "dtype", "method", "beta", "accuracy", "mean margin, nats")
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for row in sorted(found, key=lambda row: [row[name] for name in (*NAMED[1:5], "method")]):
        shown = [row["data"], row["noise"], f"{float(row['flip_rate']):.0%}", row["seed"], row["dtype"], row["method"]]
        shown += [f"{float(row['beta']):.2f}", f"{float(row['accuracy']):.3f}", f"{float(row['margin']):.2f}"]
        lines.append(f"| {' | '.join(shown)} |")
    return "\n".join(lines)


def _mean(rows: list[dict[str, str]], name: str) -> str:
    values = [float(row[name]) for row in rows if row[name] not in ("", "nan")]
    return f"{np.mean(values):.3f}" if values else "-"


if __name__ == "__main__":
    if "--table" in sys.argv:
        print(table(), training_table(), sep="\n\n")
    else:
        parser = argparse.ArgumentParser()
        parser.add_argument("model")
        parser.add_argument("pairs", type=Path)
        parser.add_argument("work", type=Path)
        parser.add_argument("--test", type=Path)
        parser.add_argument("--num_pairs", type=int)
        parser.add_argument("--max_length", type=int, default=512)
        parser.add_argument("--rates", type=float, nargs="+")
        parser.add_argument("--bf16", action="store_true")
        args = parser.parse_args()
        precision = {"bf16": True, "use_cpu": not torch.cuda.is_available()} if args.bf16 else {}
        plan = Plan(
            test=args.test,
            num_pairs=args.num_pairs,
            rates=None if args.rates is None else tuple(args.rates),
            options={"max_length": args.max_length, **precision},
        )
        main(args.model, args.pairs, args.work, plan)
