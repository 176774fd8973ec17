"""What enums of a run mean, as clauses and sentences: the one place where they become prose.

In: values of `Why`, names of obstacles. Out: texts.
"""

from collections.abc import Mapping

from ropo.audit.result import IN_SAMPLE
from ropo.audit.weights import Why

CLAUSES: Mapping[str, str] = {
    Why.GIVEN: "it was given",
    Why.ESTIMATED: "this is the estimated flip rate",
    Why.FILTER_HELPS: "models agree with more labels that they have not seen when contradicted pairs are left out",
    Why.MAY_BE_CLEAN: "the labels may all be right",
    Why.CANNOT_TELL: "the margins cannot tell how many labels are flipped",
    Why.AFTER_FILTER: "what looks wrong is left to the filter",
    Why.NOT_ESTIMATED: "nothing was estimated, and it is the paper's",
}
"""Why ρ or α is what it is, as clauses that complete "since ..."."""

OBSTACLE_NAMES: Mapping[str, str] = {
    "TOO_FEW": "too few pairs",
    "ONE_SIZE": "margins of one size",
    "REVERSED": "most labels are contradicted",
    "NO_SIGNAL": "margins do not follow the labels",
    "HEAVY_TAILS": "the largest margins may be errors",
    "MISFIT": "agreement does not grow with the margins as assumed",
    "WIDE": "the interval is too wide",
    IN_SAMPLE: "no held-out margins",
}
"""Why no rate is given, in a few words."""

OBSTACLES: Mapping[str, str] = {
    IN_SAMPLE: (
        "The only margins at hand are of a model that was trained on these very labels, the wrong ones among them. "
        "With num_folds of 2 or more, the rate is estimated on pairs that the judging model has not seen."
    ),
}
"""Why no rate is given, beside what a `FlipEstimate` says of itself."""
