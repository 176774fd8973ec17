"""A reward that looks at words alone: a linear model of the words and word pairs that a response contains.

In: labelled texts, or preference pairs. Out: `WordReward`, a function of any text.

The one idea: it is small enough to be exact and to be stored as plain numbers, and its worth depends on how much it has
seen. Fitted on thousands of labelled texts it is the truth of a controlled task; on a few pairs, a poor annotator.
"""

import itertools
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize
from scipy.sparse import csr_matrix
from scipy.special import expit

from ropo.pairs import Pair, Text
from ropo.provenance import write_json


@dataclass(frozen=True, slots=True)
class WordReward:
    """Sum of the weights of the words and neighbouring word pairs in a response, each counted once."""

    weights: Mapping[str, float]
    bias: float = 0.0

    def __call__(self, prompt: Text, response: Text) -> float:
        """Reward of a response, log-odds; the prompt is not looked at."""
        del prompt
        return self.bias + sum(self.weights.get(term, 0.0) for term in terms(response))

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        write_json(path, {"bias": self.bias, "weights": dict(self.weights)})

    @classmethod
    def load(cls, path: Path) -> "WordReward":
        """Read what `save` wrote."""
        found = json.loads(path.read_text("utf-8"))
        return cls(found["weights"], found["bias"])


def terms(text: Text) -> set[str]:
    """The words of a text, in lower case, and its pairs of neighbouring words.

    Examples:
        >>> sorted(terms("Not good ."))
        ['good', 'not', 'not good']
    """
    plain = text if isinstance(text, str) else " ".join(str(message["content"]) for message in text)
    words = re.findall(r"[\w']+", plain.lower())
    return {*words, *(f"{one} {other}" for one, other in itertools.pairwise(words))}


def fit_on_texts(texts: Sequence[str], is_positive: ArrayLike, *, l2: float = 1.0, min_count: int = 2) -> WordReward:
    """Logistic regression of a label on the terms of a text.

    Args:
        texts: The texts.
        is_positive: Their labels.
        l2: Strength of the penalty ½·l2·Σ w² on the summed loss.
        min_count: Terms in fewer texts are left out.

    Returns:
        The fitted reward: the log-odds of a positive label.
    """
    found = [terms(text) for text in texts]
    vocabulary = _vocabulary(found, min_count)
    weights, bias = _fit(_matrix(found, vocabulary), np.asarray(is_positive, dtype=bool), l2=l2, has_bias=True)
    return WordReward(dict(zip(vocabulary, weights.tolist(), strict=True)), bias)


def fit_on_pairs(pairs: Sequence[Pair], *, l2: float = 1.0) -> WordReward:
    """Bradley-Terry model of pairs: which terms the chosen responses have more often than the rejected ones.

    Args:
        pairs: The pairs.
        l2: As for `fit_on_texts`.

    Returns:
        The fitted reward: σ of a difference is the probability that one response is preferred to the other.
    """
    chosen, rejected = ([terms(getattr(pair, side)) for pair in pairs] for side in ("chosen", "rejected"))
    vocabulary = _vocabulary([*chosen, *rejected], 1)
    difference = _matrix(chosen, vocabulary) - _matrix(rejected, vocabulary)
    weights, _ = _fit(difference, np.ones(len(pairs), dtype=bool), l2=l2, has_bias=False)
    return WordReward(dict(zip(vocabulary, weights.tolist(), strict=True)))


def _vocabulary(found: Sequence[set[str]], min_count: int) -> dict[str, int]:
    counts = Counter(term for one in found for term in one)
    return {term: i for i, term in enumerate(sorted(term for term, n in counts.items() if n >= min_count))}


def _matrix(found: Sequence[set[str]], vocabulary: Mapping[str, int]) -> csr_matrix:
    columns = [[vocabulary[term] for term in one if term in vocabulary] for one in found]
    ends = np.cumsum([0, *(len(one) for one in columns)])
    flat = np.array([i for one in columns for i in one], dtype=np.int64)
    return csr_matrix((np.ones(len(flat)), flat, ends), shape=(len(found), len(vocabulary)))


def _fit(
    x: csr_matrix, is_positive: NDArray[np.bool_], *, l2: float, has_bias: bool
) -> tuple[NDArray[np.float64], float]:
    sign = np.where(is_positive, 1.0, -1.0)

    def objective(w: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        margin = sign * (x @ w[:-1] + has_bias * w[-1])
        slope = -sign * expit(-margin)
        value = np.logaddexp(0.0, -margin).sum() + l2 / 2 * (w[:-1] ** 2).sum()
        return float(value), np.append(x.T @ slope + l2 * w[:-1], has_bias * slope.sum())

    found = minimize(objective, np.zeros(x.shape[1] + 1), jac=True, method="L-BFGS-B")
    return found.x[:-1], float(found.x[-1])
