"""What is known of labels before anything is trained: review decisions and trusted pairs, and that they agree."""

import json

import pytest

from ropo.config import ROPOConfig
from ropo.data.load import load_pairs
from ropo.pairs import pair_id
from ropo.run.align import run_audit
from ropo.run.inputs import ReviewInputs
from ropo.run.known_labels import Known, known_labels

ROWS = [{"prompt": f"p{i}", "chosen": "good", "rejected": "bad"} for i in range(20)]


def turned(row):
    return row | {"chosen": row["rejected"], "rejected": row["chosen"]}


def write_table(path, *verdicts):
    lines = [f"{row},{pair_id(f'p{row}', 'good', 'bad')},{verdict}\n" for row, verdict in verdicts]
    path.write_text("row,pair_id,verdict\n" + "".join(lines))
    return path


def test_trusted_pairs_that_the_data_holds_settle_its_labels(caplog):
    """They are not trained on twice, and a label that they contradict is known to be wrong."""
    pairs = load_pairs(ROWS).pairs
    trusted = [ROWS[3], turned(ROWS[5]), ROWS[3] | {"prompt": "another"}]
    with caplog.at_level("INFO"):
        known = known_labels(pairs, ReviewInputs(trusted=trusted))
    assert {row: verdict for row, (_, verdict) in known.verdicts.items()} == {3: "right", 5: "wrong"}
    assert known.vouched == {3, 5}
    assert [(pair.prompt, pair.origin) for pair in known.trusted] == [("another", "trusted")]
    assert known.trusted_sha256 == load_pairs(trusted).sha256
    assert any(said.endswith(" settle: 1 right, 1 wrong.") for said in caplog.messages)
    assert known_labels(pairs, ReviewInputs()) == Known()


def test_two_sources_of_verdicts_must_agree(tmp_path):
    pairs = load_pairs(ROWS).pairs
    table = write_table(tmp_path / "review.csv", (3, "right"), (4, "drop"))
    known = known_labels(pairs, ReviewInputs(trusted=[ROWS[3], ROWS[5]], decisions=table))
    assert (set(known.verdicts), known.vouched) == ({3, 4, 5}, {3, 5})
    with pytest.raises(ValueError, match=r"Row 3 .*--decisions .*--trusted"):
        known_labels(pairs, ReviewInputs(trusted=[turned(ROWS[3])], decisions=table))


def test_a_table_of_other_data_is_named_beside_trusted_pairs(audit, tmp_path):
    """And no contradiction, since it is about another pair."""
    table = tmp_path / "review.csv"
    table.write_text(f"row,pair_id,verdict\n3,{pair_id('another', 'good', 'bad')},right\n")
    with pytest.raises(ValueError, match=r"verdict on row 3 is about pair .*made from"):
        audit(trusted=[ROWS[3], ROWS[5]], decisions=table)


@pytest.fixture
def audit(tmp_path):
    """An audit that is refused before the model is looked for."""

    def run(**given):
        args = ROPOConfig(output_dir=str(tmp_path / "O"), use_cpu=True, num_folds=2)
        return run_audit(tmp_path / "no model", ROWS, args, review=ReviewInputs(**given))

    return run


def test_the_data_itself_is_not_trusted(audit, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    with pytest.raises(ValueError, match="got all 20 pairs"):
        audit(trusted=path)
    with pytest.raises(ValueError, match="rows 0 and 1 contradict"):
        audit(trusted=[ROWS[0], turned(ROWS[0])])


def test_where_all_labels_are_judged_there_is_no_audit(audit, tmp_path):
    """It is told before the model is looked for, and what to do with the verdicts."""
    table = write_table(tmp_path / "review.csv", *((row, "right") for row in range(20)))
    with pytest.raises(ValueError, match=r"whose label nobody has judged; got none. .*--loss dpo --rho 0"):
        audit(decisions=table)


def test_a_verdict_on_a_row_that_is_not_there(audit, tmp_path):
    table = write_table(tmp_path / "review.csv", (3, "right"), (20, "wrong"), (99, "drop"))
    with pytest.raises(ValueError, match=r"got 2 .* row 20"):
        audit(decisions=table)
    assert not (tmp_path / "O").exists()
