"""How many labels are flipped, and which: a small likelihood over the margins.

In: one margin per pair, numpy float64; who labelled it, whether it is trusted and which pairs are copies, where that is
known. Out: `FlipEstimate`.

The one idea: if a share ε of the labels is flipped at random, a model contradicts that share however sure it is, while
its honest doubts vanish as margins grow. The contradictions far from zero give ε; those near zero give the scale T that
turns margins into log-odds; how fast the doubts vanish (the tail ν) is not known and widens the interval.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Shaped
from scipy.optimize import brentq, minimize_scalar
from scipy.special import expit, logit, stdtr, xlog1py, xlogy
from scipy.stats import chi2

from ropo.noise.clusters import Clusters, PerPair, cluster_weights, within

MIN_PAIRS = 50
"""Below this the chi-square approximation behind the interval is not worth trusting."""

MIN_SIGNAL = 25.0
"""Twice the log-likelihood that must be gained over coin-flip labels. The usual 90 % quantile, 2.7, is too low: without
signal the rate is not identified, and the best of many rates fits noise. Margins that know nothing of the labels pass
12 about once in 3,000 data sets; up to 25, few flips and a weak model still pass for many flips and a sure one."""

MAX_WIDTH = 0.25
"""An interval wider than half of all possible rates says nothing that one could act on."""

TAILS: tuple[float, ...] = (np.inf, 3.0, 2.0)
"""How the errors of the scoring model may be distributed: ∞ stands for logistic, a number for Student's t with so many
degrees of freedom. A model that is at times surely wrong has heavy tails, and its sure errors look like flips."""

PRIOR_PAIRS = 20.0
"""An annotator's rate is drawn towards that of all by as much as so many pairs would."""

