"""How many labels are flipped, and which: a small likelihood over the margins, given only where it fits.

In: one margin per pair, numpy float64; who labelled it, what a review said, which pairs are copies and what the errors
may depend on, where that is known. Out: `FlipEstimate`: a rate with an interval, or an upper bound.

The one idea: `likelihood` assumes how fast a model's honest doubts vanish as margins grow. That is tested, and where it
fails the largest margins still give an upper bound, which needs no model.

What surprises: margins of a model that was trained on the pair agree with flipped labels too; the estimate is then near
0, and nothing in the margins can reveal it. A share of right labels that the model contradicts however sure it is
counts as flips; only trusted pairs can show it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from enum import StrEnum
from operator import attrgetter
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, Shaped
from scipy.special import xlog1py, xlogy
from scipy.stats import beta, chi2

from ropo.noise.likelihood import STEEP, Fit, Labelled, Link, ProfileLikelihood, allowed_links, log_label
from ropo.noise.shares import Clusters, PerPair, cluster_weights

MIN_PAIRS = 50
"""Below this the chi-square approximation behind the interval is not worth trusting."""

MIN_SIGNAL = 25.0
"""Twice the log-likelihood that must be gained over coin-flip labels. Where it is less, few flips and a weak model pass
for many flips and a sure one: without this bar benchmarks/families.py has four more narrow intervals of calibrated
margins at accuracies .63 and .72, and none of them holds the truth."""

MAX_WIDTH = 0.25
"""Whoever guesses 1/4 without data is wrong by 1/8 on average over [0, 1/2]. A wider interval is no better."""

MISFIT_LEVEL = 0.05
"""Share of the data sets that fit which are refused for the shape of their agreement curve."""

NUM_BINS, NUM_LEVELS, NUM_SETS = 10, 3, 5
"""The agreement curve is tested in so many bins of margin sizes, each cut in so many levels of the covariate; the upper
bound is the least over so many sets of pairs: all, the half with the largest margins, a quarter, ..."""

PRIOR_PAIRS = 20.0
"""An annotator's rate is drawn towards that of all by as much as so many pairs would."""

_ANNOTATOR_RATES = np.linspace(0.0, 1.0, 1001)[:-1]

IsPair = Bool[np.ndarray, " pairs"]


class Obstacle(StrEnum):
    """Why no rate is given; `ropo.report.clauses` says each in words."""

    TOO_FEW = "TOO_FEW"  # pairs
    ONE_SIZE = "ONE_SIZE"  # is what all margins have
    REVERSED = "REVERSED"  # the model contradicts most labels
    NO_SIGNAL = "NO_SIGNAL"  # the margins do not follow the labels
    HEAVY_TAILS = "HEAVY_TAILS"  # the largest margins may be errors of the model
    MISFIT = "MISFIT"  # agreement with the labels does not grow with the margins as assumed
    WIDE = "WIDE"  # too many rates explain the margins about equally well
    IN_SAMPLE = "IN_SAMPLE"  # the margins are of a model that was trained on the labels; only a caller knows

    @property
    def hides_labels(self) -> bool:
        """Whether nothing shows that the margins know any label, so that one they contradict may as well be right."""
        return self in (Obstacle.TOO_FEW, Obstacle.ONE_SIZE, Obstacle.REVERSED, Obstacle.NO_SIGNAL)


