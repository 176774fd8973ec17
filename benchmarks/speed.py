"""How fast pairs are trained on and scored, by us, by TRL's DPOTrainer and by ms-swift's, and what it takes in memory.

    python benchmarks/speed.py ../shared/data/hh_harmless_base_test.jsonl.gz   # fill in what is missing in speed.csv
    python benchmarks/speed.py ... --model GEMMA                                # the task gemma, too
    python benchmarks/speed.py PAIRS --quick --output x.csv                    # two ways, a few steps: what CI runs
    python benchmarks/speed.py --table                                         # the tables of docs/performance.md
    python benchmarks/speed.py PAIRS --profile packed --threads 1              # where the time of six steps goes

PAIRS is anything `ropo train` reads as text. Two tasks on a CPU. "hh": those pairs, and a Llama made in code with
random weights and a vocabulary of 4096 learned from them. "toy": the short pairs and the tiny model of `ropo demo`. A
third where a model is named, "gemma": LoRA on it (Gemma 3 270M was meant) with those pairs, under bfloat16 autocast. On
a GPU one other, "large", which needs no PAIRS: a Llama of 1.1 billion parameters with random weights, all under
bfloat16 autocast, and pairs of random words, about 512 in the prompt and 256 in each response. Its rows go to
speed_gpu.csv.

Every measurement is a process of its own, one after the other, in turn, so that whatever slows the machine down slows
all ways alike; a ratio compares runs of the same turn. All get the same pairs in the same batches of 8 (toy 16, gemma
4) and must report the same losses, or the benchmark stops. "as given" is the order of the data; otherwise pairs of
similar length share a batch, which is given to TRL too where TRL is at its best. The first steps are not counted.

Columns: training_per_second is pairs a second in training alone, pairs_per_second counts the pass over the reference
too (TRL at its defaults reads it in every step, as ms-swift does always; at its best it is computed before, and not
counted). ms-swift is measured where SWIFT_PYTHON names an interpreter that has it: `speed_swift.py`. Tokens are unique
ones, each prompt counted once. matrix_share is the arithmetic that cannot be avoided (unique tokens x weights of the
layers, the last MLP's only where a response token is predicted, response tokens x weights of the head; 2 operations
forward, 4 backward, 2 with LoRA, and 2 for a reference) over what large matrix products of that precision reach on this
machine at that time. peak_mib is the highest resident memory during training (on a GPU, allocated memory) less what was
resident before: libraries, weights and data are not in it.

"whole" ways run `ropo train` itself on 64 pairs, with everything it writes: two rounds of one epoch, 20 % filtered and
sampled anew, four candidates each; pairs_per_second there is pairs of the data a second. "whole, TRL" is TRL at its
defaults on the same 64 pairs.
"""

import argparse
import csv
import json
import logging
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from speed_clock import NUM_WARM_UP, Clock, Memory, now
from speed_tables import pair_table, table, whole_table
from speed_tasks import LORA, Task, make_task
from speed_ways import RESULTS, RESULTS_GPU, WAYS, Way

from ropo import PairDataset, ROPOConfig, run_rounds
from ropo.logps.batch import LAYOUTS, Batching
from ropo.logps.choose import choose_layout
from ropo.logps.score import score_pairs
from ropo.logps.shared_prefix import FORWARDS
from ropo.provenance import commit, machine
from ropo.train import trainer as ours
from ropo_bench.rows import read_rows

COLUMNS = (
    "task", "way", "turn", "training_per_second", "pairs_per_second", "tokens_per_second", "matrix_share", "peak_mib",
    "seconds", "num_pairs", "num_tokens", "matrix_gflops", "threads", "num_parameters", "cores", "device", "torch",
    "transformers", "trl", "swift", "date", "commit",
)  # fmt: skip
NUM_REPEATS = 2  # of the pairs in one pass, for "scoring" and "bare forward": such a pass reads thousands in earnest
QUICK = ("TRL, best", "ours, packed")
SWIFT_PYTHON = "SWIFT_PYTHON"  # the environment variable that names the interpreter which has ms-swift
SWIFT_OPTIONS = (
    "per_device_train_batch_size", "num_train_epochs", "beta", "learning_rate", "max_length", "save_strategy",
    "logging_steps", "logging_first_step", "report_to", "seed", "lr_scheduler_type",
)  # fmt: skip
GEMMA = ("TRL, defaults", "TRL, best", "ms-swift, defaults", "ms-swift, best", "ours, plain", "ours, packed")
LARGE = ("TRL, defaults", "TRL, best", "ours, plain", "ours, shared prefix", "ours, packed", "scoring", "bare forward")
NUM_PAIRS = {"hh": 192, "toy": 800, "gemma": 16, "large": 160}
NUM_PAIRS_WHOLE = 64
NUM_PAIRS_QUICK = {"hh": 40, "toy": 256, "gemma": 12, "large": 40}


