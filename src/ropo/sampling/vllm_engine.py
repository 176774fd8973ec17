"""The `vllm` engine: vLLM on a saved model, in this process.

In: the folder of a model or of an adapter. Out: an `Engine`.

The one idea: vLLM batches, shares prompts and schedules by itself, so it gets whole shards; an adapter is handed over
beside its base model, never merged. vLLM is imported when the first prompts come, since it is an optional extra.
"""

import gc
import importlib
import json
import shutil
import weakref
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from accelerate import PartialState
from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerBase

from ropo.models.adapters import READ_WEIGHTS
from ropo.provenance import RunError
from ropo.sampling.engine import Advance, Prompt, Response, Sampling, response_of, stop_tokens, with_end

_TOKENS_PER_SHARD = 2**21
_MEMORY_SHARE = 0.9  # of the GPU memory that is free when it starts
_NO_LIMIT = 2**31
_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # the ones that vLLM allows as the largest


class VllmEngine:
    """Samples with vLLM.

    Args:
        model: Folder or hub id of a whole model.
        tokenizer: The model's.
        adapter: Folder of a LoRA adapter of it.
        options: Passed to `vllm.LLM` (revision, trust_remote_code, ...).
        use_bf16: Compute in bfloat16; else in what vLLM takes for the model's type, float16 for float32.

    Raises:
        ValueError: If vLLM is not installed, there are several processes, or the adapter's rank is beyond vLLM.
    """

    def __init__(
        self,
        model: str | Path,
        tokenizer: PreTrainedTokenizerBase,
        *,
        adapter: Path | None = None,
        options: Mapping[str, Any] | None = None,
        use_bf16: bool = False,
    ) -> None:
        check_vllm(PartialState().num_processes)
        self._model, self._tokenizer, self._adapter = str(model), tokenizer, adapter
        self._options = {"dtype": "bfloat16" if use_bf16 else "auto", **(options or {})}
        if adapter is not None:
            _check_beginning(adapter)
            self._options |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": _largest_rank(adapter)}
        self._llm: Any = None
        self._forget_tokenizer: Callable[[], object] = lambda: None
        self._max_tokens = 0

    @property
    def identity(self) -> dict[str, Any]:
        """What changes the responses: the options of vLLM."""
        return {"engine": "vllm", "options": self._options}

    @property
    def tokens_per_shard(self) -> int:
        """Enough that starting and ending a shard costs little."""
        return _TOKENS_PER_SHARD

    def sample(self, prompts: Sequence[Prompt], sampling: Sampling, advance: Advance) -> list[list[Response]]:
        """Draw responses.

        Raises:
            RunError: If a prompt has as many tokens as the model has positions, or vLLM gives another number of
                responses.
        """
        vllm: Any = importlib.import_module("vllm")
        longest, limit = max(len(prompt.ids) for prompt in prompts), self._max_positions()
        if longest >= limit:
            raise RunError(
                f"Engine vllm needs prompts shorter than the model's {limit:,} positions; got one of {longest:,} "
                "tokens. Leave it out, or shorten it: a run does so by max_length. Or use engine transformers."
            )
        self._start(vllm, min(longest + sampling.max_new_tokens, limit))
        stop_ids = stop_tokens(self._tokenizer, self._published())
        options = {
            "n": sampling.num_candidates,
            "temperature": sampling.vllm_temperature,
            "top_p": sampling.top_p,
            "stop_token_ids": list(stop_ids),
            "detokenize": False,
        }
        lora: Any = None
        if self._adapter is not None:
            lora = importlib.import_module("vllm.lora.request").LoRARequest("policy", 1, str(self._adapter))
        outputs = self._llm.generate(
            [{"prompt_token_ids": list(prompt.ids)} for prompt in prompts],
            [
                vllm.SamplingParams(
                    seed=prompt.seed, max_tokens=min(sampling.max_new_tokens, limit - len(prompt.ids)), **options
                )
                for prompt in prompts
            ],
            use_tqdm=False,
            lora_request=lora,
        )
        responses = [
            [
                with_end(
                    response_of(list(one.token_ids), stop_ids, self._tokenizer), is_finished=one.finish_reason == "stop"
                )
                for one in sorted(output.outputs, key=lambda one: one.index)
            ]
            for output in outputs
        ]
        counts = {len(candidates) for candidates in responses}
        if len(responses) != len(prompts) or counts != {sampling.num_candidates}:
            raise RunError(
                f"Sampling needs {sampling.num_candidates} responses to each of {len(prompts)} prompts; got "
                f"{len(responses)} answers of {sorted(counts)} from vLLM. Use another version of vLLM or another "
                "engine."
            )
        advance(len(responses), sum(response.num_tokens for candidates in responses for response in candidates))
        return responses

    def close(self) -> None:
        """End vLLM, and give back its memory and what torch keeps of trained models: vLLM can use only what is free."""
        core = getattr(getattr(self._llm, "llm_engine", None), "engine_core", None)
        shutdown = getattr(core, "shutdown", None)
        if shutdown is not None:
            shutdown()
        self._llm, self._max_tokens = None, 0
        self._forget_tokenizer()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _start(self, vllm: Any, max_tokens: int) -> None:
        """Start vLLM, or start it anew for longer texts; prompts come longest first, so that is rare."""
        if self._llm is not None and max_tokens <= self._max_tokens:
            return
        self.close()
        # It gets and gives tokens only. But without a tokenizer of its own it does not start with models that could
        # take pictures too (vllm-project/vllm#54904), and a model's folder need not hold one.
        folder = mkdtemp()
        self._forget_tokenizer = weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self._tokenizer.save_pretrained(folder)
        options = {"max_model_len": max_tokens, "tokenizer": folder, **self._options}
        if torch.cuda.is_available():
            free, total = torch.cuda.mem_get_info()
            options.setdefault("gpu_memory_utilization", round(_MEMORY_SHARE * free / total, 3))
        self._llm, self._max_tokens = vllm.LLM(model=self._model, **options), max_tokens

    def _max_positions(self) -> int:
        """Most tokens that vLLM takes of prompt and response; where positions are scaled, it works that out itself."""
        names = ("revision", "trust_remote_code")
        given = {name: self._options[name] for name in names if self._options.get(name)}
        try:
            config = AutoConfig.from_pretrained(self._model, **{"trust_remote_code": False, **given}).get_text_config()
        except (OSError, ValueError):  # vLLM says what is wrong with it
            return _NO_LIMIT
        rope = getattr(config, "rope_parameters", None) or {}
        is_scaled = any(value not in (None, "default") for name, value in rope.items() if name == "rope_type")
        positions = getattr(config, "max_position_embeddings", None)
        return _NO_LIMIT if is_scaled or not positions else int(positions)

    def _published(self) -> GenerationConfig | None:
        try:
            config: GenerationConfig = GenerationConfig.from_pretrained(
                self._model, revision=self._options.get("revision") or "main"
            )
        except OSError:  # many models have none
            return None
        return config


