"""How fast pairs are trained on and scored, by us and by TRL's DPOTrainer, and what it takes in memory.

    python benchmarks/speed.py ../shared/data/hh_harmless_base_test.jsonl.gz   # writes speed.csv
    python benchmarks/speed.py PAIRS --quick --output x.csv                    # two ways, a few steps: what CI runs
    python benchmarks/speed.py --table                                         # the tables of the results

PAIRS is anything `ropo train` reads as text. Two tasks. "hh": those pairs, and a Llama made in code with random weights
and a vocabulary of 4096 learned from them. "toy": the short pairs and the tiny model of `ropo demo`.

Every measurement is a process of its own, one after the other, in turn, so that whatever slows the machine down slows
all ways alike; a ratio compares runs of the same turn. All get the same pairs in the same batches of 8 (16 for toy) and
must report the same losses, or the benchmark stops. "as given" is the order of the data; "by length" puts pairs of
similar length into one batch, and is given to TRL too where TRL is at its best. The first steps are not counted.

Columns: pairs_per_second counts the reference where it is part of the run (`with_reference`); tokens are unique ones,
each prompt counted once. matrix_share is the arithmetic that cannot be avoided (unique tokens x weights of the layers,
response tokens x weights of the head; 2 operations forward, 4 backward, 2 for a reference) over what large matrix
products of that precision reach on this machine in the same turn. peak_mib is the highest resident memory during
training (on a GPU, allocated memory) less what was resident before: libraries, weights and data are not in it.
"""

import argparse
import csv
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = Path(__file__).with_suffix(".csv")
COLUMNS = (
    "task", "way", "turn", "pairs_per_second", "tokens_per_second", "matrix_share", "peak_mib", "seconds", "num_pairs",
    "num_tokens", "with_reference", "matrix_gflops", "threads", "num_parameters", "cores", "device", "torch",
    "transformers", "trl", "date", "commit",
)  # fmt: skip
NUM_WARM_UP = 2  # steps


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One way to train or to score: whose, in which layout, order and precision."""

    name: str
    measure: str  # "ours", "trl", "score" or "forward"
    layout: str = "chosen"  # "chosen": as the trainer chooses
    order: str = "by length"
    has_bf16: bool = False
    is_default: bool = False  # TRL as it comes: reference in every step, gradient checkpointing


WAYS = (
    Way(name="TRL, defaults", measure="trl", order="as given", is_default=True),
    Way(name="TRL, best", measure="trl"),
    Way(name="ours, plain, as given", measure="ours", layout="plain", order="as given"),
    Way(name="ours, plain", measure="ours", layout="plain"),
    Way(name="ours, shared prefix, as given", measure="ours", layout="shared_prefix", order="as given"),
    Way(name="ours, shared prefix", measure="ours", layout="shared_prefix"),
    Way(name="ours, shared prefix, bf16", measure="ours", layout="shared_prefix", has_bf16=True),
    Way(name="scoring", measure="score"),
    Way(name="bare forward", measure="forward"),
)
QUICK = ("TRL, best", "ours, shared prefix")


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A model, its tokenizer and pairs."""

    model: Any
    tokenizer: Any
    pairs: list[Any]
    tokens: list[Any]
    batch_size: int


