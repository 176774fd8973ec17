"""How sure a share is that was counted."""

import numpy as np


def wilson_interval(share: float, count: int, *, z: float = 1.6449) -> tuple[float, float]:
    """Wilson's interval of a share seen in `count` cases, which stays inside [0, 1].

    Args:
        share: In [0, 1].
        count: Number of cases, 1 or more.
        z: Half width of the interval in standard errors; the default covers 90 %.

    Examples:
        >>> [round(value, 3) for value in wilson_interval(0.5, 100)]
        [0.419, 0.581]
    """
    center = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * float(np.sqrt(share * (1 - share) / count + z * z / (4 * count * count)))
    return max(0.0, center - half), min(1.0, center + half)
