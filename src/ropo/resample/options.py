"""The options that say which new pairs are made.

In: what the user wrote. Out: `ResampleOptions`, known to be valid.
"""

import math
from dataclasses import dataclass, fields
from typing import Annotated

from ropo.options import Rule, check_options, option
from ropo.resample.select import SELECTION_RULES, Guards
from ropo.sampling.options import EngineOptions

# Given or not, they say nothing about whether resampling is meant.
_SILENT = ("num_candidates", "max_new_tokens")


@dataclass
class ResampleOptions(EngineOptions):
    """How responses are sampled for dropped prompts, and which of them become new pairs.

    Raises:
        ValueError: If an option is unknown, out of range or ignored.
    """

    num_candidates: Annotated[int, Rule(low=0)] = option(
        0, "Responses sampled for each dropped prompt, for example 4; 0: no resampling."
    )
    max_new_tokens: Annotated[int, Rule(low=1)] = option(256, "Longest sampled response.")
    temperature: Annotated[float, Rule(above=0)] = option(1.0, "Sampling temperature.")
    top_p: Annotated[float, Rule(above=0, high=1)] = option(
        1.0, "Nucleus sampling: smallest set of tokens with this much probability."
    )
    sample_from: Annotated[str, Rule(choices=("reference", "policy"))] = option(
        "reference", "Model to sample from: the reference, whose samples the policy judges best, or the policy itself."
    )
    selection_rule: Annotated[str, Rule(choices=tuple(SELECTION_RULES))] = option(
        "min_loss", "How new pairs are chosen: " + ", ".join(SELECTION_RULES) + "."
    )
    max_abs_margin: Annotated[float | None, Rule(above=0)] = option(
        None, "Guard: new pairs with a larger absolute margin are refused as self-confirming. Default: none is."
    )
    max_length_ratio: Annotated[float, Rule(above=0)] = option(
        3.0, "Guard: most that one response of a new pair may be longer than the other."
    )
    max_repetition: Annotated[float, Rule(low=0, high=1)] = option(
        0.5, "Guard: largest share of a response's three-word sequences that are repeats."
    )
    max_copies: Annotated[int, Rule(low=1)] = option(
        10, "Guard: most prompts that may be answered by one and the same sampled text."
    )
    max_resampled_share: Annotated[float, Rule(above=0)] = option(
        0.5, "Guard: most new pairs in a round, as a share of the kept ones."
    )
    resampled_weight: Annotated[float, Rule(low=0, high=1)] = option(1.0, "Weight of a new pair in training.")
    resampled_decay: Annotated[float, Rule(low=0, high=1)] = option(
        0.5, "What a new pair's weight is multiplied by in every further round."
    )

    def __post_init__(self) -> None:
        check_options(self)
        self.check_resampling()

    def check_resampling(self) -> None:
        """The engine has what it needs and something to sample, from a model that it can reach."""
        self.check_engine()
        engine = self.generation_engine
        if engine != "transformers" and not self.num_candidates:
            raise ValueError(
                f"generation_engine {engine} needs something to sample; got num_candidates 0. Set it, or leave the "
                "engine out."
            )
        if engine == "server" and self.sample_from == "policy":
            raise ValueError(
                "sample_from policy needs an engine that loads the model in training; got generation_engine server, "
                "which serves a fixed one. Leave sample_from out, or use another engine."
            )

    @property
    def guards(self) -> Guards:
        """What every candidate must pass in resampling."""
        return Guards(
            max_abs_margin=math.inf if self.max_abs_margin is None else self.max_abs_margin,
            max_length_ratio=self.max_length_ratio,
            max_repetition=self.max_repetition,
            max_copies=self.max_copies,
            max_share=self.max_resampled_share,
        )

    @property
    def without_effect(self) -> list[str]:
        """Options of resampling that were given although nothing is sampled.

        Not an error: `--num_candidates 0` beside a recipe is how resampling is switched off.
        """
        if self.num_candidates:
            return []
        own = (one for one in fields(ResampleOptions) if one.name not in _SILENT)
        return [one.name for one in own if getattr(self, one.name) != one.default]
