"""A user's own pairs: what the judge is sure of is the truth, and responses are rated beside the better one."""

import json
import logging

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from ropo import Pair
from ropo.bench import own
from ropo.bench.grid import run_bench
from ropo.bench.grid_config import BenchConfig
from ropo.bench.rows import read_rows
from ropo.data.toy import make_model, make_pairs, make_tokenizer

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
    with caplog.at_level(logging.INFO, logger="ropo.bench.own"):
        found = own.settled(says, [*swapped, *PAIRS[20:]])
    assert len(found) == 32
    assert all("good" in pair.chosen and pair.prompt.strip()[-1] not in "37" for pair in found)
    assert "Of 40 pairs the judge is sure of 32 and contradicts 16 of their labels" in caplog.text


def test_ratings_are_log_odds_beside_the_better_response():
    better = {own._key("p1 "): "good 1"}
    asked = []

    def judge(pairs):
        asked.extend(pairs)
        return [{"better": 0.8, "sure": 1.0, "unsure": None}[pair.chosen] for pair in pairs]

    found = own.ratings(judge, better, ["p1 "] * 4, ["better", "good 1", "sure", "unsure"])
    assert found == pytest.approx([np.log(4), 0.0, np.log(999), 0.0])
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
    with pytest.raises(ValueError, match=r"35 pairs to train and 10 to test on, .* got 40 such among 80"):
        own._deal(twice, 35, 10, seed=3, num_read=80)


def grid(**more):
    known = {"task": "own", "seeds": (1,), "noise": {"symmetric": [0.2]}, "methods": ("dpo",)}
    return BenchConfig(**known | {"source": "pairs.jsonl", "model": "m", "judge": {"judge": "reward_model"}} | more)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"model": None}, "The task own needs model; got none"),
        ({"source": None}, "The task own needs source; got none"),
        ({"judge": {}}, "The task own needs judge; got none"),
        ({"task": "reviews", "source": None, "judge": {}}, "The task reviews brings its own model; got another"),
        ({"noise": {"topic": [0.1]}}, "cannot have noise of kind topic"),
        ({"tuning_kind": "larger_model"}, "cannot have noise of kind larger_model"),
    ],
)
def test_misuse(more, says):
    with pytest.raises(ValueError, match=says):
        grid(**more)


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
    with pytest.raises(ValueError, match="holds rows measured with max_new_tokens 8; got 9"):
        run_bench(other, folder, num_processes=1)


def vars_of(config):
    return {name: getattr(config, name) for name in config.__dataclass_fields__}
