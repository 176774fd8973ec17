"""A benchmark task from a user's own pairs: a judge stands in for the truth.

In: preference pairs, a model, the options of a judge. Out: a `Task`.

The one idea: what is right is what the judge says. Pairs of which it is sure are labelled its way and become the right
labels that noise is planted on; pairs of which it is not are left out. A response is rated by the log-odds that
the judge prefers it to the better response of the pair whose prompt it answers.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import logit

from ropo.data.validate import read_checked
from ropo.judge.options import JUDGES, JudgeOptions, make_judge
from ropo.judge.verdicts import Judge, ask
from ropo.models.source import Model, find_model
from ropo.pairs import Pair, Text
from ropo.provenance import hash_value
from ropo_bench.task import Task, TaskOptions

logger = logging.getLogger(__name__)

MIN_SURE = 0.75  # probability of the better response; below it the judge is taken to be unsure
CLIP = 1e-3  # of probabilities, before they become log-odds
JUDGE_OPTIONS = tuple(one.name for one in fields(JudgeOptions))
LACKS = ("topic", "larger_model")  # kinds of noise: no subject is known, and no reward of a response by itself


def make(folder: Path, options: TaskOptions) -> Task:
    """Make the task of a seed; the judge is asked once about every pair, and its answers are kept in `folder`.

    Args:
        folder: For the judge's answers.
        options: All of them count; `source` is a file or folder of pairs, as `ropo train` takes.

    Returns:
        The task.

    Raises:
        DataError: If rows of the data cannot be read.
        ValueError: If the judge or the model is not one, or the judge is sure of too few pairs.
        EndpointError: If the judge's endpoint fails, unless `judge_on_failure` is "go_on".
    """
    judge = judge_of(options.judge, folder / "judge")
    _check_model(options.model)
    _, pairs, _ = read_checked(str(options.source), on_bad_rows="refuse")
    right = settled(judge, pairs)
    train, held_out = _deal(right, options.num_pairs, options.num_held_out, seed=options.seed, num_read=len(pairs))
    better = {_key(pair.prompt): pair.chosen for pair in [*train, *held_out]}
    return Task(
        name="own",
        model=Path(options.model),
        pairs=train,
        held_out=held_out,
        gold_rewards=lambda prompts, responses: ratings(judge, better, prompts, responses),
        words=(),
        max_length=options.max_length,
        max_new_tokens=options.max_new_tokens,
    )


def judge_of(options: Mapping[str, Any], folder: Path) -> Judge:
    """The judge that options name.

    Raises:
        ValueError: As `judge_args`, or if what the options name is no judge.
    """
    judge = make_judge(judge_args(options), folder)
    assert judge is not None  # noqa: S101 - `judge_args` refuses options that name none
    return judge


def judge_args(options: Mapping[str, Any]) -> JudgeOptions:
    """The options of a judge, checked and filled in; nothing is loaded and nobody is asked.

    An endpoint that fails stops the benchmark by default: what it did not say would otherwise be left out of the truth,
    or be a score of 0, and not for every method the same.

    Raises:
        ValueError: If an option is unknown, missing or ignored, or none names a judge.
    """
    for name in options:
        if name not in JUDGE_OPTIONS:
            raise ValueError(f"judge needs options named {', '.join(JUDGE_OPTIONS)}; got {name}.")
    may_fail = [name for name, spec in JUDGES.items() if "judge_on_failure" in spec.takes]
    stops = {"judge_on_failure": "stop"} if options.get("judge") in may_fail else {}
    args = JudgeOptions(**{**stops, **{name: value for name, value in options.items() if value is not None}})
    if args.judge == "none":
        raise ValueError(f"The task own needs a judge; got none. Set judge to one of {', '.join(JUDGES)}.")
    return args


def _check_model(name_or_path: str) -> None:
    """Refuse what is no model before a judge is paid to read all pairs."""
    try:
        Model(find_model(name_or_path)).skeleton()
    except (OSError, ValueError) as error:
        raise ValueError(f"The task own needs model, the one to align. {error}") from error


def settled(judge: Judge, pairs: Sequence[Pair]) -> list[Pair]:
    """Pairs of which the judge is sure, with the response that it prefers as `chosen`.

    Returns:
        Those with a probability of `MIN_SURE` or more for one of the responses. The others are counted in the log.
    """
    p_right = ask(judge, pairs)
    is_sure = np.maximum(p_right, 1 - p_right) >= MIN_SURE  # not-a-number is not
    relabelled = [
        pair if p > 0.5 else replace(pair, chosen=pair.rejected, rejected=pair.chosen)
        for pair, p, sure in zip(pairs, p_right, is_sure, strict=True)
        if sure
    ]
    logger.info(
        "Of %d pairs the judge is sure of %d and contradicts %d of their labels; the others are left out.",
        len(pairs),
        len(relabelled),
        int((p_right[is_sure] < 0.5).sum()),
    )
    return relabelled


def ratings(
    judge: Judge, better: Mapping[str, Text], prompts: Sequence[Text], responses: Sequence[Text]
) -> list[float]:
    """Log-odds by the judge that each response beats the better one of the pair with its prompt.

    Returns:
        Nats, 0 for the better response itself, not-a-number where the judge cannot tell.
    """
    pairs = []
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        beside = better[_key(prompt)]
        given = response if isinstance(beside, str) or not isinstance(response, str) else _reply(response)
        pairs.append(Pair(prompt=prompt, chosen=given, rejected=beside, row=row))
    differ = [pair for pair in pairs if pair.chosen != pair.rejected]
    p_better = np.clip(ask(judge, differ), CLIP, 1 - CLIP)
    found = np.zeros(len(pairs))
    found[[pair.row for pair in differ]] = logit(p_better)
    return [float(value) for value in found]


def _reply(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def _key(prompt: Text) -> str:
    return hash_value(prompt)


def _deal(
    pairs: Sequence[Pair], num_pairs: int, num_held_out: int, *, seed: int, num_read: int
) -> tuple[list[Pair], list[Pair]]:
    """One pair of each prompt: what is tested on was not trained on, and every prompt has one better response.

    Dealt in the order of a hash: a pair of which the judge became sure later moves hardly any other.
    """
    first: dict[str, Pair] = {}
    for pair in pairs:
        first.setdefault(_key(pair.prompt), pair)
    if len(first) < num_pairs + num_held_out:
        raise ValueError(
            f"The task own needs {num_pairs} pairs to train and {num_held_out} to test on, spare ones among them, each "
            f"with a prompt of its own and a judge that is sure of it; got {len(first)} such among {num_read}. Lower "
            "num_pairs or num_held_out, or give more pairs."
        )
    order = sorted(first, key=lambda prompt: hash_value([seed, prompt]))[: num_pairs + num_held_out]
    numbered = [replace(first[prompt], row=row) for row, prompt in enumerate(order)]
    return numbered[:num_pairs], numbered[num_pairs:]
