"""Tokenized pairs with what training needs beside the tokens, and the batches that are made of them.

In: pairs, their tokens, reference log-probabilities, weights. Out: `PairDataset`, which stages hand on to each other,
and the tensors of a batch, in pieces that a forward pass takes at once.
"""

import copy
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from ropo.data.problems import render
from ropo.data.tokenize import TokenizedPair, TokenizedPairs, tokenize_pairs
from ropo.data.validate import read_checked
from ropo.logps.batch import LAYOUTS, Batch, Batching, pad_token_id_of, split_by_tokens
from ropo.logps.cache import reference_logps
from ropo.models.fit import check_ids, ids_of
from ropo.pairs import Pair, PairLogps
from ropo.train.options import TrainOptions
from ropo.train.sharding import sharder

logger = logging.getLogger(__name__)


class PairDataset(Dataset[dict[str, Any]]):
    """Tokenized pairs with what training needs beside the tokens.

    Args:
        pairs: The pairs, for names in messages and for annotators.
        tokens: Their token ids, same order.
        reference: Log-probabilities under the reference, same order; None for losses without one.
        weights: Weight of each pair in the loss; default the pair's own.

    Raises:
        ValueError: If the lengths differ.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        tokens: Sequence[TokenizedPair],
        *,
        reference: PairLogps | None = None,
        weights: Sequence[float] | None = None,
    ) -> None:
        self.pairs, self.tokens, self.reference = list(pairs), list(tokens), reference
        self.weights = [pair.weight for pair in pairs] if weights is None else list(weights)
        self.annotators = sorted({pair.annotator or "" for pair in pairs})
        number_of = {name: i for i, name in enumerate(self.annotators)}
        self.annotator_of = [number_of[pair.annotator or ""] for pair in pairs]
        sizes = {len(pairs), len(tokens), len(self.weights), len(pairs) if reference is None else len(reference)}
        if len(sizes) != 1:
            raise ValueError(f"PairDataset needs one entry per pair everywhere; got lengths {sorted(sizes)}.")

    def __len__(self) -> int:
        return len(self.pairs)

    def select(self, places: Iterable[int]) -> "PairDataset":
        """The pairs at `places`, with their weights and reference log-probabilities."""
        places = list(places)
        return PairDataset(
            [self.pairs[i] for i in places],
            [self.tokens[i] for i in places],
            reference=None if self.reference is None else self.reference[places],
            weights=[self.weights[i] for i in places],
        )

    def with_annotators(self, names: Sequence[str]) -> "PairDataset":
        """The same pairs, their annotators numbered as in `names`; one who is not there gets the number after the last.

        Args:
            names: The `annotators` of another dataset.
        """
        number_of = {name: i for i, name in enumerate(names)}
        renumbered = copy.copy(self)
        renumbered.annotators = list(names)
        renumbered.annotator_of = [number_of.get(pair.annotator or "", len(names)) for pair in self.pairs]
        return renumbered

    def joined(self, new: TokenizedPairs, reference: PairLogps | None) -> "PairDataset":
        """This dataset followed by new pairs; `reference` is theirs."""
        if self.reference is not None and reference is not None:
            columns = ((getattr(self.reference, name), getattr(reference, name)) for name in ("chosen", "rejected"))
            chosen, rejected = (torch.cat(column) for column in columns)
            reference = PairLogps(chosen=chosen, rejected=rejected)
        return PairDataset(
            [*self.pairs, *new.pairs],
            [*self.tokens, *new.tokens],
            reference=reference,
            weights=[*self.weights, *(pair.weight for pair in new.pairs)],
        )

    def __getitem__(self, i: int) -> dict[str, Any]:
        # "input_ids" is the name under which `Trainer` looks for the length of an item when it groups by length.
        return {"input_ids": self.tokens[i], "position": i}


def batching(args: TrainOptions, tokenizer: PreTrainedTokenizerBase) -> Batching:
    """How pairs are put into batches for scoring."""
    return Batching(
        pad_token_id=pad_token_id_of(tokenizer),
        use_bf16=args.bf16,
        max_tokens=args.max_tokens_per_batch,
        shard=sharder(args),
    )


def prepare_datasets(
    train: Any,
    evaluation: Any,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    args: TrainOptions,
    *,
    needs_reference: bool,
) -> tuple[PairDataset | None, PairDataset | None]:
    """Whatever was given as data, as `PairDataset`s, with reference log-probabilities if they are needed.

    Args:
        train: Anything that `ropo.data.load.load_pairs` reads; a `PairDataset` or None is returned as it is.
        evaluation: The same.
        model: The reference.
        tokenizer: Of the model.
        args: Options; `max_samples` is about `train`.
        needs_reference: Whether the loss reads them.

    Raises:
        DataError: If a row cannot be read and `on_bad_rows` says so.
        ValueError: If both are None, no pair is left, the model lacks a token, or it would be scored under ZeRO-3.
    """
    train, evaluation = (
        _prepare(source, model, tokenizer, args, needs_reference=needs_reference, most=most)
        for source, most in ((train, args.max_samples), (evaluation, None))
    )
    if train is None and evaluation is None:
        raise ValueError("ROPOTrainer needs train_dataset or eval_dataset; got neither.")
    if train is not None and evaluation is not None:
        evaluation = evaluation.with_annotators(train.annotators)
    return train, evaluation


def _prepare(
    source: Any,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    args: TrainOptions,
    *,
    needs_reference: bool,
    most: int | None,
) -> PairDataset | None:
    if source is None or isinstance(source, PairDataset):
        return source
    _, pairs, problems = read_checked(source, on_bad_rows=args.on_bad_rows, max_samples=most, seed=args.seed)
    tokenized = tokenize_pairs(pairs, tokenizer, max_length=args.max_length)
    if problems := [*problems, *tokenized.problems]:
        logger.warning("Problems of the data:\n%s", render(problems))
    if not tokenized.pairs:
        raise ValueError(f"ROPOTrainer needs at least one pair; got none.\n{render(problems)}")
    name = model.config.name_or_path or type(model).__name__
    check_ids(model, tokenizer, ids_of(tokenized.pairs, tokenized.tokens), name_or_path=name)
    reference = None
    if needs_reference:
        if is_deepspeed_zero3_enabled():
            raise ValueError(
                "ROPOTrainer needs reference log-probabilities with its pairs under ZeRO-3, where a model is either "
                "scored or trained; got pairs alone. Use `ropo train` or run_rounds, or pass a PairDataset."
            )
        cache_dir = Path(args.reference_cache_dir or Path(str(args.output_dir)) / "reference_cache")
        reference = reference_logps(model, tokenized.tokens, batching(args, tokenizer), cache_dir=cache_dir)
    return PairDataset(tokenized.pairs, tokenized.tokens, reference=reference)


@dataclass(frozen=True, slots=True, kw_only=True)
class PairCollator:
    """Items of a `PairDataset` to the tensors of one batch, in pieces that a forward pass takes at once.

    Attributes:
        dataset: Where the items come from.
        layout: One of `ropo.logps.batch.LAYOUTS`.
        pad_token_id: For layouts that pad.
        max_tokens: Most unique tokens in a piece; None for no limit.
    """

    dataset: PairDataset
    layout: str
    pad_token_id: int
    max_tokens: int | None = None

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return `position` of all pairs and `pieces`; a piece is a batch of `ropo.logps.batch` with more beside it.

        What stands beside it: `position`, `weight`, `annotator` and `reference_*`, each (pairs,).
        """
        pieces = split_by_tokens([len(item["input_ids"]) for item in items], max_tokens=self.max_tokens)
        return {
            "position": torch.tensor([item["position"] for item in items]),  # first: where `Trainer` counts the pairs
            "pieces": [self._piece([items[i] for i in piece]) for piece in pieces],
        }

    def _piece(self, items: Sequence[Mapping[str, Any]]) -> Batch:
        dataset, where = self.dataset, [item["position"] for item in items]
        batch = LAYOUTS[self.layout]([item["input_ids"] for item in items], pad_token_id=self.pad_token_id)
        batch["position"] = torch.tensor(where)
        batch["weight"] = torch.tensor([dataset.weights[i] for i in where], dtype=torch.float32)
        batch["annotator"] = torch.tensor([dataset.annotator_of[i] for i in where])
        if dataset.reference is not None:
            batch["reference_chosen"] = dataset.reference.chosen[where]
            batch["reference_rejected"] = dataset.reference.rejected[where]
        return batch
