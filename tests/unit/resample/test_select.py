"""Which sampled responses become pairs: orientation, guards, rules, and what is counted."""

import numpy as np
import pytest
import torch

from ropo.losses import ropo
from ropo.pairs import Pair
from ropo.resample.select import SELECTION_RULES, Candidate, select_pairs

PARENT = Pair(prompt="p", chosen="good", rejected="bad", row=7)
OTHER = Pair(prompt="q", chosen="fine", rejected="poor", row=9)


def candidate(sampled="new", original="good", parent=PARENT, tokens=(4, 5)):
    return Candidate(
        parent=parent, sampled=sampled, original=original, num_sampled_tokens=tokens[0], num_original_tokens=tokens[1]
    )


def loss_of(margins):
    return ropo(torch.from_numpy(margins)).numpy()


def select(candidates, margins, **options):
    defaults = {"rule": "min_loss", "worst_kept_loss": 2.0, "max_abs_margin": 10.0, "max_length_ratio": 3.0}
    return select_pairs(candidates, np.array(margins, dtype=float), loss_of, **{**defaults, **options})


def test_orientation_follows_the_margin():
    above, below = select([candidate()], [0.5]), select([candidate()], [-0.5])
    assert (above.pairs[0].chosen, above.pairs[0].rejected) == ("new", "good")
    assert (below.pairs[0].chosen, below.pairs[0].rejected) == ("good", "new")
    for found in (above, below):
        assert found.pairs[0].origin == "resampled"
        assert found.pairs[0].row == 7
        assert found.pairs[0].id != PARENT.id
        assert found.margins.tolist() == [0.5]


def test_one_pair_per_prompt_and_the_lowest_loss_wins():
    found = select([candidate("a"), candidate("b"), candidate("c", "fine", OTHER)], [0.5, -2.0, 1.0])
    assert [(pair.row, pair.chosen, pair.rejected) for pair in found.pairs] == [(7, "good", "b"), (9, "c", "fine")]
    assert found.refused == {"another candidate was better": 1}


@pytest.mark.parametrize(
    ("bad", "h", "reason"),
    [
        (candidate("bad"), 1.0, "same text as an original response"),
        (candidate("good"), 1.0, "same text as an original response"),
        (candidate("", tokens=(0, 5)), 1.0, "empty response"),
        (candidate(tokens=(2, 7)), 1.0, "lengths too different"),
        (candidate(), 10.5, "margin too extreme to be believed"),
        (candidate(), float("nan"), "margin too extreme to be believed"),
    ],
)
def test_guards(bad, h, reason):
    found = select([bad], [h])
    assert found.pairs == []
    assert found.refused == {reason: 1, "prompt without a usable candidate": 1}


def test_guards_leave_room_for_others():
    """An extreme candidate is refused, and the next best of the same prompt is taken."""
    found = select([candidate("extreme"), candidate("sober")], [50.0, 1.0])
    assert found.pairs[0].chosen == "sober"


def test_threshold_refuses_what_is_worse_than_the_kept_pairs():
    limit = float(loss_of(np.array([1.0]))[0])
    assert len(select([candidate()], [1.1], rule="threshold", worst_kept_loss=limit).pairs) == 1
    found = select([candidate()], [0.9], rule="threshold", worst_kept_loss=limit)
    assert found.pairs == []
    assert found.refused == {"loss above that of every kept pair": 1}


def test_every_rule_takes_a_single_good_candidate():
    for rule in SELECTION_RULES:
        assert len(select([candidate()], [3.0], rule=rule).pairs) == 1
