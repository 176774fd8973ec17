"""The options of a command, from words and recipe to checked dataclasses.

In: what follows `ropo train` or another command. Out: the options, or one sentence on the one that is wrong.
"""

import dataclasses
import logging
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from transformers import HfArgumentParser

from ropo.cli.launcher import LaunchArguments
from ropo.cli.parser import SentenceParser
from ropo.cli.words import name_of_option, refuse_unknown
from ropo.config import ROPOConfig
from ropo.data.mixture import Mixture, named_mixture
from ropo.data.read import HubDataset, is_here
from ropo.models.options import ModelOptions
from ropo.models.source import Model, find_model
from ropo.options import option, read_yaml, short
from ropo.run.inputs import DataSource, ReviewInputs
from ropo.spelling import did_you_mean
from ropo.train.options import instead_of

logger = logging.getLogger(__name__)

Options = TypeVar("Options")
COLUMNS = ("prompt", "chosen", "rejected", "annotator", "weight")


@dataclass
class TrainArguments(LaunchArguments, ModelOptions):
    """Which model and data `ropo train` and `ropo audit` take; everything else is in `ROPOConfig`."""

    merge_adapter: bool = option(
        default=False, text="Write the model with its adapter merged, as one whole model, to OUTPUT_DIR/merged, too."
    )
    dataset_name: str | None = option(
        None,
        "File (.jsonl, .json, .jsonl.gz, .parquet, .csv), folder of shards or saved folder, or hub id; several with "
        "commas between them, with shares where wanted: a.jsonl:0.7,b.jsonl:0.3.",
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
    weight_column: str = option("weight", "Name of the column that says how much the pair counts, 0 or more.")
    trusted: str | None = option(
        None,
        "File of pairs whose labels are known to be right; 50 to 200 help. Those of the data may be among them.",
    )
    decisions: str | None = option(
        None, "A review.csv whose column verdict holds review decisions (right, wrong, drop)."
    )
    dry_run: bool = option(False, "Check everything, print what the run will cost, and end; nothing is written.")  # noqa: FBT003


_KINDS: Any = (TrainArguments, ROPOConfig)


class DataclassParser(SentenceParser, HfArgumentParser):
    """A parser with an option for each field of some dataclasses."""


def training_parser(command: str) -> DataclassParser:
    """The options of `ropo train` and `ropo audit`; the names of recipes are not among them."""
    return DataclassParser(command, dataclass_types=_KINDS)


def parse_train(words: Sequence[str], *, command: str = "train") -> tuple[TrainArguments, ROPOConfig]:
    """Read the options of `ropo train` or `ropo audit`: a YAML file gives defaults, the command line wins.

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
    given.check()
    if given.eval_dataset_name is None and given.eval_dataset_split != "train":
        raise ValueError("eval_dataset_split needs eval_dataset_name, of which it is a part. Add it.")


def parse_options(kind: type[Options], words: Sequence[str], *, command: str) -> Options:
    """Read the options of a command that one dataclass describes.

    Raises:
        ValueError: If an option is unknown, missing or out of range.
    """
    return kind(**vars(DataclassParser(command, dataclass_types=kind).read(words)))


def model_of(given: TrainArguments) -> Model:
    """The model to align, with its adapter and how it is loaded.

    Raises:
        ValueError: If it is an adapter, and options say what a new one is to be like.
    """
    name, options = str(given.model_name_or_path), given.load_options()
    source = Model(name, load_options=options)
    if source.start is None:
        if given.trains_adapter and not given.use_peft:
            logger.info("An adapter is trained, as if use_peft had been given.")
        return Model(name, adapter=given.new_adapter(), load_options=options)
    if given.of_new_adapter():
        raise ValueError(
            f"{given.of_new_adapter()[0]} needs a whole model, which gets a new adapter; got {name}, an adapter that "
            "is trained further as it is. Leave it out, or merge the adapter into its model first."
        )
    return source


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

    Raises:
        FileNotFoundError: If something looks like a path and nothing is there.
        ValueError: If the model's folder holds no model.
    """
    data = [name for name in (given.dataset_name, given.eval_dataset_name) if name is not None]
    are_here = [are_all_here(name) for name in data] + [is_here(name) for name in [given.trusted] if name is not None]
    if not all(are_here):
        find_model(str(given.model_name_or_path))


def are_all_here(name: str) -> bool:
    """Whether a dataset, or each of several, is read from this machine; see `is_here`."""
    found = named_mixture(name)
    are_here = [is_here(part) for part in (found.parts if isinstance(found, Mixture) else [found])]  # each may raise
    return all(are_here)


def dataset_of(given: Any, name: str | None) -> str | HubDataset | Mixture | None:
    """A dataset by its name; the configuration is that of the dataset to train on, whatever part of it is meant.

    Raises:
        ValueError: If a configuration is given and there are several datasets.
    """
    found = None if name is None else named_mixture(name)
    if name is None or name != given.dataset_name or (given.dataset_config, given.dataset_data_dir) == (None, None):
        return found
    if isinstance(found, Mixture):
        raise ValueError(
            f"dataset_config and dataset_data_dir need one dataset; got {len(found.parts)}. Save the part that is "
            "meant, and name its folder."
        )
    return HubDataset(name=name, config=given.dataset_config, data_dir=given.dataset_data_dir)


def columns_of(given: Any) -> dict[str, str]:
    """Names of columns that differ from ours."""
    names = {name: getattr(given, f"{name}_column") for name in COLUMNS}
    return {ours: theirs for ours, theirs in names.items() if ours != theirs}


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
