"""Held-out margins by linear models on what the reference pass reads of each pair: the scorer of every audit.

In: features of the pairs, folds. Out: margins of every pair, and how much each kind of feature knows.

Nothing is trained and nothing is to be set: which features judge is chosen by held-out likelihood on the data at hand,
and so is the penalty. A pair is not judged by the lengths of its responses unless the user says that length is
evidence: annotators who like long answers would otherwise be taken for right.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
from accelerate import PartialState
from numpy.typing import NDArray

from ropo.audit.scorers import SCORED_FILES, Filter, Floats, Question, Scores
from ropo.data.tokenize import TokenizedPair
from ropo.noise.clusters import cluster_weights
from ropo.noise.linear import HeldOut, LinearModels, Refit
from ropo.stages import Stages

BLOCKS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "gradients": ("gradient",),
        "hidden states": ("hidden_middle", "hidden_last"),
    }
)
"""What may judge, by name: blocks of `ropo.logps.features`, each scaled to one size."""

LENGTH, NGRAMS = "length", "n-grams"
"""What knows nothing but the surface of the texts: shown beside the others, and never taken."""

_NUM_BUCKETS = 2048  # of the hashed n-grams: as many numbers as the sketch of a gradient has

_STAGE = "linear"


def by_features(question: Question) -> Scores:
    """Fit linear models on each entry of `BLOCKS`, and judge by the one that predicts unseen labels best.

    That one is fitted again without the pairs that the first fit contradicts, if it agrees with more unseen
    labels then, by more than the standard error.

    Returns:
        Margins in nats up to a scale. The views are those of the entries of `BLOCKS`, on the same scale.
    """
    made = [_STAGE, question.args.length_is_evidence]
    Stages(question.folder).run(_STAGE, [question.digest, made], SCORED_FILES, lambda: _write(question))
    return Scores.read(question.folder)


def _write(question: Question) -> None:
    blocks = question.features().blocks  # all processes score their share
    if PartialState().is_main_process:
        _score(question, blocks).write(question.folder)


def _score(question: Question, blocks: Mapping[str, np.ndarray]) -> Scores:
    tokens, folds, is_known = question.data.tokens, question.folds, ~question.is_doubtful
    turn = np.where(question.sign < 0, -1.0, 1.0)[:, None]  # a label that is known to be wrong counts as its opposite
    weights = np.abs(question.sign) * cluster_weights(question.clusters, len(turn))
    length = turn * _length(tokens)
    judged: dict[str, HeldOut] = {}
    for name, parts in BLOCKS.items():
        own = turn * _joined([blocks[part] for part in parts if part in blocks])  # a model may lack one
        models = LinearModels(own, folds, covariates=length, weights=weights)
        judged[name] = models.held_out()
        if judged[name].loss == min(one.loss for one in judged.values()):
            taken, best = name, models  # only one is kept: many pairs fill the memory
    surface = {
        LENGTH: LinearModels(length, folds, weights=weights).held_out(),
        NGRAMS: LinearModels(turn * _ngrams(tokens), folds, covariates=length, weights=weights).held_out(),
    }
    final, filter_ = _refitted(best, judged[taken], folds, is_known=is_known)
    evidence = 1.0 if question.args.length_is_evidence else 0.0

    def as_labelled(one: HeldOut | Refit) -> Floats:
        return turn[:, 0] * (one.margins + evidence * one.surface)

    margins = {name: as_labelled(final if name == taken else one) for name, one in judged.items()}
    rows = [question.row(name, margins[name], is_taken=name == taken) for name in BLOCKS]
    rows += [question.row(name, as_labelled(one)) for name, one in surface.items()]
    return Scores(
        margins=margins[taken],
        length=turn[:, 0] * (1.0 - evidence) * final.surface,
        views=np.stack([_scaled(one, margins[taken]) for one in margins.values()]),
        rows=tuple(rows),
        filter=filter_,
    )


def _refitted(
    models: LinearModels, judged: HeldOut, folds: NDArray[np.int64], *, is_known: NDArray[np.bool_]
) -> tuple[HeldOut | Refit, Filter | None]:
    """What judges without suspects if that is better, else as it is; no filter where it cannot be tried."""
    if folds.max() < 2:  # the suspects of a fold are found by fits without two
        return judged, None
    refit = models.without_suspects(judged, is_known=is_known)
    found = Filter(gain=refit.gain, error=refit.error)
    return (refit if found.helps else judged), found


def _joined(blocks: Sequence[np.ndarray]) -> Floats:
    """Blocks side by side, each with a mean squared norm of 1."""
    return np.concatenate([one / (np.sqrt((one**2).sum(axis=1).mean()) or 1.0) for one in blocks], axis=1)


def _scaled(margins: Floats, like: Floats) -> Floats:
    """Margins with the median size of others."""
    size = float(np.median(np.abs(margins)))
    return margins * (float(np.median(np.abs(like))) / size if size else 1.0)


def _length(tokens: Sequence[TokenizedPair]) -> Floats:
    """log(tokens of chosen / tokens of rejected), shape (pairs, 1)."""
    lengths = np.array([[len(pair.chosen), len(pair.rejected)] for pair in tokens], dtype=np.float64)
    return -np.diff(np.log(np.maximum(lengths, 1.0)), axis=1)


def _ngrams(tokens: Sequence[TokenizedPair]) -> Floats:
    """How often each token and each two in a row occur, hashed, chosen minus rejected; shape (pairs, buckets)."""
    counts = np.zeros((len(tokens), _NUM_BUCKETS))
    for row, pair in enumerate(tokens):
        for sign, ids in ((1.0, pair.chosen), (-1.0, pair.rejected)):
            ids = np.asarray(ids, dtype=np.uint64)
            both = ids[:-1] * np.uint64(1_000_003) + ids[1:] + np.uint64(1)
            # Multiplicative hashing (Knuth): the high bits of a product with an odd number.
            buckets = (np.concatenate([ids, both]) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(53)
            counts[row] += sign * np.bincount(buckets.astype(np.int64), minlength=_NUM_BUCKETS)
    return counts
