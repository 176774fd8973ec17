"""Everything that is known before the first model is trained.

In: a model and datasets, a `ROPOConfig`. Out: tokenized pairs with reference log-probabilities, in an output folder
that is this run's.
"""

import json
import logging
from collections.abc import Sequence
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
from ropo.data.mixture import names_on_hub
from ropo.data.problems import PROBLEMS, Problem, render, summarise
from ropo.data.review import with_verdicts
from ropo.data.tokenize import TokenizedPair, TokenizedPairs, tokenize_pairs
from ropo.data.validate import DataError, read_checked
from ropo.models.digest import model_digest
from ropo.models.fit import check_adapter, check_ids, check_positions, ids_of
from ropo.models.quantized import in_words
from ropo.models.source import Model, Reference, find_model
from ropo.pairs import Pair, PairLogps
from ropo.processes import meet
from ropo.provenance import Json, hash_tensors, hash_value, read_json, write_aside, write_json
from ropo.run.checks import check_run
from ropo.run.evaluation import EvaluationSet, read_evaluation
from ropo.run.forecast import tell_forecast
from ropo.run.identity import (
    INITIAL_MODEL,
    REFERENCE_CACHE,
    claim,
    dated,
    has_trained,
    identity_of,
    refuse_what_is_not_ours,
)
from ropo.run.inputs import DataSource, ReviewInputs
from ropo.run.known_labels import Known, known_labels, tell_idle
from ropo.stages import Stages
from ropo.train.checks import check_warmup
from ropo.train.dataset import PairDataset, batching
from ropo.train.launch import Launch, tell_other_launch
from ropo.train.sharding import load_in_parts

logger = logging.getLogger(__name__)

