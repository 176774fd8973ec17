"""Whatever the file type and the layout, the same data gives the same pairs; a bad row is reported with its place."""

import csv
import gzip
import json
import os
from dataclasses import replace
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ropo.data.load import FORMATS, load_pairs
from ropo.data.validate import validate_pairs
from ropo.pairs import Pair, said

SHARED = Path(os.environ.get("ROPO_SHARED_DATA", Path(__file__).parents[4] / "shared" / "data"))
HH = SHARED / "hh_harmless_base_test.jsonl.gz"

TEXT_ROWS = [
    {"prompt": "Größe?", "chosen": ' groß,\r\n"sehr"', "rejected": " klein\u2028", "annotator": "ann", "weight": 0.5},
    {"prompt": "2 + 2 =", "chosen": " 4", "rejected": "", "annotator": "7", "weight": 2.0},
    {"prompt": "", "chosen": "a\x85b 🙂", "rejected": "c", "annotator": None, "weight": 1e-3},
]


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


MESSAGE_ROWS = [
    {"prompt": [{"role": "system", "content": "Be kind."}, user("Hi")], "chosen": [assistant("Hi!")], "rejected": []},
    {"prompt": [user("Ho")], "chosen": [assistant("A"), user("B"), assistant("C")], "rejected": [assistant("No")]},
    {"prompt": [user("Hu") | {"name": "ann"}], "chosen": [assistant("x")], "rejected": [assistant("y")]},
]


def write_jsonl(path, rows):
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def write_json(path, rows):
    data = json.dumps(rows, indent=2).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def write_csv(path, rows):
    with path.open("w", newline="", encoding="utf-8-sig") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_parquet(path, rows):
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def write_folder(path, rows):
    datasets.Dataset.from_list(rows).save_to_disk(str(path))
    return path


def write_split_folder(path, rows):
    data = {"train": datasets.Dataset.from_list(rows), "test": datasets.Dataset.from_list(rows[:1])}
    datasets.DatasetDict(data).save_to_disk(str(path))
    return path


WRITERS = {
    "a.jsonl": write_jsonl,
    "a.jsonl.gz": write_jsonl,
    "a.json": write_json,
    "a.json.gz": write_json,
    "lines.json": write_jsonl,
    "a.parquet": write_parquet,
    "folder": write_folder,
    "splits": write_split_folder,
    "a.csv": write_csv,
}


def only_problem(source, **options):
    loaded = load_pairs(source, **options)
    assert len(loaded.problems) == 1, loaded.problems
    return loaded.problems[0]


def row(**changes):
    return {"prompt": "p", "chosen": "c", "rejected": "r"} | changes


@pytest.mark.parametrize("name", WRITERS)
def test_every_file_type_gives_the_same_pairs_and_hash(tmp_path, name):
    for rows in (TEXT_ROWS, MESSAGE_ROWS):
        if name == "a.csv" and rows is MESSAGE_ROWS:
            continue  # CSV has no lists
        expected = load_pairs(rows)
        source = WRITERS[name](tmp_path / f"{len(rows[0])}-{name}", rows)
        for given in (source, str(source)):
            loaded = load_pairs(given)
            assert loaded.pairs == expected.pairs
            assert loaded.sha256 == expected.sha256
            assert loaded.problems == expected.problems == []
            assert loaded.num_rows == 3


def test_rows_in_memory_give_the_same_pairs_and_hash():
    for rows in (TEXT_ROWS, MESSAGE_ROWS):
        expected = load_pairs(rows)
        assert load_pairs(datasets.Dataset.from_list(rows)).sha256 == expected.sha256
        again = load_pairs(expected.pairs)
        assert again.pairs == expected.pairs
        assert again.sha256 == expected.sha256


