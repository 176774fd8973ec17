"""Adapters: the one that a training adds, and the one that a run starts from.

In: a PEFT configuration or its file, a folder that PEFT wrote, a model. Out: the model with the adapter on it; the
model that an adapter belongs to; or a refusal.
"""

import contextlib
import copy
import dataclasses
import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from peft import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    AdaLoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
)
from transformers import PreTrainedModel
from transformers.utils.peft_utils import find_adapter_config_file

from ropo.data.read import instead_of_missing, looks_like_path
from ropo.models.files import check_json, explained, header, some
from ropo.options import check_choice, read_yaml, short
from ropo.spelling import did_you_mean

ADAPTER_SETTINGS, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

_FILES = ("adapter_*", "tokenizer*", "vocab*", "merges.txt", "*.model", "*.jinja", "*_tokens*.json")
# What PEFT says of an adapter that it has saved, and a training decides anew.
_OF_SAVED = ("inference_mode", "base_model_name_or_path", "revision", "auto_mapping", "peft_version")
# Beginnings with which a new adapter leaves the model as it is, and which PEFT makes again when it loads the adapter.
_BEGINNINGS = (True, "gaussian", "pissa", "olora", "orthogonal", "mica")
READ_WEIGHTS = ("pissa", "olora", "mica")
"""Those that are taken out of the model's weights, which PEFT does again when it loads the adapter."""


