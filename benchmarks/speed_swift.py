"""One measurement of `speed.py` by ms-swift's DPOTrainer, which has an interpreter of its own.

    python benchmarks/speed_swift.py FOLDER    # FOLDER/model, FOLDER/pairs.jsonl and FOLDER/options.json

Prints seconds, steps, memory, versions and the losses of the log as JSON in its last line. It takes other versions of
libraries than ROPO: `pip install ms-swift` in an empty environment. Its rows of several pairs without padding
(`--padding_free`, `--packing`) need flash attention, which no CPU has.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from speed_clock import Clock
from swift import rlhf_main
from swift.rlhf_trainers import DPOTrainer


def main(folder: Path) -> None:
    """Train as the options say."""
    options = json.loads((folder / "options.json").read_text())
    torch.set_num_threads(options.pop("threads"))
    found: dict[str, Any] = {}
    train = DPOTrainer.train

    def timed(self: Any, *args: Any, **more: Any) -> Any:
        clock = Clock()
        self.add_callback(clock)
        result = train(self, *args, **more)
        found.update(clock.found(), losses=[line["loss"] for line in self.state.log_history if "loss" in line])
        return result

    DPOTrainer.train = timed
    given = {"model": folder / "model", "dataset": folder / "pairs.jsonl", "output_dir": folder / "out", **options}
    rlhf_main([word for name, value in given.items() for word in (f"--{name}", str(value))])
    names = {"torch": "torch", "transformers": "transformers", "trl": "trl", "swift": "ms-swift"}
    print(json.dumps({**found, "versions": {name: version(package) for name, package in names.items()}}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
