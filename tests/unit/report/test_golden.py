"""What a reader of a result sees, word by word: reports, the sentences of many results, and what commands say.

`make golden` writes the kept files anew; read their difference before you commit it. Other tests compare numbers, names
and enums, so that a better wording changes these files and no test.
"""

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from ropo.audit.weights import Why
from ropo.cli import outcome
from ropo.evaluate.answers import Exported
from ropo.evaluate.measures import Mean
from ropo.evaluate.options import ExportArguments
from ropo.evaluate.win_rate import WinRate
from ropo.report.html import render_markdown
from ropo.report.sentences import why_hard, write_sentences
from ropo.report.tables import build_tables

FOLDER = Path(__file__).parents[2] / "data" / "golden_report"

RATE = {"estimate": 0.29, "low": 0.26, "high": 0.32}
ROW = {"accuracy": 0.71, "low": 0.66, "high": 0.75, "margin": 0.42, "loss": 0.613}
EVALUATION = {
    "num_pairs": 300,
    "num_shared": 2,
    "rounds": [{"round": 0, **ROW}, {"round": 1, **ROW, "accuracy": 0.74}],
}
WEAK = {"is_informative": False, "flip_rate": {"estimate": None, "low": 0.0, "high": 0.5}, "calibration": None}
WEAK |= {
    "reason": "The margins spread over 0.01 nats only.",
    "rho": 0.0,
    "rho_why": Why.CANNOT_TELL,
    "noise_left": None,
}
AT_MOST = {"flip_rate": {"estimate": 0.0, "low": 0.0, "high": 0.191}, "noise_left": None}
AT_MOST |= {"alpha": 0.0, "alpha_why": Why.AFTER_FILTER, "rho": 0.0, "rho_why": Why.MAY_BE_CLEAN}
WEAK, AT_MOST = ({**found, "beta": 0.3, "beta_why": Why.GIVEN} for found in (WEAK, AT_MOST))
CLEAN = AT_MOST | {"flip_rate": {"estimate": 0.0, "low": 0.0, "high": 0.02}, "calibration": None}

# Name of the report: (task, whether P(flipped) calls any pair, what its summary holds beside the example's)
REPORTS = {
    "audit": ("audit", True, {}),
    "cannot_tell": ("audit", False, WEAK),
    "at_most": ("audit", False, AT_MOST),
    "nothing_flipped": ("audit", False, CLEAN | {"annotators": []}),
    "training_with_resampling": ("train", True, {"evaluation": EVALUATION}),
    "training_that_cannot_tell": ("train", True, WEAK),
}


def compare(name, text, request):
    """Compare a text with the kept one, or keep it."""
    path = FOLDER / name
    if request.config.getoption("--regenerate"):
        FOLDER.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8"), "read the difference; `make golden` keeps the new text"


@pytest.fixture
def make(make_run, make_audit):
    def build(task, *, has_suspects, summary):
        run = {"audit": make_audit, "train": make_run}[task](summary=summary)
        if not has_suspects:
            ledger, num = run["ledger"], len(run["ledger"])
            for name, values in {"p_flip": num * [0.0], "weight": num * [1.0], "decision": num * ["keep"]}.items():
                ledger = ledger.set_column(ledger.column_names.index(name), name, pa.array(values))
            run["ledger"] = ledger
        return run

    return build


@pytest.mark.parametrize("name", REPORTS)
def test_a_report(make, request, name):
    task, has_suspects, summary = REPORTS[name]
    page = render_markdown(build_tables(**make(task, has_suspects=has_suspects, summary=summary)))
    compare(f"{name}.md", page, request)


def scorer(name, agreement, **more):
    return {"name": name, "agreement": agreement, "low": agreement - 0.02, "high": agreement + 0.02} | more


def gain(points, *, helps=True):
    return {"gain": points, "error": 0.004, "helps": helps, "rests_on_covariates": False}


def rate_of(name, rate, low, high):
    return {"name": name, "num_pairs": 30, "rate": rate, "low": low, "high": high}


def feature(name, share, *, kept=(0.5, 0.4, 0.6), rest=(0.5, 0.4, 0.6), is_clear=True):
    groups = {
        key: {"num_pairs": 100, "share": values[0], "low": values[1], "high": values[2]}
        for key, values in (("all", (share, share - 0.1, share + 0.1)), ("kept", kept), ("not_kept", rest))
    }
    return {"name": name, "is_clear": is_clear, **groups}


def part(first_row, last_row, p_flip_mean, p_flip_others, *, is_high):
    means = {"p_flip_mean": p_flip_mean, "p_flip_others": p_flip_others}
    return {"first_row": first_row, "last_row": last_row, "num_pairs": 100, **means, "is_high": is_high}


TAKEN = scorer("gradients", 0.71, is_taken=True)
UNTESTED = {"num_injected": 4, "num_turned": 40, "share_found": 0.5, "share_others": 0.1, "bins": []}
UNTESTED |= {"recall_range": [0.6, 0.7], "precision_range": [0.0, 0.5], "precision": None}
LENGTHS = {"max_length": 1024, "median": 410.0, "p90": 800.0, "p99": 1500.0, "longest": 2048, "suggested": 1500}
LENGTH = feature("length in characters", 0.4, kept=(0.24, 0.2, 0.28), rest=(0.88, 0.84, 0.91))

