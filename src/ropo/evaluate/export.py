"""The files of AlpacaEval, MT-Bench and Arena-Hard: their questions read, answers written as they read them.

In: a file of questions that the user has fetched from one of these projects; what a model has answered. Out:
`Question`s, and the file of answers that the project judges. Nothing is downloaded and nobody is asked here.

The one idea: a format is two functions, from a row of theirs to a question and from an answer to a row of theirs, and
the table says where the file belongs and how the project samples by default.

Add a format: these two functions, one line in `EXPORTS`, one row in `tests/unit/bench/test_export.py`.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ropo.data.problems import BadRow, short
from ropo.data.read import read_rows
from ropo.data.validate import DataError
from ropo.provenance import Json, file_kind, hash_value, write_aside

_ID_DIGITS = 22  # as long as the ids that FastChat and Arena-Hard draw by lot


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What a model is asked.

    Attributes:
        id: Its name in the project's file; a number in MT-Bench, the instruction itself in AlpacaEval.
        turns: What the user says. Each turn but the first follows the model's answer to the one before.
        category: As the project calls it; None where it has none.
        dataset: Where AlpacaEval has it from; None where it is not said.
    """

    id: str | int
    turns: tuple[str, ...]
    category: str | None = None
    dataset: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a model has said to a question.

    Attributes:
        question: The question.
        turns: One answer to each of its turns.
        num_tokens: Tokens of each answer, counted by the model's own tokenizer.
    """

    question: Question
    turns: tuple[str, ...]
    num_tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportSpec:
    """A format of questions and answers.

    Attributes:
        question: Reads a row; raises ValueError with what it needs and what it got.
        row: Writes the row of an answer of the model with some name; the last argument is the time, in seconds.
        file: Where the project looks for the answers, `{name}` being the model's. A list if it ends in .json, else
            one object per line.
        source: Where the user gets the questions.
        max_new_tokens: Longest answer, as the project has it by default.
        temperature: Likewise; 0 takes the likeliest token.
        temperatures: By category, where the project tells them apart.
    """

    question: Callable[[Mapping[str, Any]], Question]
    row: Callable[[Answer, str, float], Json]
    file: str
    source: str
    max_new_tokens: int
    temperature: float
    temperatures: Mapping[str, float] = field(default_factory=dict)

    def temperature_of(self, question: Question, given: float | None) -> float:
        """Sampling temperature of a question: as given, else the project's."""
        if given is not None:
            return given
        return self.temperatures.get(str(question.category), self.temperature)


def alpaca_eval_question(row: Mapping[str, Any]) -> Question:
    """A row of `alpaca_eval.json`: instruction, dataset; the reference's output and generator are not looked at."""
    if row.get("input"):
        raise ValueError(f"an instruction without `input`; got {short(row['input'])}. Write it into `instruction`.")
    instruction, dataset = _text(row, "instruction"), row.get("dataset")
    return Question(id=instruction, turns=(instruction,), dataset=None if dataset is None else str(dataset))


def alpaca_eval(answer: Answer, name: str, written: float) -> Json:
    """A row of the `--model_outputs` of `alpaca_eval`.

    Checked against tatsu-lab/alpaca_eval at cd543a1: the files `results/*/model_outputs.json`, and `evaluate` in
    `src/alpaca_eval/main.py`, which joins them with the reference by `instruction` and takes the name of the model from
    `generator`.

    Returns:
        The row; `dataset` is left out where the question has none.
    """
    del written
    dataset = {} if answer.question.dataset is None else {"dataset": answer.question.dataset}
    return {**dataset, "instruction": answer.question.turns[0], "output": answer.turns[0], "generator": name}


def mt_bench_question(row: Mapping[str, Any]) -> Question:
    """A row of FastChat's `question.jsonl`: question_id, category, turns; a reference is for the judge, not for us."""
    turns = row.get("turns")
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) and turn.strip() for turn in turns):
        raise ValueError(f"a list of texts in `turns`; got {short(turns)}.")
    return Question(id=_id(row, "question_id"), turns=tuple(map(encodable, turns)), category=_category(row))


