"""Help pages are what the parsers say, and show what a command takes."""

import json
import re

import pytest
import transformers

from ropo.cli import help as made
from ropo.cli.arguments import parse_train
from ropo.cli.groups import AUDIT, EVERY, REFUSED, TRAIN
from ropo.cli.main import COMMANDS, PAGES, main
from ropo.run.align import run_rounds

WRITTEN = json.loads((PAGES / "names.json").read_text())


def shown(name):
    """Options that a page lists, in order."""
    return re.findall(r"^  --(\w+)", (PAGES / f"{name}.txt").read_text(), re.MULTILINE)


@pytest.mark.skipif(WRITTEN["transformers"] != transformers.__version__, reason="written for another transformers")
def test_pages_are_what_the_parsers_say():
    expected = made.pages()
    assert {path.name for path in PAGES.iterdir()} == set(expected)
    for name, text in expected.items():
        assert (PAGES / name).read_text() == text, f"{name} is out of date; run `make help-pages`"


def test_every_command_has_a_page_that_fits(capsys):
    assert set(made.PAGES) == set(COMMANDS)
    for command in COMMANDS:
        for word in ("--help", "--help_all"):
            assert main([command, "whatever", word]) == 0
            lines = capsys.readouterr().out.splitlines()
            assert lines[0].startswith(f"usage: ropo {command}")
            assert all(len(line) <= made.WIDTH for line in lines[1:])


@pytest.mark.parametrize(("command", "groups"), [("train", TRAIN), ("audit", AUDIT)])
def test_the_short_page(command, groups):
    """About 25 options in five groups, each with its default, and the way to the others."""
    text = (PAGES / f"{command}.txt").read_text()
    names = shown(command)
    assert 20 <= len(names) <= 30
    assert re.findall(r"^(\w.*):$", text, re.MULTILINE) == ["Example", *groups]
    assert len(groups) == 5
    assert f"ropo {command} --help_all" in "".join(text.splitlines()[-2:])
    for entry in re.split(r"^  --(?=\w)", text.split(f"{next(iter(groups))}:")[1], flags=re.MULTILINE)[1:]:
        assert re.search(r"\[\S.*?\]|Required\.|default", entry, re.DOTALL | re.IGNORECASE), entry


@pytest.mark.parametrize("command", ["train", "audit"])
def test_every_option_is_shown_once_and_a_refused_one_never(command):
    short, every = shown(command), shown(f"{command}_all")
    assert len(every) == len(set(every))
    assert set(short) < set(every) <= set(WRITTEN["options"][command])
    assert not {*REFUSED} & {*every}
    assert {*REFUSED} <= set(WRITTEN["options"][command])  # known, so that the refusal says what there is instead


def test_options_of_the_tables_exist():
    known = {*WRITTEN["options"]["train"], "loss_args"}  # where single losses have one mapping of options
    for names in (*TRAIN.values(), *AUDIT.values(), *EVERY.values(), REFUSED):
        assert set(names) <= known


OTHER_VALUES = {
    "eval_strategy": "epoch", "label_smoothing_factor": "0.1", "resume_from_checkpoint": "C",
    "torch_compile_backend": "inductor", "torch_compile_mode": "default", "load_best_model_at_end": "true",
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_shown_is_refused(name, tmp_path):
    words = ["--model_name_or_path", "M", "--dataset_name", "D", "--output_dir", str(tmp_path / "O"), "--use_cpu"]
    words += [f"--{name}", OTHER_VALUES.get(name, "true")]
    with pytest.raises(ValueError, match=rf"{name.removesuffix('_backend').removesuffix('_mode')}|evaluates nothing"):
        run_rounds("M", str(tmp_path / "no.jsonl"), parse_train(words)[1])
