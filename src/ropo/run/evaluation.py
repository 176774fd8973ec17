"""Pairs that nothing is trained on, under the model of every round.

In: pairs of an evaluation set, finished rounds. Out: their margins, and the accuracy of each model on them.

The one idea: these pairs are for evaluation only. Nothing that a run does depends on them, so they may be given later,
to a run that is finished, and its models are then scored without training anything.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

from ropo.data.problems import render
from ropo.data.tokenize import TokenizedPairs, tokenize_pairs
from ropo.data.validate import DataError, read_checked, text_id
from ropo.logps.score import score_pairs
from ropo.noise.shares import cluster_weights, mean_of, wilson_interval
from ropo.pairs import Pair, PairLogps
from ropo.provenance import hash_value, write_aside
from ropo.run.inputs import DataSource
from ropo.run.rounds import Round
from ropo.stages import Stages
from ropo.train.dataset import batching
from ropo.train.metrics import of_margins
from ropo.train.objective import margins_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationSet:
    """Pairs to look at.

    Attributes:
        tokenized: Those that fit, without any that is trained on too.
        num_shared: How many were left out because they are.
    """

    tokenized: TokenizedPairs
    num_shared: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundEvaluation:
    """What the model of one round makes of the pairs.

    Attributes:
        round: Its number, from 0.
        accuracy: Share of pairs whose margin is above 0, copies of a pair counting as one.
        low: Lower end of its 90 % interval.
        high: Upper end.
        margin: Mean margin, nats.
        loss: Mean DPO loss, whatever was trained.
    """

    round: int
    accuracy: float
    low: float
    high: float
    margin: float
    loss: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What the models of a run make of pairs that nothing was trained on.

    Attributes:
        num_pairs: How many pairs.
        num_shared: How many were left out since they are trained on.
        rounds: One entry per round, in order.
    """

    num_pairs: int
    num_shared: int
    rounds: tuple[RoundEvaluation, ...]

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> "Evaluation":
        """Of what `asdict` gave."""
        return cls(**{**found, "rounds": tuple(RoundEvaluation(**one) for one in found["rounds"])})


def read_evaluation(
    source: DataSource,
    *,
    trained_on: Sequence[Pair],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    on_bad_rows: str = "refuse",
) -> EvaluationSet:
    """Read pairs to evaluate on, and leave out those whose text is trained on, see `text_id`.

    Args:
        source: The pairs to evaluate on.
        trained_on: The pairs of the run.
        tokenizer: The model's.
        max_length: As in training.
        on_bad_rows: See `read_checked`.

    Raises:
        DataError: If rows cannot be read, or no pair is left.
    """
    _, pairs, problems = read_checked(source.data, split=source.split, columns=source.columns, on_bad_rows=on_bad_rows)
    known = {text_id(pair) for pair in trained_on}
    unseen = [pair for pair in pairs if text_id(pair) not in known]
    tokenized = tokenize_pairs(unseen, tokenizer, max_length=max_length)
    # What a chat template does to all conversations is told of the training data.
    if found := [*problems, *(problem for problem in tokenized.problems if problem.row is not None)]:
        logger.warning("Evaluation set:\n%s", render(found))
    num_shared = len(pairs) - len(unseen)
    if num_shared:
        logger.warning("Left out of the evaluation set, since they are trained on, too: %d pairs.", num_shared)
    if not tokenized.pairs:
        why = f"\n{render(tokenized.problems)}" if tokenized.problems else ""
        raise DataError(
            f"An evaluation set needs pairs that nothing is trained on; got {len(pairs)}, of which {num_shared} are "
            f"trained on. Name another file, or another part of it (eval_dataset_split).{why}"
        )
    return EvaluationSet(tokenized=tokenized, num_shared=num_shared)


def evaluate(data: EvaluationSet, rounds: Sequence[Round], *, folder: Path) -> Evaluation:
    """Score the pairs under the model of every round; what was scored before is read from disk.

    Args:
        data: The pairs.
        rounds: Finished ones.
        folder: Where margins are written.

    Returns:
        What each model makes of the pairs.
    """
    stages, tokens = Stages(folder), data.tokenized.tokens
    weights = cluster_weights([text_id(pair) for pair in data.tokenized.pairs], len(tokens))
    pairs = hash_value([[part.tolist() for part in (one.prompt, one.chosen, one.rejected)] for one in tokens])
    args, model = rounds[0].args, rounds[0].model
    reference: PairLogps | None = None

    def make(this: Round, name: str) -> None:
        nonlocal reference
        if this.loss.spec.needs_reference and reference is None:
            reference = this.setup.reference.logps(tokens)
        policy, how = model.load(this.model_folder), batching(args, model.tokenizer)
        logps = score_pairs(policy, tokens, how, title=f"Round {this.number}: evaluation")
        if PartialState().is_main_process:
            with write_aside(folder / name) as path:
                save_file({"margins": torch.from_numpy(margins_of(logps, reference, this.loss))}, path)

    found = []
    for this in rounds:
        name = f"round_{this.number:02d}.safetensors"
        stages.run(f"round {this.number}", [this.trained, pairs], [name], lambda: make(this, name))  # noqa: B023 - called at once
        margins = load_file(folder / name)["margins"].double().numpy()
        found.append(_round_evaluation(this.number, margins, weights))
    return Evaluation(num_pairs=len(tokens), num_shared=data.num_shared, rounds=tuple(found))


def _round_evaluation(number: int, margins: NDArray[np.float64], weights: NDArray[np.float64]) -> RoundEvaluation:
    means = {name: float(values.mean()) for name, values in of_margins(torch.from_numpy(margins)).items()}
    accuracy = mean_of(margins > 0, weights)
    low, high = wilson_interval(accuracy, round(weights.sum()))
    return RoundEvaluation(
        round=number,
        accuracy=accuracy,
        low=low,
        high=high,
        margin=means["rewards/margins"],
        loss=means["loss/dpo"],
    )
