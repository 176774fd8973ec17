"""What every method of a benchmark is given, and what is known to be right about it.

In: nothing; made by the functions of `tasks`. Out: `Task`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ropo.pairs import Pair

GoldRewards = Callable[[Sequence[Any], Sequence[Any]], list[float]]
"""True rewards of prompts and of one response to each, as the task writes them: all at once, since a judge may ask."""


def each(gold_reward: Callable[[Any, Any], float]) -> GoldRewards:
    """`GoldRewards` from a reward of one prompt and one response."""
    return lambda prompts, responses: [gold_reward(x, y) for x, y in zip(prompts, responses, strict=True)]


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskOptions:
    """What a task is made of; which of these a task takes, it checks itself.

    Attributes:
        num_pairs: Training pairs.
        num_held_out: Pairs to test on; no pair of theirs is trained on.
        seed: Which pairs are which.
        source: A file or folder of the user's data, for tasks that need one.
        model: Folder or hub id of the initial model; task `own` only.
        judge: Options of the judge, named as in `ROPOConfig`; task `own` only.
        max_length: Longest prompt and response together, tokens; task `own` only.
        max_new_tokens: Longest sampled response, tokens; task `own` only.
    """

    num_pairs: int
    num_held_out: int
    seed: int
    source: Path | None = None
    model: str = ""
    judge: Mapping[str, Any] = field(default_factory=dict)
    max_length: int = 512
    max_new_tokens: int = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class GoldStandard:
    """What a policy is scored by.

    Attributes:
        pairs: Held-out pairs with right labels.
        rewards: True rewards of any responses to prompts of the task.
        max_length: Longest prompt and response together, tokens.
        max_new_tokens: Longest sampled response, tokens.
    """

    pairs: Sequence[Pair]
    rewards: GoldRewards
    max_length: int = 512
    max_new_tokens: int = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Everything a benchmark cell starts from; the same for every method.

    Attributes:
        name: Its name in `TASKS`.
        model: Folder of the initial model, which is also the reference.
        pairs: Training pairs with right labels, rows 0, 1, ...
        held_out: Further pairs with right labels, to test on.
        gold_rewards: True rewards of any responses to prompts of the task.
        words: Words of the prompts of one subject, for noise of kind `topic`.
        max_length: Longest prompt and response together, tokens.
        max_new_tokens: Longest sampled response, tokens.
    """

    name: str
    model: Path
    pairs: list[Pair]
    held_out: list[Pair]
    gold_rewards: GoldRewards
    words: tuple[str, ...]
    max_length: int
    max_new_tokens: int

    @property
    def gold(self) -> GoldStandard:
        """What a policy of this task is scored by."""
        return GoldStandard(
            pairs=self.held_out,
            rewards=self.gold_rewards,
            max_length=self.max_length,
            max_new_tokens=self.max_new_tokens,
        )
