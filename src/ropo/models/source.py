"""`Model`: where models come from, the initial one, the ones that rounds have trained, and the reference.

In: a folder or hub id and how to load it. Out: a causal language model on this process's device; or a refusal of what
would stop a run only after hours.
"""

import gc
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from peft import PeftConfig
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto import modeling_auto

from ropo.data.read import instead_of_missing, looks_like_path
from ropo.data.tokenize import TokenizedPair
from ropo.logps.batch import Batching
from ropo.logps.cache import reference_features, reference_logps
from ropo.logps.features import Sketch
from ropo.models.files import (
    SETTINGS,
    TOKENIZER_SETTINGS,
    ModelKind,
    check_json,
    explained,
    for_config,
    load_adapter,
    load_whole,
    make_skeleton,
    not_finite,
    read_config,
)
from ropo.models.sharding import forget_engines, loads_in_parts
from ropo.pairs import PairFeatures, PairLogps
from ropo.provenance import hash_file, hash_value

_WEIGHTS = (".safetensors", ".model", ".jinja")
_NAMED = (*SETTINGS, *TOKENIZER_SETTINGS, "merges.txt")

_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "tekken.json")  # one of them is in every folder
_NEEDS_MODEL = "model_name_or_path needs a folder with a model, or the id of one on the hub"
_NEEDS_TOKENIZER = "model_name_or_path needs a model with its tokenizer"

