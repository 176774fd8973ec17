"""The scorer of every audit, on features whose truth is known: what is taken, what length may say, what verdicts do."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file

from ropo.audit import features
from ropo.audit.features import KINDS
from ropo.audit.run import Audit
from ropo.audit.weights import Why, filter_pays
from ropo.config import ROPOConfig
from ropo.data.tokenize import TokenizedPair
from ropo.models.source import Model
from ropo.noise.linear import Gain, LinearModels
from ropo.pairs import Pair, PairFeatures
from ropo.provenance import read_json
from ropo.run.align import run_audit
from ropo.train.dataset import PairDataset

NUM_PAIRS = 300


class Case:
    """Pairs whose better response a direction of the hidden states tells; some labels are flipped.

    Attributes:
        pairs: As labelled; every third one is by annotator b.
        tokens: Of lengths that say nothing unless `longer` does.
        blocks: Of the pairs as labelled; "gradient" knows nothing.
        is_flipped: Which labels are wrong.
    """

    def __init__(self, seed=0, *, share=0.2, gap=2.0, longer=0.0, num_pairs=NUM_PAIRS):
        rng = np.random.default_rng(seed)
        length = rng.normal(size=num_pairs)
        towards_longer = (length < 0) & (rng.random(num_pairs) < longer)
        self.is_flipped = (rng.random(num_pairs) < share) | towards_longer
        sign = np.where(self.is_flipped, -1.0, 1.0)
        better = np.concatenate([np.abs(rng.normal(gap, 1, (num_pairs, 1))), rng.normal(size=(num_pairs, 19))], axis=1)
        blocks = {
            "gradient": rng.normal(size=(num_pairs, 30)),
            "hidden_middle": better,
            "hidden_last": rng.normal(size=(num_pairs, 5)) + 2 * length[:, None],
        }
        self.blocks = {name: (sign[:, None] * block).astype(np.float32) for name, block in blocks.items()}
        lengths = np.maximum(np.rint(20 * np.exp(sign[:, None] * length[:, None] * [0.3, -0.3])), 2).astype(int)
        self.tokens = [
            TokenizedPair(
                prompt=[1], chosen=rng.integers(3, 40, one).tolist(), rejected=rng.integers(3, 40, two).tolist()
            )
            for one, two in lengths
        ]
        self.pairs = [
            Pair(prompt=f"{row}?", chosen=f" yes {row}", rejected=f" no {row}", row=row, annotator="bca"[row % 3])
            for row in range(num_pairs)
        ]

    def judged(self, verdicts):
        """The same with what a person has said about some rows."""
        found = object.__new__(Case)
        found.__dict__.update(self.__dict__)
        found.pairs = [replace(pair, verdict=verdicts.get(pair.row)) for pair in self.pairs]
        return found

    def audit(self, folder, tokenizer, **options):
        args = ROPOConfig(output_dir=str(folder), use_cpu=True, **{"num_folds": 4, **options})
        audit = Audit(
            PairDataset(self.pairs, self.tokens),
            args,
            folder=folder / "audit",
            model=Model("nowhere", tokenizer=tokenizer),
            reference=SimpleNamespace(features=lambda _: PairFeatures(blocks=self.blocks)),
        )
        audit.run("digest")
        return audit


def auroc(score, is_flipped):
    return float(np.mean(score[is_flipped][:, None] > score[~is_flipped][None, :]))


def taken(audit):
    return next(row.name for row in audit.scores.rows if row.is_taken)


@pytest.mark.parametrize("known", KINDS)
def test_whatever_predicts_unseen_labels_judges(known, tmp_path, tokenizer):
    """One kind of features knows the better response and the others nothing: flips are found by any."""
    case, rng = Case(), np.random.default_rng(1)
    sign = np.where(case.is_flipped, -1.0, 1.0)[:, None]
    truth, noise = np.abs(rng.normal(2, 1, (NUM_PAIRS, 1))), rng.normal(size=(NUM_PAIRS, 8))
    of = {name: truth if name == known else noise for name in KINDS}
    blocks = {"gradient": of["gradients"], "hidden_middle": of["hidden states"], "hidden_last": noise[:, :2]}
    case.blocks = {name: (sign * block).astype(np.float32) for name, block in blocks.items()}
    if known == "n-grams":
        words = [([50, 51], [60, 61]) if right > 0 else ([60, 61], [50, 51]) for right in sign[:, 0]]
        case.tokens = [
            replace(one, chosen=[*good, *one.chosen], rejected=[*bad, *one.rejected])
            for one, (good, bad) in zip(case.tokens, words, strict=True)
        ]
    audit = case.audit(tmp_path, tokenizer)
    agreement = {row.name: row.agreement for row in audit.scores.rows}
    assert max(KINDS, key=agreement.__getitem__) == known
    assert agreement["together"] > agreement[known] - 0.02
    assert auroc(-audit.margins(), case.is_flipped) > 0.95


def test_every_audit_shows_what_each_kind_knows_and_never_goes_by_length(tmp_path, tokenizer):
    """Length agrees with nearly all labels here, and the features with two thirds."""
    case = Case(share=0.05, gap=0.3, longer=0.95)
    audit = case.audit(tmp_path, tokenizer)
    rows = {row.name: row for row in audit.scores.rows}
    assert list(rows) == ["together", *KINDS, "length"]
    assert taken(audit) == "together"
    assert sum(row.is_taken for row in rows.values()) == 1
    assert rows["length"].agreement > rows["together"].agreement + 0.1
    found = json.loads((tmp_path / "audit" / "scorers.json").read_text())
    assert [row["name"] for row in found["rows"]] == list(rows)
    assert found["filter"].keys() == {"gain", "error", "with_covariates", "with_covariates_error"}
    assert audit.scores.views.shape == (len(KINDS), NUM_PAIRS)


def test_right_labels_that_follow_length_filter_nothing(tmp_path, tokenizer):
    """Short answers are better as they should be: without lengths a third of the labels looks contradicted.

    Fitted without them, models agree better with what lengths leave of the labels; a training would lose a third of its
    pairs, all of them right.
    """
    num_helped = 0
    for seed in range(3):
        rng, num_pairs = np.random.default_rng(seed), 800
        case = Case(seed, share=0.0, num_pairs=num_pairs)
        polite, longer = rng.normal(size=(2, num_pairs))
        sign = np.sign(polite - 1.2 * longer)
        known = np.concatenate([(sign * polite)[:, None], 0.5 * rng.normal(size=(num_pairs, 60))], axis=1)
        case.blocks = {name: known.astype(np.float32) for name in case.blocks}
        case.tokens = [
            TokenizedPair(
                prompt=[1], chosen=rng.integers(3, 40, one).tolist(), rejected=rng.integers(3, 40, 30).tolist()
            )
            for one in np.maximum(np.rint(30 * np.exp(0.4 * sign * longer)), 2).astype(int)
        ]
        audit = case.audit(tmp_path / str(seed), tokenizer)
        gain = audit.scores.filter
        num_helped += gain.helps
        assert gain.rests_on_covariates
        assert (audit.judgement.rho.value, set(audit.judgement.decisions)) == (0.0, {"keep"})
    assert num_helped


LOST = Gain(gain=0.02, error=0.01, with_covariates=-0.02, with_covariates_error=0.01)  # once lengths count


@pytest.mark.parametrize(
    ("gain", "p_flip", "pays"),
    [
        (Gain(gain=0.02, error=0.01), [0.0, 0.0], True),  # flips are where margins are small, and look like doubt
        (Gain(gain=0.005, error=0.01), [0.9, 0.9], False),
        (LOST, [0.9, 0.9, 0.1], True),  # labels that were flipped towards the longer response
        (LOST, [0.9, 0.1, 0.1], False),
        (replace(LOST, with_covariates=-0.005), [0.0], True),
        (LOST, [], False),
        (None, [0.9], False),
    ],
)
def test_a_filter_that_pays_without_lengths_alone_needs_flips(gain, p_flip, pays):
    assert filter_pays(gain, p_flip=np.array(p_flip)) is pays


def test_a_pair_is_not_judged_by_length_unless_length_is_evidence(tmp_path, tokenizer):
    """Labels were flipped towards the longer response; asked to, the audit believes them."""
    case = Case(share=0.0, longer=0.5)
    without, with_it = (
        case.audit(tmp_path / str(option), tokenizer, length_is_evidence=option) for option in (False, True)
    )
    assert auroc(-without.margins(), case.is_flipped) > 0.9
    assert auroc(-with_it.margins(), case.is_flipped) < auroc(-without.margins(), case.is_flipped) - 0.02
    # The second reading is that of what the first leaves out, and there is none where nothing is left out.
    np.testing.assert_allclose(without.margins() + without.scores.length, with_it.margins(), atol=1e-9)
    one, other = (each.to_json() for each in (without.judgement.with_length, with_it.judgement.estimate))
    assert all(one[name] == pytest.approx(other[name]) for name in ("rate", "low", "high", "scale"))
    assert with_it.judgement.with_length is None
    assert without.judgement.estimate.rate > without.judgement.with_length.rate


@pytest.mark.parametrize("options", [{"scorer": "models"}, {"num_folds": 0}])
def test_length_is_evidence_for_linear_models_alone(options, tmp_path):
    with pytest.raises(ValueError, match=r"length_is_evidence .*scorer features"):
        ROPOConfig(output_dir=str(tmp_path), use_cpu=True, length_is_evidence=True, **options)
    ROPOConfig(output_dir=str(tmp_path), use_cpu=True, length_is_evidence=True)


def test_gradients_say_what_a_training_gains_whatever_judges(tmp_path, tokenizer):
    """N-grams know every label, so their refit gains nothing; gradients that flips have misled gain, and pairs go."""
    case, rng = Case(share=0.3), np.random.default_rng(1)
    sign = np.where(case.is_flipped, -1.0, 1.0)
    gradient = np.concatenate([np.full((NUM_PAIRS, 1), 3.0), rng.normal(size=(NUM_PAIRS, 100))], axis=1)
    nothing = rng.normal(size=(NUM_PAIRS, 2))
    known = {"gradient": gradient, "hidden_middle": nothing, "hidden_last": nothing}
    case.blocks = {name: (sign[:, None] * block).astype(np.float32) for name, block in known.items()}
    case.tokens = [
        TokenizedPair(prompt=[1], chosen=[50] if right > 0 else [60], rejected=[60] if right > 0 else [50])
        for right in sign
    ]
    audit = case.audit(tmp_path, tokenizer)
    assert not audit.scores.refit.helps
    assert audit.scores.filter.helps
    assert audit.judgement.rho.why in (Why.FILTER_HELPS, Why.ESTIMATED)
    written = read_json(tmp_path / "audit" / "scorers.json")
    for name in ("refit", "filter"):
        assert written[name] == asdict(getattr(audit.scores, name))


def test_two_folds_are_too_few_to_try_a_filter(tmp_path, tokenizer, monkeypatch):
    assert Case().audit(tmp_path / "3", tokenizer, num_folds=3).scores.filter is not None
    monkeypatch.setattr(LinearModels, "without_suspects", lambda *_, **__: pytest.fail("tried"))
    audit = Case().audit(tmp_path / "2", tokenizer, num_folds=2)
    assert audit.scores.filter is None
    assert auroc(-audit.margins(), Case().is_flipped) > 0.9


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_feature_that_is_no_number_names_its_pair(value, tmp_path, tokenizer):
    case = Case()
    case.blocks["hidden_last"][7, 2] = value
    with pytest.raises(ValueError, match=r"got hidden_last that are not of 1 pairs, the first of row 7\."):
        case.audit(tmp_path, tokenizer)


def test_one_pair_with_features_fifty_times_as_large_blinds_no_audit(tmp_path, tokenizer):
    """Alone it would set the scale on which all pairs are penalised."""
    losses = []
    for seed in range(3):
        case, runaway = Case(seed, gap=1.0), Case(seed, gap=1.0)
        runaway.blocks["hidden_middle"][7] = 50 * np.random.default_rng(9).normal(size=20)
        found = [one.audit(tmp_path / f"{seed} {i}", tokenizer).margins() for i, one in enumerate((case, runaway))]
        rest = np.arange(NUM_PAIRS) != 7
        losses.append(-np.diff([auroc(-margins[rest], case.is_flipped[rest]) for margins in found]))
        assert abs(found[1][7]) < 2 * np.abs(found[0]).max()
    assert np.mean(losses) < 0.01


def test_one_response_of_a_thousand_tokens_does_not_tilt_what_lengths_explain(tmp_path, tokenizer):
    """Its words would stand for its length, and n-grams for a length that is no evidence (correlation .7)."""
    found = []
    for seed in range(3):
        case = Case(seed, share=0.0, longer=0.8, gap=0.5)
        ids = case.tokens[7]
        case.tokens[7] = replace(ids, chosen=[*ids.chosen, *[5] * 1000])
        length = np.log([len(one.chosen) / len(one.rejected) for one in case.tokens])
        ngrams = case.audit(tmp_path / str(seed), tokenizer).scores.views[KINDS.index("n-grams")]
        rest = np.arange(NUM_PAIRS) != 7
        found.append(abs(np.corrcoef(ngrams[rest], length[rest])[0, 1]))
    assert np.mean(found) < 0.2


def test_pairs_are_shrunk_by_what_is_largest_in_them():
    blocks = [np.ones((5, 4)) * [[1], [1], [1], [0], [6]], np.ones((5, 9)) * [[9], [1], [1], [1], [0]]]
    np.testing.assert_allclose(features._shrinkage(blocks), [1 / 3, 1, 1, 1, 1 / 2])
    np.testing.assert_array_equal(features._shrinkage([np.zeros((3, 2), np.float16)]), 1)


@pytest.mark.slow
def test_margins_that_know_nothing_filter_nothing(tmp_path, tokenizer):
    """By chance some comparisons are in favour of a filter, which would drop every other right label."""
    case, num_favoured = Case(share=0.0), 0
    for seed in range(24):
        rng = np.random.default_rng(seed)
        case.blocks = {name: rng.normal(size=(NUM_PAIRS, 8)).astype(np.float32) for name in case.blocks}
        audit = case.audit(tmp_path / str(seed), tokenizer)
        num_favoured += audit.scores.filter.helps
        assert (audit.judgement.rho.value, audit.judgement.rho.why) == (0.0, Why.CANNOT_TELL)
        assert set(audit.judgement.decisions) == {"keep"}
    assert num_favoured


@pytest.mark.parametrize(("share", "options"), [(0.2, {}), (0.3, {}), (0.2, {"decision_rule": "relabel"})])
def test_beta_grows_by_what_the_decisions_add_to_the_labels(share, options, tmp_path, tokenizer):
    """Labels of which a share ε is wrong pull with 1 - 2ε of the strength of right ones."""
    case = Case(share=share)
    judged = case.audit(tmp_path, tokenizer, **options).judgement
    flips, weights = np.array(judged.decisions) == "flip", np.array(judged.weights)
    pulls = [1 - 2 * case.is_flipped.mean(), 1 - 2 * np.average(case.is_flipped != flips, weights=weights)]
    assert judged.beta.why is Why.SAME_DISTANCE
    assert judged.beta.value == pytest.approx(0.3 * pulls[1] / pulls[0], rel=0.1)
    assert judged.beta.facts == {"given": 0.3, "factor": pytest.approx(judged.beta.value / 0.3)}


@pytest.mark.parametrize(
    ("share", "options"),
    [
        (0.0, {"rho": "0"}),  # nothing is filtered
        (0.2, {"adapt_beta": False}),
        (0.2, {"loss": "simpo"}),  # there is no reference to be far from
        (0.5, {"rho": "0.2"}),  # margins that do not know the labels do not know what a filter adds
    ],
)
def test_beta_is_the_given_one(share, options, tmp_path, tokenizer):
    judged = Case(share=share).audit(tmp_path, tokenizer, **options).judgement
    assert (judged.beta.value, judged.beta.why) == (0.3, Why.GIVEN)


def test_a_second_run_reads_the_stage_from_disk(tmp_path, tokenizer, monkeypatch):
    """With other features it would come out otherwise; another option makes it anew."""
    case = Case()
    before = case.audit(tmp_path, tokenizer).margins()
    case.blocks = {name: -block for name, block in case.blocks.items()}
    np.testing.assert_array_equal(case.audit(tmp_path, tokenizer).margins(), before)
    monkeypatch.setattr(LinearModels, "held_out", lambda *_, **__: 1 / 0)
    np.testing.assert_array_equal(case.audit(tmp_path, tokenizer).margins(), before)
    with pytest.raises(ZeroDivisionError):
        case.audit(tmp_path, tokenizer, length_is_evidence=True)


def test_swapping_a_pair_turns_its_margin_and_not_its_size(tmp_path, tokenizer, monkeypatch):
    """Its own label has no say; with the features its length and its words change their sign."""
    monkeypatch.setattr(features, "KINDS", ("hidden states",))  # else labels, its own too, weigh several
    monkeypatch.setattr(features, "_features", lambda blocks, _, factors: [factors * blocks["hidden_middle"]])
    case, turned = Case(gap=3.0), Case(gap=3.0)
    turned.blocks = {name: block.copy() for name, block in case.blocks.items()}
    for block in turned.blocks.values():
        block[7] *= -1
    pair, ids = turned.pairs[7], turned.tokens[7]
    turned.pairs[7] = replace(pair, chosen=pair.rejected, rejected=pair.chosen, id=pair.id)
    turned.tokens[7] = TokenizedPair(prompt=ids.prompt, chosen=ids.rejected, rejected=ids.chosen)
    one, other = (each.audit(tmp_path / str(i), tokenizer, num_folds=2).scores for i, each in enumerate((case, turned)))
    assert other.margins[7] == pytest.approx(-one.margins[7], abs=3e-3)
    assert other.length[7] == pytest.approx(-one.length[7], abs=3e-3)
    rest = np.arange(NUM_PAIRS) != 7
    assert (np.sign(other.margins[rest]) == np.sign(one.margins[rest])).mean() > 0.97


def right_verdicts(case, rows):
    return {int(row): "wrong" if case.is_flipped[row] else "right" for row in rows}


def innocent_dropped(audit, case):
    decisions = np.array(audit.judgement.decisions)
    return int(((decisions != "keep") & ~case.is_flipped).sum())


@pytest.mark.slow
def test_a_right_verdict_drops_no_innocent_pairs(tmp_path, tokenizer):
    """Twenty right verdicts on the most suspect pairs, twenty more: the mean over eight sets of pairs never rises."""
    dropped = np.zeros((8, 3))
    for seed in range(8):
        case = Case(seed, gap=1.0, share=0.25)
        first = case.audit(tmp_path / f"{seed}", tokenizer)
        order = np.argsort(first.margins())
        dropped[seed, 0] = innocent_dropped(first, case)
        for step, num in enumerate((20, 40), start=1):
            judged = case.judged(right_verdicts(case, order[:num]))
            audit = judged.audit(tmp_path / f"{seed} {num}", tokenizer)
            dropped[seed, step] = innocent_dropped(audit, case)
    means = dropped.mean(axis=0)
    assert means[0] > 2
    assert means[0] >= means[1] >= means[2]


def test_pairs_with_a_verdict_stay_in_the_tally_of_their_annotator(tmp_path, tokenizer):
    """All flips are by b. Calling them wrong leaves the annotators' rates where they are."""
    case = Case(share=0.0)
    by_b = np.arange(NUM_PAIRS) % 3 == 0
    case.is_flipped = by_b & (np.random.default_rng(0).random(NUM_PAIRS) < 0.5)
    turn = np.where(case.is_flipped, -1, 1)[:, None]
    case.blocks = {name: turn * block for name, block in case.blocks.items()}
    rows = [*np.flatnonzero(case.is_flipped)[:15], *np.flatnonzero(by_b & ~case.is_flipped)[:5]]
    before, after = (
        {one.name: one for one in each.audit(tmp_path / str(i), tokenizer).judgement.estimate.annotators}
        for i, each in enumerate((case, case.judged(right_verdicts(case, rows))))
    )
    for name in "abc":
        assert after[name].num_pairs == before[name].num_pairs == 100
    assert after["b"].rate == pytest.approx(before["b"].rate, abs=0.05)
    assert after["b"].low > after["a"].high


