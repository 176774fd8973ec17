"""Single pairs that the report shows: suspects, hard ones, dropped ones, and new ones beside what they replace.

In: the scores of `tables.last_round` and the pairs. Out: plain values, one list for each section.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ropo.noise.review_order import review_order
from ropo.pairs import Pair
from ropo.provenance import Json
from ropo.report.statistics import median, number, numbers
from ropo.report.texts import clean, compare, excerpt, plain, show_prompt

NUM_SUSPECTS = 10
NUM_HARD = 10
LOW_SHARE = 0.1  # a pair is hard if its margins are among this share of the lowest, or below 0
NUM_DROPPED_ROWS = 200
NUM_RESAMPLED = 10

Table = Json
Columns = Mapping[str, NDArray[Any]]


def suspects(
    scores: Columns,
    originals: Mapping[int, Pair],
    *,
    is_open: NDArray[np.bool_],
    by_margin: bool,
) -> list[Table]:
    """The pairs to read first, among those that nobody has judged.

    By P(flipped); or by held-out margin, of those that are contradicted, where P(flipped) calls none.
    """
    p_flip, margin = scores["p_flip"].astype(np.float64), scores["margin"].astype(np.float64)
    is_shown = is_open & np.isfinite(p_flip)
    if by_margin:
        is_shown = is_open & (margin < 0) & scores["is_held_out"]
    order = review_order(p_flip, margin, by_margin=by_margin)
    order = order[is_shown[order]][:NUM_SUSPECTS]
    shown = [_shown_pair(scores, int(i), originals[int(scores["row"][i])]) for i in order]
    # A P(flipped) near 0 that nobody can vouch for would say the opposite of "read this".
    return [pair | {"p_flip": None} for pair in shown] if by_margin else shown


def hard(
    scores: Columns,
    originals: Mapping[int, Pair],
    checks: Mapping[int, Sequence[float]],
    *,
    is_open: NDArray[np.bool_],
    is_informative: bool,
    are_moments: bool = True,
) -> list[Table]:
    """Pairs that are merely hard: kept, more likely right than wrong, low on average, but some check agreed.

    A wrong label is contradicted at every check, mean + sd < 0 (arXiv:2409.10343); what a model changes its mind about,
    or learns late, is hard. So is what linear models on different features do not agree on: these are checks, too, but
    no moments of one training.
    """
    num_checks = len(next(iter(checks.values()), ()))
    if not is_informative or num_checks < 2:  # who was asked once has not changed their mind
        return []
    unknown = [np.nan] * num_checks
    margins = np.array([checks.get(int(row), unknown) for row in scores["row"]], dtype=np.float64)
    average, spread = margins.mean(axis=1), margins.std(axis=1)
    is_known = np.isfinite(average)
    if not is_known.any():
        return []
    is_low = average <= max(0.0, float(np.quantile(average[is_known], LOW_SHARE)))
    was_agreed_with = (average + spread >= 0) & (margins.max(axis=1) > 0)
    is_hard = is_known & is_low & was_agreed_with & (scores["decision"] == "keep")
    places = np.flatnonzero(is_hard & is_open & (scores["p_flip"] < 0.5))
    places = places[np.argsort(average[places], kind="stable")][:NUM_HARD]
    return [
        {
            **_shown_pair(scores, int(i), originals[int(scores["row"][i])]),
            "checks": numbers(margins[i]),
            "are_moments": are_moments,
            "is_learned_late": are_moments and bool(margins[i, 0] < 0 < margins[i, -1]),
        }
        for i in places
    ]


def dropped(scores: Columns, originals: Mapping[int, Pair]) -> Table:
    """The pairs not kept, smallest margin first (NaN last)."""
    positions = np.flatnonzero(scores["decision"] != "keep")
    positions = positions[np.argsort(scores["margin"][positions], kind="stable")]
    rows = [
        {
            "row": int(scores["row"][i]),
            "pair_id": originals[int(scores["row"][i])].id,
            "margin": number(scores["margin"][i]),
            "p_flip": number(scores["p_flip"][i]),
            "decision": str(scores["decision"][i]),
            "prompt": excerpt(originals[int(scores["row"][i])].prompt),
        }
        for i in positions[:NUM_DROPPED_ROWS]
    ]
    return {"num_rows": len(positions), "rows": rows}


def resampled(
    ledger: pa.Table,
    scores: Columns,
    originals: Mapping[int, Pair],
    pairs: Sequence[Pair],
    rounds: Sequence[Mapping[str, Any]],
) -> Table:
    """New pairs beside the dropped pairs that they replace; a few of them, evenly spaced over the data.

    And why candidates, or whole prompts, were not used, the most frequent reason first.
    """
    refused: Counter[str] = Counter()
    for entry in rounds:
        refused.update(entry.get("refused") or {})
    new = sorted((pair for pair in pairs if pair.origin == "resampled"), key=lambda pair: pair.row)
    columns = [ledger[name].to_pylist() for name in ("origin", "pair_id", "margin")] if new else [[], [], []]
    margins = {name: value for origin, name, value in zip(*columns, strict=True) if origin == "resampled"}
    position = {int(row): i for i, row in enumerate(scores["row"])}
    shown = sorted({round(place) for place in np.linspace(0, len(new) - 1, NUM_RESAMPLED)}) if new else []
    return {
        "num_pairs": len(new),
        "num_judged": sum(int(entry.get("num_judged") or 0) for entry in rounds),
        "refused": [{"reason": reason, "num": num} for reason, num in refused.most_common()],
        "median_margin": median(np.array(list(margins.values()), dtype=np.float64)),
        "pairs": [_new_pair(new[i], margins, scores, position, originals) for i in shown],
    }


def _new_pair(
    pair: Pair,
    margins: Mapping[str, float],
    scores: Columns,
    position: Mapping[int, int],
    originals: Mapping[int, Pair],
) -> Table:
    parent = originals.get(pair.row)
    names = {plain(parent.chosen): "was chosen", plain(parent.rejected): "was rejected"} if parent else {}
    return {
        "row": pair.row,
        "pair_id": pair.id,
        "annotator": None,  # nobody has labelled or judged a new pair yet
        "is_held_out": False,
        "p_flip": None,
        "decision": None,
        "margin": number(margins.get(pair.id)),
        "chosen_source": names.get(plain(pair.chosen), "sampled"),
        "rejected_source": names.get(plain(pair.rejected), "sampled"),
        "prompt": show_prompt(pair.prompt),
        **compare(pair.chosen, pair.rejected),
        "parent": _shown_pair(scores, position[pair.row], parent) if parent and pair.row in position else None,
    }


def _shown_pair(scores: Columns, i: int, pair: Pair) -> Table:
    return {
        "row": int(scores["row"][i]),
        "pair_id": pair.id,
        "annotator": clean(pair.annotator) if pair.annotator else None,
        "margin": number(scores["margin"][i]),
        "is_held_out": bool(scores["is_held_out"][i]),
        "p_flip": number(scores["p_flip"][i]),
        "decision": str(scores["decision"][i]),
        "prompt": show_prompt(pair.prompt),
        **compare(pair.chosen, pair.rejected),
    }
