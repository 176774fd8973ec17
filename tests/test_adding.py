"""Adding is cheap: one of each kind is added to a copy of the source, works, and touches few places.

A place is a group of lines next to each other that had to be thought up; an import is none. What an addition needs
beside its code (its rows in a table of tests, its sentence in CHANGELOG) is in CONTRIBUTING.
"""

import difflib
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src"
MOST_PLACES, MOST_FILES = 3, 2

# Places and files, by what is added. `tools/measure.py` prints them.
PLACES = {
    "a loss with an option": (2, 2),
    "a decision rule": (2, 1),
    "a data layout": (2, 1),
    "an outside judge with an option": (3, 2),
    "a benchmark method": (2, 1),
}


@dataclass(frozen=True, kw_only=True)
class Addition:
    """What is written into the source, and the code that shows that it works.

    Attributes:
        edits: (file, the line before which it goes, the text); a file that is not there is made.
        check: Python that fails if the addition does not work.
    """

    edits: tuple[tuple[str, str, str], ...]
    check: str


ADDITIONS = {
    "a loss with an option": Addition(
        edits=(
            (
                "ropo/losses/margin_losses.py",
                "def dpo(",
                '''
def flattened(margin: Float[Tensor, " pairs"], *, slope: float = 0.5) -> Float[Tensor, " pairs"]:
    """DPO that pulls less.

    ::

        L(h) = s·dpo(h)  (arXiv:0000.00000)
    """
    return slope * dpo(margin)


''',
            ),
            (
                "ropo/losses/table.py",
                "from ropo.losses.batch_losses",
                "from ropo.losses.margin_losses import flattened\n",
            ),
            (
                "ropo/losses/table.py",
                '        "na": LossSpec(',
                '        "flattened": LossSpec(fn=flattened, when="Never."),\n',
            ),
        ),
        check="""
import torch
from ropo.losses import methods_table
from ropo.losses.options import LossOptions

options = LossOptions(loss="flattened", loss_args="slope=0.25")
assert torch.allclose(options.bound_loss()(torch.zeros(1)), 0.25 * torch.tensor(2.0).log())
assert refused(lambda: LossOptions(loss="flattened", loss_args="slop=0.25"), "slope")
assert refused(lambda: LossOptions(loss="dpo", loss_args="slope=0.25"), "flattened")
assert "`flattened`" in methods_table() and "slope" in methods_table()
""",
    ),
    "a decision rule": Addition(
        edits=(
            (
                "ropo/noise/decide.py",
                "def lowest_loss(",
                '''def newest(margins: PerPair, p_flip: PerPair, num_kept: int) -> Decisions:
    """Drop the last pairs."""
    is_kept = np.arange(len(margins)) < num_kept
    return Decisions(decision=np.where(is_kept, "keep", "drop"), weight=is_kept.astype(np.float64))


''',
            ),
            (
                "ropo/noise/decide.py",
                '        "posterior": RuleSpec(',
                '        "newest": RuleSpec(fn=newest, meaning="Drop the last ⌊ρN⌋ pairs.", total_weight="N_ρ"),\n',
            ),
        ),
        check="""
import numpy as np
from ropo.config import ROPOConfig
from ropo.noise.decide import decide, rules_table

args = ROPOConfig(output_dir=folder, decision_rule="newest", use_cpu=True)
found = decide(np.array([-9.0, 1.0]), np.array([0.9, 0.1]), rho=0.5, rule=args.decision_rule)
assert found.decision.tolist() == ["keep", "drop"]
assert refused(lambda: ROPOConfig(output_dir=folder, decision_rule="oldest", use_cpu=True), "newest")
assert "`newest`" in rules_table()
""",
    ),
    "a data layout": Addition(
        edits=(
            (
                "ropo/data/layouts.py",
                "def _rejected_response(",
                '''def _thumbs(row: Record) -> Layout | None:
    """One answer with a thumb up, one with a thumb down."""
    columns = ("asked", "up", "down")
    return Layout(columns=columns, texts=lambda one: tuple(one[name] for name in columns)) if "up" in row else None


''',
            ),
            ("ropo/data/layouts.py", '        "question": _question,', '        "thumbs": _thumbs,\n'),
        ),
        check="""
from ropo.data.load import load_pairs

loaded = load_pairs([{"asked": "p", "up": "a", "down": "b", "who": "x"}])
assert loaded.layout == "thumbs" and loaded.ignored_columns == ("who",)
assert [(pair.prompt, pair.chosen, pair.rejected) for pair in loaded.pairs] == [("p", "a", "b")]
""",
    ),
    "an outside judge with an option": Addition(
        edits=(
            (
                "ropo/judge/firm.py",
                "",
                '''"""A judge of one opinion."""

from ropo.judge.verdicts import Judge


def firm_judge(certainty: str) -> Judge:
    """Gives every label the same probability."""
    return lambda pairs: [float(certainty)] * len(pairs)
''',
            ),
            ("ropo/judge/options.py", "from ropo.judge.reward_model", "from ropo.judge.firm import firm_judge\n"),
            (
                "ropo/judge/options.py",
                '        "endpoint": JudgeSpec(',
                """        "firm": JudgeSpec(
            make=lambda args, folder: firm_judge(str(args.judge_certainty)),
            meaning="always of one opinion",
            takes=MappingProxyType({"judge_certainty": "0.9"}),
        ),
""",
            ),
            (
                "ropo/judge/options.py",
                "    judge_url: ",
                '    judge_certainty: str | None = option(None, "firm: probability that a label is right.")\n',
            ),
        ),
        check="""
from pathlib import Path
from ropo.config import ROPOConfig
from ropo.judge.options import make_judge

common = {"output_dir": folder, "use_cpu": True, "rounds": 2, "num_candidates": 2}
args = ROPOConfig(judge="firm", judge_certainty="0.7", **common)
assert make_judge(args, Path(folder))([None, None]) == [0.7, 0.7]
assert ROPOConfig(judge="firm", **common).judge_certainty == "0.9"
assert refused(lambda: ROPOConfig(judge_certainty="0.7", **common), "firm")
assert "firm (always of one opinion)" in ROPOConfig.__dataclass_fields__["judge"].metadata["help"]
""",
    ),
    "a benchmark method": Addition(
        edits=(
            (
                "ropo_bench/methods.py",
                "def _clean(",
                """def _first_half(noisy: Noisy) -> list[Pair]:
    return noisy.pairs[: len(noisy.pairs) // 2]


""",
            ),
            (
                "ropo_bench/methods.py",
                '        "dpo": Method(',
                '        "half": Method(meaning="DPO on the first half", options=_loss("dpo"), data=_first_half),\n',
            ),
        ),
        check="""
from ropo_bench import methods
from ropo_bench.grid_config import BenchConfig

seen = []
methods.align = lambda noisy, pairs, folder, options: seen.append((len(pairs), options["loss"])) or folder
noisy = methods.Noisy(task=None, pairs=[None] * 8, is_flipped=None, spare=[], seed=1, common={})
assert methods.run_method("half", noisy, folder, {"beta": 0.1}) == folder
assert seen == [(4, "dpo")]
BenchConfig(task="reviews", seeds=(1,), noise={"symmetric": [0.2]}, methods=("half",))
assert "half" in methods.methods_table()
""",
    ),
}

