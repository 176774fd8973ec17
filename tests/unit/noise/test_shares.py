import numpy as np

from ropo.noise.shares import wilson_interval


def test_wilson_interval_covers():
    """Seen shares of 40 draws cover the true share in 90 % of 4,000 trials; false alarm of these bounds below 1e-9."""
    draws = np.random.default_rng(0).binomial(40, 0.3, size=4000) / 40
    covered = [low <= 0.3 <= high for low, high in (wilson_interval(float(share), 40) for share in draws)]
    assert 0.87 < np.mean(covered) < 0.94