def test_one_wrong_verdict_among_many_moves_little(tmp_path, tokenizer):
    case = Case()
    verdicts = right_verdicts(case, range(0, 40, 2))
    spoiled = {**verdicts, 10: {"right": "wrong", "wrong": "right"}[verdicts[10]]}
    right, wrong = (case.judged(said).audit(tmp_path / str(i), tokenizer) for i, said in enumerate((verdicts, spoiled)))
    assert wrong.judgement.estimate.rate == pytest.approx(right.judgement.estimate.rate, abs=0.02)
    other = np.arange(NUM_PAIRS) != 10
    decisions = [np.array(one.judgement.decisions)[other] for one in (right, wrong)]
    assert (decisions[0] != decisions[1]).sum() <= 6
    assert auroc(-wrong.margins()[other], case.is_flipped[other]) > 0.95


def test_the_model_is_loaded_once(model_folder, pairs, tmp_path, monkeypatch):
    """The pass over the reference leaves its features on disk; an audit that was killed after it loads once more."""
    load, num_loads = Model.load, []
    monkeypatch.setattr(Model, "load", lambda self: num_loads.append(1) or load(self))
    args = ROPOConfig(output_dir=str(tmp_path / "O"), max_length=96, use_cpu=True, disable_tqdm=True)
    run_audit(model_folder, pairs, args)
    assert len(num_loads) == 1
    margins = load_file(tmp_path / "O" / "audit" / "margins.safetensors")["margins"]
    shutil.rmtree(tmp_path / "O" / "audit")
    run_audit(model_folder, pairs, args)
    assert len(num_loads) == 2
    np.testing.assert_array_equal(load_file(tmp_path / "O" / "audit" / "margins.safetensors")["margins"], margins)


