"""Reading never stops unseen: what can be read is read, and what cannot is refused with how much that is."""

import gzip
import io
import json
import os
import socket

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ropo.data.load import load_pairs
from ropo.data.read import READERS, HubDataset
from ropo.data.validate import DataError, read_checked
from ropo.provenance import file_kind

HEADER = b"prompt,chosen,rejected\n"


def row(**changes):
    return {"prompt": "p", "chosen": "c", "rejected": "r"} | changes


def line(prompt):
    return json.dumps(row(prompt=prompt)).encode()


def csv_lines(numbers):
    return b"".join(b"q%d,yes,no\n" % number for number in numbers)


def read(path, data):
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return load_pairs(path)


def texts(loaded):
    return [(pair.prompt, pair.chosen, pair.rejected) for pair in loaded.pairs]


def test_a_lone_cr_is_content_where_lines_end_otherwise(tmp_path):
    """pandas quotes a field for the line end it writes, and for no other: 179 of 200 rows vanished behind one CR."""
    rows = [(f"q{i}", "y\rs" if i == 20 else "yes", "no") for i in range(200)]
    frame = pd.DataFrame(rows, columns=["prompt", "chosen", "rejected"])
    for end in ("\n", "\r\n"):
        loaded = read(tmp_path / "a.csv", frame.to_csv(index=False, lineterminator=end).encode())
        assert (texts(loaded), loaded.problems) == (rows, [])


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r", b"\r\r\n"], ids=["unix", "dos", "mac", "dos twice"])
def test_any_line_end_of_a_csv_file(tmp_path, end):
    data = end.join([b"prompt,chosen,rejected", b'1,"a,\rb",c', b'2,"d\ne",f', b"", b'3,"g\r\nh",i', b""])
    for given_data in (data, data.removesuffix(end)):
        loaded = read(tmp_path / "a.csv", given_data)
        assert texts(loaded) == [("1", "a,\rb", "c"), ("2", "d\ne", "f"), ("3", "g\r\nh", "i")]
        assert loaded.problems == []


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(*[st.text("a,\"'\r\n\x00é;")] * 3), min_size=1, max_size=4), st.sampled_from(["\n", "\r\n"]))
def test_what_pandas_writes_is_read_as_it_was(tmp_path_factory, rows, end):
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    frame = pd.DataFrame([("p" + prompt, chosen, rejected + ".") for prompt, chosen, rejected in rows])
    frame.to_csv(path, index=False, header=["prompt", "chosen", "rejected"], lineterminator=end)
    assert texts(load_pairs(path)) == [tuple(one) for one in frame.itertuples(index=False)]


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"], ids=["unix", "dos", "mac"])
def test_any_line_end_of_json_lines(tmp_path, end):
    separator = "\u2028".encode()
    odd = json.dumps(row(prompt="x\u2028y\x85"), ensure_ascii=False).encode()
    loaded = read(tmp_path / "a.jsonl", end.join([line("1"), odd, b"", b"{", line("3")]))
    assert separator in odd
    assert [pair.prompt for pair in loaded.pairs] == ["1", "x\u2028y\x85", "3"]
    assert [(problem.kind, problem.row, problem.line) for problem in loaded.problems] == [("not_json", 2, 4)]


