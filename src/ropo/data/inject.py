"""Label noise whose truth is known: swap chosen and rejected of some pairs and say which.

In: `Pair`s and a flip rate. Out: the same pairs with exactly that share flipped, and the answer key. For benchmarks and
tests only.

The one idea: a kind of noise is a score per pair, the log-odds of a flip up to a constant. One constant for all pairs
is then chosen so that the flip probabilities σ(score + constant) meet the asked rate, whatever the kind.

Add a kind: one function from pairs to scores, one line in `NOISE`.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.special import expit
from scipy.stats import rankdata

from ropo.pairs import Pair, Text

__all__ = ["NOISE", "Noise", "flip_labels"]

Scores = NDArray[np.float64]

ANNOTATORS = tuple(f"annotator_{number}" for number in range(5))
BAD_ANNOTATOR = ANNOTATORS[-1]

_STEEPNESS = 2.0  # log-odds for one standard deviation of length difference, or for one mean gap
_CONCENTRATION = 3.0  # log-odds between the flipped group and the others: 20 times the odds


@dataclass(frozen=True, slots=True, kw_only=True)
class Noise:
    """One kind of label noise.

    Attributes:
        score: Log-odds of a flip for each pair, up to a constant; gets the pairs and what `needs` names, or None.
        meaning: Who makes such noise.
        needs: The argument of `flip_labels` without which the kind is not defined.
        has_annotators: Whether the pairs are shared out among `ANNOTATORS` first.
    """

    score: Callable[[list[Pair], ArrayLike | None], Scores]
    meaning: str
    needs: str | None = None
    has_annotators: bool = False


def flip_labels(
    pairs: Sequence[Pair],
    *,
    rate: float,
    seed: int,
    kind: str = "symmetric",
    rewards: ArrayLike | None = None,
    words: Sequence[str] | None = None,
) -> tuple[list[Pair], NDArray[np.bool_]]:
    """Swap chosen and rejected of exactly `round(rate · n)` pairs.

    The number is exact and not itself random, so that two seeds differ in which pairs are flipped and not in how many.
    Each pair is flipped with exactly the probability that the kind gives it: systematic sampling in random order
    (Madow, 1949), which for `symmetric` is a uniformly random subset.

    Args:
        pairs: Pairs whose labels are taken to be right; left as they are.
        rate: η, the share of pairs to flip, in [0, 0.5).
        seed: Same pairs, same seed, same flips.
        kind: A name in `NOISE`. `annotator` shares the pairs out among five annotators, in place of any that they had.
        rewards: Of chosen and rejected, shape (pairs, 2): the true ones for `near_tie` and `larger_model`, those
            that the annotator goes by for `weak_annotator`; for these only.
        words: Whole words of the prompts on which the flips concentrate; `topic` only.

    Returns:
        The pairs in the same order with the same ids and rows, and the answer key: True where the label was flipped.

    Raises:
        ValueError: If the rate is outside [0, 0.5), the kind is unknown, an argument that the kind needs is missing or
            does not fit, or one is given that it would ignore.

    Examples:
        >>> pairs = [Pair(prompt="p", chosen=f"good {row}", rejected="bad", row=row) for row in range(10)]
        >>> noisy, is_flipped = flip_labels(pairs, rate=0.3, seed=0)
        >>> int(is_flipped.sum()), noisy[int(is_flipped.argmax())].chosen
        (3, 'bad')
    """
    given = {"rewards": rewards, "words": words}
    noise = _noise_of(kind, rate, given)
    rng = np.random.default_rng(seed)
    noisy = list(pairs)
    if noise.has_annotators:
        noisy = [
            replace(p, annotator=str(name)) for p, name in zip(noisy, rng.choice(ANNOTATORS, len(noisy)), strict=True)
        ]
    score = noise.score(noisy, given[noise.needs] if noise.needs else None)
    is_flipped = _draw(score, round(rate * len(noisy)), rng)
    for index in np.flatnonzero(is_flipped):
        noisy[index] = replace(noisy[index], chosen=noisy[index].rejected, rejected=noisy[index].chosen)
    return noisy, is_flipped


def _noise_of(kind: str, rate: float, given: Mapping[str, object]) -> Noise:
    """The entry of a kind in `NOISE`.

    Raises:
        ValueError: As `flip_labels`.
    """
    if not 0 <= rate < 0.5:
        raise ValueError(
            f"flip_labels needs rate in [0, 0.5); got {rate}. At 0.5 labels carry no information; above it, every "
            "label says the opposite."
        )
    if kind not in NOISE:
        raise ValueError(
            f"flip_labels needs a kind of noise that exists; got {kind!r}. Choose from {', '.join(NOISE)}."
        )
    noise = NOISE[kind]
    for name, value in given.items():
        if name == noise.needs and value is None:
            raise ValueError(f"Noise of kind {kind!r} needs {name}; got none. Pass {name}=.")
        if name != noise.needs and value is not None:
            raise ValueError(f"Noise of kind {kind!r} needs no {name}; got some. Leave it out.")
    return noise


def _draw(score: Scores, num_flips: int, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Draw exactly `num_flips` positions, each with probability σ(score + constant)."""
    is_flipped = np.zeros(len(score), dtype=bool)
    if num_flips == 0:
        return is_flipped
    constant = brentq(lambda level: expit(score + level).sum() - num_flips, -score.max() - 40, -score.min() + 40)
    order = rng.permutation(len(score))
    # A comb with teeth one apart, laid over the probabilities end to end: a tooth falls on a pair with exactly its p.
    ends = np.cumsum(expit(score + constant)[order])
    teeth = (np.arange(num_flips) + rng.random()) * (ends[-1] / num_flips)
    is_flipped[order[np.searchsorted(ends, teeth, side="right")]] = True
    return is_flipped


