"""Which engines there are, and how options name them.

In: the name of an engine and where the model can be reached. Out: an `Engine`.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ropo.endpoint.address import Endpoint
from ropo.options import Taker
from ropo.sampling.engine import Engine
from ropo.sampling.server_engine import ServerEngine
from ropo.sampling.transformers_engine import TransformersEngine
from ropo.sampling.vllm_engine import VllmEngine, check_vllm


@dataclass(frozen=True, slots=True, kw_only=True)
class Reach:
    """Where a model can be reached; an engine takes of it what it needs.

    Attributes:
        tokenizer: The model's.
        load: Gives the model on this process's device.
        folder: Folder or hub id of the whole model, or of the one that `adapter` belongs to.
        adapter: Folder of a PEFT adapter.
        load_options: What `from_pretrained` was given for `folder`.
        use_bf16: Whether it is run in bfloat16, as it was trained.
        url: Address of a server.
        name: Name of the model on that server.
        api_key_env: Environment variable with the key of that server.
    """

    tokenizer: PreTrainedTokenizerBase
    load: Callable[[], PreTrainedModel]
    folder: str | Path
    adapter: Path | None = None
    load_options: Mapping[str, Any] = field(default_factory=dict)
    use_bf16: bool = False
    url: str | None = None
    name: str | None = None
    api_key_env: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSpec(Taker):
    """A kind of engine.

    Attributes:
        make: Makes it; cheap, nothing is loaded and no request is made.
        meaning: One phrase for the help.
        check: Refuses where it could not run; takes the number of processes.
    """

    make: Callable[[Reach], Engine]
    meaning: str
    check: Callable[[int], None] = lambda _: None


ENGINES: Mapping[str, EngineSpec] = MappingProxyType(
    {
        "transformers": EngineSpec(
            make=lambda reach: TransformersEngine(reach.load, reach.tokenizer, use_bf16=reach.use_bf16),
            meaning="in this process, anywhere",
        ),
        "vllm": EngineSpec(
            make=lambda reach: VllmEngine(
                reach.folder,
                reach.tokenizer,
                adapter=reach.adapter,
                options={
                    name: reach.load_options[name]
                    for name in ("revision", "trust_remote_code")  # a local folder has no revisions
                    if reach.load_options.get(name)
                },
                use_bf16=reach.use_bf16,
            ),
            meaning="vLLM in one process with a GPU, pip install 'ropo[vllm]'",
            check=check_vllm,
        ),
        "server": EngineSpec(
            make=lambda reach: ServerEngine(
                Endpoint(
                    url=str(reach.url),
                    model=str(reach.name),
                    api_key_env=reach.api_key_env,
                    timeout_seconds=600.0,  # long texts, and all candidates of a prompt at once
                    max_total_seconds=1800.0,
                ),
                reach.tokenizer,
            ),
            meaning="a running OpenAI-compatible completions server; whatever model it serves answers",
            needs=("generation_url", "generation_model"),
            takes=MappingProxyType({"generation_api_key_env": "OPENAI_API_KEY"}),
        ),
    }
)
"""The engines that options can name. In Python any `Engine` will do."""


@contextmanager
def open_engine(name: str, reach: Reach) -> Iterator[Engine]:
    """Make an engine, and close it when the block ends."""
    engine = ENGINES[name].make(reach)
    try:
        yield engine
    finally:
        engine.close()