# What differs from the summary of the example: (of an audit, of a training run).
SUMMARIES = {
    "audit": {
        "a narrow interval": {"flip_rate": RATE},
        "an interval that reaches 0": {"flip_rate": {"estimate": 0.01, "low": 0.0, "high": 0.032}, "rho": 0.01},
        "a wide interval that reaches 0": {"flip_rate": {"estimate": 0.06, "low": 0.0, "high": 0.196}, "rho": 0.0},
        "ρ above the interval": {"flip_rate": RATE, "rho": 0.45, "rho_why": Why.GIVEN},
        "ρ below the interval": {"flip_rate": RATE, "rho": 0.05, "rho_why": Why.GIVEN},
        "no signal, ρ above 0": WEAK | {"rho": 0.2},
        "no signal, fold models": WEAK | {"scorers": [scorer("models", 0.71, is_taken=True)]},
        "too few pairs to test": {"calibration": None},
        "recall without a precision": {"calibration": UNTESTED | {"recall": 0.65}},
        "no recall": {"calibration": UNTESTED | {"recall": 0.0}},
        "little noise is left": {"noise_left": 0.0001},
        **{f"ρ and α: {why}": {"rho_why": why, "alpha_why": why} for why in Why},
        "α 0": {"alpha": 0.0},
        "no α": {"config": {"loss": "simpo"}, "alpha": 0.0},
        "no surface scorer": {"scorers": [TAKEN], "refit": None, "filter": None},
        "the surface is as good": {"scorers": [scorer("length", 0.70), TAKEN], "refit": None, "filter": None},
        "the surface is worse": {
            "scorers": [scorer("n-grams", 0.6), scorer("length", 0.65), TAKEN],
            "refit": None,
            "filter": None,
        },
        "a refit that does not help": {"refit": gain(0.0213, helps=False)},
        "a filter that does not help": {"filter": gain(0.0213, helps=False)},
        "a filter that rests on lengths": {
            "filter": {**gain(0.0213), "with_covariates": -0.19, "rests_on_covariates": True}
        },
        "gradients that follow no labels": {"filter": gain(0.021)},
        "with lengths none may be flipped": {"flip_rate_with_length": {"estimate": None, "low": 0.0, "high": 0.3}},
        "lengths are not told apart": {"flip_rate_with_length": None},
        "trusted pairs were given": {"num_trusted": 60},
        "two sums of flips": {"flip_rate": {"estimate": 0.4, "low": 0.38, "high": 0.42}},
        "half the labels of one": {"annotators": [rate_of("b", 0.52, 0.4, 0.6)]},
        "a name like a command": {"annotators": [rate_of("`rm\n-rf` " + 50 * "x", 0.4, 0.38, 0.45)]},
        "four bad annotators": {"annotators": [rate_of(name, 0.45, 0.4, 0.5) for name in "abcd"]},
        "no pair is cut": {"token_lengths": LENGTHS | {"num_truncated": 0}},
        "one pair is cut": {"token_lengths": LENGTHS | {"num_truncated": 1}},
    },
    "train": {
        "a narrow interval": {"flip_rate": RATE},
        "α without a reason": {"alpha": 0.0, "alpha_why": ""},
        "rows that are left out": {"problems": {"identical": 5, "truncated": 9}},
    },
}

# What differs from the tables of the example, and from the dicts in them.
TABLES = {
    "audit": {
        "some pairs are judged": {"counts": {"num_judged": 2}},
        "soft weights": {"counts": {"weight_kept_mean": 0.83}},
        "one label is contradicted": {"review": None, "contradicted": {"num": 1, "share": 0.05}},
        "no label is contradicted": {"review": None, "contradicted": {"num": 0, "share": 0.0}},
        "more contradicted than called": {"contradicted": {"num": 9, "share": 0.45}},
        "the filter follows length": {"biases": {"num_pairs": 100, "min_differing": 20, "features": [LENGTH]}},
    },
    "train": {
        "a bad part of the file": {
            "file_parts": [part(0, 99, 0.1, 0.2, is_high=False), part(1200, 1399, 0.6, 0.1, is_high=True)]
        },
        "clear biases": {
            "biases": {
                "num_pairs": 100,
                "min_differing": 20,
                "features": [
                    feature("links", 0.7),
                    feature("digits", 0.2),
                    feature("headings", 0.9, is_clear=False),
                    feature("lists", 0.5, kept=(0.8, 0.75, 0.85), rest=(0.3, 0.2, 0.4), is_clear=False),
                ],
            }
        },
    },
}

# Held-out margins at three checks: (whether they are moments of a training, whether the pair is learned late).
HARD = [
    ([-1.5, -0.5, 0.2], True, True),
    ([0.3, -1.2, 0.4], True, False),
    ([0.3, 0.2, 0.4], True, False),
    ([0.3, -1.2, 0.4], False, False),
    ([0.3, 0.2, 0.4], False, False),
]


