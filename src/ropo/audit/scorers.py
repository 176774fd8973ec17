"""What a scorer gets (`Question`), and what it gives (`Scores`): held-out margins of every pair.

The one idea: how margins come about is nobody else's business, as long as no label has had a say in its own.

Add a scorer: one function `Question -> Scores` in a file of its own, one line each in `run.SCORERS` and
`options.SCORERS`.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from ropo.audit.options import AuditOptions
from ropo.audit.weights import Floats, Labels
from ropo.models.source import Model
from ropo.noise.linear import Gain
from ropo.noise.shares import cluster_weights, mean_of, wilson_interval
from ropo.pairs import PairFeatures
from ropo.provenance import Json, read_json, write_aside, write_json
from ropo.train.dataset import PairDataset

MARGINS_FILE, ROWS_FILE = "margins.safetensors", "scorers.json"
SCORED_FILES = (MARGINS_FILE, ROWS_FILE)
"""What another audit of the same pairs can read instead of scoring them again."""

_PER_PAIR = ("margins", "length", "views")


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What a scorer is asked about, and what it may use.

    Attributes:
        data: The pairs, as labelled, with reference log-probabilities if the loss reads them.
        labels: What is known of them.
        folds: A pair is scored by what was learned in the other folds alone; dealt several times, shape (deals,
            pairs), for scorers to which another deal costs little.
        features: Reads what the reference says about each pair, in the order of `data`.
        args: Options of the run.
        folder: The scorer's own. What takes long is a stage there, so that it resumes.
        model: The initial one.
        digest: Of everything that made the data, and of the options.
    """

    data: PairDataset
    labels: Labels
    folds: NDArray[np.int64]
    features: Callable[[], PairFeatures]
    args: AuditOptions
    folder: Path
    model: Model
    digest: str

    def row(self, name: str, margins: Floats, *, is_taken: bool = False) -> "ScorerRow":
        """How often held-out margins, shape (pairs,), agree with the labels that are open to doubt."""
        agrees = (np.sign(margins[self.labels.is_open]) + 1) / 2
        weights = cluster_weights(self.labels.clusters[self.labels.is_open], len(agrees))
        share = mean_of(agrees, weights)
        low, high = wilson_interval(share, round(weights.sum()))
        return ScorerRow(name=name, agreement=share, low=low, high=high, is_taken=is_taken)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScorerRow:
    """How much a scorer knows: one line of the table in the report.

    Attributes:
        agreement: Share of the labels it has not seen that it agrees with; ties count half, copies of a pair once.
        low: Lower end of the 90 % interval.
        high: Upper end.
        is_taken: Whether this audit goes by its margins.
    """

    name: str
    agreement: float
    low: float
    high: float
    is_taken: bool


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scores:
    """What a scorer gives.

    Attributes:
        margins: Held-out margin of every pair as labelled, shape (pairs,).
        length: What the lengths of the responses would add to it, shape (pairs,); 0 where that is not told apart.
        views: The same as seen at several moments or by several models, shape (views, pairs): where they differ, the
            pair is hard.
        rows: What was compared, the scorer that is taken among them.
        refit: What these margins gain where suspects are left out; None where it was not tried.
        filter: What a training gains without them; None where it was not tried.
    """

    margins: Floats
    length: Floats
    views: Floats
    rows: tuple[ScorerRow, ...]
    refit: Gain | None = None
    filter: Gain | None = None

    def tensors(self) -> dict[str, torch.Tensor]:
        """What there is of each pair, as it is written."""
        return {name: torch.from_numpy(getattr(self, name).copy()) for name in _PER_PAIR}

    def write(self, folder: Path, **more: torch.Tensor) -> None:
        """Write `SCORED_FILES`, with further tensors if there are."""
        with write_aside(folder / MARGINS_FILE) as path:
            save_file({**self.tensors(), **more}, path)
        gains = {"refit": self.refit and asdict(self.refit), "filter": self.filter and asdict(self.filter)}
        write_json(folder / ROWS_FILE, {"rows": [asdict(row) for row in self.rows], **gains})

    @classmethod
    def read(cls, folder: Path) -> "Scores":
        """What `write` wrote."""
        tensors, facts = load_file(folder / MARGINS_FILE), read_json(folder / ROWS_FILE)
        return cls(
            **{name: tensors[name].numpy() for name in _PER_PAIR},
            rows=tuple(ScorerRow(**row) for row in facts["rows"]),
            refit=_gain(facts.get("refit")),  # an audit of an earlier version has none
            filter=_gain(facts["filter"]),
        )


def _gain(found: Json | None) -> Gain | None:
    return None if found is None else Gain(**found)


Scorer = Callable[[Question], Scores]
