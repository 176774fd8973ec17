"""The table of all losses: what each needs, how it is bound to its options, how hard it pushes.

Add a loss: one function in `margin_losses` or `batch_losses`, whose formula block begins with "formula  (source)"; one
line in `LOSSES`, which everything else reads; in the tests its golden rows and a test of the paper's claim.
"""

import functools
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ropo.losses.batch_losses import dr_dpo, gamma_po, plc_dpo, rappo
from ropo.losses.margin_losses import (
    cdpo,
    clipped,
    dpo,
    focalpo,
    forward_corrected,
    hinge,
    holder,
    ipo,
    na,
    rdpo,
    re_po,
    ropo,
    ropo_v1,
    simpo,
)
from ropo.losses.ranges import check_positive
from ropo.spelling import did_you_mean

Loss = Callable[..., Tensor]

# What a loss may read beside the margin, given anew at each call by whoever trains: the name of its argument, and how
# the table of methods calls it. A loss has the argument if it needs the thing.
INPUTS: Mapping[str, str] = MappingProxyType(
    {
        "reliability": "learned reliability",
        "moments": "moving moments of margins",
        "progress": "progress of training",
        "reference_ratio": "ratio under the reference",
        "weight": "weights of pairs",
    }
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
        needs_whole_batch: Whether `margin` must hold all pairs of an optimizer step, over all processes.
    """

    fn: Loss
    when: str
    needs_reference: bool = True
    needs_flip_rate: bool = False
    per_token: bool = False
    needs_whole_batch: bool = False

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
        """Names of its options. `beta` is the margin's; inputs are none, but for `reliability`: it has a start."""
        parameters = inspect.signature(self.fn).parameters.values()
        named = (parameter for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY)
        return tuple(p.name for p in named if p.name not in {"beta", *INPUTS} - {"reliability"})

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of what it reads beside the margin and its options, all of them in `INPUTS`."""
        return tuple(name for name in inspect.signature(self.fn).parameters if name in INPUTS)

    @property
    def is_per_pair(self) -> bool:
        """Whether the loss of a pair follows from its margin and the options alone."""
        return not (self.needs_whole_batch or self.inputs)

    def default(self, param: str) -> float | None:
        """Default of an option; None if it must be given."""
        default = inspect.signature(self.fn).parameters[param].default
        return None if default is inspect.Parameter.empty else float(default)

    def _first_line(self) -> list[str]:
        block = (inspect.getdoc(self.fn) or "").partition("::\n\n")[2]
        return re.split(r" {2,}", block.strip().partition("\n")[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class BoundLoss:
    """A loss with β and its options; call it with `margin`.

    Attributes:
        name: A name in `LOSSES`.
        beta: The β of the margin, per nat.
        options: Options that were given, by name; the others have their defaults.
        fn: The loss of the table with its options bound.
        sft_weight: Of `sft`, which whoever trains adds to it.
    """

    name: str
    beta: float
    options: Mapping[str, float]
    fn: Loss = field(repr=False, compare=False)
    sft_weight: float = 0.0

    def __call__(self, margin: Float[Tensor, " pairs"], **inputs: Any) -> Float[Tensor, " pairs"]:
        """Loss of each pair, not reduced; `inputs` are those of `LossSpec.inputs`."""
        return self.fn(margin, **inputs)

    @property
    def spec(self) -> LossSpec:
        """What the table says of it."""
        return LOSSES[self.name]


def bind_loss(name: str, *, beta: float, options: Mapping[str, Any]) -> BoundLoss:
    """Bind a loss to its options, refusing before any model is loaded what the loss would ignore or cannot use.

    Args:
        name: A name in `LOSSES`.
        beta: The β of the margin, per nat. Positive.
        options: The options that the user gave; those left out keep their defaults.

    Returns:
        The loss; called with `margin`, and its inputs (`LossSpec.inputs`) if they are known.

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
    check_positive(name, "beta", beta, "Usual are 0.01 to 0.5, for simpo 2 to 10.")
    bound: dict[str, float] = {}
    for option, value in options.items():
        if option not in spec.params:
            raise ValueError(_explain_unknown_option(name, option))
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise TypeError(f"{name} needs a number for {option}; got {value!r}. Write it without quotes, such as 0.1.")
        bound[option] = float(value)
    for param in spec.params:
        if param not in bound and spec.default(param) is None:
            where = "--alpha NUMBER" if param == "alpha" else f"--loss_args {param}=NUMBER"  # alpha may be a text, too
            raise ValueError(f"{name} needs {param}; got none. No default suits all data: add {where}.")
    given = bound | ({"beta": float(beta)} if "beta" in inspect.signature(spec.fn).parameters else {})
    loss = BoundLoss(name=name, beta=float(beta), options=bound, fn=functools.partial(spec.fn, **given))
    loss(torch.zeros(1))  # each loss knows its own ranges, and one pair is enough to hear of them
    return loss


_IN_TRL = {"sigmoid": "dpo", "robust": "rdpo"}  # what users of TRL type, and our name


def _find(name: str) -> LossSpec:
    if name not in LOSSES:
        close = f" It is {_IN_TRL[name]} here." if name in _IN_TRL else did_you_mean(name, LOSSES)
        raise ValueError(f"loss needs a known name; got {name!r}.{close} Choose one of: {', '.join(LOSSES)}.")
    return LOSSES[name]


def _explain_unknown_option(name: str, option: str) -> str:
    params = LOSSES[name].params
    rule = f"options among {', '.join(params)}" if params else "no options"
    takers = ", ".join(other for other, spec in LOSSES.items() if option in spec.params)
    close = did_you_mean(option, params)
    other = f", or choose a loss that takes it: {takers}" if takers else ""
    return f"{name} needs {rule}; got {option}.{close} Leave it out{other}."


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
    columns = ("loss", "formula", "paper", "needs", "options", "when to use it")
    rows = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, spec in LOSSES.items():
        true_fields = (one.name for one in fields(spec) if getattr(spec, one.name) is True)
        needs = [*(name.removeprefix("needs_").replace("_", " ") for name in true_fields)]
        needs += [INPUTS[name] for name in spec.inputs]
        defaults = ((param, spec.default(param)) for param in spec.params)
        options = ", ".join(f"`{param}`" + ("" if value is None else f" = {value:g}") for param, value in defaults)
        rows.append(f"| `{name}` | {spec.formula} | {spec.paper} | {', '.join(needs)} | {options} | {spec.when} |")
    legend = (
        "h: margin; m: margin per token; σ: logistic function; ε: `flip_rate`; η: `reliability`; α: `alpha`; "
        "γ: `gamma`, `target_margin`, `holder_gamma`, `focal_gamma`; γ₀: `mean_target_margin`; λ: `max_weight`; "
        "a: share of the correction; q: chances that a label is right, flipped, a tie (in rappo: `num_dropped`); "
        "β: `beta`; β′: `beta_prime`; B: pairs of an optimizer step."
    )
    how = (
        "Options other than `alpha` are given together: `--loss_args mean_target_margin=0.5,evenness=2` on the command "
        "line, `loss_args: {mean_target_margin: 0.5, evenness: 2}` in YAML, a mapping in Python."
    )
    return "\n".join([*rows, "", legend, "", how, ""])


LOSSES: Mapping[str, LossSpec] = MappingProxyType(
    {
        "ropo": LossSpec(
            fn=ropo, when="Noise of unknown rate, beside a filter. Not alone: the policy drifts far from the reference."
        ),
        "ropo_v1": LossSpec(fn=ropo_v1, when="To reproduce the first version. Otherwise ropo, with an option less."),
        "na": LossSpec(fn=na, when="Heavy noise and a good start. Not from a poor start: what it gets wrong is lost."),
        "dpo": LossSpec(fn=dpo, when="Clean labels. Not for noisy ones: wrong labels pull hardest."),
        "cdpo": LossSpec(fn=cdpo, needs_flip_rate=True, when="A little noise. Not for much: it shrinks every margin."),
        "rdpo": LossSpec(fn=rdpo, needs_flip_rate=True, when="A known rate. Not for long training: unbounded below."),
        "forward_corrected": LossSpec(
            fn=forward_corrected, needs_flip_rate=True, when="A known rate. Not one set too high: hard pairs are lost."
        ),
        "re_po": LossSpec(fn=re_po, when="Unequal annotators. Not over-confident margins."),
        "plc_dpo": LossSpec(fn=plc_dpo, when="Flips and ties together. Not for short training: it starts as dpo."),
        "holder": LossSpec(fn=holder, when="Heavy noise, to let go of contradicted pairs. Not from a poor start."),
        "focalpo": LossSpec(fn=focalpo, when="Clean labels, some too hard. Not for flips: it damps them too little."),
        "clipped": LossSpec(fn=clipped, when="Rare gross errors. Not for many flips: each still pulls with λ."),
        "dr_dpo": LossSpec(fn=dr_dpo, needs_whole_batch=True, when="Outliers in large batches. Not for small batches."),
        "gamma_po": LossSpec(
            fn=gamma_po, needs_whole_batch=True, when="Ambiguous pairs. Not for flips: what is contradicted pulls hard."
        ),
        "rappo": LossSpec(
            fn=rappo, needs_whole_batch=True, when="A few gross errors and a good reference. Not for heavy noise."
        ),
        "ipo": LossSpec(fn=ipo, when="Clean labels that dpo overfits. Not with outliers: their weight is unbounded."),
        "hinge": LossSpec(fn=hinge, when="To stop at a fixed margin. Not where margins should tell confidence."),
        "simpo": LossSpec(
            fn=simpo, needs_reference=False, per_token=True, when="No memory for a reference. Not for noisy labels."
        ),
    }
)
