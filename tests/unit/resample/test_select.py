"""Which sampled responses become pairs: orientation, guards, rules, what is left to a judge, and what is counted."""

import numpy as np
import pytest
import torch

from ropo.losses import ropo
from ropo.pairs import Pair
from ropo.resample.select import (
    SELECTION_RULES,
    Candidate,
    Criteria,
    Guards,
    Refusal,
    new_pair,
    repetition,
    select_candidates,
)

PARENT = Pair(prompt="p", chosen="good", rejected="bad", row=7)
OTHER = Pair(prompt="q", chosen="fine", rejected="poor", row=9)
KEPT = np.array([0.3, 0.5, 1.0, 2.0])


def candidate(sampled="new", original="good", parent=PARENT, tokens=(4, 5)):
    return Candidate(
        parent=parent, sampled=sampled, original=original, num_sampled_tokens=tokens[0], num_original_tokens=tokens[1]
    )


def loss_of(margins):
    return ropo(torch.from_numpy(margins)).numpy()


def select(candidates, margins, *, rule="min_loss", kept_losses=KEPT, views=None, seed=0, **guards):
    return select_candidates(
        candidates,
        np.array(margins, dtype=float),
        Criteria(rule=rule, loss_of=loss_of, kept_losses=kept_losses, guards=Guards(**guards), seed=seed),
        views=None if views is None else np.array(views, dtype=float),
    )


def test_a_new_pair_knows_where_it_comes_from():
    above, below = (new_pair(candidate(), is_sampled_better=better, weight=0.5) for better in (True, False))
    assert (above.chosen, above.rejected) == ("new", "good")
    assert (below.chosen, below.rejected) == ("good", "new")
    for pair in (above, below):
        assert (pair.origin, pair.row, pair.parent_id, pair.weight) == ("resampled", 7, PARENT.id, 0.5)
        assert pair.id != PARENT.id


def test_one_pair_per_prompt_and_the_lowest_loss_wins():
    found = select([candidate("a"), candidate("b"), candidate("c", "fine", OTHER)], [0.5, -2.0, 1.0])
    assert found.taken == [1, 2]
    assert found.refused == {Refusal.NOT_BEST: 1}


def test_parents_with_one_row_stay_apart():
    """Two pairs of one row (several rounds, or joined data) are two prompts."""
    twin = Pair(prompt="other", chosen="good", rejected="bad", row=PARENT.row)
    assert select([candidate(), candidate(parent=twin)], [1.0, 1.0]).taken == [0, 1]


@pytest.mark.parametrize(
    ("bad", "guards", "reason"),
    [
        (candidate("bad"), {}, Refusal.SAME_TEXT),
        (candidate("good"), {}, Refusal.SAME_TEXT),
        (candidate(" ", tokens=(1, 5)), {}, Refusal.EMPTY),
        (candidate(tokens=(2, 7)), {"max_length_ratio": 3.0}, Refusal.LENGTHS),
        (candidate("so it is so it is so it is"), {"max_repetition": 0.3}, Refusal.REPETITION),
    ],
)
def test_text_guards_leave_nothing_for_a_judge(bad, guards, reason):
    found = select([bad], [1.0], **guards)
    assert (found.taken, found.unsettled) == ([], [])
    assert found.refused == {reason: 1, Refusal.PROMPT_WITHOUT_USABLE: 1}


@pytest.mark.parametrize(
    "fine", [candidate(tokens=(2, 6)), candidate("so it is so it is"), candidate("so it is so it is so it is")]
)
def test_guards_let_pass_what_is_within_them(fine):
    assert select([fine], [1.0], max_length_ratio=3.0, max_repetition=0.6).taken == [0]


def test_switched_off_guards_let_everything_pass():
    loop = candidate("no " * 50, tokens=(50, 1))
    assert select([loop], [1e6]).taken == [0]


def test_a_stock_phrase_is_refused():
    """One answer to many prompts says nothing about any of them."""
    parents = [Pair(prompt=f"p{i}", chosen="good", rejected="bad", row=i) for i in range(4)]
    stock = [candidate("I cannot help", parent=parent) for parent in parents] * 2  # beside both originals
    own = [candidate(f"answer {i}", parent=parent) for i, parent in enumerate(parents)]
    found = select([*stock, *own], [3.0] * 8 + [1.0] * 4, max_copies=3)
    assert found.taken == [8, 9, 10, 11]
    assert found.refused[Refusal.COPIES] == 8
    assert select([*stock, *own], [3.0] * 8 + [1.0] * 4, max_copies=4).taken == [0, 1, 2, 3]