# In units of 1 / (median margin size): from "no signal" to "only signs count".
_RELATIVE_SCALES = np.geomspace(1e-3, 300.0, 33)
_RATES = np.linspace(0.0, 0.5, 26)


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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FlipEstimate:
    """How many labels are flipped, how sure that is, and how suspicious each pair is.

    Attributes:
        rate: ε, the share of flipped labels with the highest likelihood, in [0, 0.5], trusted pairs not counted. Do not
            act on it unless `is_informative`.
        low: Lower end of the interval; [0, 0.5] as a whole when the margins hold no signal.
        high: Upper end of the interval.
        level: Nominal coverage of the interval.
        scale: T, by which margins are multiplied to become calibrated log-odds; below 1 for an overconfident model.
            0 when nothing fits better than coin flips; never above 300 / (median size of a margin), which is reached
            when only the signs of the margins matter.
        tail: ν in `TAILS`, the law of the model's errors that fits best; infinite for logistic.
        p_flip: P(the label of this pair is flipped), falling with the margin for each annotator; shape (pairs,). 0 for
            trusted pairs, and for all when `rate` is 0: rank suspects by margin then.
        is_informative: Whether the margins can tell the rate at all.
        reason: One or two sentences: why it is or is not informative, and what to do about it.
        num_pairs: Number of margins.
        num_trusted: How many of them are of trusted pairs.
        annotators: The rate of each annotator, the worst first; empty where the data names fewer than two.
    """

    rate: float
    low: float
    high: float
    level: float
    scale: float
    tail: float
    p_flip: PerPair
    is_informative: bool
    reason: str
    num_pairs: int
    num_trusted: int = 0
    annotators: tuple[AnnotatorRate, ...] = ()

    def p_flip_at(self, margins: PerPair, *, rate: float | None = None) -> PerPair:
        """P(flipped) of other margins of the same model, at the overall rate or another one; shape of `margins`."""
        return _posterior(self.rate if rate is None else rate, self.scale * margins, self.tail)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the value per pair, as plain values for JSON."""
        names = ("rate", "low", "high", "level", "scale", "is_informative", "reason", "num_pairs", "num_trusted")
        return {
            **{name: getattr(self, name) for name in names},
            "tail": None if np.isinf(self.tail) else self.tail,
            "annotators": [asdict(one) for one in self.annotators],
        }


def check_margins(margins: np.ndarray, *, what: str) -> PerPair:
    """Refuse margins that are not one finite number per pair.

    Takes any array, so that a wrong shape ends in a sentence of ours.

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
    rate: float | None = None,
    clusters: Clusters | None = None,
) -> FlipEstimate:
    """Estimate the flip rate by expectation maximisation with temperature, in its closed likelihood form.

    ::

        maximise over ε in [0, ½], T > 0, ν in TAILS:    Σ w·log[(1−ε)·F_ν(T·h) + ε·F_ν(−T·h)],    F_∞ = σ
        p_flip = ε·F_ν(−T·h) / [(1−ε)·F_ν(T·h) + ε·F_ν(−T·h)]             for ν = ∞:  σ(logit ε − T·h)

    With ν = ∞ and T = 1 this is the fixed point of RE-PO's reliability update (arXiv:2509.24159, eqs. 2-7), which is
    right for calibrated margins only; the temperature makes it right for over- and underconfident ones as well, and
    the tail for models that are surely wrong at times. The interval is the profile likelihood's: all ε whose best T
    and ν come within χ²₁(level)/2 of the maximum, cut off at 0 and ½.

    Trusted pairs enter with ε = 0: they show how often the model contradicts right labels. Annotators get rates of
    their own at the T and ν of all, and `p_flip` uses them.

    Copies of a pair are one piece of evidence: w is 1 / (size of its cluster), so data given twice has the interval of
    data given once. For the rate of an annotator their labels alone are counted, and only their own copies are copies.

    What surprises:

    - **The margins must come from a model that was not trained on the pair** (cross-fitted, held-out, or an early
      checkpoint). A model that has memorised its pairs agrees with flipped labels too; the estimate is then near 0,
      with a narrow interval and `is_informative` true. Nothing in the margins alone can reveal that.
    - ε is the share of labels that the model contradicts *however sure it is*. A model that is surely wrong on some
      right labels has them counted as flips, and no margin can tell the two apart; trusted pairs can.
    - Close to zero the likelihood knows only the product (1−2ε)·T. Weak margins therefore give an interval from 0
      to almost ½, and `is_informative` is false.
    - Margins that point against the labels end at ε = ½ and are not informative: a rate above ½ means that chosen
      and rejected are swapped as a whole.

    Args:
        margins: Held-out margin h of each pair, in any unit: multiplying all by a constant changes only `scale`.
        level: Nominal coverage of the interval, in (0, 1).
        annotators: Who labelled each pair; None where unknown.
        is_trusted: Which labels are known to be right, shape (pairs,), bool.
        rate: The flip rate where it is known, in [0, 0.5]; then only scale and tail are fitted, and the interval is
            this point.
        clusters: A name for each pair, the same for copies of one pair, such as `ropo.data.validate.text_id`; every
            pair is taken for another one by default.

    Returns:
        The estimate. It may say "cannot tell": ask `is_informative` first.

    Raises:
        ValueError: If a margin is not finite (the positions are named), `level` is outside (0, 1), the lengths differ,
            or every pair is trusted.

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
    for name, given in (("is_trusted", trusted), ("annotators", annotators), ("clusters", clusters)):
        if given is not None and len(given) != len(margins):
            raise ValueError(f"estimate_flips needs one entry of {name} per margin, {len(margins)}; got {len(given)}.")
    if trusted.all():
        raise ValueError("estimate_flips needs a pair that is not trusted; got none. There is nothing to estimate.")
    doubtful, weights = margins[~trusted], cluster_weights(clusters, len(margins))
    counted = {"weights": weights[~trusted], "trusted_weights": weights[trusted]}
    unit = _unit(doubtful)
    fits = {tail: _ProfileLikelihood(doubtful, margins[trusted], unit=unit, tail=tail, **counted) for tail in TAILS}
    best = {tail: fit.maximise(rate) for tail, fit in fits.items()}
    tail = max(TAILS, key=lambda one: best[one][2])  # of equals the first: logistic
    fixed, (rate, scale, top) = rate, best[tail]
    signal = 2.0 * (top - fits[tail].no_signal)
    low, high = (0.0, 0.5) if fixed is None else (rate, rate)
    if signal >= MIN_SIGNAL and fixed is None:
        target = top - chi2.ppf(level, df=1) / 2
        ends = [fit.interval(best[one][0], target) for one, fit in fits.items() if best[one][2] >= target]
        low, high = min(end[0] for end in ends), max(end[1] for end in ends)
    obstacle = _obstacle(doubtful, weights[~trusted], signal=signal, low=low, high=high)
    found = obstacle or f"The margins place the flip rate between {_percent(low)} and {_percent(high)}."
    law = _Law(rate=rate, scale=scale, tail=tail)
    laws = [law, *(_best_law(fits, end) for end in (low, high) if end != rate)]
    per_annotator = [] if annotators is None else _annotator_rates(annotators, margins, trusted, laws, level, clusters)
    own = {one.name: one.rate for one in per_annotator}
    rates = rate if annotators is None else np.array([own.get(str(name), rate) for name in annotators])
    return FlipEstimate(
        rate=rate,
        low=low,
        high=high,
        level=level,
        scale=scale,
        tail=tail,
        p_flip=np.where(trusted, 0.0, _posterior(rates, scale * margins, tail)),
        is_informative=not obstacle,
        reason=found + _copies(weights[~trusted]),
        num_pairs=len(margins),
        num_trusted=int(trusted.sum()),
        annotators=tuple(per_annotator),
    )


@dataclass(frozen=True, slots=True)
class _Law:
    """A flip rate of all, and the scale and tail that go with it."""

    rate: float
    scale: float
    tail: float


def _best_law(fits: Mapping[float, "_ProfileLikelihood"], rate: float) -> _Law:
    """The scale and tail that suit a flip rate best."""
    best = {tail: fit.maximise(rate) for tail, fit in fits.items()}
    tail = max(TAILS, key=lambda one: best[one][2])
    return _Law(rate, best[tail][1], tail)


def _annotator_rates(
    annotators: Sequence[str | None],
    margins: PerPair,
    trusted: Shaped[np.ndarray, " pairs"],
    laws: Sequence[_Law],
    level: float,
    clusters: Clusters | None,
) -> list[AnnotatorRate]:
    """The rate of each annotator, the worst first; none if fewer than two are named.

    `laws` are the best one, then those at the ends of the interval of all: the scale is not known better than the rate
    of all, and an annotator's interval reaches over those of all three.
    """
    names = np.array(["" if name is None else str(name) for name in annotators])
    known = sorted({str(name) for name in names[~trusted]} - {""})
    laws = [laws[0], *(law for law in laws[1:] if law.scale)]
    if len(known) < 2 or not laws[0].scale:
        return []
    weights = cluster_weights(within(clusters, names, of=~trusted), int((~trusted).sum()))
    grid = np.linspace(0.0, 1.0, 1001)[:-1]
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in known}
    for law in laws:
        p_right = _p_right(law.scale * margins[~trusted], law.tail)
        # The prior is a Beta law with its mode at the overall rate, worth PRIOR_PAIRS pairs.
        prior = PRIOR_PAIRS * (xlogy(law.rate, grid) + xlog1py(1 - law.rate, -grid))
        for name in known:
            is_mine = names[~trusted] == name
            profile = prior + (weights[is_mine] * _log_label(grid[:, None], p_right[None, is_mine])).sum(axis=1)
            inside = grid[profile >= profile.max() - chi2.ppf(level, df=1) / 2]
            found[name].append((float(grid[profile.argmax()]), float(inside[0]), float(inside[-1])))
    num_pairs = {name: int(((names == name) & ~trusted).sum()) for name in known}
    rates = [
        AnnotatorRate(
            name=name,
            num_pairs=num_pairs[name],
            rate=ends[0][0],
            low=min(low for _, low, _ in ends),
            high=max(high for _, _, high in ends),
        )
        for name, ends in found.items()
    ]
    return sorted(rates, key=lambda one: -one.rate)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _copies(weights: PerPair) -> str:
    """A sentence about pairs that are copies of others; an empty string if there are none."""
    worth = round(weights.sum())
    return f" Copies count once: {len(weights)} pairs count as {worth}." if worth < len(weights) else ""


def _obstacle(margins: PerPair, weights: PerPair, *, signal: float, low: float, high: float) -> str:
    """Say in plain words why the margins cannot tell the rate; an empty string if they can."""
    size, num_pairs = np.abs(margins), round(weights.sum())
    if num_pairs < MIN_PAIRS:
        return f"{num_pairs} pairs are too few to tell a flip rate; score at least {MIN_PAIRS}, better some hundreds."
    if np.ptp(size) <= 1e-9 * size.max():
        return (
            "All margins have the same size, so nothing tells a flipped label from an honest doubt. "
            "Score the pairs with a model that has been trained on such pairs."
        )
    if -(weights * np.sign(margins)).sum() > 4 * np.sqrt(num_pairs):
        share = _percent(float(np.average(margins < 0, weights=weights)))
        return (
            f"The model contradicts most labels ({share} of the margins are negative). "
            "Check whether chosen and rejected are swapped, in the data or in the training of the scoring model."
        )
    if signal < MIN_SIGNAL:
        return (
            "Too little signal: the margins do not follow the labels, so either the model has learned nothing yet or "
            "the labels are close to coin flips. Train the scoring model longer, or on more pairs."
        )
    if high - low > MAX_WIDTH:
        return (
            f"Too little signal: anything from {_percent(low)} to {_percent(high)} flips explains the margins about "
            "equally well. Score more pairs, or train the scoring model until it is surer of some pairs than of others."
        )
    return ""


def _unit(margins: PerPair) -> float:
    """The median size of the margins that are not 0."""
    size = np.abs(margins)
    return float(np.median(size[size > 0])) if size.any() else 1.0


class _ProfileLikelihood:
    """The log-likelihood of a flip rate, at the scale that suits it best, for one tail.

    Margins within a third of a percent of each other are counted together, at their mean: this moves the rate by less
    than 1e-6 and makes the cost almost independent of the number of pairs.
    """

    def __init__(
        self,
        margins: PerPair,
        trusted: Float[np.ndarray, " trusted"],
        *,
        unit: float,
        tail: float,
        weights: PerPair,
        trusted_weights: Float[np.ndarray, " trusted"],
    ) -> None:
        self.unit, self.tail = unit, tail
        self.points, self.counts = _counted(margins / unit, weights)
        self.trusted_points, self.trusted_counts = _counted(trusted / unit, trusted_weights)
        self.no_signal = -(self.counts.sum() + self.trusted_counts.sum()) * np.log(2.0)
        self._p_right_grid = _p_right(_RELATIVE_SCALES[:, None] * self.points, tail)
        self._trusted_grid = (
            np.log(_p_right(_RELATIVE_SCALES[:, None] * self.trusted_points, tail)) @ self.trusted_counts
        )
        self._on_rates = np.array([self.profile(rate)[0] for rate in _RATES])

    def profile(self, rate: float) -> tuple[float, float]:
        """Maximise over the scale, 0 included, at one rate: first on a grid, since there may be two hills."""
        top = int(np.argmax(_log_label(rate, self._p_right_grid) @ self.counts + self._trusted_grid))
        around = np.log(_RELATIVE_SCALES[[max(top - 1, 0), min(top + 1, len(_RELATIVE_SCALES) - 1)]])
        found = minimize_scalar(
            lambda log_scale: -self._at(rate, np.exp(log_scale)),
            bounds=around,
            method="bounded",
            options={"xatol": 1e-7},
        )
        on_grid = float(_RELATIVE_SCALES[top])
        candidates = [(self._at(rate, on_grid), on_grid), (-float(found.fun), float(np.exp(found.x)))]
        value, scale = max(candidates)
        is_better = value > (1 - 1e-12) * self.no_signal  # than coin flips, by more than rounding
        return (value, float(scale)) if is_better else (self.no_signal, 0.0)

    def maximise(self, rate: float | None = None) -> tuple[float, float, float]:
        """Return the best rate (or the given one), its scale in the margins' own unit, and the log-likelihood there."""
        if rate is not None:
            value, scale = self.profile(rate)
            return rate, scale / self.unit, value
        # The last of equals: where no rate does better than coin flips, say 50 % and not 0 %.
        top = int(np.flatnonzero(self._on_rates == self._on_rates.max())[-1])
        around = _RATES[[max(top - 1, 0), min(top + 1, len(_RATES) - 1)]]
        found = minimize_scalar(
            lambda rate: -self.profile(rate)[0], bounds=around, method="bounded", options={"xatol": 1e-9}
        )
        # The bounded search never reaches an end, and an honest 0 % must be 0.
        rate = max((float(_RATES[top]), float(found.x)), key=lambda candidate: self.profile(candidate)[0])
        value, scale = self.profile(rate)
        return rate, scale / self.unit, value

    def interval(self, rate: float, target: float) -> tuple[float, float]:
        """Return the lowest and the highest rate whose profile reaches `target`."""
        place = int(np.searchsorted(_RATES, rate))
        rates = np.insert(_RATES, place, rate)
        inside = np.flatnonzero(np.insert(self._on_rates, place, np.inf) >= target)
        ends = []
        for end, beyond in ((inside[0], inside[0] - 1), (inside[-1], inside[-1] + 1)):
            if 0 <= beyond < len(rates):
                ends.append(brentq(lambda r: self.profile(r)[0] - target, rates[end], rates[beyond], xtol=1e-9))
            else:
                ends.append(rates[end])
        return float(ends[0]), float(ends[1])

    def _at(self, rate: float, scale: float) -> float:
        doubtful = self.counts @ _log_label(rate, _p_right(scale * self.points, self.tail))
        return float(doubtful + self.trusted_counts @ np.log(_p_right(scale * self.trusted_points, self.tail)))