TWO = HEADER + csv_lines([0])
REST = csv_lines(range(2, 100))
LIST = b"[" + line("0") + b",\n"
BROKEN = {
    "a quote that is not closed": ("a.csv", TWO + b'q1,"yes,no\n' + REST, 3, "99 lines"),
    "a quote that is not doubled": ("a.csv", TWO + b'q1,"y"es,no\n' + REST, 3, "99 lines"),
    "two line ends": ("a.csv", TWO + REST.replace(b"\n", b"\r"), 3, "1 lines"),
    "a list that breaks": ("a.json", LIST + b"{'a'},\n" + line("2") + b"]\n", 2, "2 lines, 56 characters"),
    "a list that is cut": ("a.json.gz", LIST + line("2")[:-5], 2, "1 lines"),
    "NaN as a key": ("a.json", LIST + b"{NaN: 1}]", 2, "1 lines"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_cannot_be_read_to_its_end_is_refused_whatever_is_skipped(tmp_path, case):
    name, data, number, lost = BROKEN[case]
    loaded = read(tmp_path / name, data)
    found = loaded.problems[-1]
    assert (found.kind, found.row, found.line, len(loaded.pairs)) == ("unread", 1, number, 1)
    assert lost in found.message
    for on_bad_rows in ("refuse", "skip"):
        with pytest.raises(DataError, match=rf"(?s)Only 1 pairs .*\(line {number}\).*{lost}"):
            read_checked(tmp_path / name, on_bad_rows=on_bad_rows)


def parquet(rows, **options):
    stream = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), stream, **options)
    return stream.getvalue()


def flipped(data, text):
    """One bit of a page is another one, as a bad disk leaves it."""
    place = data.index(text)
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


