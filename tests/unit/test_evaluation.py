"""Pairs that nothing is trained on: read before anything expensive, scored under every round, later if need be."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from ropo.config import ROPOConfig
from ropo.data.tokenize import tokenize_pairs
from ropo.data.validate import DataError
from ropo.logps.batch import Batching
from ropo.logps.cache import reference_logps
from ropo.noise.shares import wilson_interval
from ropo.pairs import Pair, margin
from ropo.provenance import hash_file, read_json
from ropo.run.align import run_rounds
from ropo.run.evaluation import read_evaluation
from ropo.run.inputs import DataSource


def config(folder, **options):
    common = {
        "output_dir": str(folder), "learning_rate": 3e-3, "per_device_train_batch_size": 4, "max_length": 64,
        "use_cpu": True, "disable_tqdm": True, "num_folds": 0, "rho": "0.2", "rounds": 2, "beta": 0.2,
        "save_strategy": "no",
    }  # fmt: skip
    return ROPOConfig(**{**common, **options})


@pytest.fixture
def unseen(pairs):
    """Six other questions with the same answers, of which two the other way round."""
    return [
        Pair(
            prompt=f"And then? {pair.prompt}",
            chosen=pair.rejected if i < 2 else pair.chosen,
            rejected=pair.chosen if i < 2 else pair.rejected,
            row=i,
        )
        for i, pair in enumerate(pairs[:6])
    ]


def test_what_each_round_makes_of_it(model_folder, tokenizer, pairs, unseen, tmp_path):
    """Accuracy, margin and loss are those of the round's own model against the reference."""
    summary = run_rounds(model_folder, pairs, config(tmp_path / "O"), eval_dataset=unseen).summary
    found = summary["evaluation"]
    assert (found["num_pairs"], found["num_shared"]) == (6, 0)
    assert [entry["round"] for entry in found["rounds"]] == [0, 1]
    tokens = tokenize_pairs(unseen, tokenizer, max_length=64).tokens
    models = [model_folder, *(tmp_path / "O" / "rounds" / f"{number:02d}" / "model" for number in (0, 1))]
    how = Batching(pad_token_id=0)
    reference, *trained = [
        reference_logps(_load(path), tokens, how, cache_dir=tmp_path / "cache" / str(i))
        for i, path in enumerate(models)
    ]
    for entry, logps in zip(found["rounds"], trained, strict=True):
        h = margin(logps, reference, beta=0.2)
        assert entry["accuracy"] == pytest.approx((h > 0).float().mean().item())
        assert (entry["low"], entry["high"]) == pytest.approx(wilson_interval(entry["accuracy"], 6))
        assert entry["margin"] == pytest.approx(h.mean().item(), abs=1e-4)
        assert entry["loss"] == pytest.approx(torch.nn.functional.softplus(-h).mean().item(), abs=1e-4)
    assert found["rounds"][0]["margin"] != 0
    assert read_json(tmp_path / "O" / "summary.json")["evaluation"] == found
    for name in ("report.html", "report.md"):
        assert "nothing was trained" in (tmp_path / "O" / name).read_text()


def _load(path):
    from transformers import AutoModelForCausalLM  # noqa: PLC0415

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def test_a_finished_run_takes_it_and_nothing_else_changes(model_folder, pairs, unseen, tmp_path, caplog):
    """Without training anything once more; and other pairs later are scored anew, the same are not."""
    folder = tmp_path / "O"
    assert run_rounds(model_folder, pairs, config(folder)).summary["evaluation"] is None
    assert "nothing was trained" not in (folder / "report.html").read_text()
    before = {path: (hash_file(path), path.stat().st_mtime_ns) for path in (folder / "rounds").rglob("*.safetensors")}
    first = run_rounds(model_folder, pairs, config(folder), eval_dataset=unseen).summary["evaluation"]
    assert {path: (hash_file(path), path.stat().st_mtime_ns) for path in before} == before
    caplog.set_level("INFO")
    caplog.clear()
    again = run_rounds(model_folder, pairs, config(folder), eval_dataset=unseen).summary["evaluation"]
    assert again == first
    assert "begins" not in caplog.text
    fewer = run_rounds(model_folder, pairs, config(folder), eval_dataset=unseen[2:]).summary["evaluation"]
    assert "evaluation/round 1: started" in caplog.text
    assert "00/train: started" not in caplog.text
    assert fewer["num_pairs"] == 4
    margins = load_file(folder / "evaluation" / "round_01.safetensors")["margins"]
    assert fewer["rounds"][1]["margin"] == pytest.approx(margins.mean().item())
    assert run_rounds(model_folder, pairs, config(folder)).summary["evaluation"] is None
    assert "leave out the evaluation that they had" in caplog.text


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_scored_while_the_model_trains(strategy, model_folder, pairs, unseen, tmp_path):
    """The model is the one that is trained without; the last scores are those of the round, and the first the start's.

    Six pairs make batches of four and two, whose means would not be that of the pairs.
    """
    options = {"num_train_epochs": 2, "rounds": 1, "rho": "0", "per_device_eval_batch_size": 4, "logging_steps": 1}
    options |= {"dataloader_drop_last": True}  # of a training, whose batches are full
    plain = run_rounds(model_folder, pairs, config(tmp_path / "plain", **options), eval_dataset=unseen)
    args = config(tmp_path / "O", eval_strategy=strategy, eval_steps=5, eval_on_start=True, **options)
    found = run_rounds(model_folder, pairs, args, eval_dataset=unseen).summary["evaluation"]["rounds"][0]
    log = read_json(tmp_path / "O" / "rounds" / "00" / "training_log.json")
    scored = [line for line in log if "eval_loss" in line]
    assert [line["step"] for line in scored] == [0, 5, 10]
    assert scored[0]["eval_loss/dpo"] == pytest.approx(0.6931, abs=1e-4)
    for name, key in (("rewards/accuracies", "accuracy"), ("rewards/margins", "margin"), ("loss/dpo", "loss")):
        assert scored[-1][f"eval_{name}"] == pytest.approx(found[key], rel=1e-4)
    assert [line for line in log if line not in scored] == read_json(
        tmp_path / "plain" / "rounds" / "00" / "training_log.json"
    )
    assert not any("per_second" in name for line in scored for name in line)
    assert hash_file(tmp_path / "O" / "model.safetensors") == hash_file(tmp_path / "plain" / "model.safetensors")
    assert plain.summary["evaluation"]["rounds"][0] == found