def _counted(relative: PerPair, weights: PerPair) -> tuple[np.ndarray, np.ndarray]:
    """Cells of about equal values with their means and counts, which are sums of weights."""
    size = np.minimum(np.abs(relative), 1e9)
    # 10,000 keeps the signs apart: the logarithm times 300 is above -6,300. Exact zeros stay alone.
    cell = np.sign(relative) * (10_000 + np.rint(300 * np.log(np.maximum(size, 1e-9))))
    _, where = np.unique(cell, return_inverse=True)
    counts = np.bincount(where, weights=weights)
    return np.bincount(where, weights=weights * np.sign(relative) * size) / counts, counts


def _p_right(log_odds: np.ndarray, tail: float) -> np.ndarray:
    """F_ν, kept above the smallest float so that its logarithm stays finite."""
    p_right: np.ndarray = expit(np.maximum(log_odds, -700.0)) if np.isinf(tail) else stdtr(tail, log_odds)
    return p_right


def _posterior(rate: float | np.ndarray, log_odds: np.ndarray, tail: float) -> PerPair:
    """P(flipped) at a flip rate: ε·F(−x) / [(1−ε)·F(x) + ε·F(−x)]."""
    if np.isinf(tail):
        p_flip: PerPair = expit(logit(rate) - log_odds)
        return p_flip
    wrong, right = rate * stdtr(tail, -log_odds), (1.0 - rate) * stdtr(tail, log_odds)
    return np.asarray(wrong / (wrong + right))


def _log_label(rate: float | np.ndarray, p_right: np.ndarray) -> np.ndarray:
    """log[(1−ε)·p + ε·(1−p)], the log-probability of the labels as they are."""
    return np.log(p_right + rate * (1.0 - 2.0 * p_right))
