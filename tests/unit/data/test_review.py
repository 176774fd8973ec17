"""A table for a person, and the way back."""

import csv
import io
import os
import re
from dataclasses import replace

import pytest

from ropo.data.review import COLUMNS, read_verdicts, verdicts_of, with_verdicts, write_review
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
    assert rows[2]["chosen"].splitlines() == ['assistant: yes, "well"', "so"]


def test_no_cell_is_a_formula(table):
    for row in rows_of(table):
        assert not any(
            row[name].startswith(("=", "+", "-", "@")) for name in ("annotator", "prompt", "chosen", "rejected")
        )
    assert rows_of(table)[0]["prompt"] == "'=1+1"


@pytest.mark.parametrize(
    "text",
    [
        "=1+1",
        "+1",
        "-1",
        "@x",
        "\uff1d1",
        "\uff0b1",
        "\uff0d1",
        "\uff20x",
        "\ufe66x",
        "\t=1",
        "\r\n=1",
        "\n=1",
        " =1",
        "'=1",
    ],
)
def test_no_cell_begins_like_a_formula(tmp_path, text):
    pair = Pair(prompt=text, chosen="a", rejected="b", row=0)
    write_review(tmp_path / "a.csv", [pair], p_flip={0: None}, margins={0: 0.5}, decisions={0: "keep"})
    assert rows_of(tmp_path / "a.csv")[0]["prompt"] == f"'{text}"  # one off gives the text back, whatever it is


def test_what_hides_in_a_text_is_written_out(tmp_path):
    pair = Pair(prompt="\u200b\0=1", chosen="not \u202edoog\u202c", rejected="caf\u00e9", row=0, annotator="a\u2066b")
    write_review(tmp_path / "a.csv", [pair], p_flip={0: None}, margins={0: 0.5}, decisions={0: "keep"})
    row = rows_of(tmp_path / "a.csv")[0]
    assert [row[name] for name in ("prompt", "chosen", "rejected", "annotator")] == [
        "⟨U+200B⟩⟨U+0000⟩=1", "not ⟨U+202E⟩doog⟨U+202C⟩", "café", "a⟨U+2066⟩b",
    ]  # fmt: skip


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
    verdicts = {99: ("of a row that was left out", "drop")}
    assert with_verdicts(pairs[:1], verdicts)[0].verdict is None
    with pytest.raises(ValueError, match=r"got 1 .* row 99"):
        with_verdicts(pairs[:1], verdicts, is_whole=True)


def test_a_table_with_semicolons(table):
    """As spreadsheets save it where a comma divides decimals."""
    rows = rows_of(table)
    rows[0]["verdict"] = "wrong"
    with table.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, delimiter=";")
        writer.writeheader()
        writer.writerows(rows)
    assert read_verdicts(table)[int(rows[0]["row"])] == (rows[0]["pair_id"], "wrong")


NUMBERS = ("1234567890123456", "12345678e9012345", "0000000000000012")


def as_excel(cell):
    """What a spreadsheet makes of a cell that it takes for a number."""
    return f"{float(cell):.5E}" if re.fullmatch(r"\d{12,}|\d+e\d+", cell) else cell


def as_saved(rows, *, delimiter=",", end="\r\n", quoting=csv.QUOTE_MINIMAL, order=1):
    stream = io.StringIO()
    writer = csv.writer(stream, delimiter=delimiter, lineterminator=end, quoting=quoting)
    writer.writerow([*rows[0], "", ""])  # columns that somebody had looked at
    writer.writerows([[*map(as_excel, row.values()), "", ""] for row in rows[::order]])
    writer.writerow([""] * (len(rows[0]) + 2))
    return stream.getvalue()


def changed(rows, **cells):
    return [row | {name: cell.format(row[name]) for name, cell in cells.items()} for row in rows]


SAVED = {
    "as it is": lambda rows: as_saved(rows).encode(),
    "semicolons and a mark": lambda rows: as_saved(rows, delimiter=";").encode("utf-8-sig"),
    "tabs in UTF-16": lambda rows: as_saved(rows, delimiter="\t").encode("utf-16"),
    "sorted, all in quotes": lambda rows: as_saved(rows, quoting=csv.QUOTE_ALL, order=-1).encode(),
    "the encoding of the machine": lambda rows: as_saved(rows).encode("cp1252", "replace"),
    "unix": lambda rows: as_saved(rows, end="\n").encode(),
    "old Mac": lambda rows: as_saved(rows, end="\r").encode("mac-roman", "replace"),
    "rows as decimals": lambda rows: as_saved(changed(rows, row="{}.0")).encode(),
    "decimals with commas": lambda rows: as_saved(changed(rows, row="{},00"), delimiter=";").encode(),
    "titles in capitals": lambda rows: as_saved([{k.upper(): v for k, v in row.items()} for row in rows]).encode(),
    "apostrophes shown": lambda rows: as_saved(changed(rows, verdict="'{}", pair_id="'{}")).encode(),
    "blanks": lambda rows: as_saved(changed(rows, verdict=" {} ", row=" {}", pair_id="{} ")).encode(),
}  # fmt: skip


