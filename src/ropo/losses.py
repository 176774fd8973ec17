"""What a pair costs: every per-pair loss as a pure function of its margin, and the table of them all.

In: the margin h of each pair (`pairs.margin`; for `simpo` the margin m of `pairs.margin_per_token`).
Out: the loss of each pair, not reduced; or its gradient weight w(h) = −dL/dh, the force that pushes the margin up.

The one idea: flipping a label maps h to −h, so all that label noise does to a loss can be read off its curve. How hard
a fully contradicted pair (h → −∞) still pulls decides how much harm a wrong label does.

What all losses promise, so that none repeats it: they take `margin` and options by keyword, return the loss per pair,
not reduced, and refuse an option outside its range with a `ValueError` that says what to do instead.

Add a loss: one function here, whose formula block begins with "formula  (source)"; one line in `LOSSES`, which
everything else reads; in the tests its golden rows and a test of the paper's claim.
"""

import difflib
import functools
import inspect
import math
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

Loss = Callable[..., Tensor]


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
            → ∞ is 4·na. Warns at 2 or less: a fully contradicted pair then weighs at least as much as an undecided one.

    Examples:
        >>> ropo(torch.tensor([-5.0, 0.0, 3.0]))
        tensor([4.7072, 1.9147, 0.1773])
    """
    _check_positive("ropo", "alpha", alpha, "The paper uses 14; for the limits use dpo (alpha → 0) or na (alpha → ∞).")
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
        gamma: γ, scale of the DPO part. Positive. Warns if alpha / gamma is 2 or less, for the reason given in `ropo`.
    """
    _check_positive("ropo_v1", "alpha", alpha, "Without the noise-aware part use dpo.")
    _check_positive("ropo_v1", "gamma", gamma, "Without the DPO part use na.")
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
    _check_positive("ipo", "beta", beta, "Pass the beta that the margins were made with.")
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


def dr_dpo(
    margin: Float[Tensor, " pairs"], *, beta_prime: float = 1.0, gathered: Float[Tensor, " all_pairs"] | None = None
) -> Float[Tensor, " pairs"]:
    """Dr.DPO: a loss of the whole batch that trusts pairs by how well they fit.

    ::

        L = −β′·log[(1/B)·Σᵢ exp(−dpo(hᵢ)/β′)]                                (arXiv:2407.07880)
        −∂L/∂hᵢ = ωᵢ·σ(−hᵢ) with ω = softmax(−dpo(h)/β′)

    Each pair is given the value L, which says nothing about that pair, and the gradient B·ωᵢ·∇dpo(hᵢ): the **mean over
    the batch** then has the value and the gradient of L.

    The batch must be the global one, all pairs of an optimizer step. If it is spread over processes or accumulation
    steps, pass each part as `margin` and everything as `gathered`, from which B and ω then come. The means over parts,
    weighted by size if sizes differ, average to the mean over the batch, and so do their gradients.

    Args:
        margin: h, the margin of each pair that is here.
        beta_prime: β′, positive. → ∞ is the mean of DPO, → 0 follows the best-fitting pair alone. The authors use 1.
        gathered: Margins of the whole global batch, those in `margin` among them; no gradient flows into it.

    Returns:
        L for each pair, with gradients as above; take the mean.

    Examples:
        >>> batch = torch.tensor([-5.0, -1.0, 0.0, 0.5, 3.0])
        >>> round(dr_dpo(batch).mean().item(), 4), round(dpo(batch).mean().item(), 4)
        (0.7547, 1.5072)
    """
    _check_positive("dr_dpo", "beta_prime", beta_prime, "The authors use 1; for the limit beta_prime → ∞ use dpo.")
    batch = (margin if gathered is None else gathered).detach()
    if len(batch) < len(margin):
        raise ValueError(
            f"dr_dpo needs gathered to hold the global batch; got {len(batch)} pairs for {len(margin)} here. "
            "Gather the margins of all processes and accumulation steps, these included."
        )
    loss = dpo(margin)
    log_sum = torch.logsumexp(-dpo(batch) / beta_prime, dim=0)
    share = torch.exp(-loss.detach() / beta_prime - log_sum)
    batch_loss = beta_prime * (math.log(len(batch)) - log_sum)
    return batch_loss + len(batch) * share * (loss - loss.detach())


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
    _check_positive("holder", "holder_gamma", holder_gamma, "The paper uses 2.")
    # L = −p^γ·(1 + γ·(1−p)) with p^γ from log p: a power of an underflown p has no finite gradient.
    return -torch.exp(-holder_gamma * dpo(margin)) * (1 + holder_gamma * na(margin))


