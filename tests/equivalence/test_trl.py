"""In its DPO limit ROPO is TRL's DPOTrainer: the same losses, step by step."""

import pytest
from datasets import Dataset

from ropo.config import ROPOConfig
from ropo.provenance import read_json
from ropo.run.align import run_rounds

trl = pytest.importorskip("trl", reason="installed by the extra `trl`")

COMMON = {
    "learning_rate": 1e-3,
    "per_device_train_batch_size": 4,
    "num_train_epochs": 2,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0,
    "logging_steps": 1,
    "save_strategy": "no",
    "beta": 0.1,
    "max_length": 64,
    "seed": 7,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
    "report_to": "none",
}


@pytest.mark.filterwarnings("ignore")  # TRL's own deprecations are not ours to judge
@pytest.mark.parametrize(("accumulation", "options", "theirs"), [
    (1, {}, {}),
    (2, {}, {}),
    # Of one pair the mean over its tokens is that over the tokens of the batch.
    (
        4, {"per_device_train_batch_size": 1, "sft_weight": 0.2},
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2]},
    ),
], ids=["dpo", "accumulated", "with sft"])  # fmt: skip
def test_dpo_limit_is_trl(accumulation, options, theirs, model_folder, tokenizer, pairs, tmp_path):
    """`--loss dpo --rho 0 --rounds 1` gives TRL's losses to 1e-5, with its order of the data."""
    common = {**COMMON, **{name: value for name, value in options.items() if name in COMMON}}
    rows = [{"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected} for pair in pairs]
    trainer = trl.DPOTrainer(
        str(model_folder),
        args=trl.DPOConfig(
            output_dir=str(tmp_path / "trl"), gradient_accumulation_steps=accumulation, **common, **theirs
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer.train()
    theirs = [line["loss"] for line in trainer.state.log_history if "loss" in line]

    args = ROPOConfig(
        output_dir=str(tmp_path / "ours"),
        loss="dpo",
        rho="0",
        rounds=1,
        train_sampling_strategy="random",
        gradient_accumulation_steps=accumulation,
        **{**common, **options},
    )
    run_rounds(model_folder, rows, args)
    log = read_json(tmp_path / "ours" / "rounds" / "00" / "training_log.json")
    ours = [line["loss"] for line in log if "loss" in line]

    assert len(ours) == {1: 10, 2: 6, 4: 10}[accumulation]  # 5 batches an epoch, or 20 of one pair
    assert max(theirs) - min(theirs) > 0.05  # something was learned, so equality means something
    assert ours == pytest.approx(theirs, abs=1e-5)