@pytest.mark.parametrize("case", SAVED)
def test_a_table_survives_a_spreadsheet(tmp_path, case):
    """Ids that look like numbers, too: they have an apostrophe in front, with which they are text."""
    path = tmp_path / "review.csv"
    pairs = [
        replace(pair, row=10 * row, id=name, verdict=None)
        for row, (pair, name) in enumerate(zip(some_pairs(), NUMBERS, strict=True))
    ] + [Pair(prompt='é, ☃;\t"', chosen="a\r\nb", rejected="c\rd", row=1)]
    known = {pair.row: 0.5 for pair in pairs}
    write_review(path, pairs, p_flip=known, margins=known, decisions=dict.fromkeys(known, "keep"))
    rows = rows_of(path)
    assert [row["pair_id"] for row in rows[:3]] == [f"'{name}" for name in NUMBERS]
    for row, verdict in zip(rows, ("wrong", "right", "", "Drop"), strict=True):
        row["verdict"] = verdict
    path.write_bytes(SAVED[case](rows))
    found = read_verdicts(path)
    assert found == {0: (NUMBERS[0], "wrong"), 10: (NUMBERS[1], "right"), 1: (pairs[3].id, "drop")}
    assert [pair.verdict for pair in with_verdicts(pairs, found, is_whole=True)] == ["wrong", "right", None, "drop"]


def test_an_id_that_became_a_number_is_told(tmp_path):
    """In a table that was written without the apostrophe."""
    pair = Pair(prompt="p", chosen="a", rejected="b", row=0, id=NUMBERS[0])
    (tmp_path / "old.csv").write_text("row,pair_id,verdict\n0,1.23457E+15,wrong\n")
    with pytest.raises(ValueError, match=f"pair 1.23457E.15; .*'{NUMBERS[0]}"):
        with_verdicts([pair], read_verdicts(tmp_path / "old.csv"))
    (tmp_path / "old.csv").write_text(f"row,pair_id,verdict\n0,{NUMBERS[0]},wrong\n")
    assert with_verdicts([pair], read_verdicts(tmp_path / "old.csv"))[0].verdict == "wrong"


def test_trusted_pairs_of_the_data_are_verdicts():
    data = some_pairs()
    turned = replace(data[1], chosen=data[1].rejected, rejected=data[1].chosen)
    assert verdicts_of([data[0], turned], data) == {0: (data[0].id, "right"), 3: (data[1].id, "wrong")}
    assert verdicts_of([Pair(prompt="x", chosen="y", rejected="z", row=0)], data) == {}
    with pytest.raises(ValueError, match="got all 3 pairs"):
        verdicts_of([*data], data)
    with pytest.raises(ValueError, match="rows 3 and 3 contradict"):
        verdicts_of([data[1], turned], data)


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
        (0, {"verdict": "drop", "row": "1.5"}, r"line 3: row needs a number from 0; got str '1.5'"),
    ],
)
def test_what_cannot_be_read_is_named(table, row, fields, message):
    fill(table, row, **fields)
    with pytest.raises(ValueError, match=message):
        read_verdicts(table)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "row,pair_id,verdict\n1,a,right\n2,b,\n1,a,wrong\n",
            "line 4: row 1 needs one verdict; got another one before",
        ),
        ("row,pair_id,verdict,verdict\n1,a,right,\n", "needs columns row, pair_id, verdict; it has 2 named verdict"),
        (
            'row,pair_id,verdict\n1,a,right\n2,"b,wrong\n3,c,wrong\n',
            "after line 2: a table needs to be CSV; got unexpected end",
        ),
        ("", "it has 0 named row"),
    ],
)
def test_a_table_that_would_be_read_in_part_is_refused(tmp_path, text, message):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_verdicts(tmp_path / "a.csv")


def test_a_table_of_other_data_is_noticed(table, tmp_path):
    fill(table, 3, verdict="wrong", pair_id="0123456789abcdef")
    with pytest.raises(ValueError, match=r"row 3 .* pair 0123456789abcdef; "):
        with_verdicts(some_pairs(), read_verdicts(table))
    (tmp_path / "other.csv").write_text("row,verdict\n1,right\n")
    with pytest.raises(ValueError, match=r"row, pair_id, verdict; .*0 named pair_id"):
        read_verdicts(tmp_path / "other.csv")
    with pytest.raises(FileNotFoundError, match="--decisions needs a table"):
        read_verdicts(tmp_path / "nowhere.csv")
    os.mkfifo(tmp_path / "pipe.csv")
    with pytest.raises(FileNotFoundError, match=r"pipe.csv .* \(FIFO\)"):
        read_verdicts(tmp_path / "pipe.csv")
