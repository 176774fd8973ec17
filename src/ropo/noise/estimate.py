"""How many labels are flipped, and which: a small likelihood over the margins, given only where it fits.

In: one margin per pair, numpy float64; who labelled it, whether it is trusted, which pairs are copies and what the
errors may depend on, where that is known. Out: `FlipEstimate`: a rate with an interval, or an upper bound.

The one idea: if a share ε of the labels is flipped at random, a model contradicts that share however sure it is, while
its honest doubts vanish as margins grow. The contradictions far from zero give ε, those near zero the scale T that
turns margins into log-odds. How fast the doubts vanish is an assumption. It is tested, and where it fails the largest
margins still give an upper bound, which needs no model.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from enum import Enum
from functools import cached_property
from operator import attrgetter
from typing import Any

import numpy as np
from jaxtyping import Float, Shaped
from scipy.optimize import brentq, minimize, minimize_scalar
from scipy.special import betaln, expit, xlog1py, xlogy
from scipy.stats import beta, chi2

from ropo.noise.clusters import Clusters, PerPair, cluster_weights, within

MIN_PAIRS = 50
"""Below this the chi-square approximation behind the interval is not worth trusting."""

MIN_SIGNAL = 25.0
"""Twice the log-likelihood that must be gained over coin-flip labels. Where it is less, few flips and a weak model pass
for many flips and a sure one: without this bar benchmarks/families.py has four more narrow intervals of calibrated
margins at accuracies .63 and .72, and none of them holds the truth."""

MAX_WIDTH = 0.25
"""Whoever guesses 1/4 without data is wrong by 1/8 on average over [0, 1/2]. A wider interval is no better."""

TAILS: tuple[float, ...] = (np.inf, 16.0, 8.0)
"""Degrees of freedom of Student's t that the model's errors may have; infinite is normal. Errors with heavier tails
than the last (`TOO_HEAVY`) are sure errors that no margin tells from flips: benchmarks/families.py."""

TOO_HEAVY: tuple[float, ...] = (4.0, 2.0)

MISFIT_LEVEL = 0.05
"""Share of the data sets that fit which are refused for the shape of their agreement curve."""

NUM_BINS, NUM_LEVELS, NUM_SETS = 10, 3, 5
"""The agreement curve is tested in so many bins of margin sizes, each cut in so many levels of the covariate; the upper
bound is the least over so many sets of pairs: all, the half with the largest margins, a quarter, ..."""

PRIOR_PAIRS = 20.0
"""An annotator's rate is drawn towards that of all by as much as so many pairs would."""

# In units of 1 / (median margin size): from "no signal" to "only signs count".
_RELATIVE_SCALES = np.geomspace(1e-3, 300.0, 33)
_RATES = np.linspace(0.0, 0.5, 26)


class Obstacle(Enum):
    """Why no rate is given, and what to do about it."""

    TOO_FEW = "There are too few pairs to estimate a rate. Score some hundreds."
    ONE_SIZE = "All margins have the same size. Score the pairs with a model that has been trained on such pairs."
    REVERSED = "The model contradicts most labels. Check whether chosen and rejected are swapped."
    NO_SIGNAL = "The margins do not follow the labels. Train the scoring model longer, or on more pairs."
    HEAVY_TAILS = "The largest margins may be errors of the model. Review the pairs that it contradicts most surely."
    MISFIT = "Agreement with the labels does not grow with the margins as assumed. Review the most contradicted pairs."
    WIDE = "Too many rates explain the margins about equally well. Score more pairs, or train the scoring model longer."


