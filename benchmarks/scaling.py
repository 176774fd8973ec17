"""How the cost of training grows, counted by `ropo.plan` and measured; and what the planner says of large models.

    python benchmarks/scaling.py            # measures, writes scaling.csv
    python benchmarks/scaling.py --table    # the tables of docs/performance.md

Measured: milliseconds a pair of forward and backward pass, packed, one thread, a Llama of 4.8 million weights in its
layers, random tokens. The share of the machine's matrix rate is fitted at the first row and kept for all others, so a
row says how well the growth is predicted, not the speed.

Planned: a 7B model (Llama 2's shape) on GPUs that reach 989 TFLOP/s in bfloat16 and read 3.35 TB/s, at a share of 40 %,
60,000 pairs of 512 prompt and 2 x 256 response tokens. Both are assumptions: nothing here was measured on a GPU. Each
GPU is taken to hold the whole model (13 GiB in bfloat16, and an adapter; to train all weights they must be sharded),
and communication to hide behind the arithmetic.
"""

import argparse
import csv
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ropo.data.tokenize import TokenizedPair
from ropo.logps.batch import packed_batch
from ropo.logps.shared_prefix import choose_layout, packed_logps
from ropo.plan import Machine, ModelSize, PairSize, RunSize, forward_operations, plan_run

RESULTS = Path(__file__).with_suffix(".csv")
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
LARGE = ModelSize(
    layer_weights=6_476_000_000,
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
        choose_layout(model, tokens[:2], pad_token_id=0, max_length=4096)
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


def measured_table() -> str:
    """Growth, measured and planned."""
    with RESULTS.open() as file:
        rows = list(csv.DictReader(file))
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
        plan = plan_run(LARGE, LARGE_PAIRS, RUN, replace(GPU, num_devices=num_devices), tokens_at_once=8192)
        hours = [f"{stage.seconds / 3600:.2f}" for stage in plan.stages]
        lines.append(f"| {num_devices} | {' | '.join(hours)} | {plan.seconds / 3600:.2f} |")
    return "\n".join(lines)


def options_table() -> str:
    """What more rounds, folds and passes cost, to one epoch of training without anything else."""
    once = plan_run(LARGE, LARGE_PAIRS, RunSize(num_folds=0, needs_reference=False), GPU, tokens_at_once=8192).seconds
    lines = ["| run | to one epoch of training |", "|---|---|"]
    for name, run in (
        ("one round, no folds", RunSize(num_folds=0)),
        ("one round, 2 folds, 1 pass", RunSize(num_folds=2, num_passes=1)),
        ("one round, 5 folds, 1 pass", RunSize(num_passes=1)),
        ("one round, 5 folds, 2 passes (default)", RunSize()),
        ("two rounds, no folds, 20 % sampled anew", replace(RUN, num_folds=0)),
        ("two rounds, 5 folds, 2 passes, 20 % sampled anew", RUN),
    ):
        ratio = plan_run(LARGE, LARGE_PAIRS, run, GPU, tokens_at_once=8192).seconds / once
        lines.append(f"| {name} | {ratio:.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the tables")
    if parser.parse_args().table:
        print(measured_table(), planned_table(), options_table(), sep="\n\n")
    else:
        measure()
