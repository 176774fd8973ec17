import numpy as np
import pytest

from ropo.noise.shares import wilson_interval
from ropo.pairs import Pair
from ropo.report import biases
from ropo.report.biases import BIASES, MIN_DIFFERING, file_parts, response_biases


def pairs_of(*texts):
    return [Pair(prompt="p", chosen=chosen, rejected=rejected, row=row) for row, (chosen, rejected) in enumerate(texts)]


def measured(pairs, name, *, p_flip=None, is_kept=None, is_informative=True):
    found = response_biases(
        pairs,
        p_flip=np.zeros(len(pairs)) if p_flip is None else np.array(p_flip),
        is_kept=np.ones(len(pairs), dtype=bool) if is_kept is None else np.array(is_kept),
        is_informative=is_informative,
    )
    return next(entry for entry in found["features"] if entry["name"] == name)


EXAMPLES = [
    ("length in characters", "four", 4),
    ("paragraphs", "one\n\ntwo\n \nthree\nstill three", 2),
    ("list items", "- a\n* b\n  1. c\n12) d\n-no\n3.14 is pi", 4),
    ("headings", "# One\n### Two\n#hashtag\nC # minor", 2),
    ("bold text", "**a** and 2 ** 3", 1),
    ("code blocks", "```python\nx\n```", 2),
    ("links", "see https://a.b and http://c.d", 2),
    ("digits", "in 1984, at 7", 5),
    ("question marks", "Why? 为什么？", 2),
    ("exclamation marks", "No! Yes!!", 3),
    ("a refusal at the beginning", "I'm sorry, but I can’t help.", 1),
    ("the word “I”", "I think I'm in. It is I", 3),
]


def test_every_feature_has_an_example():
    assert [name for name, _, _ in EXAMPLES] == list(BIASES)


@pytest.mark.parametrize(("name", "text", "value"), EXAMPLES)
def test_features_count_what_they_say(name, text, value):
    assert BIASES[name](text) == value
    assert BIASES[name]("") == 0


@pytest.mark.parametrize("text", ["I cannot do that", "As an AI model", "Sorry, no", "Unfortunately, I can't"])
def test_refusals_are_known(text):
    assert BIASES["a refusal at the beginning"](text) == 1


@pytest.mark.parametrize("text", ["I can do that", "Sort the list", "No. I'm sorry to say", "As a baker"])
def test_other_beginnings_are_no_refusals(text):
    assert BIASES["a refusal at the beginning"](text) == 0


def test_only_pairs_that_differ_count():
    pairs = pairs_of(*[("a?", "b")] * 24, *[("a", "b?")] * 6, *[("a?", "b?")] * 10)
    found = measured(pairs, "question marks", p_flip=[0.1] * 24 + [0.6] * 6 + [0.9] * 10)
    low, high = wilson_interval(0.8, 30)
    assert found["all"] == {
        "num_pairs": 30,
        "share": 0.8,
        "low": pytest.approx(low, abs=1e-6),
        "high": pytest.approx(high, abs=1e-6),
    }
    assert (found["p_flip_more"], found["p_flip_less"]) == (pytest.approx(0.1), pytest.approx(0.6))
    assert (found["mean_chosen"], found["mean_rejected"]) == (pytest.approx(34 / 40), pytest.approx(16 / 40))
    assert found["is_clear"]


def test_kept_pairs_and_the_others_are_told_apart():
    pairs = pairs_of(*[("a!", "b")] * 3, *[("a", "b!")] * 1)
    found = measured(pairs, "exclamation marks", is_kept=[True, True, False, False])
    assert (found["kept"]["share"], found["not_kept"]["share"]) == (1.0, 0.5)


def test_few_pairs_and_even_shares_are_not_pointed_at():
    few = pairs_of(*[("a1", "b")] * (MIN_DIFFERING - 1))
    enough = pairs_of(*[("a1", "b")] * MIN_DIFFERING)
    even = pairs_of(*[("a1", "b")] * 30, *[("a", "b1")] * 28)
    less = pairs_of(*[("a", "b1")] * MIN_DIFFERING)
    assert [measured(pairs, "digits")["is_clear"] for pairs in (few, enough, even, less)] == [False, True, False, True]


def test_without_signal_p_flip_is_unknown_and_shares_stand():
    found = measured(pairs_of(("a1", "b")), "digits", p_flip=[0.3], is_informative=False)
    assert (found["all"]["share"], found["p_flip_more"], found["p_flip_less"]) == (1.0, None, None)


def test_many_pairs_are_measured_evenly_over_the_file(monkeypatch):
    monkeypatch.setattr(biases, "MOST_PAIRS", 11)
    pairs = pairs_of(*[("a1", "b")] * 50, *[("a", "b1")] * 51)
    found = response_biases(pairs, p_flip=np.zeros(101), is_kept=np.ones(101, dtype=bool), is_informative=True)
    assert found["num_pairs"] == 11
    digits = next(entry for entry in found["features"] if entry["name"] == "digits")
    assert digits["all"]["share"] == pytest.approx(5 / 11, abs=1e-6)  # rows 0 to 40 of 0, 10, ..., 100


def test_conversations_are_read_too():
    talk = [{"role": "assistant", "content": "Why?"}]
    pair = Pair(prompt="p", chosen=talk, rejected=[{"role": "assistant", "content": "No"}], row=0)
    assert measured([pair], "question marks")["all"]["share"] == 1.0


def test_a_bad_batch_stands_out_by_its_rows():
    rows = np.arange(0, 800, 2)  # every second row was left out before
    p_flip = np.where(np.arange(400) % 4 == 0, 0.8, 0.0)  # mean 0.2 everywhere ...
    p_flip[80:120] = np.where(np.arange(40) % 4 == 0, 0.0, 0.8)  # ... and 0.6 in the third tenth
    parts = file_parts(rows, p_flip=p_flip, is_informative=True)
    assert [part["is_high"] for part in parts] == [False, False, True, *[False] * 7]
    bad = parts[2]
    assert (bad["first_row"], bad["last_row"], bad["num_pairs"]) == (160, 238, 40)
    assert (bad["p_flip_mean"], bad["p_flip_others"]) == (pytest.approx(0.6), pytest.approx(0.2))


def test_equal_parts_do_not_stand_out():
    """A part stands out by chance in one file of 400; of 400 files more than 6 would have one once in 1,000 tests."""
    rng = np.random.default_rng(0)
    rows = np.arange(400)
    files = [file_parts(rows, p_flip=rng.beta(0.3, 1.2, 400), is_informative=True) for _ in range(400)]
    assert sum(any(part["is_high"] for part in parts) for parts in files) <= 6
    assert not any(part["is_high"] for part in file_parts(rows, p_flip=np.full(400, 0.3), is_informative=True))


@pytest.mark.parametrize(("num", "is_informative", "num_parts"), [(199, True, 0), (200, True, 10), (400, False, 0)])
def test_parts_need_pairs_and_a_signal(num, is_informative, num_parts):
    assert len(file_parts(np.arange(num), p_flip=np.zeros(num), is_informative=is_informative)) == num_parts