def listed(sentences, base):
    """Sentences that the base has not, then those that only the base has, as a list."""
    for name, text in sentences.items():
        if isinstance(text, list):
            yield from (f"- {name}: {one}" for one in text if one not in base[name])
            yield from (f"- {name}, not: {one}" for one in base[name] if one not in text)
        elif text != base[name]:
            yield f"- {name}: {text or '(nothing)'}"


def test_the_sentences(make, request):
    lines = ["# Sentences that differ from those of the example", ""]
    for task, changes in SUMMARIES.items():
        tables = build_tables(**make(task, has_suspects=True, summary={}))
        base = write_sentences(tables)
        for name, summary in changes.items():
            found = build_tables(**make(task, has_suspects=True, summary=summary))["sentences"]
            lines += [f"## {task}: {name}", "", *listed(found, base), ""]
        for name, change in TABLES[task].items():
            changed = {key: tables[key] | value if value and tables[key] else value for key, value in change.items()}
            lines += [f"## {task}: {name}", "", *listed(write_sentences(tables | changed), base), ""]
    lines += ["## why a pair is hard", ""]
    for checks, are_moments, is_late in HARD:
        lines.append(f"- {why_hard({'checks': checks, 'are_moments': are_moments, 'is_learned_late': is_late})}")
    compare("sentences.md", "\n".join(lines) + "\n", request)


def mean(value):
    return Mean(value=value, low=value - 0.1, high=value + 0.1, count=40)


COUNTS = {"win": 20, "loss": 18, "tie": 2, "undecided": 0, "identical": 1}
WIN_RATE = WinRate(
    outputs="A",
    baseline="B",
    rate=mean(0.525),
    lowest=0.525,
    highest=0.525,
    counts=COUNTS,
    mean_p_better=0.5,
    by_length={"longer": mean(0.6), "shorter": mean(0.4), "as_long": None},
    mean_chars=812.4,
    mean_chars_baseline=790.0,
)
EXPORTED = Exported(
    file=Path("O/answers.json"),
    num_questions=3,
    num_answers=5,
    num_unfinished=0,
    num_empty=0,
    mean_chars=40.2,
    temperatures=(0.0, 0.7),
)
COUNTED = {
    "num_kept": 16,
    "num_dropped": 2,
    "num_flipped": 1,
    "num_resampled": 1,
    "rho": 0.2,
    "alpha": 5.4,
    "beta": 0.75,
}


def spoken(given):
    """What commands print, by what they have found."""
    folder = Path("O")
    common = COUNTED | {"is_informative": True, "reason": "", "flip_rate": RATE, "annotators": [], "evaluation": None}
    audit = common | {"task": "audit", "num_contradicted": 4}
    train = common | {"task": "train", "num_contradicted": None}
    named = {"annotators": [rate_of("a\x1b", 0.7, 0.6, 0.8), rate_of("b", 0.1, 0.0, 0.2)]}
    yield "audit", lambda: outcome.say_audit(audit | named, folder)
    yield "audit, cannot tell", lambda: outcome.say_audit(audit | named | WEAK, folder)
    yield "audit, wide interval", lambda: outcome.say_audit(audit | AT_MOST, folder)
    yield "train", lambda: outcome.say_training(train, folder)
    yield "train, evaluation", lambda: outcome.say_training(train | {"evaluation": EVALUATION}, folder)
    yield "train, cannot tell", lambda: outcome.say_training(train | WEAK, folder)
    yield (
        "train, cannot tell, contradicted",
        lambda: outcome.say_training(train | WEAK | {"num_contradicted": 4}, folder),
    )
    yield "export", lambda: outcome.say_export(EXPORTED, given)
    yield "export, cut", lambda: outcome.say_export(replace(EXPORTED, num_unfinished=3, num_empty=1), given)
    undecided = replace(WIN_RATE, counts=COUNTS | {"undecided": 3}, lowest=0.49, highest=0.56)
    nothing = replace(WIN_RATE, rate=None, counts=COUNTS | {"win": 0, "loss": 0}, by_length={})
    yield "win_rate", lambda: outcome.say_win_rate(WIN_RATE, folder)
    yield "win_rate, undecided", lambda: outcome.say_win_rate(undecided, folder)
    yield "win_rate, cannot tell", lambda: outcome.say_win_rate(nothing, folder)


def test_what_commands_say(request, capsys):
    given = ExportArguments(
        model_name_or_path="M", benchmark="alpaca_eval", questions="Q.json", output_dir="O", max_new_tokens=12
    )
    lines = ["# What commands say", ""]
    for name, say in spoken(given):
        say()
        lines += [f"## {name}", "", "```text", capsys.readouterr().out.strip("\n"), "```", ""]
    compare("commands.md", "\n".join(lines), request)


def test_every_kept_file_is_compared():
    assert {path.stem for path in FOLDER.iterdir()} == {*REPORTS, "sentences", "commands"}