def test_pairs_in_memory_keep_row_and_origin():
    plain = Pair(prompt="p", chosen="c", rejected="r", row=17, annotator="ann", weight=0.25)
    resampled, judged = replace(plain, origin="resampled"), replace(plain, verdict="wrong")
    for pair in (plain, resampled, judged):
        assert load_pairs([pair]).pairs == [pair]
    assert len({load_pairs([pair]).sha256 for pair in (plain, resampled, judged)}) == 3


def test_names_of_columns_that_cannot_be_printed_are_escaped():
    loaded = load_pairs([{"prompt": "p", "chosen": "c", "x\ud800\x1b": "r"}])
    assert loaded.problems[0].message.endswith(r" prompt, chosen, x\ud800\x1b.")


def test_a_selection_of_a_dataset_is_read_as_selected():
    dataset = datasets.Dataset.from_list([row(prompt=str(i)) for i in range(5)]).select([3, 1])
    assert [pair.prompt for pair in load_pairs(dataset).pairs] == ["3", "1"]


@pytest.mark.parametrize(
    "change",
    [{"prompt": "q"}, {"chosen": "d"}, {"rejected": "s"}, {"annotator": "ann"}, {"weight": 0.5}],
    ids=lambda change: next(iter(change)),
)
def test_the_hash_depends_on_every_field(change):
    assert load_pairs([row()]).sha256 != load_pairs([row(**change)]).sha256


def test_the_hash_depends_on_order_and_not_on_ignored_columns():
    first, second = row(prompt="1"), row(prompt="2")
    assert load_pairs([first, second]).sha256 != load_pairs([second, first]).sha256
    assert load_pairs([first]).sha256 == load_pairs([first | {"source": "x"}]).sha256


def test_annotator_weight_and_other_columns():
    loaded = load_pairs([row(annotator=3, weight="0.5", score=1), row(annotator="", weight=2, id="x"), row(weight=0)])
    assert [(pair.annotator, pair.weight) for pair in loaded.pairs] == [("3", 0.5), (None, 2.0), (None, 0.0)]
    assert loaded.ignored_columns == ("id", "score")


@pytest.mark.parametrize("weights", [(0.5, None, 2.0), (None, 3.0, "")], ids=["one has none", "one has one"])
def test_all_rows_have_a_weight_or_none_has(weights):
    """The first row decides; 1 may be far off the scale of the others."""
    loaded = load_pairs([row(prompt=str(i), weight=weight) for i, weight in enumerate(weights)])
    assert [(problem.kind, problem.row) for problem in loaded.problems] == [("bad_weight", 1)]
    assert [pair.row for pair in loaded.pairs] == [0, 2]


def test_a_named_column_must_be_there():
    rows = [{"question": "a", "chosen": "b", "rejected": "c", "who": "d"}]
    with pytest.raises(ValueError, match=r"annotator .*got 'whom'"):
        load_pairs(rows, columns={"prompt": "question", "annotator": "whom"})
    with pytest.raises(ValueError, match=r"got 'qestion' .*chosen, question, rej"):
        load_pairs(rows, columns={"prompt": "qestion"})


def test_annotators_as_pandas_writes_them(tmp_path):
    """Integers with gaps become floats, and the gaps NaN."""
    rows = {"prompt": ["a", "b"], "chosen": ["c", "d"], "rejected": ["e", "f"], "annotator": [7.0, float("nan")]}
    pq.write_table(pa.table(rows), tmp_path / "a.parquet")
    assert [pair.annotator for pair in load_pairs(tmp_path / "a.parquet").pairs] == ["7", None]


def test_columns_renames():
    loaded = load_pairs(
        [{"question": "p", "chosen": "c", "rejected": "r", "prompt": "no"}], columns={"prompt": "question"}
    )
    assert loaded.pairs[0].prompt == "p"
    assert loaded.ignored_columns == ("prompt",)
    with pytest.raises(ValueError, match=r"columns .*prompt, .*'better'"):
        load_pairs([row()], columns={"better": "chosen"})


