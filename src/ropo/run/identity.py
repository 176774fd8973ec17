"""What identifies a run: the folder that it claims is that of the same run, or of no other.

In: options, model, tokenizer, data. Out: the run's identity, as `ropo_config.json` holds it; or a refusal that names
what differs.
"""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import PreTrainedTokenizerBase
from transformers.utils.quantization_config import QuantizationConfigMixin

from ropo.audit.scorers import SCORED_FILES
from ropo.config import ROPOConfig
from ropo.data.template import date_of, writes_date
from ropo.models.digest import at_commit, model_digest
from ropo.models.source import Model
from ropo.processes import meet, on_main
from ropo.provenance import (
    DamagedFileError,
    Json,
    hash_file,
    hash_value,
    is_leftover,
    read_json,
    remove_leftovers,
    write_json,
)
from ropo.run.lock import LOCK_FILE
from ropo.train.checkpoints import MARKER

REFERENCE_CACHE = "reference_cache"
"""Where what the reference says is kept, if no other folder is named."""
INITIAL_MODEL = "initial_model"
"""Where a model that is given as an object is saved."""

# What a run writes before it claims its folder.
_MADE_BEFORE = (LOCK_FILE, INITIAL_MODEL, f"{INITIAL_MODEL}.json", REFERENCE_CACHE)

_IDENTITY_REMEDY = "It says which run this folder holds. Restore it from a copy, or use another output_dir."
# What stands in a run's identity by a digest, in words.
_DIGESTS = {
    "data": "pairs", "tokenizer": "tokenizer", "trusted": "trusted pairs", "verdicts": "review decisions",
    "judge": "judge_model",
}  # fmt: skip
# Options that say which pairs there are, and what judges which.
_SCORED_BY = ("scorer", "length_is_evidence", "num_folds", "seed", "max_length")


def identity_of(
    args: ROPOConfig,
    model: Model,
    *,
    digests: Mapping[str, str | None],
    date: str | None,
) -> Json:
    """Everything that decides what a run computes, as plain values of JSON.

    Args:
        args: Options.
        model: The initial one.
        digests: Of what was read: `data`, `trusted`, `verdicts`; None for what is not there.
        date: That a chat template writes; None for one that writes none.

    Returns:
        The identity.

    Raises:
        ValueError: If `audit_from` does not fit.
    """
    found = {
        "options": args.identity(),
        "model": [model.fingerprint(), _as_told(model.base[1])],
        "tokenizer": _fingerprint(model.tokenizer),
        **digests,
        "adapter": None if model.adapter is None else model.adapter.to_dict(),
        **({} if date is None else {"date": date}),
        **({"judge": _digest_of(str(args.judge_model))} if args.judge == "reward_model" else {}),
    }
    identity: Json = json.loads(json.dumps(found, sort_keys=True, default=_as_json))
    identity["audit_from"] = None if args.audit_from is None else _margins_of(Path(args.audit_from), identity)
    return identity


def _digest_of(judge_model: str) -> str:
    return model_digest(judge_model, at_commit(judge_model, {}))[:16]


def _fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Name of a tokenizer's content: how it cuts text, how a text begins and ends, and its chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    # What it was last called with stands in there as well.
    found = {} if backend is None else {**json.loads(backend.to_str()), "padding": None, "truncation": None}
    cut = found or sorted(tokenizer.get_vocab().items())
    return hash_value([cut, tokenizer.chat_template, tokenizer.bos_token, tokenizer.eos_token])[:16]


def _as_told(load_options: Mapping[str, Any]) -> dict[str, Any]:
    """What changes a model, however it is written: what is not set, or left at what it is anyway, is left out."""
    told = {name: value for name, value in load_options.items() if value is not None and value is not False}
    return {**told, "dtype": str(told.get("dtype")).removeprefix("torch.")}


def _as_json(value: Any) -> Any:
    """What JSON does not know; a set has no order of its own, and another one in every process."""
    if isinstance(value, QuantizationConfigMixin):
        return value.to_dict()
    return sorted(value) if isinstance(value, set | frozenset) else str(value)


def _margins_of(folder: Path, identity: Mapping[str, Any]) -> str:
    """Digest of the held-out margins of another run, which must be of this run's pairs.

    Raises:
        ValueError: If there is no finished audit, or it is of other pairs, by another model or scorer, or in other
            folds.
    """
    path = folder / "ropo_config.json"
    if not path.exists() or not (folder / "audit").exists():
        raise ValueError(f"audit_from needs the output folder of an audit; {folder} holds none.")
    there, here = (
        _scored_by(one)
        for one in (read_json(path, remedy="Restore it from a copy, or leave out audit_from."), identity)
    )
    if there != here:
        raise ValueError(
            f"audit_from needs an audit of the same pairs by the same model; {folder} has another one:\n"
            f"{_differences(there, here)}"
        )
    files = [folder / "audit" / name for name in SCORED_FILES]
    if not all(file.exists() for file in files):
        raise ValueError(f"audit_from needs a finished audit; that in {folder} was broken off. Finish it first.")
    return hash_value([hash_file(file) for file in files])[:16]


