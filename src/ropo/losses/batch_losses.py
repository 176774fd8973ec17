"""What a pair costs among others: losses that read more than the pair's own margin.

Three things may be more: the margins of the whole batch, which must then be that of a whole optimizer step, over all
processes; what was learned on the way; what else is known of the pair. The last two are `INPUTS` in `table`.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from ropo.losses.margin_losses import dpo
from ropo.losses.ranges import check_positive, check_share

_MIN_SPREAD = 1e-6  # nats; σ_min of plc_dpo, which the paper leaves open: it only keeps the division defined


def dr_dpo(
    margin: Float[Tensor, " pairs"], *, beta_prime: float = 1.0, weight: Float[Tensor, " pairs"] | None = None
) -> Float[Tensor, " pairs"]:
    """Dr.DPO: a loss of the whole batch that trusts pairs by how well they fit.

    ::

        L = −β′·log[(1/B)·Σᵢ exp(−dpo(hᵢ)/β′)]                                (arXiv:2407.07880)
        −∂L/∂hᵢ = ωᵢ·σ(−hᵢ) with ω = softmax(−dpo(h)/β′)

    Each pair is given the value L, which says nothing about that pair, and the gradient B·ωᵢ·∇dpo(hᵢ): the **mean over
    the batch** then has the value and the gradient of L.

    Args:
        margin: h, the margin of each pair of the whole batch.
        beta_prime: β′, positive. → ∞ is the mean of DPO, → 0 follows the best-fitting pair alone. The authors use 1.
        weight: wᵢ of each pair; then 1/B·Σᵢ above is Σᵢ wᵢ/Σⱼ wⱼ. All 1 by default.

    Returns:
        L for each pair, with gradients as above; take the mean, with the weights if there are some.

    Examples:
        >>> batch = torch.tensor([-5.0, -1.0, 0.0, 0.5, 3.0])
        >>> round(dr_dpo(batch).mean().item(), 4), round(dpo(batch).mean().item(), 4)
        (0.7547, 1.5072)
    """
    check_positive("dr_dpo", "beta_prime", beta_prime, "The authors use 1; for the limit beta_prime → ∞ use dpo.")
    loss = dpo(margin)
    weight = torch.ones_like(margin) if weight is None else weight.to(margin)
    total, trust = weight.sum(), -loss.detach() / beta_prime
    log_sum = torch.logsumexp(trust + weight.log(), dim=0)
    batch_loss = beta_prime * (total.log() - log_sum)
    return batch_loss + total * torch.exp(trust - log_sum) * (loss - loss.detach())


def gamma_po_targets(
    margin: Float[Tensor, " pairs"], *, mean_target_margin: float, evenness: float
) -> Float[Tensor, " pairs"]:
    """Target margin of each pair of a batch, by 20 steps of exponentiated gradient from equal targets.

    ::

        min over p of (1/B)·Σᵢ dpo(hᵢ − γᵢ) + τ·KL(p‖uniform) with γᵢ = γ₀·B·pᵢ            (arXiv:2506.03690)
        at the minimum pᵢ ∝ exp(−γ₀·σ(γᵢ − hᵢ)/τ)

    As in the authors' code the targets are those before the last of its 20 updates of p, which is therefore not made.

    Args:
        margin: h, the margin of each pair of the whole batch.
        mean_target_margin: γ₀, the mean of the targets.
        evenness: τ, how strongly the targets are held together.

    Returns:
        γ, without gradient.
    """
    gaps, size = margin.detach(), len(margin)
    rate = min(0.5 / evenness, 1.0)
    share = torch.full_like(gaps, 1 / size)
    for _ in range(19):
        pull = mean_target_margin * torch.sigmoid(mean_target_margin * size * share - gaps)
        slope = evenness * (1 + torch.log(size * (share + 1e-10))) + pull
        share = torch.softmax(share.log() - rate * slope, dim=0)
    return mean_target_margin * size * share


def gamma_po(
    margin: Float[Tensor, " pairs"], *, mean_target_margin: float = 0.5, evenness: float = 1.0
) -> Float[Tensor, " pairs"]:
    """γ-PO in its form for DPO: pairs that the policy already sides with get a larger target margin, others a smaller.

    ::

        L(h) = dpo(hᵢ − (γᵢ − γ₀)) with γ of `gamma_po_targets` held fixed        (arXiv:2506.03690, authors' code)
        w(h) = σ(γᵢ − γ₀ − hᵢ)

    The offsets γᵢ − γ₀ have the mean 0. Ambiguous pairs are damped, but a contradicted one still pulls with weight → 1.

    The authors fill each batch up to 256 with earlier margins, drawn from the last 2,048. Here the targets come from
    the batch alone, so that the loss depends neither on chance nor on history; and our batch is that of all processes.
    Targets of a small batch are therefore noisier than the authors'.

    Args:
        margin: h, the margin of each pair of the whole batch.
        mean_target_margin: γ₀, positive, on the scale of h. Larger spreads the targets more. The default is that of the
            authors' code; their recipes, for margins per token, have 0.375 to 5.
        evenness: τ, positive; → ∞ is DPO. The default is that of the authors' code; their recipes have 3 to 20.
    """
    check_positive("gamma_po", "mean_target_margin", mean_target_margin, "The authors' default is 0.5; for 0 use dpo.")
    check_positive("gamma_po", "evenness", evenness, "The authors' default is 1; for the limit evenness → ∞ use dpo.")
    targets = gamma_po_targets(margin, mean_target_margin=mean_target_margin, evenness=evenness)
    return dpo(margin - (targets - mean_target_margin))


def rappo(
    margin: Float[Tensor, " pairs"],
    *,
    num_dropped: float = 1.0,
    reference_ratio: Float[Tensor, " pairs"] | None = None,
    weight: Float[Tensor, " pairs"] | None = None,
) -> Float[Tensor, " pairs"]:
    """RAPPO: DPO without the worst pairs of each step among those that the reference ranks the other way.

    ::

        L = mean of dpo(hᵢ) over all pairs but the q largest losses in U          (RAPPO, ICLR 2026)
        U = pairs with log π_ref(y_w) − log π_ref(y_l) ≤ 0

    A pair that the reference agrees with is never dropped, and what is dropped is decided anew at each step.

    The mean is over the pairs that are kept, as in the paper; the authors' code divides by all pairs, which lowers the
    learning rate where more are dropped. Pairs with equal losses share what is dropped: at the first step, where all
    margins are 0, none of them is singled out.

    Args:
        margin: h, the margin of each pair of the whole batch.
        num_dropped: q, pairs dropped at each step, a whole number; all of U if it is smaller. The paper studies 1 to 8.
        reference_ratio: log π_ref(y_w) − log π_ref(y_l) of each pair, nats; without it no pair is in U.
        weight: Of each pair: one of weight ½ is half a pair of the q, and of the mean. All 1 by default.

    Returns:
        Loss per pair, 0 where dropped, scaled up elsewhere so that the mean over the batch, with the weights if there
        are some, is that over the kept pairs.

    Examples:
        >>> batch, ratio = torch.tensor([-5.0, -1.0, 0.0]), torch.tensor([0.3, -0.2, -0.1])
        >>> rappo(batch, reference_ratio=ratio)
        tensor([7.5101, 0.0000, 1.0397])
    """
    if not (num_dropped >= 0 and float(num_dropped).is_integer()):
        raise ValueError(f"rappo needs a whole num_dropped >= 0; got {num_dropped}. The paper uses 1.")
    loss = dpo(margin)
    if reference_ratio is None:
        return loss
    weight = torch.ones_like(margin) if weight is None else weight.to(margin)
    is_suspect, value = (reference_ratio <= 0) & (weight > 0), loss.detach()
    suspected = weight[is_suspect].sum()
    quota = suspected.clamp(max=num_dropped)
    if not quota > 0:
        return loss
    values, order = value[is_suspect].sort(descending=True)
    counted = weight[is_suspect][order].cumsum(dim=0)
    last = values[min(int((counted < quota * (1 - 1e-6)).sum()), len(values) - 1)]  # with which the quota is reached
    worse, tied = (is_suspect & (value > last)).to(loss), (is_suspect & (value == last)).to(loss)
    kept = 1 - worse - tied * (quota - (worse * weight).sum()) / (tied * weight).sum()
    left = weight.sum() - quota
    return loss * kept * weight.sum() / torch.where(left > 0, left, 1.0)


def plc_dpo(
    margin: Float[Tensor, " pairs"],
    *,
    direction_temperature: float = 0.55,
    tie_temperature: float = 1.15,
    correction_warmup: float = 0.07,
    correction_max: float = 0.85,
    correction_power: float = 0.8,
    moments: Float[Tensor, " 2"] | None = None,
    progress: float = 1.0,
) -> Float[Tensor, " pairs"]:
    """PLC-DPO: each label is read as right, flipped or a tie, by where its margin stands among recent ones.

    ::

        L(h) = (1−a)·dpo(h) + a·[q₁·dpo(h) + q₂·dpo(−h) + q₃·dpo(−abs(h))]        (arXiv:2608.30597)
        q = softmax(z/τ, −z/τ, −abs(z)/τ′) with z = (h − μ)/√v, held fixed
        a = γₜ·C with C = ((max q − ⅓)/⅔)^κ, held fixed

    dpo(−abs(h)) pulls a tie to margin 0. The weight of a pair that is certainly flipped falls to 1−a: dpo(−h) is nearly
    flat there, so the pair is let go of and hardly reversed. The defaults are the paper's main recipe, "aggressive".

    The paper leaves open, and here is our choice: equal prior probabilities of the three readings; γₜ is 0 during the
    warm-up and then grows in a straight line to its largest value at the end of training.

    Args:
        margin: h, the margin of each pair.
        direction_temperature: τ, positive. Smaller tells right from flipped more sharply.
        tie_temperature: τ′, positive. Smaller calls fewer pairs ties.
        correction_warmup: Share of training before the correction begins, in [0, 1).
        correction_max: Largest γₜ, in [0, 1]. At 0 this is DPO.
        correction_power: κ, positive. Larger corrects only what is sure.
        moments: μ and v, moving mean and variance of the margins of recent steps; default those of `margin`.
        progress: Share of the training that is done.
    """
    check_positive("plc_dpo", "direction_temperature", direction_temperature, "The paper uses 0.55 to 1.")
    check_positive("plc_dpo", "tie_temperature", tie_temperature, "The paper uses 0.85 to 1.15.")
    check_positive("plc_dpo", "correction_power", correction_power, "The paper uses 0.8 to 1.5.")
    check_share("plc_dpo", "correction_max", correction_max, "The paper uses 0.5 to 0.85.")
    if not 0 <= correction_warmup < 1:
        raise ValueError(f"plc_dpo needs correction_warmup in [0, 1); got {correction_warmup}. The paper uses 0.07.")
    h = margin.detach()
    mean, variance = (h.mean(), h.var(correction=0)) if moments is None else moments.to(h)
    z = (h - mean) / variance.sqrt().clamp(min=_MIN_SPREAD)
    readings = torch.stack([z / direction_temperature, -z / direction_temperature, -z.abs() / tie_temperature])
    is_right, is_flipped, is_tie = chances = torch.softmax(readings, dim=0)
    confidence = (1.5 * chances.amax(dim=0) - 0.5).clamp(min=0) ** correction_power
    ramp = max(0.0, progress - correction_warmup) / (1 - correction_warmup)
    share = correction_max * ramp * confidence
    corrected: Tensor = is_right * dpo(margin) + is_flipped * dpo(-margin) + is_tie * dpo(-margin.abs())
    return (1 - share) * dpo(margin) + share * corrected
