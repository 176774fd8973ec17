"""Held-out margins by fold models, which were not trained on the pairs that they score: the thorough scorer.

A model that was trained on a flipped label has learned part of it, so its margins make the flip rate look too low. Here
a model trained on all folds but one scores that one, at a third, two thirds and the end of its training.
"""

from dataclasses import replace

import numpy as np
import torch
from accelerate import PartialState
from safetensors.torch import load_file, save_file

from ropo.audit.options import AuditOptions
from ropo.audit.scorers import Question, Scores
from ropo.audit.weights import Floats, training_set
from ropo.losses import BoundLoss, bind_loss
from ropo.provenance import write_aside
from ropo.stages import Stages
from ropo.train.dataset import PairDataset
from ropo.train.sharding import let_go
from ropo.train.tracking import tracked
from ropo.train.trainer import ROPOTrainer

NUM_CHECKS = 3
_CHECKPOINTS = "fold_{}_checkpoints"

MAX_BETA = 0.1
"""Upper limit of beta. These models are thrown away, so they may move as far as they like; a strong pull to the
reference makes DPO fit single labels before what they have in common."""


def by_models(question: Question) -> Scores:
    """Train a model for each of `num_folds` folds on the others, from the initial one; the views are its checks.

    Folds are brought to one scale (the median size of their margins), since each model has a confidence of its own.
    """
    data, folds, sign = question.data, question.folds[0], question.labels.sign
    # What the data says, swapped where a person has said that it is wrong.
    weights = np.abs(sign) * data.weights
    training, fold_of_training = training_set(data, weights, sign < 0), folds[weights > 0]
    lengths = np.array([len(tokens) for tokens in data.tokens])
    views = np.empty((NUM_CHECKS, len(data)))
    sizes = []
    for fold in range(question.args.num_folds):
        scored = np.flatnonzero(folds == fold)
        scored = scored[np.argsort(-lengths[scored], kind="stable")]  # batches of similar length
        others = training.select(np.flatnonzero(fold_of_training != fold).tolist())
        margins = _fold_margins(question, fold, others, data.select(scored.tolist()))
        sizes.append(float(np.median(np.abs(margins[-1]))))
        views[:, scored] = margins / (sizes[-1] or 1.0)
    views *= float(np.median(sizes)) or 1.0  # of a typical fold
    row = question.row("models", views[-1], is_taken=True)
    return Scores(margins=views[-1], length=np.zeros(len(data)), views=views, rows=(row,))


def _fold_margins(question: Question, fold: int, training: PairDataset, scored: PairDataset) -> Floats:
    """Margins of the pairs of one fold at each check of a model trained on the others, shape (checks, scored)."""
    folder, name, args = question.folder, f"fold_{fold}.safetensors", question.args

    def make() -> None:
        eval_batch_size = max(args.per_device_eval_batch_size, args.per_device_train_batch_size)
        trainer = ROPOTrainer(
            question.model.load(is_trainable=True),
            args.of_stage(
                folder / _CHECKPOINTS.format(fold), per_device_eval_batch_size=eval_batch_size, evaluates=False
            ),
            train_dataset=training,
            eval_dataset=scored,
            processing_class=question.model.tokenizer,
            peft_config=question.model.adapter,
            loss=_loss(args),
        )
        trainer.check_evenly(NUM_CHECKS)
        trainer.train_or_resume([question.digest, fold], title=f"Audit: fold model {fold + 1} of {args.num_folds}")
        margins = torch.stack(trainer.check_margins)
        let_go(trainer.model_wrapped)
        if PartialState().is_main_process:
            with write_aside(folder / name) as path:
                save_file({"margins": margins}, path)

    log = tracked(args, folder / f"fold_{fold}")
    scratch = _CHECKPOINTS.format(fold)
    Stages(folder).run(f"fold {fold}", question.digest, [name], log(make), scratch=scratch)
    margins: Floats = load_file(folder / name)["margins"].double().numpy()
    return margins


def _loss(args: AuditOptions) -> BoundLoss:
    """DPO, whose margins are log-odds of the label up to a scale; robust losses sharpen them."""
    if not args.reads_reference:
        return replace(args.bound_loss(), sft_weight=0.0)
    return bind_loss("dpo", beta=min(args.beta, MAX_BETA), options={})
