"""How sure a share is that was counted.

In: a share and the number of cases. Out: an interval.
"""

import numpy as np

Z_90 = 1.6449  # a normal value lies within so many standard deviations in 90 of 100 cases


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """90 % interval of a share seen in `count` cases (Wilson's, which stays inside [0, 1]).

    Examples:
        >>> [round(value, 3) for value in wilson_interval(0.5, 100)]
        [0.419, 0.581]
    """
    z = Z_90
    center = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * float(np.sqrt(share * (1 - share) / count + z * z / (4 * count * count)))
    return max(0.0, center - half), min(1.0, center + half)
