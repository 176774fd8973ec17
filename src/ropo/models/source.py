"""`Model`: where models come from, the initial one, the ones that rounds have trained, and the reference.

In: a folder or hub id and how to load it. Out: a causal language model on this process's device; or a refusal of what
would stop a run only after hours.
"""

import copy
import gc
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from peft import PeftConfig
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from ropo.data.read import instead_of_missing, looks_like_path
from ropo.data.tokenize import TokenizedPair
from ropo.logps.batch import Batching
from ropo.logps.cache import CachedFeatures, reference_features, reference_logps
from ropo.logps.features import Sketch
from ropo.models.adapters import (
    ADAPTER_SETTINGS,
    ADAPTER_WEIGHTS,
    adapter_folder,
    base_of,
    check_beginning,
    load_adapter,
)
from ropo.models.causal import CAUSAL_LM, NEEDS_MODEL
from ropo.models.digest import at_commit, model_digest
from ropo.models.files import (
    OF_INITIAL_FILES,
    TOKENIZER_SETTINGS,
    check_json,
    explained,
    for_config,
    header,
    load_whole,
    make_skeleton,
    not_finite,
    read_config,
)
from ropo.models.quantized import compute_as_in_training
from ropo.models.sharding import forget_engines, loads_in_parts, whole_models
from ropo.pairs import PairFeatures, PairLogps
from ropo.provenance import hash_value

_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "tekken.json")  # one of them is in every folder
_NEEDS_TOKENIZER = "model_name_or_path needs a model with its tokenizer"


