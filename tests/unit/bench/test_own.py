"""A user's own pairs: what the judge is sure of is the truth, and responses are rated beside the better one."""

import json
import logging

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from ropo import Pair
from ropo.judge.options import JUDGES
from ropo_bench import grid as bench_grid
from ropo_bench import own
from ropo_bench.grid import run_bench
from ropo_bench.grid_config import BenchConfig, read_bench_config
from ropo_bench.rows import read_rows
from ropo_bench.toy import make_model, make_pairs, make_tokenizer

PAIRS = [Pair(prompt=f"p{i} ", chosen=f"good {i}", rejected=f"bad {i}", row=i) for i in range(40)]


def says(pairs):
    """Sure that "good" is better than "bad", except where the number ends in 3 (not sure) or 7 (cannot tell)."""
    found = []
    for pair in pairs:
        p = 0.9 if "good" in pair.chosen else 0.1
        found.append({"3": 0.6, "7": None}.get(pair.prompt.strip()[-1], p))
    return found


def test_the_judge_is_the_truth(caplog):
    swapped = [Pair(prompt=p.prompt, chosen=p.rejected, rejected=p.chosen, row=p.row) for p in PAIRS[:20]]
    with caplog.at_level(logging.INFO, logger="ropo_bench.own"):
        found = own.settled(says, [*swapped, *PAIRS[20:]])
    assert len(found) == 32
    assert all("good" in pair.chosen and pair.prompt.strip()[-1] not in "37" for pair in found)
    for part in ("Of 40 pairs", "sure of 32", "contradicts 16"):
        assert part in caplog.text


def test_ratings_are_log_odds_beside_the_better_response():
    better = {own._key("p1 "): "good 1"}
    asked = []

    def judge(pairs):
        asked.extend(pairs)
        return [{"better": 0.8, "sure": 1.0, "unsure": None}[pair.chosen] for pair in pairs]

    found = own.ratings(judge, better, ["p1 "] * 4, ["better", "good 1", "sure", "unsure"])
    assert found == pytest.approx([np.log(4), 0.0, np.log(999), np.nan], nan_ok=True)
    assert [pair.chosen for pair in asked] == ["better", "sure", "unsure"]
    assert {pair.rejected for pair in asked} == {"good 1"}


def test_a_conversation_is_answered_by_a_message():
    prompt = [{"role": "user", "content": "hello"}]
    better = {own._key(prompt): [{"role": "assistant", "content": "good"}]}
    seen = []
    own.ratings(lambda pairs: seen.extend(pairs) or [0.5], better, [prompt], ["bad"])
    assert seen[0].chosen == [{"role": "assistant", "content": "bad"}]
    same = own.ratings(lambda _: pytest.fail("asked"), better, [prompt], list(better.values()))
    assert same == [0.0]


def test_prompts_are_dealt_once():
    twice = [*PAIRS, *(Pair(prompt=p.prompt, chosen=p.chosen, rejected="worse", row=p.row) for p in PAIRS)]
    train, held_out = own._deal(twice, 25, 10, seed=3, num_read=80)
    prompts = [pair.prompt for pair in (*train, *held_out)]
    assert (len(train), len(held_out), len(set(prompts))) == (25, 10, 35)
    assert [pair.row for pair in (*train, *held_out)] == list(range(35))
    assert own._deal(twice, 25, 10, seed=3, num_read=80) == (train, held_out)
    assert own._deal(twice, 25, 10, seed=4, num_read=80) != (train, held_out)
    with pytest.raises(ValueError, match=r"35 pairs .* 10 .* got 40 .* 80"):
        own._deal(twice, 35, 10, seed=3, num_read=80)


def test_one_pair_more_or_less_does_not_deal_anew():
    """An endpoint that is out for a moment must not give one method other data than the rest."""
    (all_of_them, _), (but_one, _) = (own._deal(pairs, 25, 10, seed=3, num_read=40) for pairs in (PAIRS, PAIRS[1:]))
    assert len({pair.id for pair in all_of_them} & {pair.id for pair in but_one}) >= 24


JUDGE = {"judge": "reward_model", "judge_model": "r"}


def grid(**more):
    known = {"task": "own", "seeds": (1,), "noise": {"symmetric": [0.2]}, "methods": ("dpo",)}
    return BenchConfig(**known | {"source": "pairs.jsonl", "model": "m", "judge": JUDGE} | more)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"model": None}, "The task own needs model; got none"),
        ({"source": None}, "The task own needs source; got none"),
        ({"judge": {}}, "The task own needs judge; got none"),
        ({"task": "reviews", "source": None, "judge": {}}, "The task reviews brings its own model; got another"),
        ({"noise": {"topic": [0.1]}}, "cannot have noise of kind topic"),
        ({"tuning_kind": "larger_model"}, "cannot have noise of kind larger_model"),
        ({"max_length": 0}, "max_length needs 1 or more; got 0"),
        ({"max_new_tokens": -1}, "max_new_tokens needs 1 or more; got -1"),
        (
            {"task": "reviews", "source": None, "model": None, "judge": {}, "max_length": 64},
            "The task reviews brings its own max_length",
        ),
        ({"judge": {"judge": "reward_model"}}, "judge reward_model needs judge_model"),
        ({"judge": {**JUDGE, "judg_url": "http://h"}}, "judge needs options named judge, .*; got judg_url"),
    ],
)
def test_misuse(more, says):
    """All of it is known before anything is made."""
    with pytest.raises(ValueError, match=says):
        grid(**more)


def test_a_judge_in_a_file_is_a_mapping(tmp_path):
    path = tmp_path / "grid.yaml"
    path.write_text(
        "{task: own, source: s, model: m, judge: reward_model, seeds: [1], noise: {symmetric: [0.2]}, methods: [dpo]}"
    )
    with pytest.raises(ValueError, match=r"\{judge: reward_model, judge_model: R\}; got 'reward_model'"):
        read_bench_config(path)


