"""Where models come from: the initial one, and the ones that rounds have trained.

In: a folder or hub id and how to load it. Out: a causal language model on this process's device.
"""

import gc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from ropo.provenance import hash_file, hash_value

_WEIGHTS = (".safetensors", ".bin", ".model", ".jinja")
_SETTINGS = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "adapter_config.json",
)  # fmt: skip

_IS_ADAPTER = (
    "A run needs a whole model to start from; {} is an adapter. Merge it into its model first: "
    "AutoPeftModelForCausalLM.from_pretrained(A).merge_and_unload().save_pretrained(M), and the tokenizer to M, too."
)


class PolicySource:
    """Loads the initial model, alone or with what a round has trained.

    Args:
        name_or_path: Folder or hub id of the initial model.
        load_options: Passed to `from_pretrained` (dtype, default float32; attn_implementation, revision, ...).
        is_adapter: Whether trained folders hold PEFT adapters of the initial model.

    Raises:
        ValueError: If the initial model is itself an adapter: a new one would take its place, not go on top of it.
    """

    def __init__(
        self, name_or_path: str, *, load_options: Mapping[str, Any] | None = None, is_adapter: bool = False
    ) -> None:
        self.name_or_path = name_or_path
        # Left alone, `transformers` takes the precision of the files, mostly bfloat16, and in that a step of a usual
        # learning rate is rounded away.
        self.load_options = {"dtype": "float32", **(load_options or {})}
        self.is_adapter = is_adapter
        if (Path(name_or_path) / "adapter_config.json").exists():
            raise ValueError(_IS_ADAPTER.format(name_or_path))

    def load(self, trained: Path | None = None, *, is_trainable: bool = False) -> PreTrainedModel:
        """Load the initial model, or the one in the folder `trained`.

        Args:
            trained: What a round wrote; None for the initial model.
            is_trainable: Whether an adapter is to be trained further.

        Returns:
            The model on this process's device, in evaluation mode.
        """
        release_memory()
        path = self.name_or_path if trained is None or self.is_adapter else str(trained)
        model: Any = AutoModelForCausalLM.from_pretrained(path, **self.load_options)
        if trained is None and getattr(model, "_hf_peft_config_loaded", False):  # one from the hub
            raise ValueError(_IS_ADAPTER.format(path))
        if trained is not None and self.is_adapter:
            model = PeftModel.from_pretrained(model, str(trained), is_trainable=is_trainable)
        if "device_map" not in self.load_options and "quantization_config" not in self.load_options:
            model = model.to(PartialState().device)
        loaded: PreTrainedModel = model.eval()
        return loaded

    def config(self) -> PretrainedConfig:
        """The configuration of the initial model, as it will be loaded."""
        names = ("revision", "trust_remote_code")
        options = {name: self.load_options[name] for name in names if name in self.load_options}
        config: PretrainedConfig = AutoConfig.from_pretrained(self.name_or_path, **options)
        return config

    def fingerprint(self) -> str:
        """Name of the initial model's content; see `model_digest`."""
        return model_digest(self.name_or_path, self.load_options.get("revision"))[:16]


def model_digest(name_or_path: str, revision: str | None) -> str:
    """Name a model by the bytes of its files: another training may have left files of the same names and sizes.

    A hub id is named by itself and the revision.

    Args:
        name_or_path: Folder or hub id.
        revision: Branch, tag or commit of a hub model.

    Returns:
        64 hexadecimal digits.
    """
    folder = Path(name_or_path)
    if not folder.is_dir():
        return hash_value([name_or_path, revision])
    files = [
        path
        for path in sorted(folder.iterdir())
        if path.name in _SETTINGS or (path.suffix in _WEIGHTS and path.name != "training_args.bin")
    ]
    return hash_value([(path.name, hash_file(path)) for path in files])


def release_memory() -> None:
    """Let go of models and optimizers that nobody holds any more.

    A trainer and its callbacks hold each other, and so do a model and its wrapped `forward`: without this they stay in
    memory beside the model that is loaded next. What a GPU's allocator keeps for later is given back, too.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
