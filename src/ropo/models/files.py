"""A model is what its files say: every tensor is there, whole and finite, and every token has an embedding.

In: a folder or hub id, and what kind of model it is to be. Out: that model, or its skeleton without weights; or a
refusal that names the file, the tensors or the token, and says what to do.

The one idea: the headers of safetensors files hold the name and the shape of every tensor, so `transformers` can load
the model on the meta device as it will load it in earnest. What it would draw at random is known in a second, before
anything is computed. A hub id is checked like a folder where its files are in the cache, and else when it is loaded.
"""

import contextlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from ropo.models.sharding import local_part, whole_models
from ropo.provenance import Json

logger = logging.getLogger(__name__)

SETTINGS = ("config.json", "generation_config.json", "adapter_config.json", "model.safetensors.index.json")
TOKENIZER_SETTINGS = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "chat_template.json",
)  # fmt: skip
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
IN_OTHER_FILES = ("variant", "subfolder", "gguf_file", "key_mapping")
"""Options that say which weights are read."""
OF_INITIAL_FILES = (*IN_OTHER_FILES, "revision")
"""Options that say where the initial weights are; what a training has written is not there."""
_FOR_CONFIG = ("revision", "trust_remote_code")
_NO_CODE = {"trust_remote_code": False}  # left out, `transformers` asks at the terminal whether to run it
_NUM_NAMES = 3  # in a message


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelKind:
    """What a model is read as.

    Attributes:
        auto_class: From a configuration to the class of `transformers` that reads it.
        noun: What a refusal calls it.
        place: Begin of a refusal when nothing can be read: what the name has to be.
        check: Refuses a configuration of another kind of model; takes the name, too.
        advice: What to do when the files do not hold this model.
    """

    auto_class: Callable[[PretrainedConfig], Any]
    noun: str
    place: str
    check: Callable[[PretrainedConfig, str], None]
    advice: str


def for_config(load_options: Mapping[str, Any] | None) -> dict[str, Any]:
    """Of the options for a model, those that its configuration and its tokenizer take, too."""
    return {**_NO_CODE, **{name: value for name, value in (load_options or {}).items() if name in _FOR_CONFIG}}


_CHECK = "Check the path or id, and the network; a new architecture needs a newer transformers."


@contextlib.contextmanager
def explained(place: str, name_or_path: str, advice: str = "") -> Iterator[None]:
    """What libraries say of a model that they cannot read names neither the option nor the value.

    Args:
        place: What the name has to be.
        name_or_path: What was given.
        advice: What to do.

    Raises:
        ValueError: In place of whatever a library raises, but for missing packages and too little memory.
    """
    try:
        yield
    except (ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        first, *rest = [line.strip() for line in str(error).strip().split("\n")]
        reason = f"{first} {rest[0]}" if first.endswith(":") and rest else first or type(error).__name__
        raise ValueError(f"{place}; got {name_or_path!r}: {reason.rstrip('.:,')}. {advice}".rstrip()) from error


# Files.


def check_json(
    name_or_path: str, load_options: Mapping[str, Any] | None = None, files: Sequence[str] = SETTINGS
) -> None:
    """Refuse settings that were cut off or damaged; `transformers` reads on without some of them.

    Args:
        name_or_path: Folder or hub id.
        load_options: As for the model.
        files: Which, by name.

    Raises:
        ValueError: If one is no JSON object.
    """
    folder = _folder_of(name_or_path, load_options)
    for path in [] if folder is None else [folder / name for name in files]:
        if path.exists():
            _read_object(path)


def _read_object(path: Path) -> Json:
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"A model needs {path.name} as JSON; got {path}: {error}. {_again(path)}") from error
    if not isinstance(found, dict):
        raise ValueError(f"A model needs {path.name} as a JSON object; got {path} with {found!r:.40}. {_again(path)}")
    return found


def _again(path: Path) -> str:
    if path.is_symlink():  # in the hub's cache
        return f"Delete {path.resolve()}: it is then downloaded again."
    return "Copy or save the model again."


def _folder_of(name_or_path: str, load_options: Mapping[str, Any] | None) -> Path | None:
    """Where the files of a model are; None for a hub id that is not in the cache."""
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    found = None
    with contextlib.suppress(ValueError):  # it can be no id
        found = try_to_load_from_cache(name_or_path, "config.json", revision=(load_options or {}).get("revision"))
    return Path(found).parent if isinstance(found, str) else None


