import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from ropo.pairs import Pair
from ropo.report.tables import NUM_CURVE_POINTS, NUM_DROPPED_ROWS, build_tables, round_step, wilson_interval

PINNED = Path(__file__).parents[2] / "data" / "report_20.json"


def build(run):
    return build_tables(run["ledger"], run["summary"], run["pairs"], run["training_log"])


def with_column(ledger, name, values):
    index = ledger.column_names.index(name)
    return ledger.set_column(index, name, pa.array(values, ledger.schema.field(name).type))


def test_twenty_pairs_give_the_pinned_dict(make_run):
    """When the change is meant: delete the file, run once to write it anew, and read its difference."""
    tables = build(make_run())
    if not PINNED.exists():
        PINNED.write_text(json.dumps(tables, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        pytest.fail(f"{PINNED.name} was missing and has been written; read it and run again")
    assert tables == json.loads(PINNED.read_text(encoding="utf-8"))


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
    assert (before["rate"], before["num_kept"]) == (0.25, 16)


def test_a_row_without_its_pair_is_refused(make_run):
    run = make_run()
    with pytest.raises(ValueError, match=r"got none for row 19 \(1 missing\)"):
        build(run | {"pairs": [pair for pair in run["pairs"] if pair.row != 19]})


def test_an_empty_ledger_is_refused(make_run):
    run = make_run()
    with pytest.raises(ValueError, match="needs a ledger with an original pair; got none"):
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
    dropped = build(make_run())["dropped"]
    assert [entry["row"] for entry in dropped["rows"]] == [7, 3, 12, 18]
    assert dropped["rows"][0]["prompt"] == "Human: was dish 7 good? Assistant:"


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
    (new,) = resampled["pairs"]
    assert (new["chosen_source"], new["rejected_source"]) == ("sampled", "was chosen")
    assert (new["row"], new["margin"]) == (12, 1.5)
    assert new["parent"]["margin"] == -1.4


def test_lengths_compare_groups_and_ties_count_half(make_run):
    pairs = [Pair(prompt="p", chosen="xxxx", rejected="xxxx" if row == 3 else "xxx", row=row) for row in range(20)]
    lengths = {entry["group"]: entry for entry in build(make_run(pairs))["lengths"]}
    assert list(lengths) == ["all pairs", "kept", "dropped", "flipped"]
    assert lengths["dropped"]["num_pairs"] == 3
    assert lengths["dropped"]["share_chosen_longer"] == pytest.approx(2.5 / 3)
    assert lengths["kept"]["mean_chosen"] == 4
    assert lengths["all pairs"]["share_chosen_longer"] == pytest.approx(19.5 / 20)


def test_wilson_interval_covers():
    """Seen shares of 40 draws cover the true share in 90 % of 4,000 trials; false alarm of these bounds below 1e-9."""
    draws = np.random.default_rng(0).binomial(40, 0.3, size=4000) / 40
    covered = [low <= 0.3 <= high for low, high in (wilson_interval(float(share), 40) for share in draws)]
    assert 0.87 < np.mean(covered) < 0.94


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
