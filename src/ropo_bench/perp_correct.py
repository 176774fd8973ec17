"""PerpCorrect: find flipped pairs by what a surrogate, aligned on few right ones, finds less perplexing; turn them.

In: noisy pairs, a few right ones, a model, a way to make options. Out: the pairs with corrected labels.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit, logit
from scipy.stats import norm

from ropo.config import ROPOConfig
from ropo.data.tokenize import TokenizedPair, tokenize_pairs
from ropo.logps.score import score_pairs
from ropo.models.source import Model, load_tokenizer
from ropo.pairs import Pair
from ropo.run.align import run_rounds
from ropo.train.dataset import batching

_NUM_ITERATIONS, _SHARE_PER_ITERATION = 6, 0.02  # as the authors' code has them
_EPOCHS = 4.0  # of a surrogate over its few pairs; our choice, the paper's surrogate is an adapter


@dataclass(frozen=True, slots=True)
class Mixture:
    """Two normal distributions that mirror each other: right pairs at `mean`, flipped ones at −`mean`.

    Attributes:
        share_right: α, the weight of the first.
        mean: μ, below 0: right pairs have the smaller perplexity on the chosen side.
        sd: σ of both.
    """

    share_right: float
    mean: float
    sd: float

    @property
    def threshold(self) -> float:
        """Where both are equally likely: σ²/(2μ)·log((1−α)/α)."""
        return self.sd**2 / (2 * self.mean) * float(np.log((1 - self.share_right) / self.share_right))

    @property
    def accuracy(self) -> float:
        """Share of pairs that the threshold puts on the right side, if the mixture is true.

        Examples:
            >>> round(Mixture(0.8, -1.2, 1.0).accuracy, 6)
            0.916444
        """
        right = norm.cdf((self.threshold - self.mean) / self.sd)
        flipped = 1 - norm.cdf((self.threshold + self.mean) / self.sd)
        return float(self.share_right * right + (1 - self.share_right) * flipped)


def fit_mixture(differences: NDArray[np.float64]) -> Mixture:
    """Fit the mirrored mixture by maximum likelihood; the authors fit a histogram of 100 bins.

    Args:
        differences: Log-perplexity of the chosen side minus that of the rejected one, shape (pairs,).
    """
    scale = float(differences.std()) or 1.0

    def cost(free: NDArray[np.float64]) -> float:
        share, mean, sd = 0.5 + 0.5 * expit(free[0]), -scale * np.exp(free[1]), scale * np.exp(free[2])
        both = np.logaddexp(
            np.log(share) + norm.logpdf(differences, mean, sd), np.log1p(-share) + norm.logpdf(differences, -mean, sd)
        )
        return -float(both.mean())

    # 0.5 + 0.5·σ: a label is right more often than not, or nothing could be learned. Away from 1, where nothing moves.
    starts = [(logit(2 * share - 1), np.log(mean), np.log(0.7)) for share in (0.6, 0.8, 0.95) for mean in (0.3, 0.8)]
    bounds = [(-8.0, 8.0), (-6.0, 2.0), (-4.0, 2.0)]
    found = min((minimize(cost, start, method="L-BFGS-B", bounds=bounds) for start in starts), key=lambda one: one.fun)
    share, mean, sd = 0.5 + 0.5 * expit(found.x[0]), -scale * np.exp(found.x[1]), scale * np.exp(found.x[2])
    return Mixture(float(share), float(mean), float(sd))


def correct_by_perplexity(
    model: Path, pairs: Sequence[Pair], right: Sequence[Pair], config: Callable[..., ROPOConfig]
) -> list[Pair]:
    """Turn the labels round that a surrogate finds the wrong way round (PerpCorrect, NeurIPS 2024).

    Six times: align a surrogate on the right pairs and on the pairs that the last surrogate was surest of, of either
    kind, the flipped ones swapped; 2 % more of them each time. The surrogate that tells the two best has the last word.

    Args:
        model: Folder of the initial model.
        pairs: Noisy ones.
        right: A few with labels known to be right; the method cannot start without them.
        config: Makes options from the name of a folder and further options.
    """
    best: tuple[Mixture, NDArray[np.float64]] | None = None
    training = list(right)
    for iteration in range(_NUM_ITERATIONS):
        args = config(f"surrogate_{iteration}", num_train_epochs=_EPOCHS)
        folder = Path(str(args.output_dir))
        run_rounds(model, [replace(pair, row=row) for row, pair in enumerate(training)], args)
        differences = perplexity_differences(folder, pairs, args)
        shutil.rmtree(folder)
        mixture = fit_mixture(differences)
        if best is None or mixture.accuracy > best[0].accuracy:
            best = (mixture, differences)
        training = [*right, *_surest(pairs, differences, mixture, number=_budget(len(pairs), iteration + 1))]
    assert best is not None  # noqa: S101 - there is at least one iteration
    is_flipped = best[1] > best[0].threshold
    return [swapped(pair) if wrong else pair for pair, wrong in zip(pairs, is_flipped, strict=True)]


def _budget(num_pairs: int, iteration: int) -> int:
    return round(_SHARE_PER_ITERATION * iteration * num_pairs)


def _surest(pairs: Sequence[Pair], differences: NDArray[np.float64], mixture: Mixture, *, number: int) -> list[Pair]:
    """Pairs from both tails, in proportion to the two kinds; those of the upper tail swapped."""
    order = np.argsort(differences, kind="stable")
    num_right = round(mixture.share_right * number)
    lower, upper = order[:num_right], order[len(order) - (number - num_right) :]
    return [pairs[i] for i in lower] + [swapped(pairs[i]) for i in upper]


def swapped(pair: Pair) -> Pair:
    """The pair with chosen and rejected swapped."""
    return replace(pair, chosen=pair.rejected, rejected=pair.chosen)


def perplexity_differences(folder: Path, pairs: Sequence[Pair], args: ROPOConfig) -> NDArray[np.float64]:
    """Log-perplexity of prompt and chosen response minus that of prompt and rejected response, nats per token.

    Returns:
        One number per pair: large where the label is likely wrong.
    """
    tokenizer = load_tokenizer(str(folder))
    tokenized = tokenize_pairs(pairs, tokenizer, max_length=args.max_length)
    # The prompt counts too, so it is scored as if it belonged to the response; its first token has nothing before it.
    whole = [
        TokenizedPair(
            prompt=one.prompt[:1],
            chosen=np.concatenate([one.prompt[1:], one.chosen]),
            rejected=np.concatenate([one.prompt[1:], one.rejected]),
        )
        for one in tokenized.tokens
    ]
    logps = score_pairs(Model(str(folder)).load(), whole, batching(args, tokenizer))
    assert logps.chosen_tokens is not None  # noqa: S101 - `score_pairs` counts
    assert logps.rejected_tokens is not None  # noqa: S101
    difference = logps.rejected / logps.rejected_tokens - logps.chosen / logps.chosen_tokens
    found: NDArray[np.float64] = difference.double().numpy()
    return found
