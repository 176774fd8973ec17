"""The model that is trained, made ready: loaded, without dropout, with its adapter.

In: a model or its name, a tokenizer or none, the settings of an adapter or none. Out: a model and its tokenizer.
"""

import copy
import logging
import re
from typing import Any

from peft import LoraConfig, PeftConfig
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from ropo.logps.choose import varies_in_training
from ropo.logps.dropout import turn_dropout_off
from ropo.logps.load_balance import LoadBalance, coefficient_of
from ropo.logps.shared_prefix import balance_load, causal_lm_of, decoder_of
from ropo.models.adapters import add_adapter, check_beginning
from ropo.models.fit import check_adapter
from ropo.models.quantized import compute_as_in_training
from ropo.models.source import Model, find_model, load_tokenizer
from ropo.train.options import TrainOptions

logger = logging.getLogger(__name__)


def make_ready(
    model: PreTrainedModel | str, tokenizer: PreTrainedTokenizerBase | None, peft_config: PeftConfig | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Both, loaded where they are not given; the model without dropout, and known to take the adapter.

    Args:
        model: A model, or the folder or hub id of one.
        tokenizer: Its tokenizer; None to load it from where the model is.
        peft_config: Settings of the adapter that it will get, if any; see `with_adapter`.

    Raises:
        ValueError: If there is no tokenizer and no place to load it from, or the adapter does not fit.
    """
    if isinstance(model, str):
        source = Model(find_model(model), tokenizer=tokenizer, adapter=peft_config)
        model, tokenizer = source.load(is_trainable=True), source.tokenizer
    elif tokenizer is None:
        place = model.config.name_or_path
        if not place:
            raise ValueError(
                "ROPOTrainer needs processing_class with a model of no folder; got none. Pass its tokenizer."
            )
        tokenizer = load_tokenizer(place)
    turn_dropout_off(model)
    if varies_in_training(model):
        logger.warning(
            "In training a %s draws at random, beside its dropout, which is off: its margins vary from one pass to "
            "another, and the first are not 0.",
            causal_lm_of(model).config.model_type,
        )
    compute_as_in_training(model)
    for name in parts_beside_language(model):  # no loss depends on them, which processes that share gradients wait for
        causal_lm_of(model).get_submodule(name).requires_grad_(requires_grad=False)
    if peft_config is not None:
        check_beginning(peft_config, is_quantized=getattr(model, "is_quantized", False))
        check_adapter(model, peft_config)
    return model, tokenizer


def with_adapter(model: PreTrainedModel, peft_config: PeftConfig | None, *, seed: int) -> PreTrainedModel:
    """The model wrapped with a new adapter, if there is to be one.

    Args:
        model: The base.
        peft_config: Settings of the adapter, left as they are; None for no adapter.
        seed: An adapter starts at random, and `Trainer` sets the seed only later.
    """
    if peft_config is None:
        return model
    set_seed(seed)
    return add_adapter(model, _of_language(model, peft_config))  # type: ignore[return-value] # it hands on what the model has


def _of_language(model: nn.Module, peft_config: PeftConfig) -> PeftConfig:
    """A copy of the settings, since PEFT writes into them, that leaves out what reads images."""
    found = copy.deepcopy(peft_config)
    beside = parts_beside_language(model)
    if beside and isinstance(found, LoraConfig) and found.exclude_modules is None:
        found.exclude_modules = rf"({'|'.join(map(re.escape, beside))})(\..+)?"
    return found


def parts_beside_language(model: nn.Module) -> list[str]:
    """Names of the largest modules that hold no part of the language model, such as the one that reads images.

    Args:
        model: A causal language model, by itself or as a part of another model; by itself it has none.
    """
    causal_lm = causal_lm_of(model)
    if causal_lm.config.get_text_config(decoder=True) is causal_lm.config:
        return []
    language = {
        id(one) for one in [*decoder_of(causal_lm).parameters(), *causal_lm.get_output_embeddings().parameters()]
    }
    found: list[str] = []
    for name, module in causal_lm.named_modules():
        ids = {id(one) for one in module.parameters()}
        if ids and not ids & language and not any(name.startswith(f"{part}.") for part in found):
            found.append(name)
    return found


def load_balance_of(model: nn.Module, args: TrainOptions, *, layout: str) -> LoadBalance | None:
    """The auxiliary loss of a model's routers, computed from now on; None where nobody asks for it.

    Args:
        model: A causal language model, with or without an adapter.
        args: Options.
        layout: How the model is read.

    Raises:
        ValueError: If the model has no such loss, is read by the plain forward, or runs its layers without gradients
            first, when routers are read.
    """
    asked = coefficient_of(model, args.router_aux_loss_coef)
    if not asked:
        return None
    if layout == "plain":
        raise ValueError(
            f"router_aux_loss_coef {asked:g} needs another forward than the plain one, which this model takes. Set it "
            "to 0."
        )
    given: Any = args.activation_checkpointing_kwargs or args.gradient_checkpointing_kwargs or {}
    if (args.activation_checkpointing or args.gradient_checkpointing) and given.get("use_reentrant"):
        raise ValueError(
            f"router_aux_loss_coef {asked:g} needs activation checkpoints that are not reentrant, or it has no "
            "gradient; got use_reentrant true. Leave that out, or set router_aux_loss_coef to 0."
        )
    return balance_load(model, asked)
