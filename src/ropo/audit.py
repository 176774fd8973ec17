"""The noise of a dataset: held-out margins, flip rate, P(flipped) and a decision for every pair.

In: tokenized pairs with reference log-probabilities, a model, a `ROPOConfig`. Out: a folder with one sub-folder per
pass, and the weighted pairs to train on.

The way: ROPO alternates between training on weighted pairs and weighing them by the trained model's losses. Here the
losses are held-out, so that no pair is judged by a model that was trained on it. The first pass trains on all labels
and gives the flip rate. A further pass trains on what the last one kept, with the robust loss, and judges all pairs
anew: its models have seen fewer wrong labels, so they tell the pairs apart better. Its margins alone would give too low
a rate, since labels that have been filtered agree with themselves. So it keeps the first pass's, unless both judges
together contradict more labels than the first one's interval holds: then what it took for its doubt is wrong labels.

Where the first pass finds nothing to filter though its judges contradict many labels, the filter is tried instead of
believed: are models better at labels they have not seen if the contradicted pairs are left out? Then those pairs stay
out, and the models that were trained without them are the second pass. If not, the robust loss is tried on all pairs:
it gives less weight to what it contradicts without leaving it out, and is taken if models surely lose little by it.
"""

import copy
import logging
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from numpy.typing import NDArray
from peft import PeftConfig
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

from ropo.config import LOSS_OPTIONS, ROPOConfig
from ropo.crossfit import crossfit_margins
from ropo.data.validate import text_id
from ropo.judge.verdicts import Judge
from ropo.noise.calibrate import Calibration, calibrate
from ropo.noise.estimate import MIN_PAIRS, estimate_flips
from ropo.noise.trial import Trial, compare
from ropo.pair_dataset import PairDataset
from ropo.policy import PolicySource, release_memory
from ropo.provenance import hash_value, read_json, write_aside, write_json
from ropo.stages import Stages
from ropo.weighing import (
    alpha_for,
    decide_all,
    known_labels,
    raise_by_agreement,
    resolve_alpha,
    resolve_rho,
    training_set,
)

logger = logging.getLogger(__name__)

Floats = NDArray[np.float64]

FIRST_PASS_BETA = 0.1
"""Upper limit of beta in the first pass. Its models judge and are thrown away, so they may move as far as they like; a
strong pull to the reference makes DPO fit single labels before what they have in common."""

MIN_CONTRADICTED, MAX_CONTRADICTED = 0.1, 0.4
"""Shares of contradicted labels between which a filter is tried where the rate says nothing. Below, there is little to
win; above, the judges are close to coins, and leaving out whatever they contradict leaves too little."""

MIN_ASKED = 500
"""Labels that must have been asked about before a trial ends: by chance alone the gain is off by a point or two there.
With fewer in all no loss is tried."""

MOST_LOST = 0.015
"""Share of held-out labels that the robust loss must surely not cost to be taken. Agreement cannot see what it wins
where a weak annotator has labelled; what it costs where labels are right and hard, two points on controlled sentiment,
it sees."""


