"""Win rates: ties, silence and length are told, not hidden."""

import json
import re
from pathlib import Path

import pytest

from ropo.data.validate import DataError
from ropo.evaluate.measures import share_of
from ropo.evaluate.options import WinRateArguments
from ropo.evaluate.win_rate import Comparison, Outputs, compare, read_outputs, run_win_rate, win_rate


def comparisons(*said, output="long text", baseline="short"):
    return [Comparison(instruction=str(n), output=output, baseline=baseline, p_better=p) for n, p in enumerate(said)]


def test_names_in_a_file_of_outputs_are_shown_as_text(tmp_path):
    """No terminal obeys them, and half a character does not end a comparison that a judge was paid for."""
    path = tmp_path / "o.json"
    path.write_text(json.dumps([{"instruction": "q", "output": "a", "generator": "m\x1b[2J\ud83d"}]))
    name = read_outputs(path, option="outputs").name
    assert name.isprintable()
    assert name.encode("utf-8")
    path.write_text(json.dumps([{"instruction": "q", "out\x1b[2J": "a"}]))
    with pytest.raises(DataError) as refused:
        read_outputs(path, option="outputs")
    assert "\x1b" not in str(refused.value)


def test_ties_count_half_and_silence_is_left_out():
    found = win_rate(comparisons(1.0, 0.9, 0.5, 0.5, 0.0, None))
    assert found.counts == {"win": 2, "loss": 1, "tie": 2, "undecided": 1, "identical": 0}
    assert found.rate.value == 3 / 5
    assert (found.lowest, found.highest) == (3 / 6, 4 / 6)
    assert found.mean_p_better == pytest.approx(2.9 / 5)


def test_the_interval_is_that_of_the_decided():
    found = win_rate(comparisons(*[1.0] * 30, *[0.0] * 10, *[None] * 5))
    assert found.rate == share_of([1.0] * 30 + [0.0] * 10)
    assert found.rate.count == 40
    # Wilson's interval worked by hand: p = 0.75, n = 40, z = 1.6449
    assert found.rate.low == pytest.approx(0.6240, abs=2e-4)
    assert found.rate.high == pytest.approx(0.8442, abs=2e-4)


def test_nothing_decided_is_no_rate():
    found = win_rate(comparisons(None, None))
    assert found.rate is None
    assert found.mean_p_better is None
    assert (found.lowest, found.highest) == (0.0, 1.0)
    assert set(found.by_length.values()) == {None}


@pytest.mark.parametrize("said", [[None, None], [0.5, 0.5], [0.5, None], []])
def test_a_judge_that_prefers_nothing_gives_no_rate(said):
    """Not even beside identical outputs, about which nobody was asked: they are no ties."""
    found = win_rate([*comparisons(*said), *comparisons(None, None, None, output="same", baseline="same")])
    assert found.rate is None
    assert set(found.by_length.values()) == {None}
    assert found.counts["identical"] == 3
    assert sum(found.counts.values()) == len(said) + 3
    if not said:
        assert (found.lowest, found.highest, found.mean_p_better) == (None, None, None)


def test_identical_outputs_move_no_rate():
    rows = comparisons(1.0, 1.0, 0.5, 0.0, None)
    alone, beside = win_rate(rows), win_rate([*rows, *comparisons(*[None] * 40, output="same", baseline="same")])
    assert beside.rate == alone.rate
    assert (beside.lowest, beside.highest, beside.mean_p_better) == (alone.lowest, alone.highest, alone.mean_p_better)
    assert beside.by_length == alone.by_length


def test_length_is_told():
    rows = [
        *comparisons(1.0, 1.0, 0.0, output="aaaa", baseline="b"),
        *comparisons(0.0, 0.5, output="a", baseline="bbb"),
        *comparisons(0.5, output="aa", baseline="bb"),
        *comparisons(None, output="aa", baseline="aa"),
        *comparisons(None, output="a", baseline="bbb"),
    ]
    found = win_rate(rows)
    assert {name: (rate.value, rate.count) for name, rate in found.by_length.items()} == {
        "longer": (2 / 3, 3), "shorter": (0.25, 2), "as_long": (0.5, 1),
    }  # fmt: skip
    assert found.mean_chars == (3 * 4 + 2 * 1 + 2 + 2 + 1) / 8
    assert found.mean_chars_baseline == (3 * 1 + 2 * 3 + 2 + 2 + 3) / 8
    assert found.counts["identical"] == 1


