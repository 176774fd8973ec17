"""What every method of a benchmark is given.

In: nothing; made by the functions of `tasks`. Out: `Task`.
"""

from dataclasses import dataclass
from pathlib import Path

from ropo.pairs import Pair
from ropo_bench.policy_score import GoldRewards


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
