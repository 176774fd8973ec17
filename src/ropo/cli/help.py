"""Write the help pages and the names of the options: `python -m ropo.cli.help` (`make help-pages`).

In: the parsers of all commands. Out: `pages/*.txt` and `pages/names.json`, which `ropo X --help` prints and a typing
mistake is looked up in, without importing what the parsers are made of.

The one idea: what an option means, its type and its default come from the parser, which has them from the fields of
dataclasses and their `metadata["help"]`. Here stands only which options are shown where.

Add an option: nothing to do here; it is shown by `--help_all` under "More". To show it elsewhere, add its name to
`groups.py`.
"""

import argparse
import dataclasses
import json
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from types import MappingProxyType
from typing import Any

import transformers

from ropo.cli import bench, demo, losses, validate
from ropo.cli.arguments import DataclassParser, training_parser
from ropo.cli.groups import AUDIT, EVERY, IDLE, OLD_NAMES, ONLY_IN_TRAIN, REFUSED, TEXTS, TRAIN, Groups
from ropo.cli.main import PAGES as FOLDER
from ropo.cli.parser import SentenceParser
from ropo.cli.words import TRAINING
from ropo.evaluate.options import ExportArguments, WinRateArguments
from ropo.train.options import renamed

WIDTH = 100
_COLUMN = 32  # where the meaning of an option begins


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """What a help page says beside its options.

    Attributes:
        parser: Makes the parser of the command.
        usage: The command with what it needs.
        text: What it does.
        example: A command line.
        groups: Titles, and the names of the options under each; none for all options under one title.
    """

    parser: Callable[[], SentenceParser]
    usage: str
    text: str
    example: str
    groups: Groups = field(default_factory=dict)


_TRAIN_EXAMPLE = (
    "ropo train --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name pairs.jsonl \\\n"
    "      --output_dir outputs/aligned --use_peft --learning_rate 1e-5 --bf16"
)
_AUDIT_EXAMPLE = (
    "ropo audit --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name pairs.jsonl \\\n"
    "      --output_dir outputs/audit --bf16"
)
PAGES: Mapping[str, Page] = MappingProxyType(
    {
        "demo": Page(
            parser=demo.parser,
            usage="ropo demo [--option value]",
            text="Align a tiny language model with DPO and with ROPO on labels of which a known share is flipped, and "
            "compare. Runs offline on a laptop, in a few minutes.",
            example="ropo demo --flip_rate 0.2 --output_dir outputs/demo",
        ),
        "audit": Page(
            parser=partial(training_parser, "audit"),
            usage="ropo audit --model_name_or_path M --dataset_name D --output_dir O [--option value]",
            text="Estimate how many preference labels are wrong, and which. Writes a report, a table for human review "
            "and a cleaned dataset; no model is kept.",
            example=_AUDIT_EXAMPLE,
            groups=AUDIT,
        ),
        "train": Page(
            parser=partial(training_parser, "train"),
            usage="ropo train --model_name_or_path M --dataset_name D --output_dir O [--option value]",
            text="Align a model on preference pairs whose labels are partly wrong: audit the labels, filter the pairs, "
            "train. Writes the model, a table of all decisions and a report.",
            example=_TRAIN_EXAMPLE,
            groups=TRAIN,
        ),
        "bench": Page(
            parser=bench.parser,
            usage="ropo bench --config grid.yaml --output_dir O [--num_processes N]",
            text="Compare methods on labels that are flipped on purpose, over flip rates and seeds. Rerun the same "
            "command to resume.",
            example="ropo bench --config benchmarks/quick.yaml --output_dir outputs/bench",
        ),
        "export": Page(
            parser=lambda: DataclassParser("export", dataclass_types=ExportArguments),
            usage="ropo export --model_name_or_path M --benchmark B --questions FILE --output_dir O [--option value]",
            text="Answer the questions of a benchmark and write the answers in its own format.",
            example="ropo export --model_name_or_path outputs/aligned --benchmark alpaca_eval \\\n"
            "      --questions alpaca_eval.json --output_dir outputs/answers",
        ),
        "win_rate": Page(
            parser=lambda: DataclassParser("win_rate", dataclass_types=WinRateArguments),
            usage="ropo win_rate --outputs A.json --baseline B.json --output_dir O --judge J --judge_model M",
            text="Have a judge compare two models' outputs, each pair in both orders, and report the win rate with its "
            "interval.",
            example="ropo win_rate --outputs A.json --baseline B.json --output_dir outputs/win_rate \\\n"
            "      --judge reward_model --judge_model path/to/reward_model",
        ),
        "validate": Page(
            parser=validate.parser,
            usage="ropo validate D [--option value]",
            text="List every problem of a dataset, by row. The exit code is 1 if one must be fixed.",
            example="ropo validate pairs.jsonl --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct",
        ),
        "losses": Page(
            parser=losses.parser,
            usage="ropo losses",
            text="List the losses with their formulas, papers and options.",
            example="ropo losses",
        ),
    }
)


_INHERITED = {option.name for option in dataclasses.fields(transformers.TrainingArguments)}
_LOSSES: Mapping[str, tuple[str, ...]] = MappingProxyType({"train": ("The losses, and what each takes: ropo losses",)})


