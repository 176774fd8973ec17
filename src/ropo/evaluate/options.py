"""The options of `ropo export` and `ropo win_rate`, checked before any model is loaded.

In: what the user wrote. Out: `ExportArguments`, `WinRateArguments`. What `ropo train` has under the same name means the
same here.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from ropo.evaluate.export import EXPORTS
from ropo.judge.options import JUDGES, JudgeOptions
from ropo.options import Rule, check_folder, check_options, option
from ropo.sampling.options import EngineOptions

DTYPES = ("auto", "float32", "bfloat16")


@dataclass
class ExportArguments(EngineOptions):
    """Which model answers whose questions, and how it is sampled.

    Raises:
        ValueError: If an option is missing, unknown, out of range or ignored by the engine.
    """

    model_name_or_path: str | None = option(
        None, "Folder or hub id of the model, or folder of an adapter; server: of the tokenizer."
    )
    benchmark: Annotated[str | None, Rule(choices=tuple(EXPORTS))] = option(
        None, "Whose questions: " + ", ".join(EXPORTS) + "."
    )
    questions: str | None = option(None, "The project's file of questions; nothing is downloaded.")
    output_dir: str | None = option(
        None, "Where the answers go: mt_bench, arena_hard: the folder that holds their question.jsonl will do."
    )
    name: str | None = option(None, "What the model is called there. Default: the last part of its path.")
    max_new_tokens: Annotated[int | None, Rule(low=1)] = option(
        None, "Longest answer, tokens. Default: the benchmark's."
    )
    temperature: Annotated[float | None, Rule(low=0)] = option(
        None, "Sampling temperature; 0 takes the likeliest token. Default: the benchmark's, mt_bench's by category."
    )
    top_p: Annotated[float, Rule(above=0, high=1)] = option(
        1.0, "Nucleus sampling: smallest set of tokens with this much probability."
    )
    seed: Annotated[int, Rule(low=0, high=2**32 - 1)] = option(0, "Random seed.")
    plain_text: bool = option(
        default=False, text="Give the model the bare question, without its chat template, and keep the answer as it is."
    )
    use_cpu: bool = option(default=False, text="Use no GPU.")
    dtype: Annotated[str, Rule(choices=DTYPES)] = option(
        "auto", "Type of the weights and of computing: auto (as saved), float32, bfloat16."
    )
    model_revision: str | None = option(None, "Branch, tag or commit of a hub model.")
    trust_remote_code: bool = option(default=False, text="Run code that a hub model brings. Read it first.")

    def __post_init__(self) -> None:
        usage = "ropo export --model_name_or_path M --benchmark B --questions FILE --output_dir O"
        _check_given(self, ("model_name_or_path", "benchmark", "questions", "output_dir"), usage)
        check_options(self)
        check_folder("output_dir", str(self.output_dir))
        self._check_name()
        if self.max_new_tokens is None:
            self.max_new_tokens = EXPORTS[str(self.benchmark)].max_new_tokens
        self.check_engine()
        if self.generation_engine == "server" and (self.dtype != "auto" or self.trust_remote_code):
            raise ValueError(
                "generation_engine server needs dtype auto and no trust_remote_code; got one of them. The server has "
                "loaded the model as it likes."
            )
        if self.use_cpu and self.generation_engine != "transformers":
            raise ValueError(
                f"use_cpu needs generation_engine transformers; got {self.generation_engine}. Leave it out."
            )
        if self.generation_engine == "vllm" and self.dtype == "float32":
            raise ValueError("generation_engine vllm needs dtype auto or bfloat16; got float32. Choose one of the two.")

    def _check_name(self) -> None:
        path = Path(str(self.model_name_or_path))
        self.name = self.name or (path.resolve().name if path.exists() else path.name)
        if not re.fullmatch(r"\w[\w.+=@-]*", self.name):
            raise ValueError(
                f"name needs letters, digits and ._+=@- only, since a file is called so; got {self.name!r}. Choose "
                "another --name."
            )


@dataclass
class WinRateArguments(JudgeOptions):
    """Whose outputs are compared, and who judges.

    Raises:
        ValueError: If an option is missing, unknown or ignored by the judge.
    """

    outputs: str | None = option(None, "Outputs of the model: AlpacaEval's format, as `ropo export` writes it.")
    baseline: str | None = option(None, "Outputs of the model it is compared with, on the same instructions.")
    output_dir: str | None = option(None, "Where the result goes, and what the judge has answered.")
    judge: Annotated[str, Rule(choices=("none", *JUDGES))] = option(
        "none", "Who judges: " + ", ".join(f"{name} ({spec.meaning})" for name, spec in JUDGES.items()) + "."
    )
    plain_text: bool = option(
        default=False, text="The judge reads instruction and output as one plain text, not as a conversation."
    )

    def __post_init__(self) -> None:
        usage = "ropo win_rate --outputs A.json --baseline B.json --output_dir O --judge J --judge_model M"
        _check_given(self, ("outputs", "baseline", "output_dir"), usage)
        check_options(self)
        check_folder("output_dir", str(self.output_dir))
        self.check_judge()
        if self.judge == "none":
            raise ValueError(f"win_rate needs a judge, {' or '.join(JUDGES)}; got none. Add --judge. Usage: {usage}")


def _check_given(args: Any, names: tuple[str, ...], usage: str) -> None:
    for name in names:
        if not getattr(args, name):
            raise ValueError(f"--{name} is missing. Usage: {usage}")
