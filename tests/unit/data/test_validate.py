"""Texts that teach nothing, repetitions and contradictions are found, and what was found is told."""

import random
from pathlib import Path

import pytest

from ropo.data.load import FORMATS
from ropo.data.problems import PROBLEMS, Problem, problems_table, render, summarise
from ropo.data.validate import read_checked, text_id, validate_pairs
from ropo.pairs import Pair

FORMATS_PAGE = Path(__file__).parents[3] / "docs" / "formats.md"


def pairs_of(*texts, annotators=()):
    annotators = [*annotators, *[None] * (len(texts) - len(annotators))]
    return [
        Pair(prompt=prompt, chosen=chosen, rejected=rejected, row=row, annotator=annotator)
        for row, ((prompt, chosen, rejected), annotator) in enumerate(zip(texts, annotators, strict=True))
    ]


def found(pairs):
    return [(problem.kind, problem.row) for problem in validate_pairs(pairs)]


def answer(content):
    return [{"role": "assistant", "content": content}]


ASK = [{"role": "user", "content": "?"}]


def test_good_pairs_have_no_problems():
    assert found(pairs_of(("p", "c", "r"), ("p", "c", "s"), ("q", "c", "r"), (ASK, answer("c"), answer("r")))) == []


@pytest.mark.parametrize(
    ("texts", "kinds"),
    [
        (("", "c", "r"), ["empty_prompt"]),
        ((" \n", "c", "r"), ["empty_prompt"]),
        (([], answer("c"), answer("r")), ["empty_prompt"]),
        (("p", "", "r"), ["empty_response"]),
        (("p", "c", " \t"), ["empty_response"]),
        (("p", "", " "), ["empty_response", "empty_response"]),
        ((ASK, [], answer("r")), ["empty_response"]),
        ((ASK, answer("c"), answer(" ")), ["empty_response"]),
        (("p", "c", "c"), ["identical"]),
        (("p", "c", " c\n"), ["identical"]),
        ((ASK, answer("c"), answer("c ")), ["identical"]),
    ],
)
def test_a_pair_that_teaches_nothing_is_left_out(texts, kinds):
    problems = validate_pairs(pairs_of(("p", "c", "r"), texts))
    assert [problem.kind for problem in problems] == kinds
    assert {problem.row for problem in problems} == {1}
    assert {problem.severity for problem in problems} == {"left_out"}


@pytest.mark.parametrize("name", ["prompt", "chosen", "rejected"])
def test_a_text_that_no_tokenizer_comes_to_an_end_with_is_left_out(name):
    """51 MB of one prompt: 400 s and no end."""
    texts = {"prompt": "p", "chosen": "c", "rejected": "r"} | {name: "x " * 2_600_000}
    for given in (texts, {key: [{"role": "assistant", "content": text}] for key, text in texts.items()}):
        [problem] = validate_pairs([Pair(**given, row=3)])
        assert (problem.kind, problem.row, problem.severity) == ("text_too_long", 3, "left_out")
        assert problem.message.startswith(f"{name} needs at most 5,000,000 ")
        assert "got 5,200,000." in problem.message


def test_responses_that_repeat_the_prompt():
    """As whole transcripts beside an extracted prompt do; a short prompt may be how two answers begin."""
    prompt = "\n\nHuman: what is a soup?\n\nAssistant:"
    twice = Pair(prompt=prompt, chosen=f"{prompt} a food.", rejected=f"{prompt} a car.", row=0)
    once = Pair(prompt=prompt, chosen=f"{prompt} a food.", rejected=" a car.", row=1)
    short = Pair(prompt="Hi", chosen="Hi there", rejected="Hi!", row=2)
    assert [(problem.kind, problem.row) for problem in validate_pairs([twice, once, short])] == [("repeats_prompt", 0)]


def test_an_empty_response_is_named():
    messages = [problem.message for problem in validate_pairs(pairs_of(("p", "", "r"), ("p", "c", "")))]
    assert [message.split()[0] for message in messages] == ["chosen", "rejected"]


def test_a_repetition_names_the_earlier_row():
    problems = validate_pairs(pairs_of(("p", "c", "r"), ("q", "c", "r"), ("p", "c", "r"), ("p", "c", "r")))
    assert [(p.kind, p.row, p.severity) for p in problems] == [("duplicate", 2, "warning"), ("duplicate", 3, "warning")]
    assert all("row 0" in problem.message for problem in problems)


