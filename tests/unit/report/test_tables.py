import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from ropo.pairs import Pair
from ropo.report.from_summary import NUM_ANNOTATORS
from ropo.report.pair_tables import NUM_DROPPED_ROWS
from ropo.report.statistics import round_step
from ropo.report.tables import NUM_CURVE_POINTS, build_tables


def build(run):
    return build_tables(**run)


def with_column(ledger, name, values):
    index = ledger.column_names.index(name)
    return ledger.set_column(index, name, pa.array(values, ledger.schema.field(name).type))


@pytest.mark.parametrize("task", ["train", "audit"])
def test_twenty_pairs_give_the_pinned_dict(make_run, make_audit, task):
    """When the change is meant: delete the file, run once to write it anew, and read its difference."""
    tables = build(make_run() if task == "train" else make_audit())
    pinned = Path(__file__).parents[2] / "data" / f"{task}_20.json"
    if not pinned.exists():
        pinned.write_text(json.dumps(tables, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        pytest.fail(f"{pinned.name} was missing and has been written; read it and run again")
    assert tables == json.loads(pinned.read_text(encoding="utf-8"))


def test_all_values_are_plain_and_finite(make_run):
    nan = float("nan")
    run = make_run(summary={"flip_rate": {"estimate": nan, "low": nan, "high": nan}, "is_informative": False})
    run["ledger"] = with_column(run["ledger"], "p_flip", [nan] * len(run["ledger"]))
    tables = build(run)
    assert json.loads(json.dumps(tables, allow_nan=False)) == tables
    assert tables["suspects"] == []
    assert tables["review"] is None
    assert tables["dropped"]["rows"][0]["p_flip"] is None


def test_only_original_pairs_of_the_last_round_count(make_run):
    tables = build(make_run())
    counts = tables["counts"]
    assert (counts["num_pairs"], counts["keep"], counts["drop"], counts["flip"], counts["resample"]) == (
        20,
        16,
        2,
        1,
        1,
    )
    assert counts["new_pairs"] == 1
    assert tables["margins"]["num_pairs"] == 20
    assert tables["margins"]["share_negative"] == 0.2


def test_order_of_ledger_and_pairs_does_not_matter(make_run):
    run = make_run()
    order = np.random.default_rng(0).permutation(len(run["ledger"]))
    shuffled = run | {"ledger": run["ledger"].take(order), "pairs": run["pairs"][::-1]}
    assert build(shuffled) == build(run)


def test_suspects_fall_by_p_flip_and_name_their_row(make_run):
    suspects = build(make_run())["suspects"]
    assert [pair["row"] for pair in suspects[:4]] == [7, 3, 12, 18]
    assert len(suspects) == 10
    assert suspects[0]["annotator"] == "a2"
    assert suspects[0]["decision"] == "flip"


def test_review_counts_expected_flips(make_run):
    review = build(make_run())["review"]
    assert review["num_likely"] == 4
    assert review["found_likely"] == pytest.approx(0.99 + 0.97 + 0.91 + 0.62)
    assert (review["num_read"][0], review["num_read"][-1]) == (0, 20)
    assert review["num_found"][-1] == review["found_all"]


def test_histogram_holds_every_pair_and_splits_at_zero(make_run):
    margins = build(make_run())["margins"]
    assert sum(map(sum, margins["counts"].values())) == 20
    assert 0.0 in margins["edges"]
    zero = margins["edges"].index(0.0)
    assert sum(sum(counts[:zero]) for counts in margins["counts"].values()) == 4


@pytest.mark.parametrize("value", [0.0, 2.5, -1e-6, 1e4])
def test_equal_margins_still_make_a_histogram(make_run, value):
    run = make_run()
    margins = build(run | {"ledger": with_column(run["ledger"], "margin", [value] * len(run["ledger"]))})["margins"]
    assert sum(map(sum, margins["counts"].values())) == 20
    assert len(margins["edges"]) < 60


def test_a_far_margin_does_not_flatten_the_histogram(make_run):
    run = make_run()
    far = run["ledger"]["margin"].to_pylist()
    far[20:22] = [float("nan"), 1e9]  # the last round begins at 20
    many = pa.concat_tables([with_column(run["ledger"], "margin", far)])
    margins = build(run | {"ledger": many})["margins"]
    assert margins["num_not_finite"] == 1
    assert margins["num_pairs"] == 19
    assert margins["num_above"] == 1
    assert margins["edges"][-1] < 20
    assert sum(map(sum, margins["counts"].values())) == 19


def test_each_round_has_its_own_margins(make_run):
    before, after = build(make_run())["rounds"]
    assert before["median_margin"] == pytest.approx(after["median_margin"] / 2)
    assert (before["rho"], before["num_kept"]) == (0.25, 16)


def test_a_row_without_its_pair_is_refused(make_run):
    run = make_run()
    with pytest.raises(ValueError, match=r"row 19 \(1 missing\)"):
        build(run | {"pairs": [pair for pair in run["pairs"] if pair.row != 19]})


def test_an_empty_ledger_is_refused(make_run):
    run = make_run()
    with pytest.raises(ValueError, match="original pair; got"):
        build(run | {"ledger": run["ledger"].slice(0, 0)})


def test_steps_of_rounds_follow_one_another(make_run):
    training = build(make_run())["training"]
    loss = training["curves"][0]
    assert [line["x"] for line in loss["lines"]] == [[10, 20, 30], [40, 50, 60]]
    assert (training["starts"], training["num_steps"]) == ([0, 30], 60)


def test_steps_that_count_on_are_left_alone(make_run):
    log = [{"round": 0, "step": 10, "loss": 1.0}, {"round": 1, "step": 20, "loss": 0.5}]
    training = build(make_run(training_log=log))["training"]
    assert [line["x"] for line in training["curves"][0]["lines"]] == [[10], [20]]


def test_a_long_log_is_averaged(make_run):
    log = [{"round": 0, "step": step, "loss": float(step)} for step in range(1, 10_001)]
    line = build(make_run(training_log=log))["training"]["curves"][0]["lines"][0]
    assert len(line["y"]) == NUM_CURVE_POINTS
    assert np.mean(line["y"]) == pytest.approx(5000.5, rel=1e-2)
    assert line["num_logged"] == 10_000


def test_a_log_with_gaps_and_nan_is_read(make_run):
    log = [{"round": 0, "step": 1, "loss": float("nan")}, {"round": 0, "step": 2, "loss": 1.0}, {"train_runtime": 3.0}]
    line = build(make_run(training_log=log))["training"]["curves"][0]["lines"][0]
    assert (line["x"], line["y"]) == ([2.0], [1.0])


def test_problems_come_worst_first_with_their_meaning(make_run):
    problems = build(make_run(summary={"problems": {"truncated": 9, "identical": 2, "duplicate": 0, "new_kind": 1}}))[
        "problems"
    ]
    assert [problem["kind"] for problem in problems] == ["identical", "truncated", "new_kind"]
    assert problems[0]["severity"] == "left_out"
    assert problems[0]["meaning"]
    assert problems[0]["remedy"]


def test_not_kept_pairs_are_listed_smallest_margin_first(make_run):
    run = make_run()
    dropped = build(run)["dropped"]
    assert [entry["row"] for entry in dropped["rows"]] == [7, 3, 12, 18]
    assert dropped["rows"][0]["prompt"] == run["pairs"][7].prompt


def test_the_list_of_dropped_pairs_is_bounded(make_run):
    num = NUM_DROPPED_ROWS + 50
    pairs = [Pair(prompt="p", chosen="a", rejected="b", row=row, id=str(row)) for row in range(num)]
    run = make_run()
    column = {"row": range(num), "pair_id": [""] * num, "decision": ["drop"] * num, "origin": ["data"] * num}
    numbers = {name: np.zeros(num) for name in ("margin", "loss", "weight", "p_flip")}
    ledger = pa.table(column | numbers | {"round": np.zeros(num, dtype=np.int32)})
    dropped = build(run | {"ledger": ledger, "pairs": pairs})["dropped"]
    assert (dropped["num_rows"], len(dropped["rows"])) == (num, NUM_DROPPED_ROWS)


def test_a_new_pair_stands_beside_the_one_it_replaces(make_run):
    resampled = build(make_run())["resampled"]
    better, empty = resampled["refused"]
    assert (better["reason"].split()[0], better["num"]) == ("another", 6)
    assert (empty["reason"], empty["num"]) == ("empty response", 2)
    assert resampled["num_judged"] == 2
    (new,) = resampled["pairs"]
    assert (new["chosen_source"], new["rejected_source"]) == ("sampled", "was chosen")
    assert (new["row"], new["margin"]) == (12, 1.5)
    assert new["parent"]["margin"] == -1.4


@pytest.mark.parametrize(("step", "rounded"), [(0.13, 0.2), (0.21, 0.25), (1.0, 1.0), (7.0, 10.0), (2.0e-5, 2.0e-5)])
def test_steps_are_round_numbers(step, rounded):
    assert round_step(step) == pytest.approx(rounded)


def test_access_tokens_stay_out(make_run):
    tables = build(make_run())
    assert "hf_secret" not in json.dumps(tables)
    assert tables["provenance"]["config"]["loss"] == "ropo"


def test_a_summary_with_little_in_it_is_enough(make_run):
    run = make_run()
    tables = build(run | {"summary": {}, "training_log": []})
    assert tables["estimate"]["is_informative"] is False
    assert tables["weight_curve"] is None
    assert tables["rounds"] == []


def test_held_out_margins_are_shown_where_the_ledger_has_them(make_audit):
    tables = build(make_audit())
    assert tables["margins"]["is_held_out"]
    assert tables["margins"]["share_negative"] == 0.2  # those of the policy are all positive
    assert tables["suspects"][0]["margin"] == -3.1
    assert tables["dropped"]["rows"][0]["margin"] == -3.1


def test_a_ledger_whose_held_out_margins_are_null_shows_the_policy(make_audit):
    run = make_audit()
    empty = with_column(run["ledger"], "held_out_margin", [None] * 20)
    tables = build(run | {"ledger": empty})
    assert not tables["margins"]["is_held_out"]
    assert tables["margins"]["share_negative"] == 0
    assert tables["suspects"][0]["margin"] == pytest.approx(5.9)


def test_a_pair_without_a_held_out_margin_is_counted_and_not_drawn(make_audit):
    run = make_audit()
    values = run["ledger"]["held_out_margin"].to_pylist()
    margins = build(run | {"ledger": with_column(run["ledger"], "held_out_margin", [None, *values[1:]])})["margins"]
    assert (margins["num_pairs"], margins["num_not_finite"]) == (19, 1)


def test_pairs_with_a_verdict_are_not_offered_for_reading_again(make_audit):
    pairs = [replace(pair, verdict="wrong") if pair.row == 7 else pair for pair in build_pairs(make_audit)]
    tables = build(make_audit(pairs))
    assert tables["counts"]["num_judged"] == 1
    assert tables["review"]["num_likely"] == 3
    assert 7 not in [pair["row"] for pair in tables["suspects"]]


def build_pairs(make_audit):
    return make_audit()["pairs"]


def test_calibration_bins_get_wilson_intervals(make_audit):
    calibration = build(make_audit())["calibration"]
    # p = 1/2 of 100: 0.5 ± 1.6449·√(¼/100 + 1.6449²/4·10⁴)/(1 + 1.6449²/100) = 0.5 ± 0.0812
    assert (calibration["bins"][1]["low"], calibration["bins"][1]["high"]) == (
        pytest.approx(0.4188, abs=1e-4),
        pytest.approx(0.5812, abs=1e-4),
    )
    assert (calibration["recall"], calibration["precision"], calibration["num_injected"]) == (0.9, 0.7, 10)
    assert (calibration["recall_range"], calibration["precision_range"]) == ([0.8, 0.95], [0.55, 0.9])
    assert build(make_audit(summary={"calibration": None}))["calibration"] is None


def test_hard_pairs_are_kept_low_on_average_and_agreed_with_at_some_check(make_audit):
    hard = build(make_audit())["hard"]
    assert [(pair["row"], pair["is_learned_late"]) for pair in hard] == [(9, False), (1, False)]  # means −0.6 and −0.17
    models = [{"name": "models", "agreement": 0.7, "low": 0.6, "high": 0.8, "is_taken": True}]
    hard = build(make_audit(summary={"scorers": models}))["hard"]
    assert [(pair["row"], pair["is_learned_late"]) for pair in hard] == [(9, True), (1, False)]
    assert hard[0]["checks"] == [-1.5, -0.5, 0.2]
    assert not {pair["row"] for pair in hard} & {3, 7, 12, 18}, "suspects are not hard pairs"


@pytest.mark.parametrize(
    ("checks", "is_hard"),
    [
        ([-1.0, -1.0, 0.5], True),  # mean −0.5, sd 0.71
        ([-1.0, -1.0, -0.9], False),  # contradicted at every check
        ([-0.1, -0.1, -2.8], False),  # mean + sd > 0, but never agreed with
        ([-2.0, -2.0, 0.1], False),  # mean + sd = −1.3 + 0.99 < 0: contradicted on the whole
        ([0.9, 0.8, 0.9], False),  # neither below 0 nor in the lowest tenth
    ],
)
def test_what_makes_a_pair_hard(make_audit, checks, is_hard):
    run = make_audit()
    hard = build(run | {"checks": run["checks"] | {0: checks}})["hard"]
    assert (0 in [pair["row"] for pair in hard]) == is_hard


def test_of_labels_that_all_look_right_the_lowest_tenth_is_hard(make_audit):
    run = make_audit(checks={row: [1.0 + row, 1.0 + row, 1.0 + row] for row in range(20)})
    assert [pair["row"] for pair in build(run)["hard"]] == [0, 1]


def test_a_hard_pair_is_more_likely_right_than_wrong(make_audit):
    run = make_audit()
    p_flip = [0.6 if row == 9 else p for row, p in enumerate(run["ledger"]["p_flip"].to_pylist())]
    assert [pair["row"] for pair in build(run | {"ledger": with_column(run["ledger"], "p_flip", p_flip)})["hard"]] == [
        1
    ]


@pytest.mark.parametrize(
    "change",
    [
        {"checks": {}},
        {"checks": None},
        {"checks": {row: [0.1] for row in range(20)}},
        {"summary": {"is_informative": False}},
    ],
)
def test_without_checks_or_signal_no_pair_is_called_hard(make_audit, change):
    assert build(make_audit(**change))["hard"] == []


def test_annotators_beyond_the_interval_of_all_and_beyond_one_half_are_told(make_audit):
    rows = build(make_audit())["annotators"]["rows"]
    assert [(row["name"], row["is_worse"], row["is_opposite"]) for row in rows] == [
        ("a3", True, True),
        ("a2", True, False),
        ("a1", False, False),
    ]


def test_many_annotators_are_counted_and_the_first_shown(make_audit):
    many = [{"name": str(i), "num_pairs": 5, "rate": 0.2, "low": 0.1, "high": 0.3} for i in range(NUM_ANNOTATORS + 7)]
    annotators = build(make_audit(summary={"annotators": many}))["annotators"]
    assert (annotators["num"], len(annotators["rows"])) == (NUM_ANNOTATORS + 7, NUM_ANNOTATORS)


def test_without_signal_nothing_is_said_about_annotators(make_audit):
    assert build(make_audit(summary={"is_informative": False}))["annotators"]["rows"] == []


def test_biases_tell_kept_pairs_from_the_others(make_audit):
    """All chosen are longer, save in rows that 3 divides, and in row 3 itself (a conversation)."""
    length = build(make_audit())["biases"]["features"][0]
    assert length["name"] == "length in characters"
    assert (length["all"]["num_pairs"], length["all"]["share"]) == (20, 13 / 20)
    assert (length["not_kept"]["num_pairs"], length["not_kept"]["share"]) == (4, 0.25)
    assert length["kept"]["num_pairs"] == 16


def test_token_lengths_are_passed_on_and_may_be_absent(make_audit, make_run):
    assert build(make_audit())["token_lengths"]["suggested"] == 1500
    assert build(make_run())["token_lengths"] is None
