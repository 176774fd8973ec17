"""How the cost of training grows, counted by `ropo.run.plan` and measured; and what the planner says of large models.

    python benchmarks/scaling.py            # measures, writes scaling.csv and scaling_runs.csv
    python benchmarks/scaling.py --table    # the tables of docs/performance.md, and its picture, scaling.svg

Measured, steps: milliseconds a pair of forward and backward pass, packed, one thread, a Llama of 4.8 million weights in
its layers, random tokens. The share of the machine's matrix rate is fitted at the first row and kept for all others, so
a row says how well the growth is predicted, not the speed.

Measured, runs: seconds of all stages of `ropo train`'s loop, one thread, the model and pairs of `ropo demo`, ρ = 0.2
without folds, with new responses for what is filtered. Two speeds are fitted at the first row, one of training and
scoring and one of sampling.

Planned: a 7B model (Llama 2's shape) on GPUs that reach 989 TFLOP/s in bfloat16 and read 3.35 TB/s, at a share of 40 %,
60,000 pairs of 512 prompt and 2 x 256 response tokens. Both are assumptions: nothing here was measured on a GPU. Each
GPU is taken to hold the whole model (13 GiB in bfloat16, and an adapter; to train all weights they must be sharded),
and communication to hide behind the arithmetic.
"""

import argparse
import csv
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from ropo import ROPOConfig, run_rounds
from ropo.data.tokenize import TokenizedPair
from ropo.logps.batch import packed_batch
from ropo.logps.choose import choose_layout
from ropo.logps.shared_prefix import packed_logps
from ropo.report import svg
from ropo.run.forecast import model_size
from ropo.run.plan import Machine, ModelSize, PairSize, RunSize, forward_operations, plan_stages
from ropo_bench.figures import looks_of, names_at_ends, stand_alone
from ropo_bench.toy import make_pairs, save_toy

RESULTS = Path(__file__).with_suffix(".csv")
RUN_RESULTS = RESULTS.with_name("scaling_runs.csv")
PICTURE = Path(__file__).with_suffix(".svg")
COLUMNS = ("pairs", "prompt", "chosen", "rejected", "measured_ms", "planned_ms", "torch")
SHAPES = (
    (8, 128, 48),
    (4, 128, 48),
    (16, 128, 48),
    (8, 32, 48),
    (8, 256, 48),
    (4, 512, 48),
    (8, 128, 12),
    (8, 128, 192),
)
RUN_COLUMNS = ("pairs", "candidates", "rounds", "measured_s", "planned_s", "torch")
RUNS = (
    (1600, 4, 2),
    (400, 4, 2),
    (800, 4, 2),
    (3200, 4, 2),
    (1600, 1, 2),
    (1600, 2, 2),
    (1600, 8, 2),
    (1600, 4, 1),
    (1600, 4, 4),
)
LARGE = ModelSize(
    layer_weights=6_476_000_000,
    last_mlp_weights=135_000_000,
    head_weights=131_000_000,
    num_layers=32,
    hidden_size=4096,
    intermediate_size=11008,
    trained_weights=40_000_000,  # an adapter of rank 16
    total_weights=6_738_000_000,
)
LARGE_PAIRS = PairSize(num_pairs=60_000, prompt_tokens=512, chosen_tokens=256, rejected_tokens=256)
GPU = Machine(flops=989e12, share=0.4, bytes_per_second=3.35e12, weight_bytes=2)
RUN = RunSize(rounds=2, rho=0.2, num_candidates=4, new_tokens=256, pairs_per_step=64)