def test_a_contradiction_names_the_earlier_row():
    for first, second in (("c", "r"), (answer("c"), answer("r"))):
        prompt = "p" if isinstance(first, str) else ASK
        problems = validate_pairs(pairs_of(("x", "y", "z"), (prompt, first, second), (prompt, second, first)))
        assert [(p.kind, p.row, p.severity) for p in problems] == [("contradictory", 2, "warning")]
        assert "row 1" in problems[0].message


def test_a_pair_can_repeat_one_row_and_contradict_another():
    problems = validate_pairs(pairs_of(("p", "c", "r"), ("p", "r", "c"), ("p", "r", "c")))
    assert [(p.kind, p.row) for p in problems] == [("contradictory", 1), ("duplicate", 2), ("contradictory", 2)]
    assert "row 1" in problems[1].message
    assert "row 0" in problems[2].message


def test_votes_of_two_annotators_are_no_duplicates_but_may_contradict():
    texts = [("p", "c", "r"), ("p", "c", "r"), ("p", "r", "c"), ("p", "c", "r")]
    assert found(pairs_of(*texts, annotators=["ann", "bob", "cid", "ann"])) == [
        ("contradictory", 2),
        ("duplicate", 3),
        ("contradictory", 3),
    ]


def texts_are_one(one, other, **options):
    """Whether two texts make one pair wherever they stand, as plain text and in a conversation."""
    pairs = [
        pairs_of(
            (text, "c", "r"), ("p", text, "r"), ("p", "c", text), ([{"role": "user", "content": text}], "c", "r"),
            (ASK, answer(text), answer("r")),
        )
        for text in (one, other)
    ]  # fmt: skip
    (found,) = {text_id(a, **options) == text_id(b, **options) for a, b in zip(*pairs, strict=True)}
    return found


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Is 3 < 4 ?", "Is 3 > 4 ?"),
        ("10 + 2 =", "10 - 2 ="),
        ("-2", "2"),
        ("x == y", "x != y"),
        ("a && b", "a || b"),
        ("5 €", "5 $"),
        ("Hi", "Hi!"),
        ("x²", "x2"),
        ("½", "1/2"),
        ("①", "1"),
        ("今天天气很好", "今天天气不好"),
        ("かき", "がき"),
        ("ハ", "バ"),
        ("ไม้", "ไม่"),
        ("कि", "की"),
        ("क", "क्"),
        ("كَتَبَ", "كُتِبَ"),
        ("שָׁלוֹם", "שלום"),
        ("ma\N{COMBINING ACUTE ACCENT}", "ma\N{COMBINING GRAVE ACCENT}"),
        ("ma", "má"),
        ("\N{MAN}\N{ZERO WIDTH JOINER}\N{WOMAN}", "\N{MAN}\N{WOMAN}"),
        ("\N{THUMBS UP SIGN}", "\N{THUMBS DOWN SIGN}"),
        ("no where", "nowhere"),
    ],
)
def test_texts_that_say_something_else_are_not_one(one, other):
    assert not texts_are_one(one, other)
    first, second = pairs_of((f"p {one}", "c", "r"), (f"p {other}", "r", "c"))
    assert found([first, second]) == []


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Is 3 < 4 ?", "IS 3  <\n4 ? "),
        ("Straße", "STRASSE"),
        ("Σίσυφος", "ΣΊΣΥΦΟΣ"),
        ("Ti\u1ebfng Vi\u1ec7t", "Tie\u0302\u0301ng Vie\u0323\u0302t"),
        ("e\N{COMBINING DIAERESIS}", "Ë"),
        ("가", "\u1100\u1161"),
        ("が", "か\u3099"),
        ("\u05e9\u05c1\u05bc", "\u05e9\u05bc\u05c1"),
        ("今天\u3000天气", "今天 天气"),
        ("5\N{NO-BREAK SPACE}km", "5 km"),
    ],
)
def test_texts_that_differ_in_case_white_space_and_encoding_are_one(one, other):
    assert texts_are_one(one, other)
    first, second, third = pairs_of((f"p {one}", "c", "r"), (f"p {other}", "c", "r"), (f"P {other}", "r", "c"))
    assert found([first, second, third]) == [("near_duplicate", 1), ("near_contradiction", 2)]


