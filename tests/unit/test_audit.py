"""The audit: who judges whom, what a verdict changes, and that nothing changes where little speaks for flips."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file

from ropo.align import run_audit, run_rounds
from ropo.config import ROPOConfig
from ropo.crossfit import NUM_CHECKS, _deal, folds_of
from ropo.data.load import load_pairs
from ropo.ledger import read_ledger
from ropo.pairs import Pair
from ropo.provenance import hash_file
from ropo.trainer import ROPOTrainer
from ropo.weighing import resolve_alpha


def config(folder, **options):
    common = {
        "output_dir": str(folder), "learning_rate": 3e-3, "per_device_train_batch_size": 4, "max_length": 96,
        "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "num_folds": 4,
    }  # fmt: skip
    return ROPOConfig(**{**common, **options})


def ledger_of(folder):
    return read_ledger(folder / "ledger.parquet").to_pandas()


def test_no_model_judges_what_it_was_trained_on(model_folder, pairs, tmp_path, monkeypatch):
    """Copies and contradictions of a pair share its fold; every pair is judged once in each pass."""
    twin = replace(pairs[0], chosen=pairs[0].rejected, rejected=pairs[0].chosen, row=20)
    seen, train = [], ROPOTrainer.train_or_resume

    def watching(self, made_from):
        seen.append(
            (self.args.loss, {p.id for p in self.train_dataset.pairs}, [p.row for p in self.eval_dataset.pairs])
        )
        train(self, made_from)
        assert len(self.check_margins) == NUM_CHECKS

    monkeypatch.setattr(ROPOTrainer, "train_or_resume", watching)
    run_audit(model_folder, [*pairs, twin], config(tmp_path / "O", rho="0.2"))
    ids = {pair.row: pair.id for pair in [*pairs, twin]}
    assert len(seen) == 8
    assert {loss for loss, _, _ in seen[:4]} == {"dpo"}
    for _, learned, judged in seen:
        assert not learned & {ids[row] for row in judged}
    for number in (0, 4):
        assert sorted(row for _, _, judged in seen[number : number + 4] for row in judged) == list(range(21))


def test_checks_are_different_moments_of_one_training(model_folder, pairs, tmp_path):
    run_audit(model_folder, pairs, config(tmp_path / "O", num_train_epochs=3, num_passes=1))
    report = json.loads((tmp_path / "O" / "report.json").read_text())
    assert report["estimate"]["num_pairs"] == 20
    margins = load_file(tmp_path / "O" / "audit" / "pass_0" / "judgement.safetensors")["margins"]
    assert margins.shape == (NUM_CHECKS, 20)
    assert np.abs(margins[0] - margins[1]).min() > 0
    assert np.abs(margins[1] - margins[2]).min() > 0
    assert np.abs(margins[0]).mean() < np.abs(margins[2]).mean()


def test_where_nothing_speaks_for_flips_ropo_is_dpo_bit_for_bit(model_folder, pairs, tmp_path):
    """Twenty pairs are too few to tell anything, so `auto` trains what plain DPO trains."""
    summary = run_rounds(model_folder, pairs, config(tmp_path / "auto"))
    run_rounds(model_folder, pairs, config(tmp_path / "dpo", loss="dpo", rho="0", num_folds=0))
    assert (summary["is_informative"], summary["rho"], summary["alpha"]) == (False, 0.0, 0.0)
    assert "cannot be told" in summary["alpha_reason"]
    auto, dpo = (hash_file(tmp_path / name / "model.safetensors") for name in ("auto", "dpo"))
    assert auto == dpo
    run_rounds(model_folder, pairs, config(tmp_path / "given", alpha="14", rho="0"))
    assert hash_file(tmp_path / "given" / "model.safetensors") != dpo


@pytest.mark.parametrize(
    ("estimate", "left", "alpha"),
    [
        ({"is_informative": True, "rate": 0.4, "low": 0.1}, 0.35, 13.9),
        ({"is_informative": True, "rate": 0.4, "low": 0.1}, 0.0, 2.0),
        ({"is_informative": True, "rate": 0.02, "low": 0.01}, 0.01, 2.34),
        ({"is_informative": True, "rate": 0.049, "low": 0.0}, 0.049, 0.0),
        ({"is_informative": True, "rate": 0.1, "low": 0.0}, 0.1, 5.4),
        ({"is_informative": False, "rate": 0.4, "low": 0.1}, 0.2, 0.0),
    ],
)
def test_alpha_follows_the_noise_that_is_left(estimate, left, alpha):
    assert resolve_alpha(None, estimate, left)[0] == pytest.approx(alpha)
    assert resolve_alpha(6.0, estimate, left) == (6.0, "it was given")


def test_one_more_pass_goes_on_from_those_that_are_done(model_folder, pairs, tmp_path):
    options = {"rho": "0.2", "alpha": "14"}
    run_audit(model_folder, pairs, config(tmp_path / "O", num_passes=2, **options))
    files = sorted((tmp_path / "O" / "audit").rglob("fold_*.safetensors"))
    before = {path: path.stat().st_mtime_ns for path in files}
    summary = run_audit(model_folder, pairs, config(tmp_path / "O", num_passes=3, **options))
    assert {path: path.stat().st_mtime_ns for path in files} == before
    assert "pass 2 fold 3" in summary["seconds"]


def test_an_audit_goes_on_as_a_training(model_folder, pairs, tmp_path, monkeypatch):
    """The same folder and options: the folds are not trained again, and the result is that of a training alone."""
    run_audit(model_folder, pairs, config(tmp_path / "O", rho="0.2"))
    assert {"cleaned.jsonl", "dropped.jsonl", "review.csv"} <= {path.name for path in (tmp_path / "O").iterdir()}
    run_rounds(model_folder, pairs, config(tmp_path / "alone", rho="0.2"))
    trained, train = [], ROPOTrainer.train_or_resume

    def watching(self, made_from):
        trained.append(len(self.train_dataset))
        train(self, made_from)

    monkeypatch.setattr(ROPOTrainer, "train_or_resume", watching)
    run_rounds(model_folder, pairs, config(tmp_path / "O", rho="0.2"))
    assert len(trained) == 1
    assert hash_file(tmp_path / "O" / "model.safetensors") == hash_file(tmp_path / "alone" / "model.safetensors")


def test_cleaned_data_is_ready_to_train_with(model_folder, pairs, tmp_path):
    folder = tmp_path / "O"
    summary = run_audit(model_folder, pairs, config(folder, rho="0.3", decision_rule="relabel"))
    cleaned, ledger = load_pairs(folder / "cleaned.jsonl"), ledger_of(folder)
    dropped = [json.loads(line) for line in (folder / "dropped.jsonl").read_text().splitlines()]
    assert not cleaned.problems
    assert len(cleaned.pairs) == summary["num_kept"] + summary["num_flipped"]
    assert [row["row"] for row in dropped] == ledger.loc[ledger["decision"] == "drop", "row"].tolist()
    assert summary["num_dropped"] == len(dropped) > 0


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
    run_audit(model_folder, pairs, config(tmp_path / "O", rho="0.2", num_passes=1))
    verdicts = {3: "wrong", 4: "drop", 5: "right", 6: "right"}
    table = fill(tmp_path / "O", verdicts)
    summary = run_rounds(
        model_folder, pairs, config(tmp_path / "T", rho="0.5", decision_rule="lowest_loss"), decisions=table
    )
    ledger = ledger_of(tmp_path / "T").set_index("row")
    assert ledger.loc[[3, 4, 5, 6], "decision"].tolist() == ["flip", "drop", "keep", "keep"]
    assert ledger.loc[[3, 5, 6], "p_flip"].tolist() == [1, 0, 0]
    assert ledger.loc[4, "weight"] == 0
    assert summary["num_trusted"] == 3
    rest = ledger.drop([3, 4, 5, 6])
    assert (rest["decision"] == "drop").sum() == 8  # half of the sixteen that nobody has judged
    cleaned = run_audit(model_folder, pairs, config(tmp_path / "A", num_passes=1), decisions=table)
    assert cleaned["num_flipped"] == 1
    turned = next(p for p in load_pairs(tmp_path / "A" / "cleaned.jsonl").pairs if p.id == pairs[3].id)
    assert (turned.chosen, turned.rejected) == (pairs[3].rejected, pairs[3].chosen)


def test_verdicts_are_obeyed_where_nobody_judges(model_folder, pairs, tmp_path, monkeypatch):
    """Plain DPO trains on what a person has said, and so does a run without folds."""
    run_audit(model_folder, pairs, config(tmp_path / "O", num_passes=1))
    table = fill(tmp_path / "O", {3: "wrong", 4: "drop", 5: "right"})
    trained, train = [], ROPOTrainer.train_or_resume

    def watching(self, made_from):
        trained.append({pair.row: pair for pair in self.train_dataset.pairs})
        train(self, made_from)

    monkeypatch.setattr(ROPOTrainer, "train_or_resume", watching)
    for name, options in (
        ("dpo", {"loss": "dpo", "rho": "0"}),
        ("in_sample", {"num_folds": 0, "rho": "0.5", "rounds": 2}),
    ):
        run_rounds(model_folder, pairs, config(tmp_path / name, **options), decisions=table)
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
        summary = run_rounds(model_folder, pairs, config(tmp_path / f"O{len(options)}", rho="0.2", **options))
        assert (summary["is_informative"], summary["num_dropped"]) == (False, 4)
    assert config(tmp_path, rho="0.2").decision_rule == "lowest_loss"
    assert config(tmp_path).decision_rule == "threshold"


@pytest.mark.parametrize("options", [{"num_folds": 0, "rho": "0.2"}, {"loss": "dpo", "rho": "0"}])
def test_a_rule_that_needs_checks_needs_folds(options, tmp_path):
    with pytest.raises(ValueError, match="decision_rule uncertainty needs held-out margins"):
        config(tmp_path, decision_rule="uncertainty", **options)


def test_trusted_pairs_are_kept_and_are_no_part_of_the_data(model_folder, pairs, tmp_path):
    summary = run_audit(
        model_folder, pairs[:15], config(tmp_path / "O", rho="0.5", decision_rule="lowest_loss"), trusted=pairs[15:]
    )
    ledger = ledger_of(tmp_path / "O")
    trusted = ledger[ledger["origin"] == "trusted"]
    assert (len(trusted), summary["num_pairs"], summary["num_trusted"]) == (5, 15, 5)
    assert set(trusted["decision"]) == {"keep"}
    assert (trusted["p_flip"] == 0).all()
    assert summary["num_dropped"] == 7
    assert len(load_pairs(tmp_path / "O" / "cleaned.jsonl").pairs) == 8


def test_trusted_pairs_are_no_resampled_ones(model_folder, pairs, tmp_path):
    summary = run_rounds(model_folder, pairs[:15], config(tmp_path / "O", rho="0", num_folds=0), trusted=pairs[15:])
    assert (summary["num_pairs"], summary["num_resampled"], summary["num_trusted"]) == (15, 0, 5)


def test_what_is_to_be_left_out_is_not_called_wrong(model_folder, many, tmp_path, monkeypatch):
    """A verdict "drop" says nothing about the label: P(flipped) is what the judges say."""
    Planted(monkeypatch, share=0.1, gain=0)
    pairs = [replace(pair, verdict="drop") if pair.row in (70, 71) else pair for pair in many]
    run_audit(model_folder, pairs, config(tmp_path / "O"))
    ledger = ledger_of(tmp_path / "O").set_index("row")
    assert ledger.loc[[70, 71], "decision"].tolist() == ["drop", "drop"]
    assert ledger.loc[70, "p_flip"] == pytest.approx(ledger.loc[72, "p_flip"], abs=0.05)
    assert ledger.loc[[70, 71], "p_flip"].max() < 0.5


class Planted:
    """Margins in place of trained models: the first pass, then judges with and without what it contradicts.

    `gain` and `robust_gain` are how many labels more the models agree with that were trained without the contradicted
    pairs, and with the robust loss.
    """

    def __init__(self, monkeypatch, *, share, gain, robust_gain=0, num_pairs=80):
        monkeypatch.setattr("ropo.audit.crossfit_margins", self)
        rng = np.random.default_rng(0)
        self.right = np.where(np.arange(num_pairs) < share * num_pairs, -1.0, 1.0)
        self.first = self.right * (1 + rng.random(num_pairs))  # near zero: doubt and flips read alike
        self.gains, self.calls, self.epochs = {"pass_1": gain, "robust": robust_gain}, [], {}

    def __call__(self, data, training, args, *, folder, digest, num_scored=None, **_):
        self.calls.append((folder.name, len(training), num_scored, digest))
        if num_scored is not None:
            self.epochs[folder.name] = args.num_train_epochs
        margins = self.first.copy()
        gain = self.gains.get(folder.name, 0)
        margins[np.flatnonzero((self.first < 0) == (gain > 0))[: abs(gain)]] *= -1
        margins = np.pad(margins, (0, len(data) - len(margins)), constant_values=-1.0)  # trusted pairs
        if num_scored is not None:
            margins[np.arange(len(data)) % args.num_folds >= num_scored] = np.nan
        return np.tile(margins, (NUM_CHECKS, 1))


@pytest.fixture
def many(pairs):
    return [replace(pairs[i % 20], prompt=f"{i} {pairs[i % 20].prompt}", row=i) for i in range(80)]


def test_a_filter_that_is_shown_to_help_is_used(model_folder, many, tmp_path, monkeypatch):
    """The estimate reaches 0, but models that leave out the suspects agree with more labels they have not seen."""
    planted = Planted(monkeypatch, share=0.35, gain=20)
    summary = run_audit(model_folder, many, config(tmp_path / "O"))
    trial = summary["trial"]
    assert trial["helps"]
    assert trial["left_out"] == pytest.approx(0.35)
    assert trial["gain"] == pytest.approx(0.25)
    assert trial["num_pairs"] == 80
    assert summary["flip_rate"]["is_raised"]
    assert summary["is_informative"]
    assert 0.1 <= summary["rho"] == summary["flip_rate"]["estimate"] <= summary["flip_rate"]["high"]
    assert summary["alpha"] >= 2
    assert "two judges" in summary["rho_reason"]
    # Each fold in turn with all pairs and without the suspects, and the latter are the second pass.
    assert [call[:3] for call in planted.calls] == [
        ("pass_0", 80, None),
        *[(name, size, fold) for fold in (1, 2, 3, 4) for name, size in (("with_all", 80), ("pass_1", 52))],
        ("pass_1", 52, None),
    ]
    assert len({digest for name, *_, digest in planted.calls if name == "pass_1"}) == 1
    assert planted.epochs == {"with_all": 1, "pass_1": pytest.approx(80 / 52)}  # as many steps on either side
    report = (tmp_path / "O" / "report.md").read_text()
    assert "models trained without the 35 % that the first judges contradict agree with 90.0 %" in report.replace(
        "\N{NO-BREAK SPACE}", " "
    )


def test_a_filter_that_does_not_help_is_given_up(model_folder, many, tmp_path, monkeypatch):
    """As soon as enough labels were asked about: here those of two folds."""
    monkeypatch.setattr("ropo.audit.MIN_ASKED", 40)
    planted = Planted(monkeypatch, share=0.35, gain=-4)
    summary = run_audit(model_folder, many, config(tmp_path / "O"))
    assert summary["trial"]["helps"] is False
    assert (summary["rho"], summary["num_dropped"], summary["flip_rate"]["is_raised"]) == (0.0, 0, False)
    assert summary["trial"]["num_pairs"] == 40
    tried = [*["with_all", "pass_1"] * 2, *["with_all", "robust"] * 2]
    assert [name for name, *_ in planted.calls] == ["pass_0", *tried]
    report = (tmp_path / "O" / "report.md").read_text().replace("\N{NO-BREAK SPACE}", " ")
    assert "That is no sure gain, so they stay." in report
    # Done once: the same command reads what it wrote.
    run_audit(model_folder, many, config(tmp_path / "O"))
    assert [name for name, *_ in planted.calls] == ["pass_0", *tried, "pass_0"]


@pytest.mark.parametrize(
    ("robust_gain", "is_taken", "num_folds_asked"), [(2, True, 2), (0, True, 2), (-1, False, 4), (-12, False, 2)]
)
def test_the_robust_loss_is_taken_unless_it_costs(
    model_folder, many, tmp_path, monkeypatch, robust_gain, is_taken, num_folds_asked
):
    """Where no filter helps: by labels that no model has seen, as soon as enough of them say so; DPO if they do not."""
    monkeypatch.setattr("ropo.audit.MIN_ASKED", 40)
    planted = Planted(monkeypatch, share=0.2, gain=-4, robust_gain=robust_gain)
    summary = run_audit(model_folder, many, config(tmp_path / "O"))
    asked = [(fold, digest) for name, _, fold, digest in planted.calls if name == "robust"]
    assert [fold for fold, _ in asked] == list(range(1, num_folds_asked + 1))
    # DPO's models are those that the filter was tried against.
    assert len({digest for name, *_, digest in planted.calls if name == "with_all"}) == 1
    assert asked[0][1] not in {digest for name, *_, digest in planted.calls if name != "robust"}
    assert (summary["rho"], summary["num_dropped"]) == (0.0, 0)
    assert summary["alpha"] == (pytest.approx(2 + 34 * 0.2) if is_taken else 0.0)
    assert "models trained with the noise-tolerant loss agree with" in summary["alpha_reason"]
    report = (tmp_path / "O" / "report.md").read_text().replace("\N{NO-BREAK SPACE}", " ")
    assert (
        "weight of the noise-tolerant part" if is_taken else "α = 0: plain DPO, since models trained with"
    ) in report


def test_a_given_alpha_is_not_tried(model_folder, many, tmp_path, monkeypatch):
    planted = Planted(monkeypatch, share=0.2, gain=-4)
    summary = run_audit(model_folder, many, config(tmp_path / "O", alpha="6"))
    assert summary["trial"]["helps"] is False
    assert summary["alpha"] == 6
    assert "robust" not in {name for name, *_ in planted.calls}


def test_few_labels_cannot_speak_for_a_loss(model_folder, many, tmp_path, monkeypatch):
    planted = Planted(monkeypatch, share=0.2, gain=-4)
    assert run_audit(model_folder, many, config(tmp_path / "O"))["alpha"] == 0
    assert "robust" not in {name for name, *_ in planted.calls}


def test_the_loss_is_that_of_the_audit_whose_margins_are_read(model_folder, many, tmp_path, monkeypatch):
    """Of the models that are there nobody says by which loss they were trained, so nothing is compared with them."""
    monkeypatch.setattr("ropo.audit.MIN_ASKED", 40)
    planted = Planted(monkeypatch, share=0.2, gain=-4)
    first = run_audit(model_folder, many, config(tmp_path / "O"))
    run_audit(model_folder, many, config(tmp_path / "fixed", alpha="6"))
    monkeypatch.setattr("ropo.align._margins_of", lambda *_, **__: None)
    planted.calls.clear()
    for name, alpha in (("O", first["alpha"]), ("fixed", 0.0)):
        summary = run_audit(model_folder, many, config(tmp_path / f"P {name}", audit_from=str(tmp_path / name)))
        assert summary["alpha"] == alpha
        assert "robust" not in {name for name, *_ in planted.calls}


def test_known_labels_have_no_say_in_a_trial(model_folder, many, tmp_path, monkeypatch):
    """Trusted pairs stay, though they are contradicted, and are not counted."""
    planted = Planted(monkeypatch, share=0.35, gain=20, num_pairs=79)
    summary = run_audit(model_folder, many[:79], config(tmp_path / "O"), trusted=many[79:])
    assert summary["trial"]["num_pairs"] == 79
    assert {size for name, size, *_ in planted.calls if name == "pass_1"} == {52}


@pytest.mark.parametrize(
    ("share", "options"),
    [(0.05, {}), (0.45, {}), (0.35, {"num_passes": 1}), (0.35, {"rho": "0"})],
    ids=["little to win", "judges like coins", "one pass", "a given rho"],
)
def test_what_is_not_tried(model_folder, many, tmp_path, monkeypatch, share, options):
    planted = Planted(monkeypatch, share=share, gain=3)
    summary = run_audit(model_folder, many, config(tmp_path / "O", **options))
    assert summary["trial"] is None
    assert [name for name, *_ in planted.calls if name != "pass_0"] == []


def test_folds_are_even_and_repeatable():
    ids = [f"pair {number % 50}" for number in range(60)]
    fold_of = _deal(ids, 5, seed=1)
    assert np.bincount(list(fold_of.values())).tolist() == [10] * 5
    assert _deal(ids[::-1], 5, seed=1) == fold_of
    assert _deal(ids, 5, seed=2) != fold_of
    with pytest.raises(ValueError, match="got 5 folds and 3 pairs"):
        _deal(["a", "b", "c"], 5, seed=0)


def test_what_reads_the_same_shares_a_fold(pairs):
    """A model that has learned a pair has learned its label, whatever white space, case or marks stand around it."""
    twins = [replace(pair, prompt=f"{pair.prompt} ", id="", row=20 + pair.row) for pair in pairs]
    turned = [replace(p, chosen=p.rejected, rejected=f"{p.chosen}!", id="", row=40 + p.row) for p in pairs]
    fold_of = folds_of([*pairs, *twins, *turned], 4, seed=0)
    assert len(fold_of) == 60
    for group in zip(pairs, twins, turned, strict=True):
        assert len({fold_of[pair.id] for pair in group}) == 1
    # Without such twins folds are dealt by the ids themselves.
    assert folds_of(pairs, 4, seed=0) == _deal([pair.id for pair in pairs], 4, seed=0)


def test_pairs_that_differ_in_an_operator_are_dealt_by_themselves():
    """60 comparisons that no two letters tell apart are 60 groups, so folds are even."""
    pairs = [
        Pair(prompt=f"Is {i} {sign} {i + 1} ?", chosen=" true", rejected=" false", row=0)
        for i in range(30)
        for sign in "<>"
    ]
    fold_of = folds_of(pairs, 4, seed=0)
    assert np.bincount([fold_of[pair.id] for pair in pairs]).tolist() == [15] * 4
    assert any(fold_of[one.id] != fold_of[other.id] for one, other in zip(pairs[::2], pairs[1::2], strict=True))


def test_data_given_twice_is_no_more_evidence(model_folder, many, tmp_path, monkeypatch):
    """Rate, interval, rates of annotators and calibration of an audit are those of the data given once."""
    rng = np.random.default_rng(0)
    size = np.where(rng.random(80) < 0.15, -1.0, 1.0) * rng.normal(4.0, 1.0, 80)
    margin_of = {pair.prompt.strip(): margin for pair, margin in zip(many, size, strict=True)}
    monkeypatch.setattr(
        "ropo.audit.crossfit_margins",
        lambda data, *_, **__: np.tile([margin_of[pair.prompt.strip()] for pair in data.pairs], (NUM_CHECKS, 1)),
    )
    named = [replace(pair, annotator=f"a{pair.row % 2}") for pair in many]
    copies = [replace(pair, prompt=f"{pair.prompt} ", id="", row=80 + pair.row) for pair in named]
    once, twice = (
        run_audit(model_folder, pairs, config(tmp_path / str(len(pairs)), num_passes=1))
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


@pytest.mark.parametrize(("num_different", "num_asked"), [(80, 80), (40, None)])
def test_a_trial_asks_about_different_pairs(model_folder, many, tmp_path, monkeypatch, num_different, num_asked):
    """Copies count as one label, and with too few different pairs nothing is tried."""
    copies = [replace(pair, row=num_different + pair.row) for pair in many[:num_different]]
    pairs = [*many[:num_different], *copies]
    Planted(monkeypatch, share=0.35, gain=20, num_pairs=len(pairs))
    trial = run_audit(model_folder, pairs, config(tmp_path / "O"))["trial"]
    assert (trial and trial["num_pairs"]) == num_asked


def test_a_finished_audit_is_read_by_other_runs(model_folder, pairs, tmp_path, monkeypatch):
    """Verdicts, another rule, another beta: the judges are asked, not trained; only what is aligned is trained."""
    rows = [{"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in pairs]
    options = {"rho": "0.3", "decision_rule": "lowest_loss"}
    run_audit(model_folder, rows, config(tmp_path / "O", **options))
    told = {"decisions": fill(tmp_path / "O", {3: "wrong", 4: "drop"})}
    trained, train = [], ROPOTrainer.train_or_resume
    monkeypatch.setattr(ROPOTrainer, "train_or_resume", lambda self, of: trained.append(len(of)) or train(self, of))
    there = {**options, "audit_from": str(tmp_path / "O")}
    run_rounds(model_folder, rows, config(tmp_path / "A", beta=0.3, rounds=1, **there), **told)
    assert len(trained) == 1
    before, after = (load_file(tmp_path / name / "audit" / "pass_0" / "judgement.safetensors") for name in "OA")
    np.testing.assert_array_equal(before["margins"], after["margins"])
    ledger = ledger_of(tmp_path / "A").set_index("row")
    assert ledger.loc[[3, 4], "decision"].tolist() == ["flip", "drop"]
    # It is a run like others: given again it does nothing, and without the other folder it is not the same.
    run_rounds(model_folder, rows, config(tmp_path / "A", beta=0.3, rounds=1, **there), **told)
    assert len(trained) == 1
    with pytest.raises(ValueError, match="holds a run with other settings:\n  audit_from"):
        run_rounds(model_folder, rows, config(tmp_path / "A", beta=0.3, rounds=1, **options), **told)
    run_audit(model_folder, rows, config(tmp_path / "B", rho="0.2", audit_from=str(tmp_path / "O")))
    assert len(trained) == 1


def test_what_margins_are_not_taken_from(model_folder, pairs, tmp_path):
    run_audit(model_folder, pairs, config(tmp_path / "O", rho="0.3", num_passes=1))
    there = {"rho": "0.3", "num_passes": 1, "audit_from": str(tmp_path / "O")}
    for options, rows, said in (
        ({"num_folds": 5}, pairs, "another one:\n  num_folds: 4 there, 5 now"),
        ({"seed": 7}, pairs, "another one:\n  seed: 42 there, 7 now"),
        ({}, pairs[1:], "another one:\n  pairs: content "),
        ({"audit_from": str(tmp_path)}, pairs, "needs the output folder of an audit"),
    ):
        with pytest.raises(ValueError, match=said):
            run_audit(model_folder, rows, config(tmp_path / "A", **{**there, **options}))
    with pytest.raises(ValueError, match="needs a run that audits"):
        run_rounds(model_folder, pairs, config(tmp_path / "A", **{**there, "rho": "0", "alpha": "14"}))
    (tmp_path / "O" / "audit" / "pass_0" / "fold_3.safetensors").unlink()
    with pytest.raises(ValueError, match="was broken off"):
        run_audit(model_folder, pairs, config(tmp_path / "A", **there))


def test_an_audit_needs_folds(model_folder, pairs, tmp_path):
    with pytest.raises(ValueError, match="An audit needs num_folds of 2 or more; got 0"):
        run_audit(model_folder, pairs, config(tmp_path / "O", num_folds=0, rho="0.1", alpha="14", rounds=2))


def test_no_rate_is_written_where_none_can_be_told(model_folder, pairs, tmp_path):
    """A script must not read 0 % there."""
    summary = run_audit(model_folder, pairs, config(tmp_path / "O"))
    assert not summary["is_informative"]
    assert summary["flip_rate"]["estimate"] is None
    assert 0.0 <= summary["flip_rate"]["low"] < summary["flip_rate"]["high"] <= 0.5
    margins = read_ledger(tmp_path / "O" / "ledger.parquet")["held_out_margin"].to_numpy()
    assert summary["num_contradicted"] == (margins < 0).sum()
    with (tmp_path / "O" / "review.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["margin"]) for row in rows] == pytest.approx(sorted(margins), abs=1e-4)
    assert {row["p_flip"] for row in rows} == {""}
    report = (tmp_path / "O" / "report.md").read_text()
    assert f"| its fingerprint | {summary['model_fingerprint']} |" in report
    in_sample = run_rounds(model_folder, pairs, config(tmp_path / "I", num_folds=0))
    assert in_sample["flip_rate"] == {"estimate": None, "low": None, "high": None, "is_raised": False}
    assert in_sample["num_contradicted"] is None


def test_annotators_of_a_raised_rate_are_those_of_two_judges(model_folder, many, tmp_path, monkeypatch):
    """They cover all the data, so they must average to what is said of all."""
    Planted(monkeypatch, share=0.35, gain=20)
    named = [replace(pair, annotator="ab"[pair.row % 2]) for pair in many]
    summary = run_audit(model_folder, named, config(tmp_path / "O"))
    assert summary["flip_rate"]["is_raised"]
    rates = [one["rate"] for one in summary["annotators"]]
    assert np.mean(rates) == pytest.approx(summary["flip_rate"]["estimate"], abs=1e-6)
