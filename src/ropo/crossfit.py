"""Margins from models that were not trained on the pair they judge.

In: pairs to judge and pairs to train on. Out: margins of every judged pair at several checks, one file per fold.

A model that was trained on a flipped label has learned part of it, so its margins make the flip rate look too low. Here
the pairs are dealt into folds; a model trained on all folds but one scores that one, at a third, two thirds and the end
of its training. K folds train on (K−1)·N pairs in all.
"""

import copy
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from numpy.typing import NDArray
from peft import PeftConfig
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

from ropo.config import ROPOConfig
from ropo.data.validate import text_id
from ropo.pair_dataset import PairDataset
from ropo.pairs import Pair
from ropo.policy import PolicySource
from ropo.provenance import write_aside
from ropo.stages import Stages
from ropo.tracking import tracked
from ropo.trainer import ROPOTrainer

NUM_CHECKS = 3
_CHECKPOINTS = "fold_{}_checkpoints"


def crossfit_margins(
    data: PairDataset,
    training: PairDataset,
    args: ROPOConfig,
    *,
    folder: Path,
    source: PolicySource,
    tokenizer: PreTrainedTokenizerBase,
    peft_config: PeftConfig | None,
    digest: str,
    num_scored: int | None = None,
    taken_from: Path | None = None,
) -> NDArray[np.float64]:
    """Held-out margins of every pair of `data`, from `args.num_folds` models that start from the initial one.

    Pairs with the same text (duplicates, contradictions, all but for case, white space and punctuation) share a fold:
    no model judges a pair whose texts it has seen.

    Folds are brought to one scale (the median size of their margins), since each model has a confidence of its own.

    Args:
        data: The pairs to judge, as labelled.
        training: The pairs to train on, with weights, turned round where they are known or thought to be wrong.
        args: Options; `num_folds` is 2 or more.
        folder: Where the folds are written.
        source: Loads the initial model.
        tokenizer: The model's.
        peft_config: For adapters.
        digest: Of everything that made `data`, `training` and `args`.
        num_scored: Only so many folds, the first ones; None for all.
        taken_from: Folder of the same folds of another run; what is there is copied instead of trained.

    Returns:
        Shape (checks, pairs), nats up to the common scale; the last check is the end of training. NaN in folds that
        are not scored.

    Raises:
        ValueError: If there are fewer different pairs than folds.
    """
    fold_of = folds_of(data.pairs, args.num_folds, seed=args.seed)
    held_out = np.array([fold_of[pair.id] for pair in data.pairs])
    learned_in = np.array([fold_of[pair.id] for pair in training.pairs])
    lengths = np.array([len(tokens) for tokens in data.tokens])
    margins = np.full((NUM_CHECKS, len(data)), np.nan)
    stages = Stages(folder)
    folds = range(args.num_folds if num_scored is None else num_scored)
    for fold in folds:
        judged = np.flatnonzero(held_out == fold)
        judged = judged[np.argsort(-lengths[judged], kind="stable")]  # batches of similar length
        name = f"fold_{fold}.safetensors"

        def make(fold: int = fold, judged: NDArray[np.int64] = judged, name: str = name) -> None:
            if taken_from is not None and (taken_from / name).exists():
                Stages(taken_from).check(f"fold {fold}", [name])
                if PartialState().is_main_process:
                    with write_aside(folder / name) as path:
                        shutil.copyfile(taken_from / name, path)
                return
            own = copy.copy(args)
            own.output_dir = str(folder / _CHECKPOINTS.format(fold))
            own.per_device_eval_batch_size = max(args.per_device_eval_batch_size, args.per_device_train_batch_size)
            trainer = ROPOTrainer(
                source.load(),
                own,
                train_dataset=training.select(np.flatnonzero(learned_in != fold).tolist()),
                eval_dataset=data.select(judged.tolist()),
                processing_class=tokenizer,
                peft_config=peft_config,
                num_checks=NUM_CHECKS,
            )
            trainer.train_or_resume([digest, fold])
            found = torch.stack(trainer.check_margins)
            if PartialState().is_main_process:
                with write_aside(folder / name) as path:
                    save_file({"margins": found}, path)

        log = tracked(args, folder / f"fold_{fold}")
        stages.run(f"fold {fold}", digest, [name], log(make), scratch=_CHECKPOINTS.format(fold))
        found = load_file(folder / name)["margins"].double().numpy()
        margins[:, judged] = found / (_median_size(found[-1]) or 1.0)
    return margins * _scale(folder, folds)


def _scale(folder: Path, folds: Iterable[int]) -> float:
    """The median over folds of the median size of a margin, so that the common scale is that of a typical fold."""
    sizes = [
        _median_size(load_file(folder / f"fold_{fold}.safetensors")["margins"][-1].double().numpy()) for fold in folds
    ]
    return float(np.median(sizes)) or 1.0


def _median_size(margins: NDArray[np.float64]) -> float:
    return float(np.median(np.abs(margins)))


def folds_of(pairs: Sequence[Pair], num_folds: int, *, seed: int) -> dict[str, int]:
    """Fold of every pair by its id; pairs with the same text but for punctuation share one, see `text_id`.

    Args:
        pairs: May repeat.
        num_folds: How many folds.
        seed: Same pairs and seed, same folds, in whatever order the pairs are.

    Returns:
        Fold by id, as evenly as can be.

    Raises:
        ValueError: If there are fewer different pairs than folds.
    """
    texts = {pair.id: text_id(pair, has_punctuation=False) for pair in pairs}
    names: dict[str, str] = {}  # a group is called by the first of its ids
    for id_, text in texts.items():
        names[text] = min(names.get(text, id_), id_)
    fold_of = _deal(list(names.values()), num_folds, seed=seed)
    return {id_: fold_of[names[text]] for id_, text in texts.items()}


def _deal(ids: list[str], num_folds: int, *, seed: int) -> dict[str, int]:
    """Fold of every id, as evenly as can be; ids may repeat."""
    names = sorted(set(ids))
    if len(names) < num_folds:
        raise ValueError(
            f"num_folds needs at least as many different pairs; got {num_folds} folds and {len(names)} pairs. "
            "Use fewer folds, or 0 for none."
        )
    order = np.random.default_rng(seed).permutation(len(names))
    return {name: int(place) % num_folds for name, place in zip(names, order, strict=True)}
