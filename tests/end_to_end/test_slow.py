"""Proofs that take longer than a few seconds: several processes, and the demo."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from rich.console import Console

from ropo.config import ROPOConfig
from ropo.data.inject import BAD_ANNOTATOR, flip_labels
from ropo.evaluate.measures import auroc
from ropo.provenance import read_json
from ropo.run.align import run_audit, run_rounds
from ropo_bench.demo import run_demo
from ropo_bench.toy import make_pairs, save_toy

pytestmark = pytest.mark.slow

OPTIONS = {
    "learning_rate": 1e-3, "max_length": 64, "max_new_tokens": 16, "num_candidates": 2, "rho": "0.2",
    "logging_steps": 1, "use_cpu": True, "max_length_ratio": 30.0, "train_sampling_strategy": "sequential",
    "disable_tqdm": True, "rounds": 2, "num_folds": 5, "decision_rule": "lowest_loss",
}  # fmt: skip


def test_two_processes_take_the_same_steps(model_folder, pairs, tmp_path):
    """Two processes with batches of 2 log the losses of one process with batches of 4, and keep the same contract.

    Sixteen of twenty pairs train each model, so that no batch is half empty: there `accelerate` repeats pairs.
    """
    rows = [{"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected} for pair in pairs]
    dataset = tmp_path / "pairs.jsonl"
    dataset.write_text("".join(json.dumps(row) + "\n" for row in rows))
    one, two = tmp_path / "one", tmp_path / "two"
    run_rounds(model_folder, dataset, ROPOConfig(output_dir=str(one), per_device_train_batch_size=4, **OPTIONS))
    words = [f"--{name}={value}" for name, value in OPTIONS.items()]
    subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "-m", "ropo.cli.main", "train"),
            *(f"--model_name_or_path={model_folder}", f"--dataset_name={dataset}", f"--output_dir={two}"),
            # In pieces too, of which each process has a number of its own.
            *("--per_device_train_batch_size=2", "--max_tokens_per_batch=40", *words),
        ],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    losses = [
        [line["loss"] for line in read_json(folder / "rounds" / "00" / "training_log.json") if "loss" in line]
        for folder in (one, two)
    ]
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
    ledgers = [pq.read_table(folder / "ledger.parquet").to_pandas() for folder in (one, two)]
    for ledger in ledgers:
        first = ledger[ledger["round"] == 0]
        assert first["row"].tolist() == list(range(20))
        assert first["weight"].sum() == 16
    held_out = [ledger.loc[:19, "held_out_margin"].to_numpy() for ledger in ledgers]
    assert held_out[1] == pytest.approx(held_out[0], abs=0.05)  # Adam turns rounding into steps
    assert ledgers[1].loc[:19, "margin"].to_numpy() == pytest.approx(ledgers[0].loc[:19, "margin"].to_numpy(), abs=1e-3)


def test_example_makes_a_model_that_can_be_aligned(pairs, tmp_path):
    rows = [{"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected} for pair in pairs]
    dataset, folder = tmp_path / "pairs.jsonl", tmp_path / "model"
    dataset.write_text("".join(json.dumps(row) + "\n" for row in rows))
    example = Path(__file__).parents[2] / "examples" / "pretrain_small_model.py"
    subprocess.run([sys.executable, str(example), str(dataset), str(folder), "0.05"], check=True)
    options = {**OPTIONS, "max_length": 128, "rounds": 1, "num_candidates": 0}
    summary = run_rounds(folder, dataset, ROPOConfig(output_dir=str(tmp_path / "O"), **options)).summary
    assert summary["num_pairs"] == 20
    assert not summary["is_informative"]


def test_an_audit_finds_what_was_planted(tmp_path):
    """One of five annotators flips most labels, 20 % of all: the rate is about right, and the annotator is named."""
    save_toy(tmp_path / "model", num_texts=10_000)
    noisy, is_flipped = flip_labels(make_pairs(1500, seed=1, min_gap=1.5), rate=0.2, seed=2, kind="annotator")
    args = ROPOConfig(
        output_dir=str(tmp_path / "O"),
        learning_rate=4e-4,
        beta=1.0,
        per_device_train_batch_size=16,
        num_train_epochs=2,
        max_length=128,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    summary = run_audit(tmp_path / "model", noisy, args).summary
    ledger = pq.read_table(tmp_path / "O" / "ledger.parquet").to_pandas()
    assert summary["is_informative"]
    assert summary["flip_rate"]["estimate"] == pytest.approx(0.2, abs=0.06)
    assert auroc(ledger["p_flip"], is_flipped[ledger["row"]]) > 0.9
    assert summary["annotators"][0]["name"] == BAD_ANNOTATOR
    assert summary["annotators"][0]["low"] > summary["annotators"][1]["high"]
    assert "annotator" in (tmp_path / "O" / "report.html").read_text()


def test_demo(tmp_path):
    """The demo runs through, and is taken up again without doing anything twice."""
    console = Console(record=True, width=140)
    first = run_demo(tmp_path / "demo", flip_rate=0.3, num_pairs=300, seed=0, console=console)
    shown = console.export_text()
    assert "held-out accuracy" in shown
    assert "report.html" in shown
    assert (tmp_path / "demo" / "ropo" / "report.html").exists()
    assert set(first["scores"]) == {"before", "DPO", "ROPO", "ROPO, resampling"}
    assert first["detection"]["ROPO"]["auroc"] > 0.5
    again = run_demo(tmp_path / "demo", flip_rate=0.3, num_pairs=300, seed=0, console=console)
    assert again["scores"] == first["scores"]
    assert again["detection"] == first["detection"]


def test_speed_benchmark_runs(tmp_path):
    """The quick mode trains our way and TRL's, compares their losses and writes its rows."""
    pytest.importorskip("trl", reason="installed by the extra `trl`")
    script = Path(__file__).parents[2] / "benchmarks" / "speed.py"
    output = tmp_path / "speed.csv"
    subprocess.run([sys.executable, str(script), "--quick", f"--output={output}"], check=True)
    rows = output.read_text().splitlines()
    assert len(rows) == 3
    assert rows[2].startswith('toy,"ours, packed",0,')
