"""Does the flip rate's interval hold the truth whatever the model's errors are like, and is it refused where it cannot?

    python benchmarks/families.py [--runs N]   # families.csv and the table of docs/noise.md; 16 runs take ten minutes
    python benchmarks/families.py --table      # print the table from the rows

Margins of right labels are drawn from each family, then each label is flipped with probability ε. "Told" is the share
of data sets in which a rate is given; "covered" how many of these 90 % intervals hold ε; "bound holds" how many of the
upper bounds hold that are given elsewhere.
"""

import argparse
import csv
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from scipy.special import expit

from ropo.noise.estimate import FlipEstimate, estimate_flips

RESULTS = Path(__file__).with_suffix(".csv")
PAGE = Path(__file__).parents[1] / "docs" / "noise.md"
RATES, SIZES, RUNS = (0.0, 0.1, 0.2, 0.3), (500, 1500, 6000), 16
COLUMNS = (
    "family", "flip_rate", "num_pairs", "runs", "can_tell", "covered", "too_high", "width", "bound_holds", "bound",
)  # fmt: skip

Draw = Callable[[np.random.Generator, int], tuple[np.ndarray, np.ndarray | None]]
"""Clean margins, and a covariate if there is one."""


def calibrated(spread: float) -> Draw:
    """Labels drawn from σ(h), |h| half-normal."""

    def draw(rng: np.random.Generator, num: int) -> tuple[np.ndarray, None]:
        size = np.abs(rng.normal(0.0, spread, num))
        return np.where(rng.random(num) < expit(size), size, -size), None

    return draw


def plain(draw: Callable[[np.random.Generator, int], np.ndarray]) -> Draw:
    """Margins without a covariate."""
    return lambda rng, num: (draw(rng, num), None)


def with_length(rng: np.random.Generator, num: int) -> tuple[np.ndarray, np.ndarray]:
    """Margins and errors that grow with the length of the responses."""
    length = rng.normal(0.0, 0.7, num)
    return np.exp(length) * (1.0 + rng.normal(size=num)), length


def plateau(share: float) -> Draw:
    """A share of the right labels is contradicted as surely as the others are confirmed."""
    return plain(lambda rng, num: rng.normal(2.5, 1.0, num) * np.where(rng.random(num) < share, -1.0, 1.0))


FAMILIES: dict[str, Draw] = {
    "calibrated, accuracy .63": calibrated(0.60),
    "calibrated, accuracy .72": calibrated(1.15),
    "calibrated, accuracy .84": calibrated(2.6),
    "normal, 1 + N": plain(lambda rng, num: rng.normal(1.0, 1.0, num)),
    "normal, 1.5 + N": plain(lambda rng, num: rng.normal(1.5, 1.0, num)),
    "one in five ties": plain(lambda rng, num: rng.normal(1.5, 1.0, num) * (rng.random(num) > 0.2)),
    "1 + t8": plain(lambda rng, num: 1.0 + rng.standard_t(8, num)),
    "1 + t5": plain(lambda rng, num: 1.0 + rng.standard_t(5, num)),
    "1 + t3": plain(lambda rng, num: 1.0 + rng.standard_t(3, num)),
    "0.8 + t2": plain(lambda rng, num: 0.8 + rng.standard_t(2, num)),
    "1 + Cauchy": plain(lambda rng, num: 1.0 + rng.standard_cauchy(num)),
    "s(1 + N), log s ~ N(0, .3)": plain(lambda rng, num: np.exp(rng.normal(0, 0.3, num)) * (1 + rng.normal(size=num))),
    "s(1 + N), log s ~ N(0, .7)": plain(lambda rng, num: np.exp(rng.normal(0, 0.7, num)) * (1 + rng.normal(size=num))),
    "the same, log s as covariate": with_length,
    "half N(3, .7), half N(0, .5)": plain(
        lambda rng, num: np.where(rng.random(num) < 0.5, rng.normal(3.0, 0.7, num), rng.normal(0.0, 0.5, num))
    ),
    "exponential": plain(lambda rng, num: rng.exponential(1.5, num) - 0.4),
}
NOT_IDENTIFIABLE: dict[str, Draw] = {f"{share:.0%} sure errors": plateau(share) for share in (0.05, 0.10, 0.15)}


