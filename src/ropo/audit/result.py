"""The flip rate as an audit has written it: plain values, read back from JSON.

In: a `FlipEstimate`, or what was written of one. Out: `RateEstimate`.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ropo.noise.estimate import AnnotatorRate, FlipEstimate
from ropo.provenance import Json

IN_SAMPLE = "IN_SAMPLE"
"""The obstacle where margins come from a model that was trained on the labels that it judges."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RateEstimate:
    """How many labels are flipped: a `FlipEstimate` without what it says of single pairs.

    Attributes:
        rate: Share of flipped labels, in [0, 0.5]. Do not act on it unless `is_informative`.
        low: Lower end of the interval.
        high: Upper end of the interval, or an upper bound where `is_informative` is false.
        level: Nominal coverage of the interval.
        scale: What margins are multiplied by to become log-odds.
        is_informative: Whether the margins can tell the rate.
        reason: Why or why not, as a sentence for people; programs read `obstacle`.
        num_pairs: Number of margins.
        num_trusted: How many of them are of trusted pairs.
        obstacle: Name of the `Obstacle` in the way, or `IN_SAMPLE`; None where the rate can be told.
        tail: Degrees of freedom of the model's errors; None for normal ones.
        annotators: The rate of each annotator, the worst first; empty where the data names fewer than two.
    """

    rate: float
    low: float
    high: float
    level: float
    scale: float
    is_informative: bool
    reason: str
    num_pairs: int
    num_trusted: int
    obstacle: str | None
    tail: float | None
    annotators: tuple[AnnotatorRate, ...] = ()

    @classmethod
    def of(cls, flips: FlipEstimate) -> "RateEstimate":
        """Of an estimate that was just made."""
        return cls.from_json(flips.to_dict())

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> "RateEstimate":
        """Of what `to_json` gave; other keys are passed over."""
        known = {name: found[name] for name in cls.__dataclass_fields__ if name != "annotators"}
        return cls(**known, annotators=tuple(AnnotatorRate(**one) for one in found["annotators"]))

    def to_json(self) -> Json:
        """Plain values."""
        return {**asdict(self), "annotators": [asdict(one) for one in self.annotators]}

    @property
    def is_held_out(self) -> bool:
        """Whether the margins come from what has not seen the labels."""
        return self.obstacle != IN_SAMPLE
