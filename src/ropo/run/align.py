"""`run_rounds`: from a model and a dataset to an aligned model; `run_audit`: how many labels are wrong, and which.

In: names of a model and a dataset, a `ROPOConfig`. Out: a `RunResult` or an `AuditResult`, and the output folder, whose
files are a contract: for both `ledger.parquet`, `summary.json`, `report.html`, `problems.jsonl`, `audit/`; a Hugging
Face model with its card and `rounds/NN/` from the one, `cleaned.jsonl` and `review.csv` from the other. `dry_run` says
what either will cost and writes nothing.
"""

import logging
import tempfile
from pathlib import Path
from typing import Any

from peft import PeftConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ropo.audit import Audit
from ropo.audit.weights import Choice, Why, resolve_alpha
from ropo.config import ROPOConfig
from ropo.judge.options import make_judge
from ropo.judge.verdicts import Judge
from ropo.losses import LOSSES
from ropo.models.source import Model
from ropo.processes import on_main
from ropo.run.evaluation import evaluate
from ropo.run.forecast import Plan, forecast_everywhere
from ropo.run.hub import open_repository, upload
from ropo.run.identity import refuse_other_run
from ropo.run.inputs import ReviewInputs
from ropo.run.lock import owning
from ropo.run.outputs import had_evaluation, publish, publish_audit
from ropo.run.prepare import Given, Prepared, check, prepare, tell_problems
from ropo.run.result import AuditResult, RunResult
from ropo.run.rounds import run_all
from ropo.run.setup import Setup
from ropo.train.options import check_kind

logger = logging.getLogger(__name__)


def run_rounds(
    model: str | Path | PreTrainedModel | Model,
    dataset: Any,
    args: ROPOConfig,
    *,
    peft_config: PeftConfig | None = None,
    processing_class: PreTrainedTokenizerBase | None = None,
    eval_dataset: Any = None,
    review: ReviewInputs | None = None,
    judge: Judge | None = None,
) -> RunResult:
    """Align a model on preference pairs whose labels may be wrong (ROPO, arXiv:2404.04102v2).

    Rerun the same call to resume after the last finished stage.

    Args:
        model: Folder or hub id of the initial model, which is also the reference; a `Model`, which says how it is
            loaded; or a `transformers` model, which is then saved in the output folder first.
        dataset: Anything that `ropo.data.load.load_pairs` reads, or a `DataSource`, which also names split and columns.
        args: Options.
        peft_config: Trains an adapter instead of the whole model.
        processing_class: The tokenizer; loaded from where the model is when not given.
        eval_dataset: Pairs to score under the model of every round, given like `dataset`. Nothing depends on them, so a
            finished run takes them, too.
        review: What people have said about labels.
        judge: Asked about new pairs that the selection rule cannot settle; default what `args.judge` names. The same in
            every call.

    Returns:
        What the output folder holds.

    Raises:
        DataError: If rows cannot be read and `args.on_bad_rows` is "refuse", or no pair is left.
        ValueError: If the output folder holds something else than this run, or a review decision is about another pair.
        UploadError: If `push_to_hub` is asked for and the hub does not take the model.
    """
    _check_kind(args, is_audit=False)
    given = Given(
        model=model, dataset=dataset, peft_config=peft_config, processing_class=processing_class, review=review,
        eval_dataset=eval_dataset,
    )  # fmt: skip
    with owning(Path(str(args.output_dir)), cache=args.reference_cache_dir):
        made = prepare(given, args, is_audit=False)
        if idle := args.without_effect:
            logger.warning("Nothing is sampled (num_candidates 0), so these do nothing: %s.", ", ".join(idle))
        digest, audit = made.digest, None
        repository = open_repository(args)
        judge = judge or make_judge(args, made.folder / "judge")
        if args.needs_audit:
            audit = _audit_of(made, args)
            digest = audit.run(digest)
        rounds = run_all(made.data, _setup(made, args, audit, judge), digest=digest)
        found = None
        if made.evaluation is not None:
            found = evaluate(made.evaluation, rounds, folder=made.folder / "evaluation")
        elif had_evaluation(made.folder):
            logger.warning("The results leave out the evaluation that they had: eval_dataset brings it back.")
        publish(rounds, made, found)
        upload(repository, args, rounds)
        return RunResult.load(made.folder)