def _shapes_in(
    name_or_path: str, load_options: Mapping[str, Any], config: PretrainedConfig
) -> dict[str, list[int]] | None:
    """Shape of every tensor by name; None where they are in other files than usual, or not on this machine.

    Raises:
        FileNotFoundError: If a folder lacks a file.
        ValueError: If one is no whole safetensors file.
    """
    folder = _folder_of(name_or_path, load_options)
    if (
        folder is None
        or any(load_options.get(name) for name in IN_OTHER_FILES)
        or getattr(config, "transformers_weights", None)
        or getattr(type(config), "extra_files", None)
    ):
        return None
    files = _weight_files(folder)
    if not Path(name_or_path).is_dir() and not (files and all(path.exists() for path in files)):
        return None  # the rest is yet to be downloaded
    shapes: dict[str, list[int]] = {}
    for path in files or _refuse_no_weights(folder):
        shapes |= header(path)
    return shapes


def _weight_files(folder: Path) -> list[Path]:
    """The files that `transformers` reads: one, or else the shards."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.exists() or not index.exists():
        return [whole] if whole.exists() else []
    shards = _read_object(index).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
        raise ValueError(f"A model in shards needs a weight_map of names; {index} has none. {_again(index)}")
    return [folder / name for name in sorted(set(shards.values()))]


def _refuse_no_weights(folder: Path) -> list[Path]:
    found = sorted({path.name for pattern in _PICKLES for path in folder.glob(pattern)} - {"training_args.bin"})
    if found:
        raise ValueError(
            f"A model needs its weights as safetensors; {folder} holds {found[0]}, a pickle, which can run any code "
            "when it is read. If you trust it, load it with transformers and save it with save_pretrained."
        )
    raise FileNotFoundError(f"A model needs its weights as safetensors; {folder} holds none. Save the model there.")


def header(path: Path) -> dict[str, list[int]]:
    """Shape of every tensor of a safetensors file.

    Args:
        path: The file.

    Raises:
        FileNotFoundError: If it is not there.
        ValueError: If it is no whole safetensors file.
    """
    if not path.exists():
        raise FileNotFoundError(f"A model needs all its files; {path} is missing. {_again(path)}")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - it is no dict
    except SafetensorError as error:
        with path.open("rb") as start:
            is_pointer = start.read(23) == b"version https://git-lfs"
        what = "a Git LFS pointer, no weights (`git lfs pull`)" if is_pointer else f"cut off or damaged ({error})"
        raise ValueError(
            f"A model needs whole safetensors files; {path} of {path.stat().st_size:,} bytes is {what}. {_again(path)}"
        ) from error


# Models.


def read_config(kind: ModelKind, name_or_path: str, load_options: Mapping[str, Any] | None = None) -> PretrainedConfig:
    """Read the configuration of a model.

    Args:
        kind: What the model is to be.
        name_or_path: Folder or hub id.
        load_options: As for the model.

    Returns:
        The configuration.

    Raises:
        ValueError: If there is none, it is of another kind of model, or says that the weights are quantized.
    """
    check_json(name_or_path, load_options)
    with explained(kind.place, name_or_path, _CHECK):
        config: PretrainedConfig = AutoConfig.from_pretrained(name_or_path, **for_config(load_options))
    kind.check(config, name_or_path)
    in_files = _settings(getattr(config, "quantization_config", None))
    if in_files and not _is_asked(in_files, (load_options or {}).get("quantization_config")):
        how = getattr(in_files["quant_method"], "value", in_files["quant_method"])
        bits = "load_in_4bit" if in_files.get("load_in_4bit") else "load_in_8bit"
        raise ValueError(
            f"{kind.noun} needs weights that are not quantized; got {name_or_path!r} ({how}). Name the model that it "
            f"was made from{f', or add {bits}' if how == 'bitsandbytes' else ''}."
        )
    return config


def _settings(quantization: Any) -> Json:
    if quantization is None or isinstance(quantization, dict):
        return quantization or {}
    found: Json = quantization.to_dict()
    return found


def _is_asked(in_files: Json, quantization: Any) -> bool:
    """Whether files that are quantized are what is asked for; `transformers` would take them whatever it is."""
    asked = _settings(quantization)
    return bool(asked) and all(
        in_files.get(name) == asked.get(name, in_files.get(name)) for name in ("quant_method", "load_in_4bit")
    )


def make_skeleton(kind: ModelKind, name_or_path: str, load_options: Mapping[str, Any] | None = None) -> PreTrainedModel:
    """Make a model without its weights, after every check that can do without them.

    Args:
        kind: What the model is to be.
        name_or_path: Folder or hub id.
        load_options: As for `from_pretrained`.

    Returns:
        The model on the meta device, where it takes no memory.

    Raises:
        ValueError: If it is no model of this kind, or its files do not hold the whole of it.
        ImportError: If it needs a package that is not installed.
    """
    options = {**_NO_CODE, **(load_options or {})}
    config = read_config(kind, name_or_path, options)
    config._attn_implementation = options.get("attn_implementation")
    with (
        whole_models(),
        explained(f"{kind.noun} needs settings that transformers knows", name_or_path),
        torch.device("meta"),
    ):
        auto_class = kind.auto_class(config)
        skeleton: PreTrainedModel = auto_class.from_config(config, trust_remote_code=options["trust_remote_code"])
    is_quantized = getattr(config, "quantization_config", None)  # in the files, so shapes are others
    shapes = None if is_quantized else _shapes_in(name_or_path, options, config)
    if shapes is not None:
        with (
            explained(f"{kind.noun} needs files that transformers can read", name_or_path, kind.advice),
            _quiet(),
            whole_models(),
        ):
            model_class: Any = type(skeleton)
            _, found = model_class.from_pretrained(
                None,
                config=skeleton.config,
                state_dict={name: torch.empty(shape, device="meta") for name, shape in shapes.items()},
                device_map={"": "meta"},
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
        _refuse_incomplete(found, kind, name_or_path)
    return skeleton


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """A model that is not loaded needs no bar and no report."""
    level, has_bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if has_bar:
            transformers_logging.enable_progress_bar()


def load_whole(kind: ModelKind, name_or_path: str, load_options: Mapping[str, Any] | None = None) -> PreTrainedModel:
    """Load a model of which nothing is made up.

    Args:
        kind: What the model is to be.
        name_or_path: Folder or hub id.
        load_options: As for `from_pretrained`.

    Returns:
        The model, where the options put it.

    Raises:
        ValueError: If it is no model of this kind, a file is missing or damaged, or tensors are missing or of another
            shape.
    """
    options = {**_NO_CODE, **(load_options or {}), "use_safetensors": True}
    config = read_config(kind, name_or_path, options)
    try:
        with explained(f"{kind.noun} needs files that transformers can read", name_or_path, kind.advice):
            model, found = kind.auto_class(config).from_pretrained(
                name_or_path, output_loading_info=True, ignore_mismatched_sizes=True, **options
            )
    except ValueError:
        _shapes_in(name_or_path, options, config)  # if it is a file, it is named
        raise
    _refuse_incomplete(found, kind, name_or_path)
    loaded: PreTrainedModel = model
    return loaded


def _refuse_incomplete(found: Mapping[str, Any], kind: ModelKind, name_or_path: str) -> None:
    """What `transformers` would draw at random stops a run; what it does not use is told once."""
    if missing := sorted(found["missing_keys"]):
        raise ValueError(
            f"{kind.noun} needs trained weights for all its parts; got {name_or_path!r} without {some(missing)}. "
            f"{kind.advice}"
        )
    if other := [f"{name} {[*there]}, not {[*here]}" for name, there, here in sorted(found["mismatched_keys"])]:
        raise ValueError(
            f"{kind.noun} needs weights of the shapes that its config.json says; got {name_or_path!r} with "
            f"{some(other, between='; ')}. {kind.advice}"
        )
    if unused := sorted(found["unexpected_keys"]):
        _warn_once(
            f"{name_or_path} holds tensors that its config.json has no place for, and which are left out: "
            f"{some(unused)}. If a number there is too small (num_hidden_layers), this is another model."
        )


def some(names: Sequence[str], *, between: str = ", ") -> str:
    """The first few, and how many more there are.

    Args:
        names: Of tensors, in order.
        between: What stands between two.
    """
    more = f" and {len(names) - _NUM_NAMES} more" if len(names) > _NUM_NAMES else ""
    return f"{between.join(names[:_NUM_NAMES])}{more}"


@cache
def _warn_once(sentence: str) -> None:
    """A run loads its initial model again and again."""
    logger.warning(sentence)


def not_finite(model: nn.Module) -> str:
    """Names of the first few weights that hold NaN or infinity, and how many more do; empty if none does.

    Args:
        model: On any device. Of a model in parts those on this process are looked at.
    """
    found = [name for name, weight in model.named_parameters() if not _is_finite(local_part(weight))]
    return some(found)


def _is_finite(weight: Tensor) -> bool:
    here: Tensor = weight.detach()
    if here.is_meta or not here.numel() or not here.is_floating_point() or here.itemsize < 2:
        return True  # elsewhere, or quantized
    # In one pass and without a copy: NaN wins over every number.
    return bool(torch.stack(torch.aminmax(here)).isfinite().all())