@dataclass(frozen=True, slots=True, kw_only=True)
class AnnotatorRate:
    """How often one annotator is wrong.

    Attributes:
        name: As the data names them.
        num_pairs: Labels they gave.
        rate: Share of their labels that is flipped, in [0, 1], drawn towards the rate of all by `PRIOR_PAIRS` pairs.
            Above one half their labels mean the opposite.
        low: Lower end of the interval.
        high: Upper end of the interval.
    """

    name: str
    num_pairs: int
    rate: float
    low: float
    high: float


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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FlipEstimate:
    """How many labels are flipped, how sure that is, and how suspicious each pair is.

    Attributes:
        rate: ε, the share of flipped labels with the highest likelihood, in [0, 0.5], trusted pairs not counted. Do not
            act on it unless `is_informative`.
        low: Lower end of the interval; 0 where the estimate is not informative.
        high: Upper end of the interval; where the estimate is not informative an upper bound of the rate, which holds
            with probability (1 + level)/2 if flips do not depend on the margin's size.
        level: Nominal coverage of the interval.
        scale: T, by which margins are multiplied to become log-odds, near 0; below 1 for an overconfident model.
            0 when nothing fits better than coin flips; never above 300 / (median size of a margin), which is reached
            when only the signs of the margins matter.
        link: How log-odds grow with the margin, the form that fits best.
        p_flip: P(the label of this pair is flipped), shape (pairs,). 0 for trusted pairs, and for all when `rate` is 0:
            rank suspects by margin then.
        obstacle: Why the rate cannot be told; None if it can.
        num_pairs: Number of margins.
        num_different: The same with copies counted once, trusted pairs left out.
        num_trusted: How many of the margins are of trusted pairs.
        annotators: The rate of each annotator, the worst first; empty where the data names fewer than two.
    """

    rate: float
    low: float
    high: float
    level: float
    scale: float
    link: Link
    p_flip: PerPair
    obstacle: Obstacle | None
    num_pairs: int
    num_different: int
    num_trusted: int = 0
    annotators: tuple[AnnotatorRate, ...] = ()

    @property
    def is_informative(self) -> bool:
        """Whether the margins can tell the rate."""
        return self.obstacle is None

    @property
    def reason(self) -> str:
        """Why it is or is not informative, and what to do about it, in one to four sentences."""
        if self.obstacle is None:
            said = f"The margins place the flip rate between {_percent(self.low)} and {_percent(self.high)}."
        else:
            said = f"At most {_percent(self.high)} of the labels are flipped. {self.obstacle.value}"
        num_doubtful = self.num_pairs - self.num_trusted
        if self.num_different < num_doubtful:
            said += f" Copies count once: {num_doubtful} pairs count as {self.num_different}."
        return said

    def p_flip_at(self, margins: PerPair, *, rate: float | None = None) -> PerPair:
        """P(flipped) of other margins of the same model, at the overall rate or another one; shape of `margins`."""
        return _posterior(self.rate if rate is None else rate, self.scale, self.link, margins)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the value per pair, as plain values for JSON."""
        names = ("rate", "low", "high", "level", "scale", "is_informative", "reason", "num_pairs", "num_trusted")
        return {
            **{name: getattr(self, name) for name in names},
            "obstacle": None if self.obstacle is None else self.obstacle.name,
            "tail": None if np.isinf(self.link.tail) else self.link.tail,
            "annotators": [asdict(one) for one in self.annotators],
        }


def check_margins(margins: np.ndarray, *, what: str) -> PerPair:
    """Refuse margins that are not one finite number per pair.

    Args:
        margins: Margin of each pair.
        what: Who needs them, to begin the sentence with.

    Returns:
        The same as float64.

    Raises:
        ValueError: If the shape is not (pairs,), there are none, or one is NaN or infinite.
    """
    margins = np.asarray(margins, dtype=np.float64)
    if margins.ndim != 1 or not len(margins):
        raise ValueError(
            f"{what} needs margins of shape (pairs,), at least one; got {margins.shape}. Pass one per pair."
        )
    bad = np.flatnonzero(~np.isfinite(margins))
    if len(bad):
        first = ", ".join(str(index) for index in bad[:10]) + (", ..." if len(bad) > 10 else "")
        raise ValueError(
            f"{what} needs finite margins; got {len(bad)} that are not, at positions {first}. "
            "Look at these pairs: an empty response or a diverged model gives such values."
        )
    return margins


def estimate_flips(
    margins: np.ndarray,
    *,
    level: float = 0.90,
    annotators: Sequence[str | None] | None = None,
    is_trusted: np.ndarray | None = None,
    is_wrong: np.ndarray | None = None,
    rate: float | None = None,
    clusters: Clusters | None = None,
    covariate: np.ndarray | None = None,
) -> FlipEstimate:
    """Estimate the flip rate by maximum likelihood in rate, scale and link; give a bound where no link fits.

    ::

        maximise over ε in [0, ½], T > 0, links F:    Σ w·log[(1−ε)·F(T·h) + ε·F(−T·h)]
        p_flip = ε·F(−T·h) / [(1−ε)·F(T·h) + ε·F(−T·h)]             for the logistic F = σ:  σ(logit ε − T·h)

    With F = σ and T = 1 this is the fixed point of RE-PO's reliability update (arXiv:2509.24159, eqs. 2-7), which is
    right for calibrated margins only; the temperature makes it right for over- and underconfident ones as well. The
    interval is the profile likelihood's, all ε whose best T comes within χ²₁(level)/2 of the maximum, cut off at 0 and
    ½: of the best link, together with those of all links whose maximum comes as near to that of the best.

    **Links.** If right labels have margins μ + s·(error), log-odds are linear in h for normal errors. For Student
    errors they rise to a peak and fall again (`Link`), so large margins are errors as well. How large margins are does
    not depend on ε: the folded Student law that fits |h| tells which ν in `TAILS` are possible, and where the peak is.
    If ν in `TOO_HEAVY` is possible, no rate is given. A link of power 2 widens the interval only.

    **Fit.** The share of contradicted labels in `NUM_BINS` bins of |h|, each cut by levels of the covariate, is
    compared with the best link by χ². So errors that depend on the covariate at the same |h| are seen.

    **Bound.** Where no rate is given, `high` is an upper bound that needs no link. In every set S of pairs chosen by
    |h|

    ::

        P(contradicted | S) = (1−ε)·(1−q) + ε·q = ε + (1−q)·(1−2ε) ≥ ε        q = P(model is right | S), ε ≤ ½

    so ε is at most the least of the upper confidence limits (Clopper-Pearson) over nested sets of the largest margins,
    each at (1−level)/2 / `NUM_SETS`. It holds for any q if flips depend neither on |h| nor on whether the model is
    right. Where q comes to 1 these pairs are the anchor points of Liu & Tao (2016), see also Scott (2015).

    Trusted pairs enter with ε = 0: they show how often the model contradicts right labels. Annotators get rates of
    their own at the T and link of all, and `p_flip` uses them.

    Copies of a pair are one piece of evidence: w is 1 / (size of its cluster), so data given twice has the interval of
    data given once. For the rate of an annotator their labels alone are counted, and only their own copies are copies.

    What surprises:

    - **The margins must come from a model that was not trained on the pair.** One that has memorised its pairs agrees
      with flipped labels too; the estimate is then near 0, and nothing in the margins can reveal it.
    - A share of right labels that the model contradicts however sure it is, among margins that are not larger than the
      others, counts as flips. Trusted pairs can show it: the estimate is then refused.
    - Close to zero the likelihood knows only the product (1−2ε)·T: weak margins are not informative.

    Args:
        margins: Held-out margin h of each pair, in any unit: multiplying all by a constant changes only `scale`.
        level: Nominal coverage of the interval, in (0, 1).
        annotators: Who labelled each pair; None where unknown.
        is_trusted: Whose margins are those of a label that is known to be right, shape (pairs,), bool.
        is_wrong: Which of these pairs the data labels the other way round, so that their annotators were wrong.
        rate: The flip rate where it is known, in [0, 0.5]; then only scale and link are fitted, and the interval is
            this point.
        clusters: A name for each pair, the same for copies of one pair, such as `ropo.data.validate.text_id`; every
            pair is taken for another one by default.
        covariate: What the model's errors may depend on, shape (pairs,), such as the log of the number of response
            tokens. Only its order matters.

    Returns:
        The estimate. It may say "at most": ask `is_informative` first.

    Raises:
        ValueError: If a margin (the positions are named) or the covariate is not finite, `level` is outside (0, 1), the
            lengths differ, or every pair is trusted.

    Examples:
        >>> rng = np.random.default_rng(0)
        >>> clean = rng.normal(2.0, 1.0, size=2000)
        >>> found = estimate_flips(np.where(rng.random(2000) < 0.2, -clean, clean))
        >>> found.is_informative, found.low < 0.2 < found.high
        (True, True)
    """
    margins = check_margins(margins, what="estimate_flips")
    if not 0.0 < level < 1.0:
        raise ValueError(f"estimate_flips needs level in (0, 1); got {level}. 0.9 asks for a 90 % interval.")
    trusted = np.zeros(len(margins), dtype=bool) if is_trusted is None else np.asarray(is_trusted, dtype=bool)
    per_pair = {
        "is_trusted": trusted,
        "is_wrong": is_wrong,
        "annotators": annotators,
        "clusters": clusters,
        "covariate": covariate,
    }
    for name, given in per_pair.items():
        if given is not None and len(given) != len(margins):
            raise ValueError(f"estimate_flips needs one entry of {name} per margin, {len(margins)}; got {len(given)}.")
    if trusted.all():
        raise ValueError("estimate_flips needs a pair that is not trusted; got none. There is nothing to estimate.")
    if covariate is not None and not np.isfinite(covariate).all():
        raise ValueError(
            "estimate_flips needs a finite covariate; got NaN or infinity. Leave it out if it is not known."
        )
    doubtful, weights = margins[~trusted], cluster_weights(clusters, len(margins))
    own = weights[~trusted]
    links, is_heavy = _links(doubtful, own, level)
    *fits, steep = (_ProfileLikelihood(doubtful, margins[trusted], link, own, weights[trusted]) for link in links)
    fixed, best = rate, max((fit.best if rate is None else fit.law(rate) for fit in fits), key=attrgetter("value"))
    rate, drop = best.rate, float(chi2.ppf(level, df=1)) / 2
    near = [fit for fit in (*fits, steep) if fit.best.value >= best.value - drop] if fixed is None else []
    ends = [(rate, rate), *(fit.interval(drop) for fit in near)]
    low, high = min(end[0] for end in ends), max(end[1] for end in ends)
    obstacle = _obstacle(doubtful, own, signal=2.0 * (best.value - fits[0].no_signal), width=high - low)
    if obstacle is None and is_heavy:
        obstacle = Obstacle.HEAVY_TAILS
    levels = None if covariate is None else np.asarray(covariate, dtype=np.float64)[~trusted]
    if obstacle is None and _p_fit(doubtful, own, levels, best) < MISFIT_LEVEL:
        obstacle = Obstacle.MISFIT
    if obstacle is not None and fixed is None:
        low, high = 0.0, _bound(doubtful, own, level)
    laws = [best, *(max((fit.law(end) for fit in fits), key=attrgetter("value")) for end in (low, high) if end != rate)]
    wrong = np.zeros(len(margins), dtype=bool) if is_wrong is None else np.asarray(is_wrong, dtype=bool)
    per_annotator = (
        [] if annotators is None else _annotator_rates(annotators, margins, trusted, wrong, laws, level, clusters)
    )
    by_name = {one.name: one.rate for one in per_annotator}
    rates = rate if annotators is None else np.array([by_name.get(str(name), rate) for name in annotators])
    return FlipEstimate(
        rate=min(rate, high),
        low=low,
        high=high,
        level=level,
        scale=best.scale,
        link=best.link,
        p_flip=np.where(trusted, 0.0, _posterior(rates, best.scale, best.link, margins)),
        obstacle=obstacle,
        num_pairs=len(margins),
        num_different=round(own.sum()),
        num_trusted=int(trusted.sum()),
        annotators=tuple(per_annotator),
    )


@dataclass(frozen=True, slots=True)
class _Law:
    """A flip rate of all, with the scale and link that suit it and the log-likelihood that they reach."""

    rate: float
    scale: float
    value: float
    link: Link

    def p_right(self, margins: np.ndarray) -> np.ndarray:
        return self.link.p_right(self.scale, margins)


def _links(margins: PerPair, weights: PerPair, level: float) -> tuple[list[Link], bool]:
    """The links that the sizes of the margins allow, and whether they allow tails that are too heavy.

    The sizes follow the folded law f(x−μ) + f(x+μ) whatever the flip rate. A ν is allowed if its best μ and s come
    within χ²₁(level)/2 of the best of all ν, and so is every lighter tail.
    """
    unit = _unit(margins)
    sizes, counts = _counted(np.abs(margins[margins != 0]) / unit, weights[margins != 0])
    steep = Link(power=2.0)
    if not len(sizes):
        return [Link(), steep], False
    peaks, values = zip(*(_folded(sizes, counts, tail) for tail in (*TAILS, *TOO_HEAVY)), strict=True)
    allowed = np.array(values) >= max(values) - chi2.ppf(level, df=1) / 2
    heaviest = int(np.flatnonzero(allowed)[-1])
    if heaviest >= len(TAILS):
        return [Link(), steep], True
    return [Link(), *(Link(tail=TAILS[i], peak=unit * peaks[i]) for i in range(1, heaviest + 1)), steep], False


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
    given = {"method": "Nelder-Mead", "bounds": [(-5.0, 5.0)] * 2, "options": {"xatol": 1e-3, "fatol": 1e-3}}
    found = min((minimize(loss, start, **given) for start in starts), key=attrgetter("fun"))
    centre, scale = np.exp(found.x)
    return float(scale * np.sqrt(tail + centre**2)), -float(found.fun)


def _p_fit(margins: PerPair, weights: PerPair, covariate: PerPair | None, law: _Law) -> float:
    """P-value of the law: contradicted labels by size, and covariate, against what it expects; zeros left out.

    ::

        χ² = Σ over bins (observed − expected)² / variance,   bins − 2 degrees of freedom: rate and scale are fitted
    """
    p_right = law.p_right(np.abs(margins))
    p_against = 1.0 - p_right - law.rate * (1.0 - 2.0 * p_right)
    bins = _groups(np.abs(margins), NUM_BINS, margins != 0)
    if covariate is not None:
        bins = bins * NUM_LEVELS + _groups(covariate, NUM_LEVELS, margins != 0)
    _, where = np.unique(bins, return_inverse=True)
    weights = weights * (margins != 0)
    off = np.bincount(where, weights=weights * ((margins < 0) - p_against))
    variance = np.bincount(where, weights=weights * p_against * (1.0 - p_against))
    # Where less than one label is expected to contradict, χ² is no approximation: a variance of 1 is not exceeded.
    return float(chi2.sf(np.sum(off**2 / np.maximum(variance, 1.0)), df=max(len(off) - 2, 1)))


def _groups(values: PerPair, num: int, among: Shaped[np.ndarray, " pairs"]) -> Shaped[np.ndarray, " pairs"]:
    """Which of `num` groups of about equal size among some pairs each value falls into; equal values share one."""
    inner = np.quantile(values[among], np.linspace(0, 1, num + 1)[1:-1])
    groups: np.ndarray = np.searchsorted(inner, values, side="right")
    return groups


def _bound(margins: PerPair, weights: PerPair, level: float) -> float:
    """The upper bound of the rate that needs no link; a margin of 0 contradicts half, equal sizes share a set."""
    order = np.argsort(-np.abs(margins))
    sizes, counts = -np.abs(margins)[order], weights[order].cumsum()
    against = (weights * (1.0 - np.sign(margins)) / 2)[order].cumsum()
    ends = np.searchsorted(counts, counts[-1] * 0.5 ** np.arange(NUM_SETS)).clip(max=len(counts) - 1)
    ends = np.searchsorted(sizes, sizes[ends], side="right") - 1
    miss = (1.0 - level) / 2 / NUM_SETS
    limits = beta.ppf(1.0 - miss, against[ends] + 1, np.maximum(counts[ends] - against[ends], 1e-9))
    return float(min(0.5, limits.min()))


def _annotator_rates(
    annotators: Sequence[str | None],
    margins: PerPair,
    trusted: Shaped[np.ndarray, " pairs"],
    wrong: Shaped[np.ndarray, " pairs"],
    laws: Sequence[_Law],
    level: float,
    clusters: Clusters | None,
) -> list[AnnotatorRate]:
    """The rate of each annotator, the worst first; none if fewer than two are named.

    `laws` are the best one, then those at the ends of the interval of all: the scale is not known better than the rate
    of all, and an annotator's interval reaches over those of all three. Labels that are known count as what they are.
    """
    names = np.array(["" if name is None else str(name) for name in annotators])
    known = sorted({str(name) for name in names[~trusted]} - {""})
    laws = [laws[0], *(law for law in laws[1:] if law.scale)]
    if len(known) < 2 or not laws[0].scale:
        return []
    weights = cluster_weights(within(clusters, names), len(names))
    grid = np.linspace(0.0, 1.0, 1001)[:-1]
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in known}
    for law in laws:
        p_right = law.p_right(margins[~trusted])
        # The prior is a Beta law with its mode at the overall rate, worth PRIOR_PAIRS pairs.
        prior = PRIOR_PAIRS * (xlogy(law.rate, grid) + xlog1py(1 - law.rate, -grid))
        for name in known:
            own = names == name
            open_ = own[~trusted]
            profile = prior + (weights[own & ~trusted] * _log_label(grid[:, None], p_right[None, open_])).sum(axis=1)
            profile += xlogy(weights[own & trusted & wrong].sum(), grid)
            profile += xlog1py(weights[own & trusted & ~wrong].sum(), -grid)
            inside = grid[profile >= profile.max() - chi2.ppf(level, df=1) / 2]
            found[name].append((float(grid[profile.argmax()]), float(inside[0]), float(inside[-1])))
    rates = [
        AnnotatorRate(
            name=name,
            num_pairs=int((names == name).sum()),
            rate=ends[0][0],
            low=min(low for _, low, _ in ends),
            high=max(high for _, _, high in ends),
        )
        for name, ends in found.items()
    ]
    return sorted(rates, key=lambda one: -one.rate)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _obstacle(margins: PerPair, weights: PerPair, *, signal: float, width: float) -> Obstacle | None:
    """What hinders an estimate before its fit is looked at."""
    size, num_pairs = np.abs(margins), weights.sum()
    if round(num_pairs) < MIN_PAIRS:
        return Obstacle.TOO_FEW
    if np.ptp(size) <= 1e-9 * size.max():
        return Obstacle.ONE_SIZE
    if -(weights * np.sign(margins)).sum() > 4 * np.sqrt(num_pairs):
        return Obstacle.REVERSED
    if signal < MIN_SIGNAL:
        return Obstacle.NO_SIGNAL
    return Obstacle.WIDE if width > MAX_WIDTH else None


def _unit(margins: PerPair) -> float:
    """The median size of the margins that are not 0."""
    size = np.abs(margins)
    return float(np.median(size[size > 0])) if size.any() else 1.0


class _ProfileLikelihood:
    """The log-likelihood of a flip rate, at the scale that suits it best, for one link.

    Margins within a percent of each other are counted together, at their mean: this moves the rate by less than 1e-5
    and makes the cost almost independent of the number of pairs.
    """

    def __init__(
        self,
        margins: PerPair,
        trusted: Float[np.ndarray, " trusted"],
        link: Link,
        weights: PerPair,
        trusted_weights: Float[np.ndarray, " trusted"],
    ) -> None:
        self.link, self.unit = link, _unit(margins)
        self.relative_link = replace(link, peak=link.peak / self.unit)
        self.points, self.counts = _counted(margins / self.unit, weights)
        self.trusted_points, self.trusted_counts = _counted(trusted / self.unit, trusted_weights)
        self.no_signal = -(self.counts.sum() + self.trusted_counts.sum()) * np.log(2.0)
        grid = _RELATIVE_SCALES[:, None]
        self._p_right_grid = self.relative_link.p_right(grid, self.points)
        self._trusted_grid = np.log(self.relative_link.p_right(grid, self.trusted_points)) @ self.trusted_counts
        self._on_rates = np.array([self.profile(rate)[0] for rate in _RATES])

    def profile(self, rate: float) -> tuple[float, float]:
        """Maximise over the scale, 0 included, at one rate: first on a grid, since there may be two hills."""
        top = int(np.argmax(_log_label(rate, self._p_right_grid) @ self.counts + self._trusted_grid))
        around = np.log(_RELATIVE_SCALES[[max(top - 1, 0), min(top + 1, len(_RELATIVE_SCALES) - 1)]])
        found = minimize_scalar(
            lambda log_scale: -self._at(rate, np.exp(log_scale)),
            bounds=around,
            method="bounded",
            options={"xatol": 1e-5},
        )
        on_grid = float(_RELATIVE_SCALES[top])
        candidates = [(self._at(rate, on_grid), on_grid), (-float(found.fun), float(np.exp(found.x)))]
        value, scale = max(candidates)
        is_better = value > (1 - 1e-12) * self.no_signal  # than coin flips, by more than rounding
        return (value, float(scale)) if is_better else (self.no_signal, 0.0)

    def law(self, rate: float) -> _Law:
        """The best scale at a rate, in the margins' own unit."""
        value, scale = self.profile(rate)
        return _Law(rate, scale / self.unit, value, self.link)

    @cached_property
    def best(self) -> _Law:
        """The best rate and scale."""
        # The last of equals: where no rate does better than coin flips, say 50 % and not 0 %.
        top = int(np.flatnonzero(self._on_rates == self._on_rates.max())[-1])
        around = _RATES[[max(top - 1, 0), min(top + 1, len(_RATES) - 1)]]
        found = minimize_scalar(
            lambda rate: -self.profile(rate)[0], bounds=around, method="bounded", options={"xatol": 1e-7}
        )
        # The bounded search never reaches an end, and an honest 0 % must be 0.
        rate = max((float(_RATES[top]), float(found.x)), key=lambda candidate: self.profile(candidate)[0])
        return self.law(rate)

    def interval(self, drop: float) -> tuple[float, float]:
        """The lowest and the highest rate whose profile lies at most `drop` below the best one."""
        target = self.best.value - drop
        place = int(np.searchsorted(_RATES, self.best.rate))
        rates = np.insert(_RATES, place, self.best.rate)
        inside = np.flatnonzero(np.insert(self._on_rates, place, self.best.value) >= target)
        ends = []
        for end, beyond in ((inside[0], inside[0] - 1), (inside[-1], inside[-1] + 1)):
            if 0 <= beyond < len(rates):
                ends.append(brentq(lambda r: self.profile(r)[0] - target, rates[end], rates[beyond], xtol=1e-7))
            else:
                ends.append(rates[end])
        return float(ends[0]), float(ends[1])

    def _at(self, rate: float, scale: float) -> float:
        link = self.relative_link
        doubtful = self.counts @ _log_label(rate, link.p_right(scale, self.points))
        return float(doubtful + self.trusted_counts @ np.log(link.p_right(scale, self.trusted_points)))