def _scored_by(identity: Mapping[str, Any]) -> Json:
    """What an audit's margins depend on."""
    return {
        **{name: identity[name] for name in ("tokenizer", "data", "trusted")},
        "model": identity["model"][0],
        **{name: identity["options"].get(name) for name in _SCORED_BY},
    }


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    lines = []
    for part in new:
        before, after = old.get(part), new[part]
        if isinstance(before, dict) and isinstance(after, dict):
            lines += [
                f"  {key}: {before.get(key)!r} there, {after.get(key)!r} now"
                for key in sorted({*before, *after})
                if before.get(key) != after.get(key)
            ]
            # Another version, of ours or of peft, may know an option less, which then was not set.
            unset = sorted(key for key in before.keys() ^ after.keys() if before.get(key) is after.get(key) is None)
            lines += [f"  options of another version: {', '.join(unset)}"] if unset else []
        elif before != after:
            is_digest = part in _DIGESTS
            shown = [f"content {one[:8]}" if is_digest and one else f"{one!r}" for one in (before, after)]
            lines.append(f"  {_DIGESTS.get(part, part)}: {shown[0]} there, {shown[1]} now")
    return "\n".join(lines)


def has_trained(folder: Path) -> bool:
    """Whether anything would be lost: before that, whoever mistyped an option may go on in the same folder."""
    kept = {"manifest.json", MARKER}  # of a stage, of a checkpoint
    inside = (os.walk(folder / part, followlinks=True) for part in ("audit", "rounds"))
    return any(not kept.isdisjoint(files) for part in inside for _, _, files in part)


def refuse_what_is_not_ours(folder: Path) -> None:
    """A folder of the model, of the data or of anything else is no place for a run.

    Raises:
        ValueError: If the folder holds other files and no run.
    """
    if not folder.exists() or (folder / "ropo_config.json").exists():
        return
    others = sorted(entry.name for entry in folder.iterdir() if not _is_ours(entry))
    if others:
        raise ValueError(
            f"output_dir needs a new folder or one of our runs; {folder} holds other files, like {others[0]}. Use "
            "another one."
        )


def _is_ours(entry: Path) -> bool:
    """Whether a run writes it before it claims its folder, so one that was killed early may have left it."""
    return entry.name in _MADE_BEFORE or is_leftover(entry)


def refuse_other_run(folder: Path, identity: Json) -> None:
    """Make sure that the output folder holds no other run that has trained.

    Raises:
        ValueError: If it does, or processes have read different things.
    """
    _check_same(identity)
    path = folder / "ropo_config.json"
    if path.exists() and has_trained(folder):
        old = read_json(path, remedy=_IDENTITY_REMEDY)
        if old != identity:
            # The user may have filled in review.csv there.
            has_audit = (folder / "review.csv").exists() and _scored_by(old) == _scored_by(identity)
            remedy = f" and --audit_from {folder}" if has_audit else ", or remove this one to start anew"
            began, now = (_revision(one) for one in (old, identity))
            if began not in (None, now):
                remedy += f". To go on with the model that it began with, add --model_revision {began}"
            raise ValueError(
                f"{folder} holds a run with other settings:\n{_differences(old, identity)}\n"
                f"Use another output_dir{remedy}."
            )


def _revision(identity: Mapping[str, Any]) -> str | None:
    found: str | None = identity.get("model", [None, {}])[1].get("revision")
    return found


def claim(folder: Path, identity: Json, *, cache: Path | None = None) -> None:
    """Make the output folder this run's, or make sure that it already is.

    Args:
        folder: The output folder.
        identity: See `identity_of`.
        cache: Of the reference, if it is not the usual one in the folder.

    Raises:
        ValueError: If another run is there, or processes have read different things.
    """
    refuse_other_run(folder, identity)
    meet()
    if PartialState().is_main_process:
        write_json(folder / "ropo_config.json", identity)
        remove_leftovers(folder, lock_file=LOCK_FILE, caches=[cache or folder / REFERENCE_CACHE])
    meet()


def _check_same(identity: Json) -> None:
    """Refuse processes that read another model or other data than the main one, from a folder of their own.

    Raises:
        ValueError: In all of them.
    """
    main = on_main(lambda: identity)
    own = [f"process {PartialState().process_index} on {platform.node()}", _differences(main, identity)]
    if others := [one for one in gather_object([own]) if one[1]]:
        name, differences = others[0]
        raise ValueError(
            f"Every process needs the same model and data; {name} differs from the main one (there):\n{differences}\n"
            "Name files that all machines share, or give each the same copy."
        )


def dated(tokenizer: PreTrainedTokenizerBase, folders: Sequence[Path]) -> str | None:
    """Give a chat template that writes the date that of the run in the first of the folders that holds one.

    Else tokens would change at midnight: those of a resumed run, or of one that goes on from an audit.

    Returns:
        The date, the same in all processes; None for a template without one.
    """
    if not writes_date(tokenizer):
        return None
    kept = next(filter(None, map(_kept_date, folders)), None)
    return date_of(tokenizer, on_main(lambda: date_of(tokenizer, kept)))


def _kept_date(folder: Path) -> str | None:
    """The date of the run in a folder; None if there is none."""
    path = folder / "ropo_config.json"
    try:
        date: str | None = read_json(path, remedy=_IDENTITY_REMEDY).get("date") if path.exists() else None
    except DamagedFileError:
        if has_trained(folder):
            raise
        return None
    return date
