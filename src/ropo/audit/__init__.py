"""What is known about the labels before the first training: held-out margins, the flip rate, a decision for every pair.

The one idea: a pair is judged only by what has not seen its label. A scorer gives such held-out margins, `ropo.noise`
turns them into a flip rate and P(flipped), and a rule decides about every pair. All in one pass over the data.

The way: `folds` -> `weights` -> `scorers` (what one gets and gives) -> `features`, `models` (the two) -> `run`.
"""

from ropo.audit.run import Audit

__all__ = ["Audit"]
