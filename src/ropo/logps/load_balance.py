"""What keeps the routers of a mixture-of-experts model from sending all tokens to a few experts.

In: a causal language model whose layers have experts; the logits of its routers in a forward pass. Out: its own
auxiliary loss, beside the log-probabilities of that pass.

The one idea: `transformers` has one function for it, in the file of each such model. It is called here with the tokens
of our layouts: a prompt that is encoded once counts once, and what fills up a row does not.

Shapes: B rows, T positions, E experts.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class LoadBalance:
    """The auxiliary loss of one model; `loss` is that of the newest forward pass with gradients.

    ::

        L = E·Σ_e f_e·p_e          (arXiv:2101.03961, eq. 4, over all layers at once)

    with f_e the share of tokens that a router sends to expert e, and p_e its mean probability; k where all experts are
    used alike, with k experts to a token. It is a statistic of a forward pass, so it depends on how a step is divided.

    Args:
        causal_lm: The module that owns the language-model head.
        coefficient: What the loss is multiplied by.

    Raises:
        ValueError: If the model has no such loss.
    """

    def __init__(self, causal_lm: Any, *, coefficient: float) -> None:
        self.coefficient = coefficient
        self.loss: Tensor | None = None
        function = getattr(sys.modules.get(type(causal_lm).__module__), "load_balancing_loss_func", None)
        config = causal_lm.config.get_text_config()
        numbers = [
            next((found for one in (causal_lm, config) if (found := getattr(one, name, None)) is not None), None)
            for name in ("num_experts", "num_experts_per_tok")
        ]
        if function is None or None in numbers:
            raise ValueError(
                f"router_aux_loss_coef needs a model of experts that computes its routers' loss; got "
                f"{type(causal_lm).__name__}. Set it to 0."
            )
        self._function: Callable[..., Tensor] = function
        self._num_experts, self._num_taken = numbers

    def read(self, router_logits: tuple[Tensor, ...], is_token_BT: Tensor) -> None:
        """Compute the loss.

        Args:
            router_logits: Of each layer with experts, each (B·T, E).
            is_token_BT: Which positions hold tokens.
        """
        mask_BT = is_token_BT.to(torch.long)
        self.loss = self._function(router_logits, self._num_experts, self._num_taken, mask_BT)


def coefficient_of(model: nn.Module, given: float | None) -> float:
    """The coefficient that is asked for: as given, else the model's own if its configuration asks for the loss.

    Args:
        model: A causal language model.
        given: By the user; None to follow the configuration (`output_router_logits`, `router_aux_loss_coef`).
    """
    config: Any = model.config.get_text_config()  # type: ignore[union-attr,operator] # of every model of transformers
    if given is None and getattr(config, "output_router_logits", False):
        return float(getattr(config, "router_aux_loss_coef", 0.0))
    return given or 0.0