HELLO = [user("Hi"), assistant("Hello")]
LAYOUTS = {
    "text": ("text", row(), ("p", "c", "r")),
    "messages": (
        "messages",
        {"prompt": [user("Hi")], "chosen": [assistant("a")], "rejected": [assistant("b")]},
        ([user("Hi")], [assistant("a")], [assistant("b")]),
    ),
    "responses repeat the prompt": (
        "messages",
        {"prompt": [user("Hi")], "chosen": [user("Hi"), assistant("a")], "rejected": [user("Hi"), assistant("b")]},
        ([user("Hi")], [assistant("a")], [assistant("b")]),
    ),
    "prompt text, whole conversations": (
        "text_and_messages",
        {"prompt": "Hi", "chosen": [user("Hi"), assistant("a")], "rejected": [user("Hi"), assistant("b")]},
        ([user("Hi")], [assistant("a")], [assistant("b")]),
    ),
    "prompt text, lone answers": (
        "text_and_messages",
        {"prompt": "Hi", "chosen": [assistant("a")], "rejected": [assistant("b")]},
        ([user("Hi")], [assistant("a")], [assistant("b")]),
    ),
    "two conversations": (
        "implicit_messages",
        {"chosen": [*HELLO, user("?"), assistant("a")], "rejected": [*HELLO, user("?"), assistant("b")]},
        ([*HELLO, user("?")], [assistant("a")], [assistant("b")]),
    ),
    "they part before the last turn": (
        "implicit_messages",
        {"chosen": [user("Hi"), assistant("a"), user("?"), assistant("b")], "rejected": [user("Hi"), assistant("c")]},
        ([user("Hi")], [assistant("a"), user("?"), assistant("b")], [assistant("c")]),
    ),
    "one begins with the other": (
        "implicit_messages",
        {"chosen": HELLO, "rejected": [*HELLO, user("?"), assistant("b")]},
        ([user("Hi")], [assistant("Hello")], [assistant("Hello"), user("?"), assistant("b")]),
    ),
    "equal conversations": (
        "implicit_messages",
        {"chosen": HELLO, "rejected": HELLO},
        ([user("Hi")], [assistant("Hello")], [assistant("Hello")]),
    ),
    "transcripts": (
        "transcripts",
        {"chosen": "\n\nHuman: Hi\n\nAssistant: The sky", "rejected": "\n\nHuman: Hi\n\nAssistant: The sky is blue"},
        ("\n\nHuman: Hi\n\nAssistant:", " The sky", " The sky is blue"),
    ),
    "transcripts without white space before": (
        "transcripts",
        {"chosen": "Human: Hi\n\nAssistant: a", "rejected": "Human: Hi\n\nAssistant: b"},
        ("Human: Hi\n\nAssistant:", " a", " b"),
    ),
    "transcripts after a shared head": (
        "transcripts",
        {"chosen": "Be kind.\n\nHuman: Hi\n\nAssistant: a", "rejected": "Be kind.\n\nHuman: Hi\n\nAssistant: b"},
        ("Be kind.\n\nHuman: Hi\n\nAssistant:", " a", " b"),
    ),
    "transcripts of several turns": (
        "transcripts",
        {
            "chosen": "\n\nHuman: 1\n\nAssistant: 2\n\nHuman: 3\n\nAssistant: 4",
            "rejected": "\n\nHuman: 1\n\nAssistant: 2\n\nHuman: 3\n\nAssistant:",
        },
        ("\n\nHuman: 1\n\nAssistant: 2\n\nHuman: 3\n\nAssistant:", " 4", ""),
    ),
    "transcripts that part early": (
        "transcripts",
        {
            "chosen": "\n\nHuman: 1\n\nAssistant: 2\n\nHuman: 3\n\nAssistant: 4",
            "rejected": "\n\nHuman: 1\n\nAssistant: 5",
        },
        ("\n\nHuman: 1\n\nAssistant:", " 2\n\nHuman: 3\n\nAssistant: 4", " 5"),
    ),
    "one transcript begins with the other": (
        "transcripts",
        {
            "chosen": "\n\nHuman: 1\n\nAssistant: 2",
            "rejected": "\n\nHuman: 1\n\nAssistant: 2\n\nHuman: 3\n\nAssistant: 4",
        },
        ("\n\nHuman: 1\n\nAssistant:", " 2", " 2\n\nHuman: 3\n\nAssistant: 4"),
    ),
    "equal transcripts": (
        "transcripts",
        {"chosen": "\n\nHuman: 1\n\nAssistant: 2", "rejected": "\n\nHuman: 1\n\nAssistant: 2"},
        ("\n\nHuman: 1\n\nAssistant:", " 2", " 2"),
    ),
}