def common(task: Task, folder: str) -> dict[str, Any]:
    """Options that both trainers share."""
    return {
        "output_dir": folder, "per_device_train_batch_size": task.batch_size, "num_train_epochs": 1, "beta": 0.1,
        "learning_rate": task.learning_rate, "max_length": task.max_length, "train_sampling_strategy": "sequential",
        "save_strategy": "no", "logging_steps": 4, "logging_first_step": False, "disable_tqdm": True,
        "report_to": "none", "seed": 0, "use_cpu": not torch.cuda.is_available(), "warmup_steps": 0,
        "lr_scheduler_type": "linear",
    }  # fmt: skip


def train(trainer: Any, clock: Clock) -> list[float]:
    """Train; the losses of the log."""
    trainer.add_callback(clock)
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def measure_ours(way: Way, task: Task) -> dict[str, Any]:
    """Train with `ROPOTrainer`; the reference is scored before, and timed too."""
    _force(str(way.layout))
    clock = Clock()
    if torch.cuda.is_available():
        score(way, task, task.tokens)  # compiles; on a CPU nothing is
    start = now()
    reference = score(way, task, task.tokens)
    reference_seconds = now() - start
    with tempfile.TemporaryDirectory() as folder:
        args = ROPOConfig(loss="dpo", rho="0", num_folds=0, bf16=way.has_bf16, **common(task, folder))
        data = PairDataset(task.pairs, task.tokens, reference=reference)
        trainer = ours.ROPOTrainer(
            task.model, args, train_dataset=data, processing_class=task.tokenizer, peft_config=task.peft_config
        )
        losses = train(trainer, clock)
    return {**clock.found(), "reference_seconds": reference_seconds, "losses": losses}


def _force(layout: str) -> None:
    """Have the trainer use a layout."""
    choose = ours.choose_layout

    def forced(*args: Any, **options: Any) -> tuple[str, str]:
        found, reason = choose(*args, **options)
        if layout == "packed" != found:
            raise RuntimeError(f"packed rows cannot be measured: {reason}")
        return layout, "the benchmark says so"

    ours.choose_layout = forced