@pytest.mark.slow
def test_two_processes_audit_as_one(model_folder, pairs, tmp_path):
    """Each reads the features of its share; margins, estimate and decisions are those of one process."""
    rows = [
        {
            "prompt": f"{row} {pairs[row % 20].prompt}",
            "chosen": pairs[row % 20].chosen,
            "rejected": pairs[row % 7].rejected,
        }
        for row in range(80)
    ]
    dataset, cache = tmp_path / "pairs.jsonl", tmp_path / "cache"
    dataset.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"rho": "0.2", "num_folds": 4, "max_length": 96, "use_cpu": True, "disable_tqdm": True}
    run_audit(model_folder, dataset, ROPOConfig(output_dir=str(tmp_path / "one"), **options))
    words = {"model_name_or_path": model_folder, "dataset_name": dataset, "output_dir": tmp_path / "two"}
    words |= {"reference_cache_dir": cache, **options}
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "ropo.cli.main", "audit")
    command = [sys.executable, *launch, *(f"--{name}={value}" for name, value in words.items())]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=240)
    assert len(list(cache.glob("*/features*/*.safetensors"))) == 2
    one, two = (load_file(tmp_path / name / "audit" / "margins.safetensors") for name in ("one", "two"))
    assert one["margins"].shape == (80,)
    for name, values in one.items():
        np.testing.assert_allclose(two[name], values, atol=5e-3, err_msg=name)
    one, two = (read_json(tmp_path / name / "audit" / "judgement.json") for name in ("one", "two"))
    assert two["decisions"] == one["decisions"]
    assert two["decisions"].count("drop") == 16
    assert two["estimate"]["rate"] == pytest.approx(one["estimate"]["rate"], abs=1e-3)


