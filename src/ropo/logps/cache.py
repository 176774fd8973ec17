"""Reference log-probabilities on disk, under a hash of everything that makes them.

In: the reference model, tokenized pairs, a folder. Out: `PairLogps`; the model runs only for pairs never seen.

A folder per reference (hash of its weights, its configuration and the precision) holds shards; a shard maps the
hash of a pair's token ids to its log-probabilities. So a changed learning rate or output folder costs nothing, a
changed template, truncation or weight is a miss, appended rows are the only ones computed, and a pass that is killed
goes on where its last shard ends.
"""

import hashlib
import json
import logging
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from ropo.data.tokenize import TokenizedPair
from ropo.logps.score import Rows, logps_of_rows, score_pairs
from ropo.pairs import PairLogps
from ropo.provenance import hash_tensors, hash_value, write_aside

logger = logging.getLogger(__name__)

_SECONDS_PER_SHARD = 30.0  # at most this much work is lost when a pass is killed
_KEY_BYTES = 16
# Where it was loaded from, by which version, and whether it keeps keys (which a trainer turns off) change no number.
_NOT_COMPUTED = ("_name_or_path", "transformers_version", "use_cache")


def reference_hash(model: PreTrainedModel, *, use_bf16: bool) -> str:
    """Name a reference by its weights, its configuration and the precision it is run in.

    Args:
        model: The reference.
        use_bf16: Whether it is run under bfloat16 autocast.

    Returns:
        16 hexadecimal digits.
    """
    config = json.loads(model.config.to_json_string(use_diff=False))
    config = {name: value for name, value in config.items() if name not in _NOT_COMPUTED}
    return hash_value([hash_tensors(model.state_dict()), config, use_bf16])[:16]


def reference_logps(
    model: PreTrainedModel,
    tokens: Sequence[TokenizedPair],
    *,
    cache_dir: Path,
    pad_token_id: int,
    use_bf16: bool = False,
    max_tokens: int | None = None,
) -> PairLogps:
    """Log-probabilities under the reference, from the cache where it has them.

    Args:
        model: The reference, on its device.
        tokens: The pairs.
        cache_dir: Folder of the cache; made when it is missing.
        pad_token_id: For the batches.
        use_bf16: Compute in bfloat16 by autocast.
        max_tokens: As for `score_pairs`.

    Returns:
        One value per pair, in the order of `tokens`.
    """
    state = PartialState()
    folder = cache_dir / reference_hash(model, use_bf16=use_bf16)
    keys = [_key(pair) for pair in tokens]
    known = _load(folder)
    state.wait_for_everyone()  # or who comes late would find shards of others, and share the work out differently
    missing = [i for i, key in enumerate(keys) if key not in known]
    logger.info("Reference log-probs: %d of %d pairs are cached in %s", len(keys) - len(missing), len(keys), folder)
    if missing:
        writer = _ShardWriter(folder, [keys[i] for i in missing])
        score_pairs(
            model,
            [tokens[i] for i in missing],
            pad_token_id=pad_token_id,
            title="Reference log-probs",
            use_bf16=use_bf16,
            max_tokens=max_tokens,
            on_batch=writer.add,
        )
        writer.flush()
        state.wait_for_everyone()
        known = _load(folder)
    return logps_of_rows(
        [
            (i, *known[key], len(pair.chosen), len(pair.rejected))
            for i, (key, pair) in enumerate(zip(keys, tokens, strict=True))
        ]
    )


def _key(pair: TokenizedPair) -> bytes:
    """Digest of one pair's token ids; the lengths keep (a, bc) and (ab, c) apart."""
    digest = hashlib.blake2b(digest_size=_KEY_BYTES)
    digest.update(f"{len(pair.prompt)} {len(pair.chosen)} {len(pair.rejected)} ".encode())
    for ids in (pair.prompt, pair.chosen, pair.rejected):
        digest.update(ids.tobytes())
    return digest.digest()


def _load(folder: Path) -> dict[bytes, tuple[float, float]]:
    known: dict[bytes, tuple[float, float]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        shard = _read(path)
        if shard is None:
            continue
        keys = shard["keys"].numpy()
        for key, (chosen, rejected) in zip(keys, shard["logps"].tolist(), strict=True):
            known[key.tobytes()] = (chosen, rejected)
    return known


def _read(path: Path) -> dict[str, torch.Tensor] | None:
    """A shard; None if it is not what was written there. Its pairs are then scored again."""
    try:
        with safe_open(path, "pt") as file:
            shard = {name: file.get_tensor(name) for name in ("keys", "logps")}
            written = (file.metadata() or {}).get("sha256")
    except (SafetensorError, FileNotFoundError):  # or another process has just removed it
        shard, written = {}, None
    if shard and written in (None, hash_tensors(shard)):  # those of the first version say nothing of themselves
        return shard
    logger.warning("%s is damaged: it is removed, and its pairs are scored again.", path)
    path.unlink(missing_ok=True)
    return None


class _ShardWriter:
    """Collects finished rows and writes them as a new shard every now and then."""

    def __init__(self, folder: Path, keys: list[bytes]) -> None:
        self._folder, self._keys = folder, keys
        self._rows: Rows = []
        self._last = time.monotonic()

    def add(self, rows: Rows) -> None:
        self._rows += rows
        if time.monotonic() - self._last > _SECONDS_PER_SHARD:
            self.flush()

    def flush(self) -> None:
        if self._rows:
            keys = b"".join(self._keys[row[0]] for row in self._rows)
            shard = {
                "keys": torch.frombuffer(bytearray(keys), dtype=torch.uint8).reshape(-1, _KEY_BYTES),
                "logps": torch.tensor([row[1:3] for row in self._rows], dtype=torch.float32),
            }
            with write_aside(self._folder / f"{uuid.uuid4().hex}.safetensors") as aside:
                save_file(shard, aside, metadata={"sha256": hash_tensors(shard)})
        self._rows, self._last = [], time.monotonic()
