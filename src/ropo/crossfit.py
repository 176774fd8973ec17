"""Margins from models that were not trained on the pair they judge.

In: the pairs of the data and what a round trains on. Out: one margin per pair of the data, one file per fold on disk.

A model that was trained on a flipped label has learned part of it, so its margins make the flip rate look too low. Here
the pairs are dealt into folds; a model trained on all folds but one scores that one. K folds train on (K−1)·N pairs in
all: two folds cost about one more training.

DPO is the loss of these models whatever the run trains with. The estimate reads margins as log-odds of the label, up to
one scale, and that is what DPO fits; robust losses sharpen them, which reads as more flips than there are.
"""

import copy
import shutil
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from numpy.typing import NDArray
from peft import PeftConfig
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

from ropo.config import LOSS_OPTIONS, ROPOConfig
from ropo.logps.score import score_pairs
from ropo.policy import PolicySource
from ropo.provenance import write_aside
from ropo.stages import Stages
from ropo.trainer import PairDataset, ROPOTrainer, batching, margins_of


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
) -> NDArray[np.float64]:
    """Held-out margin of every pair of `data`, from `args.num_folds` models that start from the initial one.

    Pairs that share a row (a resampled pair and its parent) or a `pair_id` (duplicates, contradictions) share a fold.

    Args:
        data: The pairs to judge, as labelled.
        training: The pairs to train on, with weights: those of `data` that the last round kept, and resampled ones.
        args: Options; `num_folds` is 2 or more.
        folder: Where the folds are written.
        source: Loads the initial model.
        tokenizer: The model's.
        peft_config: For adapters.
        digest: Of everything that made `data` and `training`.

    Returns:
        Shape (pairs,), nats.
    """
    args = _dpo_options(args) if data.reference is not None else copy.copy(args)
    fold_of = _deal(data, args.num_folds, seed=args.seed)
    held_out = np.array([fold_of[pair.id] for pair in data.pairs])
    learned_in = np.array([fold_of.get(pair.id, fold_of.get(pair.row, -1)) for pair in training.pairs])
    margins = np.full(len(data), np.nan)
    stages = Stages(folder)
    for fold in range(args.num_folds):
        judged = np.flatnonzero(held_out == fold)
        name = f"fold_{fold}.safetensors"

        def make(fold: int = fold, judged: NDArray[np.int64] = judged, name: str = name) -> None:
            model_folder = folder / f"fold_{fold}_model"
            args.output_dir = str(folder / f"fold_{fold}_checkpoints")
            trainer = ROPOTrainer(
                source.load(),
                args,
                train_dataset=training.select(np.flatnonzero(learned_in != fold).tolist()),
                processing_class=tokenizer,
                peft_config=peft_config,
            )
            trainer.train_or_resume()
            trainer.save_whole(model_folder)
            del trainer  # its optimizer and, in sharded training, its pieces of the model
            unseen = data.select(judged.tolist())
            title = f"Fold {fold + 1} of {args.num_folds}: scoring"
            logps = score_pairs(source.load(model_folder), unseen.tokens, title=title, **batching(args, tokenizer))
            if PartialState().is_main_process:
                with write_aside(folder / name) as path:
                    save_file({"margins": torch.from_numpy(margins_of(logps, unseen.reference, args))}, path)
                shutil.rmtree(args.output_dir, ignore_errors=True)
                shutil.rmtree(model_folder)

        stages.run(f"fold {fold}", [digest, args.num_folds], [name], make)
        margins[judged] = load_file(folder / name)["margins"].numpy()
    return margins


def _dpo_options(args: ROPOConfig) -> ROPOConfig:
    """The same options with the DPO loss, which takes none of the others' own."""
    args = copy.copy(args)
    args.loss = "dpo"
    for name in LOSS_OPTIONS:
        setattr(args, name, None)
    return args


def _deal(data: PairDataset, num_folds: int, *, seed: int) -> dict[str | int, int]:
    """Fold of every `pair_id`, and of every row."""
    ids = sorted({pair.id for pair in data.pairs})
    order = np.random.default_rng(seed).permutation(len(ids))
    fold_of: dict[str | int, int] = {name: int(place) % num_folds for name, place in zip(ids, order, strict=True)}
    return fold_of | {pair.row: fold_of[pair.id] for pair in data.pairs}
