"""Held-out margins of every pair by linear models, for all folds and all penalties in one go.

In: features of the pairs of one or more kinds, each chosen minus rejected, and folds. Out: `HeldOut`.

The one idea: to first order around the reference, the margin of a fine-tuned model is linear in its parameters, so DPO
is logistic regression on the gradient of each pair. In the eigenbasis of the features every penalty is diagonal, and a
fold is a column of weights in which its own pairs weigh nothing: what takes one training per fold takes one matrix
product per step, and even the nested comparison of two trainings takes seconds. Which kind of features knows the labels
differs from data to data, so the margins of all kinds are added up with weights that held-out likelihood chooses.

Shapes: a problem is one fit, a column. Pairs are dealt into folds several times; columns go deal by deal.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from jaxtyping import Float, Int
from scipy.linalg import eigh, svd
from scipy.optimize import minimize
from scipy.special import expit

from ropo.noise.shares import PerPair, mean_of

Features = Float[np.ndarray, "pairs numbers"]
Covariates = Float[np.ndarray, "pairs covariates"]
PerFit = Float[np.ndarray, "pairs problems"]
PerDeal = Float[np.ndarray, "pairs some"]
PerKind = Float[np.ndarray, "kinds pairs"]
Folds = Int[np.ndarray, "deals pairs"]

STRENGTHS: tuple[float, ...] = (0.3, 1.0, 3.0, 10.0, 30.0)
"""Penalties that are tried, for features whose squared norm is 1 on average: from one at which right labels are learned
nearly whole to one at which margins stay near 0. Held-out likelihood chooses."""

_FREE = 1e4  # how much less a covariate is penalised than other features: its weight is left to the data
_MAX_STEPS, _TOLERANCE = 300, 1e-3  # a fit has converged when no margin moves by more nats
_TINY = 1e-30
_LEAST = 1e-6  # components with a smaller share of the largest one are rounding, and the penalty leaves nothing of them
_ROWS = 4096


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HeldOut:
    """What linear models say about labels that they have not seen; means over the deals.

    Attributes:
        totals: Log-odds that the label is right by each kind of features, up to a scale; shape (kinds, pairs).
        surfaces: What the covariates add to them; shape (kinds, pairs).
        shares: What the kinds are weighted with, not below 0; shape (kinds,).
        loss: Mean negative log-likelihood of a label by all together, nats.
        strengths: For each kind the penalty with the highest held-out likelihood.
        fits: The models of each kind, a column for each deal and fold.
    """

    totals: PerKind
    surfaces: PerKind
    shares: Float[np.ndarray, " kinds"]
    loss: float
    strengths: tuple[float, ...]
    fits: tuple[np.ndarray, ...]

    @property
    def margins(self) -> PerPair:
        """Log-odds by all kinds together, without what the covariates add; shape (pairs,)."""
        return np.asarray(self.shares @ (self.totals - self.surfaces))

    @property
    def surface(self) -> PerPair:
        """What the covariates add; shape (pairs,)."""
        return np.asarray(self.shares @ self.surfaces)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gain:
    """By how much more unseen labels models agree with that were fitted without suspects, and its standard error.

    `with_covariates` and its error are the same if what covariates add to the margins counts, too.
    """

    gain: float
    error: float
    with_covariates: float = 0.0
    with_covariates_error: float = 0.0

    @property
    def helps(self) -> bool:
        """Whether the gain exceeds its standard error: without one the simpler model stays (Breiman et al. 1984)."""
        return self.gain > self.error

    @property
    def rests_on_covariates(self) -> bool:
        """Whether it is a loss, beyond its standard error, once covariates count: labels follow them."""
        return self.with_covariates < -self.with_covariates_error


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Refit:
    """Fits without the pairs that the first ones contradict, and what that gains.

    Attributes:
        held_out: The new fits.
        of_judges: What all kinds together gain, as they are weighted.
        of_training: What the kind gains that a training works with.
    """

    held_out: HeldOut
    of_judges: Gain
    of_training: Gain


class LinearModels:
    """Ridge logistic regressions on the features of pairs, each without one fold, one for each kind of features.

    ::

        minimise over v    −Σ w·log σ(v·f) + λ/2·|v|²

    Features change their sign with the order of the responses, so there is no intercept. Covariates compete with the
    features for what they share, and win: features are regressed on them, and what is left is fitted beside them
    (Frisch & Waugh 1933). So `margins` holds nothing that is linear in them, as in length-controlled win
    rates (arXiv:2404.04475).

    Margins of several kinds are added up with weights not below 0, those of the highest held-out likelihood: stacked
    regressions (Breiman 1996). A kind that knows nothing gets no weight.

    Args:
        features: Chosen minus rejected, of each pair, in any unit; an array for each kind, taken one after the other.
        folds: The fold of each pair, from 0 on, in each deal.
        covariates: What must not decide about a label, chosen minus rejected, such as a length; in any unit.
        weights: Of pairs in the fit; 0 leaves a pair out of it, though it gets a margin. All 1 by default.

    Raises:
        ValueError: If the folds are not those of these pairs or there are fewer than two.
    """

    def __init__(
        self,
        features: Iterable[Float[np.ndarray, "pairs _"]],
        folds: Folds,
        *,
        covariates: Covariates | None = None,
        weights: PerPair | None = None,
    ) -> None:
        self._bases = []
        for one in features:
            if folds.ndim != 2 or folds.shape[1] != len(one) or folds.max() < 1:
                raise ValueError(
                    f"Held-out margins need two or more folds of {len(one)} pairs, shape (deals, {len(one)}); got "
                    f"{folds.shape} with folds up to {folds.max()}. Deal the pairs into more folds."
                )
            self._bases.append(_Basis(one, covariates))
        self._folds, self._num_folds = folds, int(folds.max()) + 1
        self._weights = np.ones(folds.shape[1]) if weights is None else np.asarray(weights, dtype=np.float64)
        # Which pairs the fit of a column sees: those of all folds but one, deal by deal.
        self._seen = np.concatenate([deal[:, None] != np.arange(self._num_folds) for deal in folds], axis=1)

    def held_out(self, *, strengths: Sequence[float] = STRENGTHS) -> HeldOut:
        """Fit without each fold, and take the margins of its pairs from that fit; λ is chosen on the first deal."""
        chosen = [self._choose(basis, strengths) for basis in self._bases]
        return self._held_out([fits for fits, _ in chosen], tuple(strength for _, strength in chosen))

    def without_suspects(
        self, before: HeldOut, *, trained: int = 0, is_known: np.ndarray | None = None, counts_covariates: bool = False
    ) -> Refit:
        """Leave out what held-out margins contradict, fit again, and compare by labels that neither fit has seen.

        This is ROPO's alternation of filtering and training (arXiv:2404.04102, section 3) on linear models, nested:
        which pairs are left out of the fit that scores a fold is found without that fold, so no label has a say in its
        own judgement. Suspects are found by all kinds of features together; what a training gains without them is asked
        of the one that it is a regression on.

        Args:
            before: The fits with all pairs; of three folds or more.
            trained: The kind of features that a training works with: a place among them.
            is_known: Pairs that are never suspects, shape (pairs,), bool.
            counts_covariates: Whether what covariates add to a margin is evidence as well.

        Returns:
            The new fits, and what leaving out has gained.
        """
        suspects = self._suspects(before, counts_covariates=counts_covariates)
        if is_known is not None:
            suspects &= ~is_known[:, None]
        seen = self._seen & ~suspects
        alone = np.eye(len(before.shares))[trained]
        kinds = zip(self._bases, before.strengths, before.shares + alone, before.fits, strict=True)
        fits = [self._solve(basis, seen, strength) if share else old for basis, strength, share, old in kinds]
        after = self._held_out(fits, before.strengths, before.shares)
        of_judges, of_training = (
            self._gain(before, after, shares, counts_covariates=counts_covariates) for shares in (before.shares, alone)
        )
        return Refit(held_out=after, of_judges=of_judges, of_training=of_training)

    def _choose(self, basis: "_Basis", strengths: Sequence[float]) -> tuple[np.ndarray, float]:
        """The fits to one kind of features by the penalty that predicts unseen labels best, and that penalty."""
        first = self._seen[:, : self._num_folds]
        tried = self._solve(basis, np.tile(first, len(strengths)), np.repeat(strengths, self._num_folds))
        by_strength = [tried[:, i * self._num_folds :][:, : self._num_folds] for i in range(len(strengths))]
        losses = [self._loss(self._by_deal(basis, fits)[0].mean(axis=1)) for fits in by_strength]
        best = int(np.argmin(losses))
        fits, strength = by_strength[best], float(strengths[best])
        if len(self._folds) > 1:
            fits = np.concatenate([fits, self._solve(basis, self._seen[:, self._num_folds :], strength)], axis=1)
        return fits, strength

    def _held_out(
        self, fits: Sequence[np.ndarray], strengths: tuple[float, ...], shares: np.ndarray | None = None
    ) -> HeldOut:
        both = [self._by_deal(basis, one) for basis, one in zip(self._bases, fits, strict=True)]
        totals, surfaces = (np.stack([pair[i].mean(axis=1) for pair in both]) for i in range(2))
        shares = self._best_shares(totals) if shares is None else shares
        loss = self._loss(shares @ totals)
        return HeldOut(
            totals=totals, surfaces=surfaces, shares=shares, loss=loss, strengths=strengths, fits=tuple(fits)
        )

    def _best_shares(self, totals: PerKind) -> Float[np.ndarray, " kinds"]:
        """Weights of the highest held-out likelihood; where none helps, the kind that harms least is taken as it is."""
        num_kinds = len(totals)
        if num_kinds == 1:
            return np.ones(1)

        def loss(shares: np.ndarray) -> tuple[float, np.ndarray]:
            total = shares @ totals
            return self._loss(total), -(totals @ (self._weights * expit(-total))) / self._weights.sum()

        start = np.full(num_kinds, 1.0 / num_kinds)
        found = np.asarray(minimize(loss, start, jac=True, method="L-BFGS-B", bounds=[(0.0, None)] * num_kinds).x)
        return found if found.any() else np.eye(num_kinds)[np.argmin([self._loss(one) for one in totals])]

    def _suspects(self, before: HeldOut, *, counts_covariates: bool) -> np.ndarray:
        """Which pairs are contradicted by fits without their own fold and without that of the column."""
        both = list(combinations(range(self._num_folds), 2))
        seen = np.stack([(deal != one) & (deal != other) for deal in self._folds for one, other in both], axis=1)
        margins = np.zeros(seen.shape, dtype=np.float32)
        for basis, strength, share in zip(self._bases, before.strengths, before.shares, strict=True):
            if share:
                fits = self._solve(basis, seen, strength)
                surface = 0.0 if counts_covariates else basis.surface(fits)
                margins += np.float32(share) * (basis.margins(fits) - surface)
        suspects = np.zeros_like(self._seen)
        for number, deal in enumerate(self._folds):
            for place, (one, other) in enumerate(both, start=number * len(both)):
                for own, left_out in ((one, other), (other, one)):
                    column = number * self._num_folds + left_out
                    suspects[deal == own, column] = margins[deal == own, place] < 0
        return suspects

    def _solve(self, basis: "_Basis", seen: np.ndarray, penalties: float | np.ndarray) -> np.ndarray:
        return _solve(basis, self._weights[:, None] * seen, np.broadcast_to(penalties, seen.shape[1:]))

    def _by_deal(self, basis: "_Basis", fits: np.ndarray) -> tuple[PerDeal, PerDeal]:
        """Of each pair and deal that there are fits of: the margin without its fold, and what covariates add to it."""
        folds = self._folds[: fits.shape[1] // self._num_folds]
        columns = folds.T + self._num_folds * np.arange(len(folds))
        both = (basis.margins(fits), basis.surface(fits))
        margins, surface = (np.take_along_axis(values, columns, axis=1).astype(np.float64) for values in both)
        return margins, surface

    def _gain(self, before: HeldOut, after: HeldOut, shares: np.ndarray, *, counts_covariates: bool) -> Gain:
        """How much more the second fits agree with, by kinds of features with these weights."""
        without, within = (
            new - old for new, old in zip(*(self._agreement(one, shares) for one in (after, before)), strict=True)
        )
        gain, error = self._mean(within if counts_covariates else without)
        with_covariates, its_error = self._mean(within)
        return Gain(gain=gain, error=error, with_covariates=with_covariates, with_covariates_error=its_error)

    def _mean(self, change: PerPair) -> tuple[float, float]:
        """The weighted mean, and its standard error."""
        mean = mean_of(change, self._weights)
        return mean, float(np.sqrt(mean_of((change - mean) ** 2, self._weights) / self._weights.sum()))

    def _agreement(self, found: HeldOut, shares: np.ndarray) -> tuple[PerPair, PerPair]:
        """In what share of the deals the margin agrees with the label, without and with covariates; 0 counts half."""
        margins, surfaces = np.zeros((2, *self._folds.T.shape))
        for basis, fits, share in zip(self._bases, found.fits, shares, strict=True):
            if share:
                both = self._by_deal(basis, fits)
                margins, surfaces = margins + share * both[0], surfaces + share * both[1]
        without, within = ((np.sign(one).mean(axis=1) + 1) / 2 for one in (margins - surfaces, margins))
        return without, within

    def _loss(self, margins: PerPair) -> float:
        return mean_of(np.logaddexp(0.0, -margins), self._weights)


class _Basis:
    """Coordinates in which the features are uncorrelated, so that the penalty and the curvature are both diagonal.

    Features are orthogonal to covariates, so each have coordinates of their own; those of covariates come last. In
    single precision throughout: half the memory, and twice as fast, where a fit is asked for to 1e-3 nats.
    """

    def __init__(self, features: Features, covariates: Covariates | None) -> None:
        features = np.asarray(features, dtype=np.float32)
        free = np.zeros((len(features), 0), dtype=np.float32)
        if covariates is not None:
            scaled = np.sqrt(_FREE) * scaled_to_one(np.asarray(covariates, dtype=np.float64))
            vectors, sizes, _ = svd(scaled, full_matrices=False)
            vectors, sizes = vectors[:, sizes > _TINY].astype(np.float32), sizes[sizes > _TINY]
            features = features - vectors @ (vectors.T @ features)
            free = vectors * sizes.astype(np.float32)
        coordinates, spectrum = _principal(scaled_to_one(features))
        self.num_free = free.shape[1]
        self.spectrum = np.concatenate([spectrum, (free.astype(np.float64) ** 2).sum(axis=0)])
        self.coordinates = np.concatenate([coordinates, free], axis=1)

    def margins(self, fits: np.ndarray) -> PerFit:
        return np.asarray(self.coordinates @ fits)

    def surface(self, fits: np.ndarray) -> PerFit:
        """What covariates add to the margins."""
        start = len(self.spectrum) - self.num_free
        return np.asarray(self.coordinates[:, start:] @ fits[start:])


def _principal(features: Features) -> tuple[Float[np.ndarray, "pairs some"], Float[np.ndarray, " some"]]:
    """Principal components of the features, not centred, and the squared norm of each over the pairs."""
    is_wide = len(features) <= features.shape[1]
    if is_wide:
        gram = features @ features.T
    else:  # by parts, whose sum is in double precision
        parts = (features[start : start + _ROWS] for start in range(0, len(features), _ROWS))
        gram = sum((part.T @ part for part in parts), start=np.zeros(2 * features.shape[1:])).astype(np.float32)
    spectrum, vectors = eigh(gram, driver="evd", overwrite_a=True)
    is_kept = spectrum > _LEAST * max(spectrum[-1], _TINY)
    spectrum, vectors = spectrum[is_kept], vectors[:, is_kept]
    return (vectors * np.sqrt(spectrum) if is_wide else features @ vectors), spectrum


def scaled_to_one(features: Float[np.ndarray, "pairs some"]) -> Float[np.ndarray, "pairs some"]:
    """Features scaled to a mean squared norm of 1."""
    squared_norm = float((features**2).sum(dtype=np.float64)) / max(len(features), 1)
    return np.asarray(features / max(float(np.sqrt(squared_norm)), _TINY))


def _solve(basis: _Basis, weights: PerFit, penalties: np.ndarray) -> np.ndarray:
    """Maximise the likelihood of every problem by accelerated gradient steps; shape (coordinates, problems).

    Momentum by Nesterov, begun anew where it points uphill (O'Donoghue & Candès 2015).
    """
    weights, penalties = weights.astype(np.float32), penalties.astype(np.float32)
    # The second derivative of the loss is at most ¼ (Böhning & Lindsay 1988), and the eigenbasis makes steps diagonal.
    inverse = (1.0 / (basis.spectrum[:, None] / 4 * weights.max() + penalties)).astype(np.float32)
    fits: np.ndarray = np.zeros_like(inverse)
    ahead, margins = fits, np.zeros_like(weights)
    margins_ahead = margins  # they are linear in the fits: one product a step makes both
    momentum: np.ndarray = np.ones(len(penalties), dtype=np.float32)
    for _ in range(_MAX_STEPS):
        gradient = basis.coordinates.T @ (weights * expit(-margins_ahead)) - penalties * ahead
        new = ahead + inverse * gradient
        step = new - fits
        momentum[(step * gradient).sum(axis=0) < 0] = 1.0
        following = (1 + np.sqrt(1 + 4 * momentum**2)) / 2
        onward = (momentum - 1) / following
        new_margins = basis.margins(new)
        change = new_margins - margins
        ahead, margins_ahead = new + onward * step, new_margins + onward * change
        fits, margins, momentum = new, new_margins, following
        if np.abs(change).max() < _TOLERANCE:
            break
    return fits