def test_every_layout_has_a_case():
    assert {layout for layout, _, _ in LAYOUTS.values()} == set(FORMATS)


@pytest.mark.parametrize("case", LAYOUTS)
def test_layout(case):
    layout, given, texts = LAYOUTS[case]
    loaded = load_pairs([given])
    assert loaded.problems == []
    assert loaded.format == layout
    pair = loaded.pairs[0]
    assert (pair.prompt, pair.chosen, pair.rejected) == texts


BAD_ROWS = {
    "not an object": ("not_an_object", [1, 2], "a row needs named fields; got list [1, 2]"),
    "no responses": (
        "missing_field",
        {"prompt": "p", "completion": "x"},
        "needs chosen and rejected; got prompt, completion",
    ),
    "null response": ("missing_field", row(rejected=None), "needs rejected; got prompt, chosen"),
    "null prompt": ("missing_field", row(prompt=None), "needs prompt"),
    "number": ("wrong_type", row(chosen=3), "chosen needs text or a list of messages; got int 3"),
    "strings in a list": ("wrong_type", row(chosen=["a"]), "message 0 of chosen needs role and content"),
    "foreign messages": (
        "wrong_type",
        row(chosen=[{"from": "robot", "value": "a"}]),
        "message 0 of chosen needs from to be one of human, user, gpt, assistant, system; got str 'robot'",
    ),
    "list as text": ("wrong_type", row(chosen="[{'role': 'assistant', 'content': 'a'}]"), "a list written as text"),
    "message as text": ("wrong_type", row(chosen='{"from": "gpt", "value": "a"}'), "a list written as text"),
    "ShareGPT as text": ("wrong_type", row(chosen='[{"value": "a", "from": "gpt"}]'), "a list written as text"),
    "text and messages": ("wrong_type", row(chosen=[assistant("a")]), "chosen: messages, rejected: text"),
    "another layout": (
        "mixed_formats",
        row(prompt=[user("p")], chosen=[], rejected=[]),
        "layout text of the rows before; got messages",
    ),
    "annotator": ("wrong_type", row(annotator=["x"]), "annotator needs a name or an integer"),
    "annotator is a boolean": ("wrong_type", row(annotator=True), "annotator needs"),
    "negative weight": ("bad_weight", row(weight=-1), "got int -1"),
    "endless weight": ("bad_weight", row(weight=float("inf")), "got float inf"),
    "weight is no number": ("bad_weight", row(weight=float("nan")), "finite"),
    "weight is a word": ("bad_weight", row(weight="much"), "got str 'much'"),
    "weight is a boolean": ("bad_weight", row(weight=True), "got bool True"),
    "weight is too large for a float": ("bad_weight", row(weight=10**400), "got int 1000"),
    "half a character": (
        "not_utf8",
        row(chosen="abc\ud83d"),
        'UTF-8 text; got something else after str \'[1, "p", "abc\'',
    ),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_is_reported_and_does_not_stop_the_others(case):
    kind, bad, message = BAD_ROWS[case]
    loaded = load_pairs([row(), bad, row(prompt="q")])
    assert [(problem.kind, problem.row, problem.line) for problem in loaded.problems] == [(kind, 1, None)]
    assert message in loaded.problems[0].message
    assert [(pair.row, pair.prompt) for pair in loaded.pairs] == [(0, "p"), (2, "q")]
    assert loaded.num_rows == 3


BAD_MESSAGES = {
    "responds as user": ("wrong_type", row(prompt=[user("p")], chosen=[user("a")], rejected=[assistant("b")])),
    "not JSON": (
        "wrong_type",
        row(prompt=[user("p") | {"x": {1, 2}}], chosen=[assistant("a")], rejected=[assistant("b")]),
    ),
    "prompt of another row": (
        "no_shared_prompt",
        row(chosen=[user("q"), assistant("a")], rejected=[user("q"), assistant("b")]),
    ),
    "other questions": (
        "no_shared_prompt",
        {"chosen": [user("1"), assistant("a")], "rejected": [user("2"), assistant("b")]},
    ),
    "another question instead of an answer": (
        "no_shared_prompt",
        {"chosen": [user("1"), assistant("a")], "rejected": [user("1"), user("2"), assistant("b")]},
    ),
    "only one answers": ("no_shared_prompt", {"chosen": [user("1")], "rejected": [user("1"), assistant("b")]}),
    "nothing": ("no_shared_prompt", {"chosen": [], "rejected": [user("1"), assistant("b")]}),
    "plain text without prompt": ("no_shared_prompt", {"chosen": "The sky", "rejected": "The sky is blue"}),
    "transcripts of other questions": (
        "no_shared_prompt",
        {"chosen": "\n\nHuman: 1\n\nAssistant: a", "rejected": "\n\nHuman: 2\n\nAssistant: b"},
    ),
    "transcripts that part in a later question": (
        "no_shared_prompt",
        {
            "chosen": "\n\nHuman: 1\n\nAssistant: a\n\nHuman: 2\n\nAssistant: b",
            "rejected": "\n\nHuman: 1\n\nAssistant: a\n\nHuman: 3\n\nAssistant: b",
        },
    ),
    "a transcript and something else": (
        "no_shared_prompt",
        {"chosen": "\n\nHuman: 1\n\nAssistant: a", "rejected": "something else"},
    ),
}


@pytest.mark.parametrize("case", BAD_MESSAGES)
def test_conversations_that_make_no_pair(case):
    kind, bad = BAD_MESSAGES[case]
    problem = only_problem([bad])
    assert (problem.kind, problem.row) == (kind, 0)


def test_text_without_prompt_and_without_turns_is_told_what_is_missing():
    assert "needs a prompt" in only_problem([{"chosen": "The sky", "rejected": "The sky is"}]).message


def test_the_layout_is_that_of_the_first_good_row():
    loaded = load_pairs([{"chosen": "a", "rejected": "b"}, row(), {"chosen": [], "rejected": []}])
    assert loaded.format == "text"
    assert [(problem.kind, problem.row) for problem in loaded.problems] == [
        ("no_shared_prompt", 0),
        ("missing_field", 2),
    ]


def good_line(prompt):
    return json.dumps(row(prompt=prompt)).encode() + b"\n"


def test_lines_of_a_text_file_are_counted_from_1_and_rows_from_0(tmp_path):
    path = tmp_path / "a.jsonl"
    deep = b"[" * 100_000 + b"\n"
    broken = [
        b"\n",
        b"{'chosen'\n",
        b'"text"\n',
        b'{"prompt": "\xe9t\xe9", "chosen": "a", "rejected": "b"}\n',
        b"\xff\n",
        deep,
    ]
    path.write_bytes(b"\xef\xbb\xbf" + good_line("p") + b"".join(broken) + good_line("q"))
    loaded = load_pairs(path)
    assert [(problem.kind, problem.row, problem.line) for problem in loaded.problems] == [
        ("not_json", 1, 3),
        ("not_an_object", 2, 4),
        ("not_utf8", 3, 5),
        ("not_utf8", 4, 6),
        ("not_json", 5, 7),
    ]
    assert [(pair.row, pair.prompt) for pair in loaded.pairs] == [(0, "p"), (6, "q")]
    assert loaded.num_rows == 7


def test_a_list_in_a_json_file_is_read_object_by_object(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(f"\n[\n{json.dumps(row())},\n\n[1]\n,\n {json.dumps(row(prompt='q'), indent=1)}]\n")
    loaded = load_pairs(path)
    assert [(problem.kind, problem.row, problem.line) for problem in loaded.problems] == [("not_an_object", 1, 5)]
    assert [pair.row for pair in loaded.pairs] == [0, 2]


@pytest.mark.parametrize(
    ("ending", "line"),
    [(b"", 1), (b",\n{]", 2), (b",\n]", 2), (b"\n{}]", 2), (b"]\nmore", 1)],
    ids=["not closed", "broken object", "comma too many", "comma missing", "text after the end"],
)
def test_a_list_that_breaks_keeps_what_came_before(tmp_path, ending, line):
    path = tmp_path / "a.json"
    path.write_bytes(b"[" + json.dumps(row()).encode() + ending)
    loaded = load_pairs(path)
    assert [(problem.kind, problem.row, problem.line) for problem in loaded.problems] == [("unread", 1, line)]
    assert len(loaded.pairs) == 1


def test_lines_of_a_csv_file(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'prompt,chosen,rejected\n"two\nlines",c,r\n\nq,c\nq,c,\xe9\nq,c,r,s\nx,c,r\nq,c,"r\n')
    loaded = load_pairs(path)
    assert [(problem.kind, problem.row, problem.line) for problem in loaded.problems] == [
        ("not_csv", 1, 5),
        ("not_utf8", 2, 6),
        ("not_csv", 3, 7),
        ("unread", 5, 9),
    ]
    assert [(pair.row, pair.prompt) for pair in loaded.pairs] == [(0, "two\nlines"), (4, "x")]


def test_a_csv_field_may_be_long(tmp_path):
    path = write_csv(tmp_path / "a.csv", [row(chosen="x" * 200_000)])
    assert len(load_pairs(path).pairs[0].chosen) == 200_000


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "list.json"])
def test_a_file_without_rows(tmp_path, name):
    path = tmp_path / name
    path.write_text("[ ]" if name == "list.json" else "\n")
    problem = only_problem(path)
    assert (problem.kind, problem.row, problem.line) == ("empty_file", None, None)
    assert load_pairs(path).format == ""