def test_gradients_that_follow_no_labels_are_not_asked(tmp_path, tokenizer):
    """Here they are noise, and what they gain is chance: all kinds are asked, which hidden states rule."""
    audit = Case(share=0.3).audit(tmp_path, tokenizer)
    assert next(row for row in audit.scores.rows if row.name == "gradients").low < 0.5
    assert audit.scores.filter == audit.scores.refit


def test_a_label_of_an_annotator_who_is_often_wrong_needs_more_for_it(tmp_path, tokenizer):
    """All flips are by b, who is wrong in two of three labels: contradicted labels of others are mostly right."""
    found = {"named": [], "nameless": []}  # precision and recall
    for seed in range(3):
        case, rng = Case(seed, share=0.0, gap=1.2, num_pairs=600), np.random.default_rng(seed)
        case.is_flipped = (np.arange(600) % 3 == 0) & (rng.random(600) < 0.67)
        turn = np.where(case.is_flipped, -1, 1)[:, None]
        case.blocks = {name: turn * block for name, block in case.blocks.items()}
        nameless = case.judged({})
        nameless.pairs = [replace(pair, annotator=None) for pair in case.pairs]
        for name, each in (("named", case), ("nameless", nameless)):
            audit = each.audit(tmp_path / f"{seed} {name}", tokenizer)
            assert audit.judgement.rho.why is Why.FILTER_HELPS
            is_dropped = np.array(audit.judgement.decisions) == "drop"
            found[name].append((case.is_flipped[is_dropped].mean(), is_dropped[case.is_flipped].mean()))
    precision, recall = np.mean(found["named"], axis=0) - np.mean(found["nameless"], axis=0)
    assert precision > 0.02
    assert recall > 0.02