class Model:
    """A model of a run: where its weights come from, its tokenizer, its adapter, and how all of them are loaded.

    Nothing is loaded before it is asked for.

    Args:
        name_or_path: Folder or hub id of the initial model, or of an adapter that PEFT saved: the initial model is then
            its base with this adapter, which is what is trained further.
        tokenizer: Its tokenizer; default the one that lies beside it, for an adapter without one that of its base.
        adapter: Configuration of a new adapter that is trained in place of the whole model; folders that a training has
            written then hold adapters of the initial model.
        load_options: Passed to `from_pretrained` (dtype, default float32; attn_implementation, revision, ...). With
            `quantization_config` an adapter is all that can be trained.

    Raises:
        ValueError: If a new adapter would begin elsewhere than at the initial model.

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
        if "torch_dtype" in self.load_options:
            raise ValueError("load_options needs dtype; got torch_dtype, its old name. Use dtype.")
        self.adapter = self._at_revision(adapter)
        self._tokenizer = tokenizer
        check_beginning(adapter, is_quantized=self.is_quantized)

    def _at_revision(self, adapter: PeftConfig | None) -> PeftConfig | None:
        """The settings of a new adapter, in which PEFT looks for the revision of the model that it belongs to."""
        revision = self.load_options.get("revision")
        if adapter is None or revision is None or adapter.revision is not None:
            return adapter
        found = copy.deepcopy(adapter)
        found.revision = revision
        return found

    @property
    def dtype(self) -> torch.dtype | None:
        """Of the weights as they are loaded; None for that of the files."""
        asked = self.load_options["dtype"]
        found: torch.dtype | None = getattr(torch, asked, None) if isinstance(asked, str) else asked
        return found

    @property
    def is_quantized(self) -> bool:
        """Whether its linear layers hold 4 or 8 bits per weight, or are quantized otherwise."""
        return bool(self.load_options.get("quantization_config"))

    @cached_property
    def start(self) -> Path | None:
        """Folder of the adapter that training starts from; None where the initial model is a whole one.

        Raises:
            ValueError: If a new adapter is asked for, too.
        """
        folder = adapter_folder(self.name_or_path, self.load_options.get("revision"))
        if folder is not None and self.adapter is not None:
            raise ValueError(
                f"A run trains one adapter; got {self.name_or_path}, an adapter that is trained further, and settings "
                "of a new one (peft_config, lora_*). Leave those out, or merge it into its model first: "
                "AutoPeftModelForCausalLM.from_pretrained(A).merge_and_unload().save_pretrained(M), and the tokenizer "
                "to M, too."
            )
        return folder

    @cached_property
    def base(self) -> tuple[str, dict[str, Any]]:
        """The whole model, below the adapter that training starts from: folder or hub id, and how it is loaded.

        All that is loaded of a hub id is of one commit.
        """
        if self.start is None:
            return self.name_or_path, at_commit(self.name_or_path, self.load_options)
        name, revision = base_of(self.start)  # the one that was given is the adapter's
        return name, at_commit(name, {**self.load_options, "revision": revision})

    @property
    def peft_config(self) -> PeftConfig | None:
        """Configuration of the adapter that is trained, new or not; None where the whole model is."""
        if self.start is None:
            return self.adapter
        found: PeftConfig = PeftConfig.from_pretrained(str(self.start))
        found.inference_mode = False  # as PEFT saves it
        return found

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, see `load_tokenizer`."""
        if self._tokenizer is None:
            name, options = self.base
            is_beside = self.start is not None and _holds_tokenizer(self.start)
            self._tokenizer = load_tokenizer(str(self.start) if is_beside else name, options)
        return self._tokenizer

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
        model: Any = self._weights(trained)
        compute_as_in_training(model)
        folder = self.start if trained is None else trained if self._is_adapter(trained) else None
        if folder is not None:
            advice = "Copy or save the adapter again." if trained is None else _again(trained)
            model = load_adapter(model, folder, is_trainable=is_trainable, advice=advice)
        if names := _of_any(not_finite(model)):
            if trained is None:
                raise ValueError(
                    f"A language model needs finite weights; {self.name_or_path} has NaN or infinity in {names}. Take "
                    f"another copy of it, or another dtype (it is read as {self.load_options['dtype']})."
                )
            raise FloatingPointError(
                f"The training of {trained} left NaN or infinity in {names}. Lower the learning rate, or use bf16 "
                "instead of fp16."
            )
        if "device_map" not in self.load_options and not self.is_quantized and not loads_in_parts():
            model = model.to(PartialState().device)
        loaded: PreTrainedModel = model.eval()
        return loaded

    def merged(self, trained: Path) -> PreTrainedModel:
        """Load what a training wrote as one whole model, its adapter added to the weights.

        Quantized weights are first brought back to `dtype`: they are what the adapter was trained on, and the whole
        model computes what was trained.

        Args:
            trained: The folder of an adapter.

        Raises:
            ValueError: If it holds no adapter.
        """
        if not self._is_adapter(trained):
            raise ValueError(f"Merging needs an adapter; {trained} holds a whole model already.")
        release_memory()
        with whole_models():  # the main process merges alone
            base: Any = self._weights(None)
            if self.is_quantized:
                base = base.dequantize(dtype=base.dtype)
            if _adapts_embeddings(base, trained):
                _untie(base)
            adapted = load_adapter(base, trained, is_trainable=False, advice=_again(trained))
        whole: PreTrainedModel = adapted.merge_and_unload()
        return whole

    def _is_adapter(self, trained: Path) -> bool:
        return self.adapter is not None or (trained / ADAPTER_SETTINGS).exists()

    def _weights(self, trained: Path | None) -> PreTrainedModel:
        """The whole model that a training wrote, or the one below any adapter."""
        if trained is not None and not self._is_adapter(trained):
            options = {name: value for name, value in self.load_options.items() if name not in OF_INITIAL_FILES}
            return load_whole(replace(CAUSAL_LM, advice=_again(trained)), str(trained), options)
        name, options = self.base
        if self.is_quantized:  # which cannot be moved
            options = {"device_map": {"": str(PartialState().device)}, **options}
        return self._with_room(load_whole(CAUSAL_LM, name, options))

    def _with_room(self, model: PreTrainedModel) -> PreTrainedModel:
        """The base with rows for tokens that were added when its adapter was trained, as `AutoPeftModel` makes them."""
        if self.start is not None and _holds_tokenizer(self.start):
            num_tokens = len(load_tokenizer(str(self.start), self.base[1]))
            has_rows = any(shape[:1] == [num_tokens] for shape in header(self.start / ADAPTER_WEIGHTS).values())
            table: Any = model.get_input_embeddings()
            if has_rows and num_tokens > table.weight.shape[0]:
                model.resize_token_embeddings(num_tokens, mean_resizing=False)
        return model

    def config(self) -> PretrainedConfig:
        """The configuration of the initial model, as it will be loaded; that of its base if it is an adapter."""
        if self.start is not None:  # which may have tokens of its own
            return self.skeleton().config
        return read_config(CAUSAL_LM, *self.base)

    def skeleton(self) -> PreTrainedModel:
        """The initial model without weights and adapter, which costs no memory; its files are checked on the way.

        Raises:
            ValueError: If its files do not hold a whole causal language model, or there is no such attention.
            ImportError: If the attention needs a package that is not installed.
        """
        return self._with_room(make_skeleton(CAUSAL_LM, *self.base))

    def processor_files(self) -> list[Path]:
        """What reads images and videos, of a model that could take them; a trained one is loaded with it, too."""
        config = self.config()
        if config.get_text_config(decoder=True) is config:
            return []
        name, options = self.base
        found = (
            cached_file(
                name, one, revision=options.get("revision"),
                _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False,
            )
            for one in _PROCESSOR_FILES
        )  # fmt: skip
        return [Path(one) for one in found if one is not None]

    def fingerprint(self) -> str:
        """Name of the initial model's content; see `model_digest`."""
        found = model_digest(*self.base)
        return (found if self.start is None else hash_value([found, model_digest(str(self.start), {})]))[:16]

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
        self._features: tuple[Sequence[TokenizedPair], CachedFeatures] | None = None

    def logps(self, tokens: Sequence[TokenizedPair]) -> PairLogps:
        """Log-probabilities of pairs, in their order."""
        return reference_logps(self._model.load(), tokens, self._batching, cache_dir=self._cache_dir)

    def logps_with_features(self, tokens: Sequence[TokenizedPair]) -> PairLogps:
        """Log-probabilities of pairs; their features are read in the same pass, and stay in the cache."""
        return self._read(tokens)[0]

    def features(self, tokens: Sequence[TokenizedPair]) -> PairFeatures:
        """Features of pairs, in their order; the model is loaded unless it has just read them."""
        if self._features is not None and self._features[0] is tokens:
            return self._features[1].of(tokens)
        return self._read(tokens)[1].of(tokens)

    def _read(self, tokens: Sequence[TokenizedPair]) -> tuple[PairLogps, CachedFeatures]:
        logps, features = reference_features(
            self._model.load(), tokens, self._batching, sketch=Sketch(), cache_dir=self._cache_dir
        )
        self._features = tokens, features
        return logps, features


