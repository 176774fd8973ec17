"""A table for a person, and the way back."""

import csv

import pytest

from ropo.data.review import COLUMNS, read_verdicts, with_verdicts, write_review
from ropo.pairs import Pair


def some_pairs():
    return [
        Pair(prompt="p", chosen=" a", rejected=" b", row=0),
        Pair(prompt="=1+1", chosen="-c", rejected="@d", row=3, annotator="+x"),
        Pair(
            prompt=[{"role": "user", "content": "hi"}],
            chosen=[{"role": "assistant", "content": 'yes, "well"\nso'}],
            rejected=[{"role": "assistant", "content": "no"}],
            row=7,
            verdict="right",
        ),
    ]


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "review.csv"
    first, *rest = some_pairs()
    assert [first.row, *(pair.row for pair in rest)] == [0, 3, 7]
    write_review(
        path,
        [rest[0], first, rest[1]],
        p_flip={0: 0.2, 3: 0.9, 7: 0.2},
        margins={0: 1.0, 3: -2.0, 7: 1.5},
        decisions={0: "keep", 3: "drop", 7: "keep"},
    )
    return path


def rows_of(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_table_keeps_the_order_that_it_is_given(table):
    rows = rows_of(table)
    assert list(rows[0]) == list(COLUMNS)
    assert [row["row"] for row in rows] == ["3", "0", "7"]
    assert [row["verdict"] for row in rows] == ["", "", "right"]
    assert (rows[0]["p_flip"], rows[0]["margin"]) == ("0.9000", "-2.0000")
    assert rows[2]["chosen"] == 'assistant: yes, "well"\nso'


def test_no_cell_is_a_formula(table):
    for row in rows_of(table):
        assert not any(
            row[name].startswith(("=", "+", "-", "@")) for name in ("annotator", "prompt", "chosen", "rejected")
        )
    assert rows_of(table)[0]["prompt"] == "'=1+1"


def fill(path, place, **fields):
    rows = rows_of(path)
    for one in rows:
        if one["row"] == str(place):
            one |= fields
    with path.open("w", encoding="utf-8-sig", newline="") as file:  # as spreadsheets save it
        writer = csv.DictWriter(file, [*COLUMNS, "note"])
        writer.writeheader()
        writer.writerows(rows)


def test_verdicts_come_back(table):
    fill(table, 3, verdict=" Wrong ")
    pairs = with_verdicts(some_pairs(), read_verdicts(table))
    assert [pair.verdict for pair in pairs] == [None, "wrong", "right"]
    assert with_verdicts(pairs[:1], {99: ("of a row that was left out", "drop")})[0].verdict is None


def test_a_table_with_semicolons(table):
    """As spreadsheets save it where a comma divides decimals."""
    rows = rows_of(table)
    rows[0]["verdict"] = "wrong"
    with table.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, delimiter=";")
        writer.writeheader()
        writer.writerows(rows)
    assert read_verdicts(table)[int(rows[0]["row"])] == (rows[0]["pair_id"], "wrong")


def test_a_long_conversation_is_one_field(tmp_path):
    pair = Pair(prompt="p " * 100_000, chosen="a", rejected="b", row=0, verdict="right")
    write_review(tmp_path / "long.csv", [pair], p_flip={0: None}, margins={0: 0.5}, decisions={0: "keep"})
    assert read_verdicts(tmp_path / "long.csv") == {0: (pair.id, "right")}


@pytest.mark.parametrize(
    ("row", "fields", "message"),
    [
        (
            3,
            {"verdict": "maybe"},
            r"review.csv, line 2: verdict needs one of right, wrong, drop, or nothing; got str 'maybe'",
        ),
        (0, {"verdict": "drop", "row": "one"}, r"line 3: row needs a number from 0; got str 'one'"),
    ],
)
def test_what_cannot_be_read_is_named(table, row, fields, message):
    fill(table, row, **fields)
    with pytest.raises(ValueError, match=message):
        read_verdicts(table)


def test_a_table_of_other_data_is_noticed(table, tmp_path):
    fill(table, 3, verdict="wrong", pair_id="0123456789abcdef")
    with pytest.raises(ValueError, match="verdict on row 3 is about pair 0123456789abcdef; the data holds"):
        with_verdicts(some_pairs(), read_verdicts(table))
    (tmp_path / "other.csv").write_text("row,verdict\n1,right\n")
    with pytest.raises(ValueError, match="lacks pair_id"):
        read_verdicts(tmp_path / "other.csv")
    with pytest.raises(FileNotFoundError, match="--decisions needs a table"):
        read_verdicts(tmp_path / "nowhere.csv")
