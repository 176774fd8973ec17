"""What an audit says about human labels, as they are and with flips of ours on top.

    python examples/pretrain_small_model.py pairs.jsonl.gz model 10     # or any model of yours
    python benchmarks/real_pairs.py pairs.jsonl.gz model output         # writes output/plain, output/flipped, a table

Whether a human label is right is not known; whether we have flipped it is. The margins are compared with our flips: the
best AUROC that can be reached is below 1, since labels that were wrong before are right after a flip.
"""

import logging
import sys
from pathlib import Path

import torch

from ropo import ROPOConfig, flip_labels, run_audit
from ropo.bench.measures import auroc, precision_recall
from ropo.data.validate import read_checked
from ropo.ledger import read_ledger

FLIP_RATE = 0.25
OPTIONS = {
    "per_device_train_batch_size": 16,
    "num_train_epochs": 1,
    "learning_rate": 5e-4,
    "beta": 0.1,
    "max_length": 512,
    "save_strategy": "no",
}


def main(dataset: str, model: str, output: Path) -> None:
    """Audit both versions and print what was found."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    _, pairs, _ = read_checked(dataset)
    noisy, is_flipped = flip_labels(pairs, rate=FLIP_RATE, seed=0)
    truth = {pair.row: bool(wrong) for pair, wrong in zip(pairs, is_flipped, strict=True)}
    for name, data in (("plain", pairs), ("flipped", noisy)):
        if f"--only={name}" not in sys.argv and any(word.startswith("--only=") for word in sys.argv):
            continue
        summary = run_audit(model, data, ROPOConfig(output_dir=str(output / name), **OPTIONS))
        rate = summary["flip_rate"]
        told = "cannot tell" if rate["estimate"] is None else f"{rate['estimate']:.3f}"
        print(f"{name}: {told} ({rate['low']:.3f} to {rate['high']:.3f}), {summary['reason']}")
        print(f"  {summary['num_kept']} kept, {summary['num_dropped']} dropped; alpha {summary['alpha']}")
        ledger = read_ledger(output / name / "ledger.parquet").to_pandas()
        if name == "flipped":
            turned = [truth[row] for row in ledger["row"]]
            precision, recall = precision_recall((ledger["decision"] != "keep").to_numpy(), turned)
            found = auroc(-ledger["held_out_margin"].to_numpy(), turned)
            print(f"  against our flips: AUROC {found:.3f}, precision {precision:.3f}, recall {recall:.3f}")
        agreed = (ledger["held_out_margin"] > 0).mean()
        print(f"  held-out agreement with the labels: {agreed:.3f} of {len(ledger)} pairs")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
