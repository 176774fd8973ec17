"""`ropo demo | audit | train | bench | export | win_rate | validate | losses`.

In: the command line. Out: an exit code: 0 done, 1 the data, an endpoint or the result is not acceptable, 2 misuse,
70 a fault of ours, whose traceback is in a file, 130 or 143 interrupted by Ctrl-C or SIGTERM, 141 nobody reads the
output any more.
"""

import argparse
import dataclasses
import logging
import os
import re
import shlex
import signal
import sys
import tempfile
import threading
import time
import traceback
import typing
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from accelerate import PartialState
from peft import LoraConfig
from rich.console import Console
from rich.logging import RichHandler
from transformers import HfArgumentParser
from transformers.utils import logging as transformers_logging

from ropo import __version__
from ropo.cli.interruption import raising_interrupted
from ropo.config import ROPOConfig
from ropo.data.load import load_pairs
from ropo.data.problems import printable, render, rows_left_out
from ropo.data.read import HubDataset
from ropo.data.tokenize import tokenize_pairs
from ropo.data.validate import DataError, validate_pairs
from ropo.endpoint.client import EndpointError
from ropo.endpoint.pool import ASKING
from ropo.evaluate.answers import export_answers
from ropo.evaluate.measures import Mean
from ropo.evaluate.options import ExportArguments, WinRateArguments
from ropo.evaluate.win_rate import run_win_rate
from ropo.losses import methods_table
from ropo.models.fit import check_ids, check_positions, ids_of
from ropo.models.source import Model, find_model, load_tokenizer
from ropo.noise.reading import WIDE_RANGE
from ropo.options import (
    check_choice,
    check_folder,
    check_options,
    check_words,
    did_you_mean,
    name_of_option,
    read_yaml,
    short,
)
from ropo.provenance import RunError, typed
from ropo.run.align import run_audit, run_rounds
from ropo.run.inputs import DataSource, ReviewInputs
from ropo.run.lock import owning
from ropo.train.options import instead_of
from ropo_bench.demo import run_demo
from ropo_bench.grid import run_bench
from ropo_bench.grid_config import read_bench_config
from ropo_bench.publish import publish_bench

DONE, NOT_ACCEPTABLE, MISUSE, OUR_FAULT = 0, 1, 2, 70
INTERRUPTED = 128  # and the number of the signal, as shells have it: 130 for Ctrl-C, 141 for SIGPIPE, 143 for SIGTERM
Options = TypeVar("Options")
COLUMNS = ("prompt", "chosen", "rejected", "annotator")
DTYPES = ("float32", "bfloat16", "float16", "auto")


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class TrainArguments:
    """Which model and data `ropo train` and `ropo audit` take; everything else is in `ROPOConfig`."""

    model_name_or_path: str | None = _option(None, "Folder or hub id of the model to align; it is also the reference.")
    dataset_name: str | None = _option(
        None, "File (.jsonl, .json, .jsonl.gz, .parquet, .csv), folder of shards or saved folder, or hub id."
    )
    dataset_config: str | None = _option(
        None,
        "Configuration (subset) of a hub dataset, where it has several. Of the evaluation set, too, if it is the same.",
    )
    dataset_data_dir: str | None = _option(None, "Folder inside a hub dataset, likewise.")
    dataset_split: str = _option("train", "Part of the dataset to read, where it has several.")
    eval_dataset_name: str | None = _option(
        None, "Pairs that nothing is trained on, to score the model of every round. A finished run takes them, too."
    )
    eval_dataset_split: str = _option("train", "Part of the evaluation set to read, where it has several.")
    prompt_column: str = _option("prompt", "Name of the column with prompts.")
    chosen_column: str = _option("chosen", "Name of the column with preferred responses.")
    rejected_column: str = _option("rejected", "Name of the column with the other responses.")
    annotator_column: str = _option("annotator", "Name of the column that says who labelled the pair.")
    trusted: str | None = _option(
        None,
        "File of pairs whose labels are known to be right; 50 to 200 help. Those of the data may be among them.",
    )
    decisions: str | None = _option(
        None, "A review.csv whose column verdict holds review decisions (right, wrong, drop)."
    )
    dtype: str = _option(
        "float32",
        "Of the weights: float32 trains best (--bf16 computes fast); auto, bfloat16, float16. With --use_peft and "
        "--bf16, bfloat16 halves what the frozen weights take.",
    )
    attn_implementation: str | None = _option(
        None,
        "Attention. Default: what transformers takes for the model, mostly sdpa, which can encode each prompt once per "
        "pair, as eager can.",
    )
    model_revision: str | None = _option(None, "Branch, tag or commit of a hub model.")
    trust_remote_code: bool = _option(False, "Run code that a hub model brings. Read it first.")  # noqa: FBT003
    use_peft: bool = _option(False, "Train a LoRA adapter instead of the whole model.")  # noqa: FBT003
    lora_r: int = _option(16, "Rank of the adapter.")
    lora_alpha: int = _option(32, "Scale of the adapter.")
    lora_dropout: float = _option(0.0, "Dropout of the adapter.")
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Modules that get an adapter. Default: all linear layers but the head."}
    )


