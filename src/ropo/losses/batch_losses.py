"""What a pair costs among others: losses that read more than the pair's own margin.

Three things may be more: the margins of the whole batch, which must then be that of a whole optimizer step, over all
processes; what was learned on the way; what else is known of the pair. The last two are `INPUTS` in `table`.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from ropo.losses.margin_losses import dpo
from ropo.losses.ranges import check_positive


def dr_dpo(margin: Float[Tensor, " pairs"], *, beta_prime: float = 1.0) -> Float[Tensor, " pairs"]:
    """Dr.DPO: a loss of the whole batch that trusts pairs by how well they fit.

    ::

        L = −β′·log[(1/B)·Σᵢ exp(−dpo(hᵢ)/β′)]                                (arXiv:2407.07880)
        −∂L/∂hᵢ = ωᵢ·σ(−hᵢ) with ω = softmax(−dpo(h)/β′)

    Each pair is given the value L, which says nothing about that pair, and the gradient B·ωᵢ·∇dpo(hᵢ): the **mean over
    the batch** then has the value and the gradient of L.

    Args:
        margin: h, the margin of each pair of the whole batch.
        beta_prime: β′, positive. → ∞ is the mean of DPO, → 0 follows the best-fitting pair alone. The authors use 1.

    Returns:
        L for each pair, with gradients as above; take the mean.

    Examples:
        >>> batch = torch.tensor([-5.0, -1.0, 0.0, 0.5, 3.0])
        >>> round(dr_dpo(batch).mean().item(), 4), round(dpo(batch).mean().item(), 4)
        (0.7547, 1.5072)
    """
    check_positive("dr_dpo", "beta_prime", beta_prime, "The authors use 1; for the limit beta_prime → ∞ use dpo.")
    loss = dpo(margin)
    log_sum = torch.logsumexp(-loss.detach() / beta_prime, dim=0)
    share = torch.exp(-loss.detach() / beta_prime - log_sum)
    batch_loss = beta_prime * (math.log(len(loss)) - log_sum)
    return batch_loss + len(loss) * share * (loss - loss.detach())
