"""Without dropout: in training, too, a model says the same of the same text.

In: a model. Out: the same model, whose numbers for chance are 0, wherever they are kept; its configuration is left as
it is, and saved so.
"""

import re
from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import PreTrainedConfig, PreTrainedModel

_CHANCE = re.compile("drop|jitter")


def turn_dropout_off(model: nn.Module) -> None:
    """Set to 0 all that makes a training forward depend on chance.

    A margin compares two probabilities of one text, and with dropout both would depend on chance. Models keep its rate
    in modules, in numbers that are given to a function or a kernel, or read it from their configuration each time.
    """
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if _is_chance(name, value):
                setattr(module, name, 0.0)
        if _reads_chance(module):
            module.config = _Calm(module.config)  # type: ignore[assignment, arg-type]


def turn_adapter_dropout_on(model: Any) -> None:
    """Give the LoRA adapters of a PEFT model the dropout of their configuration again, where that was asked for."""
    for layer in model.modules():
        for name, module in getattr(layer, "lora_dropout", {}).items():
            if isinstance(module, nn.Dropout):
                module.p = model.peft_config[name].lora_dropout


def _reads_chance(module: nn.Module) -> bool:
    """Whether a layer may read such numbers from its configuration; that of a whole model or its wrapper is saved."""
    config = vars(module).get("config")
    if not isinstance(config, PreTrainedConfig) or not any(_is_chance(*one) for one in vars(config).items()):
        return False
    return not any(isinstance(part, PreTrainedModel) for part in module.modules())


def _is_chance(name: str, value: object) -> bool:
    return isinstance(value, float) and value > 0 and bool(_CHANCE.search(name))


class _Calm:
    """A configuration as it is, later changes included, but for its chances, which read as 0."""

    def __init__(self, config: PreTrainedConfig) -> None:
        vars(self)["_config"] = config

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_config":  # a copy that is not filled yet
            raise AttributeError(name)
        value = getattr(self._config, name)
        return 0.0 if _is_chance(name, value) else value

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self._config, name, value)
