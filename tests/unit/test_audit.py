"""The audit: what judges which pair, what a verdict changes, and that nothing changes where little speaks for flips."""

import csv
import json
import re
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file

from ropo.audit import options as audit_options
from ropo.audit import run as audit_run
from ropo.audit.folds import folds_of
from ropo.audit.models import MAX_BETA, NUM_CHECKS
from ropo.audit.scorers import Scores
from ropo.audit.weights import Choice, Why, resolve_alpha, resolve_rho, resolve_rule
from ropo.config import ROPOConfig
from ropo.data.load import load_pairs
from ropo.data.mixture import Mixture
from ropo.noise.estimate import FlipEstimate, Obstacle
from ropo.noise.likelihood import Link
from ropo.noise.linear import LinearModels
from ropo.pairs import Pair
from ropo.provenance import hash_file
from ropo.run.align import run_audit, run_rounds
from ropo.run.inputs import DataSource, ReviewInputs
from ropo.run.ledger import read_ledger
from ropo.train.trainer import ROPOTrainer

ESTIMATE = FlipEstimate(
    rate=0.0, low=0.0, high=0.5, level=0.9, scale=1.0, link=Link(), obstacle=None, num_pairs=20, num_labels=20,
    num_different=20,
)  # fmt: skip


def config(folder, **options):
    common = {
        "output_dir": str(folder), "learning_rate": 3e-3, "per_device_train_batch_size": 4, "max_length": 96,
        "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "num_folds": 4,
    }  # fmt: skip
    return ROPOConfig(**{**common, **options})


def ledger_of(folder):
    return read_ledger(folder / "ledger.parquet").to_pandas()


def test_no_model_judges_what_it_was_trained_on(model_folder, pairs, tmp_path, monkeypatch):
    """Copies and contradictions of a pair share its fold; every pair is judged once, by DPO whatever the loss is."""
    twin = replace(pairs[0], chosen=pairs[0].rejected, rejected=pairs[0].chosen, row=20)
    seen, train = [], ROPOTrainer.train_or_resume

    def watching(self, made_from, **how):
        loss = self.training_objective.loss_of_margin
        learned = {pair.id for pair in self.train_dataset.pairs}
        seen.append((loss.name, loss.beta, learned, [pair.row for pair in self.eval_dataset.pairs]))
        train(self, made_from, **how)
        assert len(self.check_margins) == NUM_CHECKS

    monkeypatch.setattr(ROPOTrainer, "train_or_resume", watching)
    run_audit(model_folder, [*pairs, twin], config(tmp_path / "O", scorer="models", rho="0.2", alpha="6", beta=0.5))
    ids = {pair.row: pair.id for pair in [*pairs, twin]}
    assert [one[:2] for one in seen] == [("dpo", MAX_BETA)] * 4
    for *_, learned, judged in seen:
        assert not learned & {ids[row] for row in judged}
    assert sorted(row for *_, judged in seen for row in judged) == list(range(21))