def test_the_judge_is_asked_about_what_differs_only():
    asked = []

    def judge(pairs):
        asked.extend(pairs)
        return [1.0] * len(pairs)

    ours = Outputs(name="a", texts={"p": "x", "q": "same", "r": "y"})
    theirs = Outputs(name="b", texts={"r": "v", "q": "same", "p": "u"})
    found = compare(ours, theirs, judge)
    assert [(one.outcome, one.p_better) for one in found] == [("win", 1.0), ("identical", None), ("win", 1.0)]
    assert [(pair.prompt[0]["content"], pair.chosen[0]["content"], pair.rejected[0]["content"]) for pair in asked] == [
        ("p", "x", "u"), ("r", "y", "v"),
    ]  # fmt: skip
    assert {message["role"] for pair in asked for message in (*pair.prompt, *pair.chosen)} == {"user", "assistant"}
    asked.clear()
    compare(ours, theirs, judge, plain_text=True)
    assert [(pair.prompt, pair.chosen, pair.rejected) for pair in asked] == [("p", "x", "u"), ("r", "y", "v")]


def test_a_wrong_judge_is_refused():
    ours, theirs = Outputs(name="a", texts={"p": "x"}), Outputs(name="b", texts={"p": "y"})
    with pytest.raises(ValueError, match=re.escape("probabilities in [0, 1] or None; got 3.0. Is it a reward?")):
        compare(ours, theirs, lambda _: [3.0])


def test_both_must_have_answered_the_same():
    ours, theirs = Outputs(name="a", texts={"p": "x", "q": "y"}), Outputs(name="b", texts={"p": "y"})
    for one, other in ((ours, theirs), (theirs, ours)):
        with pytest.raises(DataError, match=re.escape("got 1 of 2 of a that b has not answered, the first str 'q'")):
            compare(one, other, lambda _: pytest.fail("asked"))


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"instruction": "a"}], "row 0 (line 1): outputs need a text in `output`; got fields instruction."),
        ([{"instruction": "a", "output": None}], "outputs need a text in `output`; got NoneType None."),
        ([{"instruction": "a", "output": "x"}, 3], "row 1 (line 1): a row needs to be an object; got int 3"),
        ([{"instruction": "a", "output": "x"}] * 2, "row 1 (line 1): outputs need an instruction once"),
        ([{"instruction": "a", "output": "x", "generator": "m"}, {"instruction": "b", "output": "x", "generator": "n"}],
         "outputs need one generator; got m, n"),
        ([{"instruction": "a", "output": "x\ud800"}], "outputs need text that is UTF-8; got str"),
        ([{"instruction": "\ud800", "output": "x"}], "outputs need text that is UTF-8; got str"),
        ([{"instruction": "Translate", "input": "Hallo", "output": "x"}],
         "row 0 (line 1): outputs need an instruction without `input`; got str 'Hallo'. Write it into `instruction`"),
        ([], "outputs need at least one row"),
    ],
)  # fmt: skip
def test_other_files_are_refused(rows, said, tmp_path):
    path = tmp_path / "A.json"
    path.write_text(json.dumps(rows))
    with pytest.raises(DataError, match=re.escape(said)) as caught:
        read_outputs(path, option="--outputs")
    assert str(path) in str(caught.value)


def test_missing_file():
    with pytest.raises(FileNotFoundError, match=r"--baseline .*; nowhere.json "):
        read_outputs(Path("nowhere.json"), option="--baseline")


def test_an_empty_input_is_none(tmp_path):
    path = tmp_path / "A.json"
    path.write_text('[{"instruction": "a", "input": "", "output": "x"}]')
    assert read_outputs(path, option="--outputs").texts == {"a": "x"}


def test_outputs_may_be_empty_texts(tmp_path):
    path = tmp_path / "A.json"
    path.write_text('[{"instruction": "a", "output": ""}]')
    assert read_outputs(path, option="--outputs") == Outputs(name="A", texts={"a": ""})


GIVEN = {"outputs": "A.json", "baseline": "B.json", "output_dir": "o", "judge": "reward_model", "judge_model": "r"}


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"baseline": None}, "--baseline is missing. Usage: ropo win_rate"),
        ({"judge": "none", "judge_model": None}, "win_rate needs a judge, reward_model or endpoint; got none"),
        ({"judge_model": None}, "judge reward_model needs judge_model; got no judge_model"),
        ({"judge_url": "http://localhost:1/v1"}, "judge_url needs judge endpoint; got judge reward_model"),
        ({"judge": "endpoint"}, "judge endpoint needs judge_model and judge_url; got no judge_url"),
        ({"judge": "endpiont"}, "Did you mean endpoint?"),
        ({"judge": "endpoint", "judge_url": "http://localhost:1/v1", "judge_api_key_env": "sk-not-a-name"}, "13 other"),
    ],
)
def test_misuse_is_refused(more, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        WinRateArguments(**{**GIVEN, **more})


def test_a_judge_is_needed_in_python_too(tmp_path):
    for name in "AB":
        (tmp_path / f"{name}.json").write_text(json.dumps([{"instruction": "a", "output": name}]))
    args = WinRateArguments(
        **{
            **GIVEN,
            "outputs": str(tmp_path / "A.json"),
            "baseline": str(tmp_path / "B.json"),
            "output_dir": str(tmp_path),
        }
    )
    args.judge = "none"
    with pytest.raises(ValueError, match="win_rate needs a judge"):
        run_win_rate(args)
