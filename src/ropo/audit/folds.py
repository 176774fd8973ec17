"""Which pairs are scored together, by what has learned from all others."""

from collections.abc import Sequence

import numpy as np

from ropo.data.validate import text_id
from ropo.pairs import Pair


def folds_of(pairs: Sequence[Pair], num_folds: int, *, seeds: Sequence[int]) -> list[dict[str, int]]:
    """Fold of every pair by its id, as evenly as can be, dealt with each seed; the order of the pairs does not matter.

    Pairs with the same text (duplicates, contradictions, all but for case, white space and punctuation, see `text_id`)
    share one: nothing scores a pair whose texts it has seen.

    Raises:
        ValueError: If there are fewer different pairs than folds.
    """
    texts = {pair.id: text_id(pair, has_punctuation=False) for pair in pairs}
    first: dict[str, str] = {}  # a text is called by the first of its ids
    for id_, text in texts.items():
        first[text] = min(first.get(text, id_), id_)
    names = sorted(first.values())
    if len(names) < num_folds:
        raise ValueError(
            f"num_folds needs at least as many different pairs; got {num_folds} folds and {len(names)} pairs. "
            "Use fewer folds, or 0 for none."
        )
    place_of = {name: place for place, name in enumerate(names)}
    place = {id_: place_of[first[text]] for id_, text in texts.items()}
    deals = [(np.random.default_rng(seed).permutation(len(names)) % num_folds).tolist() for seed in seeds]
    return [{id_: deal[place[id_]] for id_ in texts} for deal in deals]
