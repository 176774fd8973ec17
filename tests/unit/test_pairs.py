"""What the nouns refuse to hold."""

import numpy as np
import pytest

from ropo.pairs import PairFeatures


def test_blocks_of_features_are_of_the_same_pairs():
    assert len(PairFeatures(blocks={"one": np.zeros((3, 2)), "two": np.zeros((3, 7))})) == 3
    for blocks in ({}, {"one": np.zeros(3)}, {"one": np.zeros((3, 2)), "two": np.zeros((2, 2))}):
        with pytest.raises(ValueError, match="blocks of shape"):
            PairFeatures(blocks=blocks)
