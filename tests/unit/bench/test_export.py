"""Questions of other projects are read or refused, and answers stand where and as the projects read them.

The fixtures have the fields of the real files, at the commits that `ropo.evaluate.export` names, and texts of our own.
"""

import json
import re

import pytest

from ropo.data.validate import DataError
from ropo.evaluate.export import EXPORTS, Answer, read_questions, write_answers
from ropo.evaluate.options import ExportArguments

QUESTIONS = {
    "alpaca_eval": [
        {"instruction": "Name a river.", "output": "The Elbe.", "generator": "reference", "dataset": "helpful_base"},
        {"instruction": "Add 1\nand 2.", "output": "3", "generator": "reference", "dataset": "koala"},
    ],
    "mt_bench": [
        {"question_id": 81, "category": "writing", "turns": ["Write a line.", "Now in capitals."]},
        {"question_id": 101, "category": "math", "turns": ["2 + 2 = ?", "Double it."], "reference": ["4", "8"]},
    ],
    "arena_hard": [
        {"uid": "2edbb5f36f5b42be", "category": "hard_prompt", "subcategory": "coding", "prompt": "Sort a list."},
        {"uid": "328c149ed45a41c0b9d6f14659e63599", "category": "arena-hard-v0.1", "cluster": "x", "prompt": "Hum."},
    ],
    "arena_hard_2024": [
        {"question_id": "328c", "category": "arena-hard-v0.1", "cluster": "x", "turns": [{"content": "Hum a tune."}]}
    ],
}
EXPECTED = {
    "alpaca_eval": [
        {"dataset": "helpful_base", "instruction": "Name a river.", "output": "said 0", "generator": "m"},
        {"dataset": "koala", "instruction": "Add 1\nand 2.", "output": "said 0", "generator": "m"},
    ],
    "mt_bench": [
        {"question_id": n, "answer_id": str, "model_id": "m",
         "choices": [{"index": 0, "turns": ["said 0", "said 1"]}],
         "tstamp": 1.5}
        for n in (81, 101)
    ],
    "arena_hard": [
        {"uid": row["uid"], "ans_id": str, "model": "m",
         "messages": [{"role": "user", "content": row["prompt"]},
                      {"role": "assistant", "content": {"answer": "said 0"}}],
         "tstamp": 1.5}
        for row in QUESTIONS["arena_hard"]
    ],
    "arena_hard_2024": [
        {"question_id": "328c", "answer_id": str, "model_id": "m",
         "choices": [{"index": 0, "turns": [{"content": "said 0", "token_len": 7}]}],
         "tstamp": 1.5}
    ],
}  # fmt: skip
ROUGH = 'quote " back\\slash\ttab\r\nline\u2028separator\x85 \x00 emoji 🦊 ключ {{braces}} </s>'


def written(path, rows):
    text = json.dumps(rows) if path.suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return path


def answered(questions, text=None):
    return [
        Answer(
            question=one,
            turns=tuple(text or f"said {turn}" for turn in range(len(one.turns))),
            num_tokens=(7,) * len(one.turns),
        )
        for one in questions
    ]


def read_back(path):
    """As the projects do: one JSON value, or one for every line that Python's file object gives."""
    with path.open(encoding="ascii") as file:
        return json.load(file) if path.suffix == ".json" else [json.loads(line) for line in file]


def ending(benchmark):
    return ".json" if benchmark == "alpaca_eval" else ".jsonl"


def test_every_format_has_its_rows_here():
    assert set(QUESTIONS) == set(EXPECTED) == set(EXPORTS)


@pytest.mark.parametrize("benchmark", EXPORTS)
def test_rows_are_those_of_the_project(benchmark, tmp_path):
    questions = read_questions(written(tmp_path / f"q{ending(benchmark)}", QUESTIONS[benchmark]), benchmark)
    path = tmp_path / EXPORTS[benchmark].file.format(name="m")
    assert path.suffix == ending(benchmark)
    write_answers(path, answered(questions), benchmark, name="m", written=1.5)
    rows = read_back(path)
    assert [list(row) for row in rows] == [list(row) for row in EXPECTED[benchmark]]  # the order of fields, too
    ids = set()
    for row, expected in zip(rows, EXPECTED[benchmark], strict=True):
        for name, value in expected.items():
            if value is str:
                assert re.fullmatch(r"[0-9a-f]{22}", row[name])
                ids.add(row[name])
            else:
                assert row[name] == value
    assert len(ids) == (0 if benchmark == "alpaca_eval" else len(rows))


@pytest.mark.parametrize("benchmark", EXPORTS)
def test_any_text_comes_back_as_it_was(benchmark, tmp_path):
    questions = read_questions(written(tmp_path / f"q{ending(benchmark)}", QUESTIONS[benchmark]), benchmark)
    path = tmp_path / EXPORTS[benchmark].file.format(name="m")
    write_answers(path, answered(questions, ROUGH), benchmark, name="m", written=1.5)
    rows = read_back(path)
    assert len(rows) == len(questions)
    said = {
        "alpaca_eval": lambda row: row["output"],
        "mt_bench": lambda row: row["choices"][0]["turns"][-1],
        "arena_hard": lambda row: row["messages"][-1]["content"]["answer"],
        "arena_hard_2024": lambda row: row["choices"][0]["turns"][0]["content"],
    }[benchmark]
    assert {said(row) for row in rows} == {ROUGH}


def test_answer_ids_follow_from_what_is_in_them(tmp_path):
    questions = read_questions(written(tmp_path / "q.jsonl", QUESTIONS["mt_bench"]), "mt_bench")
    row, told = EXPORTS["mt_bench"].row, answered(questions)
    assert row(told[0], "m", 1.0)["answer_id"] == row(told[0], "m", 2.0)["answer_id"]
    others = [row(told[1], "m", 1.0), row(told[0], "n", 1.0), row(answered(questions, "x")[0], "m", 1.0)]
    assert len({row(told[0], "m", 1.0)["answer_id"], *(one["answer_id"] for one in others)}) == 4


