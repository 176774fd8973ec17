"""What a training step minimises: the loss of each pair, and what some losses learn of the data on the way.

In: log-probabilities of a batch under the policy, the batch, the options. Out: margins and losses, one per pair.

Shapes: B pairs of a batch.
"""

import logging
from collections.abc import Callable

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather, reduce
from numpy.typing import NDArray
from torch import Tensor

from ropo.logps.batch import Batch
from ropo.logps.load_balance import LoadBalance
from ropo.losses import LOSSES, BoundLoss, dpo, gradient_weight, re_po_posterior, sft
from ropo.pairs import PairLogps, margin, margin_per_token
from ropo.train.options import TrainOptions

logger = logging.getLogger(__name__)

# A pair whose gradient is smaller gets none. It would move no weight; but on a CPU the products behind it meet numbers
# below 1e-38, with which they take up to twenty times as long.
_SMALLEST_GRADIENT = 1e-20

_RELIABILITY = 0.9  # of every annotator at the start; what `re_po` has by default
_RELIABILITY_RATE = 0.1  # step of the moving average of annotator reliability (arXiv:2509.24159, eq. 7)
_MOMENTS_RATE = 0.02  # step of the moving moments of margins (arXiv:2608.30597, the main recipe)


class Objective:
    """The loss of a training with the state that it learns.

    Args:
        loss: With β and its options.
        num_annotators: Of the training data.
        device: Of the model.
        balance: The auxiliary loss of the model's routers; None without.

    Attributes:
        loss_of_margin: The loss as a function of the margin, nats.
        spec: Its entry in `LOSSES`.
        reliability: Probability that a label is right, per annotator, shape (annotators + 1,). The last one is that of
            annotators who are in the evaluation set only; nothing is learned of them.
        moments: Moving sums of weights, means and variances of the margins, shape (3,); see `_update_moments`.
    """

    def __init__(
        self, loss: BoundLoss, *, num_annotators: int, device: torch.device, balance: LoadBalance | None = None
    ) -> None:
        self.loss_of_margin, self.spec, self.balance = loss, loss.spec, balance
        first = loss.options.get("reliability", _RELIABILITY)
        self.reliability = torch.full((num_annotators + 1,), first, device=device)
        self.moments = torch.zeros(3, device=device)
        self._step_margins: list[Tensor] = []
        self._step_posteriors: Tensor | None = None

    def margin(self, logps: PairLogps, inputs: Batch) -> Tensor:
        """Margin of each pair of a batch, nats, shape (B,); a gradient too small to matter does not pass through it.

        Raises:
            ValueError: If the loss needs a reference and the batch has none.
        """
        reference = None
        if "reference_chosen" in inputs:
            reference = PairLogps(chosen=inputs["reference_chosen"], rejected=inputs["reference_rejected"])
        h = _margin(logps, reference, self.loss_of_margin)
        if h.requires_grad:
            h.register_hook(_without_the_smallest)
        return h

    def loss(self, h: Tensor, inputs: Batch, *, progress: float) -> Tensor:
        """Loss per pair; a loss of the whole batch sees the pairs of all processes.

        Args:
            h: Margin of each pair, nats, shape (B,).
            inputs: The batch.
            progress: Share of the training that is done, 0 to 1.
        """
        everywhere: Callable[[Tensor], Tensor] = gather if self.spec.needs_whole_batch else lambda here: here
        known: dict[str, Callable[[], Tensor | float]] = {
            "reliability": lambda: everywhere(self.reliability[inputs["annotator"]]),
            "moments": lambda: self.moments[1:] / self.moments[0].clamp(min=_MOMENTS_RATE),
            "progress": lambda: progress,
            "weight": lambda: everywhere(inputs["weight"]),
            "reference_ratio": lambda: everywhere(inputs["reference_chosen"] - inputs["reference_rejected"]),
        }
        given = {name: known[name]() for name in self.spec.inputs}
        if not self.spec.needs_whole_batch:
            loss = self.loss_of_margin(h, **given)
        else:
            # Pairs of other processes are numbers here; in their own process they have their gradient.
            first, numbers = PartialState().process_index * len(h), everywhere(h.detach())
            whole = torch.cat([numbers[:first], h, numbers[first + len(h) :]])
            loss = self.loss_of_margin(whole, **given)[first : first + len(h)]
        if torch.is_grad_enabled():
            self._learn(h.detach(), inputs)
        return loss

    def terms(self, logps: PairLogps) -> dict[str, Tensor]:
        """What stands beside the loss by the name that is logged, (B,), before it is weighted; none if nothing does."""
        found = {"loss/sft": sft(logps)} if self.loss_of_margin.sft_weight else {}
        if self.balance is not None and self.balance.loss is not None and torch.is_grad_enabled():
            found["loss/router"] = self.balance.loss.detach().expand(len(logps))
        return found

    def total(self, loss: Tensor, weight: Tensor) -> Tensor:
        """Sum of the losses of a batch, (B,), by the weights of the pairs, (B,); the routers' loss has none."""
        total = (loss * weight).sum()
        if self.balance is not None and self.balance.loss is not None and torch.is_grad_enabled():
            total = total + len(loss) * self.balance.coefficient * self.balance.loss
        return total

    def with_sft(self, loss: Tensor, logps: PairLogps) -> Tensor:
        """The loss of each pair with the SFT term, (B,)."""
        weight = self.loss_of_margin.sft_weight
        return loss + weight * sft(logps) if weight else loss

    def rewards(self, logps: PairLogps, inputs: Batch) -> dict[str, Tensor]:
        """β·(log π − log π_ref) of both responses, by the name that is logged, each (B,); none without a reference."""
        if "reference_chosen" not in inputs or not self.spec.needs_reference:
            return {}
        return {
            "rewards/chosen": self.loss_of_margin.beta * (logps.chosen - inputs["reference_chosen"]),
            "rewards/rejected": self.loss_of_margin.beta * (logps.rejected - inputs["reference_rejected"]),
        }

    def gradient_weight(self, h: Tensor) -> dict[str, Tensor]:
        """−dℓ/dh of each pair by the name that is logged, (B,); none for losses that see more than one pair."""
        return {"gradient_weight": gradient_weight(self.loss_of_margin, h)} if self.spec.is_per_pair else {}

    def _learn(self, h: Tensor, inputs: Batch) -> None:
        if "reliability" in self.spec.inputs:
            annotator = inputs["annotator"]
            posterior, zeros = re_po_posterior(h, self.reliability[annotator]), torch.zeros_like(self.reliability)
            both = [zeros.index_add(0, annotator, one) for one in (posterior, torch.ones_like(posterior))]
            before = self._step_posteriors
            self._step_posteriors = torch.stack(both) if before is None else before + torch.stack(both)
        if "moments" in self.spec.inputs:
            self._step_margins.append(h)

    def after_step(self) -> None:
        """Learn of the pairs of an optimizer step, over all processes, however it was divided into batches."""
        self._update_reliability()
        self._update_moments()

    def _update_moments(self) -> None:
        """Moving mean and variance of the margins (arXiv:2608.30597).

        The paper does not say where they start. Here the averages carry the sum of their weights, which they are
        divided by, so that they start nowhere: after n steps they are averages of n steps.
        """
        if self._step_margins:
            h = gather(torch.cat(self._step_margins))
            of_step = torch.stack([torch.ones_like(h[0]), h.mean(), h.var(correction=0)])
            self.moments = (1 - _MOMENTS_RATE) * self.moments + _MOMENTS_RATE * of_step
            self._step_margins.clear()

    def _update_reliability(self) -> None:
        """Moving average of the posterior that a label is right, per annotator (arXiv:2509.24159, eq. 7)."""
        if self._step_posteriors is not None:
            total, count = reduce(self._step_posteriors, reduction="sum")
            moved = (1 - _RELIABILITY_RATE) * self.reliability + _RELIABILITY_RATE * total / count.clamp(min=1)
            self.reliability, self._step_posteriors = torch.where(count > 0, moved, self.reliability), None

    def state(self) -> dict[str, Tensor]:
        """What is learned, on the CPU, for a checkpoint."""
        return {"reliability": self.reliability.cpu(), "moments": self.moments.cpu()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go back to what `state` gave; further entries are ignored."""
        self.reliability = state["reliability"].to(self.reliability.device)
        self.moments = state["moments"].to(self.moments.device)


def _without_the_smallest(gradient: Tensor) -> Tensor:
    return torch.where(gradient.abs() < _SMALLEST_GRADIENT, 0.0, gradient)


def warn_about_alpha(args: TrainOptions) -> None:
    """Say which alpha a training takes where it is left open: nothing has estimated or filtered anything for it."""
    if args.alpha == "auto":
        logger.warning(
            "alpha is %g, the paper's: a training alone estimates nothing and filters nothing. Give a number, take "
            "loss='dpo', or leave both to run_rounds.",
            LOSSES[args.loss].default("alpha"),
        )


def _margin(policy: PairLogps, reference: PairLogps | None, loss: BoundLoss) -> Tensor:
    """Margin of each pair as a loss reads it, nats, shape (pairs,)."""
    if loss.spec.per_token:
        return margin_per_token(policy, beta=loss.beta)
    if reference is not None:
        return margin(policy, reference, beta=loss.beta)
    if loss.spec.needs_reference:
        raise ValueError(f"{loss.name} needs reference log-probs; the PairDataset has none. Pass reference=.")
    return loss.beta * (policy.chosen - policy.rejected)


def margins_of(policy: PairLogps, reference: PairLogps | None, loss: BoundLoss) -> NDArray[np.float64]:
    """Margins as a loss reads them, shape (pairs,), nats.

    Args:
        policy: Log-probabilities under the policy.
        reference: The same under the reference; None only for losses that need none.
        loss: The loss.

    Raises:
        ValueError: If the loss needs a reference and there is none.
    """
    return _margin(policy, reference, loss).double().numpy()


def losses_of(margins: NDArray[np.float64], loss: BoundLoss) -> NDArray[np.float64]:
    """Loss at each margin, shape (pairs,); DPO's where that of a pair depends on others, or on what is learned."""
    of_pair = loss if loss.spec.is_per_pair else dpo
    values: NDArray[np.float64] = of_pair(torch.from_numpy(np.ascontiguousarray(margins))).numpy()
    return values
