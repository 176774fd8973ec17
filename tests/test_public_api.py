"""What `from ropo import ...` offers, and that nothing heavy happens before it is asked for."""

import resource
import subprocess
import sys

import pytest

import ropo
from ropo.cli.main import COMMANDS, main

NAMES = {
    "AuditResult", "DataError", "DataSource", "LOSSES", "Model", "Pair", "PairDataset", "PairLogps", "ROPOConfig",
    "ROPOTrainer", "ReviewInputs", "RunResult", "__version__", "decide", "estimate_flips", "flip_labels", "load_pairs",
    "margin", "run_audit", "run_rounds", "validate_pairs",
}  # fmt: skip


def test_names():
    assert set(ropo.__all__) == NAMES
    assert len(ropo.__all__) <= 21
    for name in NAMES:
        assert getattr(ropo, name) is not None
    assert dir(ropo) == sorted(NAMES)


def test_unknown_name():
    with pytest.raises(AttributeError, match="ROPOTrainer"):
        ropo.Trainer  # noqa: B018


HEAVY = ("torch", "transformers", "numpy", "rich", "yaml")
LIMIT_SECONDS = 1.5  # of CPU time; it takes 0.1 on an idle machine, and the imports of a run 6

ANSWERED_AT_ONCE = [
    ("", 2),
    ("--help", 0),
    ("--version", 0),
    ("trian", 2),
    ("train --lerning_rate 1", 2),
    ("losses --x", 2),
    ("train --beta 1 --beta 2", 2),
    *((f"{command} {word}", 0) for command in COMMANDS for word in ("--help", "--help_all")),
    *((f"{command} --no_such_option", 2) for command in COMMANDS),
]


def test_import_is_light():
    code = f"import sys, ropo; print([name for name in {HEAVY} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize("words", [words for words, _ in ANSWERED_AT_ONCE])
def test_the_command_answers_at_once(words):
    """Whatever needs no run needs no import."""
    code = "import sys; from ropo.cli.main import main; main(sys.argv[2:]); "
    code += "print([name for name in sys.argv[1].split(',') if name in sys.modules])"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-c", code, ",".join(HEAVY), *words.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"ropo {words}: {seconds:.2f} CPU seconds")  # noqa: T201
    assert done.stdout.splitlines()[-1] == "[]"
    assert seconds < LIMIT_SECONDS


def test_the_exit_code_of_an_answer(capsys):
    for words, expected in ANSWERED_AT_ONCE:
        assert main(words.split()) == expected, words
        said = capsys.readouterr()
        assert bool(said.err) == (expected != 0 and bool(words)), words