def _check_flip_rate(loss: str, flip_rate: float) -> None:
    if not 0 <= flip_rate < 0.5:
        raise ValueError(
            f"{loss} needs flip_rate in [0, 0.5); got {flip_rate}. At 0.5 the labels carry no information; above it, "
            "swap chosen and rejected and pass 1 - flip_rate."
        )


def _check_positive(loss: str, name: str, value: float, advice: str) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{loss} needs a finite {name} > 0; got {value}. {advice}")


def _warn_if_contradicted_pairs_lead(loss: str, name: str, value: float) -> None:
    if value <= 2:  # w(0) = α(α+2)/(1+α)² exceeds w(−∞) = 4α/(1+α)² only for α > 2
        warnings.warn(
            f"{loss} needs {name} > 2 to damp wrong labels; got {value:g}. At 2 or less a fully contradicted pair gets "
            "at least the weight of an undecided one. Use 14, or dpo if the labels are clean.",
            UserWarning,
            stacklevel=3,  # the line that called the loss: the default filter then shows it once per such line
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LossSpec:
    """A loss and what one has to know to use it.

    Attributes:
        fn: Margins of shape (pairs,) in, losses of shape (pairs,) out.
        when: When to use it, and when not.
        needs_reference: Whether its margin compares with a reference model.
        needs_flip_rate: Whether it must be told the share of wrong labels.
        per_token: Whether it works on `margin_per_token` instead of `margin`.
        needs_whole_batch: Whether it must see all pairs of an optimizer step at once.
        learns_reliability: Whether its `reliability` is to be learned during training.
    """

    fn: Loss
    when: str
    needs_reference: bool = True
    needs_flip_rate: bool = False
    per_token: bool = False
    needs_whole_batch: bool = False
    learns_reliability: bool = False

    @property
    def formula(self) -> str:
        """The loss in the paper's symbols: how the formula block of its docstring begins."""
        return self._first_line()[0]

    @property
    def paper(self) -> str:
        """Where the formula comes from: what stands in brackets after it."""
        return self._first_line()[1].strip("()")

    @property
    def params(self) -> tuple[str, ...]:
        """Names of its own options; `beta` belongs to the margin and `gathered` to the batch."""
        parameters = inspect.signature(self.fn).parameters.values()
        names = (parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY)
        return tuple(name for name in names if name not in ("beta", "gathered"))

    def default(self, param: str) -> float | None:
        """Default of an option; None if it must be given."""
        default = inspect.signature(self.fn).parameters[param].default
        return None if default is inspect.Parameter.empty else float(default)

    def _first_line(self) -> list[str]:
        block = (inspect.getdoc(self.fn) or "").partition("::\n\n")[2]
        return re.split(r" {2,}", block.strip().partition("\n")[0])


def bind_loss(name: str, *, beta: float, options: Mapping[str, Any]) -> Loss:
    """Bind a loss to its options, refusing before any model is loaded what the loss would ignore or cannot use.

    Args:
        name: A name in `LOSSES`.
        beta: The β of the margin, per nat. Positive.
        options: The options that the user gave; those left out keep their defaults.

    Returns:
        The loss as a function of `margin`; `gathered` (dr_dpo) and `reliability` (re_po) may be given at each call.

    Raises:
        ValueError: If the name is unknown, or an option is unknown to this loss, missing or out of range.
        TypeError: If an option is not a number.

    Examples:
        >>> bind_loss("rdpo", beta=0.1, options={"flip_rate": 0.1})(torch.tensor([0.12]))
        tensor([0.6199])
        >>> bind_loss("dpo", beta=0.1, options={"alpha": 14.0})
        Traceback (most recent call last):
        ValueError: dpo needs no options; got alpha. Leave it out, or choose a loss that takes it: ropo, ropo_v1.
    """
    spec = _find(name)
    _check_positive(name, "beta", beta, "Usual are 0.01 to 0.5, for simpo 2 to 10.")
    bound: dict[str, float] = {"beta": float(beta)} if "beta" in inspect.signature(spec.fn).parameters else {}
    for option, value in options.items():
        if option not in spec.params:
            raise ValueError(_explain_unknown_option(name, option))
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise TypeError(f"{name} needs a number for {option}; got {value!r}. Write it without quotes, such as 0.1.")
        bound[option] = float(value)
    for param in spec.params:
        if param not in bound and spec.default(param) is None:
            raise ValueError(f"{name} needs {param}; got none. Give it a number: no default suits all data.")
    loss = functools.partial(spec.fn, **bound)
    loss(torch.zeros(1))  # each loss knows its own ranges, and one pair is enough to hear of them
    return loss


def _find(name: str) -> LossSpec:
    if name not in LOSSES:
        close = "".join(f"Did you mean {known}? " for known in difflib.get_close_matches(name, LOSSES, n=1))
        raise ValueError(f"loss needs a known name; got {name!r}. {close}Choose one of: {', '.join(LOSSES)}.")
    return LOSSES[name]


def _explain_unknown_option(name: str, option: str) -> str:
    params = LOSSES[name].params
    rule = f"options among {', '.join(params)}" if params else "no options"
    close = "".join(f"Did you mean {param}? " for param in difflib.get_close_matches(option, params, n=1))
    takers = ", ".join(other for other, spec in LOSSES.items() if option in spec.params) or "none"
    return f"{name} needs {rule}; got {option}. {close}Leave it out, or choose a loss that takes it: {takers}."


def gradient_weight(
    loss: str | Loss, margin: Float[Tensor, " pairs"], **params: float | Tensor
) -> Float[Tensor, " pairs"]:
    """How hard each pair pushes its margin up: w(h) = −dL/dh.

    Args:
        loss: A name in `LOSSES`, or what `bind_loss` returned.
        margin: h, the margin of each pair (m for simpo).
        **params: Options of the loss, and `beta` for ipo, as far as they are not bound.

    Returns:
        Weight per pair, negative where the loss pulls the margin down. For dr_dpo B times −∂L/∂hᵢ: its mean compares.

    Examples:
        >>> gradient_weight("ropo", torch.tensor([-1000.0, 0.0, 1000.0]))
        tensor([0.2489, 0.9956, 0.0000])
    """
    fn = _find(loss).fn if isinstance(loss, str) else loss
    with torch.enable_grad():  # weights are logged during evaluation, too
        leaf = margin.detach().requires_grad_()
        (slope,) = torch.autograd.grad(fn(leaf, **params).sum(), leaf)
    return -slope


def methods_table() -> str:
    """Write `LOSSES` as a table in Markdown, with a legend of its symbols."""
    rows = ["| loss | formula | paper | needs | options | when to use it |", "|---|---|---|---|---|---|"]
    for name, spec in LOSSES.items():
        true_fields = (field.name for field in fields(spec) if getattr(spec, field.name) is True)
        needs = ", ".join(need.removeprefix("needs_").replace("_", " ") for need in true_fields)
        defaults = ((param, spec.default(param)) for param in spec.params)
        options = ", ".join(f"`{param}`" + ("" if value is None else f" = {value:g}") for param, value in defaults)
        rows.append(f"| `{name}` | {spec.formula} | {spec.paper} | {needs} | {options} | {spec.when} |")
    legend = (
        "h: margin; m: margin per token; σ: logistic function; ε: `flip_rate`; η: `reliability`; α: `alpha`; "
        "γ: `gamma`, `target_margin`, `holder_gamma`; β: `beta`; β′: `beta_prime`; B: pairs of an optimizer step."
    )
    return "\n".join([*rows, "", legend, ""])


LOSSES: Mapping[str, LossSpec] = MappingProxyType(
    {
        "ropo": LossSpec(fn=ropo, when="Noise of unknown rate. Not for clean labels, from which dpo learns more."),
        "ropo_v1": LossSpec(fn=ropo_v1, when="To reproduce the first version. Otherwise ropo, with an option less."),
        "na": LossSpec(fn=na, when="Heavy noise and a good start. Not from a poor start: what it gets wrong is lost."),
        "dpo": LossSpec(fn=dpo, when="Clean labels. Not for noisy ones: wrong labels pull hardest."),
        "cdpo": LossSpec(fn=cdpo, needs_flip_rate=True, when="A little noise. Not for much: it shrinks every margin."),
        "rdpo": LossSpec(fn=rdpo, needs_flip_rate=True, when="A known rate. Not for long training: unbounded below."),
        "forward_corrected": LossSpec(
            fn=forward_corrected, needs_flip_rate=True, when="A known rate. Not one set too high: hard pairs are lost."
        ),
        "re_po": LossSpec(fn=re_po, learns_reliability=True, when="Unequal annotators. Not over-confident margins."),
        "holder": LossSpec(fn=holder, when="Heavy noise, to let go of contradicted pairs. Not from a poor start."),
        "dr_dpo": LossSpec(fn=dr_dpo, needs_whole_batch=True, when="Outliers in large batches. Not for small batches."),
        "ipo": LossSpec(fn=ipo, when="Clean labels that dpo overfits. Not with outliers: their weight is unbounded."),
        "hinge": LossSpec(fn=hinge, when="To stop at a fixed margin. Not where margins should tell confidence."),
        "simpo": LossSpec(
            fn=simpo, needs_reference=False, per_token=True, when="No memory for a reference. Not for noisy labels."
        ),
    }
)
