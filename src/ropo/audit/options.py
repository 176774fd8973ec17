"""The options of an audit; it may train models, so those of a training are among them."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated

from ropo.noise.decide import RULES
from ropo.options import Rule, option
from ropo.train.options import TrainOptions

SCORERS: Mapping[str, str] = MappingProxyType(
    {
        "features": "linear models on what the reference's forward pass reads of each pair, in seconds",
        "models": "models trained on the other folds, thorough and slow",
    }
)
"""What each scorer is; `ropo.audit.run.SCORERS` has their functions."""


@dataclass
class AuditOptions(TrainOptions):
    """How labels are judged, and what follows for pairs whose label is doubtful."""

    rho: Annotated[str, Rule(may_be_number=True)] = option(
        "auto", "Share of pairs to filter out, 0 to 0.5, or auto: what the estimate says."
    )
    num_folds: Annotated[int, Rule(low=0)] = option(
        5,
        "Parts of the data, each judged by what was learned from the others; 0: no audit, each round filters by the "
        "trained model's own margins.",
    )
    scorer: Annotated[str, Rule(choices=tuple(SCORERS))] = option(
        "features",
        "What gives the margins that an audit judges labels by: "
        + ", ".join(f"{name} ({meaning})" for name, meaning in SCORERS.items())
        + ".",
    )
    length_is_evidence: bool = option(
        default=False, text="Let a pair be judged by the lengths of its responses, too; scorer features only."
    )
    audit_from: Annotated[str | None, Rule(identifies=False)] = option(  # its margins count, wherever they are
        None,
        "Output folder of an audit of the same pairs by the same model: its margins are read instead of training.",
    )
    decision_rule: Annotated[str, Rule(choices=("auto", *RULES))] = option(
        "auto",
        "How the pairs to filter out are chosen: " + ", ".join(RULES) + "; or auto: lowest_loss, which takes away just "
        "that share, where rho is given or a filter of all that is contradicted helps; else threshold.",
    )

    adapt_beta: bool = option(
        default=True,
        text="Multiply beta by how much harder the labels pull that a filter keeps, so that the model goes about as "
        "far from the reference as DPO on all of them.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.rho = str(self.rho)
        if self.rho != "auto" and not _is_rho(self.rho):
            raise ValueError(
                f"rho needs 'auto' or a share in [0, 0.5]; got {self.rho!r}. Past a half, labels mean the opposite."
            )
        if self.num_folds == 1:
            raise ValueError(
                "num_folds needs 2 or more, or 0 for none; got 1. One fold would leave nothing to train on."
            )
        if self.scorer != "features" and not self.num_folds:
            raise ValueError(f"scorer {self.scorer} needs an audit; got num_folds 0. Leave one of them out.")
        if self.length_is_evidence and not (self.scorer == "features" and self.num_folds):
            raise ValueError(
                f"length_is_evidence needs an audit by scorer features; got scorer {self.scorer} and num_folds "
                f"{self.num_folds}. Leave it out, or change them."
            )

    @property
    def fixed_rho(self) -> float | None:
        """The share of pairs to filter out, or None when it follows the estimate."""
        return None if self.rho == "auto" else float(self.rho)

    @property
    def reads_features(self) -> bool:
        """Whether an audit judges by what the reference pass reads of each pair, and reads it itself."""
        return self.scorer == "features" and self.audit_from is None

    def fewest_trained_on(self, num_pairs: int) -> int:
        """Pairs that the shortest training reads, of those of the run: fold models leave one fold out."""
        trains_folds = self.needs_audit and self.scorer == "models" and self.audit_from is None
        return num_pairs * (self.num_folds - 1) // self.num_folds if trains_folds else num_pairs

    @property
    def needs_audit(self) -> bool:
        """Whether anything depends on held-out margins."""
        return bool(self.num_folds) and (self.fixed_rho != 0.0 or self.alpha == "auto")


def _is_rho(text: str) -> bool:
    try:
        return 0 <= float(text) <= 0.5
    except ValueError:
        return False
