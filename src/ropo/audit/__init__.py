"""What is known about the labels before the first training: held-out margins, the flip rate, a decision for every pair.

In: tokenized pairs, a model, `AuditOptions`. Out: a folder with `margins.safetensors`, `judgement.json` and
`scorers.json`, and the weighted pairs to train on.

The one idea: a pair is judged only by what has not seen its label. A scorer gives such held-out margins, `ropo.noise`
turns them into a flip rate and P(flipped), and a rule decides about every pair. All in one pass over the data.

The way: `folds` -> `scorers` (what a scorer gets and gives) -> `models` (one of them) -> `weights` -> `run`.
"""

from ropo.audit.run import Audit

__all__ = ["Audit"]