def _of_any(names: str) -> str:
    """What a process has found in its part of the weights, in all of them: they stop together."""
    return next((one for one in gather_object([names]) if one), "")


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
            raise ValueError(f"{NEEDS_MODEL}; got {name!r}, which holds no config.json. Save the model there first.")
    elif isinstance(model, Path) or looks_like_path(name):
        raise FileNotFoundError(f"{NEEDS_MODEL}; got {name!r}: no such folder.{instead_of_missing(name)}")
    return name


def _adapts_embeddings(model: PreTrainedModel, adapter: Path) -> bool:
    """Whether LoRA is on the embeddings or on the head alone, of a model that has one tensor for both."""
    both = (model.get_input_embeddings(), model.get_output_embeddings())
    names = [f".{name}.lora_" for name, module in model.named_modules() if module in both]
    return any(name in tensor for tensor in header(adapter / ADAPTER_WEIGHTS) for name in names)


def _untie(model: Any) -> None:
    """Give the head a tensor of its own: what is merged into one of the two would else be in both."""
    weight = model.get_output_embeddings().weight
    if weight is model.get_input_embeddings().weight:
        model.get_output_embeddings().weight = torch.nn.Parameter(weight.detach().clone(), requires_grad=False)
        for config in (model.config, model.config.get_text_config(decoder=True)):
            config.tie_word_embeddings = False


def _again(trained: Path) -> str:
    return f"Delete {trained}, then run the same command again: it is trained anew."


def _holds_tokenizer(folder: Path) -> bool:
    return any(any(folder.glob(pattern)) for pattern in _TOKENIZER_FILES)


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
    if folder.is_dir() and not _holds_tokenizer(folder):
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
