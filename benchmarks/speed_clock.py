"""The clock of `speed.py` and `speed_swift.py`: seconds and peak memory of all steps but the first.

It imports nothing that ms-swift's environment may lack.
"""

import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

NUM_WARM_UP = 2  # steps


def now() -> float:
    """Seconds, when all that was asked of the device is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Memory:
    """The highest resident memory since this was made, less what was resident then; on a GPU, allocated memory."""

    def __init__(self) -> None:
        self.is_cuda = torch.cuda.is_available()
        if self.is_cuda:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated() / 2**20
        else:
            Path("/proc/self/clear_refs").write_text("5")  # forgets the highest value so far (Linux)
            self.before = self._read("VmRSS")

    def peak_mib(self) -> float:
        """The highest value so far."""
        now = torch.cuda.max_memory_allocated() / 2**20 if self.is_cuda else self._read("VmHWM")
        return now - self.before

    @staticmethod
    def _read(name: str) -> float:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(name):
                return int(line.split()[1]) / 1024
        raise RuntimeError(f"/proc/self/status has no {name}")


class Clock(TrainerCallback):
    """Seconds and peak memory of all steps but the first."""

    def __init__(self) -> None:
        self.start = self.seconds = 0.0
        self.steps = 0
        self.memory = Memory()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002, D102
        if state.global_step == NUM_WARM_UP:
            self.start = now()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002, D102
        self.seconds, self.steps = now() - self.start, state.global_step - NUM_WARM_UP

    def found(self) -> dict[str, Any]:
        """As a measurement reports it.

        Raises:
            RuntimeError: If no step was counted.
        """
        if self.steps < 1:
            raise RuntimeError(f"A measurement needs more than {NUM_WARM_UP} steps; got none beyond. Give more pairs.")
        return {"seconds": self.seconds, "steps": self.steps, "peak_mib": self.memory.peak_mib()}