@pytest.fixture
def no_hub(monkeypatch):
    asked = []

    def load_dataset(name, **options):
        asked.append((name, options))
        return datasets.Dataset.from_list([row()])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


@pytest.mark.parametrize(
    "source", ["data.jsonl", "a/b.parquet", "./pairs", "/no/where", "~/x", "a/b/c", "notes.txt", Path("x")]
)
def test_a_missing_file_is_not_looked_up_on_the_hub(no_hub, source):
    with pytest.raises(FileNotFoundError, match="file not found"):
        load_pairs(source)
    assert no_hub == []


@pytest.mark.parametrize("name", ["Anthropic/hh-rlhf", "argilla/OpenHermes2.5-dpo", "squad"])
def test_a_name_is_looked_up_on_the_hub_and_runs_no_code(no_hub, name):
    assert len(load_pairs(name, split="test").pairs) == 1
    assert no_hub == [(name, {"split": "test"})]


@pytest.mark.parametrize(
    "failure", [ConnectionError, ValueError, RuntimeError, datasets.exceptions.DatasetNotFoundError]
)
def test_a_failure_of_the_hub_names_what_was_asked(monkeypatch, failure):
    def load_dataset(name, **options):
        raise failure("because")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match="'some/name', split 'test'"):
        load_pairs("some/name", split="test")


