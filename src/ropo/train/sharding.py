"""What FSDP does otherwise than a training of preferences needs it.

In: the plugin of `accelerate` that holds FSDP's settings, or None where nothing is sharded. Out: its settings changed.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch.distributed.fsdp import StateDictType


def keep_outputs_in_float32(plugin: Any) -> None:
    """FSDP2 would hand out log-probabilities in half precision, a tenth of a nat from what they are."""
    policy: Any = getattr(plugin, "mixed_precision_policy", None)
    if getattr(policy, "output_dtype", None) is not None:
        plugin.mixed_precision_policy = replace(policy, output_dtype=None)


@contextlib.contextmanager
def whole_weights(plugin: Any) -> Iterator[None]:
    """Within it FSDP saves whole weights: `Trainer` writes none at all where shards are asked for."""
    if plugin is None:
        yield
        return
    before, plugin.state_dict_type = plugin.state_dict_type, StateDictType.FULL_STATE_DICT
    try:
        yield
    finally:
        plugin.state_dict_type = before