def _counted(relative: PerPair, weights: PerPair) -> tuple[np.ndarray, np.ndarray]:
    """Cells of about equal values with their means and counts, which are sums of weights."""
    size = np.minimum(np.abs(relative), 1e9)
    # 10,000 keeps the signs apart: the logarithm times 100 is above -2,100. Exact zeros stay alone.
    cell = np.sign(relative) * (10_000 + np.rint(100 * np.log(np.maximum(size, 1e-9))))
    _, where = np.unique(cell, return_inverse=True)
    counts = np.bincount(where, weights=weights)
    return np.bincount(where, weights=weights * np.sign(relative) * size) / counts, counts


def _posterior(rate: float | np.ndarray, scale: float, link: Link, margins: PerPair) -> PerPair:
    """P(flipped) at a flip rate: ε·F(−h) / [(1−ε)·F(h) + ε·F(−h)]."""
    wrong, right = rate * link.p_right(scale, -margins), (1.0 - rate) * link.p_right(scale, margins)
    p_flip: PerPair = wrong / (wrong + right)
    return p_flip


def _log_label(rate: float | np.ndarray, p_right: np.ndarray) -> np.ndarray:
    """log[(1−ε)·p + ε·(1−p)], the log-probability of the labels as they are."""
    return np.log(p_right + rate * (1.0 - 2.0 * p_right))
