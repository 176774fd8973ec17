"""The likelihood of labels given margins: the flip rate, and how sure a model is of labels whose margins have one size.

In: margins and their weights, numpy float64. Out: the links that fit the sizes of the margins, and for each a profile
likelihood of the flip rate.

The one idea: if a share ε of the labels is flipped at random, a model contradicts that share however sure it is, while
its honest doubts vanish as margins grow. The contradictions far from zero give ε, those near zero the scale T that
turns margins into log-odds. How fast the doubts vanish is an assumption: the link.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from operator import attrgetter

import numpy as np
from jaxtyping import Bool, Shaped
from scipy.optimize import brentq, minimize, minimize_scalar
from scipy.special import betaln, expit, xlog1py, xlogy
from scipy.stats import chi2

from ropo.noise.shares import PerPair

TAILS: tuple[float, ...] = (np.inf, 16.0, 8.0)
"""Degrees of freedom of Student's t that the model's errors may have; infinite is normal. Errors with heavier tails
than the last (`TOO_HEAVY`) are confident errors that no margin tells from flips: benchmarks/families.py."""

TOO_HEAVY: tuple[float, ...] = (4.0, 2.0)

# In units of 1 / (median margin size): from "no signal" to "only signs count".
_RELATIVE_SCALES = np.geomspace(1e-3, 300.0, 33)
_RATES = np.linspace(0.0, 0.5, 26)


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """How sure a model is of labels whose margins have a given size.

    ::

        logit P(right | h) = (T·h)^power                                  tail = ∞: calibrated, or normal errors
        logit P(right | h) = (ν+1)·artanh(r·2y/(1+y²)),  y = h/peak       tail = ν: Student errors,  r = T·peak/(2ν+2)

    The second is log f(h−μ) − log f(h+μ) of Student's t at scale s, with peak = s·√(ν+μ²/s²) and r = μ/peak: the model
    is surest at `peak`, and larger margins are likelier to be errors.

    Attributes:
        power: 1, or 2 for a model that knows nothing of many pairs and is sure of the others.
        tail: ν.
        peak: In the unit of the margins; infinite for ν = ∞.
    """

    power: float = 1.0
    tail: float = np.inf
    peak: float = np.inf

    def p_right(self, scale: float | np.ndarray, margins: np.ndarray) -> np.ndarray:
        """P(right | h) at T = `scale`, kept above the smallest float so that its logarithm stays finite."""
        if np.isinf(self.tail):
            log_odds = np.sign(margins) * np.abs(scale * margins) ** self.power
        else:
            relative = margins / self.peak
            strength = np.minimum(scale * self.peak / (2 * self.tail + 2), 1.0 - 1e-9)
            log_odds = (self.tail + 1) * np.arctanh(strength * 2 * relative / (1 + relative**2))
        p_right: np.ndarray = expit(np.maximum(log_odds, -700.0))
        return p_right

    def p_flip(self, rate: float | np.ndarray, scale: float, margins: PerPair) -> PerPair:
        """P(flipped | h) = ε·F(−h) / [(1−ε)·F(h) + ε·F(−h)] at ε = `rate`; for F = σ this is σ(logit ε − T·h)."""
        wrong, right = rate * self.p_right(scale, -margins), (1.0 - rate) * self.p_right(scale, margins)
        p_flip: PerPair = wrong / (wrong + right)
        return p_flip


STEEP = Link(power=2.0)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Labelled:
    """Margins, and what is known of their labels; each of shape (pairs,).

    Attributes:
        margins: h, of the labels as the data has them.
        weights: 1 / (number of copies of the pair).
        is_trusted: Which are right labels from elsewhere, no part of the data.
        reviews: Of the others, +1 for labels that were reviewed and are right, −1 if wrong, else 0.
        is_vouched: Which reviewed labels were chosen for being known, whatever their margins.
    """

    margins: PerPair
    weights: PerPair
    is_trusted: Bool[np.ndarray, " pairs"]
    reviews: Shaped[np.ndarray, " pairs"]
    is_vouched: Bool[np.ndarray, " pairs"]

    @property
    def is_known(self) -> Bool[np.ndarray, " pairs"]:
        """Whose label is known."""
        return np.asarray(self.is_trusted | (self.reviews != 0))

    def rate_of_all(self, rate: float) -> float:
        """The share of flipped labels of the data, from that among those which nobody has vouched for."""
        own, vouched = self.weights * ~self.is_trusted, self.weights * self.is_vouched
        if not vouched.any():
            return rate
        num_wrong = vouched[self.reviews < 0].sum()
        return float((rate * (own.sum() - vouched.sum()) + num_wrong) / own.sum())


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """A flip rate, with the scale T that suits it best and the log-likelihood that both reach with a link."""

    rate: float
    scale: float
    log_likelihood: float
    link: Link

    def p_right(self, margins: np.ndarray) -> np.ndarray:
        """P(right | h)."""
        return self.link.p_right(self.scale, margins)


def allowed_links(margins: PerPair, weights: PerPair, level: float) -> list[Link]:
    """The links that the sizes of the margins allow; none if they allow tails that are too heavy.

    If right labels have margins μ + s·(error), the sizes follow the folded law f(x−μ) + f(x+μ) whatever the flip rate.
    A ν is allowed if its best μ and s come within χ²₁(level)/2 of the best of all ν; so is every lighter tail.
    """
    unit = _unit(margins)
    sizes, counts = _binned(np.abs(margins[margins != 0]) / unit, weights[margins != 0])
    if not len(sizes):
        return [Link()]
    peaks, values = zip(*(_folded(sizes, counts, tail) for tail in (*TAILS, *TOO_HEAVY)), strict=True)
    heaviest = int(np.flatnonzero(np.array(values) >= max(values) - chi2.ppf(level, df=1) / 2)[-1])
    if heaviest >= len(TAILS):
        return []
    return [Link(), *(Link(tail=TAILS[i], peak=unit * peaks[i]) for i in range(1, heaviest + 1))]


def _folded(sizes: np.ndarray, counts: np.ndarray, tail: float) -> tuple[float, float]:
    """The peak s·√(ν+μ²/s²) and the log-likelihood of the folded law of one tail that fits the sizes best."""

    def log_density(z: np.ndarray) -> np.ndarray:
        return -(z**2) / 2 if np.isinf(tail) else -(tail + 1) / 2 * np.log1p(z**2 / tail)

    normaliser = np.log(2 * np.pi) / 2 if np.isinf(tail) else betaln(tail / 2, 0.5) + np.log(tail) / 2

    def loss(parameters: np.ndarray) -> float:
        centre, scale = np.exp(parameters)
        with np.errstate(under="ignore"):
            both = np.logaddexp(log_density(sizes / scale - centre), log_density(sizes / scale + centre))
        return float(counts @ (normaliser + np.log(scale) - both))

    starts = ([0.4, -0.5], [-2.0, 0.3])  # two hills, or one about 0
    options = {"method": "Nelder-Mead", "bounds": [(-5.0, 5.0)] * 2, "options": {"xatol": 1e-3, "fatol": 1e-3}}
    best = min((minimize(loss, start, **options) for start in starts), key=attrgetter("fun"))
    centre, scale = np.exp(best.x)
    return float(scale * np.sqrt(tail + centre**2)), -float(best.fun)


class ProfileLikelihood:
    """The log-likelihood of a flip rate at the scale that suits it best, for one link.

    ::

        Σ w·log[(1−ε)·F(T·h) + ε·F(−T·h)]        over labels that nobody has reviewed
      + Σ w·log[(1−ε)·F(T·h)]  or  w·log[ε·F(T·h)]      over reviewed labels, right or wrong; h as it should be
      + Σ w·log F(T·h)                           over trusted pairs, and labels that were vouched for

    Which labels are reviewed may depend on the margins: given those, the choice says nothing of ε or T. Those that are
    vouched for were chosen for being known: they say nothing of ε, which is the rate of all others.
    Margins within a percent of each other are counted together, at their mean: this moves the rate by less than 1e-5
    and makes the cost almost independent of the number of pairs.
    """

    def __init__(self, link: Link, sample: Labelled) -> None:
        margins = np.where(sample.reviews < 0, -sample.margins, sample.margins)
        weights, is_known = sample.weights, sample.is_known
        self.link, self._unit = link, _unit(margins[~sample.is_trusted])
        self._relative_link = replace(link, peak=link.peak / self._unit)
        self._points, self._counts = _binned(margins[~is_known] / self._unit, weights[~is_known])
        self._trusted, self._trusted_counts = _binned(margins[is_known] / self._unit, weights[is_known])
        reviews = np.where(sample.is_vouched, 0, sample.reviews)
        self._num_wrong, self._num_right = weights[reviews < 0].sum(), weights[reviews > 0].sum()
        self.of_coin_flips = -(self._counts.sum() + self._trusted_counts.sum()) * np.log(2.0)
        grid = _RELATIVE_SCALES[:, None]
        self._p_right_grid = self._relative_link.p_right(grid, self._points)
        self._trusted_grid = np.log(self._relative_link.p_right(grid, self._trusted)) @ self._trusted_counts
        self._on_rates = np.array([self._profile(rate)[0] for rate in _RATES])

    def of_reviews(self, rate: float) -> float:
        """What the reviewed labels say of a rate, whatever the margins; 0 without any. Finite at the ends, too."""
        return float(xlogy(self._num_wrong, max(rate, 1e-12)) + xlog1py(self._num_right, -rate))

    def at(self, rate: float) -> Fit:
        """The best scale at a rate, in the margins' own unit."""
        value, scale = self._profile(rate)
        return Fit(rate=rate, scale=scale / self._unit, log_likelihood=value, link=self.link)

    @cached_property
    def best(self) -> Fit:
        """The best rate and scale."""
        # The last of equals: where no rate does better than coin flips, say 50 % and not 0 %.
        top = int(np.flatnonzero(self._on_rates == self._on_rates.max())[-1])
        around = _RATES[[max(top - 1, 0), min(top + 1, len(_RATES) - 1)]]
        inner = minimize_scalar(
            lambda rate: -self._profile(rate)[0], bounds=around, method="bounded", options={"xatol": 1e-7}
        )
        # The bounded search never reaches an end, and an honest 0 % must be 0.
        return self.at(max((float(_RATES[top]), float(inner.x)), key=lambda rate: self._profile(rate)[0]))

    def interval(self, drop: float) -> tuple[float, float]:
        """The lowest and the highest rate whose profile lies at most `drop` below the best one."""
        target = self.best.log_likelihood - drop
        place = int(np.searchsorted(_RATES, self.best.rate))
        rates = np.insert(_RATES, place, self.best.rate)
        inside = np.flatnonzero(np.insert(self._on_rates, place, self.best.log_likelihood) >= target)
        ends = []
        for end, beyond in ((inside[0], inside[0] - 1), (inside[-1], inside[-1] + 1)):
            if 0 <= beyond < len(rates):
                ends.append(brentq(lambda r: self._profile(r)[0] - target, rates[end], rates[beyond], xtol=1e-7))
            else:
                ends.append(rates[end])
        return float(ends[0]), float(ends[1])

    def _profile(self, rate: float) -> tuple[float, float]:
        """Maximise over the scale, 0 included, at one rate: first on a grid, since there may be two hills."""
        top = int(np.argmax(log_label(rate, self._p_right_grid) @ self._counts + self._trusted_grid))
        around = np.log(_RELATIVE_SCALES[[max(top - 1, 0), min(top + 1, len(_RELATIVE_SCALES) - 1)]])
        inner = minimize_scalar(
            lambda log_scale: -self._value(rate, np.exp(log_scale)),
            bounds=around,
            method="bounded",
            options={"xatol": 1e-5},
        )
        on_grid = float(_RELATIVE_SCALES[top])
        value, scale = max((self._value(rate, on_grid), on_grid), (-float(inner.fun), float(np.exp(inner.x))))
        is_better = value > (1 - 1e-12) * self.of_coin_flips  # by more than rounding
        value, scale = (value, scale) if is_better else (self.of_coin_flips, 0.0)
        return value + self.of_reviews(rate), scale

    def _value(self, rate: float, scale: float) -> float:
        link = self._relative_link
        doubtful = self._counts @ log_label(rate, link.p_right(scale, self._points))
        return float(doubtful + self._trusted_counts @ np.log(link.p_right(scale, self._trusted)))


def log_label(rate: float | np.ndarray, p_right: np.ndarray) -> np.ndarray:
    """log[(1−ε)·p + ε·(1−p)], the log-probability of the labels as they are."""
    return np.log(p_right + rate * (1.0 - 2.0 * p_right))


def _unit(margins: np.ndarray) -> float:
    """The median size of the margins that are not 0."""
    size = np.abs(margins)
    return float(np.median(size[size > 0])) if size.any() else 1.0


def _binned(relative: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cells of about equal values with their means and counts, which are sums of weights."""
    size = np.minimum(np.abs(relative), 1e9)
    # 10,000 keeps the signs apart: the logarithm times 100 is above -2,100. Exact zeros stay alone.
    cell = np.sign(relative) * (10_000 + np.rint(100 * np.log(np.maximum(size, 1e-9))))
    _, where = np.unique(cell, return_inverse=True)
    counts = np.bincount(where, weights=weights)
    return np.bincount(where, weights=weights * np.sign(relative) * size) / counts, counts