def test_messages_are_one_by_role_and_content():
    user, system = ([{"role": role, "content": "Be kind."}] for role in ("user", "system"))
    pairs = pairs_of(
        (user, answer("c"), answer("r")),
        ([{"content": "be  KIND.", "role": "user"}], answer("R"), answer("C")),
        (system, answer("c"), answer("r")),
        ([*user, *user], answer("c"), answer("r")),
        ([{**user[0], "name": "ann"}], answer("c"), answer("r")),
        ("user: Be kind.", "assistant: c", "assistant: r"),
    )
    assert [text_id(pair) == text_id(pairs[0]) for pair in pairs] == [True, True, False, False, False, False]
    assert found(pairs) == [("near_contradiction", 1)]


def test_without_punctuation_more_is_one_but_no_symbol_or_mark_is_lost():
    for one, other in (("Hi", "Hi!"), ("don’t", "don't"), ("你好", "你好。"), ("“a”—b…", "a b"), ("¿Qué?", "qué")):
        assert texts_are_one(one, other, has_punctuation=False)
    for one, other in (("3 < 4", "3 > 4"), ("कि", "की"), ("5 €", "5 $"), ("!", "?"), ("ma", "má")):
        assert not texts_are_one(one, other, has_punctuation=False)


def test_rows_are_those_of_the_pairs_and_not_of_the_list():
    pair = Pair(prompt="p", chosen="c", rejected="c", row=41)
    assert found([pair]) == [("identical", 41)]


def test_planted_problems_are_found_again():
    rng = random.Random(0)
    texts = [(f"p{i}", f"c{i}", f"r{i}") for i in range(200)]
    planted = {row: rng.choice(["duplicate", "contradictory", "identical"]) for row in rng.sample(range(100, 200), 40)}
    for row, kind in planted.items():
        prompt, chosen, rejected = texts[row - 100]
        texts[row] = {
            "duplicate": (prompt, chosen, rejected),
            "contradictory": (prompt, rejected, chosen),
            "identical": (prompt, chosen, chosen),
        }[kind]
    assert found(pairs_of(*texts)) == [(planted[row], row) for row in sorted(planted)]


def test_columns_that_nothing_reads_are_told(caplog):
    """Whoever trains sees that `weights` is none of ours."""
    row = {"prompt": "p", "chosen": "c", "rejected": "r"}
    read_checked([row | {"weights": 0.5, "x\u202e": 1}])
    (said,) = caplog.messages
    assert said.endswith(r": weights, x\u202e.")
    caplog.clear()
    read_checked([row])
    assert not caplog.messages


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match=r"Problem .*empty_file, .*'odd'"):
        Problem(kind="odd", row=0, message="")


def test_counts_come_in_the_order_of_the_table():
    """Rows are counted: a pair both of whose responses are cut is one pair."""
    found = [("duplicate", 0), ("identical", 1), ("not_json", 2), ("identical", 3), ("truncated", 4), ("truncated", 4)]
    problems = [Problem(kind=kind, row=row, message="") for kind, row in found]
    assert list(summarise(problems).items()) == [("not_json", 1), ("identical", 2), ("truncated", 1), ("duplicate", 1)]
    assert summarise([]) == {}


def test_the_text_tells_meaning_remedy_and_the_first_rows():
    problems = [Problem(kind="duplicate", row=row, message=f"m{row}") for row in range(5)]
    problems.append(Problem(kind="not_json", row=7, line=9, message="odd"))
    problems.append(Problem(kind="empty_file", row=None, message="nothing"))
    text = render(problems, limit=2)
    blocks = text.split("\n\n")
    assert [block.splitlines()[0] for block in blocks] == [
        "empty_file: 1 error",
        "not_json: 1 error",
        "duplicate: 5 warnings",
    ]
    assert "- the source: nothing" in blocks[0]
    assert "- row 7 (line 9): odd" in blocks[1]
    assert "- row 1: m1\n  - and 3 more" in blocks[2]
    assert "m2" not in text
    for kind in summarise(problems):
        told = " ".join(text.split())
        assert PROBLEMS[kind].meaning in told
        assert f"What to do: {PROBLEMS[kind].remedy}" in told
    assert render([]) == "No problems found."


def test_the_page_shows_the_table_and_every_layout():
    page = FORMATS_PAGE.read_text(encoding="utf-8")
    assert problems_table() in page
    assert all(f"### `{name}`" in page for name in FORMATS)