def mt_bench(answer: Answer, name: str, written: float) -> Json:
    """A line of `data/mt_bench/model_answer/<model>.jsonl`.

    Checked against lm-sys/FastChat at 0e6d3e4: `get_model_answers` in `fastchat/llm_judge/gen_model_answer.py` writes
    it, `load_model_answers` and the matches in `fastchat/llm_judge/common.py` read it. The file's name is the model's.
    """
    return {
        "question_id": answer.question.id,
        "answer_id": _answer_id(answer, name),
        "model_id": name,
        "choices": [{"index": 0, "turns": list(answer.turns)}],
        "tstamp": written,
    }


def arena_hard_question(row: Mapping[str, Any]) -> Question:
    """A row of Arena-Hard's `question.jsonl`, of v0.1 and of v2.0: uid, category, prompt."""
    return Question(id=_id(row, "uid"), turns=(_text(row, "prompt"),), category=_category(row))


def arena_hard(answer: Answer, name: str, written: float) -> Json:
    """A line of `data/arena-hard-v2.0/model_answer/<model>.jsonl`, and of v0.1 since April 2025.

    Checked against lmarena/arena-hard-auto at 196f6b8: `get_answer` in `gen_answer.py` writes it, `load_model_answers`
    in `utils/completion.py` and `pairwise_judgment` in `gen_judgment.py` read it. Its `metadata` (tokens as GPT-4o
    counts them, Markdown) is left out, as in its own v0.1 answers: only the style control of `show_result.py` needs it,
    and the project's `utils/add_markdown_info.py` adds it.
    """
    return {
        "uid": answer.question.id,
        "ans_id": _answer_id(answer, name),
        "model": name,
        "messages": [
            {"role": "user", "content": answer.question.turns[0]},
            {"role": "assistant", "content": {"answer": answer.turns[0]}},
        ],
        "tstamp": written,
    }


def arena_hard_2024_question(row: Mapping[str, Any]) -> Question:
    """A row of Arena-Hard's `question.jsonl` before April 2025: question_id, category, turns of `content`."""
    turns = row.get("turns")
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"a list of objects in `turns`; got {short(turns)}.")
    texts = tuple(_text(turn, "content") for turn in turns)
    return Question(id=_id(row, "question_id"), turns=texts, category=_category(row))


def arena_hard_2024(answer: Answer, name: str, written: float) -> Json:
    """A line of `data/arena-hard-v0.1/model_answer/<model>.jsonl` before April 2025, when the paper was evaluated.

    Checked against lmarena/arena-hard-auto at 318ec93: `get_answer` in `gen_answer.py` writes it. Its `token_len`, of
    which `show_result.py` prints a mean, counts tokens of GPT-3.5 there and of the model itself here.
    """
    turns = [{"content": text, "token_len": count} for text, count in zip(answer.turns, answer.num_tokens, strict=True)]
    return {
        "question_id": answer.question.id,
        "answer_id": _answer_id(answer, name),
        "model_id": name,
        "choices": [{"index": 0, "turns": turns}],
        "tstamp": written,
    }


EXPORTS: Mapping[str, ExportSpec] = MappingProxyType(
    {
        "alpaca_eval": ExportSpec(
            question=alpaca_eval_question,
            row=alpaca_eval,
            file="{name}/model_outputs.json",
            source="alpaca_eval.json of https://huggingface.co/datasets/tatsu-lab/alpaca_eval",
            # AlpacaEval has no default of its own; these are those of its entry for zephyr-7b-beta.
            max_new_tokens=2048,
            temperature=0.7,
        ),
        "mt_bench": ExportSpec(
            question=mt_bench_question,
            row=mt_bench,
            file="model_answer/{name}.jsonl",
            source="fastchat/llm_judge/data/mt_bench/question.jsonl of https://github.com/lm-sys/FastChat",
            max_new_tokens=1024,
            temperature=0.7,
            temperatures=MappingProxyType(
                {
                    "writing": 0.7,
                    "roleplay": 0.7,
                    "extraction": 0.0,
                    "math": 0.0,
                    "coding": 0.0,
                    "reasoning": 0.0,
                    "stem": 0.1,
                    "humanities": 0.1,
                }
            ),
        ),
        "arena_hard": ExportSpec(
            question=arena_hard_question,
            row=arena_hard,
            file="model_answer/{name}.jsonl",
            source="data/arena-hard-v2.0/question.jsonl of https://github.com/lmarena/arena-hard-auto",
            max_new_tokens=4096,
            temperature=0.0,
        ),
        "arena_hard_2024": ExportSpec(
            question=arena_hard_2024_question,
            row=arena_hard_2024,
            file="model_answer/{name}.jsonl",
            source="data/arena-hard-v0.1/question.jsonl of https://github.com/lmarena/arena-hard-auto at 318ec93",
            max_new_tokens=4096,
            temperature=0.0,
        ),
    }
)
"""The formats by the name of their benchmark."""


