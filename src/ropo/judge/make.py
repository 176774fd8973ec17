"""Who there is to ask, and how options name them.

In: options, a folder for answers. Out: a `Judge`, or None.

Add a judge: a function that makes a `Judge` from options, one line in `JUDGES`, one test.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

from ropo.endpoint.address import Endpoint
from ropo.judge.endpoint import EndpointJudge
from ropo.judge.reward_model import RewardModelJudge
from ropo.judge.verdicts import Judge


class JudgeOptions(Protocol):
    """The options that say who judges; `ROPOConfig` has them."""

    @property
    def judge(self) -> str:
        """A name in `JUDGES`, or "none"."""

    @property
    def judge_model(self) -> str | None:
        """Folder, hub id or name of the model."""

    @property
    def judge_url(self) -> str | None:
        """Address of the endpoint."""

    @property
    def judge_api_key_env(self) -> str | None:
        """Environment variable with the endpoint's key."""

    @property
    def judge_on_failure(self) -> str | None:
        """What to do when the endpoint fails."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeSpec:
    """A kind of judge.

    Attributes:
        make: Makes it from options and the folder for its answers.
        meaning: One phrase for the help.
        needs: Options that it needs.
        takes: Options that it can do without, with what stands in for them.
    """

    make: Callable[[JudgeOptions, Path], Judge]
    meaning: str
    needs: tuple[str, ...]
    takes: Mapping[str, str]


JUDGES: Mapping[str, JudgeSpec] = MappingProxyType(
    {
        "reward_model": JudgeSpec(
            make=lambda args, folder: RewardModelJudge(str(args.judge_model), folder),
            meaning="a sequence classifier with one label",
            needs=("judge_model",),
            takes=MappingProxyType({}),
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


def judge_options() -> dict[str, list[str]]:
    """Every option of a judge, with the names of the judges that take it."""
    takers: dict[str, list[str]] = {}
    for name, spec in JUDGES.items():
        for option in (*spec.needs, *spec.takes):
            takers.setdefault(option, []).append(name)
    return takers


def make_judge(args: JudgeOptions, folder: Path) -> Judge | None:
    """Make the judge that options ask for; no weights are loaded and no request is made before it is called.

    With several processes all must make it and call it together, with the same pairs; each asks for its share.

    Args:
        args: Checked options, as `ROPOConfig` has them.
        folder: Where its answers are kept; made when the first one comes.

    Returns:
        The judge, or None if there is none.
    """
    return None if args.judge == "none" else JUDGES[args.judge].make(args, folder)