_KINDS: Any = (TrainArguments, ROPOConfig)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: Words after `ropo`; those of the process by default. If they are given, the caller is another
            program, and its signals and its KeyboardInterrupt stay what they are.

    Returns:
        Exit code.
    """
    if arguments is not None:
        return _run(list(arguments))
    words, stage = sys.argv[1:], ""
    with raising_interrupted() as received:
        try:
            code = _run(words)
        except KeyboardInterrupt as error:
            if not received:  # whoever raised it knows better
                raise
            stage = next(iter(getattr(error, "__notes__", [])), "")
    if not received:
        return code
    if os.environ.get("RANK", "0") == "0":
        command = words[0] if words else ""
        print(f"ropo {command}: {_how_to_go_on(command, received[0], stage)}", file=sys.stderr)
    code = INTERRUPTED + received[0]
    if any(thread.name.startswith(ASKING) for thread in threading.enumerate()):
        sys.stdout.flush()
        os._exit(code)  # Python would wait for the server's answer, for minutes
    return code


def _how_to_go_on(command: str, number: int, stage: str) -> str:
    """What a command that was interrupted has kept."""
    what = f"interrupted by {'Ctrl-C' if number == signal.SIGINT else signal.Signals(number).name}"
    if stage:
        return f"{what} in stage {stage}. The same command resumes there, from its last checkpoint if it has one."
    return f"{what}." if command in ("validate", "losses") else f"{what}. The same command resumes from what is done."


def _run(words: list[str]) -> int:
    commands = {
        "demo": _demo,
        "audit": _audit,
        "train": _train,
        "bench": _bench,
        "export": _export,
        "win_rate": _win_rate,
        "validate": _validate,
        "losses": _losses,
    }
    if (code := _answered(words, commands)) is not None:
        return code
    _log_to_console()
    try:
        check_words(words[1:])
        code = commands[words[0]](words[1:])
        sys.stdout.flush()
        return code
    except (DataError, EndpointError) as error:
        print(f"ropo {words[0]}: {error}", file=sys.stderr)
        return NOT_ACCEPTABLE
    except BrokenPipeError:  # whoever reads our output has seen enough, as in `ropo losses | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return INTERRUPTED + signal.SIGPIPE
    except (RunError, FloatingPointError, MemoryError, torch.OutOfMemoryError) as error:
        if os.environ.get("ROPO_DEBUG"):
            raise
        print(f"ropo {words[0]}: {str(error) or 'the memory of this machine is not enough.'}", file=sys.stderr)
        return NOT_ACCEPTABLE
    except (ValueError, OSError, ImportError) as error:  # an option may need a package that is not there
        if os.environ.get("ROPO_DEBUG"):
            raise
        print(f"ropo {words[0]}: {error}\n(ROPO_DEBUG=1 shows where in the code this was found.)", file=sys.stderr)
        return MISUSE
    except Exception as error:
        if os.environ.get("ROPO_DEBUG"):
            raise
        print(_say_fault(words, error), file=sys.stderr)
        return OUR_FAULT


def _answered(words: Sequence[str], commands: Collection[str]) -> int | None:
    """Exit code where no command is to be run; None where one is."""
    if not words or words[0] in ("-h", "--help"):
        print(_USAGE)
        return DONE if words else MISUSE
    if words[0] == "--version":
        print(f"ropo {__version__}")
        return DONE
    if words[0] not in commands:
        print(
            f"ropo needs one of {', '.join(commands)}; got {words[0]!r}.{did_you_mean(words[0], commands)}",
            file=sys.stderr,
        )
        return MISUSE
    return None


def _log_to_console() -> None:
    logging.basicConfig(
        level=logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR,
        format="%(message)s",
        handlers=[RichHandler(show_path=False, markup=False)],
        force=True,
    )
    logging.getLogger("httpx").setLevel(logging.WARNING)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()  # loading and writing shards takes a second; training keeps its bar


def _say_fault(words: Sequence[str], error: Exception) -> str:
    """One sentence on what nobody has foreseen; where it came from is kept in a file, without tokens."""
    head, *rest = f"{type(error).__name__}: {error}".splitlines()
    lines = "".join(traceback.format_exception(error))
    report = f"ropo {__version__}: {shlex.join(['ropo', *_without_secrets(words)])}\n\n{lines}"
    for secret in _secrets(words):
        head, report = head.replace(secret, "..."), report.replace(secret, "...")
    with tempfile.NamedTemporaryFile(
        "w", prefix=f"ropo-{words[0]}-", suffix=".txt", delete=False, encoding="utf-8", errors="backslashreplace"
    ) as file:
        file.write(report)
    return (
        f"ropo {words[0]} stopped by a fault of its own ({head[:300]}{' ...' if rest or head[300:] else ''}). Please "
        f"report it with {file.name}, which holds the traceback; ROPO_DEBUG=1 shows it at once."
    )


def _secrets(words: Sequence[str]) -> list[str]:
    """Values of tokens that stand on the command line, and of keys in the environment."""
    hidden = [given for given, shown in zip(words, _without_secrets(words), strict=True) if given != shown]
    named = [value for name, value in os.environ.items() if name.endswith(("_KEY", "_TOKEN"))]
    found = [*(word.rpartition("=")[2] if word.startswith("--") else word for word in hidden), *named]
    return sorted({secret for secret in found if len(secret) >= 4}, key=len, reverse=True)


_USAGE = """\
ropo: align language models on preference data whose labels are partly wrong

  ropo demo                          see it work in a few minutes on a laptop, offline
  ropo audit --model_name_or_path M --dataset_name D --output_dir O [--config recipe.yaml] [--option value]
                                     how many labels are wrong, and which
  ropo train --model_name_or_path M --dataset_name D --output_dir O [--config recipe.yaml] [--option value]
                                     align a model on what is right
  ropo bench --config grid.yaml --output_dir O
                                     compare methods on noise whose truth is known
  ropo export --model_name_or_path M --benchmark B --questions FILE --output_dir O
                                     answers for AlpacaEval, MT-Bench or Arena-Hard, in their own formats
  ropo win_rate --outputs A.json --baseline B.json --output_dir O --judge J --judge_model M
                                     how often a judge prefers one model's outputs to another's
  ropo validate D                    list every problem of a dataset; exit code 1 if one must be fixed
  ropo losses                        the losses, their formulas, papers and options