def read_questions(path: Path, benchmark: str) -> list[Question]:
    """Read a project's file of questions.

    Args:
        path: The file.
        benchmark: In EXPORTS.

    Returns:
        The questions in the order of the file.

    Raises:
        FileNotFoundError: If it is not there; says where to get it.
        DataError: If a row is not one of this benchmark, or repeats another's id; names the file and the row.
    """
    spec = EXPORTS[benchmark]
    if not path.is_file():
        raise FileNotFoundError(f"--questions needs a file; {path} is {file_kind(path)}. Get {spec.source}.")
    questions: dict[str | int, Question] = {}
    for where, row in read_objects(path, option="--questions"):
        try:
            question = spec.question(row)
        except ValueError as error:
            raise DataError(f"{where}: {benchmark} needs {error}{_belongs_to(row, benchmark)}") from None
        if question.id in questions:
            raise DataError(
                f"{where}: {benchmark} needs a question once; got {short(question.id)} again. Leave it out."
            )
        questions[question.id] = question
    if not questions:
        raise DataError(f"{path}: {benchmark} needs at least one question; got none. Get {spec.source}.")
    return list(questions.values())


def read_objects(path: Path, *, option: str) -> Iterator[tuple[str, Json]]:
    """Read a .json list or .jsonl lines of objects.

    Args:
        path: A file that is there.
        option: Who asks, for messages.

    Yields:
        Where the row stands, in words, and the row.

    Raises:
        ValueError: If the file has another ending.
        DataError: If a row is no object; names the file and the row.
    """
    if path.suffix not in (".json", ".jsonl"):
        raise ValueError(f"{option} needs a .json or .jsonl file; got {path}. Convert it.")
    for i, (line, row) in enumerate(read_rows(path)):
        where = f"{path}, row {i}" + ("" if line is None else f" (line {line})")
        if isinstance(row, BadRow):
            raise DataError(f"{where}: {row}")
        if not isinstance(row, dict):
            raise DataError(f"{where}: a row needs to be an object; got {short(row)}.")
        yield where, row


def write_answers(path: Path, answers: Sequence[Answer], benchmark: str, *, name: str, written: float) -> None:
    """Write answers as the project reads them, whole or not at all.

    Letters beyond ASCII are escaped: the projects open files in the encoding of the machine they run on.

    Args:
        path: The file; its ending says whether it is a list or lines.
        answers: In the order of the questions.
        benchmark: In EXPORTS.
        name: Of the model.
        written: Time in seconds.
    """
    rows = [EXPORTS[benchmark].row(answer, name, written) for answer in answers]
    if path.suffix == ".json":
        text = json.dumps(rows, indent=2) + "\n"
    else:
        text = "".join(json.dumps(row) + "\n" for row in rows)
    with write_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")


def _belongs_to(row: Mapping[str, Any], benchmark: str) -> str:
    """A sentence that names the benchmark whose question this is, or nothing."""
    for other, spec in EXPORTS.items():
        try:
            spec.question(row)
        except ValueError:
            continue
        return f" It is a question of {other}: give that as --benchmark, or {EXPORTS[benchmark].source}."
    return ""


def _text(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        got = f"fields {', '.join(map(str, row)) or 'none'}" if name not in row else short(value)
        raise ValueError(f"a text in `{name}`; got {got}.")
    return encodable(value)


def encodable(text: str) -> str:
    """The text, if it can be written as UTF-8.

    Raises:
        ValueError: If it cannot; begins with what was needed.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"text that is UTF-8; got {short(text)} with half a character. Mend it.") from None
    return text


def _id(row: Mapping[str, Any], name: str) -> str | int:
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise ValueError(f"an id in `{name}`; got {short(value)}.")
    return value


def _category(row: Mapping[str, Any]) -> str | None:
    category = row.get("category")
    return None if category is None else str(category)


def _answer_id(answer: Answer, name: str) -> str:
    return hash_value([name, answer.question.id, answer.turns])[:_ID_DIGITS]
