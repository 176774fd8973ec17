"""Labels that are known before anything is estimated: review decisions, and trusted pairs.

In: the pairs, a `review.csv`, trusted pairs. Out: a verdict on each row that has one, and the trusted pairs that the
data does not hold.
"""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ropo.data.problems import render
from ropo.data.review import VERDICTS, read_verdicts, verdicts_of
from ropo.data.validate import read_checked
from ropo.pairs import Pair
from ropo.run.inputs import DataSource, ReviewInputs

logger = logging.getLogger(__name__)

_MANY = 20  # verdicts that are hardly the same by chance, where the most suspect labels come first

Verdicts = dict[int, tuple[str, str]]  # by row: id of the pair, and what was said of its label


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What is known of labels.

    Attributes:
        verdicts: On rows of the data.
        vouched: Rows whose verdict is that of a trusted pair: they were chosen for their labels.
        trusted: The trusted pairs that the data does not hold.
        trusted_sha256: Of all trusted pairs; None without.
    """

    verdicts: Verdicts = field(default_factory=dict)
    vouched: frozenset[int] = frozenset()
    trusted: list[Pair] = field(default_factory=list)
    trusted_sha256: str | None = None


def known_labels(pairs: Sequence[Pair], review: ReviewInputs, *, columns: Mapping[str, str] | None = None) -> Known:
    """What is known of labels before anything is estimated.

    Args:
        pairs: Of the data.
        review: What people have said.
        columns: Of the data; the trusted pairs have the same unless they say otherwise.

    Raises:
        ValueError: If there is no verdict, or a trusted pair contradicts another one or a verdict.
    """
    verdicts = {} if review.decisions is None else _verdicts_in(Path(review.decisions))
    if review.trusted is None:
        return Known(verdicts=verdicts)
    shared = {ours: theirs for ours, theirs in (columns or {}).items() if ours not in ("annotator", "weight")}
    trusted = DataSource.of(review.trusted, columns=shared)
    read, known, found = read_checked(trusted.data, split=trusted.split, columns=trusted.columns, on_bad_rows="refuse")
    if found:
        logger.warning("Trusted pairs:\n%s", render(found))
    said = verdicts_of(known, pairs)
    for row, (name, verdict) in said.items():
        other, before = verdicts.setdefault(row, (name, verdict))
        # A verdict on another pair of that row is told where verdicts meet their pairs.
        if other == name and before != verdict:
            raise ValueError(
                f"Row {row} needs one verdict; got {before} by --decisions and {verdict} by --trusted. "
                "Correct one of the two."
            )
    if said:
        counts = Counter(verdict for _, verdict in said.values())
        logger.info(
            "Labels of the data that trusted pairs settle: %d right, %d wrong.", counts["right"], counts["wrong"]
        )
    settled = {name for name, _ in said.values()}
    return Known(
        verdicts=verdicts,
        vouched=frozenset(said),
        trusted=[replace(pair, origin="trusted") for pair in known if pair.id not in settled],
        trusted_sha256=read.sha256,
    )


def tell_idle(verdicts: Verdicts, pairs: Sequence[Pair]) -> None:
    """Warn of verdicts on rows that are left out, which do nothing."""
    if idle := set(verdicts) - {pair.row for pair in pairs}:
        logger.warning("%d verdicts are about rows that are left out; the first is row %d.", len(idle), min(idle))


def _verdicts_in(path: Path) -> Verdicts:
    """The review decision on each row, counted in the log.

    Raises:
        ValueError: If there is no verdict.
    """
    verdicts = read_verdicts(path)
    if not verdicts:
        raise ValueError(
            f"--decisions needs at least one verdict; {path} holds none. Write {', '.join(VERDICTS)} into its column "
            "`verdict`, or leave it out."
        )
    counts = Counter(verdict for _, verdict in verdicts.values())
    parts = ", ".join(f"{count} {verdict}" for verdict, count in counts.most_common())
    logger.info("%d verdict%s read: %s.", len(verdicts), "" if len(verdicts) == 1 else "s", parts)
    if len(counts) == 1 and len(verdicts) >= _MANY and "drop" not in counts:
        logger.warning(
            "All %d verdicts are the same. How many of the labels that were read are wrong says how many others are: "
            "fill in every row that was read, not those with one answer.",
            len(verdicts),
        )
    return verdicts
