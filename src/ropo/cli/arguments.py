"""The options of a command, from words and recipe to checked dataclasses.

In: what follows `ropo train` or another command. Out: the options, or one sentence on the one that is wrong.
"""

import dataclasses
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from peft import LoraConfig
from transformers import HfArgumentParser

from ropo.cli.parser import SentenceParser
from ropo.cli.words import name_of_option, refuse_unknown
from ropo.config import ROPOConfig
from ropo.data.read import HubDataset, is_here
from ropo.models.source import Model, find_model
from ropo.options import check_choice, check_options, option, read_yaml, short
from ropo.run.inputs import DataSource, ReviewInputs
from ropo.spelling import did_you_mean
from ropo.train.options import instead_of

Options = TypeVar("Options")
COLUMNS = ("prompt", "chosen", "rejected", "annotator")
DTYPES = ("float32", "bfloat16", "float16", "auto")


@dataclass
class TrainArguments:
    """Which model and data `ropo train` and `ropo audit` take; everything else is in `ROPOConfig`."""

    model_name_or_path: str | None = option(None, "Folder or hub id of the model to align; it is also the reference.")
    dataset_name: str | None = option(
        None, "File (.jsonl, .json, .jsonl.gz, .parquet, .csv), folder of shards or saved folder, or hub id."
    )
    dataset_config: str | None = option(
        None,
        "Configuration (subset) of a hub dataset, where it has several. Of the evaluation set, too, if it is the same.",
    )
    dataset_data_dir: str | None = option(None, "Folder inside a hub dataset, likewise.")
    dataset_split: str = option("train", "Part of the dataset to read, where it has several.")
    eval_dataset_name: str | None = option(
        None, "Pairs that nothing is trained on, to score the model of every round. A finished run takes them, too."
    )
    eval_dataset_split: str = option("train", "Part of the evaluation set to read, where it has several.")
    prompt_column: str = option("prompt", "Name of the column with prompts.")
    chosen_column: str = option("chosen", "Name of the column with preferred responses.")
    rejected_column: str = option("rejected", "Name of the column with the other responses.")
    annotator_column: str = option("annotator", "Name of the column that says who labelled the pair.")
    trusted: str | None = option(
        None,
        "File of pairs whose labels are known to be right; 50 to 200 help. Those of the data may be among them.",
    )
    decisions: str | None = option(
        None, "A review.csv whose column verdict holds review decisions (right, wrong, drop)."
    )
    dtype: str = option(
        "float32",
        "Of the weights: float32 trains best (--bf16 computes fast); auto, bfloat16, float16. With --use_peft and "
        "--bf16, bfloat16 halves what the frozen weights take.",
    )
    attn_implementation: str | None = option(
        None,
        "Attention. Default: what transformers takes for the model, mostly sdpa, which can encode each prompt once per "
        "pair, as eager can.",
    )
    model_revision: str | None = option(None, "Branch, tag or commit of a hub model.")
    trust_remote_code: bool = option(False, "Run code that a hub model brings. Read it first.")  # noqa: FBT003
    use_peft: bool = option(False, "Train a LoRA adapter instead of the whole model.")  # noqa: FBT003
    lora_r: int = option(16, "Rank of the adapter.")
    lora_alpha: int = option(32, "Scale of the adapter.")
    lora_dropout: float = option(0.0, "Dropout of the adapter.")
    dry_run: bool = option(False, "Check everything, print what the run will cost, and end; nothing is written.")  # noqa: FBT003
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Modules that get an adapter. Default: all linear layers but the head."}
    )


_KINDS: Any = (TrainArguments, ROPOConfig)


class DataclassParser(SentenceParser, HfArgumentParser):
    """A parser with an option for each field of some dataclasses."""


def training_parser(command: str) -> DataclassParser:
    """The options of `ropo train` and `ropo audit`; the names of recipes are not among them.

    Args:
        command: Which of the two.
    """
    return DataclassParser(command, dataclass_types=_KINDS)


def parse_train(words: Sequence[str], *, command: str = "train") -> tuple[TrainArguments, ROPOConfig]:
    """Read the options of `ropo train` or `ropo audit`: a YAML file gives defaults, the command line wins.

    Args:
        words: What follows `ropo train`.
        command: Which of the two, for messages.

    Returns:
        Model and data, and the configuration.

    Raises:
        ValueError: If an option is unknown, missing or out of range.
    """
    config_parser = SentenceParser(command)
    config_parser.add("config", type=Path)
    config, rest = config_parser.parse_known_args(list(words))
    parser = training_parser(command)
    recipe = {} if config.config is None else _read_recipe(config.config, parser)
    parser.set_defaults(**recipe)
    unknown = parser.parse_known_args(rest)[1]  # told before the others are checked together
    refuse_unknown(unknown, [*parser.names(), "config"], command=command, instead=instead_of)
    given, args = parser.parse_args_into_dataclasses(rest, look_for_args_file=False)
    for name, value in (
        ("model_name_or_path", given.model_name_or_path),
        ("dataset_name", given.dataset_name),
        ("output_dir", args.output_dir if "output_dir" in {*map(name_of_option, words), *recipe} else None),
    ):
        if not value:
            raise ValueError(
                f"--{name} is missing. Usage: ropo {command} --model_name_or_path M --dataset_name D --output_dir O"
            )
    _check(given)
    return given, args