REFUSED = """
def refused(make, names):
    '''Whether it is refused with a message that names what there is.'''
    try:
        make()
    except ValueError as error:
        return names in str(error)
    return False
"""


def is_import(line):
    return line.startswith(("from ", "import "))


def add(root, addition):
    """Write an addition into the source below `root`; the places and the files that it touches."""
    num_places, files = 0, {file for file, _, _ in addition.edits}
    before = {file: (root / file).read_text() if (root / file).exists() else "" for file in files}
    for file, anchor, text in addition.edits:
        code = (root / file).read_text() if (root / file).exists() else ""
        assert code.count(f"\n{anchor}") == 1 or not anchor, f"{file} has no place to add behind: {anchor}"
        place = code.index(f"\n{anchor}") + 1 if anchor else 0
        (root / file).write_text(code[:place] + text + code[place:])
    for file in files:
        old, new = before[file].splitlines(), (root / file).read_text().splitlines()
        for kind, _, _, start, end in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
            num_places += kind != "equal" and not all(is_import(line) for line in new[start:end])
    return num_places, len(files)


@pytest.fixture(scope="module")
def added(tmp_path_factory):
    """A folder with the source and all additions, and places and files by addition."""
    root = tmp_path_factory.mktemp("added")
    shutil.copytree(SOURCE, root / "src", ignore=shutil.ignore_patterns("__pycache__"))
    return root, {name: add(root / "src", addition) for name, addition in ADDITIONS.items()}


@pytest.fixture(scope="module")
def said(added):
    """What the checks of all additions say in one process, and its errors."""
    root, _ = added
    checks = [f"folder = {str(root / 'out')!r}", REFUSED]
    for name, addition in ADDITIONS.items():
        body = "".join(f"    {line}\n" for line in addition.check.strip().splitlines())
        checks.append(f"try:\n{body}    print({name!r}, 'works')\nexcept Exception:\n    traceback.print_exc()")
    (root / "checks.py").write_text("import traceback\n" + "\n".join(checks))
    done = subprocess.run(
        [sys.executable, root / "checks.py"],
        env={**os.environ, "PYTHONPATH": str(root / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ADDITIONS)
def test_what_is_added_works(name, said):
    output, errors = said
    assert f"{name} works" in output, errors


@pytest.mark.parametrize("name", ADDITIONS)
def test_adding_touches_few_places(name, added):
    _, places = added
    assert places[name] == PLACES[name]
    num_places, num_files = places[name]
    assert num_places <= MOST_PLACES
    assert num_files <= MOST_FILES