def run_audit(
    model: str | Path | PreTrainedModel | Model,
    dataset: Any,
    args: ROPOConfig,
    *,
    peft_config: PeftConfig | None = None,
    processing_class: PreTrainedTokenizerBase | None = None,
    review: ReviewInputs | None = None,
) -> AuditResult:
    """Find out how many labels are wrong and which, without aligning a model.

    Reads every pair once and trains nothing (`scorer` "models" trains `num_folds` models and keeps none of them). The
    same call resumes where it was stopped; `run_rounds` with the same folder and options continues from the finished
    audit.

    Args:
        model: As for `run_rounds`.
        dataset: As for `run_rounds`.
        args: Options; those of rounds and resampling do nothing here.
        peft_config: As for `run_rounds`.
        processing_class: As for `run_rounds`.
        review: As for `run_rounds`.

    Returns:
        What the output folder holds: `summary.json`, `ledger.parquet`, `report.html`, `cleaned.jsonl` and `review.csv`.

    Raises:
        DataError: As for `run_rounds`.
        ValueError: As for `run_rounds`; or if `num_folds` is 0.
    """
    _check_kind(args, is_audit=True)
    given = Given(
        model=model, dataset=dataset, peft_config=peft_config, processing_class=processing_class, review=review
    )
    if args.push_to_hub:
        raise ValueError("push_to_hub needs a model; got an audit, which makes none. Leave it out.")
    with owning(Path(str(args.output_dir)), cache=args.reference_cache_dir):
        made = prepare(given, args, is_audit=True)
        audit = _audit_of(made, args)
        audit.run(made.digest)
        publish_audit(audit, made)
        return AuditResult.load(made.folder)


def dry_run(
    model: str | Path | PreTrainedModel | Model,
    dataset: Any,
    args: ROPOConfig,
    *,
    is_audit: bool = False,
    peft_config: PeftConfig | None = None,
    processing_class: PreTrainedTokenizerBase | None = None,
    **others: Any,
) -> Plan:
    """Check what a run checks before it starts, and forecast what it will cost; nothing is written to `output_dir`.

    Args:
        model: As for `run_rounds`.
        dataset: As for `run_rounds`.
        args: Options.
        is_audit: Of `run_audit` instead of `run_rounds`.
        peft_config: As for `run_rounds`.
        processing_class: As for `run_rounds`.
        **others: `eval_dataset` and `review`, as for `run_rounds`.

    Returns:
        The plan, the same in every process.

    Raises:
        DataError: As for `run_rounds`.
        ValueError: As for `run_rounds`; or if the model cannot be forecast.
    """
    _check_kind(args, is_audit=is_audit)
    given = Given(
        model=model, dataset=dataset, peft_config=peft_config, processing_class=processing_class,
        **{"review": None, **others},
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as own:
        scratch = on_main(lambda: own)  # where the main process saves a model object, for all to load
        checked = check(given, args, is_audit=is_audit, scratch=Path(scratch))
        refuse_other_run(Path(str(args.output_dir)), checked.identity)
        tell_problems(checked.problems)
        return forecast_everywhere(checked.model, checked.skeleton, checked.tokens, args, is_audit=is_audit)


def _check_kind(args: ROPOConfig, *, is_audit: bool) -> None:
    """Refuse options that ask for what the run has not.

    Raises:
        TypeError: If they are those of another trainer.
        ValueError: If an audit has no folds, or a run reads margins that it does not use.
    """
    check_kind(args, ROPOConfig, taker="run_audit" if is_audit else "run_rounds")
    if is_audit and not args.num_folds:
        raise ValueError("An audit needs num_folds of 2 or more; got 0. A model cannot judge labels it was trained on.")
    if not is_audit and args.audit_from is not None and not args.needs_audit:
        raise ValueError("audit_from needs a run that audits; got num_folds 0, or rho 0 and a given alpha. Drop it.")


def _setup(made: Prepared, args: ROPOConfig, audit: Audit | None, judge: Judge | None) -> Setup:
    """What every round of a run is given."""
    alpha, beta = resolve_alpha(args.fixed_alpha, is_audited=False), Choice(value=args.beta, why=Why.GIVEN)
    if audit is not None:
        judged = audit.judgement
        alpha, beta = judged.alpha, judged.beta
        if LOSSES[args.loss].needs_flip_rate and judged.rho.value > 0:
            logger.warning(
                "%s takes flip_rate for the share of wrong labels that it trains on. The filter has taken %.1f %% of "
                "the pairs, and about %.1f %% of the labels left are wrong: give that rate, or --rho 0.",
                args.loss, 100 * judged.rho.value, 100 * judged.noise_left,
            )  # fmt: skip
    return Setup(
        folder=made.folder / "rounds", args=args, loss=args.bound_loss(alpha.value, beta.value), alpha=alpha, beta=beta,
        model=made.model, reference=made.reference, audit=audit, judge=judge,
        evaluation=None if made.evaluation is None else made.evaluation.tokenized,
    )  # fmt: skip


def _audit_of(made: Prepared, args: ROPOConfig) -> Audit:
    return Audit(made.data, args, folder=made.folder / "audit", model=made.model, reference=made.reference)