def test_an_extreme_margin_makes_room_for_others_or_for_a_judge():
    both = [candidate("extreme"), candidate("sober")]
    assert select(both, [50.0, 1.0], max_abs_margin=10.0).taken == [1]
    alone = select(both[:1], [-50.0], max_abs_margin=10.0)
    assert (alone.taken, alone.unsettled) == ([], [0])
    assert alone.refused == {Refusal.EXTREME_MARGIN: 1}


def test_a_margin_that_is_not_a_number_is_nobodys():
    found = select([candidate()], [float("nan")])
    assert (found.taken, found.unsettled) == ([], [])
    assert found.refused[Refusal.NO_MARGIN] == 1


def test_threshold_refuses_what_is_worse_than_the_kept_pairs():
    limit = loss_of(np.array([1.0]))
    assert select([candidate()], [1.1], rule="threshold", kept_losses=limit).taken == [0]
    found = select([candidate()], [0.9], rule="threshold", kept_losses=limit)
    assert (found.taken, found.unsettled) == ([], [0])
    assert found.refused == {Refusal.HIGH_LOSS: 1}


def test_quantile_takes_a_typical_pair():
    kept = loss_of(np.array([1.0, 2.0, 3.0]))
    three = [candidate("a"), candidate("b"), candidate("c")]
    assert select(three, [0.4, -2.2, 9.0], rule="quantile", kept_losses=kept).taken == [1]
    assert select(three[:1], [0.4], rule="quantile", kept_losses=kept).taken == []
    assert select(three, [1.0, 2.0, 3.0], rule="quantile", kept_losses=np.zeros(0)).taken == []


def test_uncertainty_aware_asks_the_earlier_model():
    both = [candidate("a"), candidate("b")]
    rule = {"rule": "uncertainty_aware"}
    assert select(both, [5.0, 2.0], views=[-0.1, 1.0], **rule).taken == [1]
    assert select(both, [-5.0, 2.0], views=[-0.1, 1.0], **rule).taken == [0]
    found = select(both, [5.0, -2.0], views=[-0.1, 1.0], **rule)
    assert (found.taken, found.unsettled) == ([], [0])
    assert found.refused == {Refusal.DISAGREEMENT: 2}


def test_only_as_many_as_the_kept_pairs_bear_and_none_is_favoured():
    parents = [Pair(prompt=f"p{i}", chosen="good", rejected="bad", row=i) for i in range(40)]
    many = [candidate(f"answer {i}", parent=parent) for i, parent in enumerate(parents)]
    kept = np.ones(20)
    found = select(many, np.arange(1, 41), kept_losses=kept, max_share=0.5)
    assert len(found.taken) == 10
    assert found.taken == sorted(found.taken)
    assert found.taken == select(many, np.arange(1, 41), kept_losses=kept, max_share=0.5).taken
    assert found.taken != select(many, np.arange(1, 41), kept_losses=kept, max_share=0.5, seed=1).taken
    # The ten most extreme would have a mean of 34.5; chance gives 19.5 with a standard error of 3.2.
    assert np.mean(found.taken) < 32
    assert found.refused[Refusal.OVER_LIMIT] == 30


def test_every_candidate_is_accounted_for():
    rng = np.random.default_rng(0)
    parents = [Pair(prompt=f"p{i}", chosen="good", rejected="bad", row=i) for i in range(30)]
    many = [
        candidate(rng.choice(["good", "", "a b", "c d e", "f"]), parent=parent, tokens=(int(rng.integers(1, 9)), 4))
        for parent in parents
        for _ in range(4)
    ]
    found = select(many, rng.normal(size=120), rule="threshold", max_length_ratio=1.5, kept_losses=KEPT[:2])
    about_prompts = found.refused[Refusal.PROMPT_WITHOUT_USABLE]
    assert len(found.taken) + sum(found.refused.values()) - about_prompts == 120
    assert len(found.taken) + len(found.unsettled) + about_prompts == 30


@pytest.mark.parametrize("rule", SELECTION_RULES)
def test_every_rule_takes_a_single_good_candidate(rule):
    assert select([candidate()], [3.0], rule=rule, views=[2.0]).taken == [0]
    assert SELECTION_RULES[rule].meaning.endswith(".")


def test_repetition_counts_repeats_only():
    assert repetition("one two three four five") == 0.0
    assert repetition("a b c a b c") == pytest.approx(0.25)  # the fourth of four sequences
    assert repetition("short") == 0.0