class Audit:
    """What is known about the labels, in a folder.

    Args:
        data: All pairs that fit, as the data labels them, then the trusted ones.
        args: Options of the run.
        folder: Where the passes write.
        source: Loads the initial model.
        tokenizer: The model's.
        peft_config: For adapters.
        judge: Asked by rules that take one about what they cannot settle; None for nobody.
    """

    def __init__(
        self,
        data: PairDataset,
        args: ROPOConfig,
        *,
        folder: Path,
        source: PolicySource,
        tokenizer: PreTrainedTokenizerBase,
        peft_config: PeftConfig | None,
        judge: Judge | None = None,
    ) -> None:
        self.judge = judge
        self.data, self.args, self.folder = data, args, folder
        self.source, self.tokenizer, self.peft_config = source, tokenizer, peft_config
        self.num_passes = 1
        self.trial: dict[str, Any] | None = None
        self.loss_trial: dict[str, Any] | None = None
        self._sign, self._is_known = known_labels(data.pairs)
        self._texts = np.array([text_id(pair) for pair in data.pairs])  # copies of a pair are one piece of evidence

    def run(self, digest: str) -> str:
        """Run every pass that teaches something new.

        Args:
            digest: Of everything that made `data`, and of the options.

        Returns:
            Digest of the audit, for what is made from it.
        """
        training = self._all()
        for number in range(self.args.num_passes):
            args = _first_pass_options(self.args) if number == 0 else self.options()
            digest = _digest(digest, number, args)
            checks = self._crossfit(training, args, self._pass(number), digest)
            stages = Stages(self._pass(number))
            files = ["judgement.safetensors", "judgement.json"]
            digest = stages.run("judge", digest, files, partial(self._judge, number, checks))
            self.num_passes = number + 1
            if self.judgement()["rho"]:
                training = self.training()
                continue
            # Nothing was taken away, so another pass would train on the same pairs.
            self.trial = self._try_filter(digest) if number == 0 < self.args.num_passes - 1 else None
            if self.trial is None:
                break
            if not self.trial["helps"]:
                self.loss_trial = self._try_loss(digest)
                break
            training = self._without_contradicted()
        return digest

    def _crossfit(
        self, training: PairDataset, args: ROPOConfig, folder: Path, digest: str, num_scored: int | None = None
    ) -> Floats:
        """Held-out margins at each check by models trained on these pairs."""
        margins: Floats = crossfit_margins(
            self.data,
            training,
            args,
            folder=folder,
            source=self.source,
            tokenizer=self.tokenizer,
            peft_config=self.peft_config,
            digest=digest,
            num_scored=num_scored,
            taken_from=None if self.args.audit_from is None else self._elsewhere(folder),
        )
        return margins

    def _elsewhere(self, folder: Path) -> Path:
        """The same folder of the audit that margins are taken from."""
        return Path(str(self.args.audit_from)) / "audit" / folder.relative_to(self.folder)

    def _all(self) -> PairDataset:
        """What the data says, turned round where a person has said so."""
        return training_set(self.data, np.abs(self._sign) * self.data.weights, self._sign < 0)

    def _without_contradicted(self) -> PairDataset:
        """The same without what the first pass contradicts."""
        weights = np.abs(self._sign) * self.data.weights
        weights[self._doubtful & (self._first() < 0)] = 0.0
        return training_set(self.data, weights, self._sign < 0)

    def _try_filter(self, digest: str) -> dict[str, Any] | None:
        """Leave out what the first pass contradicts, and see whether models agree with more labels they have not seen.

        Fold by fold, for as long as there may be a gain. The models that were trained without the suspects are those
        of the second pass.

        Args:
            digest: Of the first pass.

        Returns:
            `Trial` as values, with `left_out`, the share of suspects, and `helps`; None if there is no cause to try.
        """
        left_out = float((self._first()[self._doubtful] < 0).mean()) if self._doubtful.any() else 0.0
        if self.args.fixed_rho is not None or self._num_doubtful < MIN_PAIRS:
            return None
        if not MIN_CONTRADICTED <= left_out <= MAX_CONTRADICTED:
            return None
        folder, args = self.folder / "trial", self.options()
        everything, others = self._all(), self._without_contradicted()
        # As many steps as on all pairs: what is left out must not shorten the training as well.
        longer = copy.copy(args)
        longer.num_train_epochs *= len(everything) / len(others)
        digests = [_digest(digest, name, args) for name in ("all", 1)]  # 1 is what `run` calls the second pass
        judge_all = partial(self._crossfit, everything, args, folder / "with_all", digests[0])
        judge_others = partial(self._crossfit, others, longer, self._pass(1), digests[1])

        def make() -> None:
            found = self._compare_by_folds(judge_others, judge_all, is_decided=lambda trial: trial.gain <= 0.0)
            if PartialState().is_main_process:
                write_json(folder / "filter.json", {"left_out": left_out, **asdict(found), "helps": found.helps})

        Stages(folder).run("filter", digests, ["filter.json"], make)
        told: dict[str, Any] = read_json(folder / "filter.json")
        logger.info(
            "Tried without the %.1f %% that the first pass contradicts: of labels that no model has seen %.1f %% are "
            "agreed with, %.1f %% with all pairs; %s.",
            100 * left_out, 100 * told["tried"], 100 * told["as_is"],
            "so they are left out" if told["helps"] else "no sure gain, so they stay",
        )  # fmt: skip
        return told

    def _try_loss(self, digest: str) -> dict[str, Any] | None:
        """Train on all pairs with the robust loss, and see how many labels that they have not seen models lose by it.

        Its α is what it would be if all contradicted labels were wrong. DPO's models are those of the filter's trial.
        An audit whose margins are taken from elsewhere takes this, too: of what is there nobody says by which loss.

        Args:
            digest: Of the first pass.

        Returns:
            `Trial` as values, with `alpha`, which is 0 if DPO stays, and `alpha_reason`; None if there is no choice.
        """
        weights = np.abs(self._sign) * self.data.weights
        contradicted = weights[self._doubtful & (self._first() < 0)].sum() / weights.sum()
        dpo, robust = self.options(), self.args.with_alpha(alpha_for(float(contradicted)))
        if self.args.fixed_alpha is not None or dpo.loss == robust.loss or self._num_doubtful < MIN_ASKED:
            return None
        folder, everything = self.folder / "trial", self._all()
        elsewhere = None if self.args.audit_from is None else self._elsewhere(folder) / "loss.json"
        if elsewhere is not None and not elsewhere.exists():
            return None
        digests = [_digest(digest, name, args) for name, args in (("all", dpo), ("robust", robust))]
        judge_dpo = partial(self._crossfit, everything, dpo, folder / "with_all", digests[0])
        judge_robust = partial(self._crossfit, everything, robust, folder / "robust", digests[1])

        def make() -> None:
            if elsewhere is not None:
                told = read_json(elsewhere)
            else:
                found = self._compare_by_folds(
                    judge_robust, judge_dpo, is_decided=lambda trial: trial.low > -MOST_LOST or trial.hurts
                )
                alpha = float(str(robust.alpha)) if found.low > -MOST_LOST else 0.0
                told = {"alpha": alpha, "alpha_reason": _reason(found, is_taken=alpha > 0), **asdict(found)}
            if PartialState().is_main_process:
                write_json(folder / "loss.json", told)

        Stages(folder).run("loss", digests, ["loss.json"], make)
        told: dict[str, Any] = read_json(folder / "loss.json")
        logger.info("Tried with the robust loss: alpha = %.2f, since %s.", told["alpha"], told["alpha_reason"])
        return told

    def _compare_by_folds(
        self,
        judge_tried: Callable[[int], Floats],
        judge_as_is: Callable[[int], Floats],
        *,
        is_decided: Callable[[Trial], bool],
    ) -> Trial:
        """Compare two trainings fold by fold, until enough labels were asked about and the matter is decided."""
        for num_scored in range(1, self.args.num_folds + 1):
            as_is, tried = judge_as_is(num_scored)[-1], judge_tried(num_scored)[-1]
            both = self._doubtful & ~np.isnan(as_is)
            found = compare(tried[both], as_is[both], clusters=self._texts[both])
            if found.num_pairs >= MIN_ASKED and is_decided(found):
                break
        return found

    def _first(self) -> Floats:
        """Held-out margins of the first pass, shape (pairs,)."""
        last: Floats = self._tensor("margins", 0)[-1]
        return last

    @property
    def _doubtful(self) -> NDArray[np.bool_]:
        """Which labels nobody has vouched for or judged, shape (pairs,)."""
        doubtful: NDArray[np.bool_] = (self._sign != 0) & ~self._is_known
        return doubtful

    @property
    def _num_doubtful(self) -> int:
        """How many different pairs have such labels."""
        return len(set(self._texts[self._doubtful].tolist()))

    def judgement(self) -> dict[str, Any]:
        """What the last pass wrote: the estimate, ρ, α and their reasons, and per pair `decisions` and `weights`.

        α and its reason are those of the loss's trial if there was one.
        """
        found: dict[str, Any] = read_json(self._pass(self.num_passes - 1) / "judgement.json")
        if self.loss_trial is not None:
            found |= {name: self.loss_trial[name] for name in ("alpha", "alpha_reason")}
        return found

    def estimate(self) -> dict[str, Any]:
        """`FlipEstimate.to_dict()` of the first pass, with the rate of both judges where that is higher."""
        found: dict[str, Any] = self.judgement()["estimate"]
        return found

    def options(self) -> ROPOConfig:
        """Options of the training that follows, with α as the noise that is left asks for; at 0 the loss is DPO."""
        return self.args.with_alpha(float(self.judgement()["alpha"]))

    def margins(self) -> Floats:
        """Held-out margin of every pair as the data labels it, shape (pairs,)."""
        last: Floats = self.checks()[-1]
        return last

    def checks(self) -> Floats:
        """Held-out margins at the checks of the last pass, shape (checks, pairs)."""
        return self._tensor("margins", self.num_passes - 1)

    def p_flip(self) -> Floats:
        """P(flipped) of every pair, shape (pairs,)."""
        return self._tensor("p_flip", self.num_passes - 1)

    @property
    def num_contradicted(self) -> int:
        """How many labels that nobody has judged are contradicted by models that have not seen them."""
        return int((self.margins()[self._doubtful] < 0).sum())

    def calibration(self) -> Calibration | None:
        """What became of labels turned round on purpose, at the first pass, whose margins no filter has touched.

        None where the rate was raised: ours are turned at random, and there the errors do not fall at random.
        """
        if self.estimate()["is_raised"]:
            return None
        margins, trusted = self._first()[self._doubtful], (self._sign * self._first())[self._is_known]
        texts = np.concatenate([self._texts[self._doubtful], self._texts[self._is_known]])
        found = estimate_flips(
            np.concatenate([margins, trusted]),
            is_trusted=np.arange(len(margins) + len(trusted)) >= len(margins),
            clusters=texts,
        )
        return calibrate(margins, found, trusted=trusted, seed=self.args.seed, clusters=texts)

    def training(self) -> PairDataset:
        """The weighted pairs to train on."""
        found = self.judgement()
        return training_set(
            self.data, np.array(found["weights"]), np.array([what == "flip" for what in found["decisions"]])
        )

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds that each stage took."""
        folders = {f"pass {number}": self._pass(number) for number in range(self.num_passes)}
        if self.trial is not None:
            folders |= {"pass 1": self._pass(1), "trial": self.folder / "trial" / "with_all"}
        if self.loss_trial is not None:
            folders["loss trial"] = self.folder / "trial" / "robust"
        return {
            f"{part} {name}": value
            for part, folder in folders.items()
            for name, value in Stages(folder).seconds.items()
        }

    def _pass(self, number: int) -> Path:
        return self.folder / f"pass_{number}"

    def _tensor(self, name: str, number: int) -> Floats:
        values: Floats = load_file(self._pass(number) / "judgement.safetensors")[name].double().numpy()
        return values

    def _judge(self, number: int, checks: Floats) -> None:
        estimate, p_flip = self._estimate(number, checks)
        rho, reason = resolve_rho(self.args.fixed_rho, estimate)
        release_memory()  # of the model trained last, with its gradients: a judge may load one of its own
        decisions, weights = decide_all(
            self.data,
            checks[-1],
            p_flip,
            rho=rho,
            rule=str(self.args.decision_rule),
            checks=checks,
            judge=self.judge,
        )
        # The flip probabilities of what is trained on: of flipped pairs it is that of their turned label.
        wrong = np.where(decisions == "flip", 1.0 - p_flip, p_flip)
        left = float(np.sum(weights * wrong) / max(weights.sum(), 1e-12)) if estimate["is_informative"] else 0.0
        alpha, alpha_reason = resolve_alpha(self.args.fixed_alpha, estimate, left)
        logger.info("Pass %d: rho = %.4f, since %s; alpha = %.2f, since %s.", number, rho, reason, alpha, alpha_reason)
        if PartialState().is_main_process:
            with write_aside(self._pass(number) / "judgement.safetensors") as path:
                save_file({"margins": torch.from_numpy(checks.copy()), "p_flip": torch.from_numpy(p_flip)}, path)
            write_json(
                self._pass(number) / "judgement.json",
                {
                    "estimate": estimate,
                    "rho": rho,
                    "rho_reason": reason,
                    "alpha": alpha,
                    "alpha_reason": alpha_reason,
                    "noise_left": left,
                    "decisions": decisions.tolist(),
                    "weights": weights.tolist(),
                },
            )

    def _estimate(self, number: int, checks: Floats) -> tuple[dict[str, Any], Floats]:
        """Of the first pass the estimate; of later ones P(flipped) by their own margins at the rate of both."""
        open_ = self._sign != 0
        sign, known = self._sign[open_], self._is_known[open_]
        told = None if number == 0 else self._with_agreement(checks[-1])
        names = [pair.annotator for pair, is_open in zip(self.data.pairs, open_, strict=True) if is_open]
        found = estimate_flips(
            sign * checks[-1, open_],
            annotators=names,
            is_trusted=known if known.any() else None,
            rate=None if told is None else told["rate"],
            clusters=self._texts[open_],
        )
        own = found.to_dict()
        told = {**own, "is_raised": False} if told is None else {**told, "scale": own["scale"], "tail": own["tail"]}
        p_flip = found.p_flip_at(checks[-1])  # of what is to be left out nobody has said that the label is wrong
        p_flip[open_] = np.where(sign < 0, 1.0, found.p_flip)
        return told, p_flip

    def _with_agreement(self, margins: Floats) -> dict[str, Any]:
        """The first pass's estimate, in the light of this pass's margins."""
        estimate = read_json(self._pass(0) / "judgement.json")["estimate"]
        first, second = self._first()[self._doubtful], margins[self._doubtful]
        pairs = [pair for pair, is_open in zip(self.data.pairs, self._doubtful, strict=True) if is_open]
        return raise_by_agreement(
            estimate,
            first,
            second,
            trial=self.trial,
            annotators=[pair.annotator for pair in pairs],
            clusters=self._texts[self._doubtful],
        )


def _reason(found: Trial, *, is_taken: bool) -> str:
    """Why the loss of a trial is taken or not, as a clause that completes "α is ..., since ..."."""
    agree = (
        f"models trained with the noise-tolerant loss agree with {100 * found.tried:.1f} % of the labels they have not "
        f"seen, those of DPO with {100 * found.as_is:.1f} %"
    )
    return f"{agree}, and it gives less weight to what it contradicts" if is_taken else agree


def _digest(before: str, name: str | int, args: ROPOConfig) -> str:
    """Of models trained with these options on what `before` stands for."""
    return hash_value([before, name, args.loss, args.beta, args.loss_options])


def _first_pass_options(args: ROPOConfig) -> ROPOConfig:
    """Options of models whose margins are log-odds of the label, up to one scale: that is what DPO fits.

    Robust losses sharpen margins, which reads as more flips than there are. Losses without a reference keep their own.
    """
    if not args.reads_reference:
        return args
    args = copy.copy(args)
    args.loss = "dpo"
    args.beta = min(args.beta, FIRST_PASS_BETA)
    for name in LOSS_OPTIONS:
        setattr(args, name, None)
    return args
