"""Reference log-probabilities and features on disk, under a hash of everything that makes them.

In: the reference model, tokenized pairs, a folder. Out: `PairLogps`, `CachedFeatures`; the model runs only for pairs
never seen.

A folder per reference (hash of its weights, its configuration and the precision) holds shards; a shard maps the
hash of a pair's token ids to its log-probabilities. The two responses stand there in an order that does not depend on
the label, so a swapped pair is a hit. So is every pair after a change of learning rate or output folder; a changed
template, truncation or weight is a miss, of appended rows only these are computed, and a pass that is killed resumes
after its last shard. Features have shards of their own, in a folder under the reference's that is named
after how they are made: log-probabilities are read without them, and serve features of every kind.
"""

import hashlib
import json
import logging
import time
import uuid
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ropo.data.tokenize import TokenizedPair
from ropo.logps.batch import Batching
from ropo.logps.features import FeatureReader, Features, Sketch
from ropo.logps.score import Rows, logps_of_rows, score_pairs
from ropo.logps.sharded import WholeTensors
from ropo.logps.shared_prefix import causal_lm_of
from ropo.pairs import PairFeatures, PairLogps
from ropo.processes import meet
from ropo.provenance import DamagedFileError, RunError, hash_tensors, hash_value, write_aside

logger = logging.getLogger(__name__)

_SECONDS_PER_SHARD = 30.0  # at most this much work is lost when a pass is killed
_KEY_BYTES = 16
_SCALE = ".scale"  # behind the name of a block
# Where it was loaded from, by which version, and whether it keeps keys (which a trainer turns off) change no number.
_NOT_COMPUTED = ("_name_or_path", "transformers_version", "use_cache")
_NOT_OF_ADAPTER = ("base_model_name_or_path", "revision", "peft_version", "inference_mode")


def reference_hash(model: nn.Module, *, use_bf16: bool) -> str:
    """Name a reference by its weights, its configuration and the precision it is run in.

    Args:
        model: The reference, with or without PEFT.
        use_bf16: Whether it is run under bfloat16 autocast.

    Returns:
        16 hexadecimal digits.
    """
    config = json.loads(causal_lm_of(model).config.to_json_string(use_diff=False))
    config = {name: value for name, value in config.items() if name not in _NOT_COMPUTED}
    # How an adapter's weights are scaled stands in its settings alone.
    adapters = [
        {
            key: sorted(value) if isinstance(value, set) else value
            for key, value in one.to_dict().items()
            if key not in _NOT_OF_ADAPTER
        }
        for one in getattr(model, "peft_config", {}).values()
    ]
    return hash_value([hash_tensors(WholeTensors(model)), config, use_bf16, *adapters])[:16]


def reference_logps(
    model: nn.Module, tokens: Sequence[TokenizedPair], batching: Batching, *, cache_dir: Path
) -> PairLogps:
    """Log-probabilities under the reference, from the cache where it has them.

    Args:
        model: The reference, on its device.
        tokens: The pairs.
        batching: As for `score_pairs`.
        cache_dir: Folder of the cache; made when it is missing.

    Returns:
        One value per pair, in the order of `tokens`.
    """
    model = batching.sharded(model)
    folder = cache_dir / reference_hash(model, use_bf16=batching.use_bf16)
    ordered, is_swapped = _in_order(tokens)
    keys = [_key(pair) for pair in ordered]
    return _logps(_fill(folder, keys, model, ordered, batching), keys, tokens, is_swapped)


@dataclass(frozen=True, slots=True)
class CachedFeatures:
    """Features of one reference and of one kind on disk, which are read without the reference.

    Attributes:
        folder: Where they are.
    """

    folder: Path

    def of(self, tokens: Sequence[TokenizedPair]) -> PairFeatures:
        """Features of pairs that are there, in their order.

        They have 11 significant bits, as a share of the largest of their pair and block.

        Raises:
            DamagedFileError: If some are not there.
        """
        ordered, is_swapped = _in_order(tokens)
        features = _features(self.folder, [_key(pair) for pair in ordered])
        for block in features.blocks.values():
            block[is_swapped] *= -1.0
        return features