def _check(given: TrainArguments) -> None:
    check_options(given)
    check_choice("dtype", given.dtype, DTYPES)
    if given.eval_dataset_name is None and given.eval_dataset_split != "train":
        raise ValueError("eval_dataset_split needs eval_dataset_name, of which it is a part. Add it.")
    if given.use_peft and given.lora_r < 1:
        raise ValueError(f"lora_r needs 1 or more; got {given.lora_r}.")
    if given.use_peft and not 0 <= given.lora_dropout < 1:
        raise ValueError(f"lora_dropout needs a number in [0, 1); got {given.lora_dropout}.")
    for one in dataclasses.fields(TrainArguments):
        name = one.name
        if name.startswith("lora_") and not given.use_peft and getattr(given, name) != one.default:
            raise ValueError(f"{name} needs use_peft, without which the whole model is trained. Add --use_peft.")


def parse_options(kind: type[Options], words: Sequence[str], *, command: str) -> Options:
    """Read the options of a command that one dataclass describes.

    Args:
        kind: The dataclass; it checks itself.
        words: What follows the command.
        command: The command, for messages.

    Returns:
        The options.

    Raises:
        ValueError: If an option is unknown, missing or out of range.
    """
    return kind(**vars(DataclassParser(command, dataclass_types=kind).read(words)))


def model_of(given: TrainArguments) -> Model:
    """The model to align, with its adapter and how it is loaded."""
    options = {
        "dtype": given.dtype,
        **({} if given.attn_implementation is None else {"attn_implementation": given.attn_implementation}),
        "revision": given.model_revision,
        "trust_remote_code": given.trust_remote_code,
    }
    return Model(str(given.model_name_or_path), adapter=_adapter(given), load_options=options)


def pairs_of(given: TrainArguments) -> DataSource:
    """The pairs to train on or to audit."""
    return DataSource(dataset_of(given, given.dataset_name), split=given.dataset_split, columns=columns_of(given))


def evaluation_of(given: TrainArguments) -> DataSource | None:
    """The pairs to score the model of every round on, if there are any."""
    found = dataset_of(given, given.eval_dataset_name)
    return None if found is None else DataSource(found, split=given.eval_dataset_split)


def review_of(given: TrainArguments) -> ReviewInputs:
    """What people have said about labels."""
    return ReviewInputs(trusted=given.trusted, decisions=given.decisions)


def check_sources(given: TrainArguments) -> None:
    """Refuse a misspelt path before anything is read or asked of the hub.

    Args:
        given: Model and data.

    Raises:
        FileNotFoundError: If something looks like a path and nothing is there.
        ValueError: If the model's folder holds no model.
    """
    data = [name for name in (given.dataset_name, given.eval_dataset_name, given.trusted) if name is not None]
    are_here = [is_here(name) for name in data]
    if not all(are_here):
        find_model(str(given.model_name_or_path))


def dataset_of(given: Any, name: str | None) -> str | HubDataset | None:
    """A dataset by its name; the configuration is that of the dataset to train on, whatever part of it is meant."""
    if name is None or name != given.dataset_name or (given.dataset_config, given.dataset_data_dir) == (None, None):
        return name
    return HubDataset(name=name, config=given.dataset_config, data_dir=given.dataset_data_dir)


def columns_of(given: Any) -> dict[str, str]:
    """Names of columns that differ from ours."""
    names = {name: getattr(given, f"{name}_column") for name in COLUMNS}
    return {ours: theirs for ours, theirs in names.items() if ours != theirs}


def _adapter(given: TrainArguments) -> LoraConfig | None:
    if not given.use_peft:
        return None
    return LoraConfig(
        r=given.lora_r,
        lora_alpha=given.lora_alpha,
        lora_dropout=given.lora_dropout,
        target_modules=given.lora_target_modules or "all-linear",
        task_type="CAUSAL_LM",
    )


def _read_recipe(path: Path, parser: DataclassParser) -> dict[str, Any]:
    """Options of a YAML file, each as the command line would have read it."""
    recipe = read_yaml(path, as_text=True)
    kinds: dict[str, Any] = {name: kind for one in _KINDS for name, kind in typing.get_type_hints(one).items()}
    defaults = {one.name: one.default for kind in _KINDS for one in dataclasses.fields(kind)}
    for name, value in recipe.items():
        if name not in defaults:
            instead = instead_of(str(name)) or did_you_mean(name, defaults)
            raise ValueError(f"{path}: unknown option {name!r}.{instead} `ropo train --help_all` lists all.")
        if (value is None and defaults[name] is not None) or value == "":
            raise ValueError(f"{path}: {name} has no value. Give it one, or leave the line out.")
        if isinstance(value, list | dict) and type(value).__name__ not in str(kinds[name]):
            raise ValueError(f"{path}: {name} needs one value; got {short(value)}.")
        if isinstance(value, list) and any(isinstance(one, list | dict) or one is None for one in value):
            raise ValueError(f"{path}: {name} needs a list of texts; got {short(value)}.")
        if isinstance(value, str):
            try:
                recipe[name] = getattr(parser.parse_known_args([f"--{name}={value}"])[0], name)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
        elif isinstance(value, list):
            recipe[name] = [str(one) for one in value]
    return recipe