def test_a_dead_endpoint_stops_a_benchmark_unless_it_is_told_otherwise():
    """For training a pair without a verdict is one pair; here it would be a score, and other pairs to learn from."""
    endpoint = {"judge": "endpoint", "judge_model": "m", "judge_url": "http://127.0.0.1:1/v1"}
    assert JUDGES["endpoint"].takes["judge_on_failure"] == "go_on"
    assert own.judge_args(endpoint).judge_on_failure == "stop"
    assert own.judge_args({**endpoint, "judge_on_failure": "go_on"}).judge_on_failure == "go_on"
    assert own.judge_args(JUDGE).judge_on_failure is None


def test_a_model_that_is_not_there_costs_no_judging(tmp_path, monkeypatch):
    rows = [{name: getattr(p, name) for name in ("prompt", "chosen", "rejected")} for p in PAIRS]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(own, "judge_of", lambda *_: lambda _: pytest.fail("asked"))
    config = grid(source=str(tmp_path / "pairs.jsonl"), model=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"needs model, .*'.*nowhere'"):
        run_bench(config, tmp_path / "out", num_processes=1)
    assert not (tmp_path / "out" / "bench.json").exists(), "what has measured nothing claims no folder"


def test_what_is_left_out_later_is_another_grid(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_grid, "make_task", lambda *_: None)
    monkeypatch.setattr(bench_grid, "measure", lambda *_: pytest.fail("nothing should be measured"))
    still = {"noise": {}, "tuned": {"dpo": {"beta": 0.1}}}
    run_bench(grid(**still, max_length=64), tmp_path, num_processes=1)
    with pytest.raises(ValueError, match="max_length 64; got None"):
        run_bench(grid(**still), tmp_path, num_processes=1)
    reviews = {"task": "reviews", "source": None, "model": None, "judge": {}}
    with pytest.raises(ValueError, match=r"source pairs\.jsonl; got None"):
        run_bench(grid(**still, **reviews), tmp_path, num_processes=1)


def test_other_data_of_the_same_name_is_another_grid(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_grid, "make_task", lambda *_: None)
    monkeypatch.setattr(bench_grid, "measure", lambda *_: pytest.fail("nothing should be measured"))
    (tmp_path / "pairs.jsonl").write_text("{}\n")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    config = grid(
        noise={},
        tuned={"dpo": {"beta": 0.1}},
        source=str(tmp_path / "pairs.jsonl"),
        model=str(tmp_path / "model"),
    )
    run_bench(config, tmp_path / "O", num_processes=1)
    run_bench(config, tmp_path / "O", num_processes=1)
    for name in ("pairs.jsonl", "model/config.json"):
        before = (tmp_path / name).read_text()
        (tmp_path / name).write_text("[]\n")
        with pytest.raises(ValueError, match="measured with contents"):
            run_bench(config, tmp_path / "O", num_processes=1)
        (tmp_path / name).write_text(before)


def test_a_grid_from_before_this_task_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_grid, "make_task", lambda *_: None)
    config = BenchConfig(task="reviews", seeds=(1,), noise={}, methods=("dpo",), tuned={"dpo": {"beta": 0.1}})
    kept = '{"num_held_out": 2000, "num_samples": 1000, "source": null, "options": {}}'
    (tmp_path / "bench.json").write_text(kept)
    run_bench(config, tmp_path, num_processes=1)
    assert json.loads((tmp_path / "bench.json").read_text()) == json.loads(kept)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"judg": "reward_model"}, "judge needs options named judge, .*; got judg"),
        ({"judge_model": "m"}, "judge_model needs judge reward_model or endpoint"),
        ({"judge": "reward_model"}, "judge reward_model needs judge_model; got no judge_model"),
        ({"judge": "none"}, "needs a judge; got none"),
    ],
)
def test_judges_that_are_none(options, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        own.judge_of(options, tmp_path)


def test_a_grid_on_own_pairs(tmp_path):
    """The whole way, with a reward model on disk; a second call does nothing."""
    tokenizer = make_tokenizer()
    make_model(tokenizer, seed=0).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_labels=1, pad_token_id=tokenizer.pad_token_id, initializer_range=0.8, max_position_embeddings=256,
    )  # fmt: skip
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")
    rows = [{name: getattr(p, name) for name in ("prompt", "chosen", "rejected")} for p in make_pairs(300, seed=0)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = grid(
        source=str(tmp_path / "pairs.jsonl"),
        model=str(tmp_path / "model"),
        judge={"judge": "reward_model", "judge_model": str(tmp_path / "judge")},
        num_pairs=16,
        num_held_out=4,
        num_samples=4,
        noise={"symmetric": [0.25], "near_tie": [0.25], "weak_annotator": [0.25]},
        tuned={"dpo": {"learning_rate": 1e-3, "beta": 0.3}},
        max_length=128,
        max_new_tokens=8,
    )
    folder = tmp_path / "out"
    results = run_bench(config, folder, num_processes=1)
    found = read_rows(results)
    assert [row["kind"] for row in found] == ["symmetric", "near_tie", "weak_annotator"]
    assert all(np.isfinite(float(row["gold"])) for row in found)
    assert json.loads((folder / "bench.json").read_text())["model"] == str(tmp_path / "model")
    run_bench(config, folder, num_processes=1)
    assert read_rows(results) == found
    other = grid(**{**vars_of(config), "max_new_tokens": 9})
    with pytest.raises(ValueError, match="with max_new_tokens 8; got 9"):
        run_bench(other, folder, num_processes=1)


def vars_of(config):
    return {name: getattr(config, name) for name in config.__dataclass_fields__}
