"""What the rounds of a run have in common, and what one of them has decided.

In: what was prepared; `decisions.json`. Out: `Setup` and `Decided`, which rounds hand on.
"""

from dataclasses import dataclass
from pathlib import Path

from ropo.audit import Audit
from ropo.audit.weights import CHOICES, Choice
from ropo.config import ROPOConfig
from ropo.data.tokenize import TokenizedPairs
from ropo.judge.verdicts import Judge
from ropo.losses import BoundLoss
from ropo.models.source import Model, Reference
from ropo.provenance import read_json


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What all rounds of a run have in common.

    Attributes:
        folder: The rounds become `00`, `01`, ... in it.
        args: Options of the run.
        loss: The loss of training, with α and β resolved.
        alpha: Its α, and why.
        beta: Its β, and why.
        model: The initial one.
        reference: The frozen one, which reads only pairs that it has never seen.
        audit: What is known about the labels, finished; None to go by the margins of the trained model.
        evaluation: Pairs that a training scores on the way, if `eval_strategy` says so; None without.
        judge: Asked about prompts for which the selection rule takes no candidate; None for nobody.
    """

    folder: Path
    args: ROPOConfig
    loss: BoundLoss
    alpha: Choice
    beta: Choice
    model: Model
    reference: Reference
    audit: Audit | None
    judge: Judge | None
    evaluation: TokenizedPairs | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Decided:
    """What a round has decided.

    Attributes:
        rho: The share of pairs to filter out.
        alpha: Of the loss.
        beta: Of the loss.
        decisions: keep, drop, flip or resample for each pair.
        weights: Weight of each pair in the next training.
    """

    rho: Choice
    alpha: Choice
    beta: Choice
    decisions: list[str]
    weights: list[float]

    @classmethod
    def read(cls, path: Path) -> "Decided":
        """What a round has written."""
        found = read_json(path)
        return cls(**{**found, **{name: Choice.from_json(found[name]) for name in CHOICES}})
