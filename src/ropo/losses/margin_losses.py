"""What a pair costs: losses that are pure functions of the pair's own margin.

The one idea: flipping a label maps h to −h, so all that label noise does to a loss can be read off its curve. How hard
a fully contradicted pair (h → −∞) still pulls decides how much harm a wrong label does.
"""

import math
import warnings

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from ropo.losses.ranges import check_positive


def dpo(margin: Float[Tensor, " pairs"]) -> Float[Tensor, " pairs"]:
    """DPO: the likelihood of the label, if no label is wrong.

    ::

        L(h) = −log σ(h)                                                      (arXiv:2305.18290, eq. 7)
        w(h) = σ(−h)

    The weight of a contradicted pair grows to 1, the largest of all: wrong labels pull hardest.
    """
    return -functional.logsigmoid(margin)


def na(margin: Float[Tensor, " pairs"]) -> Float[Tensor, " pairs"]:
    """Noise-aware part of ROPO: the probability that the policy gives to the label being wrong.

    ::

        L(h) = σ(−h)                                                          (arXiv:2404.04102, Theorem 3.4)
        w(h) = σ(h)·σ(−h)

    L(h) + L(−h) = 1, so symmetric flips of any rate below ½ scale the expected gradient and keep its direction. Slow to
    learn where it starts out wrong: the weight of a contradicted pair vanishes, whether or not its label is right.
    """
    return torch.sigmoid(-margin)


def ropo(margin: Float[Tensor, " pairs"], *, alpha: float = 14.0) -> Float[Tensor, " pairs"]:
    """ROPO: DPO plus the noise-aware loss, scaled so that the largest gradient weight is 1.

    ::

        L(h) = 4α/(1+α)²·dpo(h) + 4α²/(1+α)²·na(h)                            (arXiv:2404.04102v2, eq. 9)
        w(h) = 4α/(1+α)²·σ(−h)·(1 + α·σ(h)),  largest at h = log((α−1)/(α+1))

    A fully contradicted pair keeps the weight 4α/(1+α)² (0.249 at α = 14): the loss damps wrong labels, it does not
    remove them. L(0) is 1.91 at α = 14, so its curve cannot be compared with that of DPO.

    Args:
        margin: h, the margin of each pair.
        alpha: α, share of the noise-aware part. Positive; usual 6-30, more for noisier labels; → 0 is DPO up to scale,
            → ∞ is 4·na. Warns below 2, where a fully contradicted pair weighs more than an undecided one.

    Examples:
        >>> ropo(torch.tensor([-5.0, 0.0, 3.0]))
        tensor([4.7072, 1.9147, 0.1773])
    """
    check_positive("ropo", "alpha", alpha, "The paper uses 14; for the limits use dpo (alpha → 0) or na (alpha → ∞).")
    _warn_if_contradicted_pairs_lead("ropo", "alpha", alpha)
    return 4 * alpha / (1 + alpha) ** 2 * (dpo(margin) + alpha * na(margin))


def ropo_v1(margin: Float[Tensor, " pairs"], *, alpha: float, gamma: float) -> Float[Tensor, " pairs"]:
    """ROPO as first published: the same two parts with free scales.

    ::

        L(h) = α·na(h) + γ·dpo(h)                                             (arXiv:2404.04102v1)
             = γ·(1+a)²/(4a)·ropo(h; a) with a = α/γ

    Args:
        margin: h, the margin of each pair.
        alpha: α, scale of the noise-aware part. Positive; seen in use are 2 and 0.2, both with gamma = 0.1.
        gamma: γ, scale of the DPO part. Positive. Warns if alpha / gamma is below 2, for the reason given in `ropo`.
    """
    check_positive("ropo_v1", "alpha", alpha, "Without the noise-aware part use dpo.")
    check_positive("ropo_v1", "gamma", gamma, "Without the DPO part use na.")
    _warn_if_contradicted_pairs_lead("ropo_v1", "alpha / gamma", alpha / gamma)
    return alpha * na(margin) + gamma * dpo(margin)


def cdpo(margin: Float[Tensor, " pairs"], *, flip_rate: float) -> Float[Tensor, " pairs"]:
    """Conservative DPO: DPO towards the soft label 1−ε instead of 1.

    ::

        L(h) = (1−ε)·dpo(h) + ε·dpo(−h)                                       (Mitchell 2023, ericmitchell.ai/cdpo.pdf)
        w(h) = (1−ε) − σ(h)

    Not monotone: past σ(h) = 1−ε it pulls the margin back, so its losses do not rank pairs by how well they fit.

    Args:
        margin: h, the margin of each pair.
        flip_rate: ε, the share of pairs whose label is wrong. In [0, 0.5); at 0 this is DPO.
    """
    _check_flip_rate("cdpo", flip_rate)
    return (1 - flip_rate) * dpo(margin) + flip_rate * dpo(-margin)


