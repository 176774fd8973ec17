"""A cache whose rows all end at its right edge: a step writes one column in place, and rows come and go between steps.

In: keys and values as a model computes them. Out: what `transformers` expects of a cache.

Shapes: B rows, H heads, T positions, D size of a head.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer


class PreallocatedLayer(DynamicLayer):
    """One layer of the cache. `DynamicLayer` copies all columns to add one; this one has spare columns."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._whole: tuple[Tensor, Tensor] | None = None

    @property
    def used(self) -> tuple[Tensor, Tensor]:
        """Keys and values so far, each of shape (B, H, T, D)."""
        assert self.keys is not None  # noqa: S101 - asked for only after the layer was written to
        assert self.values is not None  # noqa: S101
        return self.keys, self.values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write new columns.

        Args:
            key_states: Keys of the new columns.
            value_states: Values of the new columns.
            *args: As in `DynamicLayer`.
            **kwargs: As in `DynamicLayer`.

        Returns:
            All keys and values.
        """
        # Under autocast the rotation by position widens keys, and attention narrows them again: once is enough.
        key_states = key_states.to(value_states.dtype)
        if self._whole is None:  # a prompt being read: there is nothing yet to copy
            states: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)
            return states
        start = self.used[0].shape[2]
        end = start + key_states.shape[2]
        self._whole[0][:, :, start:end] = key_states
        self._whole[1][:, :, start:end] = value_states
        self.keys, self.values = self._whole[0][:, :, :end], self._whole[1][:, :, :end]
        return self.keys, self.values

    def regroup(
        self, stays: Tensor, enter: Sequence["PreallocatedLayer"], *, repeats: int, width: int, num_spare: int
    ) -> None:
        """See the function `regroup`, for one layer."""
        kept = [part[:, :, -width:].index_select(0, stays.to(part.device)) for part in self.used] if len(stays) else []
        keys = [(part, 1) for part in kept[:1]] + [(layer.used[0], repeats) for layer in enter]
        values = [(part, 1) for part in kept[1:]] + [(layer.used[1], repeats) for layer in enter]
        self._whole = _joined(keys, width=width, num_spare=num_spare), _joined(values, width=width, num_spare=num_spare)
        if not self.is_initialized:
            self.lazy_initialization(*self._whole)
        self.keys, self.values = self._whole[0][:, :, :width], self._whole[1][:, :, :width]


def _joined(parts: Sequence[tuple[Tensor, int]], *, width: int, num_spare: int) -> Tensor:
    """One tensor of all parts' rows, each row as often as the number beside its part, ending at column `width`."""
    first_BHTD = parts[0][0]
    num_rows = sum(len(part) * times for part, times in parts)
    whole_BHTD = first_BHTD.new_empty((num_rows, first_BHTD.shape[1], width + num_spare, first_BHTD.shape[3]))
    start = 0
    for part_BHTD, times in parts:
        end, pad = start + len(part_BHTD) * times, width - part_BHTD.shape[2]
        whole_BHTD[start:end, :, :pad] = 0  # masked, but nothing times NaN is NaN
        whole_BHTD[start:end, :, pad:width].unflatten(0, (len(part_BHTD), times)).copy_(part_BHTD[:, None])
        start = end
    return whole_BHTD


def new_cache() -> Cache:
    """An empty cache of `PreallocatedLayer`s."""
    return Cache(layer_class_to_replicate=PreallocatedLayer)


def layers_of(cache: Cache) -> list[PreallocatedLayer]:
    """The layers of a cache that `new_cache` made."""
    return [layer for layer in cache.layers if isinstance(layer, PreallocatedLayer)]


def regroup(cache: Cache, stays: Tensor, enter: Sequence[Cache], *, repeats: int, width: int, num_spare: int) -> None:
    """Keep some rows of a cache and add others after them, all ending at the same column.

    Args:
        cache: To be changed.
        stays: Places of the rows that stay, in their new order.
        enter: Caches of prompts just read, padded on the left; each of their rows is added `repeats` times in a row.
        repeats: Candidates per prompt.
        width: Columns in use afterwards: those of the longest row. What stands left of them is dropped.
        num_spare: Columns that can be written before the next regrouping.
    """
    if not cache.layers:
        cache.layers += [PreallocatedLayer() for _ in enter[0].layers]
    entering = [layers_of(other) for other in enter]
    for i, layer in enumerate(layers_of(cache)):
        layer.regroup(stays, [other[i] for other in entering], repeats=repeats, width=width, num_spare=num_spare)


def bytes_per_token(cache: Cache) -> int:
    """Memory that a position of one row takes in all layers."""
    sizes = [part.nbytes // (part.shape[0] * part.shape[2]) for layer in layers_of(cache) for part in layer.used]
    return sum(sizes)
