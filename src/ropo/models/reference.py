"""The frozen model that margins are measured against, in memory only while it reads.

In: where the model comes from, a cache folder. Out: log-probabilities and features of pairs, from the cache where it
has them.
"""

from collections.abc import Sequence
from pathlib import Path

from ropo.data.tokenize import TokenizedPair
from ropo.logps.batch import Batching
from ropo.logps.cache import reference_features, reference_logps
from ropo.logps.features import Sketch
from ropo.models.source import PolicySource
from ropo.pairs import PairFeatures, PairLogps


class Reference:
    """The reference of a run.

    Args:
        source: Loads it.
        cache_dir: Where what is read is kept, by content.
        batching: Padding, precision and size of the batches.
    """

    def __init__(self, source: PolicySource, *, cache_dir: Path, batching: Batching) -> None:
        self._source = source
        self._cache_dir = cache_dir
        self._batching = batching

    def logps(self, tokens: Sequence[TokenizedPair]) -> PairLogps:
        """Log-probabilities of pairs, in their order."""
        return reference_logps(self._source.load(), tokens, self._batching, cache_dir=self._cache_dir)

    def read(self, tokens: Sequence[TokenizedPair]) -> tuple[PairLogps, PairFeatures]:
        """Log-probabilities and features of pairs, in one pass over those that are not in the cache."""
        return reference_features(
            self._source.load(), tokens, self._batching, sketch=Sketch(), cache_dir=self._cache_dir
        )

    def features(self, tokens: Sequence[TokenizedPair]) -> PairFeatures:
        """Features of pairs, in their order."""
        return self.read(tokens)[1]