MANY = [row(prompt=f"prompt {i}", chosen=f"chosen {i}") for i in range(3000)]
DAMAGED = {
    "cut": ("a.jsonl.gz", gzip.compress(b"\n".join(line(str(i)) for i in range(3000)))[:-200]),
    "garbage behind": ("a.jsonl.gz", gzip.compress(line("0")) + b"garbage"),
    "cut parquet": ("a.parquet", parquet(MANY)[:-100]),
    "no dictionary": ("a.parquet", b"PAR1" + b"\0" * 400 + parquet(MANY)[404:]),
    "a flipped bit": (
        "a.parquet",
        flipped(parquet(MANY, compression="none", use_dictionary=False, write_page_checksum=True), b"prompt 2500"),
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_file_says_how_much_was_read(tmp_path, case):
    name, data = DAMAGED[case]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=rf"(?s){name}: .*\d+ rows came before"):
        read_checked(tmp_path / name, on_bad_rows="skip")


def test_members_of_a_compressed_file_are_read_one_after_the_other(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(line("1") + b"\n") + gzip.compress(line("2") + b"\n") + b"\0" * 512)
    assert [pair.prompt for pair in load_pairs(path).pairs] == ["1", "2"]


def test_files_that_were_joined(tmp_path):
    """Each begins with a mark of its own, and tables with their header."""
    mark = b"\xef\xbb\xbf"
    loaded = read(tmp_path / "a.jsonl", mark + line("1") + b"\n" + mark + line("2") + b"\n")
    assert ([pair.prompt for pair in loaded.pairs], loaded.problems) == (["1", "2"], [])
    loaded = read(tmp_path / "a.csv", mark + HEADER + csv_lines([1]) + mark + HEADER + csv_lines([2]))
    assert [pair.prompt for pair in loaded.pairs] == ["q1", "q2"]
    assert [(problem.kind, problem.row, problem.line) for problem in loaded.problems] == [("not_csv", 1, 3)]
    assert "header once more" in loaded.problems[0].message


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.json.gz"])
def test_utf16_is_refused_once(tmp_path, name, encoding):
    text = "prompt,chosen,rejected\nq,yes,no\n" if name == "a.csv" else line("1").decode()
    with pytest.raises(ValueError, match=rf"UTF-8; got .*{name}, .* UTF-16"):
        read(tmp_path / name, text.encode(encoding))


def test_a_key_that_stands_twice_in_an_object(tmp_path):
    twice = b'{"prompt": "p", "chosen": "good", "rejected": "bad", "chosen": "bad"}'
    loaded = read(tmp_path / "a.jsonl", twice + b"\n" + line("2"))
    assert [(problem.kind, problem.row) for problem in loaded.problems] == [("not_json", 0)]
    assert "'chosen' stands twice" in loaded.problems[0].message
    assert read(tmp_path / "a.json", b"[" + line("1") + b"," + twice + b"]").problems[0].kind == "unread"


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999", "9" * 400, "9" * 5000])
def test_numbers_that_are_none(tmp_path, number):
    data = line("1")[:-1] + b', "weight": ' + number.encode() + b"}\n"
    loaded = read(tmp_path / "a.jsonl", data + line("2"))
    assert [problem.row for problem in loaded.problems] == [0]
    assert loaded.problems[0].kind in ("bad_weight", "not_json")
    assert len(loaded.pairs) == 1


def test_a_nan_beside_a_message_does_not_part_two_conversations():
    """It is not equal to itself."""

    def turns(answer):
        texts = {"user": "Hi", "assistant": "Yes?"}
        asked = [{"role": role, "content": text, "score": float("nan")} for role, text in texts.items()]
        return [*asked, {"role": "assistant", "content": answer}]

    pair = load_pairs([{"chosen": turns("a"), "rejected": turns("b")}]).pairs[0]
    assert pair.prompt == [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]


def test_an_object_of_something_else_is_one_problem(tmp_path):
    loaded = read(tmp_path / "a.json", b"\n" + json.dumps({"train": [row()] * 20}, indent=1).encode())
    assert [(problem.kind, problem.row, problem.line) for problem in loaded.problems] == [("missing_field", 0, 2)]
    assert loaded.problems[0].message.endswith("got train.")


def test_holes_in_json_lines_are_counted(tmp_path):
    """As a file system leaves them where the power failed."""
    loaded = read(tmp_path / "a.jsonl", line("1") + b"\n" + b"\0" * 100 + b"\n" + line("3"))
    assert [(problem.kind, problem.row) for problem in loaded.problems] == [("not_json", 1)]


def test_a_quote_too_many_that_swallows_rows_is_told(tmp_path):
    data = HEADER + b'q0,yes,"no\n' + csv_lines(range(1, 9)) + b'q9,yes,no"\n' + csv_lines([10])
    loaded = read(tmp_path / "a.csv", data)
    assert [(problem.kind, problem.row, problem.line) for problem in loaded.problems] == [("swallowed", 0, 2)]
    assert "8 lines that" in loaded.problems[0].message
    assert (loaded.num_rows, [pair.row for pair in loaded.pairs]) == (2, [0, 1])
    assert read(tmp_path / "a.csv", HEADER + b'q0,yes,"no,\nnot, at, all.\nSure, really,\nso."\n').problems == []


def test_two_columns_of_one_name_are_refused(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"prompt,chosen,rejected,chosen,,\np,good,bad,bad,,\n")
    (tmp_path / "a.parquet").write_bytes(b"")
    pq.write_table(
        pa.table([pa.array(["a"])] * 4, names=["prompt", "chosen", "rejected", "chosen"]), tmp_path / "a.parquet"
    )
    for name in ("a.csv", "a.parquet"):
        with pytest.raises(ValueError, match="chosen more than"):
            load_pairs(tmp_path / name)
    loaded = read(tmp_path / "a.csv", b"prompt,chosen,rejected,,\np,good,bad,,\n")  # as spreadsheets save empty columns
    assert texts(loaded) == [("p", "good", "bad")]


@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_a_table_as_spreadsheets_save_it(tmp_path, delimiter):
    header, one = (delimiter.join(cells) for cells in (("prompt", "chosen", "rejected"), ("a, b", "1,5", '"c\nd"')))
    assert texts(read(tmp_path / "a.csv", f"{header}\r\n{one}\r\n".encode())) == [("a, b", "1,5", "c\nd")]


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv.gz", "a.parquet", "a.txt"])
def test_what_has_no_end_is_refused(tmp_path, name):
    path = tmp_path / name
    os.mkfifo(path)
    with pytest.raises(ValueError, match=rf"{name}, a pipe \(FIFO\)"):
        load_pairs(path)
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(ValueError, match=r"got .*, a device"):
        load_pairs(path)


def test_kinds_of_files(tmp_path):
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(tmp_path / "s"))
        assert file_kind(tmp_path / "s") == "a socket"
    assert (file_kind(tmp_path), file_kind(tmp_path / "nowhere")) == ("a folder", "not there")