@dataclass(frozen=True, slots=True, kw_only=True)
class AnnotatorRate:
    """How often one annotator is wrong, with an interval.

    `rate` is in [0, 1], drawn towards the rate of all by `PRIOR_PAIRS` pairs; above one half labels mean the opposite.
    """

    name: str
    num_pairs: int
    rate: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FlipEstimate:
    """How many labels are flipped, how sure that is, and how suspicious each pair is.

    Attributes:
        rate: ε, the share of flipped labels with the highest likelihood, in [0, 0.5]: of the labels of the data,
            reviewed ones counted as well, trusted pairs not. Do not act on it unless `is_informative`.
        low: Lower end of the interval; 0 where the estimate is not informative.
        high: Upper end; where the estimate is not informative an upper bound of the rate, which holds with probability
            (1 + level)/2 if flips do not depend on the margin's size.
        level: Nominal coverage of the interval.
        scale: T, by which margins are multiplied to become log-odds, near 0; below 1 for an overconfident model, 0 when
            nothing fits better than coin flips; at most 300 / (median size of a margin): only signs matter.
        link: How log-odds grow with the margin, the form that fits best.
        obstacle: Why the rate cannot be told; None if it can.
        num_pairs: Number of margins.
        num_labels: How many of them are of labels of the data.
        num_different: The same with copies counted once.
        num_trusted: How many of the margins are of trusted pairs or of reviewed labels.
        annotators: The rate of each annotator, the worst first; empty where the data names fewer than two.
        p_flip: P(the label of this pair is flipped), shape (pairs,). 0 where the label is known, and for all when
            `rate` is 0: rank suspects by margin then. Empty where the estimate was read from JSON.
    """

    rate: float
    low: float
    high: float
    level: float
    scale: float
    link: Link
    obstacle: Obstacle | None
    num_pairs: int
    num_labels: int
    num_different: int
    num_trusted: int = 0
    annotators: tuple[AnnotatorRate, ...] = ()
    p_flip: PerPair = field(default_factory=lambda: np.zeros(0), compare=False, repr=False)

    @property
    def is_informative(self) -> bool:
        """Whether the margins can tell the rate."""
        return self.obstacle is None

    def p_flip_at(self, margins: PerPair, *, rate: float | None = None) -> PerPair:
        """P(flipped) of other margins of the same model, at the overall rate or another one; shape of `margins`."""
        return self.link.p_flip(self.rate if rate is None else rate, self.scale, margins)

    def to_json(self) -> dict[str, Any]:
        """Everything but the value per pair, as plain values."""
        plain = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "p_flip"}
        return plain | {
            "link": {name: None if value == np.inf else value for name, value in asdict(self.link).items()},
            "annotators": [asdict(one) for one in self.annotators],
        }

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> "FlipEstimate":
        """Of what `to_json` gave; other keys are passed over."""
        known = {one.name: found[one.name] for one in fields(cls) if one.name != "p_flip"}
        link = Link(**{name: np.inf if value is None else value for name, value in found["link"].items()})
        annotators = tuple(AnnotatorRate(**one) for one in found["annotators"])
        obstacle = found["obstacle"] and Obstacle(found["obstacle"])
        return cls(**{**known, "link": link, "annotators": annotators, "obstacle": obstacle})


def check_margins(margins: np.ndarray, *, what: str) -> PerPair:
    """Margins as float64; a `ValueError` that begins with `what` unless they are one finite number per pair."""
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
    reviews: np.ndarray | None = None,
    is_vouched: np.ndarray | None = None,
    clusters: Clusters | None = None,
    covariate: np.ndarray | None = None,
) -> FlipEstimate:
    """Estimate the flip rate by maximum likelihood in rate, scale and link; give an upper bound where no link fits.

    With the logistic link and T = 1 this is the fixed point of RE-PO's reliability update (arXiv:2509.24159, eqs. 2-7),
    which is right for calibrated margins only; the scale makes it right for over- and underconfident ones as well.

    Args:
        margins: Held-out margin h of each pair as it is labelled, in any unit, shape (pairs,).
        level: Nominal coverage of the interval, in (0, 1).
        annotators: Who labelled each pair; None where unknown. They get rates of their own, which `p_flip` uses.
        is_trusted: Which pairs are no part of the data, with labels that are known to be right, shape (pairs,), bool.
        reviews: Of each label of the data, +1 if it was reviewed and is right, −1 if wrong, else 0. Which ones are
            reviewed may depend on the margins, as when the most contradicted come first.
        is_vouched: Which of the reviewed labels were chosen for being known, such as those of trusted pairs that the
            data holds, shape (pairs,), bool. They say how sure the model is, and nothing of how many others are wrong.
        clusters: A name for each pair, the same for copies of one pair, which weigh 1 in all.
        covariate: What the model's errors may depend on, shape (pairs,), such as the log of the number of response
            tokens. Only its order matters.

    Raises:
        ValueError: If a margin (the positions are named) or the covariate is not finite, `level` is outside (0, 1), the
            lengths differ, or every pair is trusted.

    Examples:
        >>> rng = np.random.default_rng(0)
        >>> clean = rng.normal(2.0, 1.0, size=2000)
        >>> estimate = estimate_flips(np.where(rng.random(2000) < 0.2, -clean, clean))
        >>> estimate.is_informative, estimate.low < 0.2 < estimate.high
        (True, True)
    """
    margins = check_margins(margins, what="estimate_flips")
    num_pairs = len(margins)
    trusted = np.zeros(num_pairs, dtype=bool) if is_trusted is None else np.asarray(is_trusted, dtype=bool)
    signs = np.zeros(num_pairs) if reviews is None else np.asarray(reviews)
    vouched = np.zeros(num_pairs, dtype=bool) if is_vouched is None else np.asarray(is_vouched, dtype=bool)
    per_pair = {
        "is_trusted": trusted, "reviews": signs, "is_vouched": vouched, "annotators": annotators, "clusters": clusters,
    }  # fmt: skip
    _check(num_pairs, level, trusted, {**per_pair, "covariate": covariate})
    sample = Labelled(
        margins=margins,
        weights=cluster_weights(clusters, num_pairs),
        is_trusted=trusted,
        reviews=np.where(trusted, 0, signs),
        is_vouched=vouched & ~trusted & (signs != 0),
    )
    estimate, fits = _estimate_all(sample, covariate, level)
    if annotators is None:
        return estimate
    names = np.array(["" if name is None else str(name) for name in annotators])
    rates = _annotator_rates(names, sample, clusters, fits, level)
    by_name = {one.name: one.rate for one in rates}
    rate = np.array([by_name.get(name, fits[0].rate) for name in names])
    p_flip = np.where(sample.is_known, 0.0, estimate.link.p_flip(rate, estimate.scale, margins))
    return replace(estimate, p_flip=p_flip, annotators=tuple(rates))