def reference_features(
    model: nn.Module,
    tokens: Sequence[TokenizedPair],
    batching: Batching,
    *,
    sketch: Sketch,
    cache_dir: Path,
) -> tuple[PairLogps, CachedFeatures]:
    """Log-probabilities and features under the reference, in one pass over the pairs that lack either in the cache.

    Args:
        model: The reference, on its device, with a language-model head.
        tokens: The pairs, at least one.
        batching: As for `score_pairs`.
        sketch: Of the gradient.
        cache_dir: Folder of the cache; made when it is missing.

    Returns:
        Log-probabilities in the order of `tokens`, and where the features of these pairs are.
    """
    model = batching.sharded(model)
    folder, reader = cache_dir / reference_hash(model, use_bf16=batching.use_bf16), FeatureReader(model, sketch)
    ordered, is_swapped = _in_order(tokens)
    keys = [_key(pair) for pair in ordered]
    known = _fill(folder, keys, model, ordered, batching, reader)
    return _logps(known, keys, tokens, is_swapped), CachedFeatures(folder / reader.name)


def _fill(
    folder: Path,
    keys: Sequence[bytes],
    model: nn.Module,
    tokens: Sequence[TokenizedPair],
    batching: Batching,
    reader: FeatureReader | None = None,
) -> dict[bytes, tuple[float, float]]:
    """Score what is missing; returns the log-probabilities of all that is known then."""
    known = _load(folder)
    complete = known.keys() if reader is None else known.keys() & _keys(folder / reader.name)
    meet()  # a process that comes late would find shards of others, and split the work differently
    missing = [i for i, key in enumerate(keys) if key not in complete]
    what = "Reference log-probs" if reader is None else "Reference log-probs and features"
    logger.info("%s: %d of %d pairs are cached in %s", what, len(keys) - len(missing), len(keys), folder)
    if not missing:
        return known
    writer = _ShardWriter(folder, [keys[i] for i in missing], known.keys(), reader)
    score_pairs(model, [tokens[i] for i in missing], batching, title=what, reader=reader, on_batch=writer.add)
    writer.flush()
    meet()
    return _load(folder)


def _logps(
    known: dict[bytes, tuple[float, float]],
    keys: Sequence[bytes],
    tokens: Sequence[TokenizedPair],
    is_swapped: Sequence[bool],
) -> PairLogps:
    return logps_of_rows(
        [
            (i, *(known[key][::-1] if swapped else known[key]), len(pair.chosen), len(pair.rejected))
            for i, (key, pair, swapped) in enumerate(zip(keys, tokens, is_swapped, strict=True))
        ]
    )


def _features(folder: Path, keys: Sequence[bytes]) -> PairFeatures:
    """One array per block, filled shard by shard, so that no second copy of them is in memory.

    Raises:
        DamagedFileError: If a shard was damaged since it was looked at.
    """
    wanted: dict[bytes, list[int]] = {}
    for i, key in enumerate(keys):
        wanted.setdefault(key, []).append(i)
    blocks: dict[str, np.ndarray] = {}
    for shard in _shards(folder):
        matches = [(row, i) for row, key in enumerate(_keys_in(shard)) for i in wanted.pop(key, ())]
        if not matches:
            continue
        rows, places = (list(column) for column in zip(*matches, strict=True))
        for name in sorted(name.removesuffix(_SCALE) for name in shard if name.endswith(_SCALE)):
            if name not in blocks:
                blocks[name] = np.empty((len(keys), shard[name].shape[1]), dtype=np.float32)
            blocks[name][places] = shard[name][rows].float().mul_(shard[name + _SCALE][rows, None]).numpy()
    if wanted:
        raise DamagedFileError(f"{folder} has lost features of {len(wanted)} pairs. Rerun the same command.")
    return PairFeatures(blocks=blocks)


def _in_order(tokens: Sequence[TokenizedPair]) -> tuple[list[TokenizedPair], list[bool]]:
    """The pairs with their responses in an order that no label decides, and which of them are swapped for it."""
    is_swapped = [pair.chosen.tobytes() > pair.rejected.tobytes() for pair in tokens]
    ordered = [
        replace(pair, chosen=pair.rejected, rejected=pair.chosen) if swapped else pair
        for pair, swapped in zip(tokens, is_swapped, strict=True)
    ]
    return ordered, is_swapped


def _key(pair: TokenizedPair) -> bytes:
    """Digest of one pair's token ids; the lengths keep (a, bc) and (ab, c) apart."""
    digest = hashlib.blake2b(digest_size=_KEY_BYTES)
    digest.update(f"{len(pair.prompt)} {len(pair.chosen)} {len(pair.rejected)} ".encode())
    for ids in (pair.prompt, pair.chosen, pair.rejected):
        digest.update(ids.tobytes())
    return digest.digest()