def pages() -> dict[str, str]:
    """All files of `pages/` by name, as they should be."""
    options = {command: _options(page, command) for command, page in PAGES.items()}
    names = {command: sorted(_names(page, command)) for command, page in PAGES.items()}
    every = {f"{command}_all.txt": _every(command, options[command]) for command in TRAINING}
    short = {f"{command}.txt": _short(command, options[command]) for command in PAGES}
    written = (
        json.dumps(
            {"transformers": transformers.__version__, "options": names, "renamed": renamed()},
            indent=1,
            ensure_ascii=False,
        )
        + "\n"
    )
    return {**short, **every, "names.json": written}


def _names(page: Page, command: str) -> list[str]:
    return [*page.parser().names(), *(["config"] if command in TRAINING else [])]


def _options(page: Page, command: str) -> dict[str, argparse.Action]:
    found = {action.dest: action for action in page.parser().options()}
    if command in TRAINING:  # a file of options is read before them
        parser = SentenceParser(command)
        parser.add("config")
        found |= {action.dest: action for action in parser.options()}
    return found


def _short(command: str, options: Mapping[str, argparse.Action]) -> str:
    page = PAGES[command]
    groups = _existing(page.groups or ({"Options": tuple(options)} if options else {}), options)
    more = [f"All options: ropo {command} --help_all"] if command in TRAINING else []
    return _render(page, groups, options, [*more, *_LOSSES.get(command, ())])


def _every(command: str, options: Mapping[str, argparse.Action]) -> str:
    page = PAGES[command]
    left_out = {*REFUSED, *IDLE, *OLD_NAMES}
    added = dict(EVERY)
    if command == "audit":
        left_out |= {*ONLY_IN_TRAIN, *added.pop("Rounds and resampling")}
    shown = {name for names in page.groups.values() for name in names}
    added = {title: tuple(name for name in names if name not in shown) for title, names in added.items()}
    shown |= {name for names in added.values() for name in names}
    rest = [name for name in options if name not in shown | left_out]
    groups = {
        **page.groups,
        **{title: (*page.groups.get(title, ()), *names) for title, names in added.items()},
        "More": tuple(name for name in rest if name not in _INHERITED),
        f"Of transformers.TrainingArguments, as in transformers {transformers.__version__}": tuple(
            name for name in rest if name in _INHERITED
        ),
    }
    return _render(page, _existing(groups, options), options, _LOSSES.get(command, ()))


def _existing(groups: Groups, options: Mapping[str, argparse.Action]) -> Groups:
    found = {title: tuple(name for name in names if name in options) for title, names in groups.items()}
    return {title: names for title, names in found.items() if names}


def _render(page: Page, groups: Groups, options: Mapping[str, argparse.Action], more: Sequence[str]) -> str:
    text = f"{page.text} Defaults stand in brackets." if groups else page.text
    lines = [f"usage: {page.usage}", "", *textwrap.wrap(text, WIDTH), "", "Example:", f"  {page.example}"]
    needed = dict(re.findall(r"--(\w+) (\S+)", re.sub(r"\[.*?\]", "", page.usage)))
    for title, names in groups.items():
        lines += ["", f"{title}:"]
        for name in names:
            lines += _entry(options[name], _meaning(options[name], is_training=bool(page.groups)), needed.get(name))
    lines += ["", *more] if more else []
    return "\n".join(lines) + "\n"


def _entry(action: argparse.Action, meaning: str, needed: str | None) -> list[str]:
    """An option with what it takes, its meaning and its default, in two columns.

    Args:
        action: The option.
        meaning: A sentence or more.
        needed: What it takes if it must be given; None if it need not.
    """
    head = f"  --{action.dest}" if action.option_strings else f"  {action.dest}"
    value = needed or _value(action)
    head = f"{head} {value}" if value else head
    if needed:
        meaning += " Required."
    elif action.option_strings and "default" not in meaning.lower():
        off = f"; --no_{action.dest} turns it off" if action.default is True else ""
        meaning += f" [{_shown(action.default)}{off}]"
    texts = textwrap.wrap(meaning, WIDTH - _COLUMN, break_on_hyphens=False)
    if len(head) > _COLUMN - 2:
        return [head, *(f"{'':{_COLUMN}}{text}" for text in texts)]
    first, *rest = texts
    return [f"{head:{_COLUMN}}{first}", *(f"{'':{_COLUMN}}{text}" for text in rest)]


def _value(action: argparse.Action) -> str:
    """What is written behind the name of an option; nothing for a switch, or for an argument without a name."""
    kind = getattr(action.type, "__name__", "")
    if not action.option_strings or action.nargs == "?":
        return ""
    taken = {"int": "N", "float": "X", "Path": "PATH", "string_to_bool": "true|false"}.get(kind, "TEXT")
    return f"{taken} ..." if action.nargs == "+" else taken


def _meaning(action: argparse.Action, *, is_training: bool) -> str:
    text = (is_training and TEXTS.get(action.dest)) or action.help or ""
    text = " ".join(text.replace("%%", "%").split())
    return text if text.endswith((".", "?", ")", "`")) else f"{text}."


def _shown(default: Any) -> str:
    if isinstance(default, bool):
        return "on" if default else "off"
    if default is None or default in ("", []):
        return "none"
    if isinstance(default, float):
        return f"{default:g}".replace("e-0", "e-")
    return str(default.value if isinstance(default, Enum) else default)


def write_pages() -> None:
    """Write every file of `pages/`, and remove what is none of them."""
    FOLDER.mkdir(exist_ok=True)
    made = pages()
    for path in FOLDER.iterdir():
        if path.name not in made:
            path.unlink()
    for name, text in made.items():
        (FOLDER / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write_pages()
