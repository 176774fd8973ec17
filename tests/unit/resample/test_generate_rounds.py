"""Sampling inside a run: killed between two shards it resumes, and what an engine needs reaches it."""

import csv
import json
from dataclasses import replace

import pytest
from peft import LoraConfig

from ropo.config import ROPOConfig
from ropo.provenance import hash_file
from ropo.run.align import run_audit, run_rounds
from ropo.run.inputs import ReviewInputs
from ropo.run.rounds import Round
from ropo.sampling import generate
from ropo.sampling import transformers_engine as in_transformers
from ropo.sampling.engine import Response


def config(folder, **options):
    common = {
        "output_dir": str(folder), "learning_rate": 3e-3, "per_device_train_batch_size": 20, "save_strategy": "no",
        "max_length": 64, "max_new_tokens": 12, "num_candidates": 2, "use_cpu": True, "disable_tqdm": True,
        "rho": "0.3", "max_length_ratio": 30.0, "rounds": 2, "num_folds": 0, "decision_rule": "lowest_loss",
    }  # fmt: skip
    return ROPOConfig(**{**common, **options})


class SecondRoundError(Exception):
    """The first round is over, its resampling included."""


@pytest.fixture
def run(monkeypatch, model_folder, pairs):
    """Runs the first of two rounds."""
    train = Round._train

    def train_once(self, *args):
        if self.number:
            raise SecondRoundError
        train(self, *args)

    monkeypatch.setattr(Round, "_train", train_once)

    def first_round(args, **options):
        with pytest.raises(SecondRoundError):
            run_rounds(model_folder, pairs, args, **options)

    return first_round


def files(folder):
    return {path.name: hash_file(path) for path in (folder / "rounds" / "00").glob("**/*.jsonl")}


def test_killed_between_two_shards(run, model_folder, pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(in_transformers, "_TOKENS_PER_SHARD", {"cpu": 100})
    run(config(tmp_path / "whole"))
    whole = files(tmp_path / "whole")
    assert len(whole) >= 4  # three shards and the new pairs
    write, lives, written = generate._write, [2], []

    def dying(path, found):
        if lives and len(written) == lives[0]:
            raise KeyboardInterrupt
        written.append(path.name)
        write(path, found)

    monkeypatch.setattr(generate, "_write", dying)
    with pytest.raises(KeyboardInterrupt):
        run_rounds(model_folder, pairs, config(tmp_path / "killed"))
    assert len(files(tmp_path / "killed")) == 2
    lives.clear()
    run(config(tmp_path / "killed"))
    assert files(tmp_path / "killed") == whole
    assert len(written) == len(set(written)) == len(whole) - 1


def test_a_server_in_a_run(run, pairs, tmp_path, tokenizer, serve):
    """What it answers becomes new pairs."""

    def answer(request):
        choices = [{"index": k, "text": f" cold soup {k}", "finish_reason": "stop"} for k in range(request.body["n"])]
        return 200, {"choices": choices}

    server = serve(answer)
    options = {
        "generation_engine": "server",
        "generation_url": server.url,
        "generation_model": "policy",
    }
    run(config(tmp_path / "O", **options))
    asked = {tokenizer.decode(request.body["prompt"]) for request in server.requests}
    assert asked <= {pair.prompt for pair in pairs}
    assert " cold soup " in (tmp_path / "O" / "rounds" / "00" / "resampled.jsonl").read_text()


@pytest.mark.parametrize("is_adapter", [False, True])
def test_where_the_model_is(is_adapter, run, model_folder, tmp_path, monkeypatch):
    """A whole model is in the round's folder; an adapter is, and its base is where the run began."""
    reaches, reach = [], Round._reach
    monkeypatch.setattr(Round, "_reach", lambda self, policy: reaches.append(reach(self, policy)) or reaches[-1])
    peft_config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM") if is_adapter else None
    run(config(tmp_path / "O", num_candidates=1, sample_from="policy"), peft_config=peft_config)
    trained = tmp_path / "O" / "rounds" / "00" / "model"
    (found,) = reaches
    assert str(found.folder) == str(model_folder if is_adapter else trained)
    assert found.adapter == (trained if is_adapter else None)
    assert (trained / ("adapter_config.json" if is_adapter else "model.safetensors")).exists()
    assert found.load().training is False


def test_new_pairs_take_the_weight_of_their_parents(model_folder, pairs, tmp_path, tokenizer, monkeypatch):
    """The prompt of a pair of weight 0, or that a person has left out, gets no response: nobody trains on it."""
    asked = []

    def spelling(self, prompts, sampling, advance):
        asked.extend(tokenizer.decode(prompt.ids) for prompt in prompts)
        one = Response(text=" verykind", num_tokens=9, is_finished=True)
        return [[one] * sampling.num_candidates for _ in prompts]

    monkeypatch.setattr(in_transformers.TransformersEngine, "sample", spelling)
    weighted = [replace(pair, weight=0.5 if pair.row > 2 else 0.0) for pair in pairs]
    run_audit(model_folder, weighted, config(tmp_path / "A", num_folds=4))
    table = tmp_path / "A" / "review.csv"
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows({**row, "verdict": "drop" if row["row"] == "5" else ""} for row in rows)
    run_rounds(
        model_folder, weighted, config(tmp_path / "O", resampled_weight=0.5), review=ReviewInputs(decisions=table)
    )
    made = (tmp_path / "O" / "rounds" / "00" / "resampled.jsonl").read_text().splitlines()
    assert {json.loads(line)["weight"] for line in made} == {0.25}
    assert not any(pair.prompt in prompt for prompt in asked for pair in weighted if pair.weight == 0)
    assert not any(weighted[5].prompt in prompt for prompt in asked)


def test_the_tokens_that_were_drawn_are_trained_on(run, model_folder, pairs, tmp_path, tokenizer, monkeypatch):
    """By a run that goes on in another process as well: they are on disk beside the texts."""
    letters = (*tokenizer.convert_tokens_to_ids(["Ġ", *"verykind"]), tokenizer.eos_token_id)

    def spelling(self, prompts, sampling, advance):
        one = Response(text=" verykind", num_tokens=9, is_finished=True, ids=letters)
        return [[one] * sampling.num_candidates for _ in prompts]

    trained_on = []
    next_datasets = Round.next_datasets
    monkeypatch.setattr(
        Round, "next_datasets", lambda self: trained_on.append(next_datasets(self)[1]) or next_datasets(self)
    )
    monkeypatch.setattr(in_transformers.TransformersEngine, "sample", spelling)
    run(config(tmp_path / "O"))
    run(config(tmp_path / "O"))
    for dataset in trained_on:
        new = [ids for pair, ids in zip(dataset.pairs, dataset.tokens, strict=True) if pair.origin == "resampled"]
        assert new
        assert all(list(letters) in (ids.chosen.tolist(), ids.rejected.tolist()) for ids in new)
    assert len(trained_on) == 2