def check_vllm(num_processes: int) -> None:
    """Refuse where vLLM could not be used.

    Raises:
        ValueError: If vLLM is not installed or there are several processes.
    """
    if find_spec("vllm") is None:
        raise ValueError(
            "Engine vllm needs the package vllm; got an installation without it. pip install 'ropo[vllm]', or use "
            "engine transformers."
        )
    if num_processes > 1:
        raise ValueError(
            f"Engine vllm needs one process; got {num_processes}. Start `vllm serve` on GPUs of its own and use engine "
            "server, or use engine transformers."
        )


def _check_beginning(adapter: Path) -> None:
    """Refuse an adapter that belongs to weights without its beginning, which vLLM does not take out of them.

    Raises:
        ValueError: If it is one.
    """
    begin = json.loads((adapter / "adapter_config.json").read_text("utf-8")).get("init_lora_weights")
    if begin in READ_WEIGHTS:
        raise ValueError(
            f"Engine vllm needs an adapter of the model as it is; got {adapter}, which began by {begin}, so that PEFT "
            "takes its beginning out of the weights, and vLLM does not. Use engine transformers, or merge it."
        )


def _largest_rank(adapter: Path) -> int:
    """What to tell vLLM about the rank of an adapter."""
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    if (kind := config.get("peft_type", "LORA")) != "LORA":
        raise ValueError(f"Engine vllm needs a LoRA adapter; got {kind}. Use engine transformers.")
    rank = max([int(config["r"]), *map(int, (config.get("rank_pattern") or {}).values())])
    for allowed in _LORA_RANKS:
        if rank <= allowed:
            return allowed
    raise ValueError(
        f"Engine vllm needs a LoRA rank of at most {_LORA_RANKS[-1]}; got {rank}. Use engine transformers."
    )