def rdpo(margin: Float[Tensor, " pairs"], *, flip_rate: float) -> Float[Tensor, " pairs"]:
    """Robust DPO: unbiased for the clean loss if a share `flip_rate` of the labels is flipped.

    ::

        L(h) = [(1−ε)·dpo(h) − ε·dpo(−h)]/(1−2ε)                              (arXiv:2403.00409)
        w(h) = σ(−h) + ε/(1−2ε)

    Unbounded below: no margin is ever large enough. One pair may cost less than 0; only the mean is meant to be small.

    Args:
        margin: h, the margin of each pair.
        flip_rate: ε, the share of pairs whose label is wrong. In [0, 0.5); at 0 this is DPO.
    """
    _check_flip_rate("rdpo", flip_rate)
    # dpo(−h) = dpo(h) + h: as the formula stands, two large numbers would cancel.
    return dpo(margin) - flip_rate / (1 - 2 * flip_rate) * margin


def forward_corrected(margin: Float[Tensor, " pairs"], *, flip_rate: float) -> Float[Tensor, " pairs"]:
    """Forward-corrected DPO: the likelihood of the label, if a share `flip_rate` of the labels is flipped.

    ::

        L(h) = −log[(1−ε)·σ(h) + ε·σ(−h)]                                     (arXiv:1609.03683, applied to DPO)

    At most −log ε; the weight of a contradicted pair falls to 0. The gradient is that of `re_po` at reliability 1−ε.

    Args:
        margin: h, the margin of each pair.
        flip_rate: ε, the share of pairs whose label is wrong. In [0, 0.5); at 0 this is DPO.
    """
    _check_flip_rate("forward_corrected", flip_rate)
    log_flip_rate = math.log(flip_rate) if flip_rate > 0 else -math.inf
    return -torch.logaddexp(math.log1p(-flip_rate) - dpo(margin), log_flip_rate - dpo(-margin))


def re_po_posterior(
    margin: Float[Tensor, " pairs"], reliability: float | Float[Tensor, " pairs"]
) -> Float[Tensor, " pairs"]:
    """E step of RE-PO: the probability that each label is right, given its margin and the reliability of its giver.

    ::

        w = p·η/[p·η + (1−p)·(1−η)] with p = σ(h), that is w = σ(h + logit η)            (arXiv:2509.24159)

    The paper then moves the reliability of each annotator towards the mean of its posteriors: η ← 0.9·η + 0.1·mean(w).

    Args:
        margin: h, the margin of each pair.
        reliability: η, the share of right labels: of all pairs, or for each pair that of its annotator. In (0, 1].
    """
    prior = torch.as_tensor(reliability, dtype=margin.dtype)
    if not bool(((prior > 0) & (prior <= 1)).all()):
        raise ValueError(f"re_po needs reliability in (0, 1]; got {reliability}. Pass the share of right labels.")
    return torch.sigmoid(margin + torch.logit(prior))


def re_po(
    margin: Float[Tensor, " pairs"], *, reliability: float | Float[Tensor, " pairs"] = 0.9
) -> Float[Tensor, " pairs"]:
    """RE-PO: expectation-maximisation over which labels are right; this is its M step.

    ::

        L(h) = w·dpo(h) + (1−w)·dpo(−h) with w = σ(h + logit η) held fixed               (arXiv:2509.24159)
        −dL/dh = w − σ(h)

    While η > ½ it never reverses a pair, it only lets go of contradicted ones. Below ½ it does reverse them.

    Args:
        margin: h, the margin of each pair.
        reliability: η as in `re_po_posterior`, which shows how to learn it during training. At 1 this is DPO.
    """
    posterior = re_po_posterior(margin, reliability).detach()
    return posterior * dpo(margin) + (1 - posterior) * dpo(-margin)


def ipo(margin: Float[Tensor, " pairs"], *, beta: float) -> Float[Tensor, " pairs"]:
    """IPO: regression of the margin to a fixed target.

    ::

        L(h) = ((h − ½)/β)²                                                   (arXiv:2310.12036, eq. 17)
             = (Δ − 1/(2τ))² with h = β·Δ and τ = β

    Flips shrink the target by exactly 1−2ε and keep the order of pairs. The weight of a contradicted pair is unbounded.

    Args:
        margin: h, the margin of each pair.
        beta: The β that `margin` was made with, the paper's τ. Positive; usual 0.1.
    """
    check_positive("ipo", "beta", beta, "Pass the beta that the margins were made with.")
    return ((margin - 0.5) / beta) ** 2


def hinge(margin: Float[Tensor, " pairs"]) -> Float[Tensor, " pairs"]:
    """Hinge loss of RSO and SLiC: push each margin up to 1, then let go.

    ::

        L(h) = max(0, 1 − h)                                                  (arXiv:2309.06657; arXiv:2305.10425)

    The expected loss is smallest at h = 1 for every flip rate below ½. The gradient at h = 1 is 0.
    """
    return functional.relu(1 - margin)


def simpo(margin: Float[Tensor, " pairs"], *, target_margin: float = 0.5) -> Float[Tensor, " pairs"]:
    """SimPO: DPO without a reference, on mean log-probabilities per token, beyond a target margin.

    ::

        L(m) = −log σ(m − γ)                                                  (arXiv:2405.14734, eq. 6)

    Args:
        margin: m, the margin per token of each pair (`pairs.margin_per_token`), not h.
        target_margin: γ, on the scale of m, so with β in it. 0 or more; usual 0.5-1.5.
    """
    if not 0 <= target_margin < math.inf:
        raise ValueError(f"simpo needs a finite target_margin >= 0; got {target_margin}. The usual value is 0.5.")
    return dpo(margin - target_margin)