def _load(folder: Path) -> dict[bytes, tuple[float, float]]:
    known: dict[bytes, tuple[float, float]] = {}
    for shard in _shards(folder):
        for key, (chosen, rejected) in zip(_keys_in(shard), shard["logps"].tolist(), strict=True):
            known[key] = (chosen, rejected)
    return known


def _keys(folder: Path) -> set[bytes]:
    return {key for shard in _shards(folder) for key in _keys_in(shard)}


def _keys_in(shard: dict[str, torch.Tensor]) -> list[bytes]:
    return [key.tobytes() for key in shard["keys"].numpy()]


def _shards(folder: Path) -> Iterator[dict[str, torch.Tensor]]:
    with _telling(folder):
        paths = sorted(folder.iterdir()) if folder.exists() else []
    for path in paths:
        if path.suffix == ".safetensors" and (shard := _read(path)) is not None:
            yield shard


@contextmanager
def _telling(path: Path) -> Iterator[None]:
    """What cannot be opened is a reason to end: nothing is known of what it holds, and scoring may take hours.

    Raises:
        RunError: In place of what the system says.
    """
    try:
        yield
    except FileNotFoundError:
        raise
    except (OSError, RuntimeError) as error:
        raise RunError(
            f"reference_cache_dir needs files that can be read; got {path}: {getattr(error, 'strerror', error)}. Mend "
            "that, or name another folder."
        ) from error


def _read(path: Path) -> dict[str, torch.Tensor] | None:
    """A shard; None if it is not what was written there. Its pairs are then scored again.

    Raises:
        RunError: If it cannot be opened, which says nothing of what it holds.
    """
    try:
        # Opened here first: safetensors calls whatever it cannot open a file that is not there.
        with _telling(path), path.open("rb"), safe_open(path, "pt") as file:
            shard = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
            written = (file.metadata() or {}).get("sha256")
    except FileNotFoundError:  # another process has just removed it
        return None
    except SafetensorError:
        shard, written = {}, None
    if shard and written in (None, hash_tensors(shard)):  # those of the first version say nothing of themselves
        return shard
    logger.warning("%s is damaged: it is removed, and its pairs are scored again.", path)
    path.unlink(missing_ok=True)
    return None


class _ShardWriter:
    """Collects finished rows and writes them as new shards every now and then."""

    def __init__(self, folder: Path, keys: list[bytes], known: Collection[bytes], reader: FeatureReader | None) -> None:
        self._folder, self._keys, self._known, self._reader = folder, keys, known, reader
        self._rows: Rows = []
        self._features: list[Features] = []
        self._last = time.monotonic()

    def add(self, rows: Rows, features: Features) -> None:
        self._rows += rows
        self._features.append(_rounded(features))
        if time.monotonic() - self._last > _SECONDS_PER_SHARD:
            self.flush()

    def flush(self) -> None:
        if self._reader is not None and self._rows:
            blocks = {name: torch.cat([one[name] for one in self._features]) for name in self._features[0]}
            self._write(self._folder / self._reader.name, self._rows, blocks)
        if rows := [row for row in self._rows if self._keys[row[0]] not in self._known]:
            self._write(self._folder, rows, {"logps": torch.tensor([row[1:3] for row in rows], dtype=torch.float32)})
        self._rows, self._features, self._last = [], [], time.monotonic()

    def _write(self, folder: Path, rows: Rows, values: dict[str, torch.Tensor]) -> None:
        keys = b"".join(self._keys[row[0]] for row in rows)
        shard = {"keys": torch.frombuffer(bytearray(keys), dtype=torch.uint8).reshape(-1, _KEY_BYTES), **values}
        with write_aside(folder / f"{uuid.uuid4().hex}.safetensors") as aside:
            save_file(shard, aside, metadata={"sha256": hash_tensors(shard)})


def _rounded(features: Features) -> Features:
    """In half precision, whose range hidden states of some models leave: as shares of the largest of each pair."""
    rounded: Features = {}
    for name, block in features.items():
        scale = block.abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
        rounded |= {name: (block / scale[:, None]).half(), name + _SCALE: scale}
    return rounded