def test_a_folder_of_shards_is_read_in_order(tmp_path, caplog):
    for number in (2, 0, 1):
        (tmp_path / f"part-{number}.jsonl").write_bytes(line(str(number)) + b"\n")
    (tmp_path / "README.md").write_text("Some shards.")
    (tmp_path / "._part-0.jsonl").write_text("of another system")
    with caplog.at_level("INFO"):
        loaded = load_pairs(tmp_path)
    assert [(pair.row, pair.prompt) for pair in loaded.pairs] == [(0, "0"), (1, "1"), (2, "2")]
    assert "part-0.jsonl, part-1.jsonl, part-2.jsonl" in caplog.text
    (tmp_path / "part-1.jsonl").write_bytes(b"\n{\n")
    problem = load_pairs(str(tmp_path)).problems[0]
    assert (problem.row, problem.line, problem.message[:23]) == (1, None, "part-1.jsonl, line 2: a")
    (tmp_path / "more.csv").write_bytes(HEADER)
    with pytest.raises(ValueError, match=r"kind; .*\.csv and \.jsonl"):
        load_pairs(tmp_path)


def shards(folder, *stems):
    for number, stem in enumerate(stems):
        pq.write_table(pa.Table.from_pylist([row(prompt=str(number))]), folder / f"{stem}.parquet")
    return folder


def test_names_of_shards_tell_their_split(tmp_path):
    shards(tmp_path, "train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001")
    assert [pair.prompt for pair in load_pairs(tmp_path).pairs] == ["0", "1"]
    assert [pair.prompt for pair in load_pairs(tmp_path, split="test").pairs] == ["2"]
    with pytest.raises(ValueError, match=r"'validation' .*test, train\."):
        load_pairs(tmp_path, split="validation")
    (tmp_path / "train-00000-of-00002.parquet").unlink()
    with pytest.raises(ValueError, match="them; got 1 of 2"):
        load_pairs(tmp_path)


def test_shards_of_two_parts_are_never_mixed(tmp_path):
    shards(tmp_path, "train_prefs-00000-of-00001", "train_sft-00000-of-00001")
    with pytest.raises(ValueError, match=r"'train' .*train_prefs, train_sft"):
        load_pairs(tmp_path)
    assert load_pairs(tmp_path, split="train_prefs").num_rows == 1
    shards(tmp_path, "more")
    with pytest.raises(ValueError, match="split, train_prefs, train_sft"):
        load_pairs(tmp_path, split="train_prefs")


def test_shards_of_one_part_with_a_name_of_its_own(tmp_path):
    shards(tmp_path, "data-00000-of-00002", "data-00001-of-00002")
    assert load_pairs(tmp_path).num_rows == 2
    with pytest.raises(ValueError, match="split needs a source"):
        load_pairs(tmp_path, split="test")


def test_a_saved_folder_that_lacks_a_file(tmp_path):
    datasets.Dataset.from_list([row()]).save_to_disk(str(tmp_path / "d"))
    next((tmp_path / "d").glob("*.arrow")).unlink()
    with pytest.raises(ValueError, match="datasets' save_to_disk wrote"):
        load_pairs(tmp_path / "d")


def test_a_dataset_on_the_hub_with_its_configuration(monkeypatch, tmp_path):
    asked = []

    def load_dataset(path, name=None, **options):
        asked.append((path, name, options))
        return datasets.Dataset.from_list([row()])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    load_pairs(HubDataset(name="owner/name", config="prefs", data_dir="data/a"), split="test")
    load_pairs(HubDataset(name="owner/name"))
    assert asked == [
        ("owner/name", "prefs", {"split": "test", "data_dir": "data/a"}),
        ("owner/name", None, {"split": "train"}),
    ]
    for name in (str(tmp_path), "pairs.jsonl"):
        with pytest.raises(ValueError, match="dataset_config and dataset_data_dir"):
            load_pairs(HubDataset(name=name, config="prefs"))


def test_readers_are_those_of_the_page():
    assert list(READERS) == [".jsonl", ".json", ".csv", ".parquet"]
