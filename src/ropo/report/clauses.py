"""What enums of a run mean, as clauses and sentences: the one place where they become prose.

In: values of `Why` and `Obstacle`. Out: texts.
"""

from collections.abc import Mapping

from ropo.audit.weights import Why
from ropo.noise.estimate import FlipEstimate, Obstacle

CLAUSES: Mapping[str, str] = {
    Why.GIVEN: "it was given",
    Why.ESTIMATED: "this is the estimated flip rate",
    Why.FILTER_HELPS: "models agree with more labels that they have not seen when contradicted pairs are left out",
    Why.MAY_BE_CLEAN: "the labels may all be right",
    Why.CANNOT_TELL: "the margins cannot tell how many labels are flipped",
    Why.AFTER_FILTER: "what looks wrong is left to the filter",
    Why.NOT_ESTIMATED: "nothing was estimated, and it is the paper's",
    Why.SAME_DISTANCE: "the labels that are kept pull harder than all of them, and would lead the model farther away",
}
"""Why ρ, α or β is what it is, as clauses that complete "since ..."."""

OBSTACLES: Mapping[str, tuple[str, str]] = {
    Obstacle.TOO_FEW: ("too few pairs", "There are too few pairs to estimate a rate. Score some hundreds."),
    Obstacle.ONE_SIZE: (
        "margins of one size",
        "All margins have the same size. Use another model, or more pairs.",
    ),
    Obstacle.REVERSED: (
        "most labels are contradicted",
        "The model contradicts most labels. Check whether chosen and rejected are swapped.",
    ),
    Obstacle.NO_SIGNAL: (
        "margins do not follow the labels",
        "The margins do not follow the labels. Use more pairs, a larger model or trusted pairs.",
    ),
    Obstacle.HEAVY_TAILS: (
        "the largest margins may be errors",
        "The largest margins may be errors of the model. Review the pairs that it contradicts most strongly.",
    ),
    Obstacle.MISFIT: (
        "agreement does not grow with the margins as assumed",
        "Agreement with the labels does not grow with the margins as assumed. Review the most contradicted pairs.",
    ),
    Obstacle.WIDE: (
        "the interval is too wide",
        "Too many rates explain the margins about equally well. Use more pairs, a larger model or trusted pairs.",
    ),
    Obstacle.IN_SAMPLE: (
        "no held-out margins",
        "The only margins at hand are of a model that was trained on these very labels, the wrong ones among them. "
        "An audit (rho auto, and num_folds of 2 or more) estimates the rate on pairs that its models have not seen.",
    ),
}
"""Why no rate is given: in a few words; and in sentences, with what to do about it."""


def reason(estimate: FlipEstimate) -> str:
    """Why an estimate is or is not informative, and what to do about it, in one to four sentences."""
    if estimate.obstacle in (Obstacle.IN_SAMPLE, Obstacle.REVERSED):  # which give no bound
        return OBSTACLES[estimate.obstacle][1]
    if estimate.obstacle is None:
        text = f"The margins place the flip rate between {100 * estimate.low:.1f} % and {100 * estimate.high:.1f} %."
    else:
        most = f"At most {100 * estimate.high:.1f} % of the labels are flipped, if flips do not follow a pattern."
        text = f"{most} {OBSTACLES[estimate.obstacle][1]}"
    if estimate.num_different < estimate.num_labels:
        text += f" Copies count once: {estimate.num_labels} pairs count as {estimate.num_different}."
    return text