def make_task(name: str, source: str | None, num_pairs: int, order: str) -> Task:
    """Make the model and take pairs spread over the data, whole batches, the same in every process."""
    from ropo.data.tokenize import tokenize_pairs

    if name == "toy":
        from ropo.data import toy

        tokenizer, pairs, batch_size = toy.make_tokenizer(), toy.make_pairs(num_pairs, seed=1), 16
        model: Any = toy.make_model(tokenizer)
    else:
        from ropo import load_pairs

        pairs, batch_size = load_pairs(source).pairs, 8
        tokenizer, model = make_tokenizer_and_model(pairs)
    found = tokenize_pairs(pairs, tokenizer, max_length=512)
    count = min(num_pairs, len(found.pairs)) // batch_size * batch_size
    places = list(range(0, len(found.pairs), len(found.pairs) // count))[:count]
    if order == "by length":
        places = _by_length(places, [len(found.tokens[i]) for i in places], batch_size)
    return Task(
        model=model.float(),
        tokenizer=tokenizer,
        pairs=[found.pairs[i] for i in places],
        tokens=[found.tokens[i] for i in places],
        batch_size=batch_size,
    )


def _by_length(places: list[int], lengths: list[int], batch_size: int) -> list[int]:
    """As the length-grouping sampler of `transformers` does."""
    import torch
    from transformers.trainer_pt_utils import get_length_grouped_indices

    order = get_length_grouped_indices(lengths, batch_size, generator=torch.Generator().manual_seed(0))
    return [places[i] for i in order]


def make_tokenizer_and_model(pairs: Sequence[Any]) -> tuple[Any, Any]:
    """Byte-level BPE learned from the pairs, and a Llama of 6.9 million parameters."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        special_tokens=["<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator([f"{pair.prompt}{pair.chosen}{pair.rejected}" for pair in pairs], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="</s>")
    shape = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "num_attention_heads": 8}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=4096, pad_token_id=0, eos_token_id=1, bos_token_id=1, **shape))
    return tokenizer, model


def common(task: Task, folder: str) -> dict[str, Any]:
    """Options that both trainers share."""
    import torch

    return {
        "output_dir": folder, "per_device_train_batch_size": task.batch_size, "num_train_epochs": 1, "beta": 0.1,
        "learning_rate": 1e-4, "max_length": 512, "train_sampling_strategy": "sequential", "save_strategy": "no",
        "logging_steps": 5, "logging_first_step": False, "disable_tqdm": True, "report_to": "none", "seed": 0,
        "use_cpu": not torch.cuda.is_available(), "warmup_steps": 0, "lr_scheduler_type": "linear",
    }  # fmt: skip


def train(trainer: Any, clock: Any) -> list[float]:
    """Train; the losses of the log."""
    trainer.add_callback(clock)
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def measure_ours(way: Way, task: Task) -> dict[str, Any]:
    """Train with `ROPOTrainer`; the reference is scored before, and timed too."""
    from ropo import trainer as ours
    from ropo.config import ROPOConfig
    from ropo.logps.score import score_pairs

    if way.layout != "chosen":
        _force(ours, way.layout)
    clock = make_clock()
    start = time.perf_counter()
    reference = score_pairs(
        task.model, task.tokens, pad_token_id=task.tokenizer.pad_token_id, max_length=512, use_bf16=way.has_bf16
    )
    reference_seconds = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder:
        args = ROPOConfig(loss="dpo", rho="0", num_folds=0, bf16=way.has_bf16, **common(task, folder))
        data = ours.PairDataset(task.pairs, task.tokens, reference=reference)
        trainer = ours.ROPOTrainer(task.model, args, train_dataset=data, processing_class=task.tokenizer)
        losses = train(trainer, clock)
    return {**clock.found(), "reference_seconds": reference_seconds, "losses": losses}


def _force(ours: Any, layout: str) -> None:
    """Have the trainer use a layout."""
    choose = ours.choose_layout

    def forced(*args: Any, **options: Any) -> tuple[str, str]:
        choose(*args, **options)
        return layout, "the benchmark says so"

    ours.choose_layout = forced


def measure_trl(way: Way, task: Task) -> dict[str, Any]:
    """Train with TRL's trainer, as it comes or with what makes it fast: reference before, nothing recomputed."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    rows = [{"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected} for pair in task.pairs]
    more = {} if way.is_default else {"precompute_ref_log_probs": True, "gradient_checkpointing": False}
    clock = make_clock()
    with tempfile.TemporaryDirectory() as folder:
        task.model.save_pretrained(folder)  # where the trainer loads its reference from
        task.model.config._name_or_path = folder
        trainer = DPOTrainer(
            task.model,
            args=DPOConfig(bf16=way.has_bf16, **more, **common(task, folder)),
            train_dataset=Dataset.from_list(rows),
            processing_class=task.tokenizer,
        )
        losses = train(trainer, clock)
    return {**clock.found(), "losses": losses}


def make_clock() -> Any:
    """A callback that knows the seconds and the peak memory of all steps but the first."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.start = self.seconds = 0.0
            self.steps = 0
            self.memory = Memory()

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
            if state.global_step == NUM_WARM_UP:
                self.start = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
            self.seconds, self.steps = time.perf_counter() - self.start, state.global_step - NUM_WARM_UP

        def found(self) -> dict[str, Any]:
            return {"seconds": self.seconds, "steps": self.steps, "peak_mib": self.memory.peak_mib()}

    return Clock()


class Memory:
    """The highest resident memory since this was made, less what was resident then; on a GPU, allocated memory."""

    def __init__(self) -> None:
        import torch

        self.is_cuda = torch.cuda.is_available()
        if self.is_cuda:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated() / 2**20
        else:
            Path("/proc/self/clear_refs").write_text("5")  # forgets the highest value so far (Linux)
            self.before = self._read("VmRSS")

    def peak_mib(self) -> float:
        import torch

        now = torch.cuda.max_memory_allocated() / 2**20 if self.is_cuda else self._read("VmHWM")
        return now - self.before

    @staticmethod
    def _read(name: str) -> float:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(name):
                return int(line.split()[1]) / 1024
        raise RuntimeError(f"/proc/self/status has no {name}")


def measure_score(way: Way, task: Task) -> dict[str, Any]:
    """The scoring pass, batches made by itself, twice; the second is counted."""
    from ropo.logps.score import score_pairs

    def run(tokens: list[Any]) -> None:
        score_pairs(task.model, tokens, pad_token_id=task.tokenizer.pad_token_id, max_length=512, use_bf16=way.has_bf16)

    return _timed(run, task.tokens)


def measure_forward(way: Way, task: Task) -> dict[str, Any]:
    """The model without its head over the unique tokens in rows of 256, and the head over as many as are predicted."""
    import torch

    stream = torch.tensor([int(i) for pair in task.tokens for i in (*pair.prompt, *pair.chosen, *pair.rejected)])
    rows = stream[: len(stream) // 256 * 256].view(-1, 256)
    share = sum(len(pair.chosen) + len(pair.rejected) for pair in task.tokens) / len(stream)

    def run(tokens: list[Any]) -> None:
        with torch.no_grad():
            for some in rows.split(16) if len(tokens) > task.batch_size else rows[:4].split(4):
                hidden = task.model.get_decoder()(input_ids=some, use_cache=False).last_hidden_state.flatten(0, 1)
                task.model.get_output_embeddings()(hidden[: round(share * len(hidden))]).logsumexp(-1)

    del way
    return _timed(run, task.tokens)


def _timed(run: Callable[[list[Any]], None], tokens: list[Any]) -> dict[str, Any]:
    run(tokens[:8])
    memory, best = Memory(), float("inf")
    for _ in range(3):
        start = time.perf_counter()
        run(tokens)
        best = min(best, time.perf_counter() - start)
    return {"seconds": best, "steps": None, "peak_mib": memory.peak_mib(), "losses": []}


MEASURES = {"ours": measure_ours, "trl": measure_trl, "score": measure_score, "forward": measure_forward}


def matrix_gflops(*, has_bf16: bool) -> float:
    """What large matrix products reach, best of several."""
    import torch

    dtype = torch.bfloat16 if has_bf16 else torch.float32
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(8):
        start = time.perf_counter()
        float((a @ b)[0, 0])
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e9


def child(name: str, task_name: str, source: str | None, num_pairs: int, threads: int) -> dict[str, Any]:
    """One measurement, in this process."""
    import torch

    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(threads)
    way = next(way for way in WAYS if way.name == name)
    task = make_task(task_name, source, num_pairs, way.order)
    if torch.cuda.is_available():
        task.model.cuda()
    rate = matrix_gflops(has_bf16=way.has_bf16)
    found = MEASURES[way.measure](way, task)
    counted = task.tokens if found["steps"] is None else task.tokens[NUM_WARM_UP * task.batch_size :]
    seconds, has_reference = found["seconds"], way.is_default
    forwards = 2 if found["steps"] is None else 6
    if "reference_seconds" in found:
        seconds += found["reference_seconds"] * len(counted) / len(task.tokens)
        has_reference = True
    forwards += 2 * has_reference
    num_tokens = sum(len(pair) for pair in counted)
    num_predicted = sum(len(pair.chosen) + len(pair.rejected) for pair in counted)
    head = task.model.get_output_embeddings().weight.numel()
    layers = sum(p.numel() for p in task.model.model.layers.parameters())
    operations = forwards * (num_tokens * layers + num_predicted * head)
    return {
        "task": task_name,
        "way": name,
        "pairs_per_second": len(counted) / seconds,
        "tokens_per_second": num_tokens / seconds,
        "matrix_share": operations / seconds / rate / 1e9,
        "peak_mib": found["peak_mib"],
        "seconds": seconds,
        "num_pairs": len(counted),
        "num_tokens": num_tokens,
        "with_reference": int(has_reference),
        "trained_per_second": len(counted) / found["seconds"],
        "matrix_gflops": rate,
        "threads": threads,
        "num_parameters": sum(p.numel() for p in task.model.parameters()),
        "losses": found["losses"],
        "order": way.order,
        "has_bf16": way.has_bf16,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", nargs="?")
    parser.add_argument("--task", default="hh")
    parser.add_argument("--way", help="measure one way in this process and print it")
    parser.add_argument("--num_pairs", type=int, default=112)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    if args.way:
        found = child(args.way, args.task, args.pairs, args.num_pairs, args.threads)
        print(json.dumps(found))


if __name__ == "__main__":
    main()