`ropo COMMAND --help` lists the options; `ropo --version` says the version."""


def _demo(words: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "ropo demo", allow_abbrev=False, description="See ROPO and DPO on labels of which a known share is flipped."
    )
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/demo"), help="Where everything is written.")
    parser.add_argument("--flip_rate", type=float, default=0.3, help="Share of labels to flip, [0, 0.5).")
    parser.add_argument("--num_pairs", type=int, default=4000, help="Training pairs.")
    parser.add_argument("--seed", type=int, default=0, help="Random seed.")
    given = parser.parse_args(words)
    if not 0 <= given.flip_rate < 0.5:
        raise ValueError(f"flip_rate needs a number in [0, 0.5); got {given.flip_rate}.")
    for name, lowest, highest in (("num_pairs", 10, 10**6), ("seed", 0, 2**31)):  # ten pairs make five folds
        if not lowest <= getattr(given, name) <= highest:
            raise ValueError(f"{name} needs a number from {lowest} to {highest}; got {getattr(given, name)}.")
    check_folder("output_dir", given.output_dir)
    folder, flip_rate, num_pairs, seed = given.output_dir, given.flip_rate, given.num_pairs, given.seed
    with owning(folder):
        run_demo(folder, flip_rate=flip_rate, num_pairs=num_pairs, seed=seed, console=Console())
    return DONE


def _model(given: TrainArguments) -> Model:
    options = {
        "dtype": given.dtype,
        **({} if given.attn_implementation is None else {"attn_implementation": given.attn_implementation}),
        "revision": given.model_revision,
        "trust_remote_code": given.trust_remote_code,
    }
    return Model(str(given.model_name_or_path), adapter=_adapter(given), load_options=options)


def _pairs(given: TrainArguments) -> DataSource:
    return DataSource(_dataset(given, given.dataset_name), split=given.dataset_split, columns=_columns(given))


def _review(given: TrainArguments) -> ReviewInputs:
    return ReviewInputs(trusted=given.trusted, decisions=given.decisions)


def _typed(task: str, words: list[str]) -> str:
    return shlex.join(["ropo", task, *_without_secrets(words)])


def _without_secrets(words: Sequence[str]) -> list[str]:
    """The words with `...` in place of a token: the report shows what was typed."""
    found: list[str] = []
    is_value = False
    for word in words:
        name, is_joined, _ = word.partition("=")
        is_secret = name.replace("-", "_").startswith("__") and name.replace("-", "_").endswith("_token")
        if is_secret and is_joined:
            found.append(f"{name}=...")
        else:
            found.append("..." if is_value else word)
        is_value = is_secret and not is_joined
    return found


def _dataset(given: Any, name: str | None) -> str | HubDataset | None:
    """A dataset by its name; the configuration is that of the dataset to train on, whatever part of it is meant."""
    if name is None or name != given.dataset_name or (given.dataset_config, given.dataset_data_dir) == (None, None):
        return name
    return HubDataset(name=name, config=given.dataset_config, data_dir=given.dataset_data_dir)


def _columns(given: Any) -> dict[str, str]:
    """Names of columns that differ from ours."""
    names = {name: getattr(given, f"{name}_column") for name in COLUMNS}
    return {ours: theirs for ours, theirs in names.items() if ours != theirs}


def _say_rate(summary: dict[str, Any]) -> None:
    rate = summary["flip_rate"]
    if not summary["is_informative"]:
        print(f"\nFlipped labels: cannot tell. {summary['reason']}")
        _say_contradicted(summary)
        return
    print(f"\nFlipped labels: {rate['estimate']:.1%}, 90 % interval {rate['low']:.1%} to {rate['high']:.1%}.")
    if rate["high"] - rate["low"] > WIDE_RANGE:
        _say_contradicted(summary)
    for one in summary["annotators"][:5]:
        own = f"{one['rate']:.1%} ({one['low']:.1%} to {one['high']:.1%})"
        print(f"  {printable(one['name'])}: {own}, {one['num_pairs']} pairs")


def _say_contradicted(summary: dict[str, Any]) -> None:
    """What stands first in the table for a person though nobody can say whether it is wrong."""
    num = summary["num_contradicted"]
    if not num:  # or None, without models that have not seen the labels
        return
    what = (
        "How many of these are flips and how many honest doubt can be told no closer"
        if summary["is_informative"]
        else "Whether these are flips or honest doubt cannot be told"
    )
    where = "first in review.csv" if summary["task"] == "audit" else "lowest by held_out_margin in ledger.parquet"
    print(
        f"  {num} of the labels are contradicted by models that have not seen them. {what}; they stand "
        f"{where}: read the first ones."
    )


def _audit(words: list[str]) -> int:
    given, args = parse_train(words, task="audit")
    if given.eval_dataset_name is not None:
        logging.getLogger(__name__).warning("An audit keeps no model, so eval_dataset_name does nothing here.")
    with typed(_typed("audit", words)):
        summary = run_audit(_model(given), _pairs(given), args, review=_review(given)).summary
    if not PartialState().is_main_process:
        return DONE
    _say_rate(summary)
    folder = Path(str(args.output_dir))
    print(
        f"Training would keep {summary['num_kept']} pairs, drop {summary['num_dropped']} and flip "
        f"{summary['num_flipped']}.\n"
        f"To train on: {folder / 'cleaned.jsonl'}\n"
        f"To correct:  {folder / 'review.csv'}   (fill in `verdict`: right, wrong or drop; then ropo train --decisions "
        f"that file --audit_from {folder} --output_dir another)\n"
        f"Report:      {folder / 'report.html'}   <- look here next"
    )
    return DONE


def _train(words: list[str]) -> int:
    given, args = parse_train(words)
    evaluation = _dataset(given, given.eval_dataset_name)
    source = None if evaluation is None else DataSource(evaluation, split=given.eval_dataset_split)
    with typed(_typed("train", words)):
        result = run_rounds(_model(given), _pairs(given), args, eval_dataset=source, review=_review(given))
    summary = result.summary
    if not PartialState().is_main_process:
        return DONE
    _say_rate(summary)
    folder = Path(str(args.output_dir))
    print(
        f"Pairs: {summary['num_kept']} kept, {summary['num_dropped']} dropped, {summary['num_flipped']} flipped, "
        f"{summary['num_resampled']} resampled. rho {summary['rho']:.3f}, alpha {summary['alpha']:.2f}."
    )
    if found := summary["evaluation"]:
        last = found["rounds"][-1]
        print(
            f"Evaluation accuracy: {last['accuracy']:.1%}, 90 % interval {last['low']:.1%} to {last['high']:.1%}, on "
            f"{found['num_pairs']} pairs that nothing was trained on."
        )
    print(
        f"Model:  {folder}\nLedger: {folder / 'ledger.parquet'}\nReport: {folder / 'report.html'}   <- look here next"
    )
    return DONE


def _export(words: list[str]) -> int:
    given = parse_options(ExportArguments, words, task="export")
    with owning(Path(str(given.output_dir)) / "export" / str(given.name)):  # other models may answer beside it
        found = export_answers(given)
    if not PartialState().is_main_process:
        return DONE
    counts = [
        f"{found[f'num_{kind}']} {meaning}"
        for kind, meaning in (("unfinished", "cut at max_new_tokens"), ("empty", "empty"))
        if found[f"num_{kind}"]
    ]
    print(
        f"\n{found['num_questions']} questions, {found['num_answers']} answers of {found['mean_chars']:.0f} characters "
        f"on average{''.join(f', {count}' for count in counts)}.\n"
        f"Temperature {' or '.join(f'{value:g}' for value in found['temperatures'])}, top_p {given.top_p:g}, at most "
        f"{given.max_new_tokens} tokens.\n"
        f"Answers: {found['file']}   <- what {given.benchmark} reads"
    )
    if given.benchmark == "alpaca_eval":
        print(f"Next:    ropo win_rate --outputs {found['file']} --baseline B.json, or alpaca_eval itself")
    return DONE


def _win_rate(words: list[str]) -> int:
    given = parse_options(WinRateArguments, words, task="win_rate")
    with owning(Path(str(given.output_dir))):
        found = run_win_rate(given)
    if not PartialState().is_main_process:
        return DONE
    counts = found.counts
    total = sum(counts.values())
    print(
        f"\n{found.outputs} against {found.baseline} on {total} instructions: "
        f"{_rate(found.rate) if found.rate else 'cannot tell, since the judge has preferred no output'}.\n"
        f"Wins {counts['win']}, losses {counts['loss']}, ties {counts['tie']}, undecided {counts['undecided']}; "
        f"{counts['identical']} with identical outputs, which count for neither."
    )
    if counts["undecided"]:
        print(f"If all undecided were lost {found.lowest:.1%}, if all were won {found.highest:.1%}.")
    print(f"Mean length {found.mean_chars:.0f} characters, baseline {found.mean_chars_baseline:.0f}.")
    for length, rate in found.by_length.items():
        if rate:
            print(f"  {length.replace('_', ' ')}: {_rate(rate)} of {rate.count}")
    folder = Path(str(given.output_dir))
    print(f"Result: {folder / 'win_rate.json'}\nEach instruction: {folder / 'comparisons.jsonl'}   <- look here next")
    return DONE if found.rate else NOT_ACCEPTABLE


def _rate(rate: Mean) -> str:
    return f"{rate.value:.1%} won, 90 % interval {rate.low:.1%} to {rate.high:.1%}"


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


def _bench(words: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "ropo bench", allow_abbrev=False, description="Compare methods on noise whose truth is known."
    )
    parser.add_argument(
        "--config", type=Path, required=True, help="YAML file with the grid, like benchmarks/quick.yaml."
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="For rows, tables and figures; goes on there.")
    parser.add_argument("--num_processes", type=int, help="Trainings at a time. Default: one per GPU or core.")
    given = parser.parse_args(words)
    config = read_bench_config(given.config)
    if given.num_processes is not None and given.num_processes < 1:
        raise ValueError(f"num_processes needs 1 or more; got {given.num_processes}.")
    check_folder("output_dir", given.output_dir)
    start = time.monotonic()
    run_bench(
        config,
        given.output_dir,
        num_processes=given.num_processes,
        on_row=lambda what, number, total: print(f"[{number}/{total}] {what}", flush=True),
    )
    tables, *pictures = publish_bench(given.output_dir)
    print(
        f"Measured in {time.monotonic() - start:.0f} s.\nRows:     {given.output_dir / 'results.csv'}\n"
        f"Pictures: {', '.join(path.name for path in pictures)}\nTables:   {tables}   <- look here next"
    )
    return DONE


def _validate(words: list[str]) -> int:
    given = _validate_options(words)
    source = tokenized = None
    if given.model_name_or_path:
        source = Model(find_model(given.model_name_or_path), load_options={"revision": given.model_revision})
        skeleton = source.skeleton()
        tokenizer = load_tokenizer(source.name_or_path, source.load_options)
    dataset = _dataset(given, given.dataset_name)
    loaded = load_pairs(dataset, split=given.dataset_split, columns=_columns(given))
    problems = [*loaded.problems, *validate_pairs(loaded.pairs)]
    if source is not None:
        out = rows_left_out(problems)
        rest = [pair for pair in loaded.pairs if pair.row not in out]
        tokenized = tokenize_pairs(rest, tokenizer, max_length=given.max_length)
        problems += tokenized.problems
    columns = "" if loaded.layout == "own" else f", columns as {loaded.layout}"
    layout = f"{loaded.format or 'unknown'}{columns}"
    print(f"{given.dataset_name}: {loaded.num_rows} rows, {len(loaded.pairs)} pairs, layout {layout}.")
    print(render(problems) if problems else "No problems found.")
    if loaded.ignored_columns:
        print(f"Columns that nothing reads: {', '.join(map(printable, loaded.ignored_columns))}.")
    out = rows_left_out(problems)
    if not any(pair.row not in out for pair in loaded.pairs):
        print("No pair is left to train on.")
        return NOT_ACCEPTABLE
    if source is not None and tokenized is not None:
        check_positions(source, tokenized)  # as the training does, which could not go on
        check_ids(skeleton, tokenizer, ids_of(tokenized.pairs, tokenized.tokens), name_or_path=source.name_or_path)
    must_fix = any(problem.severity in ("fatal", "error") for problem in problems)
    return NOT_ACCEPTABLE if must_fix else DONE


def _validate_options(words: list[str]) -> argparse.Namespace:
    """The options of `ropo validate`, in the spellings of `ropo train`, too."""
    parser = argparse.ArgumentParser(
        "ropo validate", description="List every problem of a dataset.", allow_abbrev=False
    )

    def add(name: str, *others: str, **how: Any) -> None:
        spellings = dict.fromkeys((name, name.replace("_", "-"), *others))
        parser.add_argument(*(f"--{spelling}" for spelling in spellings), **how)

    parser.add_argument("dataset", nargs="?", help="File, saved folder or hub id.")
    add("dataset_name", help="Another way to say which dataset, as in `ropo train`.")
    add("dataset_split", "split", default="train", help="Part of the dataset to read.")
    add("dataset_config", help="Configuration (subset) of a hub dataset, where it has several.")
    add("dataset_data_dir", help="Folder inside a hub dataset.")
    add("model_name_or_path", help="Check lengths too, with this model's tokenizer.")
    add("model_revision", help="Branch, tag or commit of a hub model.")
    add("max_length", type=int, default=1024, help="Most tokens of prompt and one response together.")
    for name in COLUMNS:
        add(f"{name}_column", default=name, help=f"Name of the column with the {name}.")
    given, unknown = parser.parse_known_args(words)
    _refuse_unknown(unknown, list(vars(given)), task="validate")
    if (given.dataset is None) == (given.dataset_name is None):
        got = "none" if given.dataset is None else f"{given.dataset} and {given.dataset_name}"
        raise ValueError(f"ropo validate needs one dataset; got {got}. Usage: ropo validate D")
    given.dataset_name = given.dataset_name or given.dataset
    return given


def _losses(words: list[str]) -> int:
    argparse.ArgumentParser("ropo losses", description="The losses, their formulas, papers and options.").parse_args(
        words
    )
    print(methods_table())
    return DONE


_RECIPE = "--config FILE: a YAML file whose keys are options; what stands on the command line wins."
_EPILOGS = {"train": _RECIPE, "audit": f"{_RECIPE} Options of rounds and resampling do nothing here."}


def parse_train(words: Sequence[str], *, task: str = "train") -> tuple[TrainArguments, ROPOConfig]:
    """Read the options of `ropo train` or `ropo audit`: a YAML file gives defaults, the command line wins.

    Args:
        words: What follows `ropo train`.
        task: The command, for messages.

    Returns:
        Model and data, and the configuration.

    Raises:
        ValueError: If an option is unknown, missing or out of range.
    """
    config_parser = argparse.ArgumentParser(f"ropo {task}", add_help=False, allow_abbrev=False)
    config_parser.add_argument("--config", type=Path)
    config, rest = config_parser.parse_known_args(list(words))
    parser = _Parser(_KINDS, prog=f"ropo {task}", allow_abbrev=False, epilog=_EPILOGS[task])
    known = [f.name for kind in _KINDS for f in dataclasses.fields(kind)]
    recipe = {} if config.config is None else _read_recipe(config.config, parser, known)
    parser.set_defaults(**recipe)
    given, args, unknown = parser.parse_args_into_dataclasses(
        rest, return_remaining_strings=True, look_for_args_file=False
    )
    _refuse_unknown(unknown, known, task=task)
    for name, value in (
        ("model_name_or_path", given.model_name_or_path),
        ("dataset_name", given.dataset_name),
        ("output_dir", args.output_dir if "output_dir" in {*map(name_of_option, words), *recipe} else None),
    ):
        if not value:
            raise ValueError(
                f"--{name} is missing. Usage: ropo {task} --model_name_or_path M --dataset_name D --output_dir O"
            )
    check_options(given)
    check_choice("dtype", given.dtype, DTYPES)
    if given.eval_dataset_name is None and given.eval_dataset_split != "train":
        raise ValueError("eval_dataset_split needs eval_dataset_name, of which it is a part. Add it.")
    if given.use_peft and given.lora_r < 1:
        raise ValueError(f"lora_r needs 1 or more; got {given.lora_r}.")
    if given.use_peft and not 0 <= given.lora_dropout < 1:
        raise ValueError(f"lora_dropout needs a number in [0, 1); got {given.lora_dropout}.")
    for option in dataclasses.fields(TrainArguments):
        name = option.name
        if name.startswith("lora_") and not given.use_peft and getattr(given, name) != option.default:
            raise ValueError(f"{name} needs use_peft, without which the whole model is trained. Add --use_peft.")
    return given, args


def parse_options(kind: type[Options], words: Sequence[str], *, task: str) -> Options:
    """Read the options of a command that one dataclass describes.

    Args:
        kind: The dataclass; it checks itself.
        words: What follows the command.
        task: The command, for messages.

    Returns:
        The options.

    Raises:
        ValueError: If an option is unknown, missing or out of range.
    """
    parser = _Parser(kind, prog=f"ropo {task}", allow_abbrev=False)  # type: ignore[arg-type]
    given, unknown = parser.parse_known_args(list(words))
    _refuse_unknown(unknown, [f.name for f in dataclasses.fields(kind)], task=task)  # type: ignore[arg-type]
    return kind(**vars(given))


def _refuse_unknown(unknown: Sequence[str], known: Sequence[str], *, task: str) -> None:
    if unknown:
        name = name_of_option(unknown[0])
        instead = (instead_of(name) if task in _EPILOGS else "") or did_you_mean(name, known)
        raise ValueError(f"unknown option {unknown[0]}.{instead} `ropo {task} --help` lists all.")


class _Parser(HfArgumentParser):
    """Says what is wrong in one sentence, where `argparse` prints all options first."""

    def error(self, message: str) -> NoReturn:
        found = re.fullmatch(
            r"argument --(\w+)\S*: (?:invalid (\w+) value|Truthy value expected): (.*)", message, re.DOTALL
        )
        if found is None:
            raise ValueError(message.replace("argument --", "--", 1))
        name, kind, value = found.groups()
        if kind is None:
            value = repr(value.removeprefix("got ").partition(" but expected")[0])
        needs = {"int": "a whole number", "float": "a number", None: "true or false"}.get(kind, f"a {kind}")
        raise ValueError(f"{name} needs {needs}; got {value}.")


def _read_recipe(path: Path, parser: _Parser, known: Sequence[str]) -> dict[str, Any]:
    """Options of a YAML file, each as the command line would have read it."""
    recipe = read_yaml(path, as_text=True)
    kinds: dict[str, Any] = {name: kind for one in _KINDS for name, kind in typing.get_type_hints(one).items()}
    defaults = {option.name: option.default for kind in _KINDS for option in dataclasses.fields(kind)}
    for name, value in recipe.items():
        if name not in known:
            instead = instead_of(str(name)) or did_you_mean(name, known)
            raise ValueError(f"{path}: unknown option {name!r}.{instead} `ropo train --help` lists all.")
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


if __name__ == "__main__":
    sys.exit(main())
