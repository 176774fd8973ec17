"""How true the forecast of a run is: time and memory that `dry_run` tells, and what the run then takes.

    python benchmarks/forecast.py GEMMA PAIRS    # measures what is missing in benchmarks/forecast.csv
    python benchmarks/forecast.py --table        # prints the table of docs/performance.md

GEMMA is a folder with Gemma 3 270M, PAIRS anything `ropo train` reads as text; the cases that need neither are measured
without. "toy": model and pairs of `ropo demo`, whole runs with audit and report. "llama": 46 million random weights, a
vocabulary of 16,384 learned from PAIRS. "gemma": with LoRA.

Each case is a process of its own with one thread. It runs one step first, which imports what a run imports; then it
forecasts, and runs. Time is CPU time of the process, for the forecast's own clock as well, since other work shares the
machine. Memory is the highest resident memory of the run's training less what was resident before the run.
"""

import argparse
import csv
import ctypes
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from ropo import ROPOConfig, load_pairs, run_rounds
from ropo.data.inject import flip_labels
from ropo.logps import choose
from ropo.pairs import Pair
from ropo.provenance import commit
from ropo.run import align, probe
from ropo.run.align import dry_run
from ropo.train import trainer
from ropo_bench.rows import read_rows
from ropo_bench.toy import make_pairs, save_toy

