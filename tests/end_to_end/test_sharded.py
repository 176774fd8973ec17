"""Several processes as on GPUs, but on CPUs: what one process gives, what each of them holds, and what stops them.

`make distributed-test` installs DeepSpeed and runs this file.
"""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from ropo.provenance import read_json

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

LAUNCHER = Path(__file__).with_name("sharded_launcher.py")
# DeepSpeed keeps what it has gathered, up to these numbers, which are else far above the models here.
ZERO = {"stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0,
        "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 1_000_000,
        "reduce_bucket_size": 1_000_000, "sub_group_size": 4_000_000}  # fmt: skip
AUTO = dict.fromkeys(("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size"), "auto")
FSDP = {
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}  # fmt: skip
NEEDS_DEEPSPEED = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
LAYOUTS = ["ddp", "fsdp2", *(pytest.param(name, marks=NEEDS_DEEPSPEED) for name in ("zero2", "zero3"))]
SHARDED = ["fsdp2", pytest.param("zero3", marks=NEEDS_DEEPSPEED)]
OPTIONS = {
    "learning_rate": 1e-3, "max_length": 64, "logging_steps": 1, "disable_tqdm": True, "num_folds": 2, "rho": 0.2,
    "train_sampling_strategy": "sequential", "num_train_epochs": 4, "save_steps": 3, "save_strategy": "steps",
    "sft_weight": 0.1, "eval_strategy": "epoch", "per_device_eval_batch_size": 2,
}  # fmt: skip


def environment(layout, tmp_path, **more):
    found = {**os.environ, "OMP_NUM_THREADS": "1", **more}
    if layout == "fsdp2":
        found |= FSDP
    if layout.startswith("zero"):
        config = tmp_path / "deepspeed.json"
        config.write_text(json.dumps({**AUTO, "zero_optimization": {"stage": int(layout[-1]), **ZERO}}))
        found |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(config)}
    return found


def words_of(layout, num_processes, output, model, data, **options):
    """The command of a run in one process, or in several."""
    where = {"ddp_backend": "gloo"} if layout.startswith("zero") else {"use_cpu": True}
    batch = {"per_device_train_batch_size": 4 // num_processes}
    words = [f"--{name}={value}" for name, value in {**OPTIONS, **where, **batch, **options}.items()]
    how = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}")
    begin = how if num_processes > 1 else ()
    named = (f"--model_name_or_path={model}", f"--dataset_name={data}", f"--output_dir={output}",
             f"--eval_dataset_name={Path(data).with_name('unseen.jsonl')}")  # fmt: skip
    return [sys.executable, *begin, str(LAUNCHER), "train", *named, *words]


