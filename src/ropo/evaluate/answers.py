"""Let a model answer a benchmark's questions, and write what the benchmark's project reads.

In: `ExportArguments`. Out: the project's file of answers, and in `export/<name>/` beside it what was asked for
(`config.json`) and every finished shard of answers.

The one idea: turn by turn and temperature by temperature, all questions go to an engine together. A shard is kept under
a digest of the prompts, and the prompt of a second turn holds the first answer, so a run that was killed resumes where
it was and ends in the same file.
"""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
from accelerate import PartialState
from transformers import PreTrainedTokenizerBase

from ropo.data.template import date_of
from ropo.data.tokenize import encode_prompts
from ropo.evaluate.export import EXPORTS, Answer, Question, read_questions, write_answers
from ropo.evaluate.options import ExportArguments
from ropo.models.fit import check_ids
from ropo.models.source import Model, find_model
from ropo.pairs import Text
from ropo.processes import meet
from ropo.provenance import Json, read_json, versions, write_json
from ropo.sampling.engine import LIKELIEST, Engine, Sampling
from ropo.sampling.engines import ENGINES, Reach, open_engine
from ropo.sampling.generate import Sample, sample_responses


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """Answers that were written.

    Attributes:
        file: What the benchmark reads.
        num_questions: Number of questions.
        num_answers: Number of answers; a question of several turns has several.
        num_unfinished: Answers cut at `max_new_tokens`.
        num_empty: Answers of nothing but white space.
        mean_chars: Mean length of an answer, characters.
        temperatures: Sampling temperatures, ascending.
    """

    file: Path
    num_questions: int
    num_answers: int
    num_unfinished: int
    num_empty: int
    mean_chars: float
    temperatures: tuple[float, ...]


def export_answers(args: ExportArguments) -> Exported:
    """Answer all questions; rerun the same call to resume it.

    Raises:
        FileNotFoundError: If the questions are not there.
        DataError: If a row is no question of this benchmark.
        ValueError: If the folder holds answers made otherwise, the model's files do not hold the whole of it, or the
            questions need a chat template that the tokenizer does not have.
    """
    spec, name = EXPORTS[str(args.benchmark)], str(args.name)
    PartialState(cpu=args.use_cpu)  # whoever asks later gets this one
    questions = read_questions(Path(str(args.questions)), str(args.benchmark))
    _check_turns(questions, args)
    ENGINES[args.generation_engine].check(PartialState().num_processes)
    model = find_model(str(args.model_name_or_path))
    options = {"dtype": args.dtype, "revision": args.model_revision, "trust_remote_code": args.trust_remote_code}
    source = Model(model, load_options=options)
    tokenizer = source.tokenizer
    _check_template(tokenizer, model, args)
    reach = _reach(args, source)
    if args.generation_engine == "transformers":  # the others read the model themselves
        _check_model(source, questions, args)
    digest = source.fingerprint()
    folder = Path(str(args.output_dir)) / "export" / name
    temperatures = {question.id: spec.temperature_of(question, args.temperature) for question in questions}
    started = _claim(folder, _identity(args, questions, digest, temperatures))
    date_of(tokenizer, datetime.fromtimestamp(int(started)).isoformat())  # also of a run that is resumed tomorrow
    with open_engine(args.generation_engine, reach) as engine:
        samples = _converse(engine, tokenizer, questions, temperatures, args, folder=folder, digest=digest)
    answers = [
        Answer(
            question=question,
            turns=tuple(_kept(sample.text, args) for sample in said),
            num_tokens=tuple(sample.num_tokens for sample in said),
        )
        for question, said in zip(questions, samples, strict=True)
    ]
    path = Path(str(args.output_dir)) / spec.file.format(name=name)
    if PartialState().is_main_process:
        write_answers(path, answers, str(args.benchmark), name=name, written=started)
    meet()
    texts = [text for answer in answers for text in answer.turns]
    return Exported(
        file=path,
        num_questions=len(questions),
        num_answers=len(texts),
        num_unfinished=sum(not sample.is_finished for said in samples for sample in said),
        num_empty=sum(not text.strip() for text in texts),
        mean_chars=float(np.mean([len(text) for text in texts])),
        temperatures=tuple(sorted(set(temperatures.values()))),
    )


def _check_turns(questions: Sequence[Question], args: ExportArguments) -> None:
    """Refuse conversations where there is no chat template to write them with."""
    if args.plain_text and any(len(question.turns) > 1 for question in questions):
        raise ValueError(
            f"plain_text needs questions of one turn; got {args.benchmark} with more. A conversation needs the model's "
            "chat template."
        )