def test_split_chooses_a_part_of_a_folder(tmp_path):
    folder = write_split_folder(tmp_path / "d", [row(), row(prompt="q")])
    assert load_pairs(folder).num_rows == 2
    assert load_pairs(folder, split="test").num_rows == 1
    with pytest.raises(ValueError, match=r"train, test; got 'validation'"):
        load_pairs(folder, split="validation")


def test_split_is_refused_where_there_are_no_parts(tmp_path):
    sources = [write_jsonl(tmp_path / "a.jsonl", [row()]), write_folder(tmp_path / "d", [row()]), [row()]]
    for source in sources:
        with pytest.raises(ValueError, match="split needs a source"):
            load_pairs(source, split="test")


def test_a_folder_of_something_else_is_refused(tmp_path):
    with pytest.raises(ValueError, match="datasets' save_to_disk"):
        load_pairs(tmp_path)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("cut.jsonl.gz", gzip.compress(good_line("p") * 1000)[:-20]),
        ("plain.jsonl.gz", good_line("p")),
        ("a.parquet", b"PAR1 and no more"),
    ],
)
def test_a_damaged_file_is_refused_with_its_name(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=f"its end; got .*{name}"):
        load_pairs(tmp_path / name)


def test_an_unknown_file_type_is_refused(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("x")
    with pytest.raises(ValueError, match=r"\.jsonl, \.json, .*got a\.txt"):
        load_pairs(path)


def test_other_objects_are_refused():
    for source in ({"train": [row()]}, 3, iter([row()])):
        with pytest.raises(TypeError):
            load_pairs(source)


@pytest.mark.skipif(not HH.exists(), reason="the human preference data is not part of the project")
def test_real_transcripts():
    loaded = load_pairs(HH)
    assert (loaded.num_rows, len(loaded.pairs), loaded.problems, loaded.format) == (2312, 2312, [], "transcripts")
    with gzip.open(HH, "rt", encoding="utf-8") as stream:
        rows = [json.loads(line) for line in stream]
    for given, pair in zip(rows, loaded.pairs, strict=True):
        assert pair.prompt + pair.chosen == given["chosen"]
        assert pair.prompt + pair.rejected == given["rejected"]
        assert pair.prompt.endswith("\n\nAssistant:")
    assert [(problem.kind, problem.row) for problem in validate_pairs(loaded.pairs)] == [
        ("empty_response", 86),
        ("empty_response", 516),
        ("empty_response", 925),
        ("empty_response", 1103),
    ]


CALL = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}


