"""The options that say what samples responses.

In: what the user wrote. Out: `EngineOptions`, known to be valid. How long responses are and how they are drawn is not
among them: a run and an export have defaults of their own for that.
"""

from dataclasses import dataclass
from typing import Annotated

from ropo.endpoint.address import check_access
from ropo.options import Rule, check_options, check_taker, option
from ropo.sampling.engines import ENGINES


@dataclass
class EngineOptions:
    """The engine, and where it finds a model that this process does not load.

    Raises:
        ValueError: If an option is unknown, missing, ignored by the engine, or holds a key.
    """

    generation_engine: Annotated[str, Rule(choices=tuple(ENGINES))] = option(
        "transformers",
        "What samples: " + ", ".join(f"{name} ({spec.meaning})" for name, spec in ENGINES.items()) + ".",
    )
    generation_url: Annotated[str | None, Rule(identifies=False)] = option(
        None, "server: base address, like http://localhost:8000/v1. Prompts are sent there, as token ids."
    )
    generation_model: str | None = option(
        None, "server: name of the model there: the one that is to answer, or at least one with its tokens."
    )
    generation_api_key_env: Annotated[str | None, Rule(identifies=False)] = option(
        None,
        "server: environment variable that holds the key; default OPENAI_API_KEY. No key is sent if it is not set.",
    )

    def __post_init__(self) -> None:
        check_options(self)
        self.check_engine()

    def check_engine(self) -> None:
        """The engine has what it needs, what it can do without is filled in, and nothing is ignored or holds a key."""
        check_taker(self, "generation_engine", ENGINES)
        check_access(
            self.generation_url,
            self.generation_api_key_env,
            url_option="generation_url",
            key_option="generation_api_key_env",
        )
