import numpy as np
import pytest

from ropo.noise.review_order import has_suspects, review_order


def test_p_flip_ranks_where_it_calls_a_pair_and_the_margin_elsewhere():
    p_flip, margins = np.array([0.1, 0.9, 0.9, 0.0]), np.array([-3.0, -1.0, -2.0, np.nan])
    assert review_order(p_flip, margins, by_margin=False).tolist() == [2, 1, 0, 3]
    assert review_order(p_flip, margins, by_margin=True).tolist() == [0, 2, 1, 3]


@pytest.mark.parametrize(
    ("p_flip", "is_informative", "is_called"), [(0.5, True, True), (0.9, False, False), (0.4, True, False)]
)
def test_a_call_needs_a_rate_that_can_be_told(p_flip, is_informative, is_called):
    p_flips = np.array([p_flip, 1.0])  # a person has judged the second
    assert has_suspects(p_flips, np.array([True, False]), is_informative=is_informative) == is_called