def test_nothing_to_score_while_the_model_trains(model_folder, pairs, tmp_path):
    for options, message in (
        ({"eval_strategy": "steps"}, "evaluation set"),
        ({"eval_on_start": True}, "eval_strategy"),
    ):
        with pytest.raises(ValueError, match=message):
            run_rounds(model_folder, pairs, config(tmp_path / "O", **options))
    assert not (tmp_path / "O").exists()


def test_pairs_that_are_trained_on_do_not_count(model_folder, pairs, unseen, tmp_path, caplog):
    """Not even the other way round and with another blank; and if no other is there, nothing is trained."""
    turned = replace(pairs[0], chosen=f"{pairs[0].rejected} ", rejected=pairs[0].chosen, id="", row=10)
    assert turned.id != pairs[0].id
    found = run_rounds(model_folder, pairs, config(tmp_path / "O"), eval_dataset=[*unseen, turned]).summary[
        "evaluation"
    ]
    assert (found["num_pairs"], found["num_shared"]) == (6, 1)
    assert "too: 1 pairs" in caplog.text
    assert "1 more left out" in (tmp_path / "O" / "report.html").read_text()
    with pytest.raises(DataError, match=r"got 20, .*20 .*\(eval_dataset_split\)\.$"):
        run_rounds(model_folder, pairs, config(tmp_path / "P"), eval_dataset=pairs)
    assert not (tmp_path / "P").exists()


def test_pairs_that_differ_in_an_operator_are_other_pairs(tokenizer):
    """As in sums and comparisons; case, white space and encoding are none."""
    told = [Pair(prompt=f"Is {i} < {i + 1} ?", chosen=" yes", rejected=" no", row=i) for i in range(5)]
    other = [replace(pair, prompt=pair.prompt.replace("<", ">"), id="") for pair in told]
    found = read_evaluation(DataSource(other), trained_on=told, tokenizer=tokenizer, max_length=96)
    assert (len(found.tokenized.pairs), found.num_shared) == (5, 0)
    same = [replace(told[0], prompt="is 0  < 1 ?", chosen=" no ", rejected=" YES", id=""), *other[1:]]
    assert read_evaluation(DataSource(same), trained_on=told, tokenizer=tokenizer, max_length=96).num_shared == 1


def test_pairs_given_twice_are_no_more_evidence(model_folder, pairs, unseen, tmp_path):
    copies = [replace(pair, row=10 + pair.row) for pair in unseen]
    args = config(tmp_path / "O", rounds=1, rho="0")
    once, twice = (
        run_rounds(model_folder, pairs, args, eval_dataset=given).summary["evaluation"]
        for given in (unseen, [*unseen, *copies])
    )
    assert (once["num_pairs"], twice["num_pairs"]) == (6, 12)
    assert twice["rounds"][0] == pytest.approx(once["rounds"][0], rel=1e-5)


def test_bad_rows_are_refused_before_anything_is_trained(model_folder, pairs, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps({"prompt": "a", "chosen": "b"}) + "\n")
    with pytest.raises(DataError, match="rejected"):
        run_rounds(model_folder, pairs, config(tmp_path / "O"), eval_dataset=str(path))
    assert not (tmp_path / "O").exists()


def test_losses_without_a_reference(model_folder, pairs, unseen, tmp_path):
    """Their margin is that of the average token, under the policy alone."""
    args = config(tmp_path / "O", loss="simpo", rounds=1, rho="0")
    found = run_rounds(model_folder, pairs, args, eval_dataset=unseen).summary["evaluation"]
    assert len(found["rounds"]) == 1
    assert not (tmp_path / "O" / "reference_cache").exists()
