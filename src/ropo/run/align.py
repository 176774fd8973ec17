"""`run_rounds`: from a model and a dataset to an aligned model folder; `run_audit`: to the truth about the dataset.

In: names of a model and a dataset, a `ROPOConfig`. Out: the output folder, whose files are a contract: for both
`ledger.parquet`, `summary.json`, `report.html`, `problems.jsonl`, `audit/`; a Hugging Face model with its card and
`rounds/NN/` from the one, `cleaned.jsonl` and `review.csv` from the other.
"""

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import IntervalStrategy, PreTrainedModel, PreTrainedTokenizerBase

from ropo.audit import Audit
from ropo.audit.folds import folds_of
from ropo.audit.scorers import SCORED_FILES
from ropo.config import ROPOConfig, check_config
from ropo.data.load import Loaded
from ropo.data.problems import PROBLEMS, Problem, render, summarise
from ropo.data.review import VERDICTS, read_verdicts, verdicts_of, with_verdicts
from ropo.data.template import date_of, writes_date
from ropo.data.tokenize import TokenizedPairs, tokenize_pairs
from ropo.data.validate import DataError, read_checked
from ropo.judge.make import make_judge
from ropo.judge.verdicts import Judge
from ropo.models.files import check_ids, ids_of
from ropo.models.reference import Reference
from ropo.models.source import PolicySource, check_adapter, check_positions, find_model, load_tokenizer
from ropo.pairs import Pair, PairLogps
from ropo.provenance import (
    DamagedFileError,
    hash_file,
    hash_tensors,
    hash_value,
    is_leftover,
    read_json,
    remove_leftovers,
    write_aside,
    write_json,
)
from ropo.run.evaluation import EvaluationSet, evaluate, read_evaluation
from ropo.run.forecast import tell_forecast
from ropo.run.lock import LOCK_FILE, owning
from ropo.run.outputs import Read, publish, publish_audit
from ropo.run.rounds import run_all
from ropo.stages import Stages
from ropo.train.checks import check_training, check_warmup
from ropo.train.dataset import PairDataset
from ropo.train.launch import Launch, tell_other_launch
from ropo.train.trainer import batching

logger = logging.getLogger(__name__)

# Options that do not change what is computed: they may differ when a run is taken up again. `max_tokens_per_batch` may
# change the last digits: who lowers it for want of memory goes on from the last checkpoint.
_NOT_IDENTITY = (
    "output_dir", "reference_cache_dir", "rounds", "resume_from_checkpoint",
    "report_to", "run_name", "project", "disable_tqdm", "log_level", "log_level_replica", "logging_steps",
    "logging_strategy", "logging_first_step", "save_strategy", "save_steps", "save_total_limit",
    "dataloader_num_workers", "max_tokens_per_batch", "hub_token", "push_to_hub", "local_rank",
    "audit_from",  # its margins count, wherever they are
    "do_train", "do_eval", "do_predict", "judge_url", "judge_api_key_env", "judge_on_failure", "generation_url",
    "generation_api_key_env",
)  # fmt: skip

# Options of `Trainer` with which a training that is stopped would end in other weights, or be taken for finished.
_NOT_RESUMED = {
    "save_only_model": "leaves the optimizer out of checkpoints",
    "ignore_data_skip": "trains on the first pairs of an epoch again",
    "auto_find_batch_size": "changes the batch on the way",
    "enable_jit_checkpoint": "ends a training early at SIGTERM as if it were done",
}

_INITIAL_MODEL = "initial_model"
# What a run writes before it claims its folder.
_MADE_BEFORE = (LOCK_FILE, _INITIAL_MODEL, f"{_INITIAL_MODEL}.json", "reference_cache")

