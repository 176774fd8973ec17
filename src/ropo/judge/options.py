"""Which outside judges there are, and the options that name one.

In: what the user wrote, a folder for answers. Out: `JudgeOptions`, known to be valid, and the `Judge` they name.

Add a judge: a function that makes a `Judge` from options, one line in `JUDGES`, one test. An option of its own is a
field of `JudgeOptions` and stands in the `needs` or `takes` of that line.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated

from ropo.endpoint.address import Endpoint, check_access
from ropo.judge.endpoint import ON_FAILURE, EndpointJudge
from ropo.judge.reward_model import RewardModelJudge
from ropo.judge.verdicts import Judge
from ropo.options import Rule, Taker, check_options, check_taker, option


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeSpec(Taker):
    """A kind of judge."""

    make: Callable[["JudgeOptions", Path], Judge]
    meaning: str


JUDGES: Mapping[str, JudgeSpec] = MappingProxyType(
    {
        "reward_model": JudgeSpec(
            make=lambda args, folder: RewardModelJudge(str(args.judge_model), folder),
            meaning="a sequence classifier with one label",
            needs=("judge_model",),
        ),
        "endpoint": JudgeSpec(
            make=lambda args, folder: EndpointJudge(
                Endpoint(url=str(args.judge_url), model=str(args.judge_model), api_key_env=args.judge_api_key_env),
                folder,
                on_failure=str(args.judge_on_failure),
            ),
            meaning="a chat model behind an OpenAI-compatible address",
            needs=("judge_model", "judge_url"),
            takes=MappingProxyType({"judge_api_key_env": "OPENAI_API_KEY", "judge_on_failure": "go_on"}),
        ),
    }
)
"""The judges that options can name. In Python any function of the type `Judge` will do."""


@dataclass
class JudgeOptions:
    """Who is asked which of two responses is better.

    Raises:
        ValueError: If an option is unknown, missing, ignored by the judge, or holds a key.
    """

    judge: Annotated[str, Rule(choices=("none", *JUDGES))] = option(
        "none",
        "Who is asked about pairs that the rules cannot settle: none, "
        + ", ".join(f"{name} ({spec.meaning})" for name, spec in JUDGES.items())
        + ".",
    )
    judge_model: str | None = option(None, "reward_model: folder or hub id; endpoint: name of the model there.")
    judge_url: Annotated[str | None, Rule(identifies=False)] = option(
        None, "endpoint: base address, like http://localhost:8000/v1. Prompts and responses are sent there."
    )
    judge_api_key_env: Annotated[str | None, Rule(identifies=False)] = option(
        None,
        "endpoint: environment variable that holds the key; default OPENAI_API_KEY. No key is sent if it is not set.",
    )
    judge_on_failure: Annotated[str | None, Rule(choices=tuple(ON_FAILURE), identifies=False)] = option(
        None,
        "endpoint: what to do when it fails for good: go_on without it and warn (default), or stop; the same command "
        "then goes on from what was judged.",
    )

    def __post_init__(self) -> None:
        check_options(self)
        self.check_judge()

    def check_judge(self) -> None:
        """The judge has what it needs, what it can do without is filled in, and nothing is ignored or holds a key."""
        check_taker(self, "judge", JUDGES)
        check_access(self.judge_url, self.judge_api_key_env, url_option="judge_url", key_option="judge_api_key_env")


def make_judge(args: JudgeOptions, folder: Path) -> Judge | None:
    """Make the judge that options ask for; no weights are loaded and no request is made before it is called.

    With several processes all must make it and call it together, with the same pairs; each asks for its share.

    Returns:
        The judge, or None if there is none.
    """
    return None if args.judge == "none" else JUDGES[args.judge].make(args, folder)