def draw_margins(family: str, rate: float, num: int, seed: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Margins with a share `rate` of the labels flipped, and the covariate."""
    rng = np.random.default_rng([seed, num, round(100 * rate)])
    clean, covariate = {**FAMILIES, **NOT_IDENTIFIABLE}[family](rng, num)
    return np.where(rng.random(num) < rate, -clean, clean), covariate


def measure(family: str, rate: float, num: int, runs: int) -> dict[str, object]:
    """One row: counts over the runs, means of the widths and of the bounds."""
    found: list[FlipEstimate] = []
    for seed in range(runs):
        margins, covariate = draw_margins(family, rate, num, seed)
        found.append(estimate_flips(margins, covariate=covariate))
    informative = [one for one in found if one.is_informative]
    bounds = [one.high for one in found if not one.is_informative]
    return {
        "family": family,
        "flip_rate": rate,
        "num_pairs": num,
        "runs": runs,
        "can_tell": len(informative),
        "covered": sum(one.low <= rate <= one.high for one in informative),
        "too_high": sum(one.low > rate for one in informative),
        "width": f"{np.mean([one.high - one.low for one in informative]):.4f}" if informative else "",
        "bound_holds": sum(bound >= rate for bound in bounds),
        "bound": f"{np.mean(bounds):.4f}" if bounds else "",
    }


def rows() -> list[dict[str, str]]:
    """What was measured."""
    with RESULTS.open() as file:
        return list(csv.DictReader(file))


def table() -> str:
    """One line per family and rate: over all sizes, and the share that can be told at each."""
    sizes = " | ".join(f"can tell, {num:,}" for num in SIZES)
    lines = [f"| clean margins | flipped | {sizes} | covered | width | bound holds | bound |", "|---" * 9 + "|"]
    for family in (*FAMILIES, *NOT_IDENTIFIABLE):
        for rate in RATES:
            cells = [row for row in rows() if row["family"] == family and float(row["flip_rate"]) == rate]
            lines.append(f"| {family} | {rate:.0%} | {' | '.join(_columns(cells))} |")
    return "\n".join(lines)


def _columns(cells: list[dict[str, str]]) -> Iterator[str]:
    for cell in cells:
        yield f"{int(cell['can_tell']) / int(cell['runs']):.0%}"
    for num, holds, mean in (("can_tell", "covered", "width"), ("refused", "bound_holds", "bound")):
        counts = [int(c["can_tell"]) if num == "can_tell" else int(c["runs"]) - int(c["can_tell"]) for c in cells]
        if not sum(counts):
            yield from ("-", "-")
            continue
        yield f"{sum(int(cell[holds]) for cell in cells)} of {sum(counts)}"
        total = sum(count * float(cell[mean]) for count, cell in zip(counts, cells, strict=True) if count)
        yield f"{total / sum(counts):.3f}"


def main() -> None:
    """Measure, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=RUNS)
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    if not arguments.table:
        with RESULTS.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            for family in (*FAMILIES, *NOT_IDENTIFIABLE):
                for rate in RATES:
                    writer.writerows(measure(family, rate, num, arguments.runs) for num in SIZES)
                print(family, file=sys.stderr, flush=True)
        start, end = "<!-- families: begin, made by benchmarks/families.py -->\n", "<!-- families: end -->"
        before, rest = PAGE.read_text().split(start)
        PAGE.write_text(before + start + table() + "\n" + end + rest.split(end)[1])
    print(table())


if __name__ == "__main__":
    main()