def _check(num_pairs: int, level: float, is_trusted: IsPair, per_pair: Mapping[str, Any]) -> None:
    if not 0.0 < level < 1.0:
        raise ValueError(f"estimate_flips needs level in (0, 1); got {level}. 0.9 asks for a 90 % interval.")
    for name, given in per_pair.items():
        if given is not None and len(given) != num_pairs:
            raise ValueError(f"estimate_flips needs one entry of {name} per margin, {num_pairs}; got {len(given)}.")
    if is_trusted.all():
        raise ValueError("estimate_flips needs a pair that is not trusted; got none. There is nothing to estimate.")
    if per_pair["covariate"] is not None and not np.isfinite(per_pair["covariate"]).all():
        raise ValueError(
            "estimate_flips needs a finite covariate; got NaN or infinity. Leave it out if it is not known."
        )


def _estimate_all(sample: Labelled, covariate: np.ndarray | None, level: float) -> tuple[FlipEstimate, list[Fit]]:
    """The estimate with one rate for all annotators, and the likeliest fits at this rate and at the interval's ends."""
    # The profile likelihood's interval, all ε whose best T comes within χ²₁(level)/2 of the maximum: of the best link,
    # together with those of all links whose maximum comes as near to that of the best. `STEEP` widens it only.
    # Tests and bound look at all labels of the data as it has them, reviewed or not: what is left of them after a
    # review is chosen by the margins.
    in_data = ~sample.is_trusted
    labelled, own = sample.margins[in_data], sample.weights[in_data]
    links = allowed_links(labelled, own, level)
    *profiles, steep = (ProfileLikelihood(link, sample) for link in (*(links or [Link()]), STEEP))
    best = _likeliest(one.best for one in profiles)
    drop = float(chi2.ppf(level, df=1)) / 2
    near = [one for one in (*profiles, steep) if one.best.log_likelihood >= best.log_likelihood - drop]
    ends = [(best.rate, best.rate), *(one.interval(drop) for one in near)]
    low, high = min(end[0] for end in ends), max(end[1] for end in ends)
    fits = [best, *(_likeliest(one.at(end) for one in profiles) for end in (low, high) if end != best.rate)]
    signal = 2.0 * (best.log_likelihood - profiles[0].of_reviews(best.rate) - profiles[0].of_coin_flips)
    obstacle = _obstacle(labelled, own, signal=signal, width=high - low, has_link=bool(links))
    levels = None if covariate is None else np.asarray(covariate, dtype=np.float64)[in_data]
    of_all = replace(best, rate=sample.rate_of_all(best.rate))
    if obstacle is None and _p_fit(labelled, own, levels, of_all) < MISFIT_LEVEL:
        obstacle = Obstacle.MISFIT
    low, high = sample.rate_of_all(low), sample.rate_of_all(high)
    if obstacle is not None:
        low, high = 0.0, _bound(labelled, own, level)
        fits = [best, *(_likeliest(one.at(end) for one in profiles) for end in (low, high) if end != best.rate)]
    estimate = FlipEstimate(
        rate=min(of_all.rate, high),
        low=low,
        high=high,
        level=level,
        scale=best.scale,
        link=best.link,
        obstacle=obstacle,
        num_pairs=len(sample.margins),
        num_labels=len(labelled),
        num_different=round(own.sum()),
        num_trusted=int(sample.is_known.sum()),
        p_flip=np.where(sample.is_known, 0.0, best.link.p_flip(best.rate, best.scale, sample.margins)),
    )
    return estimate, fits


def _likeliest(fits: Iterable[Fit]) -> Fit:
    return max(fits, key=attrgetter("log_likelihood"))


def _obstacle(margins: PerPair, weights: PerPair, *, signal: float, width: float, has_link: bool) -> Obstacle | None:
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
    if width > MAX_WIDTH:
        return Obstacle.WIDE
    return None if has_link else Obstacle.HEAVY_TAILS


