"""Columns as other projects name them are read where they say what is preferred, and refused once where they do not."""

import json
from pathlib import Path

import pytest

from ropo.data.layouts import LAYOUTS
from ropo.data.load import load_pairs


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def shared(speaker, text):
    return {"from": speaker, "value": text}


SYSTEM = {"role": "system", "content": "Be kind."}
ONE = [user("p")], [assistant("good")], [assistant("bad")]
TEXT = ("p", "good", "bad")
# The layout, the form of its texts, three rows, and what each becomes; None for a tie.
CASES = {
    "ShareGPT": (
        "conversations",
        "messages",
        [
            {
                "conversations": [shared("human", "p")],
                "chosen": shared("gpt", "good"),
                "rejected": shared("gpt", "bad"),
            },
            {
                "conversations": [shared("system", "Be kind."), shared("human", "p")],
                "chosen": shared("gpt", "good"),
                "rejected": shared("gpt", "bad"),
            },
            {"conversations": [user("p")], "chosen": [assistant("good")], "rejected": assistant("bad")},
        ],
        [ONE, ([SYSTEM, user("p")], *ONE[1:]), ONE],
    ),
    "ms-swift": (
        "rejected_response",
        "messages",
        [
            {"messages": [user("p"), assistant("good")], "rejected_response": "bad"},
            {"messages": [SYSTEM, user("p"), assistant("good")], "rejected_response": "bad"},
            {"messages": [user("p"), assistant("good")], "rejected_response": [assistant("bad")]},
        ],
        [ONE, ([SYSTEM, user("p")], *ONE[1:]), ONE],
    ),
    "Alpaca": (
        "question",
        "text",
        [
            {"instruction": "p", "input": "", "chosen": "good", "rejected": "bad"},
            {"instruction": "Add.", "input": "1, 2", "chosen": "good", "rejected": "bad"},
            {"instruction": "p", "chosen": "good", "rejected": "bad"},
        ],
        [TEXT, ("Add.\n1, 2", *TEXT[1:]), TEXT],
    ),
    "another name of the prompt": (
        "question",
        "text",
        [{"question": "p", "chosen": "good", "rejected": "bad", "id": i} for i in range(3)],
        [TEXT] * 3,
    ),
    "Orca": (
        "question",
        "messages",
        [
            {"system": "", "question": "p", "chosen": "good", "rejected": "bad"},
            {"system": "Be kind.", "question": "p", "chosen": "good", "rejected": "bad"},
            {"system": None, "question": "p", "chosen": "good", "rejected": "bad"},
        ],
        [ONE, ([SYSTEM, user("p")], *ONE[1:]), ONE],
    ),
    "AlpacaFarm": (
        "paired",
        "text",
        [
            {"instruction": "p", "input": "", "output_1": "good", "output_2": "bad", "preference": 1},
            {"instruction": "p", "input": "", "output_1": "bad", "output_2": "good", "preference": 1.98},
            {"instruction": "p", "input": "", "output_1": "good", "output_2": "bad", "preference": 1.5},
        ],
        [TEXT, TEXT, None],
    ),
    "letters": (
        "paired",
        "text",
        [
            {"prompt": "p", "response_a": "good", "response_b": "bad", "winner": "A"},
            {"prompt": "p", "response_a": "bad", "response_b": "good", "winner": "response_b"},
            {"prompt": "p", "response_a": "bad", "response_b": "good", "winner": "both_bad"},
        ],
        [TEXT, TEXT, None],
    ),
    "Chatbot Arena": (
        "paired",
        "implicit_messages",
        [
            {
                "conversation_a": [user("p"), assistant(first)],
                "conversation_b": [user("p"), assistant(second)],
                "winner": winner,
            }
            for first, second, winner in (
                ("good", "bad", "model_a"),
                ("bad", "good", "model_b"),
                ("good", "bad", "tie (bothbad)"),
            )
        ],
        [ONE, ONE, None],
    ),
    "SafeRLHF": (
        "paired",
        "text",
        [
            {"prompt": "p", "response_0": "good", "response_1": "bad", "better_response_id": 0},
            {"prompt": "p", "response_0": "bad", "response_1": "good", "better_response_id": 1},
            {"prompt": "p", "response_0": "bad", "response_1": "good", "better_response_id": "1"},
        ],
        [TEXT] * 3,
    ),
    "Stack Exchange": (
        "paired",
        "text",
        [{"question": "p", "response_j": "good", "response_k": "bad", "qid": i} for i in range(3)],
        [TEXT] * 3,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_layout(case):
    layout, form, rows, expected = CASES[case]
    loaded = load_pairs(rows)
    assert (loaded.layout, loaded.format) == (layout, form)
    assert [(pair.prompt, pair.chosen, pair.rejected) for pair in loaded.pairs] == [one for one in expected if one]
    ties = [row for row, one in enumerate(expected) if one is None]
    assert [(problem.kind, problem.row, problem.severity) for problem in loaded.problems] == [
        ("tie", row, "left_out") for row in ties
    ]
    assert set(loaded.ignored_columns) <= {"id", "qid"}


@pytest.mark.parametrize("case", CASES)
def test_columns_stand_in_any_order(case):
    rows = CASES[case][2]
    assert load_pairs([dict(reversed(row.items())) for row in rows]).pairs == load_pairs(rows).pairs


def test_every_layout_has_a_case():
    assert {layout for layout, *_ in CASES.values()} == set(LAYOUTS)


def test_content_in_parts_is_one_text():
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo", "image_url": None}]
    loaded = load_pairs([{"chosen": [user("p"), assistant(parts)], "rejected": [user("p"), assistant("bad")]}])
    assert loaded.pairs[0].chosen == [assistant("Hello")]
    picture = [{"type": "image_url", "image_url": {"url": "x"}}]
    loaded = load_pairs([{"chosen": [user(picture), assistant("a")], "rejected": [user(picture), assistant("b")]}])
    assert "message 0 of chosen" in loaded.problems[0].message
    assert "got dict" in loaded.problems[0].message


REFUSED = {
    "UltraFeedback": (
        {"instruction": "p", "models": [], "completions": [{"response": "a", "overall_score": 3}]},
        "two responses to a prompt; got a list of answers in `completions`. Choose two of each list",
    ),
    "KTO": ({"prompt": "p", "completion": "a", "label": True}, "single responses with a label each, as KTO takes them"),
    "one response": ({"messages": [user("p"), assistant("a")]}, "got one response to each prompt, in `messages`"),
    "images": ({"prompt": "p", "images": ["x.png"], "chosen": "a", "rejected": "b"}, "of text; got a column images"),
    "no label": (
        {"prompt": "p", "response_a": "a", "response_b": "b", "score_a": 1},
        "which of response_a and response_b is better, such as preference, winner, label; got none",
    ),
    "two labels": (
        {"prompt": "p", "response_a": "a", "response_b": "b", "winner": "a", "preference": "b"},
        "got preference, winner",
    ),
    "a number for a letter": (
        {"prompt": "p", "response_a": "a", "response_b": "b", "label": 1},
        r"label to name response_a or response_b \(a or b\), or a tie; got int 1, which may mean either",
    ),
    "another number": (
        {"prompt": "p", "output_1": "a", "output_2": "b", "preference": 0},
        "got int 0, which may mean either",
    ),
    "a boolean": (
        {"prompt": "p", "response_0": "a", "response_1": "b", "label": True},
        "got bool True, which may mean either",
    ),
    "many answers": (
        {"prompt": "p", "answer_0": "a", "answer_1": "b", "answer_2": "c", "label": 1},
        "needs two responses to a row; got answer_0 and answer_1 and answer_2",
    ),
    "two prompts": (
        {"instruction": "p", "question": "q", "chosen": "a", "rejected": "b"},
        "needs one prompt; got instruction and question. Choose by --prompt_column",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_says_not_which_is_preferred_is_refused_once(case):
    row, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        load_pairs([row] * 3)


def test_a_label_that_may_mean_either_refuses_the_whole_source():
    """Skipping the rows that say 0 would leave those that say 1, read the wrong way round."""
    rows = [{"prompt": "p", "response_1": "a", "response_2": "b", "label": label} for label in (1, 1, 0)]
    with pytest.raises(ValueError, match="got int 0, which"):
        load_pairs(rows)


def test_a_row_that_lacks_what_its_layout_needs():
    rows = [
        {"prompt": "p", "response_a": "a", "response_b": "b", "winner": "a"},
        {"prompt": "p", "response_a": "a", "response_b": "b", "winner": None},
        {"prompt": "p", "response_a": None, "response_b": "b", "winner": "b"},
        {"prompt": "p", "chosen": "a", "rejected": "b"},
    ]
    problems = load_pairs(rows).problems
    assert [(problem.kind, problem.row) for problem in problems] == [("missing_field", row) for row in (1, 2, 3)]
    for problem, name in zip(problems, ("winner", "response_a", "winner"), strict=True):
        assert f" needs {name}" in problem.message
    [problem] = load_pairs([{"messages": None, "rejected_response": "b"}]).problems
    assert problem.message.startswith("messages needs a list")


@pytest.mark.parametrize(
    "row",
    [
        {"system": "s", "question": 1.5, "chosen": "a", "rejected": "b"},
        {"conversations": [shared([], "p")], "chosen": shared("gpt", "a"), "rejected": shared("gpt", "b")},
        {"conversations": 3, "chosen": shared("gpt", "a"), "rejected": shared("gpt", "b")},
    ],
)
def test_values_of_another_type_are_problems(row):
    assert [problem.kind for problem in load_pairs([row]).problems] == ["wrong_type"]


def test_a_bad_first_row_decides_nothing():
    good = {"system": "s", "question": "q", "chosen": "a", "rejected": "b"}
    bad = {name: value for name, value in good.items() if name != "rejected"}
    loaded = load_pairs([bad, good, good | {"question": "r"}])
    assert loaded.layout == "question"
    assert [pair.row for pair in loaded.pairs] == [1, 2]
    assert [problem.row for problem in loaded.problems] == [0]


def test_what_only_later_rows_have_is_no_less_read():
    """Writers leave out what is empty."""
    answers = {"chosen": "a", "rejected": "b"}
    loaded = load_pairs([{"instruction": "Say hi", **answers}, {"instruction": "Say", "input": "x", **answers}])
    assert [pair.prompt for pair in loaded.pairs] == ["Say hi", "Say\nx"]
    loaded = load_pairs([{"question": "q", **answers}, {"question": "q", "system": "s", **answers}])
    assert [(problem.kind, problem.row) for problem in loaded.problems] == [("mixed_formats", 1)]


def test_a_named_prompt_leaves_the_responses_to_the_layout():
    rows = [{"instruction": "x", "question": "q", "response_a": "a", "response_b": "b", "winner": "b"}]
    with pytest.raises(ValueError, match="prompt_column"):
        load_pairs(rows)
    loaded = load_pairs(rows, columns={"prompt": "question"})
    [pair] = loaded.pairs
    assert (loaded.layout, pair.prompt, pair.chosen) == ("paired", "q", "b")
    assert loaded.ignored_columns == ("instruction",)


def test_our_own_columns_come_first():
    """Whatever stands beside them, and whatever the user names."""
    row = {"prompt": "p", "chosen": "a", "rejected": "b"}
    beside = {"question": "q", "messages": [user("x")], "response_a": "c", "response_b": "d", "winner": "a", "label": 1}
    loaded = load_pairs([row | beside])
    assert (loaded.layout, loaded.pairs[0].prompt) == ("own", "p")
    assert loaded.ignored_columns == tuple(sorted(beside))
    named = load_pairs([beside], columns={"prompt": "question", "chosen": "response_a", "rejected": "response_b"})
    assert (named.layout, named.pairs[0].chosen) == ("own", "c")
    whole = load_pairs(
        [{"question": "q", "chosen": [user("p"), assistant("a")], "rejected": [user("p"), assistant("b")]}]
    )
    assert (whole.layout, whole.format, whole.ignored_columns) == ("own", "implicit_messages", ("question",))


def test_names_of_columns_that_are_no_text():
    assert load_pairs([{1: 2, "x": 3, "chosen": "a", "rejected": "b", "prompt": "p"}]).ignored_columns == (1, "x")


def test_layouts_in_a_file(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("prompt,response_1,response_2,preference\np,good,bad,1\np,bad,good,2\np,a,b,tie\n")
    assert [pair.chosen for pair in load_pairs(path).pairs] == ["good", "good"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CASES["ShareGPT"][2]))
    assert len(load_pairs(tmp_path / "a.jsonl").pairs) == 3


def test_the_page_lists_every_layout():
    page = (Path(__file__).parents[3] / "docs" / "formats.md").read_text(encoding="utf-8")
    assert all(f"| `{name}` |" in page for name in LAYOUTS)
