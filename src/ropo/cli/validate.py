"""`ropo validate`: every problem of a dataset.

In: words. Out: an exit code; the problems, on the standard output.
"""

import argparse
import dataclasses
from collections.abc import Sequence

from ropo.cli.arguments import TrainArguments, are_all_here, columns_of, dataset_of
from ropo.cli.faults import DONE, NOT_ACCEPTABLE
from ropo.cli.parser import SentenceParser
from ropo.data.load import Loaded
from ropo.data.mixture import load_mixture
from ropo.data.problems import Problem, printable, render, rows_left_out
from ropo.data.tokenize import tokenize_pairs
from ropo.data.validate import validate_pairs
from ropo.models.fit import check_ids, check_positions, ids_of
from ropo.models.source import Model, find_model


def parser() -> SentenceParser:
    """The options of the command, in the spellings of `ropo train`, too."""
    found = SentenceParser("validate")
    found.add_argument("dataset", nargs="?", help="File, folder of shards or saved folder, or hub id.")
    found.add("dataset_name", help="Another way to name it, as in `ropo train`.")
    found.add("dataset_split", "split", default="train", help="Part of the dataset to read.")
    found.add("dataset_config", help="Configuration (subset) of a hub dataset, where it has several.")
    found.add("dataset_data_dir", help="Folder inside a hub dataset.")
    for option in dataclasses.fields(TrainArguments):
        if option.name.endswith("_column"):
            found.add(option.name, default=option.default, help=option.metadata["help"])
    found.add("model_name_or_path", help="Check lengths too, with this model's tokenizer.")
    found.add("model_revision", help="Branch, tag or commit of a hub model.")
    found.add("max_length", type=int, default=1024, help="Most tokens of prompt and one response together.")
    return found


def run(words: Sequence[str]) -> int:
    """List the problems.

    Returns:
        Exit code; that of data that is not acceptable if a problem must be fixed.
    """
    given = parser().read(words)
    if (given.dataset is None) == (given.dataset_name is None):
        got = "none" if given.dataset is None else f"{given.dataset} and {given.dataset_name}"
        raise ValueError(f"ropo validate needs one dataset; got {got}. Usage: ropo validate D")
    given.dataset_name = given.dataset_name or given.dataset
    are_all_here(given.dataset_name)  # refuses a misspelt path before the hub is asked for a model
    source = tokenized = None
    if given.model_name_or_path:
        source = Model(find_model(given.model_name_or_path), load_options={"revision": given.model_revision})
        skeleton = source.skeleton()
        tokenizer = source.tokenizer
    loaded = load_mixture(dataset_of(given, given.dataset_name), split=given.dataset_split, columns=columns_of(given))
    problems = [*loaded.problems, *validate_pairs(loaded.pairs)]
    if source is not None:
        out = rows_left_out(problems)
        rest = [pair for pair in loaded.pairs if pair.row not in out]
        tokenized = tokenize_pairs(rest, tokenizer, max_length=given.max_length)
        problems += tokenized.problems
    _say(given, loaded, problems)
    out = rows_left_out(problems)
    if not any(pair.row not in out for pair in loaded.pairs):
        print("No pair is left to train on.")
        return NOT_ACCEPTABLE
    if source is not None and tokenized is not None:
        check_positions(source, skeleton, tokenized)  # as the training does, which could not go on
        check_ids(skeleton, tokenizer, ids_of(tokenized.pairs, tokenized.tokens), name_or_path=source.name_or_path)
    must_fix = any(problem.severity in ("fatal", "error") for problem in problems)
    return NOT_ACCEPTABLE if must_fix else DONE


def _say(given: argparse.Namespace, loaded: Loaded, problems: Sequence[Problem]) -> None:
    columns = "" if loaded.layout == "own" else f", columns as {loaded.layout}"
    layout = f"{loaded.format or 'unknown'}{columns}"
    print(f"{given.dataset_name}: {loaded.num_rows} rows, {len(loaded.pairs)} pairs, layout {layout}.")
    print(render(problems) if problems else "No problems found.")
    if loaded.ignored_columns:
        print(f"Columns that nothing reads: {', '.join(map(printable, loaded.ignored_columns))}.")
