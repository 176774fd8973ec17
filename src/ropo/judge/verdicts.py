"""What a judge is, and the ways to use what it says.

In: a judge and pairs. Out: checked probabilities, or pairs with the response that the judge prefers as `chosen`.

The one idea: every judge is a function, so a person, a reward model and a chat model are asked alike, and none is
needed.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ropo.pairs import Pair

Judge = Callable[[Sequence[Pair]], list[float | None]]
"""For each pair the probability that `chosen` is better than `rejected`; None where the judge could not tell."""


def ask(judge: Judge, pairs: Sequence[Pair]) -> NDArray[np.float64]:
    """What a judge says about pairs, checked.

    Args:
        judge: Any function from pairs to probabilities; not called for no pairs.
        pairs: All that is to be judged; a judge that loads a model loads it once per call.

    Returns:
        Probability that `chosen` is better, shape (pairs,); not-a-number where the judge could not tell.

    Raises:
        ValueError: If the judge gives another number of values, or one that is no probability.

    Examples:
        >>> pair = Pair(prompt="1 + 1 =", chosen=" 2", rejected=" 3", row=0)
        >>> ask(lambda pairs: [0.9 if "2" in pair.chosen else None for pair in pairs], [pair]).tolist()
        [0.9]
    """
    if not pairs:
        return np.zeros(0)
    said = judge(pairs)
    if len(said) != len(pairs):
        raise ValueError(f"A judge needs to give one value per pair, {len(pairs)}; got {len(said)}. None is a value.")
    p_right = np.array([np.nan if value is None else value for value in said], dtype=np.float64)
    for value, p in zip(said, p_right, strict=True):
        if value is not None and not 0.0 <= p <= 1.0:
            raise ValueError(f"A judge needs to give probabilities in [0, 1] or None; got {value}. Is it a reward?")
    return p_right


def settle(judge: Judge, pairs: Sequence[Pair]) -> list[Pair | None]:
    """Pairs with the response that the judge prefers as `chosen`; None where it cannot tell or calls it a tie.

    Examples:
        >>> pair = Pair(prompt="1 + 1 =", chosen=" 3", rejected=" 2", row=0)
        >>> [settled] = settle(lambda pairs: [0.1], [pair])
        >>> settled.chosen
        ' 2'
    """
    settled: list[Pair | None] = []
    for pair, p in zip(pairs, ask(judge, pairs), strict=True):
        if p > 0.5:
            settled.append(pair)
        elif p < 0.5:
            settled.append(replace(pair, chosen=pair.rejected, rejected=pair.chosen))
        else:
            settled.append(None)
    return settled