def test_dataset_is_left_out_where_there_is_none(tmp_path):
    [question] = read_questions(written(tmp_path / "q.json", [{"instruction": "Hi"}]), "alpaca_eval")
    assert EXPORTS["alpaca_eval"].row(answered([question])[0], "m", 0.0) == {
        "instruction": "Hi", "output": "said 0", "generator": "m",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("benchmark", "rows", "said"),
    [
        ("alpaca_eval", [{"instruction": "a"}, {"prompt": "b"}], "row 1 (line 1): alpaca_eval needs a text in "
         "`instruction`; got fields prompt."),
        ("alpaca_eval", [{"instruction": " "}], "row 0 (line 1): alpaca_eval needs a text in `instruction`; got str"),
        ("alpaca_eval", [{"instruction": "a"}, {"instruction": "a"}], "row 1 (line 1): alpaca_eval needs a question"),
        ("alpaca_eval", [{"instruction": "a", "input": "b"}], "an instruction without `input`"),
        ("alpaca_eval", ["a"], "a row needs to be an object; got str 'a'"),
        ("alpaca_eval", [{"instruction": "a \ud83e"}], "text that is UTF-8"),
        ("alpaca_eval", [], "needs at least one question; got none. Get alpaca_eval.json"),
        ("alpaca_eval", QUESTIONS["mt_bench"], "It is a question of mt_bench"),
        ("arena_hard", QUESTIONS["arena_hard_2024"], "It is a question of arena_hard_2024"),
        ("mt_bench", QUESTIONS["arena_hard"], "row 0 (line 1): mt_bench needs a list of texts in `turns`; got"),
        ("mt_bench", [*QUESTIONS["mt_bench"], {"question_id": 5, "turns": ["a", 3]}], "row 2 (line 3): mt_bench needs"),
        ("mt_bench", [{"turns": ["a"]}], "an id in `question_id`; got NoneType"),
        ("arena_hard", [{"uid": "", "prompt": "a"}], "an id in `uid`; got str ''"),
    ],
)  # fmt: skip
def test_other_rows_are_refused(benchmark, rows, said, tmp_path):
    path = tmp_path / f"q{ending(benchmark)}"
    written(path, rows)
    with pytest.raises(DataError, match=re.escape(said)) as caught:
        read_questions(path, benchmark)
    assert str(path) in str(caught.value)


def test_broken_lines_and_missing_files(tmp_path):
    path = tmp_path / "question.jsonl"
    path.write_text(json.dumps(QUESTIONS["mt_bench"][0]) + "\n{half a row")
    with pytest.raises(DataError, match=re.escape(f"{path}, row 1 (line 2): a line needs JSON")):
        read_questions(path, "mt_bench")
    with pytest.raises(FileNotFoundError, match=r"not there\..*fastchat/llm_judge/data/mt_bench/question.jsonl"):
        read_questions(tmp_path / "nowhere.jsonl", "mt_bench")
    with pytest.raises(ValueError, match=re.escape("--questions needs a .json or .jsonl file")):
        read_questions(written(tmp_path / "q.txt", []), "mt_bench")


def test_temperatures_are_those_of_the_project_unless_given(tmp_path):
    rows = [
        {"question_id": n, "category": category, "turns": ["a"]}
        for n, category in enumerate(["writing", "math", "stem", "unheard of"])
    ]
    questions = read_questions(written(tmp_path / "q.jsonl", rows), "mt_bench")
    assert [EXPORTS["mt_bench"].temperature_of(one, None) for one in questions] == [0.7, 0.0, 0.1, 0.7]
    assert [EXPORTS["mt_bench"].temperature_of(one, 0.0) for one in questions] == [0.0] * 4


GIVEN = {"model_name_or_path": "org/m-7b", "benchmark": "mt_bench", "questions": "q.jsonl", "output_dir": "o"}


def test_options_are_filled_in(tmp_path):
    args = ExportArguments(**GIVEN)
    assert (args.name, args.max_new_tokens, args.generation_engine) == ("m-7b", 1024, "transformers")
    assert ExportArguments(**{**GIVEN, "model_name_or_path": str(tmp_path) + "/"}).name == tmp_path.name


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"questions": None}, "--questions is missing. Usage: ropo export"),
        ({"benchmark": "mtbench"}, "benchmark needs one of alpaca_eval, mt_bench, arena_hard, arena_hard_2024; got "
         "'mtbench'. Did you mean mt_bench?"),
        ({"name": "a/b"}, "name needs letters, digits"),
        ({"name": ".."}, "name needs letters, digits"),
        ({"temperature": -1.0}, "temperature needs 0 or more; got -1.0"),
        ({"top_p": 0.0}, "top_p needs a number in (0, 1]; got 0.0"),
        ({"max_new_tokens": 0}, "max_new_tokens needs 1 or more; got 0"),
        ({"dtype": "float16"}, "dtype needs one of auto, float32, bfloat16"),
        ({"generation_engine": "vllm", "dtype": "float32"}, "vllm needs dtype auto or bfloat16"),
        ({"generation_engine": "server"}, "server needs generation_url and generation_model"),
        ({"generation_url": "http://localhost:1/v1"}, "generation_url needs generation_engine server"),
        ({"generation_engine": "server", "generation_url": "http://localhost:1/v1", "generation_model": "m",
          "dtype": "bfloat16"}, "server needs dtype auto"),
    ],
)  # fmt: skip
def test_misuse_is_refused(more, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        ExportArguments(**{**GIVEN, **more})