def data_of(pairs, tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [
        {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected, "weight": 0.25 + pair.row % 3}
        for pair in pairs
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    unseen = [{**row, "prompt": f"And then? {row['prompt']}"} for row in rows[:7]]
    path.with_name("unseen.jsonl").write_text("".join(json.dumps(row) + "\n" for row in unseen))
    return path


def kill_at_first_checkpoint(words, env, output):
    """Without a word to any of the processes."""
    process = subprocess.Popen(words, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    checkpoints = output / "rounds" / "00" / "checkpoints"
    while not list(checkpoints.glob("checkpoint-*[0-9]/complete.json")):
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.02)
    for one in [process, *psutil.Process(process.pid).children(recursive=True)]:  # workers have sessions of their own
        one.kill()
    process.wait()


def logged(folder, name):
    return [line[name] for line in read_json(folder / "rounds" / "00" / "training_log.json") if name in line]


def held(path, rank):
    return json.loads(Path(f"{path}.{rank}").read_text())


@pytest.fixture(scope="module")
def in_one_process(tmp_path_factory):
    """Where a run of one process is, started when it is asked for first."""
    found = {}

    def run(use_peft, model, data):
        if use_peft not in found:
            found[use_peft] = output = tmp_path_factory.mktemp("one") / "output"
            words = words_of("one", 1, output, model, data, use_peft=use_peft, merge_adapter=use_peft)
            env = environment("one", output.parent, MEMORY_FILE=str(output.parent / "held"))
            subprocess.run(words, check=True, env=env, timeout=300)
        return found[use_peft]

    return run


@pytest.mark.parametrize("use_peft", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_processes_killed_and_resumed_give_what_one_gives(
    layout, use_peft, in_one_process, pairs, model_folder, tmp_path
):
    """Reference, audit, losses, margins and the saved model; each process held a half of sharded weights all along."""
    data = data_of(pairs, tmp_path)
    one, two = in_one_process(use_peft, model_folder, data), tmp_path / "two"
    words = words_of(layout, 2, two, model_folder, data, use_peft=use_peft, merge_adapter=use_peft)
    kill_at_first_checkpoint(words, environment(layout, tmp_path), two)
    assert not (two / "rounds" / "00" / "model").exists()
    env = environment(layout, tmp_path, MEMORY_FILE=str(tmp_path / "held"))
    subprocess.run(words, check=True, env=env, timeout=300)
    whole, part = held(one.parent / "held", 0), held(tmp_path / "held", 1)
    assert 0 < part["passes training"] < whole["passes training"]  # from the start, the same model would come of it

    for name, at_most in {
        "reference/reference_logps": 1e-4, "audit/margins": 1e-4, "rounds/00/scores": 5e-4,
        "rounds/00/first_margins": 1e-4,
    }.items():  # fmt: skip
        found, wanted = (load_file(folder / f"{name}.safetensors") for folder in (two, one))
        differences = ((found[key].double() - values.double()).nan_to_num().abs() for key, values in wanted.items())
        furthest = max(one.max().item() for one in differences)
        print(f"\n{layout}, {'LoRA' if use_peft else 'full'}, {name}: {furthest:.0e} nats from one process")  # noqa: T201
        for key, values in wanted.items():
            assert found[key].numpy() == pytest.approx(values.numpy(), abs=at_most, nan_ok=True), (name, key)
    margins = [pq.read_table(folder / "ledger.parquet")["margin"].to_numpy() for folder in (two, one)]
    assert margins[0] == pytest.approx(margins[1], abs=5e-4)
    for name in ("loss", "eval_loss", "eval_rewards/margins", "eval_rewards/accuracies"):  # of 7: one is scored twice
        assert logged(two, name) == pytest.approx(logged(one, name), abs=1e-4)
        assert logged(one, name)
    for name in ("adapter_model.safetensors", "merged/model.safetensors") if use_peft else ("model.safetensors",):
        found, wanted = (load_file(folder / name) for folder in (two, one))
        for key, weight in wanted.items():
            assert found[key].numpy() == pytest.approx(weight.numpy(), abs=1e-4), (name, key)
    share = 0.5 if layout in ("fsdp2", "zero3") else 1.0
    # A quarter more: the head, which FSDP2 keeps gathered after a forward; and a small share may be no batch at all.
    for what in ("weights scoring", "weights training"):
        assert part.get(what, 0) < 1.3 * share * whole[what]


@pytest.mark.parametrize("layout", SHARDED)
def test_what_a_process_holds_falls_with_their_number(layout, tokenizer, pairs, tmp_path):
    """Weights, gradients, optimizer and everything else, of a Llama of 23 million parameters; prints the table."""
    size = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=2048, **size)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    data, found = data_of(pairs[:8], tmp_path), {}
    options = {"num_folds": 0, "rho": 0, "loss": "dpo", "max_steps": 2, "save_strategy": "no"}
    for num_processes in (1, 2, 4):
        kind = layout if num_processes > 1 else "one"
        words = words_of(kind, num_processes, tmp_path / f"run{num_processes}", tmp_path / "model", data, **options)
        env = environment(kind, tmp_path, MEMORY_FILE=str(tmp_path / f"held{num_processes}"))
        subprocess.run(words, check=True, env=env, timeout=300)
        found[num_processes] = [held(tmp_path / f"held{num_processes}", rank) for rank in range(num_processes)]
        words = [f"{key} {max(one[key] for one in found[num_processes]):.0f}" for key in found[1][0] if "ing" in key]
        print(f"\n{layout}, {num_processes} processes, MiB: {', '.join(words)}")  # noqa: T201
    for num_processes in (2, 4):
        for what, at_most in {"scoring": 1.25, "training": 1.05}.items():
            most = max(one[f"weights {what}"] for one in found[num_processes])
            assert most < at_most * found[1][0][f"weights {what}"] / num_processes
    one, two, four = (max(held["peak training"] for held in found[number]) for number in (1, 2, 4))
    assert four < 0.75 * min(one, two)  # with two, ZeRO-3's copies of weights and gradients make up for what it spares
