"""Options outside their range are refused, in one sentence that says what to do instead."""

import math


def check_positive(loss: str, name: str, value: float, advice: str) -> None:
    """Refuse a number that is not finite and above 0."""
    if not 0 < value < math.inf:
        raise ValueError(f"{loss} needs a finite {name} > 0; got {value}. {advice}")


def check_share(loss: str, name: str, value: float, advice: str) -> None:
    """Refuse a number outside [0, 1]."""
    if not 0 <= value <= 1:
        raise ValueError(f"{loss} needs {name} in [0, 1]; got {value}. {advice}")
