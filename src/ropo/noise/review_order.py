"""Which pairs a person should review first.

In: P(flipped) and the held-out margin of each pair. Out: an order, the most suspect pair first.

The one idea: how many labels are flipped and which ones are two questions. Margins can rank flips well and still not
tell their number, so where P(flipped) calls nothing, the margin ranks.
"""

import numpy as np
from jaxtyping import Bool, Int

from ropo.noise.shares import PerPair

WIDE_INTERVAL = 0.1
"""An interval wider than this leaves open how many of the contradicted labels are flips and how many honest doubt."""


def has_suspects(p_flip: PerPair, is_open: Bool[np.ndarray, " pairs"], *, is_informative: bool) -> bool:
    """Whether the rate can be told and a pair without a review decision (`is_open`) is likelier flipped than right."""
    return bool(is_informative and (p_flip[is_open] >= 0.5).any())


def review_order(p_flip: PerPair, margins: PerPair, *, by_margin: bool) -> Int[np.ndarray, " pairs"]:
    """Positions of the pairs by P(flipped), or `by_margin`; of equals the smaller margin, then the earlier pair.

    Examples:
        >>> review_order(np.zeros(3), np.array([2.0, -1.0, -3.0]), by_margin=False).tolist()
        [2, 1, 0]
    """
    places = np.arange(len(margins))
    return np.lexsort((places, margins) if by_margin else (places, margins, -p_flip))
