"""Robust preference optimization: align language models on preference data whose labels are partly wrong.

Packages in the order of the data: `pairs` (a pair, its log-probabilities, its margin), `data` (read, check, tokenize),
`logps`, `losses`, `noise` (how many labels are wrong, which, what to do), `models`, `resample` (new pairs for dropped
prompts), `train` (one training stage), `audit`, `report`, `run` (the loop, and all of it), `evaluate`, `cli`.

Names are imported when they are first used, so that `import ropo` and `ropo --help` are quick.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

# Nothing we call may report back; the libraries read this when they are imported.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from ropo.config import ROPOConfig as ROPOConfig
    from ropo.data.inject import flip_labels as flip_labels
    from ropo.data.load import load_pairs as load_pairs
    from ropo.data.validate import DataError as DataError
    from ropo.data.validate import validate_pairs as validate_pairs
    from ropo.losses import LOSSES as LOSSES
    from ropo.models.source import Model as Model
    from ropo.noise.decide import decide as decide
    from ropo.noise.estimate import estimate_flips as estimate_flips
    from ropo.pairs import Pair as Pair
    from ropo.pairs import PairLogps as PairLogps
    from ropo.pairs import margin as margin
    from ropo.run.align import run_audit as run_audit
    from ropo.run.align import run_rounds as run_rounds
    from ropo.run.inputs import DataSource as DataSource
    from ropo.run.inputs import ReviewInputs as ReviewInputs
    from ropo.run.result import AuditResult as AuditResult
    from ropo.run.result import RunResult as RunResult
    from ropo.train.dataset import PairDataset as PairDataset
    from ropo.train.trainer import ROPOTrainer as ROPOTrainer

__version__ = "0.1.0"

_HOME = {
    "AuditResult": "ropo.run.result",
    "DataError": "ropo.data.validate",
    "DataSource": "ropo.run.inputs",
    "LOSSES": "ropo.losses",
    "Model": "ropo.models.source",
    "Pair": "ropo.pairs",
    "PairDataset": "ropo.train.dataset",
    "PairLogps": "ropo.pairs",
    "ROPOConfig": "ropo.config",
    "ROPOTrainer": "ropo.train.trainer",
    "ReviewInputs": "ropo.run.inputs",
    "RunResult": "ropo.run.result",
    "decide": "ropo.noise.decide",
    "estimate_flips": "ropo.noise.estimate",
    "flip_labels": "ropo.data.inject",
    "load_pairs": "ropo.data.load",
    "margin": "ropo.pairs",
    "run_audit": "ropo.run.align",
    "run_rounds": "ropo.run.align",
    "validate_pairs": "ropo.data.validate",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ropo' has no attribute {name!r}; it has {', '.join(_HOME)}.")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
