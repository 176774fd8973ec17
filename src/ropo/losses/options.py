"""The options that say what a pair costs.

In: what the user wrote. Out: `LossOptions`, known to be valid, and the loss that they name (`bound_loss`).
"""

from dataclasses import dataclass, replace
from typing import Annotated, Any

from ropo.losses.table import LOSSES, BoundLoss, bind_loss
from ropo.options import Rule, check_options, option, read_numbers


@dataclass
class LossOptions:
    """The loss of a training and its parameters.

    Raises:
        ValueError: If an option is unknown to the chosen loss, missing or out of range.
    """

    loss: str = option("ropo", "Loss of the training stages: one of the names that `ropo losses` lists.")
    beta: float = option(
        0.3, "Strength of the pull to the reference, per nat. Usual 0.01-0.5; of simpo, per token, 2-10."
    )
    alpha: Annotated[str | None, Rule(may_be_number=True)] = option(
        None,
        "ropo, ropo_v1: weight of the noise-tolerant part, or auto (ropo's default): 0, DPO on what is kept.",
    )
    loss_args: dict[str, Any] | str | None = option(
        None,
        "Other options of the loss, which `ropo losses` lists: name=value, several with commas between them, or JSON.",
    )

    sft_weight: Annotated[float, Rule(low=0)] = option(
        0.0, "Weight of an SFT term beside the loss: -log p(chosen) per token, which keeps it likely. RPO: 1."
    )

    def __post_init__(self) -> None:
        check_options(self)
        self.check_loss()

    def check_loss(self) -> None:
        """The loss exists, reads every option that is given, and has all that it needs, within its ranges."""
        self.loss_args = read_numbers("loss_args", self.loss_args) or None
        if self.loss_args is not None and "alpha" in self.loss_args:
            takers = " and ".join(name for name, spec in LOSSES.items() if "alpha" in spec.params)
            raise ValueError(f"alpha is an option of its own, of {takers}; got it in loss_args. Write --alpha NUMBER.")
        self.alpha = "auto" if self.alpha is None and self.loss == "ropo" else self.alpha
        self.alpha = None if self.alpha is None else str(self.alpha)
        if self.alpha == "auto" and self.loss != "ropo":
            raise ValueError(f"alpha needs a number for {self.loss}; got 'auto'. Only ropo chooses it by the noise.")
        if self.alpha not in (None, "auto"):
            try:
                float(self.alpha)
            except ValueError:
                raise ValueError(f"alpha needs a number or 'auto'; got {self.alpha!r}.") from None
        self.bound_loss()

    def bound_loss(self, alpha: float | None = None, beta: float | None = None) -> BoundLoss:
        """The loss, with β and its options.

        Args:
            alpha: ROPO's α as a run has resolved it; at 0 its loss is DPO's, exactly. Other losses keep theirs. By
                default as given, and the paper's where it is "auto".
            beta: β as a run has resolved it; by default as given.

        Returns:
            The loss.
        """
        name, options = self.loss, dict(self.loss_args) if isinstance(self.loss_args, dict) else {}
        alpha = self.fixed_alpha if alpha is None else alpha
        if self.loss == "ropo" and alpha == 0:
            name, options = "dpo", {}
        elif self.loss == "ropo" and alpha is not None:
            options["alpha"] = alpha
        elif self.alpha not in (None, "auto"):  # of another loss
            options["alpha"] = float(self.alpha)
        return replace(bind_loss(name, beta=beta or self.beta, options=options), sft_weight=self.sft_weight)

    @property
    def fixed_alpha(self) -> float | None:
        """α as given, or None when it follows the noise; 0 for losses without it."""
        if self.alpha == "auto":
            return None
        return 0.0 if self.alpha is None else float(self.alpha)

    @property
    def reads_reference(self) -> bool:
        """Whether the loss compares with the reference."""
        return LOSSES[self.loss].needs_reference


def in_loss_args(name: str) -> str:
    """A sentence on where the option of a single loss is written, or nothing.

    Examples:
        >>> in_loss_args("flip_rate")
        ' It is in loss_args: --loss_args flip_rate=NUMBER.'
    """
    is_option = name != "alpha" and any(name in spec.params for spec in LOSSES.values())
    return f" It is in loss_args: --loss_args {name}=NUMBER." if is_option else ""
