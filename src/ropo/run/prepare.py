"""Everything that is known before the first model is trained.

In: names of a model and a dataset, a `ROPOConfig`. Out: tokenized pairs with reference log-probabilities, in an output
folder that is this run's.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ropo.audit.folds import folds_of
from ropo.config import ROPOConfig
from ropo.data.load import Loaded
from ropo.data.problems import PROBLEMS, Problem, render, summarise
from ropo.data.review import with_verdicts
from ropo.data.tokenize import TokenizedPairs, tokenize_pairs
from ropo.data.validate import DataError, read_checked
from ropo.models.files import check_ids, ids_of
from ropo.models.reference import Reference
from ropo.models.source import PolicySource, check_adapter, check_positions, find_model, load_tokenizer
from ropo.pairs import PairLogps
from ropo.provenance import hash_tensors, hash_value, read_json, write_aside, write_json
from ropo.run.checks import check_run
from ropo.run.evaluation import EvaluationSet, read_evaluation
from ropo.run.forecast import tell_forecast
from ropo.run.identity import INITIAL_MODEL, claim, dated, has_trained, identity_of, refuse_what_is_not_ours
from ropo.run.known_labels import known_labels, tell_idle
from ropo.run.outputs import Read
from ropo.stages import Stages
from ropo.train.checks import check_warmup
from ropo.train.dataset import PairDataset, batching
from ropo.train.launch import Launch, tell_other_launch

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
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


def prepare(
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
) -> Prepared:
    """Read, check and tokenize the data, claim the output folder, score the reference."""
    check_run(args)
    folder = Path(str(args.output_dir))
    refuse_what_is_not_ours(folder)
    _tell_launch(args, model)
    loaded, pairs, problems = read_checked(dataset, split=split, columns=columns, on_bad_rows=args.on_bad_rows)
    verdicts, known, trusted_sha256 = known_labels(pairs, decisions, trusted, columns)
    loaded = replace(loaded, pairs=with_verdicts(loaded.pairs, verdicts, is_whole=True))
    pairs = with_verdicts(pairs, verdicts)
    if args.needs_audit:
        folds_of([*pairs, *known], args.num_folds, seed=args.seed)  # raises if there are too few pairs
    name = _name_of(model, processing_class, folder)
    source = PolicySource(name, load_options=load_options, is_adapter=peft_config is not None)
    skeleton = source.skeleton()  # what its files lack is told now
    tokenizer = processing_class or load_tokenizer(name, load_options)
    date = dated(tokenizer, [folder] if args.audit_from is None else [Path(args.audit_from), folder])
    tokenized = tokenize_pairs(pairs, tokenizer, max_length=args.max_length)
    problems = [*problems, *tokenized.problems]
    if not tokenized.pairs:
        raise DataError(f"No pair is left to train on.\n{render(problems)}")
    trusted_tokens = tokenize_pairs(known, tokenizer, max_length=args.max_length)
    if found := [problem for problem in trusted_tokens.problems if problem.row is not None]:
        logger.warning("Trusted pairs:\n%s", render(found))
    check_warmup(args, num_pairs=args.fewest_trained_on(len(tokenized) + len(trusted_tokens)))
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
    digests = {
        "data": loaded.sha256,
        "trusted": trusted_sha256,
        "verdicts": hash_value(sorted(verdicts.items())) if verdicts else None,
    }
    identity = identity_of(args, source, tokenizer, peft_config, digests=digests, date=date)
    claim(folder, identity)
    tell_other_launch(folder, Launch.of(args))
    _report_problems(folder, problems)
    tell_idle(verdicts, tokenized.pairs)
    if args.audit_from is None:  # else most of what it counts is there
        tell_forecast(source, tokenized.tokens, args, tokenizer, peft_config, is_audit=is_audit)
    cache_dir = Path(args.reference_cache_dir or folder / "reference_cache")
    reference = Reference(source, cache_dir=cache_dir, batching=batching(args, tokenizer))
    digest = hash_value(identity)
    return Prepared(
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
    path, weights = folder / INITIAL_MODEL, hash_tensors(model.state_dict())
    owner = path.with_suffix(".json")
    is_there = path.exists() and owner.exists() and read_json(owner) == {"weights": weights}
    if path.exists() and not is_there and has_trained(folder):
        raise ValueError(f"{folder} holds a run that began with another model. Use another output_dir.")
    PartialState().wait_for_everyone()
    if PartialState().is_main_process and not is_there:
        with write_aside(path) as aside:
            model.save_pretrained(aside)
            tokenizer.save_pretrained(aside)
        write_json(owner, {"weights": weights})
    PartialState().wait_for_everyone()
    return str(path)


def _tell_launch(args: ROPOConfig, model: str | Path | PreTrainedModel) -> None:
    """Log what this run computes on, and where the reference comes from; the trainer logs the layout."""
    if PartialState().is_main_process:
        name = model if isinstance(model, str | Path) else "the model given"
        cache = args.reference_cache_dir or Path(str(args.output_dir)) / "reference_cache"
        is_read = args.reads_reference
        reference = f"Reference: {name}, scored once into {cache}." if is_read else f"{args.loss} reads no reference."
        logger.info("%s. %s", Launch.of(args), reference)


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
