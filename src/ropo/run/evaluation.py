"""Pairs that nothing is trained on, under the model of every round.

In: pairs of an evaluation set, finished rounds. Out: their margins, and how many of them each model tells right.

The one idea: it looks only. Nothing that a run does depends on these pairs, so they may be given later, to a run that
is finished, and its models are then scored without training anything.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
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
from ropo.data.tokenize import TokenizedPair, TokenizedPairs, tokenize_pairs
from ropo.data.validate import DataError, read_checked, text_id
from ropo.logps.score import score_pairs
from ropo.noise.clusters import cluster_weights, mean_of
from ropo.noise.shares import wilson_interval
from ropo.pairs import Pair, PairLogps
from ropo.provenance import hash_value, write_aside
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


def read_evaluation(
    source: Any,
    *,
    trained_on: Sequence[Pair],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    split: str = "train",
    columns: Mapping[str, str] | None = None,
    on_bad_rows: str = "refuse",
) -> EvaluationSet:
    """Read pairs to evaluate on, and leave out those whose text is trained on, see `text_id`.

    Args:
        source: Anything that `ropo.data.load.load_pairs` reads.
        trained_on: The pairs of the run.
        tokenizer: The model's.
        max_length: As in training.
        split: Of the source, where it has several.
        columns: See `load_pairs`.
        on_bad_rows: See `read_checked`.

    Raises:
        DataError: If rows cannot be read, or no pair is left.
    """
    _, pairs, problems = read_checked(source, split=split, columns=columns, on_bad_rows=on_bad_rows)
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


def evaluate(
    data: EvaluationSet,
    rounds: Sequence[Round],
    *,
    folder: Path,
    reference_of: Callable[[Sequence[TokenizedPair]], PairLogps],
) -> dict[str, Any]:
    """Score the evaluation set under the model of every round; what was scored before is read from disk.

    Args:
        data: The pairs.
        rounds: Finished rounds, in order.
        folder: Where margins are kept, as `round_NN.safetensors`.
        reference_of: Reference log-probabilities of tokenized pairs.

    Returns:
        `num_pairs`, `num_shared` and, for each of `rounds`, `accuracy` (share of pairs whose margin is above 0, with
        its 90 % interval `low`, `high`, copies of a pair counting as one), `margin` (mean, nats) and `loss` (mean DPO
        loss, whatever was trained).
    """
    stages, tokens = Stages(folder), data.tokenized.tokens
    weights = cluster_weights([text_id(pair) for pair in data.tokenized.pairs], len(tokens))
    pairs = hash_value([[part.tolist() for part in (one.prompt, one.chosen, one.rejected)] for one in tokens])
    args = rounds[0].args
    reference: PairLogps | None = None

    def make(this: Round, name: str) -> None:
        nonlocal reference
        if this.loss.spec.needs_reference and reference is None:
            reference = reference_of(tokens)
        policy = this.source.load(this.model_folder)
        logps = score_pairs(policy, tokens, batching(args, this.tokenizer), title=f"Round {this.number}: evaluation")
        if PartialState().is_main_process:
            with write_aside(folder / name) as path:
                save_file({"margins": torch.from_numpy(margins_of(logps, reference, this.loss))}, path)

    found = []
    for this in rounds:
        name = f"round_{this.number:02d}.safetensors"
        stages.run(f"round {this.number}", [this.trained, pairs], [name], lambda: make(this, name))  # noqa: B023 - called at once
        margins = load_file(folder / name)["margins"].double().numpy()
        found.append({"round": this.number, **_told(margins, weights)})
    return {"num_pairs": len(tokens), "num_shared": data.num_shared, "rounds": found}


def _told(margins: NDArray[np.float64], weights: NDArray[np.float64]) -> dict[str, float]:
    means = {name: float(values.mean()) for name, values in of_margins(torch.from_numpy(margins)).items()}
    accuracy = mean_of(margins > 0, weights)
    low, high = wilson_interval(accuracy, round(weights.sum()))
    return {
        "accuracy": accuracy,
        "low": low,
        "high": high,
        "margin": means["rewards/margins"],
        "loss": means["loss/dpo"],
    }
