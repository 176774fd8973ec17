"""Other ways to read a flip rate from margins, to compare ours with.

In: one margin per pair, numpy float64. Out: the rate.

Add an estimator: one function margins -> rate, one line in `ESTIMATORS`, one recovery test at 0, 10 and 30 % flips.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
from jaxtyping import Float
from scipy.optimize import brentq
from scipy.special import expit, logit

from ropo.noise.clusters import PerPair
from ropo.noise.estimate import estimate_flips

Estimator = Callable[[PerPair], float]


def em_temperature(margins: PerPair) -> float:
    """ε of `estimate_flips`; the one to use."""
    return estimate_flips(margins).rate


def em_step(margins: PerPair, rate: float) -> float:
    """One update of the flip rate at fixed, calibrated margins: the mean of P(flipped).

    ::

        w = σ(h + logit η),   η ← mean w,   with the reliability η = 1 − ε               (arXiv:2509.24159, eqs. 2-7)

    Args:
        margins: Margin of each pair.
        rate: ε before the step, in (0, 1).

    Returns:
        ε after the step.
    """
    return float(expit(logit(rate) - margins).mean())


def em(margins: PerPair) -> float:
    """The rate at which `em_step` comes to rest, found as the root of the likelihood's concave derivative.

    Biased upwards by overconfident margins and downwards by underconfident ones. May exceed ½: not cut off, so that
    it shows when the margins point against the labels.
    """
    p_right = expit(np.clip(margins, -36.0, 36.0))  # as sure as a float can be without being certain

    def score(rate: float) -> float:
        return float(np.sum((1.0 - 2.0 * p_right) / (p_right + rate * (1.0 - 2.0 * p_right))))

    if score(0.0) <= 0.0:
        return 0.0
    return 1.0 if score(1.0) >= 0.0 else float(brentq(score, 0.0, 1.0, xtol=1e-14))


def agreement(margins: PerPair) -> float:
    """Compare how often the model agrees with the labels with how often it expects to.

    ::

        a = mean σ(|h|),  A = share of h > 0 (ties count half),  A = a·(1−ε) + (1−a)·ε  ⇒  ε = (a − A)/(2a − 1)

    One line, but needs calibrated margins; falls below 0 when they are underconfident. Not cut off.
    """
    expected = expit(np.abs(margins)).mean()
    agreed = np.mean(margins > 0) + np.mean(margins == 0) / 2
    return float((expected - agreed) / (2 * expected - 1)) if expected > 0.5 else float("nan")


def tied_gaussian(margins: PerPair) -> float:
    """ε of the mixture (1−ε)·N(μ, σ²) + ε·N(−μ, σ²), fitted by expectation maximisation.

    PerpCorrect's two mirrored bells. Exact when the clean margins are Gaussian, too low when they are
    skewed: a long right tail widens σ, and the left bell is then not needed.
    """
    rate, centre, square = 0.25, float(np.mean(np.abs(margins))), float(np.mean(margins**2))
    for _ in range(500):
        variance = max(square - centre**2, 1e-12 * square + 1e-300)
        p_right = expit(2 * centre * margins / variance - logit(rate))
        rate, previous = float(1 - p_right.mean()), rate
        centre = float(np.mean((2 * p_right - 1) * margins))
        if abs(rate - previous) < 1e-12:
            break
    return rate


def holder(margins: PerPair, *, gamma: float = 2.0) -> float:
    """Contamination rate of Hölder-DPO: one minus the total mass that fits the model's density.

    ::

        p = σ(h),   ξ = mean(p)·Σp^γ / Σp^{1+γ},   ε = max(0, 1 − ξ)                       (Hölder-DPO, lemma 4)

    Needs a model trained with the Hölder loss at the same γ; reports 4-17 % on clean but unsharp margins.

    Args:
        margins: Margin of each pair.
        gamma: The loss's γ; larger estimates better and detects worse.

    Returns:
        ε in [0, 1).
    """
    p_right = expit(np.maximum(margins, -700.0))
    return float(max(0.0, 1.0 - p_right.mean() * np.sum(p_right**gamma) / np.sum(p_right ** (1.0 + gamma))))


def area_under_margin(margins_by_check: Float[np.ndarray, "checks pairs"]) -> PerPair:
    """Mean margin of each pair over the times it was scored, high for pairs learned early and kept (arXiv:2001.10528).

    Args:
        margins_by_check: One row per check (a checkpoint, or an epoch's end), one column per pair.

    Returns:
        Mean margin of each pair.
    """
    areas: PerPair = np.asarray(margins_by_check, dtype=np.float64).mean(axis=0)
    return areas


ESTIMATORS: Mapping[str, Estimator] = MappingProxyType(
    {
        "em_temperature": em_temperature,
        "em": em,
        "agreement": agreement,
        "tied_gaussian": tied_gaussian,
        "holder": holder,
    }
)
"""Estimators of the flip rate, the first for use, the others to compare with. All read held-out margins."""
