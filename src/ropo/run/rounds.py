"""The loop: train, score, decide, resample, and again.

In: an initial model, pairs with reference log-probabilities, their audit, a `ROPOConfig`. Out: one folder per round.

::

    minimise over θ, w   Σ w_i ℓ(θ; s_i)   subject to   Σ w_i = N − ⌊ρN⌋,  0 ≤ w_i ≤ 1     (arXiv:2404.04102v2)

by alternation: w from held-out losses before the first training (`ropo.audit`), θ with w fixed (stage train), and new
pairs for the prompts that w discards (stage resample). Every stage reads files and writes files.

Where the paper leaves a choice open, it is ours and named here: the losses that w is decided by are held-out; ρ follows
the estimated flip rate unless it is given, and is 0 while the estimate's interval touches 0; the reference is the
initial model throughout; a round restarts from it unless told to carry on with the model of the round before. Without
folds (`num_folds` 0) w is decided by the losses of the model just trained, as in the paper, and ρ must be given.
"""

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from ropo.audit.weights import Labels, decide_all, resolve_rho, training_set
from ropo.data.tokenize import SampledIds, TokenizedPairs, encode_prompts, tokenize_pairs
from ropo.logps.dropout import turn_adapter_dropout_on
from ropo.logps.score import score_pairs
from ropo.noise.estimate import FlipEstimate, Obstacle, estimate_flips
from ropo.pairs import Pair, PairLogps
from ropo.processes import meet
from ropo.provenance import Json, read_json, write_aside, write_json
from ropo.resample.new_pairs import NewPairs, Scored, Scorer, Scoring, resample_pairs
from ropo.resample.select import SELECTION_RULES, Criteria
from ropo.run.setup import Decided, Setup
from ropo.sampling.engine import Sampling
from ropo.sampling.engines import Reach, open_engine
from ropo.sampling.generate import sample_responses
from ropo.stages import Stages
from ropo.train.dataset import PairDataset, batching
from ropo.train.objective import losses_of, margins_of
from ropo.train.sharding import let_go
from ropo.train.tracking import tracked
from ropo.train.trainer import ROPOTrainer

_CHECKPOINTS = "checkpoints"
_TRAIN_FILES = ["model", "training_log.json", "first_margins.safetensors"]
_DECIDE_FILES = ["flip_estimate.json", "flips.safetensors", "decisions.json"]
_HALFWAY = "model_halfway"  # stays in the last round, so that one more round can follow
_TIMES = re.compile("eval_(runtime|.*_per_second)")  # of the log: the same training leaves the same files
_RESAMPLE_FILES = ["resampled.jsonl", "resampled_reference.safetensors", "resampling.json"]


