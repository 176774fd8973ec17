"""What is learned in a benchmark: a model to start from, pairs whose labels are right, and a true reward.

In: a name, sizes, a seed, a cache folder. Out: `Task`.

Add a task: one function that makes it, one line in `TASKS`.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType

from ropo_bench import own, sentiment
from ropo_bench.grammar import REVIEWS, SUPPORT, Grammar
from ropo_bench.task import Task, TaskOptions, each
from ropo_bench.toy import gold_reward, make_pairs, save_toy

MIN_GAP = 1.5  # gold reward between the two responses of a toy pair; nearer ones are a coin toss to people, too


def _toy(name: str, grammar: Grammar) -> Callable[[Path, TaskOptions], Task]:
    def make(folder: Path, options: TaskOptions) -> Task:
        if options.source is not None:
            raise ValueError(
                f"The task {name} needs no source, its grammar writes it; got {options.source}. Leave it out."
            )
        model = folder / name
        if not (model / "tokenizer.json").exists():
            save_toy(model, seed=0, grammar=grammar)
        num_pairs, seed = options.num_pairs, 1000 * options.seed
        pairs = make_pairs(num_pairs + options.num_held_out, seed=seed, min_gap=MIN_GAP, grammar=grammar)
        return Task(
            name=name,
            model=model,
            pairs=pairs[:num_pairs],
            held_out=pairs[num_pairs:],
            gold_rewards=each(partial(gold_reward, grammar=grammar)),
            words=grammar.groups[0].nouns,
            max_length=128,
            max_new_tokens=48,
        )

    return make


def _sentiment(folder: Path, options: TaskOptions) -> Task:
    made, num_pairs, seed = sentiment.prepare(folder, options.source), options.num_pairs, options.seed
    return Task(
        name="sentiment",
        model=made / "model",
        pairs=sentiment.make_pairs(made, num_pairs, seed=seed),
        held_out=sentiment.make_pairs(made, options.num_held_out, seed=seed, kind="held_out", first_row=num_pairs),
        gold_rewards=each(sentiment.load_reward(made)),
        words=sentiment.WORDS,
        max_length=sentiment.MAX_LENGTH,
        max_new_tokens=sentiment.MAX_NEW_TOKENS,
    )


TASKS: Mapping[str, Callable[[Path, TaskOptions], Task]] = MappingProxyType(
    {
        "reviews": _toy("reviews", REVIEWS),
        "support": _toy("support", SUPPORT),
        "sentiment": _sentiment,
        "own": own.make,
    }
)
"""The tasks by name: functions of a cache folder and of options."""