@pytest.mark.parametrize("content", [{"content": None}, {"content": ""}, {}], ids=["null", "empty", "none"])
def test_a_message_that_calls_a_tool_needs_no_text(content):
    """The API of OpenAI writes null; such a turn says something, as a turn of a prompt and as a response."""
    calling = {"role": "assistant", **content, "tool_calls": [CALL]}
    told = {"role": "tool", "content": "sunny"}
    rows = [
        {"prompt": [user("rain?"), calling, told], "chosen": [assistant("No.")], "rejected": [assistant("Yes.")]},
        {"prompt": [user("rain?")], "chosen": [calling], "rejected": [assistant("Yes.")]},
    ]
    loaded = load_pairs(rows)
    assert not loaded.problems
    assert not validate_pairs(loaded.pairs)
    assert loaded.pairs[1].chosen == [{"role": "assistant", "content": "", "tool_calls": [CALL]}]
    assert said(loaded.pairs[1].chosen[0]) == json.dumps({"tool_calls": [CALL]})


def test_a_message_without_text_and_calls_is_refused():
    rows = [
        {"prompt": [user("rain?")], "chosen": [{"role": "assistant", "content": None}], "rejected": [assistant("a")]}
    ]
    assert [problem.kind for problem in load_pairs(rows).problems] == ["wrong_type"]
    rows[0]["chosen"] = [{"role": "assistant", "content": None, "tool_calls": []}]
    assert [problem.kind for problem in load_pairs(rows).problems] == ["wrong_type"]