def _check_template(tokenizer: PreTrainedTokenizerBase, model: str, args: ExportArguments) -> None:
    """Refuse a tokenizer that cannot write a conversation."""
    if not args.plain_text and not tokenizer.chat_template:
        raise ValueError(
            f"export needs a tokenizer with a chat template; got {model} without one. Use the instruction-tuned "
            "model's, or --plain_text for a model that was trained on plain text."
        )


def _converse(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    temperatures: Mapping[str | int, float],
    args: ExportArguments,
    *,
    folder: Path,
    digest: str,
) -> list[list[Sample]]:
    """One sample for each turn of each question."""
    answers: list[list[Sample]] = [[] for _ in questions]
    for turn in range(max(len(question.turns) for question in questions)):
        for temperature in sorted(set(temperatures.values())):
            where = [
                i
                for i, question in enumerate(questions)
                if turn < len(question.turns) and temperatures[question.id] == temperature
            ]
            prompts = [_prompt(questions[i], [_kept(sample.text, args) for sample in answers[i]], args) for i in where]
            samples = sample_responses(
                engine,
                tokenizer,
                encode_prompts(prompts, tokenizer),
                Sampling(
                    num_candidates=1,
                    max_new_tokens=int(args.max_new_tokens or 0),
                    temperature=max(temperature, LIKELIEST),  # FastChat, too, draws nothing below it
                    top_p=args.top_p,
                ),
                seed=args.seed,
                folder=folder / f"turn_{turn + 1}",
                model_digest=digest,
                title=f"Turn {turn + 1}, temperature {temperature:g}",
            )
            for i, sample in zip(where, samples, strict=True):
                answers[i].append(sample)
    return answers


def _prompt(question: Question, answers: Sequence[str], args: ExportArguments) -> Text:
    """The conversation so far, up to the turn that is to be answered."""
    if args.plain_text:
        return question.turns[0]
    messages = [{"role": "user", "content": question.turns[0]}]
    for answer, turn in zip(answers, question.turns[1 : len(answers) + 1], strict=True):
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": turn}]
    return messages


def _kept(text: str, args: ExportArguments) -> str:
    """Of an answer in a conversation, what AlpacaEval and FastChat keep: without white space around it."""
    return text if args.plain_text else text.strip()


def _reach(args: ExportArguments, source: Model) -> Reach:
    """Where an engine finds the model; an adapter is loaded beside its base."""
    return Reach(
        tokenizer=source.tokenizer,
        load=source.load,
        folder=source.base[0],
        adapter=source.start,
        load_options=source.base[1],
        use_bf16=args.dtype == "bfloat16",
        url=args.generation_url,
        name=args.generation_model,
        api_key_env=args.generation_api_key_env,
    )


def _check_model(source: Model, questions: Sequence[Question], args: ExportArguments) -> None:
    """Refuse a model whose files do not hold it, or that lacks a token, before anything is asked.

    Raises:
        ValueError: If it is so.
    """
    prompts = encode_prompts([_prompt(question, [], args) for question in questions], source.tokenizer)
    used = ((f"a token of question {number}", ids) for number, ids in enumerate(prompts, 1))
    check_ids(source.skeleton(), source.tokenizer, used, name_or_path=source.name_or_path)


def _identity(
    args: ExportArguments,
    questions: Sequence[Question],
    digest: str,
    temperatures: Mapping[str | int, float],
) -> Json:
    """Everything that changes the answers, as plain values."""
    asked = json.dumps([asdict(question) for question in questions], sort_keys=True)
    return {
        "benchmark": args.benchmark,
        "questions": hashlib.sha256(asked.encode()).hexdigest(),
        "model": digest,
        "temperature": sorted(set(temperatures.values())),
        **{
            name: getattr(args, name)
            for name in (
                "max_new_tokens", "top_p", "seed", "plain_text", "dtype", "generation_engine", "generation_model",
            )
        },
    }  # fmt: skip


def _claim(folder: Path, identity: Json) -> float:
    """Write down what the answers are made of, or refuse a folder of other ones; when they were started, in seconds."""
    path = folder / "config.json"
    if PartialState().is_main_process and not path.exists():
        write_json(path, {"options": identity, "begun": time.time(), "versions": versions()})
    meet()
    known = read_json(path)
    changed = [name for name, value in identity.items() if known["options"].get(name) != value]
    if changed:
        changes = ", ".join(f"{name} ({known['options'].get(name)} before, {identity[name]} now)" for name in changed)
        raise ValueError(
            f"export needs the options that {folder} was started with; got another {changes}. Choose another --name or "
            "--output_dir."
        )
    return float(known["begun"])
