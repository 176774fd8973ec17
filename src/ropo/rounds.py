"""The loop: train, score, estimate, decide, resample, and again.

In: an initial model, pairs with reference log-probabilities, a `ROPOConfig`. Out: one folder per round.

::

    minimise over θ, w   Σ w_i ℓ(θ; s_i)   subject to   Σ w_i = N − ⌊ρN⌋,  0 ≤ w_i ≤ 1     (arXiv:2404.04102v2)

by alternation: θ with w fixed (stage train), w with θ fixed (stages score, estimate, decide), and new pairs for the
prompts that w discards (stage resample). Every stage reads files and writes files.

Where the paper leaves a choice open, it is ours and named here: ρ follows the estimated flip rate unless it is given,
and is 0 while the estimate's interval touches 0; the reference is the initial model throughout; a round carries on with
the model of the round before unless told to restart, since a filter keeps what the model finds easy, and a model that
starts anew on that never sees the rest (`benchmarks/rounds.py` measures both).
"""

import copy
import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from numpy.typing import NDArray
from peft import PeftConfig
from safetensors.torch import load_file, save_file
from scipy.special import expit, logit
from transformers import PreTrainedTokenizerBase

from ropo.config import ROPOConfig
from ropo.crossfit import crossfit_margins
from ropo.data.tokenize import TokenizedPair, encode_prompts, tokenize_pairs
from ropo.logps.score import score_pairs
from ropo.noise.decide import decide
from ropo.noise.estimate import estimate_flips
from ropo.pairs import Pair, PairLogps
from ropo.policy import PolicySource
from ropo.provenance import read_json, write_aside, write_json
from ropo.resample.generate import sample_responses
from ropo.resample.win_back import WonBack, win_back
from ropo.stages import Stages
from ropo.trainer import PairDataset, ROPOTrainer, batching, losses_of, margins_of

logger = logging.getLogger(__name__)

_TRAIN_FILES = ["model", "training_log.json", "first_margins.safetensors"]
_ESTIMATE_FILES = ["flip_estimate.json", "flips.safetensors"]
_RESAMPLE_FILES = ["resampled.jsonl", "resampled_reference.safetensors", "resampling.json"]

_IN_SAMPLE = (
    "The only margins at hand are of a model that was trained on these very labels, the wrong ones among them. "
    "With rounds of 2 or more, the rate is estimated on pairs that the judging model has not seen."
)


