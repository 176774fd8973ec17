"""Pairs to problems: nothing is raised, every finding is about a row that is there, and what is left is in order.

The texts come from few words, so that pairs repeat and contradict each other.
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ropo.data.problems import PROBLEMS, rows_left_out
from ropo.data.validate import DataError, read_checked, validate_pairs
from ropo.pairs import Pair

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def labelled(texts):
    few = st.sampled_from(["", " ", "yes", "Yes!", " yes", "no", "3 < 4", "3 > 4", "字", "\n", "e\u0301", "é"])
    said = st.lists(st.fixed_dictionaries({"role": st.just("assistant"), "content": few}), min_size=1, max_size=2)
    asked = st.lists(st.fixed_dictionaries({"role": st.just("user"), "content": few}), max_size=1)
    three = st.tuples(few, few, few) | st.tuples(asked, said, said) | st.tuples(texts, texts, texts)
    one = st.tuples(three, st.sampled_from([None, None, "A", "B"]))
    return st.lists(one, min_size=1)


def pairs_of(drawn):
    return [
        Pair(prompt=prompt, chosen=chosen, rejected=rejected, row=row, annotator=annotator)
        for row, ((prompt, chosen, rejected), annotator) in enumerate(drawn)
    ]


def test_findings(labelled, fuzz):
    @fuzz(tests=2, at_once=5)
    @given(labelled)
    def run(drawn):
        pairs = pairs_of(drawn)
        fuzz.drive(len(pairs))
        found = validate_pairs(pairs)
        assert {problem.row for problem in found} <= {pair.row for pair in pairs}
        assert [problem.row for problem in found] == sorted(problem.row for problem in found)
        assert validate_pairs(pairs) == found
        out = rows_left_out(found)
        rest = [pair for pair in pairs if pair.row not in out]
        assert not rows_left_out(validate_pairs(rest))  # nothing more is left out
        assert validate_pairs(rest) == [problem for problem in found if problem.row not in out]
        turned = {
            pair.row
            for place, pair in enumerate(rest)
            for one in rest[:place]
            if (one.prompt, one.chosen, one.rejected) == (pair.prompt, pair.rejected, pair.chosen)
        }
        assert {problem.row for problem in found if problem.kind == "contradictory"} == turned

    run()


def test_a_repetition_is_found_wherever_it_stands(labelled, fuzz):
    """A pair that is added again is a duplicate; added the other way round, a contradiction."""

    @fuzz(tests=2, at_once=5)
    @given(labelled, st.data())
    def run(drawn, data):
        pairs = pairs_of(drawn)
        fuzz.drive(len(pairs))
        out = rows_left_out(validate_pairs(pairs))
        rest = [pair for pair in pairs if pair.row not in out]
        if not rest:
            return
        one = data.draw(st.sampled_from(rest))
        texts = {"prompt": one.prompt, "chosen": one.chosen, "rejected": one.rejected}
        same = Pair(**texts, row=1000, annotator=one.annotator)
        turned = Pair(**{**texts, "chosen": one.rejected, "rejected": one.chosen}, row=1001, annotator=one.annotator)
        kinds = {(problem.row, problem.kind) for problem in validate_pairs([*pairs, same, turned])}
        assert (1000, "duplicate") in kinds
        assert (1001, "contradictory") in kinds

    run()


def test_what_is_read_is_checked(labelled, fuzz):
    """Skipping leaves exactly the rows that have no error; refusing raises just where there is one."""

    @fuzz(tests=5, at_once=5)
    @given(labelled)
    def run(drawn):
        pairs = pairs_of(drawn)
        fuzz.drive(len(pairs))
        try:
            loaded, kept, problems = read_checked(pairs, on_bad_rows="skip")
        except DataError:
            return
        assert {pair.row for pair in kept} | rows_left_out(problems) == {pair.row for pair in pairs}
        assert not {pair.row for pair in kept} & rows_left_out(problems)
        has_error = any(PROBLEMS[problem.kind].severity == "error" for problem in problems)
        try:
            assert read_checked(pairs, on_bad_rows="refuse") == (loaded, kept, problems)
        except DataError:
            assert has_error
        else:
            assert not has_error

    run()
