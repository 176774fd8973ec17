"""What training logs: names with meanings, and their means over the pairs since the last line of the log.

In: values of each pair of a batch. Out: one mean per name.

Add a metric: one line in `METRICS`, one value per pair in `of_margins` or in `ROPOTrainer._remember`.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn

# Logged name -> meaning. Every one is a mean over the pairs since the last line of the log.
METRICS: Mapping[str, str] = MappingProxyType(
    {
        "rewards/chosen": "β·(log π − log π_ref) of the chosen response, nats; 0 at the start.",
        "rewards/rejected": "The same of the rejected response.",
        "rewards/margins": "Margin h: the difference of the two, nats. Above 0 the policy sides with the label.",
        "rewards/accuracies": "Share of pairs with h > 0. On noisy labels this should not reach 1.",
        "logps/chosen": "log π of the chosen response, nats, summed over its tokens.",
        "logps/rejected": "The same of the rejected response.",
        "loss/dpo": "DPO loss of the same margins, whatever loss is trained, so comparable; 0.693 at the start.",
        "loss/sft": "−log π of the chosen response per token, nats, before `sft_weight`; only where that is given.",
        "loss/na": "Noise-tolerant part σ(−h): the policy's probability that the label is wrong; 0.5 at the start.",
        "loss/router": "Load-balancing loss of experts, before `router_aux_loss_coef`; at best the experts to a token.",
        "gradient_weight": "−dℓ/dh: how hard the loss pushes a pair. A robust loss pushes contradicted pairs less.",
    }
)


def metrics_table() -> str:
    """METRICS as a Markdown table, for `docs/metrics.md`."""
    return "\n".join(["| name | meaning |", "|---|---|", *(f"| `{name}` | {text} |" for name, text in METRICS.items())])


def of_margins(h: Tensor) -> dict[str, Tensor]:
    """The metrics that a margin alone decides, each of shape (pairs,).

    Args:
        h: Margin of each pair, nats.
    """
    return {
        "rewards/margins": h,
        "rewards/accuracies": (h > 0).float(),
        "loss/dpo": nn.functional.softplus(-h),
        "loss/na": torch.sigmoid(-h),
    }


def gathered(values: Tensor, gather: Callable[[Tensor], Tensor]) -> Tensor:
    """One value per pair from the processes that have seen it, shape (pairs,), on the CPU; NaN where none has.

    A pair is seen by one process, or by two where the last batch is filled up; it counts once.

    Args:
        values: Of this process, shape (pairs,), on its device.
        gather: Joins the tensors of all processes, each of shape (1, pairs), along the first dimension.
    """
    return gather(values[None]).nanmean(dim=0).cpu()


class ByPair:
    """The newest values of every pair of a dataset, in each process those of the pairs that it has seen.

    Args:
        num_pairs: Of the dataset.
    """

    def __init__(self, num_pairs: int) -> None:
        self._num_pairs = num_pairs
        self._values: dict[str, Tensor] = {}

    def put(self, where: Tensor, found: Mapping[str, Tensor]) -> None:
        """Keep the values of a batch.

        Args:
            where: Places of its pairs, shape (pairs,).
            found: Values by name, each of shape (pairs,).
        """
        for name, value in found.items():
            unseen = torch.full((self._num_pairs,), float("nan"), device=value.device)
            self._values.setdefault(name, unseen)[where] = value.float()

    def take(self, name: str, gather: Callable[[Tensor], Tensor]) -> Tensor:
        """Values from all processes, see `gathered`."""
        return gathered(self._values[name], gather)

    def means(self, gather: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The mean over all pairs that were seen, by name."""
        return {name: self.take(name, gather).nanmean().item() for name in self._values}


class RunningMeans:
    """Means over pairs, batch after batch; nothing is asked of the device before the means are taken."""

    def __init__(self) -> None:
        self._names: tuple[str, ...] = ()
        self._sums: Tensor | None = None

    def add(self, found: Mapping[str, Tensor]) -> None:
        """Add a batch.

        Args:
            found: Values by name, each of shape (pairs,); the same names till the means are taken.
        """
        values = torch.stack([*found.values(), torch.ones_like(next(iter(found.values())))]).sum(dim=1)
        self._names, self._sums = tuple(found), values if self._sums is None else self._sums + values

    def take(self, over_processes: Callable[[Tensor], Tensor] = lambda sums: sums) -> dict[str, float]:
        """The means since the last time, which are forgotten; empty if there was no batch.

        Args:
            over_processes: Adds up a tensor over all processes.
        """
        if self._sums is None:
            return {}
        *totals, num_pairs = over_processes(self._sums).tolist()
        self._sums = None
        return {name: total / num_pairs for name, total in zip(self._names, totals, strict=True)}
