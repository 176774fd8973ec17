"""`ROPOConfig`: every option of a run, as flags, YAML and Python share them.

In: what the user wrote. Out: a configuration that is known to be valid before any model is loaded.

Each package checks the options it reads, in its file `options.py`; here stand those of the rounds, and what options of
several packages must agree on.
"""

from dataclasses import dataclass
from typing import Annotated

from ropo.audit.options import AuditOptions
from ropo.judge.options import JudgeOptions
from ropo.options import Rule, option
from ropo.resample.options import ResampleOptions
from ropo.sampling.engines import ENGINES


@dataclass
class ROPOConfig(JudgeOptions, ResampleOptions, AuditOptions):
    """Options of one alignment run; those of `transformers.TrainingArguments` are all there too.

    Raises:
        ValueError: If an option is out of range, unknown, or ignored by the chosen loss.
    """

    rounds: Annotated[int, Rule(low=1, identifies=False)] = option(
        1, "Rounds of train, score, decide, resample. Resampling needs two or more."
    )
    round_start: Annotated[str, Rule(choices=("restart", "carry_on"))] = option(
        "restart", "Each round's model: restart from the given one, or carry_on with the last."
    )

    def __post_init__(self) -> None:
        AuditOptions.__post_init__(self)  # all types, bounds and choices, and devices
        self.check_resampling()
        self.check_judge()
        self._check_rounds()
        ENGINES[self.generation_engine].check(self.world_size)

    def _check_rounds(self) -> None:
        if self.seed + self.rounds > 2**32:  # each round has its own seed
            raise ValueError(f"seed needs a number below {2**32 - self.rounds + 1}; got {self.seed}.")
        if self.num_candidates and self.rounds == 1:
            raise ValueError(
                f"num_candidates needs rounds of 2 or more; got {self.num_candidates} with one round. What is "
                "resampled is trained on in the next round."
            )
        if self.fixed_rho and not self.num_folds and self.rounds == 1:
            raise ValueError(
                f"rho {self.rho} needs margins to filter by before the last training; got num_folds 0 and one round. "
                "Use rounds of 2 or more, or num_folds of 2 or more."
            )
        if self.judge != "none" and not self.num_candidates:
            raise ValueError(
                f"judge {self.judge} needs new pairs to settle; got num_candidates 0. Set num_candidates to 1 or "
                "more, or leave the judge out."
            )
