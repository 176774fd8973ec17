"""The objects that audits, runs and comparisons return: what was returned is what `load` reads, and safe to show."""

import csv
import json
from dataclasses import fields, replace

import numpy as np
import pytest

from ropo import AuditResult, DataSource, Model, ReviewInputs, RunResult, run_audit, run_rounds
from ropo.audit.weights import Why
from ropo.config import ROPOConfig
from ropo.evaluate.win_rate import Comparison, WinRate, win_rate
from ropo.noise.estimate import Obstacle
from ropo.report.clauses import OBSTACLES
from ropo.report.notebook import as_html, summary_rows

EVIL = "<script>alert(1)</script>"


def config(folder, **options):
    common = {
        "output_dir": str(folder), "learning_rate": 3e-3, "per_device_train_batch_size": 4, "max_length": 96,
        "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "num_folds": 4, "rho": "0.3",
        "decision_rule": "relabel",
    }  # fmt: skip
    return ROPOConfig(**{**common, **options})


def table_of(folder):
    with (folder / "review.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def audited(saved_model, pairs, tmp_path_factory):
    """An audit with a trusted pair that the data holds and one that it does not."""
    trusted, folder = [pairs[3], replace(pairs[0], prompt="another", id="", row=1)], tmp_path_factory.mktemp("audited")
    return run_audit(saved_model, pairs, config(folder / "O"), review=ReviewInputs(trusted=trusted))


def same(one, other):
    return all(
        np.array_equal(a, b) if isinstance(a, np.ndarray) else repr(a) == repr(b)
        for a, b in ((getattr(one, field.name), getattr(other, field.name)) for field in fields(one))
    )


def test_an_audit_is_what_its_folder_holds(audited):
    loaded = AuditResult.load(str(audited.folder))
    assert same(loaded, audited)
    assert audited.summary == json.loads((audited.folder / "summary.json").read_text())
    assert audited.report.is_file()
    assert len(audited.decisions) == len(audited.weights) == len(audited.p_flip) == len(audited.ledger) == 21
    assert (audited.rho.value, audited.rho.why) == (0.3, Why.GIVEN)
    assert list(audited.margins_by_scorer) == ["gradients", "hidden states", "n-grams"]
    assert sum(row.is_taken for row in audited.comparisons) == 1


def test_choices_hold_the_numbers_that_they_follow_from(model_folder, pairs, tmp_path):
    found = run_audit(model_folder, pairs, config(tmp_path / "O", rho="auto", decision_rule="auto"))
    assert found.rho.why is Why.CANNOT_TELL
    assert found.rho.facts["high"] == found.estimate.high


def test_suspects_come_as_in_the_table_for_review(audited, pairs):
    """Without what somebody has judged already; and with the texts as the data labels them."""
    table = [line for line in table_of(audited.folder) if not line["verdict"]]
    contradicted = [int(line["row"]) for line in table if float(line["margin"]) < 0]
    suspects = audited.suspects(4)
    assert suspects["row"] == contradicted[:4]
    assert 3 not in audited.suspects(100)["row"]
    assert len(audited.suspects(100)) == len(contradicted) > 4
    assert suspects["p_flip"] == [None] * 4  # nothing is told by so few pairs
    flipped = next(line for line in audited.suspects(100) if line["decision"] == "flip")
    assert flipped["chosen"] == pairs[flipped["row"]].chosen


def test_a_pair_that_somebody_has_judged_is_no_suspect(model_folder, pairs, tmp_path):
    """Though held-out margins still contradict the label."""
    worst = run_audit(model_folder, pairs, config(tmp_path / "O")).suspects(1)["row"][0]
    found = run_audit(model_folder, pairs, config(tmp_path / "P"), review=ReviewInputs(trusted=[pairs[worst]]))
    assert found.margins_nats[worst] < 0
    assert worst not in found.suspects(100)["row"]


def test_cleaned_is_the_file(audited, pairs):
    lines = [json.loads(line) for line in (audited.folder / "cleaned.jsonl").read_text().splitlines()]
    cleaned = audited.cleaned()
    assert cleaned.to_list() == lines
    flipped = next(line for line in lines if line["decision"] == "flip")
    assert flipped["chosen"] == pairs[flipped["row"]].rejected


def test_calls_of_tools_keep_their_arguments(model_folder, pairs, tmp_path):
    """Those of one call are not those of another, in name or in type."""

    def answer(text, arguments):
        call = {"type": "function", "function": {"name": "find", "arguments": arguments}}
        return [{"role": "assistant", "content": text, "tool_calls": [call]}]

    talks = [
        replace(
            pair,
            prompt=[{"role": "user", "content": pair.prompt}],
            chosen=answer(pair.chosen, {"x": 1} if pair.row % 2 else {"y": "b"}),
            rejected=answer(pair.rejected, {"x": "c"}),
        )
        for pair in pairs
    ]
    found = run_audit(model_folder, talks, config(tmp_path / "O"))
    lines = [json.loads(line) for line in (found.folder / "cleaned.jsonl").read_text().splitlines()]
    assert found.cleaned().to_list() == lines
    for suspect in found.suspects(100):
        assert suspect["chosen"] == list(talks[suspect["row"]].chosen)


def test_a_run_is_what_its_folder_holds(model_folder, pairs, tmp_path):
    args = config(tmp_path / "O", decision_rule="lowest_loss", rounds=2)
    unseen = [replace(pair, prompt=f"Q {pair.row}", id="") for pair in pairs[:8]]
    found = run_rounds(model_folder, pairs, args, eval_dataset=DataSource(unseen))
    loaded = RunResult.load(found.folder)
    assert (loaded.rounds, loaded.evaluation) == (found.rounds, found.evaluation)
    assert same(loaded.audit, found.audit)
    assert [one.number for one in found.rounds] == [0, 1]
    assert found.rounds[0].num_kept + found.rounds[0].num_dropped == 20
    assert found.evaluation.num_pairs == 8
    assert found.evaluation.rounds[-1].accuracy == found.summary["evaluation"]["rounds"][-1]["accuracy"]
    assert found.rounds[0].estimate == found.audit.estimate
    assert len(found.audit.suspects(3)) == 3
    assert "prompt" not in found.audit.suspects(3).column_names
    with pytest.raises(FileNotFoundError, match=r"has no cleaned\.jsonl"):
        found.audit.cleaned()
    run_audit(model_folder, pairs, args)
    with pytest.raises(FileNotFoundError, match="results of a training"):
        RunResult.load(found.folder)


def test_without_an_audit_there_is_none(model_folder, pairs, tmp_path):
    """Margins of a model that has seen the labels tell no rate."""
    found = run_rounds(model_folder, pairs, config(tmp_path / "O", num_folds=0, decision_rule="auto", rounds=2))
    assert found.audit is None
    assert (found.rounds[0].estimate.obstacle, found.rounds[0].estimate.is_informative) == (Obstacle.IN_SAMPLE, False)
    assert f"({OBSTACLES[Obstacle.IN_SAMPLE][0]})" in repr(found)


@pytest.mark.parametrize("kind", [AuditResult, RunResult])
def test_a_folder_without_a_result_is_refused(kind, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{kind.__name__}.load .*no summary.json"):
        kind.load(tmp_path)


def test_every_obstacle_has_words():
    assert set(OBSTACLES) == set(Obstacle)


def test_results_are_short_to_look_at(audited):
    lines = repr(audited).splitlines()
    assert 3 <= len(lines) <= 6
    counts = {name: audited.summary[f"num_{name}"] for name in ("kept", "dropped", "flipped")}
    assert all(f"{count} {name}" in repr(audited) for name, count in counts.items())
    assert "cannot tell" in lines[1]
    assert "\N{NO-BREAK SPACE}" not in repr(audited)


def test_a_notebook_shows_no_markup_of_others(audited):
    names = [("pairs", EVIL), (EVIL, "20")]
    assert "<script" not in as_html(EVIL, names)
    summary = audited.summary | {"obstacle": EVIL}
    assert "<script" not in as_html("", summary_rows(summary))
    assert "<table>" in audited._repr_html_()
    rate = win_rate([Comparison(instruction="i", output="a", baseline="b", p_better=1.0)], outputs=EVIL)
    assert "<script" not in rate._repr_html_()


def test_a_win_rate_is_read_back(tmp_path):
    rows = [
        Comparison(instruction=str(i), output="a", baseline="bb", p_better=p) for i, p in enumerate([1.0, 0.5, 0.0])
    ]
    found = win_rate(rows, outputs="M", baseline="B")
    with pytest.raises(FileNotFoundError, match=r"has no win_rate\.json"):
        WinRate.load(tmp_path)
    plain = {
        field.name: getattr(found, field.name) for field in fields(found) if field.name not in ("outputs", "baseline")
    }
    for name in ("rate", "by_length"):
        plain[name] = json.loads(
            json.dumps(plain[name], default=lambda one: {f.name: getattr(one, f.name) for f in fields(one)})
        )
    (tmp_path / "win_rate.json").write_text(json.dumps({**plain, "outputs": {"name": "M"}, "baseline": {"name": "B"}}))
    assert WinRate.load(tmp_path) == found
    assert repr(found).startswith("M against B")


def test_a_model_brings_its_own_tokenizer(model_folder, pairs, tokenizer, tmp_path):
    model = Model(model_folder, tokenizer=tokenizer)
    assert run_audit(model, pairs, config(tmp_path / "O")).summary["num_pairs"] == 20
    with pytest.raises(ValueError, match="got processing_class, too"):
        run_audit(model, pairs, config(tmp_path / "P"), processing_class=tokenizer)


def test_columns_are_those_of_the_dataset(model_folder, pairs, tmp_path):
    """Of trusted pairs and of those for evaluation, too, unless these say otherwise."""
    columns = {"chosen": "better", "rejected": "worse"}
    rows = [{"prompt": pair.prompt, "better": pair.chosen, "worse": pair.rejected} for pair in pairs]
    review = ReviewInputs(trusted=DataSource([{"prompt": "p", "chosen": "a", "rejected": "b"}], columns={}))
    unseen = [row | {"prompt": f"Q {i}"} for i, row in enumerate(rows)]
    found = run_rounds(
        model_folder, DataSource(rows, columns=columns), config(tmp_path / "O"), review=review, eval_dataset=unseen
    )
    assert (found.summary["num_pairs"], found.summary["num_trusted"], found.evaluation.num_pairs) == (20, 1, 20)