_OTHER_HEADS = {
    name
    for mapping in (
        modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_NEXT_SENTENCE_PREDICTION_MAPPING_NAMES,
    )
    for name in mapping.values()
} - set(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
# Model types whose language model reads both ways unless its configuration says otherwise.
_READS_BOTH_WAYS = {*modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, "bert-generation", "xlnet"} - set(
    modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
)

_IS_ADAPTER = (
    "A run needs a whole model to start from; {} is an adapter. Merge it into its model first: "
    "AutoPeftModelForCausalLM.from_pretrained(A).merge_and_unload().save_pretrained(M), and the tokenizer to M, too."
)


def _check_causal(config: PretrainedConfig, name_or_path: str) -> None:
    """Refuse what `transformers` would turn into a causal language model with a new head, or without a causal mask.

    Raises:
        ValueError: If the model was trained with another head, or its tokens see the ones that follow.
    """
    made_as = (config.architectures or [""])[0]
    own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    is_causal = getattr(config, "is_decoder", False) or getattr(config, "causal", False)
    if made_as in _OTHER_HEADS:
        why = made_as
    elif config.model_type in _READS_BOTH_WAYS and not is_causal:
        why = f"{made_as or config.model_type}, whose tokens see the ones that follow: is_decoder is not set"
    elif not own_code and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        why = made_as or config.model_type
    else:
        return
    raise ValueError(
        f"A run needs a causal language model; got {name_or_path!r} ({why}). Name one that was trained to predict the "
        "next token."
    )


POLICY = ModelKind(
    auto_class=AutoModelForCausalLM,
    noun="A language model",
    place=_NEEDS_MODEL,
    check=_check_causal,
    advice="Copy the model again, or correct its config.json (num_hidden_layers, tie_word_embeddings, ...).",
)
"""The model that is aligned, and the reference."""


class Model:
    """A model of a run: where its weights come from, its tokenizer, its adapter, and how all of them are loaded.

    Nothing is loaded before it is asked for.

    Args:
        name_or_path: Folder or hub id of the initial model.
        tokenizer: Its tokenizer; default the one that lies beside it.
        adapter: Configuration of the adapter that is trained in place of the whole model; folders that a training has
            written then hold adapters of the initial model.
        load_options: Passed to `from_pretrained` (dtype, default float32; attn_implementation, revision, ...).

    Raises:
        ValueError: If the initial model is itself an adapter: a new one would take its place, not go on top of it.

    Examples:
        >>> Model("someone/tiny", load_options={"revision": "v2"}).load_options
        {'dtype': 'float32', 'revision': 'v2'}
    """

    def __init__(
        self,
        name_or_path: str | Path,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        adapter: PeftConfig | None = None,
        load_options: Mapping[str, Any] | None = None,
    ) -> None:
        self.name_or_path = str(name_or_path)
        # Left alone, `transformers` takes the precision of the files, mostly bfloat16, and in that a step of a usual
        # learning rate is rounded away.
        self.load_options = {"dtype": "float32", **(load_options or {})}
        self.adapter = adapter
        self._tokenizer = tokenizer
        if (Path(name_or_path) / "adapter_config.json").exists():
            raise ValueError(_IS_ADAPTER.format(name_or_path))

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, see `load_tokenizer`."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.name_or_path, self.load_options)
        return self._tokenizer

    def _holds_adapter(self, trained: Path | None) -> bool:
        return trained is not None and (self.adapter is not None or (trained / "adapter_config.json").exists())

    def load(self, trained: Path | None = None, *, is_trainable: bool = False) -> PreTrainedModel:
        """Load the initial model, or the one in the folder `trained`.

        Args:
            trained: What a training wrote, a whole model or an adapter of the initial one; None for the initial model.
            is_trainable: Whether an adapter is to be trained further.

        Returns:
            The model on this process's device, in evaluation mode. Where weights are sharded, what this process holds
            of it until `Batching.sharded` gives each its part.

        Raises:
            ValueError: If files are damaged, or do not hold the whole model.
            FloatingPointError: If a round left weights that are not finite.
        """
        release_memory()
        is_adapter = self._holds_adapter(trained)
        path = self.name_or_path if trained is None or is_adapter else str(trained)
        again = f"Delete {trained}, then run the same command again: it is trained anew."
        kind = POLICY if path == self.name_or_path else replace(POLICY, advice=again)
        model: Any = load_whole(kind, path, self.load_options)
        if trained is None and getattr(model, "_hf_peft_config_loaded", False):  # one from the hub
            raise ValueError(_IS_ADAPTER.format(path))
        if trained is not None and is_adapter:
            model = load_adapter(model, trained, is_trainable=is_trainable, advice=again)
        if names := _of_any(not_finite(model)):
            if trained is None:
                raise ValueError(
                    f"A language model needs finite weights; {path} has NaN or infinity in {names}. Take another copy "
                    f"of it, or another dtype (it is read as {self.load_options['dtype']})."
                )
            raise FloatingPointError(
                f"The training of {trained} left NaN or infinity in {names}. Lower the learning rate, or use bf16 "
                "instead of fp16."
            )
        has_place = "device_map" in self.load_options or "quantization_config" in self.load_options
        if not has_place and not loads_in_parts():
            model = model.to(PartialState().device)
        loaded: PreTrainedModel = model.eval()
        return loaded

    def config(self) -> PretrainedConfig:
        """The configuration of the initial model, as it will be loaded."""
        return read_config(POLICY, self.name_or_path, self.load_options)

    def skeleton(self) -> PreTrainedModel:
        """The initial model without its weights, which costs no memory; its files are checked on the way.

        Raises:
            ValueError: If its files do not hold a whole causal language model, or there is no such attention.
            ImportError: If the attention needs a package that is not installed.
        """
        return make_skeleton(POLICY, self.name_or_path, self.load_options)

    def fingerprint(self) -> str:
        """Name of the initial model's content; see `model_digest`."""
        return model_digest(self.name_or_path, self.load_options.get("revision"))[:16]

    def reference(self, *, cache_dir: Path, batching: Batching) -> "Reference":
        """The initial model as the frozen one that margins are measured against.

        Args:
            cache_dir: Where what is read is kept, by content.
            batching: Padding, precision and size of the batches.
        """
        return Reference(self, cache_dir=cache_dir, batching=batching)


class Reference:
    """The frozen model that margins are measured against, in memory only while it reads.

    Args:
        model: Loads it.
        cache_dir: Where what is read is kept, by content.
        batching: See `Model.reference`.
    """

    def __init__(self, model: Model, *, cache_dir: Path, batching: Batching) -> None:
        self._model, self._cache_dir, self._batching = model, cache_dir, batching

    def logps(self, tokens: Sequence[TokenizedPair]) -> PairLogps:
        """Log-probabilities of pairs, in their order."""
        return reference_logps(self._model.load(), tokens, self._batching, cache_dir=self._cache_dir)

    def read(self, tokens: Sequence[TokenizedPair]) -> tuple[PairLogps, PairFeatures]:
        """Log-probabilities and features of pairs, in one pass over those that are not in the cache."""
        return reference_features(
            self._model.load(), tokens, self._batching, sketch=Sketch(), cache_dir=self._cache_dir
        )

    def features(self, tokens: Sequence[TokenizedPair]) -> PairFeatures:
        """Features of pairs, in their order."""
        return self.read(tokens)[1]


def _of_any(names: str) -> str:
    """What a process has found in its part of the weights, in all of them: they stop together."""
    return next((one for one in gather_object([names]) if one), "")


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
    files = [path for path in sorted(folder.iterdir()) if path.name in _NAMED or path.suffix in _WEIGHTS]
    return hash_value([(path.name, hash_file(path)) for path in files])


def find_model(model: str | Path) -> str:
    """The folder or hub id of a model, after a look whether a model can be there.

    Args:
        model: As the user named it.

    Returns:
        The name, for `from_pretrained`.

    Raises:
        FileNotFoundError: If it is a path and no folder is there.
        ValueError: If the folder holds no model.
    """
    name, folder = str(model), Path(model)
    if folder.is_dir():
        if not any((folder / file).exists() for file in ("config.json", "adapter_config.json")):
            raise ValueError(f"{_NEEDS_MODEL}; got {name!r}, which holds no config.json. Save the model there first.")
    elif isinstance(model, Path) or looks_like_path(name):
        raise FileNotFoundError(f"{_NEEDS_MODEL}; got {name!r}: no such folder.{instead_of_missing(name)}")
    return name


def load_tokenizer(name_or_path: str, load_options: Mapping[str, Any] | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer that belongs to a model.

    Args:
        name_or_path: Folder or hub id of the model.
        load_options: As for the model; the revision and the trust in its code count here, too.

    Returns:
        The tokenizer.

    Raises:
        ValueError: If there is no such model, or its folder holds no tokenizer, or a damaged one.
    """
    folder = Path(name_or_path)
    kept = (*_TOKENIZER_FILES, "adapter_config.json")  # an adapter may have that of its model
    if folder.is_dir() and not any(any(folder.glob(pattern)) for pattern in kept):
        raise ValueError(
            f"A model needs its tokenizer beside it; {name_or_path} holds none. Save it there, too: "
            f"AutoTokenizer.from_pretrained(BASE).save_pretrained({name_or_path!r})."
        )
    check_json(name_or_path, load_options, TOKENIZER_SETTINGS)
    with explained(_NEEDS_TOKENIZER, name_or_path, "Copy or save the tokenizer there again."):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name_or_path, **for_config(load_options))
    return tokenizer


def release_memory() -> None:
    """Let go of models and optimizers that nobody holds any more.

    A trainer and its callbacks hold each other, and so do a model and its wrapped `forward`: without this they stay in
    memory beside the model that is loaded next. What a GPU's allocator keeps for later is given back, too.
    """
    forget_engines()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
