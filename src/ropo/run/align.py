"""`run_rounds`: from a model and a dataset to an aligned model folder; `run_audit`: to the truth about the dataset.

In: names of a model and a dataset, a `ROPOConfig`. Out: the output folder, whose files are a contract: for both
`ledger.parquet`, `summary.json`, `report.html`, `problems.jsonl`, `audit/`; a Hugging Face model with its card and
`rounds/NN/` from the one, `cleaned.jsonl` and `review.csv` from the other.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ropo.audit import Audit
from ropo.config import ROPOConfig
from ropo.judge.options import make_judge
from ropo.judge.verdicts import Judge
from ropo.run.evaluation import evaluate
from ropo.run.lock import owning
from ropo.run.outputs import publish, publish_audit
from ropo.run.prepare import Prepared, prepare
from ropo.run.rounds import run_all
from ropo.train.options import check_kind

logger = logging.getLogger(__name__)


def run_rounds(
    model: str | Path | PreTrainedModel,
    dataset: Any,
    args: ROPOConfig,
    *,
    processing_class: PreTrainedTokenizerBase | None = None,
    peft_config: PeftConfig | None = None,
    split: str = "train",
    columns: Mapping[str, str] | None = None,
    load_options: Mapping[str, Any] | None = None,
    trusted: Any = None,
    decisions: Path | None = None,
    judge: Judge | None = None,
    eval_dataset: Any = None,
    eval_split: str = "train",
    command: str = "",
) -> dict[str, Any]:
    """Align a model on preference pairs whose labels may be wrong (ROPO, arXiv:2404.04102v2).

    The same call with the same output folder goes on after the last finished stage.

    Args:
        model: Folder or hub id of the initial model, which is also the reference; or a model, which is then saved in
            the output folder first.
        dataset: Anything that `ropo.data.load.load_pairs` reads.
        args: Options.
        processing_class: The tokenizer; loaded from where the model is when not given.
        peft_config: Trains an adapter instead of the whole model.
        split: Of the dataset.
        columns: Names of the dataset's columns where they differ from `prompt`, `chosen`, `rejected`.
        load_options: Passed to `from_pretrained` (dtype, attn_implementation, revision, ...).
        trusted: Pairs whose labels are known to be right, read like `dataset`; 50 to 200 help. For those that the data
            holds, too, they are verdicts on the labels there.
        decisions: A `review.csv` with verdicts of a person, which are obeyed.
        judge: Asked about what the rules cannot settle; default what `args.judge` names. The same in every call.
        eval_dataset: Pairs to score under the model of every round, read like `dataset`. Nothing depends on them, so a
            finished run takes them, too.
        eval_split: Of `eval_dataset`, where it has several.
        command: What the user typed, for the report.

    Returns:
        The summary, as written to `summary.json`.

    Raises:
        DataError: If rows cannot be read and `args.on_bad_rows` is "refuse", or no pair is left.
        ValueError: If the output folder holds something else than this run, or a verdict is about another pair.
    """
    check_kind(args, ROPOConfig, taker="run_rounds")
    if args.audit_from is not None and not args.needs_audit:
        raise ValueError("audit_from needs a run that audits; got num_folds 0, or rho 0 and a given alpha. Drop it.")
    with owning(Path(str(args.output_dir))):
        made = prepare(
            model, dataset, args, processing_class, peft_config, split, columns, load_options, trusted, decisions,
            is_audit=False, eval_dataset=eval_dataset, eval_split=eval_split,
        )  # fmt: skip
        if idle := args.without_effect:
            logger.warning("Nothing is sampled (num_candidates 0), so these do nothing: %s.", ", ".join(idle))
        digest, audit = made.digest, None
        judge = judge or make_judge(args, made.folder / "judge")
        if args.needs_audit:
            audit = _audit_of(made, args, peft_config, judge)
            digest = audit.run(digest)
        rounds = run_all(
            made.data,
            audit,
            args,
            folder=made.folder / "rounds",
            source=made.source,
            tokenizer=made.tokenizer,
            reference_of=made.reference.logps,
            peft_config=peft_config,
            judge=judge,
            digest=digest,
        )
        evaluation = None
        if made.evaluation is not None:
            evaluation = evaluate(
                made.evaluation, rounds, folder=made.folder / "evaluation", reference_of=made.reference.logps
            )
        return publish(rounds, folder=made.folder, read=made.read(command), evaluation=evaluation)


def run_audit(
    model: str | Path | PreTrainedModel,
    dataset: Any,
    args: ROPOConfig,
    *,
    processing_class: PreTrainedTokenizerBase | None = None,
    peft_config: PeftConfig | None = None,
    split: str = "train",
    columns: Mapping[str, str] | None = None,
    load_options: Mapping[str, Any] | None = None,
    trusted: Any = None,
    decisions: Path | None = None,
    judge: Judge | None = None,
    command: str = "",
) -> dict[str, Any]:
    """Find out how many labels are wrong and which, without aligning a model.

    Reads every pair once and trains nothing (`scorer` "models" trains `num_folds` models and keeps none of them). The
    same call with the same output folder goes on where it was stopped; `run_rounds` with the same folder and options
    goes on from the finished audit.

    Args:
        model: As for `run_rounds`.
        dataset: As for `run_rounds`.
        args: Options; those of rounds and resampling do nothing here.
        processing_class: As for `run_rounds`.
        peft_config: As for `run_rounds`.
        split: As for `run_rounds`.
        columns: As for `run_rounds`.
        load_options: As for `run_rounds`.
        trusted: As for `run_rounds`.
        decisions: As for `run_rounds`.
        judge: As for `run_rounds`.
        command: What the user typed, for the report.

    Returns:
        The summary, as written to `summary.json` beside `ledger.parquet`, `report.html`, `cleaned.jsonl` and
        `review.csv`.

    Raises:
        DataError: As for `run_rounds`.
        ValueError: As for `run_rounds`; or if `num_folds` is 0.
    """
    check_kind(args, ROPOConfig, taker="run_audit")
    if not args.num_folds:
        raise ValueError("An audit needs num_folds of 2 or more; got 0. A model cannot judge labels it was trained on.")
    with owning(Path(str(args.output_dir))):
        made = prepare(
            model, dataset, args, processing_class, peft_config, split, columns, load_options, trusted, decisions,
            is_audit=True,
        )  # fmt: skip
        audit = _audit_of(made, args, peft_config, judge or make_judge(args, made.folder / "judge"))
        audit.run(made.digest)
        return publish_audit(audit, folder=made.folder, read=made.read(command))


def _audit_of(made: Prepared, args: ROPOConfig, peft_config: PeftConfig | None, judge: Judge | None) -> Audit:
    return Audit(
        made.data,
        args,
        folder=made.folder / "audit",
        source=made.source,
        tokenizer=made.tokenizer,
        peft_config=peft_config,
        features_of=made.reference.features,
        judge=judge,
    )