_IDENTITY_REMEDY = "It says which run this folder holds. Restore it from a copy, or use another output_dir."
# What stands in a run's identity by a digest, in words.
_DIGESTS = {
    "data": "pairs", "tokenizer": "tokenizer", "trusted": "trusted pairs", "verdicts": "verdicts (decisions, trusted)",
}  # fmt: skip
# Options that say which pairs there are, and what judges which.
_SCORED_BY = ("scorer", "length_is_evidence", "num_folds", "seed", "max_length")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prepared:
    """Everything that is known before the first model is trained."""

    folder: Path
    loaded: Loaded
    problems: list[Problem]
    data: PairDataset
    source: PolicySource
    tokenizer: PreTrainedTokenizerBase
    reference: Reference
    digest: str
    lengths: list[int]
    evaluation: EvaluationSet | None

    def read(self, command: str) -> Read:
        """What was read, for the summary."""
        return Read(loaded=self.loaded, problems=self.problems, lengths=self.lengths, command=command)


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
        judge: Asked about new pairs that the selection rule cannot settle; default what `args.judge` names. The same
            in every call.
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
    check_config(args, taker="run_rounds")
    if args.audit_from is not None and not args.needs_audit:
        raise ValueError("audit_from needs a run that audits; got num_folds 0, or rho 0 and a given alpha. Drop it.")
    with owning(Path(str(args.output_dir))):
        made = _prepare(
            model, dataset, args, processing_class, peft_config, split, columns, load_options, trusted, decisions,
            is_audit=False, eval_dataset=eval_dataset, eval_split=eval_split,
        )  # fmt: skip
        if idle := args.without_effect:
            logger.warning("Nothing is sampled (num_candidates 0), so these do nothing: %s.", ", ".join(idle))
        digest, audit = made.digest, None
        judge = judge or make_judge(args, made.folder / "judge")
        if args.needs_audit:
            audit = _audit_of(made, args, peft_config)
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
        command: What the user typed, for the report.

    Returns:
        The summary, as written to `summary.json` beside `ledger.parquet`, `report.html`, `cleaned.jsonl` and
        `review.csv`.

    Raises:
        DataError: As for `run_rounds`.
        ValueError: As for `run_rounds`; or if `num_folds` is 0.
    """
    check_config(args, taker="run_audit")
    if not args.num_folds:
        raise ValueError("An audit needs num_folds of 2 or more; got 0. A model cannot judge labels it was trained on.")
    with owning(Path(str(args.output_dir))):
        made = _prepare(
            model, dataset, args, processing_class, peft_config, split, columns, load_options, trusted, decisions,
            is_audit=True,
        )  # fmt: skip
        audit = _audit_of(made, args, peft_config)
        audit.run(made.digest)
        return publish_audit(audit, folder=made.folder, read=made.read(command))


def _audit_of(made: _Prepared, args: ROPOConfig, peft_config: PeftConfig | None) -> Audit:
    return Audit(
        made.data,
        args,
        folder=made.folder / "audit",
        source=made.source,
        tokenizer=made.tokenizer,
        peft_config=peft_config,
        features_of=made.reference.features,
    )


def _prepare(
    model: str | Path | PreTrainedModel,
    dataset: Any,
    args: ROPOConfig,
    processing_class: PreTrainedTokenizerBase | None,
    peft_config: PeftConfig | None,
    split: str,
    columns: Mapping[str, str] | None,
    load_options: Mapping[str, Any] | None,
    trusted: Any,
    decisions: Path | None,
    *,
    is_audit: bool,
    eval_dataset: Any = None,
    eval_split: str = "train",
) -> _Prepared:
    """Read, check and tokenize the data, claim the output folder, score the reference."""
    _check_run(args)
    folder = Path(str(args.output_dir))
    _refuse_what_is_not_ours(folder)
    _tell_launch(args, model)
    loaded, pairs, problems = read_checked(dataset, split=split, columns=columns, on_bad_rows=args.on_bad_rows)
    verdicts, known, trusted_sha256 = _known_labels(pairs, decisions, trusted, columns)
    loaded = replace(loaded, pairs=with_verdicts(loaded.pairs, verdicts, is_whole=True))
    pairs = with_verdicts(pairs, verdicts)
    if args.needs_audit:
        folds_of([*pairs, *known], args.num_folds, seed=args.seed)  # raises if there are too few pairs
    name = _name_of(model, processing_class, folder)
    source = PolicySource(name, load_options=load_options, is_adapter=peft_config is not None)
    skeleton = source.skeleton()  # what its files lack is told now
    tokenizer = processing_class or load_tokenizer(name, load_options)
    date = _dated(tokenizer, [folder] if args.audit_from is None else [Path(args.audit_from), folder])
    tokenized = tokenize_pairs(pairs, tokenizer, max_length=args.max_length)
    problems = [*problems, *tokenized.problems]
    if not tokenized.pairs:
        raise DataError(f"No pair is left to train on.\n{render(problems)}")
    trusted_tokens = tokenize_pairs(known, tokenizer, max_length=args.max_length)
    if found := [problem for problem in trusted_tokens.problems if problem.row is not None]:
        logger.warning("Trusted pairs:\n%s", render(found))
    check_warmup(args, num_pairs=len(tokenized) + len(trusted_tokens))
    if peft_config is not None:
        check_adapter(skeleton, peft_config)
    evaluation = None
    if eval_dataset is not None:
        evaluation = read_evaluation(
            eval_dataset,
            trained_on=[*pairs, *known],
            tokenizer=tokenizer,
            max_length=args.max_length,
            split=eval_split,
            columns=columns,
            on_bad_rows=args.on_bad_rows,
        )
    parts = [tokenized, trusted_tokens, *([] if evaluation is None else [evaluation.tokenized])]
    check_positions(source, *parts)
    for part in parts:
        check_ids(skeleton, tokenizer, ids_of(part.pairs, part.tokens), name_or_path=name)
    identity = {
        "options": {key: value for key, value in args.to_dict().items() if key not in _NOT_IDENTITY},
        "model": [source.fingerprint(), source.load_options],
        "tokenizer": _fingerprint(tokenizer),
        "data": loaded.sha256,
        "trusted": trusted_sha256,
        "verdicts": hash_value(sorted(verdicts.items())) if verdicts else None,
        "adapter": None if peft_config is None else peft_config.to_dict(),
        **({} if date is None else {"date": date}),
    }
    identity = json.loads(json.dumps(identity, sort_keys=True, default=_as_json))
    identity["audit_from"] = None if args.audit_from is None else _margins_of(Path(args.audit_from), identity)
    _claim(folder, identity)
    tell_other_launch(folder, Launch.of(args))
    _report_problems(folder, problems)
    _tell_idle(verdicts, tokenized.pairs)
    if args.audit_from is None:  # else most of what it counts is there
        tell_forecast(source, tokenized.tokens, args, tokenizer, peft_config, is_audit=is_audit)
    cache_dir = Path(args.reference_cache_dir or folder / "reference_cache")
    reference = Reference(source, cache_dir=cache_dir, batching=batching(args, tokenizer))
    digest = hash_value(identity)
    return _Prepared(
        folder=folder,
        loaded=loaded,
        problems=problems,
        data=_with_reference(
            tokenized,
            trusted_tokens,
            folder / "reference",
            reference,
            digest,
            reads_features=args.reads_features and (is_audit or args.needs_audit),
        )
        if args.reads_reference
        else PairDataset([*tokenized.pairs, *trusted_tokens.pairs], [*tokenized.tokens, *trusted_tokens.tokens]),
        source=source,
        tokenizer=tokenizer,
        reference=reference,
        digest=digest,
        lengths=tokenized.lengths,
        evaluation=evaluation,
    )


def _dated(tokenizer: PreTrainedTokenizerBase, folders: Sequence[Path]) -> str | None:
    """Give a chat template that writes the date that of the run in the first of the folders that holds one.

    Else tokens would change at midnight: those of a resumed run, or of one that goes on from an audit.

    Returns:
        The date, the same in all processes; None for a template without one.
    """
    if not writes_date(tokenizer):
        return None
    kept = next(filter(None, map(_kept_date, folders)), None)
    [date] = broadcast_object_list([date_of(tokenizer, kept)])
    return date_of(tokenizer, date)


def _kept_date(folder: Path) -> str | None:
    """The date of the run in a folder; None if there is none."""
    path = folder / "ropo_config.json"
    try:
        date: str | None = read_json(path, remedy=_IDENTITY_REMEDY).get("date") if path.exists() else None
    except DamagedFileError:
        if _has_trained(folder):
            raise
        return None
    return date


def _margins_of(folder: Path, identity: Mapping[str, Any]) -> str:
    """Digest of the held-out margins of another run, which must be of this run's pairs.

    Raises:
        ValueError: If there is no finished audit, or it is of other pairs, by another model or scorer, or in other
            folds.
    """
    path = folder / "ropo_config.json"
    if not path.exists() or not (folder / "audit").exists():
        raise ValueError(f"audit_from needs the output folder of an audit; {folder} holds none.")
    there, here = (
        {
            **{name: one[name] for name in ("tokenizer", "data", "trusted")},
            "model": one["model"][0],
            **{name: one["options"].get(name) for name in _SCORED_BY},
        }
        for one in (read_json(path, remedy="Restore it from a copy, or leave out audit_from."), identity)
    )
    if there != here:
        raise ValueError(
            f"audit_from needs an audit of the same pairs by the same model; {folder} has another one:\n"
            f"{_differences(there, here)}"
        )
    files = [folder / "audit" / name for name in SCORED_FILES]
    if not all(file.exists() for file in files):
        raise ValueError(f"audit_from needs a finished audit; that in {folder} was broken off. Finish it first.")
    return hash_value([hash_file(file) for file in files])[:16]


Verdicts = dict[int, tuple[str, str]]  # by row: id of the pair, and what was said of its label


def _known_labels(
    pairs: Sequence[Pair], decisions: Path | None, trusted: Any, columns: Mapping[str, str] | None
) -> tuple[Verdicts, list[Pair], str | None]:
    """Verdicts on rows of the data, the trusted pairs that it does not hold, and the digest of all trusted ones.

    Raises:
        ValueError: If there is no verdict, or a trusted pair contradicts another one or a verdict.
    """
    verdicts = {} if decisions is None else _verdicts_in(Path(decisions))
    if trusted is None:
        return verdicts, [], None
    shared = {ours: theirs for ours, theirs in (columns or {}).items() if ours != "annotator"}
    read, known, found = read_checked(trusted, columns=shared, on_bad_rows="refuse")
    if found:
        logger.warning("Trusted pairs:\n%s", render(found))
    said = verdicts_of(known, pairs)
    for row, (name, verdict) in said.items():
        if verdicts.setdefault(row, (name, verdict)) != (name, verdict):
            raise ValueError(
                f"Row {row} needs one verdict; got {verdicts[row][1]} by --decisions and {verdict} by --trusted. "
                "Correct one of the two."
            )
    if said:
        counts = Counter(verdict for _, verdict in said.values())
        logger.info(
            "Labels of the data that trusted pairs settle: %d right, %d wrong.", counts["right"], counts["wrong"]
        )
    settled = {name for name, _ in said.values()}
    return verdicts, [replace(pair, origin="trusted") for pair in known if pair.id not in settled], read.sha256


def _tell_idle(verdicts: Verdicts, pairs: Sequence[Pair]) -> None:
    """Verdicts on rows that are left out do nothing."""
    if idle := set(verdicts) - {pair.row for pair in pairs}:
        logger.warning("%d verdicts are about rows that are left out; the first is row %d.", len(idle), min(idle))


def _verdicts_in(path: Path) -> Verdicts:
    """The review decision on each row, counted in the log.

    Raises:
        ValueError: If there is no verdict.
    """
    verdicts = read_verdicts(path)
    if not verdicts:
        raise ValueError(
            f"--decisions needs at least one verdict; {path} holds none. Write {', '.join(VERDICTS)} into its column "
            "`verdict`, or leave it out."
        )
    counts = Counter(verdict for _, verdict in verdicts.values())
    parts = ", ".join(f"{count} {verdict}" for verdict, count in counts.most_common())
    logger.info("%d verdict%s read: %s.", len(verdicts), "" if len(verdicts) == 1 else "s", parts)
    return verdicts


def _check_run(args: ROPOConfig) -> None:
    """Refuse before anything is read what a single training may do and a whole run cannot.

    Raises:
        ValueError: If there are several GPUs in this process, or an option asks for what a run has not or does not do.
    """
    check_training(args)
    for name, reason in _NOT_RESUMED.items():
        if getattr(args, name):
            raise ValueError(
                f"A run that is stopped resumes as if it had not been; got {name}, which {reason}. Leave it out."
            )
    if args.resume_from_checkpoint is not None:
        raise ValueError(
            "A run goes on by itself when the same command is given again; got resume_from_checkpoint. Leave it out."
        )
    if args.eval_strategy != "no":
        raise ValueError(
            "A run evaluates the model of every round on eval_dataset_name (in Python: eval_dataset), and nothing in "
            f"between; got eval_strategy {IntervalStrategy(args.eval_strategy).value!r}. Leave it out, or use "
            "ROPOTrainer."
        )
    for name, is_asked in (
        ("eval_on_start", args.eval_on_start),
        ("save_strategy best", args.save_strategy == "best"),
        ("load_best_model_at_end", args.load_best_model_at_end),
    ):
        if is_asked:
            raise ValueError(f"A run evaluates nothing while it trains; got {name}. Leave it out, or use ROPOTrainer.")
    if args.push_to_hub:
        raise ValueError(
            "A run uploads nothing; got push_to_hub. Leave it out, look at the report, then upload the model's files "
            "(`hf upload`)."
        )


def _fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Name of a tokenizer's content: how it cuts text, how a text begins and ends, and its chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    # What it was last called with stands in there as well.
    found = {} if backend is None else {**json.loads(backend.to_str()), "padding": None, "truncation": None}
    cut = found or sorted(tokenizer.get_vocab().items())
    return hash_value([cut, tokenizer.chat_template, tokenizer.bos_token, tokenizer.eos_token])[:16]


def _as_json(value: Any) -> Any:
    """What JSON does not know; a set has no order of its own, and another one in every process."""
    return sorted(value) if isinstance(value, set | frozenset) else str(value)


def _name_of(model: str | Path | PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> str:
    """Folder or hub id of the initial model; a model object is saved first, since rounds load it again and again."""
    if isinstance(model, str | Path):
        return find_model(model)
    if isinstance(model, PeftModel):
        raise ValueError(
            "A run needs a whole model to start from; got one with an adapter. Pass the base model and peft_config, or "
            "model.merge_and_unload()."
        )
    if tokenizer is None:
        raise ValueError("A run needs processing_class when it is given a model object; got none. Pass the tokenizer.")
    path, weights = folder / _INITIAL_MODEL, hash_tensors(model.state_dict())
    owner = path.with_suffix(".json")
    is_there = path.exists() and owner.exists() and read_json(owner) == {"weights": weights}
    if path.exists() and not is_there and _has_trained(folder):
        raise ValueError(f"{folder} holds a run that began with another model. Use another output_dir.")
    PartialState().wait_for_everyone()
    if PartialState().is_main_process and not is_there:
        with write_aside(path) as aside:
            model.save_pretrained(aside)
            tokenizer.save_pretrained(aside)
        write_json(owner, {"weights": weights})
    PartialState().wait_for_everyone()
    return str(path)


def _has_trained(folder: Path) -> bool:
    """Whether anything would be lost: before that, whoever mistyped an option may go on in the same folder."""
    return any(any(folder.glob(f"{part}/**/manifest.json")) for part in ("audit", "rounds"))


def _tell_launch(args: ROPOConfig, model: str | Path | PreTrainedModel) -> None:
    """Log what this run computes on, and where the reference comes from; the trainer logs the layout."""
    if PartialState().is_main_process:
        name = model if isinstance(model, str | Path) else "the model given"
        cache = args.reference_cache_dir or Path(str(args.output_dir)) / "reference_cache"
        is_read = args.reads_reference
        reference = f"Reference: {name}, scored once into {cache}." if is_read else f"{args.loss} reads no reference."
        logger.info("%s. %s", Launch.of(args), reference)


def _refuse_what_is_not_ours(folder: Path) -> None:
    """A folder of the model, of the data or of anything else is no place for a run.

    Raises:
        ValueError: If the folder holds other files and no run.
    """
    if not folder.exists() or (folder / "ropo_config.json").exists():
        return
    others = sorted(entry.name for entry in folder.iterdir() if not _is_ours(entry))
    if others:
        raise ValueError(
            f"output_dir needs a new folder or one of our runs; {folder} holds other files, like {others[0]}. Use "
            "another one."
        )


def _claim(folder: Path, identity: dict[str, Any]) -> None:
    """Make the output folder this run's, or make sure that it already is.

    Raises:
        ValueError: If another run is there.
    """
    path = folder / "ropo_config.json"
    if path.exists() and _has_trained(folder):
        old = read_json(path, remedy=_IDENTITY_REMEDY)
        if old != identity:
            # The user may have filled in review.csv there.
            has_audit = (folder / "review.csv").exists()
            remedy = f" and --audit_from {folder}" if has_audit else ", or remove this one to start anew"
            raise ValueError(
                f"{folder} holds a run with other settings:\n{_differences(old, identity)}\n"
                f"Use another output_dir{remedy}."
            )
    PartialState().wait_for_everyone()
    if PartialState().is_main_process:
        write_json(path, identity)
        remove_leftovers(folder, lock_file=LOCK_FILE)
    PartialState().wait_for_everyone()


def _is_ours(entry: Path) -> bool:
    """Whether a run writes it before it claims its folder, so one that was killed early may have left it."""
    return entry.name in _MADE_BEFORE or is_leftover(entry)


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    lines = []
    for part in new:
        before, after = old.get(part), new[part]
        if isinstance(before, dict) and isinstance(after, dict):
            lines += [
                f"  {key}: {before.get(key)!r} there, {after.get(key)!r} now"
                for key in sorted({*before, *after})
                if before.get(key) != after.get(key)
            ]
        elif before != after:
            is_digest = part in _DIGESTS
            shown = [f"content {one[:8]}" if is_digest and one else f"{one!r}" for one in (before, after)]
            lines.append(f"  {_DIGESTS.get(part, part)}: {shown[0]} there, {shown[1]} now")
    return "\n".join(lines)


def _report_problems(folder: Path, problems: Sequence[Problem]) -> None:
    """List every problem in `problems.jsonl`, and say their number by kind."""
    if PartialState().is_main_process:
        with write_aside(folder / "problems.jsonl") as aside:
            lines = [json.dumps(asdict(problem), ensure_ascii=False) + "\n" for problem in problems]
            aside.write_text("".join(lines), encoding="utf-8")
        for kind, count in summarise(problems).items():
            spec = PROBLEMS[kind]
            about_all = next((one.message for one in problems if one.kind == kind and one.row is None), None)
            where = about_all or f"{count} rows"
            logger.warning("%s: %s (%s). %s", where, kind, spec.severity.replace("_", " "), spec.meaning)


def _with_reference(
    tokenized: TokenizedPairs,
    trusted: TokenizedPairs,
    folder: Path,
    reference: Reference,
    digest: str,
    *,
    reads_features: bool,
) -> PairDataset:
    """The data, then the trusted pairs, with reference log-probabilities, computed as a stage of its own.

    Features that an audit will ask for are read in the same pass; they stay in the reference's cache.
    """
    pairs, tokens = [*tokenized.pairs, *trusted.pairs], [*tokenized.tokens, *trusted.tokens]
    path = folder / "reference_logps.safetensors"

    def make() -> None:
        logps = reference.read(tokens)[0] if reads_features else reference.logps(tokens)
        if PartialState().is_main_process:
            with write_aside(path) as aside:
                save_file(asdict(logps), aside)

    Stages(folder).run("reference", digest, [path.name], make)
    return PairDataset(pairs, tokens, reference=PairLogps(**load_file(path)))
