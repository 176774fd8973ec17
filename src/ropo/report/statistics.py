"""Arrays -> single plain numbers for the report: rounded, and None where nothing is known.

In: numpy arrays and floats, NaN allowed. Out: floats of six digits, or None.
"""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def number(value: float | None) -> float | None:
    """A finite number rounded to six digits, or None."""
    if value is None or not np.isfinite(value):
        return None
    return float(f"{float(value):.6g}")


def numbers(values: Iterable[float | None]) -> list[float | None]:
    """`number` of each."""
    return [number(value) for value in values]


def mean(values: Floats | NDArray[np.bool_]) -> float | None:
    """Mean of the finite values, or None if there are none."""
    finite = values[np.isfinite(values)]
    return number(float(finite.mean())) if len(finite) else None


def median(values: Floats) -> float | None:
    """Median of the finite values, or None if there are none."""
    finite = values[np.isfinite(values)]
    return number(float(np.median(finite))) if len(finite) else None


def round_step(step: float) -> float:
    """The next number 1, 2, 2.5 or 5 times a power of ten.

    Examples:
        >>> round_step(0.13), round_step(3.0)
        (0.2, 5.0)
    """
    power = float(10.0 ** np.floor(np.log10(step)))
    return next(float(factor * power) for factor in (1, 2, 2.5, 5, 10) if factor * power >= step * (1 - 1e-9))
