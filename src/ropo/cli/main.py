"""`ropo demo | audit | train | bench | export | win_rate | validate | losses`.

In: the command line. Out: an exit code: 0 done, 1 the data, an endpoint or the result is not acceptable, 2 misuse,
70 a fault of ours, whose traceback is in a file, 130 or 143 interrupted by Ctrl-C or SIGTERM, 141 nobody reads the
output any more.

The one idea: parse first, import after. This file imports the standard library only, and so does what it imports: help,
version and typing mistakes are answered from files (`pages/`, written by `python -m ropo.cli.help`). A command is the
module of its name beside this one, imported when it is run.

Add a command: a module with `run(words) -> int`, a line in `COMMANDS` and in `_USAGE`, one in `help.PAGES`.
"""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from importlib import import_module, metadata
from pathlib import Path

from ropo import __version__
from ropo.cli.faults import DONE, MISUSE, explain, if_imported
from ropo.cli.interruption import how_to_resume, raising_interrupted
from ropo.cli.words import TRAINING, check_words, name_of_option, options_in, refuse_unknown
from ropo.spelling import did_you_mean

COMMANDS = ("demo", "audit", "train", "bench", "export", "win_rate", "validate", "losses")
PAGES = Path(__file__).parent / "pages"
INTERRUPTED = 128  # and the number of the signal, as shells have it: 130 for Ctrl-C, 141 for SIGPIPE, 143 for SIGTERM
_PATIENCE_SECONDS = 10.0  # that a process leaves the first one of its machine to say why it ends
_HELP = ("-h", "--help", "--help_all", "--help-all")

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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: Words after `ropo`; those of the process by default. If they are given, the caller is another
            program, and its signals and its KeyboardInterrupt stay what they are.

    Returns:
        Exit code.
    """
    if arguments is not None:
        return _run(list(arguments), [])
    words, stage = sys.argv[1:], ""
    with raising_interrupted() as received:
        try:
            code = _run(words, received)
        except KeyboardInterrupt as error:
            if not received:  # whoever raised it knows better
                raise
            stage = next(iter(getattr(error, "__notes__", [])), "")
    if not received:
        return code
    if os.environ.get("RANK", "0") == "0":
        command = words[0] if words else ""
        start = "\n" if sys.stderr.isatty() else ""  # after ^C, or a line that shows progress
        print(f"{start}ropo {command}: {how_to_resume(command, received[0], stage)}", file=sys.stderr)
    code = INTERRUPTED + received[0]
    asking = if_imported("ropo.endpoint.pool", "ASKING")
    if asking and any(thread.name.startswith(asking) for thread in threading.enumerate()):
        sys.stdout.flush()
        os._exit(code)  # Python would wait for the server's answer, for minutes
    return code


def _run(words: list[str], received: Sequence[int]) -> int:
    """Run a command.

    Raises:
        KeyboardInterrupt: If a signal was received, whatever a library has made of it.
    """
    try:
        code = _answer(words)
        if code is None:
            code = _run_command(words, received)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # whoever reads our output has seen enough, as in `ropo losses | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return INTERRUPTED + signal.SIGPIPE
    except Exception as error:
        if received:
            raise KeyboardInterrupt from error
        code, sentence = explain(error, words)
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(_PATIENCE_SECONDS)  # most often all fail alike; where the first has said it, this one is ended
        print(sentence, file=sys.stderr)
        return code


def _run_command(words: Sequence[str], received: Sequence[int]) -> int:
    import_module("ropo.cli.console").log_to_console()
    code: int | None = None
    if words[0] in TRAINING:
        code = import_module("ropo.cli.launcher").launch(words[0], words[1:])
    if code is None:
        command = import_module(f"ropo.cli.{words[0]}")
        if received:  # and a library that was being imported went on
            raise KeyboardInterrupt
        code = command.run(words[1:])
    return code


def _answer(words: Sequence[str]) -> int | None:
    """Exit code where no command is to be run; None where one is.

    Raises:
        ValueError: If the command does not know an option, or an option has no value or several.
    """
    if not words or words[0] in ("-h", "--help"):
        print(_USAGE)
        return DONE if words else MISUSE
    if words[0] == "--version":
        print(f"ropo {__version__}")
        return DONE
    command, *rest = words
    if command not in COMMANDS:
        close = did_you_mean(command, [*COMMANDS, "--help", "--version"])
        print(f"ropo needs one of {', '.join(COMMANDS)}; got {command!r}.{close}", file=sys.stderr)
        return MISUSE
    end = rest.index("--") if "--" in rest else len(rest)
    if asked := [word for word in rest[:end] if word in _HELP]:
        every = PAGES / f"{command}_all.txt"
        is_every = any("all" in word for word in asked) and every.exists()
        print((every if is_every else PAGES / f"{command}.txt").read_text("utf-8"), end="")
        return DONE
    check_words(rest)
    _refuse_unknown_options(command, rest)
    return None


def _refuse_unknown_options(command: str, words: Sequence[str]) -> None:
    """Another version of `transformers` may know other options than the names that are written down.

    Raises:
        ValueError: If a word names no option of the command.
    """
    written = json.loads((PAGES / "names.json").read_text("utf-8"))
    known = written["options"][command]
    unknown = [word for word in options_in(words) if name_of_option(word) not in known]
    if unknown and (command not in TRAINING or metadata.version("transformers") == written["transformers"]):
        renamed = written["renamed"] if command in TRAINING else {}
        refuse_unknown(
            unknown, known, command=command, instead=lambda name: f" {renamed[name]}" if name in renamed else ""
        )


if __name__ == "__main__":
    sys.exit(main())