_WRITTEN_BY_SAVING = ("architectures", "dtype", "transformers_version")  # into the configuration of a model object


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """What a run is given beside its options; see `ropo.run.align.run_rounds`."""

    model: str | Path | PreTrainedModel | Model
    dataset: Any
    peft_config: PeftConfig | None
    processing_class: PreTrainedTokenizerBase | None
    review: ReviewInputs | None
    eval_dataset: Any = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """Everything that is known before the first model is trained.

    Attributes:
        folder: The output folder.
        loaded: The data as it was read.
        problems: All problems found in it.
        lengths: Tokens of prompt and longer response of each pair, before anything was cut.
        data: The pairs that fit, then the trusted ones, with reference log-probabilities if the loss reads them.
        model: The initial one.
        reference: The frozen one.
        digest: Of the run's identity.
        evaluation: Pairs for evaluation only; None without.
        datasets: Names of what was read from the hub.
    """

    folder: Path
    loaded: Loaded
    problems: list[Problem]
    lengths: list[int]
    data: PairDataset
    model: Model
    reference: Reference
    digest: str
    evaluation: EvaluationSet | None
    datasets: list[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Labelled:
    """The data as it was read, with what is known of its labels.

    Attributes:
        loaded: The data.
        pairs: Those to go on with.
        problems: Of the data.
        known: Verdicts and trusted pairs.
    """

    loaded: Loaded
    pairs: list[Pair]
    problems: list[Problem]
    known: Known

    def digests(self) -> dict[str, str | None]:
        """What stands for the data in a run's identity."""
        verdicts = hash_value(sorted(self.known.verdicts.items())) if self.known.verdicts else None
        return {"data": self.loaded.sha256, "trusted": self.known.trusted_sha256, "verdicts": verdicts}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tokenized:
    """The same in tokens, with the pairs for evaluation only."""

    pairs: TokenizedPairs
    trusted: TokenizedPairs
    evaluation: EvaluationSet | None

    def parts(self) -> list[TokenizedPairs]:
        return [self.pairs, self.trusted, *([] if self.evaluation is None else [self.evaluation.tokenized])]

    def dataset(self) -> PairDataset:
        """The data, then the trusted pairs."""
        pairs = [*self.pairs.pairs, *self.trusted.pairs]
        return PairDataset(pairs, [*self.pairs.tokens, *self.trusted.tokens])


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """What was read and found to fit, before anything is written.

    Attributes:
        labelled: The data with what is known of its labels.
        model: The initial one.
        skeleton: The same without weights.
        tokenized: The data in tokens.
        identity: Of the run.
    """

    labelled: _Labelled
    model: Model
    skeleton: PreTrainedModel
    tokenized: _Tokenized
    identity: Json

    @property
    def tokens(self) -> list[TokenizedPair]:
        """Of the data that is trained on, without the trusted pairs."""
        return self.tokenized.pairs.tokens

    @property
    def problems(self) -> list[Problem]:
        """Of the data, as it was read and in tokens."""
        return [*self.labelled.problems, *self.tokenized.pairs.problems]


def check(given: Given, args: ROPOConfig, *, is_audit: bool, scratch: Path | None = None) -> Checked:
    """Read, check and tokenize the data, and look at the model's files and the output folder.

    Args:
        given: Model and data.
        args: Options.
        is_audit: No model is aligned after the audit.
        scratch: Where a model object is saved; default the output folder.

    Raises:
        DataError: If rows cannot be read, or no pair is left.
        ValueError: If options, model, data or output folder do not fit.
    """
    check_run(args, has_evaluation=is_audit or given.eval_dataset is not None)
    load_in_parts(args)
    folder = Path(str(args.output_dir))
    refuse_what_is_not_ours(folder)
    _tell_launch(args, given.model)
    read = _read(given, args)
    model = _model_of(given, scratch or folder)
    _check_trained(model, args, is_audit=is_audit)
    skeleton = model.skeleton()  # what its files lack is told now
    date = dated(model.tokenizer, [folder] if args.audit_from is None else [Path(args.audit_from), folder])
    tokenized = _tokenize(given, read, args, model, skeleton)
    identity = identity_of(args, model, digests=read.digests(), date=date)
    return Checked(labelled=read, model=model, skeleton=skeleton, tokenized=tokenized, identity=identity)


def prepare(given: Given, args: ROPOConfig, *, is_audit: bool) -> Prepared:
    """Check everything, claim the output folder, score the reference.

    Args:
        given: Model and data.
        args: Options.
        is_audit: No model is aligned after the audit.

    Raises:
        DataError: If rows cannot be read, or no pair is left.
        ValueError: If options, model, data or output folder do not fit.
    """
    checked, folder = check(given, args, is_audit=is_audit), Path(str(args.output_dir))
    model, tokenized = checked.model, checked.tokenized
    cache_dir = Path(args.reference_cache_dir or folder / REFERENCE_CACHE)
    claim(folder, checked.identity, cache=cache_dir)
    tell_other_launch(folder, Launch.of(args))
    _report_problems(folder, checked.problems)
    tell_idle(checked.labelled.known.verdicts, tokenized.pairs.pairs)
    if args.audit_from is None:  # else most of what it counts is there
        tell_forecast(model, checked.skeleton, checked.tokens, args, is_audit=is_audit)
    reference = model.reference(cache_dir=cache_dir, batching=batching(args, model.tokenizer))
    digest, data = hash_value(checked.identity), tokenized.dataset()
    if args.reads_reference:
        reads_features = args.reads_features and (is_audit or args.needs_audit)
        data.reference = _reference_logps(data, folder / "reference", reference, digest, reads_features=reads_features)
    return Prepared(
        folder=folder,
        loaded=checked.labelled.loaded,
        problems=checked.problems,
        lengths=tokenized.pairs.lengths,
        data=data,
        model=model,
        reference=reference,
        digest=digest,
        evaluation=tokenized.evaluation,
        datasets=names_on_hub(DataSource.of(given.dataset).data),
    )


def _read(given: Given, args: ROPOConfig) -> _Labelled:
    """The data with what people have said about it.

    Raises:
        ValueError: If there are too few pairs for an audit, or a verdict is about another pair.
    """
    source = DataSource.of(given.dataset)
    loaded, pairs, problems = read_checked(
        source.data, split=source.split, columns=source.columns, on_bad_rows=args.on_bad_rows,
        max_samples=args.max_samples, seed=args.seed,
    )  # fmt: skip
    known = known_labels(pairs, given.review or ReviewInputs(), columns=source.columns)
    verdicts, vouched = known.verdicts, known.vouched
    read = _Labelled(
        loaded=replace(loaded, pairs=with_verdicts(loaded.pairs, verdicts, vouched=vouched, is_whole=True)),
        pairs=with_verdicts(pairs, verdicts, vouched=vouched),
        problems=problems,
        known=known,
    )
    if args.needs_audit:
        if all(pair.verdict is not None for pair in read.pairs):
            raise ValueError(
                "An audit needs a pair whose label nobody has judged; got none. To train on the verdicts, add --loss "
                "dpo --rho 0."
            )
        folds_of([*read.pairs, *known.trusted], args.num_folds, seeds=[args.seed])  # raises if there are too few pairs
    return read


def _tokenize(given: Given, read: _Labelled, args: ROPOConfig, model: Model, skeleton: PreTrainedModel) -> _Tokenized:
    """All pairs in tokens that the model knows.

    Raises:
        DataError: If no pair is left.
        ValueError: If the model cannot read them, or cannot take the adapter.
    """
    tokenizer = model.tokenizer
    pairs = tokenize_pairs(read.pairs, tokenizer, max_length=args.max_length)
    if not pairs.pairs:
        raise DataError(f"No pair is left to train on.\n{render([*read.problems, *pairs.problems])}")
    trusted = tokenize_pairs(read.known.trusted, tokenizer, max_length=args.max_length)
    if found := [problem for problem in trusted.problems if problem.row is not None]:
        logger.warning("Trusted pairs:\n%s", render(found))
    check_warmup(args, num_pairs=args.fewest_trained_on(len(pairs) + len(trusted)))
    if (peft_config := model.peft_config) is not None:
        check_adapter(skeleton, peft_config, dtype=model.dtype)
    evaluation = None
    if given.eval_dataset is not None:
        named = DataSource.of(given.dataset).columns or {}
        columns = {name: column for name, column in named.items() if name not in ("annotator", "weight")}
        evaluation = read_evaluation(
            DataSource.of(given.eval_dataset, columns=columns),
            trained_on=[*read.pairs, *read.known.trusted],
            tokenizer=tokenizer,
            max_length=args.max_length,
            on_bad_rows=args.on_bad_rows,
        )
    tokenized = _Tokenized(pairs=pairs, trusted=trusted, evaluation=evaluation)
    check_positions(model, skeleton, *tokenized.parts())
    for part in tokenized.parts():
        check_ids(skeleton, tokenizer, ids_of(part.pairs, part.tokens), name_or_path=model.name_or_path)
    return tokenized


def _model_of(given: Given, folder: Path) -> Model:
    """The model to start from, as something that can be loaded again and again.

    Raises:
        ValueError: If it cannot be one, or is given its tokenizer or its adapter twice.
    """
    model, tokenizer, adapter = given.model, given.processing_class, given.peft_config
    if isinstance(model, Model):
        for name, value in (("processing_class", tokenizer), ("peft_config", adapter)):
            if value is not None:
                raise ValueError(
                    f"A Model brings its own tokenizer and adapter; got {name}, too. Give it to the Model."
                )
        find_model(model.name_or_path)
        return model
    name = find_model(model) if isinstance(model, str | Path) else _saved(model, tokenizer, folder)
    return Model(name, tokenizer=tokenizer, adapter=adapter)


def _saved(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> str:
    """Where a model object is saved, since rounds load it again and again."""
    if isinstance(model, PeftModel):
        raise ValueError(
            "A run needs a model that it can load again; got one with an adapter. Save it and pass the folder, or pass "
            "model.merge_and_unload()."
        )
    if tokenizer is None:
        raise ValueError("A run needs processing_class when it is given a model object; got none. Pass the tokenizer.")
    path = folder / INITIAL_MODEL
    content = {"weights": hash_tensors(model.state_dict()), "config": _hash_config(model)}
    owner = path.with_suffix(".json")
    written = read_json(owner) if owner.exists() else {}
    is_same = {**written, **content} == written
    if path.exists() and not is_same and has_trained(folder):
        raise ValueError(f"{folder} holds a run that began with another model. Use another output_dir.")
    is_whole = is_same and path.exists() and written.get("files") == model_digest(str(path), {})
    meet()
    if PartialState().is_main_process and not is_whole:
        with write_aside(path) as aside:
            model.save_pretrained(aside)
            tokenizer.save_pretrained(aside)
        write_json(owner, {**content, "files": model_digest(str(path), {})})
    meet()
    return str(path)


def _hash_config(model: PreTrainedModel) -> str:
    """Of what its configuration says of the model and of how it answers, but for what saving writes into it."""
    parts: list[Any] = [model.config, *([model.generation_config] if model.can_generate() else [])]
    found = [
        {name: value for name, value in part.to_dict().items() if name[0] != "_" and name not in _WRITTEN_BY_SAVING}
        for part in parts
    ]
    return hash_value(json.loads(json.dumps(found, default=str)))[:16]


def _tell_launch(args: ROPOConfig, model: str | Path | PreTrainedModel | Model) -> None:
    """Log what this run computes on, and where the reference comes from; the trainer logs the layout."""
    if PartialState().is_main_process:
        named = model.name_or_path if isinstance(model, Model) else model
        name = named if isinstance(named, str | Path) else "the model given"
        cache = args.reference_cache_dir or Path(str(args.output_dir)) / REFERENCE_CACHE
        is_read = args.reads_reference
        reference = f"Reference: {name}, scored once into {cache}." if is_read else f"{args.loss} reads no reference."
        logger.info("%s. %s", Launch.of(args), reference)


def _check_trained(model: Model, args: ROPOConfig, *, is_audit: bool) -> None:
    """Log what is trained where it is not the whole model.

    Raises:
        ValueError: If quantized weights would have to be trained, or sharded.
    """
    if model.is_quantized and args.sharding != "none":
        raise ValueError(
            f"Quantized weights need processes that hold the whole model; got {args.sharding}. Launch without it, or "
            "leave out load_in_4bit and load_in_8bit."
        )
    trains = not is_audit or args.scorer == "models"
    if model.is_quantized and model.start is None and model.adapter is None and trains:
        raise ValueError(
            "Quantized weights cannot be trained; got quantization_config and no adapter. Add peft_config, too."
        )
    if model.is_quantized and PartialState().is_main_process:
        logger.info("Linear layers of the base: %s.", in_words(model.load_options["quantization_config"]))
    if model.start is not None and trains and PartialState().is_main_process:
        logger.info(
            "%s is an adapter of %s: it is trained further, and the reference is that model with it, frozen.",
            model.name_or_path,
            model.base[0],
        )


def _report_problems(folder: Path, problems: Sequence[Problem]) -> None:
    """List every problem in `problems.jsonl`, and say their number by kind."""
    if PartialState().is_main_process:
        with write_aside(folder / "problems.jsonl") as aside:
            lines = [json.dumps(asdict(problem), ensure_ascii=False) + "\n" for problem in problems]
            aside.write_text("".join(lines), encoding="utf-8")
    tell_problems(problems)


def tell_problems(problems: Sequence[Problem]) -> None:
    """Say the number of problems by kind."""
    if PartialState().is_main_process:
        for kind, count in summarise(problems).items():
            spec = PROBLEMS[kind]
            about_all = next((one.message for one in problems if one.kind == kind and one.row is None), None)
            where = about_all or f"{count} rows"
            logger.warning("%s: %s (%s). %s", where, kind, spec.severity.replace("_", " "), spec.meaning)


def _reference_logps(
    data: PairDataset, folder: Path, reference: Reference, digest: str, *, reads_features: bool
) -> PairLogps:
    """Log-probabilities of the reference, computed as a stage of its own.

    Features that an audit will ask for are read in the same pass; they stay in the reference's cache.
    """
    path = folder / "reference_logps.safetensors"

    def make() -> None:
        logps = (reference.logps_with_features if reads_features else reference.logps)(data.tokens)
        if PartialState().is_main_process:
            with write_aside(path) as aside:
                save_file(asdict(logps), aside)

    Stages(folder).run("reference", digest, [path.name], make)
    return PairLogps(**load_file(path))
