"""The frozen model that margins are measured against, in memory only while it reads.

In: where the model comes from, options. Out: log-probabilities and features of pairs, from a cache on disk where it
has them.
"""

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from ropo.config import ROPOConfig
from ropo.data.tokenize import TokenizedPair
from ropo.logps.cache import reference_features, reference_logps
from ropo.logps.features import Sketch
from ropo.pairs import PairFeatures, PairLogps
from ropo.policy import PolicySource
from ropo.trainer import batching


class Reference:
    """The reference of a run.

    Args:
        source: Loads it.
        tokenizer: The model's.
        args: Options; for the cache's folder, the size of a batch and the precision.
    """

    def __init__(self, source: PolicySource, tokenizer: PreTrainedTokenizerBase, args: ROPOConfig) -> None:
        self._source = source
        self._cache_dir = Path(args.reference_cache_dir or Path(str(args.output_dir)) / "reference_cache")
        self._batching = batching(args, tokenizer)

    def logps(self, tokens: Sequence[TokenizedPair]) -> PairLogps:
        """Log-probabilities of pairs, in their order."""
        return reference_logps(self._source.load(), tokens, cache_dir=self._cache_dir, **self._batching)

    def read(self, tokens: Sequence[TokenizedPair]) -> tuple[PairLogps, PairFeatures]:
        """Log-probabilities and features of pairs, in one pass over those that are not in the cache."""
        return reference_features(
            self._source.load(), tokens, sketch=Sketch(), cache_dir=self._cache_dir, **self._batching
        )

    def features(self, tokens: Sequence[TokenizedPair]) -> PairFeatures:
        """Features of pairs, in their order."""
        return self.read(tokens)[1]