def measure_trl(way: Way, task: Task) -> dict[str, Any]:
    """Train with TRL's trainer, as it comes or with what makes it fast: reference before, nothing recomputed."""
    from trl import DPOConfig, DPOTrainer  # noqa: PLC0415 - needed by these ways only

    rows = [{"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected} for pair in task.pairs]
    more = {} if way.is_default else {"precompute_ref_log_probs": True, "gradient_checkpointing": False}
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        task.model.save_pretrained(folder)  # where the trainer loads its reference from
        task.model.config._name_or_path = folder
        trainer = DPOTrainer(
            task.model,
            args=DPOConfig(bf16=way.has_bf16, **more, **common(task, folder)),
            train_dataset=Dataset.from_list(rows),
            processing_class=task.tokenizer,
            peft_config=task.peft_config,
        )
        losses = train(trainer, clock)
    return {**clock.found(), "losses": losses}


def measure_swift(way: Way, task: Task) -> dict[str, Any]:
    """Train with ms-swift's trainer under `SWIFT_PYTHON`: as it comes or with nothing recomputed.

    Its reference is read in every step; it refuses to read it before.
    """
    options: dict[str, Any] = {
        **{name: value for name, value in common(task, "").items() if name in SWIFT_OPTIONS},
        "rlhf_type": "dpo", "tuner_type": "full", "model_type": "llama", "template": "dummy", "torch_dtype": "float32",
        "bf16": way.has_bf16, "fp16": False, "use_cpu": not torch.cuda.is_available(), "attn_impl": "sdpa",
        "gradient_checkpointing": way.is_default,
        "gradient_accumulation_steps": 1, "dataset_shuffle": False, "train_dataloader_shuffle": False,
        "split_dataset_ratio": 0, "weight_decay": 0, "adam_beta2": 0.999, "threads": torch.get_num_threads(),
        "truncation_strategy": "right",  # as the others do; it would leave such pairs out
    }  # fmt: skip
    if task.name == "gemma":
        options |= {"tuner_type": "lora", "model_type": "gemma3_text", "target_modules": LORA["target_modules"]}
        options |= {"lora_rank": LORA["r"], "lora_alpha": LORA["lora_alpha"], "lora_dropout": 0}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        task.model.save_pretrained(folder / "model")
        task.tokenizer.save_pretrained(folder / "model")
        (folder / "options.json").write_text(json.dumps(options))
        rows = [
            {
                "messages": [{"role": "user", "content": pair.prompt}, {"role": "assistant", "content": pair.chosen}],
                "rejected_response": pair.rejected,
            }
            for pair in task.pairs
        ]
        (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
        script = Path(__file__).with_name("speed_swift.py")
        words = [os.environ[SWIFT_PYTHON], str(script), str(folder)]
        output = subprocess.run(words, stdout=subprocess.PIPE, check=True)
    return dict(json.loads(output.stdout.splitlines()[-1]))


def score(way: Way, task: Task, tokens: list[Any]) -> Any:
    """A scoring pass, with all that it does before the first batch."""
    return score_pairs(
        task.model,
        tokens,
        Batching(pad_token_id=task.tokenizer.pad_token_id, use_bf16=way.has_bf16),
    )


def measure_score(way: Way, task: Task) -> dict[str, Any]:
    """The scoring pass."""
    return _timed(lambda tokens: score(way, task, tokens), task.tokens)


def measure_forward(way: Way, task: Task) -> dict[str, Any]:
    """The model without its head over the unique tokens in rows of 256, and the head over as many as are predicted."""

    def run(tokens: list[Any]) -> None:
        stream = torch.tensor([int(i) for pair in tokens for i in (*pair.prompt, *pair.chosen, *pair.rejected)])
        rows = stream[: len(stream) // 256 * 256].view(-1, 256).to(task.model.device)
        share = sum(len(pair.chosen) + len(pair.rejected) for pair in tokens) / len(stream)
        with torch.no_grad(), torch.autocast(task.model.device.type, dtype=torch.bfloat16, enabled=way.has_bf16):
            for some in rows.split(16):
                hidden = task.model.get_decoder()(input_ids=some, use_cache=False).last_hidden_state.flatten(0, 1)
                task.model.get_output_embeddings()(hidden[: round(share * len(hidden))]).logsumexp(-1)

    return _timed(run, task.tokens)


def _timed(run: Callable[[list[Any]], None], tokens: list[Any]) -> dict[str, Any]:
    """The fastest of three passes, per pass over the pairs as they are."""
    run(tokens)
    memory, best = Memory(), float("inf")
    for _ in range(3):
        start = now()
        run(tokens * NUM_REPEATS)
        best = min(best, (now() - start) / NUM_REPEATS)
    return {"seconds": best, "steps": None, "peak_mib": memory.peak_mib(), "losses": []}


def measure_whole(way: Way, task: Task) -> dict[str, Any]:
    """All of `ropo train`: audit, two rounds, resampling, report."""
    rows = [{"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected} for pair in task.pairs]
    memory = Memory()
    with tempfile.TemporaryDirectory() as folder:
        args = ROPOConfig(
            **{**common(task, folder), "train_sampling_strategy": "group_by_length"},
            **{"rounds": 2, "rho": "0.2", "num_candidates": 4, "max_new_tokens": 48, **(way.options or {})},
        )
        start = now()
        run_rounds(task.model, rows, args, processing_class=task.tokenizer)
        seconds = now() - start
    return {"seconds": seconds, "steps": None, "peak_mib": memory.peak_mib(), "losses": []}


MEASURES: dict[str, Callable[[Way, Task], dict[str, Any]]] = {
    "ours": measure_ours,
    "trl": measure_trl,
    "swift": measure_swift,
    "score": measure_score,
    "forward": measure_forward,
    "whole": measure_whole,
}
OPERATIONS = {"ours": 6, "trl": 6, "swift": 6, "score": 2, "forward": 2}  # per weight and token


def matrix_gflops(*, has_bf16: bool) -> float:
    """What large matrix products reach, best of several."""
    dtype = torch.bfloat16 if has_bf16 else torch.float32
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(8):
        start = now()
        a @ b
        best = min(best, now() - start)
    return 2 * size**3 / best / 1e9


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """One measurement, in this process."""
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(args.threads)
    way = next(way for way in WAYS if way.name == args.way)
    task = make_task(args.task, args.pairs, args.count, way.order, args.model)
    way = replace(way, has_bf16=way.has_bf16 or task.has_bf16)
    if torch.cuda.is_available():
        task.model.cuda()
    rate = matrix_gflops(has_bf16=way.has_bf16)
    head = task.model.get_output_embeddings().weight.numel()
    layers = sum(p.numel() for p in task.model.model.layers.parameters())
    last_mlp = sum(p.numel() for p in task.model.model.layers[-1].mlp.parameters())
    num_parameters = sum(p.numel() for p in task.model.parameters())
    found = MEASURES[way.measure](way, task)
    counted = task.tokens if found["steps"] is None else task.tokens[NUM_WARM_UP * task.batch_size :]
    seconds, operations = found["seconds"], OPERATIONS.get(way.measure, 0)
    if task.peft_config is not None and way.is_training:
        operations -= 2  # no gradients of weights
    if "reference_seconds" in found:
        seconds += found["reference_seconds"] * len(counted) / len(task.tokens)
    if "reference_seconds" in found or way.reads_reference:
        operations += 2
    num_tokens = sum(len(pair) for pair in counted)
    num_predicted = sum(len(pair.chosen) + len(pair.rejected) for pair in counted)
    num_unread = sum(len(pair.prompt) - 1 for pair in counted)
    floor = operations * (num_tokens * layers - num_unread * last_mlp + num_predicted * head)
    return {
        "training_per_second": round(len(counted) / found["seconds"], 3),
        "pairs_per_second": round(len(counted) / seconds, 3),
        "tokens_per_second": round(num_tokens / seconds),
        "matrix_share": round(floor / seconds / rate / 1e9, 3) if floor else None,
        "peak_mib": round(found["peak_mib"]),
        "seconds": round(seconds, 2),
        "num_pairs": len(counted),
        "num_tokens": num_tokens,
        "matrix_gflops": round(rate),
        "threads": args.threads,
        "num_parameters": num_parameters,
        "cores": machine()["cores"],
        "device": machine()["device"],
        **{name: metadata.version(name) for name in ("torch", "transformers", "trl")},
        **found.get("versions", {}),
        "losses": found["losses"],
    }


def check_losses(found: dict[str, list[float]], task: str) -> None:
    """Stop if a way of ours has learned something else than TRL."""
    for way in (way for way in WAYS if not way.is_whole):
        theirs = found.get("TRL, defaults" if way.order == "as given" else "TRL, best")
        ours = found.get(way.name)
        if not ours or not theirs:
            continue
        worst = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
        if worst > (0.02 if way.has_bf16 or task in ("gemma", "large") else 1e-3):
            raise SystemExit(f"{task}: {way.name} and TRL report losses that differ by {worst:.4f}: {ours}, {theirs}")


def profile_steps(layout: str, source: str | None, threads: int) -> str:
    """Time by operation of six steps in one layout, forward, backward and update."""
    torch.set_num_threads(threads)
    is_gpu = torch.cuda.is_available()
    task = make_task("large" if is_gpu else "hh", source, 112, "by length")
    to_bf16 = torch.autocast(task.model.device.type, dtype=torch.bfloat16, enabled=is_gpu)
    choose_layout(task.model, task.tokens[:2], pad_token_id=0)
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=1e-4, fused=True)

    def step(number: int) -> None:
        batch = LAYOUTS[layout](task.tokens[8 * number : 8 * number + 8], pad_token_id=0)
        with to_bf16:
            logps = FORWARDS[layout](task.model, {name: x.to(task.model.device) for name, x in batch.items()})
        # Not a loss that could be satisfied: gradients must be of ordinary size, or products take longer.
        (logps.rejected - logps.chosen).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    for number in range(4):
        step(number)
    with torch.profiler.profile() as found:
        for number in range(4, 10):
            step(number)
    order = "self_cuda_time_total" if is_gpu else "self_cpu_time_total"
    return str(found.key_averages().table(sort_by=order, row_limit=12, max_name_column_width=48))


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """All rows, in the order of turns, tasks and ways."""
    names = [way.name for way in WAYS]
    rows = sorted(rows, key=lambda row: (row["task"], int(row["turn"]), names.index(row["way"])))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def run_turn(args: argparse.Namespace, task: str, turn: int) -> None:
    """Every way that has no row yet, each in a process of its own; every other turn in the opposite order."""
    rows, losses = read_rows(args.output), {}
    known = {(row["task"], row["way"], int(row["turn"])) for row in rows}
    ways = [way for way in WAYS if not args.quick or way.name in QUICK]
    named = {"gemma": GEMMA, "large": LARGE}.get(task)
    ways = [way for way in ways if (way.name in named if named else not way.is_whole or task == "hh")]
    ways = [way for way in ways if way.name.startswith(tuple(args.only))]
    ways = [way for way in ways if way.measure != "swift" or SWIFT_PYTHON in os.environ]
    for way in ways if turn % 2 == 0 else ways[::-1]:
        if (task, way.name, turn) in known:
            continue
        count = NUM_PAIRS_WHOLE if way.is_whole else (NUM_PAIRS_QUICK if args.quick else NUM_PAIRS)[task]
        words = [args.pairs or "", f"--way={way.name}", f"--task={task}", f"--count={count}"]
        words += [f"--threads={args.threads}", *([f"--model={args.model}"] if args.model else [])]
        shown = None if args.verbose else subprocess.DEVNULL
        env = {"CUDA_VISIBLE_DEVICES": "0", **os.environ}
        output = subprocess.run(
            [sys.executable, __file__, *words], stdout=subprocess.PIPE, stderr=shown, check=True, env=env
        )
        found = json.loads(output.stdout.splitlines()[-1])
        losses[way.name] = found.pop("losses")
        rows.append(
            {
                "task": task, "way": way.name, "turn": turn, **found,
                "date": datetime.now(UTC).date().isoformat(), "commit": commit(),
            }
        )  # fmt: skip
        write_rows(args.output, rows)
        print({name: rows[-1][name] for name in COLUMNS[:7]}, flush=True)
    check_losses(losses, task)


def tasks_of(args: argparse.Namespace) -> list[str]:
    """The tasks that were asked for; else those that the machine and what was given allow.

    Raises:
        SystemExit: If a task lacks what it needs, or a model is named that no task would take.
    """
    needed = {"hh": [args.pairs], "toy": [], "gemma": [args.pairs, args.model]}
    if args.model and not (args.pairs and "gemma" in (args.tasks or ["gemma"])):
        raise SystemExit("--model is of the task gemma, which needs PAIRS, too; leave it out, or give both.")
    if torch.cuda.is_available():
        return args.tasks or ["large"]
    for task in args.tasks or []:
        if not all(needed[task]):
            raise SystemExit(f"The task {task} needs PAIRS{' and --model' * (task == 'gemma')}; give both.")
    return args.tasks or [task for task, given in needed.items() if all(given)]


def main() -> None:
    """Measure what is missing, or print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", nargs="?", help="where the pairs of the task hh come from; without it only toy is run")
    parser.add_argument("--model", help="folder of the model of the task gemma; without it that is not run")
    parser.add_argument("--num_turns", type=int, default=3, help="repetitions")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of PyTorch")
    parser.add_argument("--quick", action="store_true", help="two ways, a few steps, one turn")
    parser.add_argument("--output", type=Path, help="the CSV instead of speed.csv; rows that are there are kept")
    parser.add_argument("--tasks", nargs="+", choices=["hh", "toy", "gemma"], help="all that can be run by default")
    parser.add_argument("--only", nargs="+", default=[""], help="ways whose names begin so")
    parser.add_argument("--table", action="store_true", help="print the tables of the results")
    parser.add_argument("--profile", choices=list(LAYOUTS), help="profile a layout instead of measuring")
    parser.add_argument("--verbose", action="store_true", help="show what the measured processes say")
    parser.add_argument("--way", help=argparse.SUPPRESS)  # one measurement in this process
    parser.add_argument("--task", help=argparse.SUPPRESS)
    parser.add_argument("--count", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    is_gpu = torch.cuda.is_available()
    args.output = args.output or (RESULTS_GPU if is_gpu else RESULTS)
    if args.table:
        print(table(), pair_table(), whole_table(), sep="\n\n")
    elif args.profile:
        print(profile_steps(args.profile, args.pairs, args.threads))
    elif args.way:
        print(json.dumps(measure(args)))
    else:
        tasks = tasks_of(args)
        for turn in range(1 if args.quick else args.num_turns):
            for task in tasks:
                run_turn(args, task, turn)


if __name__ == "__main__":
    main()
