"""Held-out margins by linear models on what the reference pass and the tokens say of each pair: the scorer of an audit.

Nothing is trained and nothing is to be set: held-out likelihood on the data at hand weighs the kinds of features and
chooses the penalties. The lengths of the responses are taken out of the margins unless the user says that length is
evidence: annotators who like long answers would otherwise be taken for right.
"""

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

import numpy as np
from accelerate import PartialState
from numpy.typing import NDArray

from ropo.audit.scorers import SCORED_FILES, Question, Scores
from ropo.audit.weights import Floats
from ropo.data.tokenize import TokenizedPair
from ropo.models.source import release_memory
from ropo.noise.linear import HeldOut, LinearModels, scaled_to_one
from ropo.noise.shares import cluster_weights
from ropo.pairs import Pair
from ropo.stages import Stages

GRADIENTS = "gradients"

BLOCKS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {GRADIENTS: ("gradient",), "hidden states": ("hidden_middle", "hidden_last")}
)
"""What the model says of a pair, by name: blocks of `ropo.logps.features`, each scaled to one size."""

LENGTH, NGRAMS, TOGETHER = "length", "n-grams", "together"

KINDS = (*BLOCKS, NGRAMS)
"""What is weighed; the lengths are shown beside it, and judge no label."""

MOST = 3.0
"""How many times the median size the features of a pair may have; docs/noise.md has what was measured."""

_NUM_BUCKETS = 2048  # of the hashed n-grams: as many numbers as the sketch of a gradient has

_STAGE = "linear"


def by_features(question: Question) -> Scores:
    """Fit linear models on each of `KINDS`, and add up their margins by how well each predicts unseen labels.

    They are fitted again without the pairs that the first fits contradict, if that helps. Whether a training should do
    without those pairs is asked of the gradients alone, if they follow the labels: to first order DPO is the
    regression on them. Margins are in nats up to a scale, which the views, one of each kind, share.
    """
    inputs = [question.digest, [_STAGE, *KINDS, question.args.length_is_evidence, MOST]]

    def make() -> None:
        blocks = question.features().blocks  # all processes read their share
        release_memory()  # of the reference
        if PartialState().is_main_process:
            _score(question, blocks).write(question.folder)

    Stages(question.folder).run(_STAGE, inputs, SCORED_FILES, make)
    return Scores.read(question.folder)


def _score(question: Question, blocks: Mapping[str, np.ndarray]) -> Scores:
    tokens, folds, labels = question.data.tokens, question.folds, question.labels
    _check_finite(blocks, question.data.pairs)
    # A label that is known to be wrong counts as its opposite.
    sign = np.where(labels.sign < 0, -1.0, 1.0).astype(np.float32)
    weights = np.abs(labels.sign) * cluster_weights(labels.clusters, len(sign))
    ngrams = _ngrams(tokens)
    factors = (sign * _shrinkage([*blocks.values(), ngrams]))[:, None]
    length = factors * _length(tokens)
    models = LinearModels(_features(blocks, ngrams, factors), folds, covariates=length, weights=weights)
    first = found = models.held_out()
    refit = None
    if folds.max() >= 2:  # the suspects of a fold are found by fits without two
        refit = models.without_suspects(
            first,
            trained=KINDS.index(GRADIENTS),
            is_known=~labels.is_open,
            counts_covariates=question.args.length_is_evidence,
        )
        found = refit.held_out if refit.of_judges.helps else first
    surface = 0.0 if question.args.length_is_evidence else 1.0  # how much of it is no evidence

    def as_labelled(fit: HeldOut) -> Floats:
        """By each kind, shape (kinds, pairs)."""
        return np.asarray(sign * (fit.totals - surface * fit.surfaces))

    views = as_labelled(found)
    margins = found.shares @ views
    by_kind = {name: question.row(name, one) for name, one in zip(KINDS, as_labelled(first), strict=True)}
    filter_ = None
    if refit is not None:  # of gradients that agree with no more labels than a coin the comparison would be chance
        filter_ = refit.of_training if by_kind[GRADIENTS].low > 0.5 else refit.of_judges
    alone = LinearModels([length], folds, weights=weights).held_out()
    return Scores(
        margins=margins,
        length=sign * surface * found.surface,
        views=np.stack([_scaled(one, margins) for one in views]),
        rows=(
            question.row(TOGETHER, margins, is_taken=True),
            *by_kind.values(),
            question.row(LENGTH, sign * alone.margins),
        ),
        refit=None if refit is None else refit.of_judges,
        filter=filter_,
    )


