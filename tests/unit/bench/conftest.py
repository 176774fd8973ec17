"""A task that costs nothing: the grammar of the toy task with a model that has learned nothing."""

import pytest

from ropo_bench import cell
from ropo_bench.task import Task, each
from ropo_bench.toy import gold_reward, make_model, make_pairs, make_tokenizer


@pytest.fixture
def small_task(monkeypatch):
    """Stands in for `reviews`; returns the list of calls that made it."""
    made = []

    def make(folder, options):
        made.append(options.seed)
        num_pairs = options.num_pairs
        model = folder / "small"
        if not (model / "tokenizer.json").exists():
            tokenizer = make_tokenizer()
            make_model(tokenizer, seed=0).save_pretrained(model)
            tokenizer.save_pretrained(model)
        pairs = make_pairs(num_pairs + options.num_held_out, seed=1000 * options.seed, min_gap=1.5)
        return Task(
            name="reviews",
            model=model,
            pairs=pairs[:num_pairs],
            held_out=pairs[num_pairs:],
            gold_rewards=each(gold_reward),
            words=("soup", "pizza", "curry", "coffee", "bread", "cake"),
            max_length=128,
            max_new_tokens=8,
        )

    monkeypatch.setattr(cell, "TASKS", {"reviews": make})
    return made