@contextlib.contextmanager
def _without_old_name() -> Iterator[None]:
    """PEFT 0.21 asks transformers 5.23 for `is_gradient_checkpointing`; ends with the PEFT that knows its new name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def add_adapter(model: Any, peft_config: PeftConfig) -> PeftModel:
    """Put a new adapter on a model.

    Args:
        model: The base; its layers are wrapped.
        peft_config: Of the adapter; left as it is, though PEFT writes into what it gets.

    Raises:
        ValueError: If the model has no place for it.
    """
    with _without_old_name():
        adapted: PeftModel = get_peft_model(model, copy.deepcopy(peft_config))
    return adapted


def load_adapter(model: PreTrainedModel, folder: Path, *, is_trainable: bool, advice: str) -> PeftModel:
    """Put an adapter on its model, of which nothing is made up either.

    Args:
        model: The one that it was trained on.
        folder: What PEFT saved.
        is_trainable: Whether it is to be trained further.
        advice: What to do when the files do not hold it.

    Returns:
        The model with the adapter.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If one is damaged, or tensors are missing or do not fit.
    """
    check_json(str(folder))
    names = header(folder / ADAPTER_WEIGHTS)
    with explained("An adapter needs its own model", str(folder), advice), _without_old_name():
        adapted: PeftModel = PeftModel.from_pretrained(model, str(folder), is_trainable=is_trainable)
    missing = sorted(set(get_peft_model_state_dict(adapted, save_embedding_layers=False)) - set(names))
    if missing:
        raise ValueError(f"An adapter needs all its tensors; got '{folder}' without {some(missing)}. {advice}")
    return adapted


def adapter_folder(name_or_path: str, revision: str | None = None) -> Path | None:
    """Where an adapter lies on this machine.

    Args:
        name_or_path: Folder or hub id; of a hub id that is an adapter the files are downloaded.
        revision: Of a hub id.

    Returns:
        The folder; None for a whole model, or where nothing can be found out.
    """
    if Path(name_or_path).is_dir() or looks_like_path(name_or_path):
        return Path(name_or_path) if (Path(name_or_path) / ADAPTER_SETTINGS).exists() else None
    try:
        if find_adapter_config_file(name_or_path, revision=revision) is None:
            return None
    except (OSError, ValueError):  # no such model, which is told when its configuration is read
        return None
    return Path(snapshot_download(name_or_path, revision=revision, allow_patterns=list(_FILES)))


def base_of(folder: Path) -> tuple[str, str | None]:
    """Which model an adapter belongs to.

    Args:
        folder: What PEFT saved.

    Returns:
        Folder or hub id of the model, and its revision.

    Raises:
        FileNotFoundError: If the model is to be in a folder that is not there.
        ValueError: If the adapter does not say it, or the model is an adapter itself.
    """
    check_json(str(folder))
    path = folder / ADAPTER_SETTINGS
    settings = json.loads(path.read_bytes())
    base, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    if not base:
        raise ValueError(f"An adapter needs base_model_name_or_path; {path} has none. Write the model's name there.")
    if looks_like_path(base) and not Path(base).is_dir():
        raise FileNotFoundError(
            f"An adapter needs the model that it was trained on; {path} names {base!r}: no such folder."
            f"{instead_of_missing(base)} Write there where it is."
        )
    if (Path(base) / ADAPTER_SETTINGS).exists():
        raise ValueError(
            f"An adapter needs a whole model under it; {path} names {base!r}, an adapter itself. Merge that one into "
            "its model first: AutoPeftModelForCausalLM.from_pretrained(A).merge_and_unload().save_pretrained(M)."
        )
    return str(base), revision


def check_beginning(peft_config: PeftConfig | None, *, is_quantized: bool) -> None:
    """Refuse an adapter that would begin elsewhere than at the reference, or could not be loaded again.

    PiSSA and OLoRA take their beginning out of the model's weights. PEFT does the same when it loads such an adapter,
    so the model with it is the one that was trained; a decomposition that is drawn at random would be another one.

    Args:
        peft_config: Of a new adapter, or None.
        is_quantized: Whether the model's weights have 4 or 8 bits.

    Raises:
        ValueError: If it is so.
    """
    if isinstance(peft_config, AdaLoraConfig):
        raise ValueError("An adapter needs to be trained as it is; got ADALORA, which wants to be called after steps.")
    if getattr(peft_config, "alora_invocation_tokens", None):
        raise ValueError(
            "An adapter needs to be on for whole texts; got alora_invocation_tokens, which are looked for once in a "
            "row that holds several. Leave them out."
        )
    begin = getattr(peft_config, "init_lora_weights", True)
    if begin not in _BEGINNINGS:
        raise ValueError(
            f"init_lora_weights needs one of {', '.join(map(str, _BEGINNINGS))}; got {begin!r}, with which training "
            "begins elsewhere than at the reference, or the adapter cannot be loaded again as it was trained."
        )
    if is_quantized and begin in READ_WEIGHTS:
        raise ValueError(
            f"init_lora_weights {begin} needs weights that are not quantized; got them in 4 or 8 bits. Leave out "
            "load_in_4bit and load_in_8bit, or take another beginning."
        )


def read_peft_config(path: Path) -> PeftConfig:
    """Read the configuration of a new adapter, as PEFT saves it or written by hand.

    Args:
        path: JSON or YAML; `peft_type` is LORA and `task_type` CAUSAL_LM where it says nothing of them.

    Raises:
        ValueError: If it is no such file, or a key or a value is unknown.
    """
    found: Mapping[str, Any] = read_yaml(path, option="peft_config")
    given = {"task_type": "CAUSAL_LM", **{name: value for name, value in found.items() if name not in _OF_SAVED}}
    name = str(given.pop("peft_type", "LORA"))
    kinds = {str(getattr(one, "value", one)): kind for one, kind in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    kinds.pop("ADALORA", None)  # which wants to be called after each step
    check_choice("peft_type", name, kinds)
    known = [one.name for one in dataclasses.fields(kinds[name])]
    for key in given:
        if key not in known:
            raise ValueError(f"{path}: {name} of PEFT has no option {key!r}.{did_you_mean(str(key), known)}")
    if given["task_type"] != "CAUSAL_LM":
        raise ValueError(f"{path}: task_type needs CAUSAL_LM; got {short(given['task_type'])}.")
    try:
        made: PeftConfig = kinds[name](**given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: PEFT refuses it: {error}") from error
    return made