@pytest.mark.parametrize(
    "options", [{"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True}, {"per_device_eval_batch_size": 8}]
)
def test_fold_models_judge_all_their_pairs_three_times(options, model_folder, pairs, tmp_path):
    """Whatever is said of evaluations and of the last batch of a training."""
    common = {"scorer": "models", "num_folds": 2, "max_steps": 4, "dataloader_drop_last": True}
    wanted = run_audit(model_folder, pairs, config(tmp_path / "wanted", **common))
    result = run_audit(model_folder, pairs, config(tmp_path / "O", **common, **options))
    assert list(result.margins_by_scorer) == [f"check {number}" for number in range(1, NUM_CHECKS + 1)]
    for name, margins in result.margins_by_scorer.items():
        assert np.isfinite(margins).all()
        np.testing.assert_allclose(margins, wanted.margins_by_scorer[name], atol=1e-3)


def test_checks_are_different_moments_of_one_training(model_folder, pairs, tmp_path):
    run_audit(model_folder, pairs, config(tmp_path / "O", scorer="models", num_train_epochs=3))
    report = json.loads((tmp_path / "O" / "report.json").read_text())
    assert report["estimate"]["num_pairs"] == 20
    found = load_file(tmp_path / "O" / "audit" / "margins.safetensors")
    margins = found["views"]
    assert margins.shape == (NUM_CHECKS, 20)
    np.testing.assert_array_equal(found["margins"], margins[-1])
    assert np.abs(margins[0] - margins[1]).min() > 0
    assert np.abs(margins[1] - margins[2]).min() > 0
    assert np.abs(margins[0]).mean() < np.abs(margins[2]).mean()


def test_where_nothing_speaks_for_flips_ropo_is_dpo_bit_for_bit(model_folder, pairs, tmp_path):
    """Twenty pairs are too few to tell anything, so `auto` trains what plain DPO trains."""
    summary = run_rounds(model_folder, pairs, config(tmp_path / "auto")).summary
    run_rounds(model_folder, pairs, config(tmp_path / "dpo", loss="dpo", rho="0", num_folds=0))
    assert (summary["is_informative"], summary["rho"], summary["alpha"]) == (False, 0.0, 0.0)
    assert (summary["rho_why"], summary["alpha_why"]) == ("cannot_tell", "after_filter")
    auto, dpo = (hash_file(tmp_path / name / "model.safetensors") for name in ("auto", "dpo"))
    assert auto == dpo
    run_rounds(model_folder, pairs, config(tmp_path / "given", alpha="14", rho="0"))
    assert hash_file(tmp_path / "given" / "model.safetensors") != dpo


@pytest.mark.parametrize(
    ("estimate", "rho", "why"),
    [
        ({"rate": 0.4, "low": 0.1}, 0.4, Why.ESTIMATED),
        ({"rate": 0.02, "low": 0.0}, 0.0, Why.MAY_BE_CLEAN),
        ({"obstacle": Obstacle.WIDE, "rate": 0.4, "low": 0.1}, 0.0, Why.CANNOT_TELL),
    ],
)
def test_rho_follows_the_estimate_and_alpha_is_zero(estimate, rho, why):
    estimate = replace(ESTIMATE, **estimate)
    found = resolve_rho(None, estimate)
    assert (found.value, found.why) == (rho, why)
    found = resolve_alpha(None, is_audited=True)
    assert (found.value, found.why) == (0.0, Why.AFTER_FILTER)
    for found in (resolve_rho(0.3, estimate), resolve_alpha(0.3, is_audited=True)):
        assert (found.value, found.why) == (0.3, Why.GIVEN)


@pytest.mark.parametrize("scorer", audit_run.SCORERS)
def test_an_audit_goes_on_as_a_training(scorer, model_folder, pairs, tmp_path, monkeypatch):
    """The same folder and options: nothing is scored again, and the result is that of a training alone."""
    options = {"rho": "0.2", "scorer": scorer}
    run_audit(model_folder, pairs, config(tmp_path / "O", **options))
    assert {"cleaned.jsonl", "dropped.jsonl", "review.csv"} <= {path.name for path in (tmp_path / "O").iterdir()}
    run_rounds(model_folder, pairs, config(tmp_path / "alone", **options))
    trained, train = [], ROPOTrainer.train_or_resume

    def watching(self, made_from, **how):
        trained.append(len(self.train_dataset))
        train(self, made_from, **how)

    monkeypatch.setattr(ROPOTrainer, "train_or_resume", watching)
    monkeypatch.setattr(LinearModels, "held_out", lambda *_, **__: pytest.fail("scored again"))
    run_rounds(model_folder, pairs, config(tmp_path / "O", **options))
    assert len(trained) == 1
    assert hash_file(tmp_path / "O" / "model.safetensors") == hash_file(tmp_path / "alone" / "model.safetensors")


def test_cleaned_data_is_ready_to_train_with(model_folder, pairs, tmp_path):
    folder = tmp_path / "O"
    summary = run_audit(model_folder, pairs, config(folder, rho="0.3", decision_rule="relabel")).summary
    cleaned, ledger = load_pairs(folder / "cleaned.jsonl"), ledger_of(folder)
    dropped = [json.loads(line) for line in (folder / "dropped.jsonl").read_text().splitlines()]
    assert not cleaned.problems
    assert len(cleaned.pairs) == summary["num_kept"] + summary["num_flipped"]
    assert [row["row"] for row in dropped] == ledger.loc[ledger["decision"] == "drop", "row"].tolist()
    assert summary["num_dropped"] == len(dropped) > 0


def test_weights_go_in_and_out(model_folder, pairs, tmp_path, caplog):
    """Ledger and cleaned data hold the weight of the data times that of the decision; the estimate reads none."""
    weights = [float(i % 4) for i in range(20)]
    rows = [
        {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected, "share": weight}
        for pair, weight in zip(pairs, weights, strict=True)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = DataSource(tmp_path / "pairs.jsonl", columns={"weight": "share"})
    caplog.set_level("INFO", "ropo")
    found = run_audit(model_folder, source, config(tmp_path / "O", rho="0.3", loss="dpo")).summary
    plain = run_audit(model_folder, pairs, config(tmp_path / "plain", rho="0.3", loss="dpo")).summary
    assert "5 of 20 pairs have weight 0" in caplog.text
    assert "rho = 0.3 (given)" in caplog.text
    assert "alpha =" not in caplog.text  # the loss has none
    assert found["flip_rate"] == plain["flip_rate"]
    ledger, cleaned = ledger_of(tmp_path / "O"), load_pairs(tmp_path / "O" / "cleaned.jsonl")
    is_kept = ledger["decision"] == "keep"
    assert is_kept.sum() == 14
    assert ledger["weight"].tolist() == [w if kept else 0.0 for w, kept in zip(weights, is_kept, strict=True)]
    assert [pair.weight for pair in cleaned.pairs] == [weight for weight in ledger.loc[is_kept, "weight"] if weight]


def test_a_sample_of_two_datasets(model_folder, pairs, tmp_path):
    """What a person reviews and what the ledger holds say which dataset a pair comes from."""
    mixture = Mixture(parts=(pairs[:9], pairs[9:]), shares=(0.5, 0.5))
    summary = run_audit(model_folder, mixture, config(tmp_path / "O", max_samples=16, rho="0.2")).summary
    ledger = ledger_of(tmp_path / "O")
    assert summary["num_pairs"] == summary["num_rows"] == len(ledger) == 16
    assert ledger["source"].str.startswith("dataset 1:").sum() == 8
    assert [(f"dataset {1 + (row > 8)}:{row - 9 * (row > 8)}") for row in ledger["row"]] == ledger["source"].tolist()
    with (tmp_path / "O" / "review.csv").open(newline="") as file:
        assert {int(row["row"]): row["source"] for row in csv.DictReader(file)} == dict(
            zip(ledger["row"], ledger["source"], strict=True)
        )
    cleaned = [json.loads(line) for line in (tmp_path / "O" / "cleaned.jsonl").read_text().splitlines()]
    assert {row["source"] for row in cleaned} < set(ledger["source"])


def test_pairs_of_weight_0_are_not_among_the_cleaned(model_folder, pairs, tmp_path):
    """Other trainers know no weights; they would be trained on fully."""
    weighted = [replace(pair, weight=float(place % 2)) for place, pair in enumerate(pairs)]
    run_audit(model_folder, weighted, config(tmp_path / "O", rho="0"))
    rows = {
        name: [json.loads(line)["row"] for line in (tmp_path / "O" / f"{name}.jsonl").read_text().splitlines()]
        for name in ("cleaned", "dropped")
    }
    assert rows["cleaned"] == [pair.row for pair in weighted if pair.weight]
    assert rows["dropped"] == [pair.row for pair in weighted if not pair.weight]


def fill(folder, verdicts):
    with (folder / "review.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row["verdict"] = verdicts.get(int(row["row"]), "")
    path = folder.parent / "filled.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_a_persons_verdicts_are_obeyed(model_folder, pairs, tmp_path):
    run_audit(model_folder, pairs, config(tmp_path / "O", rho="0.2"))
    verdicts = {3: "wrong", 4: "drop", 5: "right", 6: "right"}
    table = fill(tmp_path / "O", verdicts)
    summary = run_rounds(
        model_folder,
        pairs,
        config(tmp_path / "T", rho="0.5", decision_rule="lowest_loss"),
        review=ReviewInputs(decisions=table),
    ).summary
    ledger = ledger_of(tmp_path / "T").set_index("row")
    assert ledger.loc[[3, 4, 5, 6], "decision"].tolist() == ["flip", "drop", "keep", "keep"]
    assert ledger.loc[[3, 5, 6], "p_flip"].tolist() == [1, 0, 0]
    assert ledger.loc[4, "weight"] == 0
    assert summary["num_trusted"] == 3
    rest = ledger.drop([3, 4, 5, 6])
    assert (rest["decision"] == "drop").sum() == 8  # half of the sixteen that nobody has judged
    cleaned = run_audit(model_folder, pairs, config(tmp_path / "A"), review=ReviewInputs(decisions=table)).summary
    assert cleaned["num_flipped"] == 1
    turned = next(p for p in load_pairs(tmp_path / "A" / "cleaned.jsonl").pairs if p.id == pairs[3].id)
    assert (turned.chosen, turned.rejected) == (pairs[3].rejected, pairs[3].chosen)


def test_verdicts_are_obeyed_where_nobody_judges(model_folder, pairs, tmp_path, monkeypatch):
    """Plain DPO trains on what a person has said, and so does a run without folds."""
    run_audit(model_folder, pairs, config(tmp_path / "O"))
    table = fill(tmp_path / "O", {3: "wrong", 4: "drop", 5: "right"})
    trained, train = [], ROPOTrainer.train_or_resume

    def watching(self, made_from, **how):
        trained.append({pair.row: pair for pair in self.train_dataset.pairs})
        train(self, made_from, **how)

    monkeypatch.setattr(ROPOTrainer, "train_or_resume", watching)
    for name, options in (
        ("dpo", {"loss": "dpo", "rho": "0"}),
        ("in_sample", {"num_folds": 0, "rho": "0.5", "rounds": 2}),
    ):
        run_rounds(model_folder, pairs, config(tmp_path / name, **options), review=ReviewInputs(decisions=table))
        learned = trained.pop(0)
        assert 4 not in learned
        assert learned[3].chosen == pairs[3].rejected
        ledger = ledger_of(tmp_path / name)
        decisions = ledger[ledger["round"] == 0].set_index("row")["decision"]
        assert decisions[[3, 4, 5]].tolist() == ["flip", "drop", "keep"]
    assert (decisions == "drop").sum() == 1 + 8  # and half of the seventeen that nobody has judged


def test_a_given_rho_takes_away_that_share(model_folder, pairs, tmp_path):
    """Twenty pairs tell nothing about the rate, and still `--rho 0.2` leaves out four of them."""
    for options in ({}, {"num_folds": 0, "rounds": 2}):
        summary = run_rounds(model_folder, pairs, config(tmp_path / f"O{len(options)}", rho="0.2", **options)).summary
        assert (summary["is_informative"], summary["num_dropped"]) == (False, 4)
    for given, why, expected in (
        ("auto", Why.GIVEN, "lowest_loss"),
        ("auto", Why.FILTER_HELPS, "lowest_loss"),
        ("auto", Why.ESTIMATED, "threshold"),
        ("threshold", Why.FILTER_HELPS, "threshold"),
    ):
        assert resolve_rule(given, Choice(value=0.2, why=why)) == expected


def test_trusted_pairs_are_kept_and_are_no_part_of_the_data(model_folder, pairs, tmp_path):
    summary = run_audit(
        model_folder,
        pairs[:15],
        config(tmp_path / "O", rho="0.5", decision_rule="lowest_loss"),
        review=ReviewInputs(trusted=pairs[15:]),
    ).summary
    ledger = ledger_of(tmp_path / "O")
    trusted = ledger[ledger["origin"] == "trusted"]
    assert (len(trusted), summary["num_pairs"], summary["num_trusted"]) == (5, 15, 5)
    assert set(trusted["decision"]) == {"keep"}
    assert (trusted["p_flip"] == 0).all()
    assert summary["num_dropped"] == 7
    assert len(load_pairs(tmp_path / "O" / "cleaned.jsonl").pairs) == 8


def test_trusted_pairs_are_no_resampled_ones(model_folder, pairs, tmp_path):
    summary = run_rounds(
        model_folder, pairs[:15], config(tmp_path / "O", rho="0", num_folds=0), review=ReviewInputs(trusted=pairs[15:])
    ).summary
    assert (summary["num_pairs"], summary["num_resampled"], summary["num_trusted"]) == (15, 0, 5)


@pytest.fixture
def many(pairs):
    return [replace(pairs[i % 20], prompt=f"{i} {pairs[i % 20].prompt}", row=i) for i in range(80)]


def plant(monkeypatch, margin_of, length_of=lambda question: np.zeros(len(question.data))):
    """Margins by row in place of a scorer's."""
    asked = []

    def scorer(question):
        margins = np.array([margin_of(pair) for pair in question.data.pairs])
        asked.append(question)
        rows = (question.row("gradients", margins, is_taken=True), question.row("length", -margins))
        return Scores(margins=margins, length=length_of(question), views=np.tile(margins, (3, 1)), rows=rows)

    monkeypatch.setattr(audit_run, "SCORERS", {"features": scorer})
    return asked


def test_the_scorers_that_can_be_chosen_are_those_there_are(tmp_path):
    assert audit_run.SCORERS.keys() == audit_options.SCORERS.keys()
    with pytest.raises(ValueError, match=r"scorer .*'modles'\. .*models\?"):
        config(tmp_path, scorer="modles")


def test_what_is_to_be_left_out_is_not_called_wrong(model_folder, many, tmp_path, monkeypatch):
    """A verdict "drop" says nothing about the label: P(flipped) is what the margins say."""
    plant(monkeypatch, lambda pair: (1 + pair.row % 7 / 7) * (-1 if pair.row < 8 else 1))
    pairs = [replace(pair, verdict="drop") if pair.row in (70, 71) else pair for pair in many]
    run_audit(model_folder, pairs, config(tmp_path / "O"))
    ledger = ledger_of(tmp_path / "O").set_index("row")
    assert ledger.loc[[70, 71], "decision"].tolist() == ["drop", "drop"]
    assert ledger.loc[70, "p_flip"] == pytest.approx(ledger.loc[72, "p_flip"], abs=0.05)
    assert ledger.loc[[70, 71], "p_flip"].max() < 0.5


@pytest.mark.parametrize("num_reviewed", [1, 6])
def test_a_review_leaves_the_rate_of_all_labels(num_reviewed, model_folder, many, tmp_path, monkeypatch):
    """The most contradicted labels are reviewed first; the budget is the share of those that are left, if there is."""
    plant(monkeypatch, lambda pair: (1 + pair.row % 7 / 7) * (-1 if pair.row < 10 else 1))
    pairs = [replace(pair, verdict="wrong") if pair.row < num_reviewed else pair for pair in many]
    found = run_audit(model_folder, pairs, config(tmp_path / "O", rho="auto", decision_rule="auto"))
    assert found.estimate.is_informative
    assert found.estimate.rate == pytest.approx(10 / 80, abs=0.005)
    num_open, low = 80 - num_reviewed, 80 * found.estimate.low - num_reviewed
    assert found.rho.value == pytest.approx((80 * found.estimate.rate - num_reviewed) / num_open if low > 0 else 0)
    assert found.summary["calibration"] is None


def test_a_scorer_says_how_often_it_agrees_with_labels_it_has_not_seen(model_folder, many, tmp_path, monkeypatch):
    """Copies count once, margins of 0 half, and known labels are not asked about."""
    pairs = [*many[:60], *(replace(pair, row=80 + pair.row) for pair in many[:15])]
    pairs = [replace(pair, verdict="right") if pair.row == 59 else pair for pair in pairs]
    asked = plant(
        monkeypatch, lambda pair: -1.0 if pair.row in (*range(15), *range(80, 95), 59) else float(pair.row != 58)
    )
    summary = run_audit(model_folder, pairs, config(tmp_path / "O")).summary
    found = json.loads((tmp_path / "O" / "audit" / "scorers.json").read_text())
    rows = found["rows"]
    assert (summary["scorers"], found["filter"]) == (rows, None)
    assert [(row["name"], row["is_taken"]) for row in rows] == [("gradients", True), ("length", False)]
    assert rows[0]["agreement"] == pytest.approx((59 - 15 - 0.5) / 59)
    assert rows[1]["agreement"] == pytest.approx((15 + 0.5) / 59)
    assert rows[0]["low"] < rows[0]["agreement"] < rows[0]["high"] < 1
    assert asked[0].folds.max() == 3
    report = (tmp_path / "O" / "report.md").read_text().replace("\N{NO-BREAK SPACE}", " ")
    assert re.search(r"\| \*\*gradients\*\*, .*\| 74 % \|", report)


def test_an_audit_needs_a_label_that_nobody_has_judged(model_folder, pairs, tmp_path):
    with pytest.raises(ValueError, match="nobody has judged"):
        run_audit(model_folder, [replace(pair, verdict="right") for pair in pairs], config(tmp_path / "O"))


def test_folds_are_even_and_repeatable():
    pairs = [Pair(prompt=f"{row % 50}?", chosen=" yes", rejected=" no", row=row) for row in range(60)]
    [fold_of, other] = folds_of(pairs, 5, seeds=[1, 2])
    assert np.bincount(list(fold_of.values())).tolist() == [10] * 5
    assert folds_of(pairs[::-1], 5, seeds=[1]) == [fold_of]
    assert other != fold_of
    with pytest.raises(ValueError, match="5 folds and 3 pairs"):
        folds_of(pairs[:3], 5, seeds=[0])


def test_what_reads_the_same_shares_a_fold(pairs):
    """A model that has learned a pair has learned its label, whatever white space, case or marks stand around it."""
    twins = [replace(pair, prompt=f"{pair.prompt} ", id="", row=20 + pair.row) for pair in pairs]
    turned = [replace(p, chosen=p.rejected, rejected=f"{p.chosen}!", id="", row=40 + p.row) for p in pairs]
    [fold_of] = folds_of([*pairs, *twins, *turned], 4, seeds=[0])
    assert len(fold_of) == 60
    for group in zip(pairs, twins, turned, strict=True):
        assert len({fold_of[pair.id] for pair in group}) == 1


def test_pairs_that_differ_in_an_operator_are_dealt_by_themselves():
    """60 comparisons that no two letters tell apart are 60 groups, so folds are even."""
    pairs = [
        Pair(prompt=f"Is {i} {sign} {i + 1} ?", chosen=" true", rejected=" false", row=0)
        for i in range(30)
        for sign in "<>"
    ]
    [fold_of] = folds_of(pairs, 4, seeds=[0])
    assert np.bincount([fold_of[pair.id] for pair in pairs]).tolist() == [15] * 4
    assert any(fold_of[one.id] != fold_of[other.id] for one, other in zip(pairs[::2], pairs[1::2], strict=True))


def test_data_given_twice_is_no_more_evidence(model_folder, many, tmp_path, monkeypatch):
    """Rate, interval, rates of annotators and calibration of an audit are those of the data given once."""
    rng = np.random.default_rng(0)
    size = np.where(rng.random(80) < 0.15, -1.0, 1.0) * rng.normal(4.0, 1.0, 80)
    margin_of = {pair.prompt.strip(): margin for pair, margin in zip(many, size, strict=True)}
    plant(monkeypatch, lambda pair: margin_of[pair.prompt.strip()])
    named = [replace(pair, annotator=f"a{pair.row % 2}") for pair in many]
    copies = [replace(pair, prompt=f"{pair.prompt} ", id="", row=80 + pair.row) for pair in named]
    once, twice = (
        run_audit(model_folder, pairs, config(tmp_path / str(len(pairs)), rho="0.2")).summary
        for pairs in (named, [*named, *copies])
    )
    assert once["is_informative"]
    for name in ("estimate", "low", "high"):
        assert twice["flip_rate"][name] == pytest.approx(once["flip_rate"][name], abs=1e-6)
    assert len(once["annotators"]) == 2
    for one, other in zip(once["annotators"], twice["annotators"], strict=True):
        assert [other[name] for name in ("rate", "low", "high")] == pytest.approx(
            [one[name] for name in ("rate", "low", "high")], abs=1e-3
        )
    assert once["calibration"]["num_turned"] == twice["calibration"]["num_turned"] == 80


def test_a_finished_audit_is_read_by_other_runs(model_folder, pairs, tmp_path, monkeypatch):
    """Verdicts, another rule, another beta: margins are read, not made; only what is aligned is trained."""
    rows = [{"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in pairs]
    options = {"rho": "0.3", "decision_rule": "lowest_loss"}
    run_audit(model_folder, rows, config(tmp_path / "O", **options))
    told = {"review": ReviewInputs(decisions=fill(tmp_path / "O", {3: "wrong", 4: "drop"}))}
    trained, train = [], ROPOTrainer.train_or_resume
    monkeypatch.setattr(
        ROPOTrainer, "train_or_resume", lambda self, of, **how: trained.append(len(of)) or train(self, of, **how)
    )
    there = {**options, "audit_from": str(tmp_path / "O")}
    run_rounds(model_folder, rows, config(tmp_path / "A", beta=0.3, rounds=1, **there), **told)
    assert len(trained) == 1
    before, after = (load_file(tmp_path / name / "audit" / "margins.safetensors") for name in "OA")
    for name in ("margins", "length", "views"):
        np.testing.assert_array_equal(before[name], after[name])
    assert before["p_flip"][3] < after["p_flip"][3] == 1
    assert not (tmp_path / "A" / "audit" / "features").exists()
    ledger = ledger_of(tmp_path / "A").set_index("row")
    assert ledger.loc[[3, 4], "decision"].tolist() == ["flip", "drop"]
    # It is a run like others: given again it does nothing, and without the other folder it is not the same.
    run_rounds(model_folder, rows, config(tmp_path / "A", beta=0.3, rounds=1, **there), **told)
    assert len(trained) == 1
    with pytest.raises(ValueError, match="other settings:\n  audit_from"):
        run_rounds(model_folder, rows, config(tmp_path / "A", beta=0.3, rounds=1, **options), **told)
    run_audit(model_folder, rows, config(tmp_path / "B", rho="0.2", audit_from=str(tmp_path / "O")))
    assert len(trained) == 1


def test_what_margins_are_not_taken_from(model_folder, pairs, tmp_path):
    run_audit(model_folder, pairs, config(tmp_path / "O", rho="0.3"))
    there = {"rho": "0.3", "audit_from": str(tmp_path / "O")}
    for options, rows, said in (
        ({"num_folds": 5}, pairs, "another one:\n  num_folds: 4 there, 5 now"),
        ({"seed": 7}, pairs, "another one:\n  seed: 42 there, 7 now"),
        ({}, pairs[1:], "another one:\n  pairs: content "),
        ({"audit_from": str(tmp_path)}, pairs, "needs the output folder of an audit"),
    ):
        with pytest.raises(ValueError, match=said):
            run_audit(model_folder, rows, config(tmp_path / "A", **{**there, **options}))
    with pytest.raises(ValueError, match="run that audits"):
        run_rounds(model_folder, pairs, config(tmp_path / "A", **{**there, "rho": "0", "alpha": "14"}))
    identity = tmp_path / "O" / "ropo_config.json"
    text = identity.read_text()
    identity.write_text(text.replace('"scorer": "features"', '"scorer": "another"'))
    with pytest.raises(ValueError, match=r"scorer: 'another' .*'features'"):
        run_audit(model_folder, pairs, config(tmp_path / "A", **there))
    identity.write_text(text)
    (tmp_path / "O" / "audit" / "margins.safetensors").unlink()
    with pytest.raises(ValueError, match="was broken off"):
        run_audit(model_folder, pairs, config(tmp_path / "A", **there))


def test_an_audit_needs_folds(model_folder, pairs, tmp_path):
    with pytest.raises(ValueError, match=r"num_folds .*; got 0"):
        run_audit(model_folder, pairs, config(tmp_path / "O", num_folds=0, rho="0.1", alpha="14", rounds=2))


def test_no_rate_is_written_where_none_can_be_told(model_folder, pairs, tmp_path):
    """A script must not read 0 % there."""
    summary = run_audit(model_folder, pairs, config(tmp_path / "O")).summary
    assert not summary["is_informative"]
    assert summary["flip_rate"]["estimate"] is None
    assert 0.0 <= summary["flip_rate"]["low"] < summary["flip_rate"]["high"] <= 0.5
    margins = read_ledger(tmp_path / "O" / "ledger.parquet")["held_out_margin"].to_numpy()
    assert summary["num_contradicted"] == (margins < 0).sum()
    with (tmp_path / "O" / "review.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["margin"]) for row in rows] == pytest.approx(sorted(margins), abs=1e-4)
    assert {row["p_flip"] for row in rows} == {""}
    cleaned = (tmp_path / "O" / "cleaned.jsonl").read_text().splitlines()
    assert {json.loads(line)["p_flip"] for line in cleaned} == {None}
    report = (tmp_path / "O" / "report.md").read_text()
    assert f"| its fingerprint | {summary['model_fingerprint']} |" in report
    in_sample = run_rounds(model_folder, pairs, config(tmp_path / "I", num_folds=0)).summary
    assert in_sample["flip_rate"] == {"estimate": None, "low": None, "high": None}
    assert in_sample["num_contradicted"] is None
