"""Rows to pairs where the prompt is what two conversations share: nothing is lost, doubled or moved across the border.

The reference is the row itself: prompt and response, joined, are what stands in it.
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ropo.data.load import load_pairs

pytestmark = pytest.mark.slow

_MARKS = ("\n\nHuman:", "\n\nAssistant:")


def transcript(turns):
    return "".join(f"{mark}{text}" for mark, text in turns)


@pytest.fixture(scope="session")
def turns(texts):
    """Turns of a transcript; a text may hold a mark of its own."""
    return st.lists(st.tuples(st.sampled_from(_MARKS), texts), max_size=4)


@pytest.fixture(scope="session")
def messages(texts):
    roles = st.sampled_from(["system", "user", "assistant", "tool"])
    return st.lists(st.fixed_dictionaries({"role": roles, "content": texts}), max_size=4)


def reassembled(loaded, rows):
    """Every row is a pair that holds all of it, or is listed."""
    pairs = {pair.row: pair for pair in loaded.pairs}
    listed = {problem.row for problem in loaded.problems}
    assert pairs.keys() | listed == set(range(len(rows)))
    assert not pairs.keys() & listed
    for place, pair in pairs.items():
        for name in ("chosen", "rejected"):
            assert pair.prompt + getattr(pair, name) == rows[place][name]


def test_transcripts(turns, fuzz):
    @fuzz(tests=5, at_once=5)
    @given(st.lists(st.tuples(turns, turns, turns), min_size=1))
    def run(drawn):
        fuzz.drive(len(drawn))
        rows = [
            {"chosen": transcript(shared + one), "rejected": transcript(shared + other)} for shared, one, other in drawn
        ]
        loaded = load_pairs(rows)
        reassembled(loaded, rows)
        for pair in loaded.pairs:
            assert pair.prompt.endswith("Assistant:")

    run()


def test_two_answers_to_one_transcript_are_a_pair(turns, texts, fuzz):
    """Where the answers hold no turn of their own, the prompt is exactly what was asked."""
    answers = texts.filter(lambda text: not any(mark in text for mark in _MARKS))

    @fuzz(tests=5, at_once=5)
    @given(st.lists(st.tuples(turns, answers, answers), min_size=1))
    def run(drawn):
        fuzz.drive(len(drawn))
        prompts = [transcript([*shared, ("\n\nAssistant:", "")]) for shared, _, _ in drawn]
        rows = [
            {"chosen": prompt + one, "rejected": prompt + other}
            for prompt, (_, one, other) in zip(prompts, drawn, strict=True)
        ]
        loaded = load_pairs(rows)
        assert not loaded.problems
        assert [pair.prompt for pair in loaded.pairs] == prompts

    run()


def test_any_two_texts(texts, fuzz):
    @fuzz(tests=5, at_once=5)
    @given(st.lists(st.tuples(texts, texts), min_size=1))
    def run(drawn):
        fuzz.drive(len(drawn))
        rows = [{"chosen": one, "rejected": other} for one, other in drawn]
        reassembled(load_pairs(rows), rows)

    run()


def test_conversations(messages, fuzz):
    @fuzz(tests=5, at_once=5)
    @given(st.lists(st.tuples(messages, messages, messages), min_size=1))
    def run(drawn):
        fuzz.drive(len(drawn))
        rows = [{"chosen": shared + one, "rejected": shared + other} for shared, one, other in drawn]
        loaded = load_pairs(rows)
        reassembled(loaded, rows)
        for pair in loaded.pairs:
            assert all(response[0]["role"] == "assistant" for response in (pair.chosen, pair.rejected))

    run()


def test_a_prompt_beside_conversations(messages, texts, fuzz):
    @fuzz(tests=5, at_once=5)
    @given(st.lists(st.tuples(messages, texts, texts), min_size=1))
    def run(drawn):
        fuzz.drive(len(drawn))
        rows = [
            {
                "prompt": next((one["content"] for one in shared if one["role"] == "user"), "Hi"),
                "chosen": [*shared, {"role": "assistant", "content": one}],
                "rejected": [*shared, {"role": "assistant", "content": other}],
            }
            for shared, one, other in drawn
        ]
        whole = []
        for row in rows:
            asked = {"role": "user", "content": row["prompt"]}
            # Of lone answers the prompt is the question.
            before = [asked] if row["chosen"][0]["role"] == "assistant" else []
            whole.append({name: [*before, *row[name]] for name in ("chosen", "rejected")})
        reassembled(load_pairs(rows), whole)

    run()