def holder(margin: Float[Tensor, " pairs"], *, holder_gamma: float = 2.0) -> Float[Tensor, " pairs"]:
    """Hölder-DPO: a divergence under which contradicted pairs lose all weight.

    ::

        L(h) = γ·p^(1+γ) − (1+γ)·p^γ with p = σ(h)                            (arXiv:2505.17859, eq. 12)
        w(h) = γ·(1+γ)·p^γ·(1−p)²

    At γ = 2, and only there, L(h) + L(−h) is constant (−1), so symmetric flips keep the direction of the gradient.

    Args:
        margin: h, the margin of each pair.
        holder_gamma: γ, positive; the paper uses 2. Larger lets go of contradicted pairs sooner.
    """
    check_positive("holder", "holder_gamma", holder_gamma, "The paper uses 2.")
    # L = −p^γ·(1 + γ·(1−p)) with p^γ from log p: a power of an underflown p has no finite gradient.
    return -torch.exp(-holder_gamma * dpo(margin)) * (1 + holder_gamma * na(margin))


def focalpo(margin: Float[Tensor, " pairs"], *, focal_gamma: float = 0.05) -> Float[Tensor, " pairs"]:
    """FocalPO: DPO, scaled down where the policy contradicts the label.

    ::

        L(h) = −p^γ·log p with p = σ(h)                                       (arXiv:2501.06645)
        w(h) = p^γ·(1−p)·(1 + γ·log p)

    The factor is not held fixed, so below p = exp(−1/γ) the weight turns negative and pushes the margin further down:
    at γ = 0.05 from h = −20 on, at γ = 1 from h = −0.54 on. There the losses do not rank pairs, either.

    Args:
        margin: h, the margin of each pair.
        focal_gamma: γ, positive; the paper uses 0.05. Warns above 0.1, where pairs with h around −10 are given up.
    """
    check_positive("focalpo", "focal_gamma", focal_gamma, "The paper uses 0.05; for the limit focal_gamma → 0 use dpo.")
    if focal_gamma > 0.1:
        warnings.warn(
            f"focalpo needs focal_gamma of 0.1 or less to push every pair up; got {focal_gamma:g}. Pairs with a margin "
            f"below about {-math.log(math.expm1(1 / focal_gamma)):.1f} are pushed further down. Use 0.05.",
            UserWarning,
            stacklevel=2,
        )
    loss = dpo(margin)
    return torch.exp(-focal_gamma * loss) * loss


def clipped(margin: Float[Tensor, " pairs"], *, max_weight: float = 0.5) -> Float[Tensor, " pairs"]:
    """Clipped DPO: no pair pushes harder than `max_weight`.

    ::

        L(h) = min over δ ≥ 0 of dpo(h+δ) + λ·δ                               (after arXiv:2406.15568)
             = dpo(h) if h ≥ t, else dpo(t) + λ·(t−h), with t = log((1−λ)/λ)
        w(h) = min(σ(−h), λ)

    δ = max(0, t−h) is by how much the label of a pair is taken to be wrong; pairs below t are the outliers. That it is
    done to DPO is ours: the paper has such outliers in reward learning.

    Args:
        margin: h, the margin of each pair.
        max_weight: λ, in (0, 1). → 1 is DPO; below ½ an undecided pair is an outlier, too. The default is our choice.
    """
    if not 0 < max_weight < 1:
        raise ValueError(f"clipped needs max_weight in (0, 1); got {max_weight}. For the limit max_weight → 1 use dpo.")
    threshold = math.log1p(-max_weight) - math.log(max_weight)
    outlier = -math.log1p(-max_weight) + max_weight * (threshold - margin)  # dpo(t) = −log(1−λ)
    # Not by max and min: both would halve the gradient at h = t, where at λ = ½ every pair starts.
    return torch.where(margin >= threshold, dpo(margin), outlier)


def _check_flip_rate(loss: str, flip_rate: float) -> None:
    if not 0 <= flip_rate < 0.5:
        raise ValueError(
            f"{loss} needs flip_rate in [0, 0.5); got {flip_rate}. At 0.5 the labels carry no information; above it, "
            "swap chosen and rejected and pass 1 - flip_rate."
        )


def _warn_if_contradicted_pairs_lead(loss: str, name: str, value: float) -> None:
    if value < 2:  # w(0) = α(α+2)/(1+α)² is below w(−∞) = 4α/(1+α)² for α < 2
        warnings.warn(
            f"{loss} needs {name} of 2 or more to damp wrong labels; got {value:g}. Below that a fully contradicted "
            "pair weighs more than an undecided one. Use 14, or dpo if the labels are clean.",
            UserWarning,
            stacklevel=3,  # the line that called the loss: the default filter then shows it once per such line
        )
