"""The options that say which rows are read, and how much of each.

In: what the user wrote. Out: `DataOptions`, known to be valid.
"""

from dataclasses import dataclass
from typing import Annotated

from ropo.options import Rule, check_options, option


@dataclass
class DataOptions:
    """What is read of a dataset.

    Raises:
        ValueError: If an option is unknown or out of range.
    """

    max_length: Annotated[int, Rule(low=2)] = option(
        1024, "Most tokens of prompt and one response together; longer responses lose their end."
    )
    max_samples: Annotated[int | None, Rule(low=1)] = option(
        None, "Most pairs to draw of the dataset to train on, by seed. Default: all."
    )
    on_bad_rows: Annotated[str, Rule(choices=("refuse", "skip"))] = option(
        "refuse", "What to do with rows that cannot be read: refuse, or skip and count them."
    )

    def __post_init__(self) -> None:
        check_options(self)