RESULTS = Path(__file__).with_suffix(".csv")
COLUMNS = (
    "case", "turn", "told_s", "measured_s", "told_gb", "measured_gb", "forecast_s", "layout", "pairs", "torch", "date",
    "commit",
)  # fmt: skip
NUM_TURNS = 2
TOY = {"per_device_train_batch_size": 16, "max_length": 128, "max_new_tokens": 48, "learning_rate": 4e-4, "beta": 1.0}
PLAIN = {"loss": "dpo", "num_folds": 0, "rho": "0", "save_strategy": "no"}
LONG = {**PLAIN, "per_device_train_batch_size": 4, "max_length": 256}
CHECKPOINTS = {"activation_checkpointing": True}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A run: its model, pairs, options and layout."""

    model: str
    options: Mapping[str, Any]
    num_pairs: int
    layout: str | None = None  # None for the one that is chosen
    has_adapter: bool = False
    needs: tuple[str, ...] = field(default=())


CASES: Mapping[str, Case] = {
    "toy, audit and training": Case(model="toy", options=TOY, num_pairs=1600),
    "toy, two rounds, resampled": Case(
        model="toy", options={**TOY, "rounds": 2, "num_candidates": 4, "rho": "0.2"}, num_pairs=800
    ),
    "toy, audit by models": Case(model="toy", options={**TOY, "scorer": "models"}, num_pairs=800),
    "llama": Case(model="llama", options=LONG, num_pairs=12),
    "llama, padded": Case(model="llama", options=LONG, num_pairs=12, layout="plain_rows"),
    "llama, shared prefix": Case(model="llama", options=LONG, num_pairs=12, layout="shared_prefix"),
    "llama, checkpoints": Case(model="llama", options={**LONG, **CHECKPOINTS}, num_pairs=12),
    "llama, bf16": Case(model="llama", options={**LONG, "bf16": True}, num_pairs=12),
    "llama, 12 pairs a step, adafactor": Case(
        model="llama", options={**LONG, "gradient_accumulation_steps": 3, "optim": "adafactor"}, num_pairs=16
    ),
    "gemma, LoRA": Case(model="gemma", options=LONG, num_pairs=8, has_adapter=True),
    "gemma, LoRA, padded": Case(model="gemma", options=LONG, num_pairs=8, has_adapter=True, layout="plain_rows"),
    "gemma, LoRA, checkpoints": Case(model="gemma", options={**LONG, **CHECKPOINTS}, num_pairs=8, has_adapter=True),
}


def measure(name: str, turn: int, gemma: str, source: str) -> dict[str, Any]:
    """Forecast and run one case."""
    torch.set_num_threads(1)
    case = CASES[name]
    if case.layout is not None:
        choose._candidates = lambda _: (case.layout,)
    adapter = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear") if case.has_adapter else None
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model, pairs = _task(case, folder, gemma, source)
        _run_once(folder / "first", model, pairs[:40], case, adapter)
        args = _options(folder / "run", case)
        probe.CLOCK = time.process_time
        forecast_seconds = _timing_forecasts()
        plan = dry_run(model, pairs, args, peft_config=adapter)
        _settle()
        before, watch = _memory("VmRSS"), _Watch()
        watched = trainer.ROPOTrainer._own_callbacks
        trainer.ROPOTrainer._own_callbacks = lambda self: [*watched(self), watch]
        start = time.process_time()
        run_rounds(model, pairs, args, peft_config=adapter)
        seconds, peak = time.process_time() - start, watch.peak
    values = (
        name, turn, round(plan.seconds, 2), round(seconds, 2), round(plan.memory.total / 1e9, 4),
        round((peak - before) / 1e9, 4), round(forecast_seconds[-1], 1), plan.layout, len(pairs), torch.__version__,
        datetime.now(UTC).date().isoformat(), commit(),
    )  # fmt: skip
    return dict(zip(COLUMNS, values, strict=True))


def _timing_forecasts() -> list[float]:
    """A list to which the CPU seconds of each forecast will be added."""
    made, found = align.forecast_everywhere, []

    def forecast(*given: Any, **options: Any) -> Any:
        start = time.process_time()
        plan = made(*given, **options)
        found.append(time.process_time() - start)
        return plan

    align.forecast_everywhere = forecast
    return found


class _Watch(TrainerCallback):
    """The highest resident memory of the trainings of a run."""

    peak = 0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        _settle()
        Path("/proc/self/clear_refs").write_text("5")  # the highest resident memory is counted from here

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.peak = max(self.peak, _memory("VmHWM"))


def _options(folder: Path, case: Case, **more: Any) -> ROPOConfig:
    return ROPOConfig(output_dir=str(folder), use_cpu=True, disable_tqdm=True, **{**case.options, **more})


def _run_once(folder: Path, model: str, pairs: list[Pair], case: Case, adapter: Any) -> None:
    args = _options(folder, case, max_steps=1, warmup_steps=0, max_length=64)
    run_rounds(model, pairs, args, peft_config=adapter)
    shutil.rmtree(folder)


def _settle() -> None:
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def _memory(name: str) -> int:
    """Bytes that the kernel says."""
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def _task(case: Case, folder: Path, gemma: str, source: str) -> tuple[str, list[Pair]]:
    """Folder of the model, and pairs."""
    if case.model == "toy":
        save_toy(folder / "model", seed=0, num_texts=2000)
        return str(folder / "model"), flip_labels(make_pairs(case.num_pairs, seed=1), rate=0.2, seed=2)[0]
    pairs = load_pairs(source).pairs
    if case.model == "llama":
        _save_llama(folder / "model", pairs)
    return (gemma if case.model == "gemma" else str(folder / "model")), pairs[: case.num_pairs]


def _save_llama(folder: Path, pairs: list[Pair]) -> None:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    learner = trainers.BpeTrainer(vocab_size=16384, special_tokens=special, show_progress=False)
    raw.train_from_iterator([text for pair in pairs for text in (pair.prompt, pair.chosen, pair.rejected)], learner)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=512, intermediate_size=1376, num_hidden_layers=11,
        num_attention_heads=8, num_key_value_heads=8, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def table() -> str:
    """Forecast and measured, the mean of the turns, and the largest factor between them in any turn."""
    lines = [
        "| run | forecast, s | measured, s | factor | forecast, GB | measured, GB | factor | forecast took, s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    rows = read_rows(RESULTS)
    for name in CASES:
        turns = [row for row in rows if row["case"] == name]
        if not turns:
            continue
        mean = {key: sum(float(row[key]) for row in turns) / len(turns) for key in COLUMNS[2:7]}
        factors = [
            max(max(float(row[f"told_{unit}"]) / float(row[f"measured_{unit}"]) for row in turns),
                max(float(row[f"measured_{unit}"]) / float(row[f"told_{unit}"]) for row in turns))
            for unit in ("s", "gb")
        ]  # fmt: skip
        lines.append(
            f"| {name} | {mean['told_s']:.0f} | {mean['measured_s']:.0f} | {factors[0]:.2f} | {mean['told_gb']:.3f} "
            f"| {mean['measured_gb']:.3f} | {factors[1]:.2f} | {mean['forecast_s']:.0f} |"
        )
    return "\n".join(lines)


def measure_all(gemma: str, source: str) -> None:
    """Add the rows that are missing."""
    rows = read_rows(RESULTS) if RESULTS.exists() else []
    done = {(row["case"], int(row["turn"])) for row in rows}
    for turn in range(NUM_TURNS):
        for name, case in CASES.items():
            if (name, turn) in done or (case.model != "toy" and not source) or (case.model == "gemma" and not gemma):
                continue
            words = [sys.executable, __file__, gemma or "", source or "", "--case", name, "--turn", str(turn)]
            found = subprocess.run(words, check=True, capture_output=True, text=True, env=_environment())
            row = json.loads(found.stdout.splitlines()[-1])
            print(row, flush=True)
            is_new = not RESULTS.exists()
            with RESULTS.open("a", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
                if is_new:
                    writer.writeheader()
                writer.writerow(row)


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gemma", nargs="?", help="folder with Gemma 3 270M")
    parser.add_argument("source", nargs="?", help="pairs")
    parser.add_argument("--case", help="measure one and print its row")
    parser.add_argument("--turn", type=int, default=0)
    parser.add_argument("--table", action="store_true", help="print the table")
    given = parser.parse_args()
    if given.table:
        print(table())
    elif given.case:
        print(json.dumps(measure(given.case, given.turn, given.gemma, given.source)))
    else:
        measure_all(given.gemma, given.source)