class Round:
    """One round in its folder.

    Args:
        number: From 0.
        folder: Where its stages write.
        args: Options of the run.
        source: Loads the initial model and trained ones.
        tokenizer: The model's.
        data: All pairs of the data that fit, as the data labels them, then the resampled pairs that this round trains
            on, with reference log-probabilities.
        reference_of: Reference log-probabilities of tokenized pairs; loads the reference only for pairs never seen.
        peft_config: For adapters.
    """

    def __init__(
        self,
        number: int,
        *,
        folder: Path,
        args: ROPOConfig,
        source: PolicySource,
        tokenizer: PreTrainedTokenizerBase,
        data: PairDataset,
        reference_of: Callable[[Sequence[TokenizedPair]], PairLogps],
        peft_config: PeftConfig | None,
    ) -> None:
        self.number, self.folder, self.args = number, folder, args
        self.source, self.tokenizer, self.data, self.peft_config = source, tokenizer, data, peft_config
        self.reference_of = reference_of
        self.num_data = sum(pair.origin == "data" for pair in data.pairs)
        self.stages = Stages(folder)
        self.model_folder = folder / "model"

    def run(
        self, dataset: PairDataset, *, start: Path | None, previous: Path | None, digest: str, is_last: bool
    ) -> str:
        """Run every stage of the round.

        Args:
            dataset: What to train on: the kept and flipped pairs and the resampled ones, with weights.
            start: Folder of the model to carry on with; None starts from the initial model.
            previous: Folder of the round before; None in the first.
            digest: Of everything that made `dataset` and `start`.
            is_last: No training follows the last round, so it neither estimates anew nor resamples.

        Returns:
            Digest of the round, for the next one.
        """
        digest = self.stages.run("train", [digest, self.args.loss], _TRAIN_FILES, lambda: self._train(dataset, start))
        digest = self.stages.run("score", digest, ["scores.safetensors"], self._score)
        if is_last and previous is not None:
            make = partial(self._repeat_estimate, previous)
        elif is_last or not self.args.num_folds:
            make = partial(self._estimate_in_sample, is_choice=not is_last)
        else:
            make = partial(self._estimate_held_out, dataset, digest)
        digest = self.stages.run("estimate", [digest, make.func.__name__], _ESTIMATE_FILES, make)
        digest = self.stages.run("decide", digest, ["decisions.json"], self._decide)
        if not is_last:
            digest = self.stages.run("resample", digest, _RESAMPLE_FILES, self._resample)
        return digest

    def margins(self) -> NDArray[np.float64]:
        """Margin of every pair of `data` under the trained model, shape (pairs,), nats."""
        return margins_of(self._scores(), self.data.reference, self.args)

    def losses(self) -> NDArray[np.float64]:
        """Training loss of every pair of `data` at its margin, shape (pairs,)."""
        return losses_of(self.margins(), self.args)

    def p_flip(self) -> NDArray[np.float64]:
        """Probability that the label is wrong, of every pair of `data`, shape (pairs,)."""
        return load_file(self.folder / "flips.safetensors")["p_flip"].double().numpy()

    def decisions(self) -> dict[str, Any]:
        """What `_decide` wrote: `rho`, `reason`, and per pair `decisions` and `weights`.

        A dropped pair whose prompt was won back reads "resample".
        """
        found: dict[str, Any] = read_json(self.folder / "decisions.json")
        won_back = {pair.row for pair in self.new_pairs()}
        found["decisions"] = [
            "resample" if what == "drop" and pair.origin == "data" and pair.row in won_back else what
            for what, pair in zip(found["decisions"], self.data.pairs, strict=True)
        ]
        return found

    def new_pairs(self) -> list[Pair]:
        """Pairs that this round made; none before its resampling or in the last round."""
        path = self.folder / "resampled.jsonl"
        return (
            [Pair(**json.loads(line)) for line in path.read_text("utf-8").split("\n") if line] if path.exists() else []
        )

    def next_datasets(self) -> tuple[PairDataset, PairDataset]:
        """What the next round scores and what it trains on.

        Returns:
            All pairs of the data and the resampled pairs that go on, as labelled; and the weighted training set, with
            dropped pairs left out and flipped ones turned round.
        """
        found = self.decisions()
        stays = [i for i, what in enumerate(found["decisions"]) if i < self.num_data or what == "keep"]
        scored = self.data.select(stays)
        if new := self.new_pairs():
            tokenized = tokenize_pairs(new, self.tokenizer, max_length=self.args.max_length)
            reference = load_file(self.folder / "resampled_reference.safetensors")
            scored = scored.joined(tokenized, PairLogps(**reference) if reference else None)
        weights = [found["weights"][i] for i in stays] + [1.0] * (len(scored) - len(stays))
        is_flipped = [found["decisions"][i] == "flip" for i in stays] + [False] * (len(scored) - len(stays))
        return scored, training_set(scored, weights, is_flipped)

    def _train(self, dataset: PairDataset, start: Path | None) -> None:
        args = copy.copy(self.args)
        args.output_dir = str(self.folder / "checkpoints")
        args.seed = self.args.seed + self.number
        trainer = ROPOTrainer(
            self.source.load(start, is_trainable=True),
            args,
            train_dataset=dataset,
            processing_class=self.tokenizer,
            peft_config=self.peft_config if start is None else None,
        )
        trainer.train_or_resume()
        trainer.save_whole(self.model_folder)
        first_margins = trainer.gather_first_margins()
        if PartialState().is_main_process:
            with write_aside(self.folder / "first_margins.safetensors") as path:
                save_file({"margins": first_margins}, path)
            write_json(self.folder / "training_log.json", trainer.state.log_history)
            shutil.rmtree(args.output_dir, ignore_errors=True)

    def _score(self) -> None:
        policy = self.source.load(self.model_folder)
        logps = score_pairs(
            policy, self.data.tokens, title=f"Round {self.number}: scoring", **batching(self.args, self.tokenizer)
        )
        self._write_tensors("scores.safetensors", _tensors(logps))

    def _scores(self) -> PairLogps:
        return PairLogps(**load_file(self.folder / "scores.safetensors"))

    def _estimate_held_out(self, training: PairDataset, digest: str) -> None:
        margins = crossfit_margins(
            self.data.select(range(self.num_data)),
            training,
            self.args,
            folder=self.folder / "folds",
            source=self.source,
            tokenizer=self.tokenizer,
            peft_config=self.peft_config,
            digest=digest,
        )
        found = estimate_flips(margins)
        self._write_estimate({**found.to_dict(), "margins": "held-out"}, found.p_flip)

    def _estimate_in_sample(self, *, is_choice: bool) -> None:
        found = estimate_flips(self.margins()[: self.num_data])
        told = {**found.to_dict(), "margins": "in-sample"}
        if not is_choice:
            told |= {"is_informative": False, "reason": _IN_SAMPLE}
        self._write_estimate(told, found.p_flip)

    def _repeat_estimate(self, previous: Path) -> None:
        p_flip = load_file(previous / "flips.safetensors")["p_flip"].numpy()
        self._write_estimate(read_json(previous / "flip_estimate.json"), p_flip[: self.num_data])

    def _write_estimate(self, estimate: dict[str, Any], p_flip: NDArray[np.float64]) -> None:
        # Resampled pairs carry the model's own labels, so they say nothing about the rate.
        p_resampled = expit(logit(estimate["rate"]) - estimate["scale"] * self.margins()[self.num_data :])
        self._write_tensors("flips.safetensors", {"p_flip": torch.from_numpy(np.concatenate([p_flip, p_resampled]))})
        if PartialState().is_main_process:
            write_json(self.folder / "flip_estimate.json", estimate)

    def _decide(self) -> None:
        rho, reason = resolve_rho(self.args.fixed_rho, read_json(self.folder / "flip_estimate.json"))
        logger.info("Round %d: rho = %.4f, since %s.", self.number, rho, reason)
        margins, p_flip, size = self.margins(), self.p_flip(), self.num_data
        decided = decide(margins[:size], p_flip[:size], rho=rho, rule=self.args.decision_rule)
        # A resampled pair goes on as long as the policy sides with it; the budget is about the data's labels.
        stays = margins[size:] > 0
        weights = np.concatenate([decided.weight, stays]) * [pair.weight for pair in self.data.pairs]
        decisions = [*decided.decision.tolist(), *np.where(stays, "keep", "drop").tolist()]
        found = {"rho": rho, "reason": reason, "decisions": decisions, "weights": weights.tolist()}
        if PartialState().is_main_process:
            write_json(self.folder / "decisions.json", found)

    def _resample(self) -> None:
        found = read_json(self.folder / "decisions.json")["decisions"]
        has_new = {self.data.pairs[i].row for i in range(self.num_data, len(found)) if found[i] == "keep"}
        lost = [i for i in range(self.num_data) if found[i] == "drop" and self.data.pairs[i].row not in has_new]
        won = (
            self._win_back(lost)
            if lost and self.args.num_candidates
            else WonBack(pairs=[], margins=np.zeros(0), refused={})
        )
        reference: dict[str, torch.Tensor] = {}
        if won.pairs and self.data.reference is not None:
            tokenized = tokenize_pairs(won.pairs, self.tokenizer, max_length=self.args.max_length)
            reference = _tensors(self.reference_of(tokenized.tokens))
        self._write_tensors("resampled_reference.safetensors", reference)
        if PartialState().is_main_process:
            with write_aside(self.folder / "resampled.jsonl") as path:
                rows = [json.dumps(asdict(pair), ensure_ascii=False) + "\n" for pair in won.pairs]
                path.write_text("".join(rows), encoding="utf-8")
            write_json(self.folder / "resampling.json", {"num_prompts": len(lost), "refused": won.refused})

    def _win_back(self, lost: Sequence[int]) -> WonBack:
        args = self.args
        found = read_json(self.folder / "decisions.json")["decisions"]
        losses = self.losses()
        parents = [self.data.pairs[i] for i in lost]
        policy = self.source.load(self.model_folder)
        samples = sample_responses(
            policy,
            self.tokenizer,
            encode_prompts([pair.prompt for pair in parents], self.tokenizer),
            num_candidates=args.num_candidates,
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            top_p=args.top_p,
            seed=args.seed + 1000 * self.number,
            title=f"Round {self.number}: sampling",
        )
        return win_back(
            parents,
            samples,
            self._scores()[list(lost)],
            None if self.data.reference is None else self.data.reference[list(lost)],
            score_policy=lambda tokens: score_pairs(
                policy, tokens, title=f"Round {self.number}: scoring samples", **batching(args, self.tokenizer)
            ),
            score_reference=self.reference_of if self.data.reference is not None else None,
            margins_of=lambda own, reference: margins_of(own, reference, args),
            loss_of=lambda margins: losses_of(margins, args),
            tokenizer=self.tokenizer,
            max_length=args.max_length,
            rule=args.selection_rule,
            worst_kept_loss=max(
                (loss for loss, what in zip(losses, found, strict=True) if what == "keep"), default=0.0
            ),
            max_abs_margin=args.max_abs_margin,
            max_length_ratio=args.max_length_ratio,
        )

    def _write_tensors(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        if PartialState().is_main_process:
            with write_aside(self.folder / name) as path:
                save_file(dict(tensors), path)


def _tensors(logps: PairLogps) -> dict[str, torch.Tensor]:
    return {name: value for name, value in asdict(logps).items() if value is not None}


def run_all(
    data: PairDataset,
    args: ROPOConfig,
    *,
    folder: Path,
    source: PolicySource,
    tokenizer: PreTrainedTokenizerBase,
    reference_of: Callable[[Sequence[TokenizedPair]], PairLogps],
    peft_config: PeftConfig | None,
    digest: str,
) -> list[Round]:
    """Run `args.rounds` rounds, each in a folder of its own.

    Args:
        data: All pairs of the data that fit, with reference log-probabilities.
        args: Options.
        folder: The rounds become `00`, `01`, ... in it.
        source: Loads the initial model and trained ones.
        tokenizer: The model's.
        reference_of: Reference log-probabilities of tokenized pairs.
        peft_config: For adapters.
        digest: Of everything that made `data`, and of the options.

    Returns:
        The rounds, in order; the last one's model is the result.
    """
    rounds: list[Round] = []
    scored, trained_on = data, training_set(data, data.weights, [False] * len(data))
    for number in range(args.rounds):
        if rounds:
            scored, trained_on = rounds[-1].next_datasets()
        this = Round(
            number,
            folder=folder / f"{number:02d}",
            args=args.for_round(number),
            source=source,
            tokenizer=tokenizer,
            data=scored,
            reference_of=reference_of,
            peft_config=peft_config,
        )
        previous = rounds[-1].folder if rounds else None
        start = rounds[-1].model_folder if rounds and args.round_start == "carry_on" else None
        is_last = number == args.rounds - 1
        digest = this.run(trained_on, start=start, previous=previous, digest=digest, is_last=is_last)
        rounds.append(this)
    return rounds


def resolve_rho(fixed: float | None, estimate: Mapping[str, Any]) -> tuple[float, str]:
    """The share of pairs to filter out, and the reason in words.

    Args:
        fixed: What the user gave, or None to follow the estimate.
        estimate: `FlipEstimate.to_dict()`.

    Returns:
        ρ in [0, 0.5] and a clause that completes "ρ is ..., since ...".

    Examples:
        >>> resolve_rho(None, {"is_informative": True, "rate": 0.01, "low": 0.0, "high": 0.02})[0]
        0.0
    """
    if fixed is not None:
        return fixed, "it was given"
    if not estimate["is_informative"]:
        return 0.0, f"the margins cannot tell how many labels are flipped: {estimate['reason'].rstrip('.')}"
    if estimate["low"] <= 0.0:
        return 0.0, "the labels may all be right: the interval of the estimate reaches down to 0"
    return min(float(estimate["rate"]), 0.5), "this is the estimated flip rate"


def training_set(data: PairDataset, weights: Sequence[float], is_flipped: Sequence[bool]) -> PairDataset:
    """What to train on: pairs with a positive weight, with chosen and rejected swapped where `is_flipped`.

    Args:
        data: Pairs as labelled.
        weights: One per pair, 0 leaves the pair out.
        is_flipped: One per pair.

    Returns:
        Weighted pairs in the order of `data`.

    Raises:
        ValueError: If no pair is left.
    """
    kept = [i for i, weight in enumerate(weights) if weight > 0]
    if not kept:
        raise ValueError("Training needs at least one pair with a weight above 0; got none. Lower rho.")
    chosen = data.select(kept)
    turned = [i for i, place in enumerate(kept) if is_flipped[place]]
    for i in turned:
        pair, ids = chosen.pairs[i], chosen.tokens[i]
        chosen.pairs[i] = replace(pair, chosen=pair.rejected, rejected=pair.chosen)
        chosen.tokens[i] = replace(ids, chosen=ids.rejected, rejected=ids.chosen)
    if chosen.reference is not None and turned:
        flipped = torch.tensor([is_flipped[place] for place in kept])
        old = chosen.reference
        chosen.reference = PairLogps(
            chosen=torch.where(flipped, old.rejected, old.chosen),
            rejected=torch.where(flipped, old.chosen, old.rejected),
        )
    chosen.weights = [float(weights[i]) for i in kept]
    return chosen