def measure() -> None:
    """Write one row per shape."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=256, intermediate_size=704, num_hidden_layers=6, num_attention_heads=8
    )
    model = LlamaForCausalLM(config)
    size = ModelSize(
        layer_weights=sum(p.numel() for p in model.model.layers.parameters()),
        last_mlp_weights=sum(p.numel() for p in model.model.layers[-1].mlp.parameters()),
        head_weights=4096 * 256,
        num_layers=6,
        hidden_size=256,
        intermediate_size=704,
        trained_weights=0,
        total_weights=0,
    )
    rows, milliseconds_per_operation = [], 0.0
    for num_pairs, prompt, response in SHAPES:
        rng = np.random.default_rng(0)
        tokens = [
            TokenizedPair(
                prompt=rng.integers(3, 4096, prompt).astype(np.int32),
                chosen=rng.integers(3, 4096, response).astype(np.int32),
                rejected=rng.integers(3, 4096, response + 1).astype(np.int32),
            )
            for _ in range(num_pairs)
        ]
        choose_layout(model, tokens[:2], pad_token_id=0)
        measured = min(_milliseconds(model, tokens) for _ in range(4)) / num_pairs
        pairs = PairSize(num_pairs=1, prompt_tokens=prompt, chosen_tokens=response, rejected_tokens=response + 1)
        operations = 3 * forward_operations(size, pairs)
        milliseconds_per_operation = milliseconds_per_operation or measured / operations
        planned = operations * milliseconds_per_operation
        lengths = (prompt, response, response + 1)
        rows.append((num_pairs, *lengths, round(measured, 2), round(planned, 2), torch.__version__))
    with RESULTS.open("w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *rows])


def _milliseconds(model: LlamaForCausalLM, tokens: list[TokenizedPair]) -> float:
    model.zero_grad()
    start = time.perf_counter()
    logps = packed_logps(model, packed_batch(tokens, pad_token_id=0))
    (logps.chosen - logps.rejected).sum().backward()
    return 1000 * (time.perf_counter() - start)


def measure_runs() -> None:
    """Write one row per whole run."""
    torch.set_num_threads(1)
    rows, speeds = [], np.zeros(2)
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        save_toy(model, seed=0)
        size = model_size(AutoConfig.from_pretrained(model))
        for number, (num_pairs, num_candidates, rounds) in enumerate(RUNS):
            run = RunSize(
                rounds=rounds, num_folds=0, rho=0.2, num_candidates=num_candidates, new_tokens=24, pairs_per_step=16
            )
            measured = _seconds(model, Path(folder) / str(number), run, num_pairs)
            pairs = PairSize(num_pairs=num_pairs, prompt_tokens=32, chosen_tokens=24, rejected_tokens=24)
            stages = plan_stages(size, pairs, run, Machine(flops=1e9, share=1.0))
            of_sampling = sum(stage.seconds for stage in stages if stage.name == "sampling")
            counted = np.array([sum(stage.seconds for stage in stages) - of_sampling, of_sampling])
            if number == 0:
                speeds = measured / counted
            seconds = (round(float(measured.sum()), 1), round(float(counted @ speeds), 1))
            rows.append((num_pairs, num_candidates, rounds, *seconds, torch.__version__))
            print(rows[-1], flush=True)
    with RUN_RESULTS.open("w", newline="") as file:
        csv.writer(file).writerows([RUN_COLUMNS, *rows])


def _seconds(model: Path, folder: Path, run: RunSize, num_pairs: int) -> np.ndarray:
    """Of training and scoring, and of sampling."""
    args = ROPOConfig(
        output_dir=str(folder), per_device_train_batch_size=run.pairs_per_step, max_length=128, max_new_tokens=48,
        learning_rate=2e-4, beta=1.0, num_folds=0, rho=str(run.rho) if run.rounds > 1 else "0",
        rounds=run.rounds, alpha="6", num_candidates=run.num_candidates if run.rounds > 1 else 0, save_strategy="no",
        disable_tqdm=True,
    )  # fmt: skip
    told = run_rounds(str(model), make_pairs(num_pairs, seed=0), args).summary["seconds"]
    of_sampling = sum(value for name, value in told.items() if name.endswith("resample"))
    return np.array([sum(told.values()) - of_sampling, of_sampling])


def _rows(path: Path) -> list[dict[str, Any]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def runs_table() -> str:
    """Growth of whole runs, measured and planned."""
    lines = ["| pairs | K | rounds | measured, s | planned | measured / planned |", "|---|---|---|---|---|---|"]
    for row in _rows(RUN_RESULTS):
        measured, planned = float(row["measured_s"]), float(row["planned_s"])
        lines.append(
            f"| {int(row['pairs']):,} | {row['candidates']} | {row['rounds']} "
            f"| {measured:.1f} | {planned:.1f} | {measured / planned:.2f} |"
        )
    return "\n".join(lines)


def picture() -> str:
    """Cost over the size of one thing, both as multiples of the first row: measured as marks, planned as lines."""
    steps, runs = _rows(RESULTS), _rows(RUN_RESULTS)
    grown = {
        "pairs": _growth(runs, "s", "pairs", "candidates", "rounds"),
        "prompt tokens": _growth(steps, "ms", "prompt", "chosen"),
        "response tokens": _growth(steps, "ms", "chosen", "prompt"),
        "candidates, K": _growth(runs, "s", "candidates", "pairs", "rounds"),
        "rounds": _growth(runs, "s", "rounds", "pairs", "candidates"),
    }
    every = np.log2([point for points in grown.values() for point in points])
    frame = svg.Frame(
        width=760.0, height=400.0, x_range=(every[:, 0].min() - 0.1, every[:, 0].max() + 0.1),
        y_range=(every[:, 1:].min() - 0.1, every[:, 1:].max() + 0.1), left=52.0, right=150.0, top=26.0,
    )  # fmt: skip
    ticks = [(float(place), f"×{2.0**place:g}") for place in range(-2, 3)]
    body = [svg.axes(frame, x_label="size, to the first row", y_label="", x_ticks=ticks, has_y=False)]
    for place, name in ticks:
        if frame.y_range[0] <= place <= frame.y_range[1]:
            body += [
                svg.line(frame.left, frame.y(place), frame.width - frame.right, frame.y(place), "grid"),
                svg.text(frame.left - 6, frame.y(place) + 4, name, "end"),
            ]
    body.append(svg.text(frame.left, 14, "cost, to the first row: planned (lines) and measured (marks)", "start"))
    looks, ends = looks_of(list(grown)), {}
    for name, points in grown.items():
        xs, measured, planned = np.log2(sorted(points)).T
        look = looks[name]
        body.append(svg.path(frame, xs, planned, "method").replace("<polyline", f'<polyline style="{look.stroke}"'))
        marks = zip(xs, measured, strict=True)
        body += [f'<circle cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="4" fill="{look.colour}"/>' for x, y in marks]
        ends[name] = frame.y(planned[-1])
    body.append(names_at_ends(frame, ends, looks))
    return stand_alone("".join(body), frame, "Cost over size, measured and planned, for " + ", ".join(grown))


def _growth(rows: Sequence[dict[str, Any]], unit: str, key: str, *fixed: str) -> list[tuple[float, float, float]]:
    """Size, measured and planned cost of the rows that are like the first in what is fixed, as multiples of its own."""
    first = rows[0]
    names = (key, f"measured_{unit}", f"planned_{unit}")
    alike = [row for row in rows if all(row[name] == first[name] for name in fixed)]
    return [(*(float(row[name]) / float(first[name]) for name in names),) for row in alike]


def measured_table() -> str:
    """Growth, measured and planned."""
    rows = _rows(RESULTS)
    lines = [
        "| pairs | prompt | responses | measured, ms a pair | planned | measured / planned |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        measured, planned = float(row["measured_ms"]), float(row["planned_ms"])
        lines.append(
            f"| {row['pairs']} | {row['prompt']} | {row['chosen']} + {row['rejected']} "
            f"| {measured:.1f} | {planned:.1f} | {measured / planned:.2f} |"
        )
    return "\n".join(lines)


def planned_table() -> str:
    """A 7B model on 1, 8 and 64 GPUs: hours of each stage."""
    lines = ["| GPUs | reference, h | audit, h | rounds, h | sampling, h | all, h |", "|---|---|---|---|---|---|"]
    for num_devices in (1, 8, 64):
        stages = plan_stages(LARGE, LARGE_PAIRS, RUN, replace(GPU, num_devices=num_devices))
        hours = [stage.seconds / 3600 for stage in stages]
        lines.append(f"| {num_devices} | {' | '.join(f'{one:.2f}' for one in hours)} | {sum(hours):.2f} |")
    return "\n".join(lines)


def options_table() -> str:
    """What more rounds and folds cost, to a round without a reference pass: one epoch and its scoring pass."""

    def seconds(run: RunSize) -> float:
        return sum(stage.seconds for stage in plan_stages(LARGE, LARGE_PAIRS, run, GPU))

    once = seconds(RunSize(num_folds=0, needs_reference=False))
    lines = ["| run | to one epoch and its scoring pass |", "|---|---|"]
    for name, run in (
        ("one round, no audit", RunSize(num_folds=0)),
        ("one round, audit by features (default)", RunSize()),
        ("one round, audit by models, 2 folds", RunSize(scorer="models", num_folds=2)),
        ("one round, audit by models, 5 folds", RunSize(scorer="models")),
        ("two rounds, audit by features, 20 % sampled anew", RUN),
    ):
        lines.append(f"| {name} | {seconds(run) / once:.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the tables")
    if parser.parse_args().table:
        PICTURE.write_text(picture(), encoding="utf-8")
        print(measured_table(), runs_table(), planned_table(), options_table(), sep="\n\n")
    else:
        measure()
        measure_runs()
