"""The model that is trained, made ready: loaded, without dropout, with its adapter.

In: a model or its name, a tokenizer or none, the settings of an adapter or none. Out: a model and its tokenizer.
"""

from peft import PeftConfig
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from ropo.models.adapters import add_adapter, check_beginning
from ropo.models.fit import check_adapter
from ropo.models.quantized import compute_as_in_training
from ropo.models.source import Model, find_model, load_tokenizer


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
    compute_as_in_training(model)
    if peft_config is not None:
        check_beginning(peft_config, is_quantized=getattr(model, "is_quantized", False))
        check_adapter(model, peft_config)
    return model, tokenizer


def turn_dropout_off(model: nn.Module) -> None:
    """A margin compares two probabilities of one text; dropout would make both depend on chance."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "attention_dropout", None), float):  # a number that is given to the kernel
            module.attention_dropout = 0.0  # type: ignore[assignment]


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
    return add_adapter(model, peft_config)  # type: ignore[return-value] # which hands on what the model has