def _p_fit(margins: PerPair, weights: PerPair, covariate: PerPair | None, fit: Fit) -> float:
    """P-value of a fit: contradicted labels by size, and covariate, against what it expects; zeros left out.

    ::

        χ² = Σ over bins (observed − expected)² / variance,   bins − 2 degrees of freedom: rate and scale are fitted
    """
    p_right = fit.p_right(np.abs(margins))
    p_against = 1.0 - p_right - fit.rate * (1.0 - 2.0 * p_right)
    bins = _quantile_bins(np.abs(margins), NUM_BINS, margins != 0)
    if covariate is not None:
        bins = bins * NUM_LEVELS + _quantile_bins(covariate, NUM_LEVELS, margins != 0)
    _, where = np.unique(bins, return_inverse=True)
    weights = weights * (margins != 0)
    off = np.bincount(where, weights=weights * ((margins < 0) - p_against))
    variance = np.bincount(where, weights=weights * p_against * (1.0 - p_against))
    # Where less than one label is expected to contradict, χ² is no approximation: a variance of 1 is not exceeded.
    return float(chi2.sf(np.sum(off**2 / np.maximum(variance, 1.0)), df=max(len(off) - 2, 1)))


def _quantile_bins(values: PerPair, num: int, among: IsPair) -> Int[np.ndarray, " pairs"]:
    """Which of `num` groups of about equal size among some pairs each value falls into; equal values share one."""
    bins: np.ndarray = np.searchsorted(
        np.quantile(values[among], np.linspace(0, 1, num + 1)[1:-1]), values, side="right"
    )
    return bins


def _bound(margins: PerPair, weights: PerPair, level: float) -> float:
    """The upper bound of the rate that needs no link.

    In every set S of pairs chosen by |h|

    ::

        P(contradicted | S) = (1−ε)·(1−q) + ε·q = ε + (1−q)·(1−2ε) ≥ ε        q = P(model is right | S), ε ≤ ½

    so ε is at most the least of the upper confidence limits (Clopper-Pearson) over nested sets of the largest margins,
    each at (1−level)/2 / `NUM_SETS`. It holds for any q if flips depend neither on |h| nor on whether the model is
    right. Where q comes to 1 these pairs are the anchor points of Liu & Tao (2016), see also Scott (2015).
    """
    order = np.argsort(-np.abs(margins))
    sizes, counts = -np.abs(margins)[order], weights[order].cumsum()
    against = (weights * (1.0 - np.sign(margins)) / 2)[order].cumsum()
    ends = np.searchsorted(counts, counts[-1] * 0.5 ** np.arange(NUM_SETS)).clip(max=len(counts) - 1)
    ends = np.searchsorted(sizes, sizes[ends], side="right") - 1
    miss = (1.0 - level) / 2 / NUM_SETS
    limits = beta.ppf(1.0 - miss, against[ends] + 1, np.maximum(counts[ends] - against[ends], 1e-9))
    return float(min(0.5, limits.min()))


def _annotator_rates(
    names: Shaped[np.ndarray, " pairs"],
    sample: Labelled,
    clusters: Clusters | None,
    fits: Sequence[Fit],
    level: float,
) -> list[AnnotatorRate]:
    """The rate of each annotator, the worst first; none if fewer than two are named."""
    if clusters is not None:  # copies by another annotator are no copies
        copies = [f"{one} {name}" for one, name in zip(clusters, names, strict=True)]
        sample = replace(sample, weights=cluster_weights(copies, len(names)))
    # The fits are the best one, then those at the ends of the interval of all: the scale is not known better than the
    # rate of all, and an annotator's interval reaches over those of all three.
    named = sorted({str(name) for name in names[~sample.is_known]} - {""})
    if len(named) < 2 or not fits[0].scale:
        return []
    grid, drop = _ANNOTATOR_RATES, chi2.ppf(level, df=1) / 2
    rates = []
    for name in named:
        own = (names == name) & ~sample.is_trusted  # whoever labelled those, they are no part of the data
        is_open = own & ~sample.is_known
        ends = []
        for fit in (fits[0], *(one for one in fits[1:] if one.scale)):
            # The prior is a Beta law with its mode at the overall rate, worth PRIOR_PAIRS pairs.
            profile = PRIOR_PAIRS * (xlogy(fit.rate, grid) + xlog1py(1 - fit.rate, -grid))
            labels = log_label(grid[:, None], fit.p_right(sample.margins[None, is_open]))
            profile = profile + (sample.weights[is_open] * labels).sum(axis=1)
            reviews = np.where(own & ~sample.is_vouched, sample.reviews, 0)
            profile += xlogy(sample.weights[reviews < 0].sum(), grid)
            profile += xlog1py(sample.weights[reviews > 0].sum(), -grid)
            inside = grid[profile >= profile.max() - drop]
            ends.append((float(grid[profile.argmax()]), float(inside[0]), float(inside[-1])))
        best, low, high = ends[0][0], min(end[1] for end in ends), max(end[2] for end in ends)
        rates.append(AnnotatorRate(name=name, num_pairs=int(own.sum()), rate=best, low=low, high=high))
    return sorted(rates, key=lambda one: -one.rate)