def _check_finite(blocks: Mapping[str, np.ndarray], pairs: Sequence[Pair]) -> None:
    """One number that is none would spoil every margin.

    Raises:
        ValueError: If a pair has one.
    """
    for name, block in blocks.items():
        if len(bad := np.flatnonzero(~np.isfinite(block).all(axis=1))):
            raise ValueError(
                f"An audit needs finite features; got {name} that are not of {len(bad)} pairs, the first of "
                f"{pairs[bad[0]].place}. Look at these pairs, or run the model in another precision."
            )


def _shrinkage(blocks: Sequence[np.ndarray]) -> NDArray[np.float32]:
    """What each pair is multiplied with so that no block of it is larger than `MOST` times the median, shape (pairs,).

    Gradients and counts are sums over tokens, so a response that repeats itself for a thousand tokens is fifty times as
    large as others: alone it would set the scale on which all pairs are penalised, and tilt what lengths explain.
    """
    factors = np.ones(len(blocks[0]), dtype=np.float32)
    for block in blocks:
        sizes = np.sqrt(np.einsum("ij,ij->i", block, block, dtype=np.float32, casting="same_kind"))
        usual = float(np.median(sizes[sizes > 0])) if sizes.any() else 1.0
        factors = np.minimum(factors, MOST * usual / np.maximum(sizes, MOST * usual))
    return factors


def _features(
    blocks: Mapping[str, np.ndarray], ngrams: NDArray[np.float32], factors: NDArray[np.float32]
) -> Iterator[NDArray[np.floating]]:
    """Of each of `KINDS`, times a factor for each pair, shape (pairs, 1); the blocks of a kind count for the same."""
    for parts in BLOCKS.values():
        there = [factors * blocks[part] for part in parts if part in blocks]  # a model may lack one
        yield np.concatenate([scaled_to_one(block) for block in there], axis=1)
    yield factors * ngrams


def _scaled(margins: Floats, like: Floats) -> Floats:
    """Margins with the median size of others."""
    size = float(np.median(np.abs(margins)))
    return margins * (float(np.median(np.abs(like))) / size if size else 1.0)


def _length(tokens: Sequence[TokenizedPair]) -> Floats:
    """log(tokens of chosen / tokens of rejected), shape (pairs, 1)."""
    lengths = np.array([[len(pair.chosen), len(pair.rejected)] for pair in tokens], dtype=np.float64)
    return -np.diff(np.log(np.maximum(lengths, 1.0)), axis=1)


def _ngrams(tokens: Sequence[TokenizedPair]) -> NDArray[np.float32]:
    """How often each token and each two in a row occur, hashed, chosen minus rejected; shape (pairs, buckets)."""
    counts = np.zeros((len(tokens), _NUM_BUCKETS), dtype=np.float32)
    for row, pair in enumerate(tokens):
        for sign, ids in ((1.0, pair.chosen), (-1.0, pair.rejected)):
            ids = np.asarray(ids, dtype=np.uint64)
            both = ids[:-1] * np.uint64(1_000_003) + ids[1:] + np.uint64(1)
            # Multiplicative hashing (Knuth): the high bits of a product with an odd number.
            buckets = (np.concatenate([ids, both]) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(53)
            counts[row] += sign * np.bincount(buckets.astype(np.int64), minlength=_NUM_BUCKETS)
    return counts
