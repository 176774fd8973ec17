"""Which pairs are judged together, by what has learned from all others.

In: pairs. Out: a fold for each, the same for pairs with the same text.
"""

from collections.abc import Sequence

import numpy as np

from ropo.data.validate import text_id
from ropo.pairs import Pair


def folds_of(pairs: Sequence[Pair], num_folds: int, *, seed: int) -> dict[str, int]:
    """Fold of every pair by its id.

    Pairs with the same text (duplicates, contradictions, all but for case, white space and punctuation, see `text_id`)
    share one: nothing judges a pair whose texts it has seen.

    Args:
        pairs: May repeat.
        num_folds: How many folds.
        seed: Same pairs and seed, same folds, in whatever order the pairs are.

    Returns:
        Fold by id, as evenly as can be.

    Raises:
        ValueError: If there are fewer different pairs than folds.
    """
    texts = {pair.id: text_id(pair, has_punctuation=False) for pair in pairs}
    names: dict[str, str] = {}  # a group is called by the first of its ids
    for id_, text in texts.items():
        names[text] = min(names.get(text, id_), id_)
    fold_of = _deal(list(names.values()), num_folds, seed=seed)
    return {id_: fold_of[names[text]] for id_, text in texts.items()}


def _deal(ids: list[str], num_folds: int, *, seed: int) -> dict[str, int]:
    """Fold of every id, as evenly as can be; ids may repeat."""
    names = sorted(set(ids))
    if len(names) < num_folds:
        raise ValueError(
            f"num_folds needs at least as many different pairs; got {num_folds} folds and {len(names)} pairs. "
            "Use fewer folds, or 0 for none."
        )
    order = np.random.default_rng(seed).permutation(len(names))
    return {name: int(place) % num_folds for name, place in zip(names, order, strict=True)}
