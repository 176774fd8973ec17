"""The ways that `speed.py` compares, and where their rows are."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("speed.csv")
RESULTS_GPU = RESULTS.with_name("speed_gpu.csv")


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One way to train or to score: whose, in which layout, order and precision."""

    name: str
    measure: str  # of MEASURES
    layout: str | None = None
    order: str = "by length"
    has_bf16: bool = False
    is_default: bool = False  # a peer as it comes: reference in every step, gradient checkpointing
    options: Mapping[str, Any] | None = None  # of ROPOConfig

    @property
    def is_whole(self) -> bool:
        """Whether it belongs to the comparison of whole runs, which has fewer pairs."""
        return self.name.startswith("whole")

    @property
    def is_training(self) -> bool:
        """Whether it trains on the pairs, and does nothing else."""
        return self.measure in ("ours", "trl", "swift")

    @property
    def reads_reference(self) -> bool:
        """Whether the reference is read in every step."""
        return self.is_default or self.measure == "swift"


WAYS = (
    Way(name="TRL, defaults", measure="trl", order="as given", is_default=True),
    Way(name="TRL, best", measure="trl"),
    Way(name="ms-swift, defaults", measure="swift", order="as given", is_default=True),
    Way(name="ms-swift, best", measure="swift"),
    Way(name="ours, plain", measure="ours", layout="plain"),
    Way(name="ours, shared prefix", measure="ours", layout="shared_prefix"),
    Way(name="ours, packed", measure="ours", layout="packed"),
    Way(name="ours, packed, as given", measure="ours", layout="packed", order="as given"),
    Way(name="ours, packed, bf16", measure="ours", layout="packed", has_bf16=True),
    Way(name="scoring", measure="score"),
    Way(name="bare forward", measure="forward"),
    Way(name="whole, TRL", measure="trl", order="as given", is_default=True),
    Way(name="whole, no audit", measure="whole", order="as given", options={"num_folds": 0}),
    Way(name="whole", measure="whole", order="as given"),
)