def _symmetric(pairs: list[Pair], _: ArrayLike | None) -> Scores:
    return np.zeros(len(pairs))


def _length(pairs: list[Pair], _: ArrayLike | None) -> Scores:
    extra = np.array([len(_plain(pair.rejected)) - len(_plain(pair.chosen)) for pair in pairs], dtype=np.float64)
    return _STEEPNESS * extra / max(float(extra.std()), 1.0)


def _near_tie(pairs: list[Pair], rewards: ArrayLike | None) -> Scores:
    gaps = np.abs(np.subtract(*_checked(pairs, rewards).T))
    return np.asarray(-_STEEPNESS * gaps / (float(gaps.mean()) or 1.0))


def _larger_model(pairs: list[Pair], rewards: ArrayLike | None) -> Scores:
    """One response is a larger model's, the best of two such as the smaller model writes, and is taken for the better.

    With F the distribution of rewards, the larger model's have density 2·f·F. So if the responses were written by one
    of each, the worse is the larger model's with probability F(worse)/(F(worse) + F(better)), whose log-odds these are.
    """
    both = _checked(pairs, rewards)
    share_below = rankdata(both, method="max").reshape(both.shape) / both.size
    return np.asarray(np.log(share_below[:, 1]) - np.log(share_below[:, 0]))


def _weak_annotator(pairs: list[Pair], rewards: ArrayLike | None) -> Scores:
    gaps = np.subtract(*_checked(pairs, rewards).T)
    return np.asarray(-_STEEPNESS * gaps / (float(gaps.std()) or 1.0))


def _checked(pairs: list[Pair], rewards: ArrayLike | None) -> Scores:
    both = np.asarray(rewards, dtype=np.float64)
    if both.shape != (len(pairs), 2) or not np.isfinite(both).all():
        raise ValueError(
            f"rewards needs two finite numbers, of chosen and rejected, for each of the {len(pairs)} pairs; got shape "
            f"{both.shape}. Pass one row per pair."
        )
    return both


def _annotator(pairs: list[Pair], _: ArrayLike | None) -> Scores:
    return _CONCENTRATION * np.array([pair.annotator == BAD_ANNOTATOR for pair in pairs], dtype=np.float64)


def _topic(pairs: list[Pair], words: ArrayLike | None) -> Scores:
    wanted = {str(word).lower() for word in np.atleast_1d(np.asarray(words))}
    prompts = [set(re.findall(r"\w+", _plain(pair.prompt).lower())) for pair in pairs]
    is_hit = np.array([not wanted.isdisjoint(prompt) for prompt in prompts], dtype=bool)
    if not is_hit.any():
        raise ValueError(
            f"words needs at least one that a prompt contains; got {sorted(wanted)}. Take words of the prompts."
        )
    return _CONCENTRATION * is_hit


def _plain(text: Text) -> str:
    return text if isinstance(text, str) else " ".join(str(message["content"]) for message in text)


NOISE: Mapping[str, Noise] = MappingProxyType(
    {
        "symmetric": Noise(score=_symmetric, meaning="every label is as likely to be wrong as any other"),
        "length": Noise(score=_length, meaning="annotators who take the longer response for the better one"),
        "near_tie": Noise(
            score=_near_tie, meaning="annotators who err where the responses are about equal", needs="rewards"
        ),
        "larger_model": Noise(
            score=_larger_model,
            meaning="nobody looks: the larger model is taken to write better",
            needs="rewards",
        ),
        "weak_annotator": Noise(
            score=_weak_annotator, meaning="a poor reward model labels, as sure as it is of itself", needs="rewards"
        ),
        "annotator": Noise(score=_annotator, meaning="one of five annotators errs far more often", has_annotators=True),
        "topic": Noise(score=_topic, meaning="annotators who do not know one subject", needs="words"),
    }
)


def noise_table() -> str:
    """`NOISE` as a Markdown table, for `docs/benchmark.md`."""
    rows = [f"| `{name}` | {noise.meaning} | {noise.needs or ''} |" for name, noise in NOISE.items()]
    return "\n".join(["| kind | who makes such noise | needs |", "|---|---|---|", *rows])