class Round:
    """One round in its folder.

    Args:
        number: From 0.
        setup: What all rounds have in common.
        data: All pairs of the data that fit, as the data labels them, then the trusted ones, then the resampled pairs
            that this round trains on, with reference log-probabilities.
    """

    def __init__(self, number: int, setup: Setup, data: PairDataset) -> None:
        self.number, self.setup, self.data = number, setup, data
        self.args, self.loss, self.model, self.audit = setup.args, setup.loss, setup.model, setup.audit
        self.folder = setup.folder / f"{number:02d}"
        self.num_data = sum(pair.origin == "data" for pair in data.pairs)
        self.num_read = sum(pair.origin != "resampled" for pair in data.pairs)
        self.is_last = number == setup.args.rounds - 1  # no training follows it, so it does not resample
        self.stages = Stages(self.folder)
        self.model_folder = self.folder / "model"
        self.trained = ""  # digest of what its model was made from, once it is

    def run(self, dataset: PairDataset, *, start: Path | None, digest: str) -> str:
        """Run every stage of the round.

        Args:
            dataset: What to train on: the kept and flipped pairs and the resampled ones, with weights.
            start: Folder of the model to carry on with; None starts from the initial model.
            digest: Of everything that made `dataset` and `start`.

        Returns:
            Digest of the round, for the next one.
        """
        inputs = [digest, self.loss.name]
        train = tracked(self.args, self.folder)(lambda: self._train(dataset, start, inputs))
        digest = self.trained = self.stages.run("train", inputs, self._train_files, train, scratch=_CHECKPOINTS)
        digest = self.stages.run("score", digest, ["scores.safetensors"], self._score)
        digest = self.stages.run("decide", digest, _DECIDE_FILES, self._decide)
        if not self.is_last:
            made_by = digest
            digest = self.stages.run("resample", digest, _RESAMPLE_FILES, lambda: self._resample(made_by))
            self._clear_up()
        return digest

    def margins(self) -> NDArray[np.float64]:
        """Margin of every pair of `data` under the trained model, shape (pairs,), nats."""
        return margins_of(self._scores(), self.data.reference, self.loss)

    def losses(self) -> NDArray[np.float64]:
        """Training loss of every pair of `data` at its margin, shape (pairs,)."""
        return losses_of(self.margins(), self.loss)

    def p_flip(self) -> NDArray[np.float64]:
        """Probability that the label is wrong, of every pair of `data`, shape (pairs,)."""
        return load_file(self.folder / "flips.safetensors")["p_flip"].double().numpy()

    def decided(self) -> Decided:
        """What `_decide` wrote; a dropped pair whose prompt has a new pair reads "resample"."""
        found = Decided.read(self.folder / "decisions.json")
        has_new = {pair.row for pair in self.new_pairs()}
        decisions = [
            "resample" if what == "drop" and pair.origin == "data" and pair.row in has_new else what
            for what, pair in zip(found.decisions, self.data.pairs, strict=True)
        ]
        return replace(found, decisions=decisions)

    def estimate(self) -> FlipEstimate:
        """The flip rate that this round has decided by."""
        return FlipEstimate.from_json(read_json(self.folder / "flip_estimate.json"))

    def new_pairs(self) -> list[Pair]:
        """Pairs that this round made; none in the last round."""
        return [pair for pair, _ in self._resampled()]

    def resampling(self) -> Json:
        """What is told of its resampling; nothing in the last round."""
        found: Json = {} if self.is_last else read_json(self.folder / "resampling.json")
        return found

    def _resampled(self) -> list[tuple[Pair, SampledIds | None]]:
        """New pairs with the tokens that were drawn, since their texts may give others."""
        if self.is_last:  # a longer run in this folder may have left some
            return []
        rows = [json.loads(line) for line in (self.folder / "resampled.jsonl").read_text("utf-8").split("\n") if line]
        drawn = [row.pop("sampled", None) for row in rows]
        return [
            (Pair(**row), one and SampledIds(name=one["name"], ids=tuple(one["ids"])))
            for row, one in zip(rows, drawn, strict=True)
        ]

    def _tokenize_new(self, new: Sequence[tuple[Pair, SampledIds | None]]) -> TokenizedPairs:
        pairs, drawn = zip(*new, strict=True)
        return tokenize_pairs(pairs, self.model.tokenizer, max_length=self.args.max_length, sampled=drawn)

    def next_datasets(self) -> tuple[PairDataset, PairDataset]:
        """What the next round scores and what it trains on.

        Returns:
            All pairs of the data and the resampled pairs that go on, as labelled; and the weighted training set, with
            dropped pairs left out and flipped ones swapped.
        """
        found = self.decided()
        stays = [i for i, what in enumerate(found.decisions) if i < self.num_read or what == "keep"]
        scored = self.data.select(stays)
        for place, i in enumerate(stays):
            if i >= self.num_read:  # of data pairs the weights are those that the data gives
                scored.weights[place] = found.weights[i]
        num_before = len(scored)
        if new := self._resampled():
            tokenized = self._tokenize_new(new)
            reference = load_file(self.folder / "resampled_reference.safetensors")
            scored = scored.joined(tokenized, PairLogps(**reference) if reference else None)
        weights = [found.weights[i] for i in stays] + scored.weights[num_before:]
        is_flipped = [found.decisions[i] == "flip" for i in stays] + [False] * (len(scored) - num_before)
        return scored, training_set(scored, np.array(weights), np.array(is_flipped))

    def _train(self, dataset: PairDataset, start: Path | None, made_from: Sequence[str]) -> None:
        args = self.args.of_stage(
            self.folder / _CHECKPOINTS,
            seed=self.args.seed + self.number,
            # As many steps as on all pairs of the data: what a filter takes away must not shorten the training as well.
            num_train_epochs=self.args.num_train_epochs * max(1.0, self._num_given / len(dataset)),
        )
        evaluation = self._evaluation()  # by the reference, which must be gone before the policy comes
        trainer = ROPOTrainer(
            self.model.load(start, is_trainable=True),
            args,
            train_dataset=dataset,
            eval_dataset=evaluation,
            processing_class=self.model.tokenizer,
            peft_config=self.model.adapter if start is None else None,
            loss=self.loss,
        )
        if start is not None and self.model.adapter is not None:  # as in the round that began it
            turn_adapter_dropout_on(trainer.model)
        if self._needs_halfway:
            trainer.save_halfway(self.folder / _HALFWAY)
        trainer.train_or_resume(made_from, title=f"Round {self.number}: training")
        trainer.save_whole(self.model_folder)
        first_margins = trainer.gather_first_margins()
        let_go(trainer.model_wrapped)
        if PartialState().is_main_process:
            with write_aside(self.folder / "first_margins.safetensors") as path:
                save_file({"margins": first_margins}, path)
            # Without its last line, which holds times: the same training leaves the same files.
            log = [line for line in trainer.state.log_history if "train_runtime" not in line]
            log = [{name: line[name] for name in sorted(line) if not _TIMES.fullmatch(name)} for line in log]
            write_json(self.folder / "training_log.json", log)

    def _evaluation(self) -> PairDataset | None:
        """Pairs that are scored while the model trains; nothing depends on them."""
        found = self.setup.evaluation
        if found is None or self.args.eval_strategy == "no":
            return None
        reference = self.setup.reference.logps(found.tokens) if self.loss.spec.needs_reference else None
        return PairDataset(found.pairs, found.tokens, reference=reference)

    def _clear_up(self) -> None:
        """Remove what only resampling reads; it is finished, so nobody will ask for it again."""
        if PartialState().is_main_process:
            shutil.rmtree(self.folder / _HALFWAY, ignore_errors=True)
        meet()

    @property
    def _num_given(self) -> int:
        """Pairs that there are to train on, but for those that the data gives no weight."""
        return sum(weight > 0 for weight in self.data.weights[: self.num_read])

    @property
    def _train_files(self) -> list[str]:
        is_read = self._needs_halfway and not self.stages.holds("resample", _RESAMPLE_FILES)
        return [*_TRAIN_FILES, *([_HALFWAY] if is_read else [])]

    @property
    def _needs_halfway(self) -> bool:
        return bool(self.args.num_candidates) and SELECTION_RULES[self.args.selection_rule].needs_views

    def _score(self) -> None:
        policy = self.model.load(self.model_folder)
        logps = score_pairs(
            policy, self.data.tokens, batching(self.args, self.model.tokenizer), title=f"Round {self.number}: scoring"
        )
        self._write_tensors("scores.safetensors", _tensors(logps))

    def _scores(self) -> PairLogps:
        return PairLogps(**load_file(self.folder / "scores.safetensors"))

    def _decide(self) -> None:
        margins, read = self.margins(), self.num_read
        if self.audit is None:
            clusters = Labels.of(self.data.pairs[:read]).clusters
            # A model agrees with labels that it has learned, so these margins only rank.
            estimate = replace(estimate_flips(margins[:read], clusters=clusters), obstacle=Obstacle.IN_SAMPLE)
            p_flip, rho = estimate.p_flip, resolve_rho(self.args.fixed_rho, estimate)
            found_all = decide_all(
                self.data.select(range(read)), margins[:read], p_flip, rho=rho, rule=self.args.decision_rule
            )
            decisions, weights = (values.tolist() for values in found_all)
        else:
            judged, p_flip = self.audit.judgement, self.audit.p_flip()
            estimate, rho, decisions, weights = judged.estimate, judged.rho, judged.decisions, judged.weights
        # Resampled pairs carry the model's own labels: one goes on, with a little less weight each time, as long as the
        # policy sides with it.
        resampled = margins[read:]
        faded = np.where(resampled > 0, self.args.resampled_decay * np.array(self.data.weights[read:]), 0.0)
        p_resampled = estimate.p_flip_at(resampled)
        self._write_tensors("flips.safetensors", {"p_flip": torch.from_numpy(np.concatenate([p_flip, p_resampled]))})
        decided = Decided(
            rho=rho,
            alpha=self.setup.alpha,
            beta=self.setup.beta,
            decisions=[*decisions, *np.where(resampled > 0, "keep", "drop").tolist()],
            weights=[*weights, *faded.tolist()],
        )
        if PartialState().is_main_process:
            margins_are = "in-sample" if estimate.obstacle is Obstacle.IN_SAMPLE else "held-out"
            write_json(self.folder / "flip_estimate.json", {**estimate.to_json(), "margins": margins_are})
            write_json(self.folder / "decisions.json", asdict(decided))

    def _resample(self, digest: str) -> None:
        found = Decided.read(self.folder / "decisions.json").decisions
        has_new = {self.data.pairs[i].row for i in range(self.num_read, len(found)) if found[i] == "keep"}
        lost = [
            i
            for i, pair in enumerate(self.data.pairs[: self.num_data])
            if found[i] == "drop" and pair.row not in has_new and pair.weight > 0 and pair.verdict != "drop"
        ]
        made = self._resampled_pairs(lost, digest) if lost and self.args.num_candidates else NewPairs()
        reference: dict[str, torch.Tensor] = {}
        new = list(zip(made.pairs, made.sampled, strict=True))
        if new and self.data.reference is not None:
            reference = _tensors(self.setup.reference.logps(self._tokenize_new(new).tokens))
        self._write_tensors("resampled_reference.safetensors", reference)
        if PartialState().is_main_process:
            with write_aside(self.folder / "resampled.jsonl") as path:
                rows = [{**asdict(pair), "sampled": drawn and asdict(drawn)} for pair, drawn in new]
                path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
            told = {"num_prompts": len(lost), "num_judged": made.num_judged, "refused": made.refused}
            write_json(self.folder / "resampling.json", told)

    def _resampled_pairs(self, lost: Sequence[int], digest: str) -> NewPairs:
        args = self.args
        found = Decided.read(self.folder / "decisions.json").decisions
        losses = self.losses()
        parents = [self.data.pairs[i] for i in lost]
        policy = partial(self.model.load, self.model_folder)  # not before it is needed: vLLM wants the memory
        reach = self._reach(policy if args.sample_from == "policy" else None)
        with open_engine(args.generation_engine, reach) as engine:
            samples = sample_responses(
                engine,
                self.model.tokenizer,
                encode_prompts([pair.prompt for pair in parents], self.model.tokenizer),
                Sampling(
                    num_candidates=args.num_candidates,
                    max_new_tokens=args.max_new_tokens,
                    temperature=args.temperature,
                    top_p=args.top_p,
                ),
                seed=args.seed + 1000 * self.number,
                folder=self.folder / "samples",
                model_digest=digest,
                title=f"Round {self.number}: sampling",
            )
        reference = self.data.reference
        scoring = Scoring(
            policy=Scored(parents=self._scores()[list(lost)], score=self._scorer(policy)),
            reference=None
            if reference is None
            else Scored(parents=reference[list(lost)], score=self.setup.reference.logps),
            earlier=self._earlier(lost),
            margins_of=lambda own, base: margins_of(own, base, self.loss),
        )
        criteria = Criteria(
            rule=args.selection_rule,
            loss_of=lambda margins: losses_of(margins, self.loss),
            kept_losses=losses[np.array(found) == "keep"],
            guards=args.guards,
            seed=args.seed + 1000 * self.number,
        )
        return resample_pairs(
            parents,
            samples,
            scoring=scoring,
            criteria=criteria,
            tokenizer=self.model.tokenizer,
            max_length=args.max_length,
            judge=self.setup.judge,
            weight=args.resampled_weight,
        )

    def _scorer(self, policy: Callable[[], PreTrainedModel]) -> Scorer:
        how, title = batching(self.args, self.model.tokenizer), f"Round {self.number}: scoring samples"
        return lambda tokens: score_pairs(policy(), tokens, how, title=title)

    def _earlier(self, lost: Sequence[int]) -> Scored | None:
        """The model half way through this round's training, for rules that compare with it."""
        if not self._needs_halfway:
            return None
        score = self._scorer(partial(self.model.load, self.folder / _HALFWAY))
        return Scored(parents=score([self.data.tokens[i] for i in lost]), score=score)

    def _reach(self, policy: Callable[[], PreTrainedModel] | None) -> Reach:
        """Where an engine finds the model that this round has trained, or the initial one if `policy` is None."""
        is_initial = policy is None
        adapter = self.model.start if is_initial else self.model_folder if self.model.peft_config is not None else None
        return Reach(
            tokenizer=self.model.tokenizer,
            load=policy or self.model.load,
            folder=self.model.base[0] if is_initial or adapter is not None else self.model_folder,
            adapter=adapter,
            load_options=self.model.base[1],
            use_bf16=self.args.bf16,
            url=self.args.generation_url,
            name=self.args.generation_model,
            api_key_env=self.args.generation_api_key_env,
        )

    def _write_tensors(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        if PartialState().is_main_process:
            with write_aside(self.folder / name) as path:
                save_file(dict(tensors), path)


def _tensors(logps: PairLogps) -> dict[str, torch.Tensor]:
    return {name: value for name, value in asdict(logps).items() if value is not None}


def run_all(
    data: PairDataset,
    setup: Setup,
    *,
    digest: str,
) -> list[Round]:
    """Run `setup.args.rounds` rounds, each in a folder of its own.

    Args:
        data: All pairs of the data that fit, then the trusted ones, with reference log-probabilities.
        setup: What they have in common.
        digest: Of everything that made `data` and the audit, and of the options.

    Returns:
        The rounds, in order; the last one's model is the result.
    """
    rounds: list[Round] = []
    if setup.audit is None:
        sign = Labels.of(data.pairs).sign  # verdicts are obeyed whoever judges the rest
        scored, trained_on = data, training_set(data, np.abs(sign) * data.weights, sign < 0)
    else:
        scored, trained_on = data, setup.audit.training()
    for number in range(setup.args.rounds):
        if rounds:
            scored, trained_on = rounds[-1].next_datasets()
        this = Round(number, setup, scored)
        start = rounds[-1].model_folder if rounds and setup.args.round_start == "carry_on" else None
        digest = this.run(trained_on, start=start, digest=digest)
        rounds.append(this)
    return rounds
