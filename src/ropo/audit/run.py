"""The audit of a dataset: score, estimate, decide, write.

In: tokenized pairs with reference log-probabilities, a model, `AuditOptions`. Out: three files in a folder, what
`Audit` reads from them, and the weighted pairs to train on.

ROPO alternates between training on weighted pairs and weighing them by the trained model's losses. Here pairs are
weighed once, before the training, by margins that no label has had a say in itself.
"""

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property, partial
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from accelerate import PartialState
from numpy.typing import NDArray
from safetensors.torch import load_file

from ropo.audit.features import by_features
from ropo.audit.folds import folds_of
from ropo.audit.models import by_models
from ropo.audit.options import AuditOptions
from ropo.audit.scorers import MARGINS_FILE, SCORED_FILES, Question, Scorer, Scores
from ropo.audit.weights import (
    CHOICES,
    Choice,
    Floats,
    Labels,
    Why,
    decide_all,
    evidence_for,
    filter_pays,
    resolve_alpha,
    resolve_beta,
    resolve_rho,
    training_set,
)
from ropo.losses import LOSSES
from ropo.models.source import Model, Reference
from ropo.noise.calibrate import Calibration, calibrate
from ropo.noise.estimate import FlipEstimate, estimate_flips
from ropo.noise.shares import wilson_interval
from ropo.provenance import hash_tensors, read_json, write_json
from ropo.stages import Stages
from ropo.train.dataset import PairDataset

logger = logging.getLogger(__name__)

SCORERS: Mapping[str, Scorer] = MappingProxyType({"features": by_features, "models": by_models})
"""The scorers by name; what each is, `ropo.audit.options.SCORERS` says, where the option is checked."""

NUM_DEALS = 4
"""How often the pairs are dealt into folds: the mean of several margins depends less on the seed than one."""

_JUDGEMENT_FILE = "judgement.json"
_STAGE = "judge"


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """What follows from the margins.

    Attributes:
        estimate: Of the flip rate.
        with_length: The same if pairs were judged by the lengths of their responses, too; None where it is the same.
        rho: The share of pairs to filter out.
        alpha: Of the training that follows.
        beta: Of the same.
        noise_left: Expected share of wrong labels in what is trained on; 0 where it cannot be told.
        decisions: "keep", "drop" or "flip" for each pair.
        weights: Weight of each pair in training.
    """

    estimate: FlipEstimate
    with_length: FlipEstimate | None
    rho: Choice
    alpha: Choice
    beta: Choice
    noise_left: float
    decisions: list[str]
    weights: list[float]

    @classmethod
    def read(cls, path: Path) -> "Judgement":
        """What an audit has written."""
        found = read_json(path)
        choices = {name: Choice.from_json(found[name]) for name in CHOICES}
        rates = {name: found[name] and FlipEstimate.from_json(found[name]) for name in ("estimate", "with_length")}
        return cls(**{**found, **choices, **rates})

    def write(self, path: Path) -> None:
        """Write what `read` reads."""
        rates = {"estimate": self.estimate.to_json(), "with_length": self.with_length and self.with_length.to_json()}
        choices = {name: asdict(getattr(self, name)) for name in CHOICES}
        write_json(path, {one.name: getattr(self, one.name) for one in fields(self)} | choices | rates)


class Audit:
    """What is known about the labels, in a folder.

    Args:
        data: All pairs that fit, as the data labels them, then the trusted ones.
        args: Options of the run.
        folder: Where it writes.
        model: The initial one.
        reference: Reads what it says about pairs.
    """

    def __init__(
        self, data: PairDataset, args: AuditOptions, *, folder: Path, model: Model, reference: Reference
    ) -> None:
        self.data, self.args, self.folder = data, args, folder
        self.model, self.reference = model, reference
        self._labels = Labels.of(data.pairs)

    def run(self, digest: str) -> str:
        """Score every pair and decide about it.

        Args:
            digest: Of everything that made `data`, and of the options.

        Returns:
            Digest of the audit, for what is made from it.

        Raises:
            ValueError: If every label is known.
        """
        if not self._labels.is_open.any():
            raise ValueError("An audit needs a pair whose label nobody has judged; got none. Leave out some verdicts.")
        scores = self._score(digest)
        inputs = [digest, hash_tensors(scores.tensors())]
        files = [*SCORED_FILES, _JUDGEMENT_FILE]
        return Stages(self.folder).run(_STAGE, inputs, files, lambda: self._decide(scores))

    def _score(self, digest: str) -> Scores:
        """Held-out margins, made here or taken from another audit of the same pairs."""
        if self.args.audit_from is not None:
            there = Path(self.args.audit_from) / self.folder.name
            Stages(there).check(_STAGE, SCORED_FILES)
            return Scores.read(there)
        seeds = [self.args.seed + i for i in range(NUM_DEALS)]
        deals = folds_of(self.data.pairs, self.args.num_folds, seeds=seeds)
        question = Question(
            data=self.data,
            labels=self._labels,
            folds=np.array([[fold_of[pair.id] for pair in self.data.pairs] for fold_of in deals]),
            features=partial(self.reference.features, self.data.tokens),
            args=self.args,
            folder=self.folder / self.args.scorer,
            model=self.model,
            digest=digest,
        )
        return SCORERS[self.args.scorer](question)

    def _decide(self, scores: Scores) -> None:
        estimate, labels = self._estimate(scores.margins), self._labels
        # Of margins that know nothing, some comparisons favour a filter, which would drop every other pair.
        knows_labels = estimate.obstacle is None or not estimate.obstacle.hides_labels
        _doubt_trusted(labels, scores.margins, estimate)
        p_flip = estimate.p_flip_at(scores.margins)  # also of what is to be left out, which nobody has called wrong
        stays = labels.sign != 0
        p_flip[stays] = np.where(labels.sign[stays] < 0, 1.0, estimate.p_flip)
        evidence = evidence_for(scores.margins, p_flip, estimate)
        suspects = labels.is_open & (evidence < 0)
        filter_helps = knows_labels and filter_pays(scores.filter, p_flip=p_flip[suspects])
        rho = resolve_rho(
            self.args.fixed_rho,
            estimate,
            contradicted=float(suspects.sum() / labels.is_open.sum()) if filter_helps else 0.0,
            of_open=labels.share_of_open,
        )
        ranked = evidence if rho.why is Why.FILTER_HELPS else scores.margins
        decisions, weights = decide_all(self.data, ranked, p_flip, rho=rho, rule=self.args.decision_rule)
        p_wrong = np.where(decisions == "flip", 1.0 - p_flip, p_flip)  # of the labels that are trained on
        noise_left = float(np.sum(weights * p_wrong) / max(weights.sum(), 1e-12)) if estimate.is_informative else 0.0
        judgement = Judgement(
            estimate=estimate,
            with_length=self._estimate(scores.margins + scores.length) if scores.length.any() else None,
            rho=rho,
            alpha=resolve_alpha(self.args.fixed_alpha, is_audited=True),
            beta=self._beta(scores.margins, decisions, weights, knows_labels=knows_labels),
            noise_left=noise_left,
            decisions=decisions.tolist(),
            weights=weights.tolist(),
        )
        for name in CHOICES:
            choice = getattr(judgement, name)
            if name != "alpha" or "alpha" in LOSSES[self.args.loss].params:
                logger.info("%s = %.4g (%s).", name, choice.value, choice.why.replace("_", " "))
        if PartialState().is_main_process:
            is_open = torch.tensor([pair.verdict is None and pair.origin == "data" for pair in self.data.pairs])
            scores.write(self.folder, p_flip=torch.from_numpy(p_flip), is_open=is_open)
            judgement.write(self.folder / _JUDGEMENT_FILE)

    def _beta(self, margins: Floats, decisions: NDArray[np.str_], weights: Floats, *, knows_labels: bool) -> Choice:
        """The β of the training, by what the decisions add to the pull of the labels."""
        if not (knows_labels and self.args.adapt_beta and self.args.reads_reference):
            return Choice(value=self.args.beta, why=Why.GIVEN)
        before = self._labels.sign * [pair.weight for pair in self.data.pairs]
        after = np.where(decisions == "flip", -weights, weights)
        return resolve_beta(self.args.beta, margins, before=before, after=after, clusters=self._labels.clusters)

    def _estimate(self, margins: Floats) -> FlipEstimate:
        """The estimate from margins of the pairs that are not to be left out."""
        labels, stays = self._labels, np.flatnonzero(self._labels.sign != 0)
        tokens = [self.data.tokens[i] for i in stays]
        return estimate_flips(
            margins[stays],
            annotators=[self.data.pairs[i].annotator for i in stays],
            is_trusted=labels.is_trusted[stays],
            reviews=(labels.sign * labels.is_reviewed)[stays],
            is_vouched=labels.is_vouched[stays],
            clusters=labels.clusters[stays],
            covariate=np.log([len(one.chosen) + len(one.rejected) for one in tokens]),
        )

    @cached_property
    def judgement(self) -> Judgement:
        """What follows from the margins."""
        return Judgement.read(self.folder / _JUDGEMENT_FILE)

    @cached_property
    def scores(self) -> Scores:
        """Held-out margins, and how much each scorer knows."""
        return Scores.read(self.folder)

    def margins(self) -> Floats:
        """Held-out margin of every pair as the data labels it, shape (pairs,)."""
        return self.scores.margins

    def p_flip(self) -> Floats:
        """P(flipped) of every pair, shape (pairs,)."""
        values: Floats = load_file(self.folder / MARGINS_FILE)["p_flip"].numpy()
        return values

    @property
    def num_contradicted(self) -> int:
        """How many labels without a review decision are contradicted by what has not seen them."""
        return int((self.margins()[self._labels.is_open] < 0).sum())

    def calibration(self) -> Calibration | None:
        """What the decisions would do to labels that are flipped on purpose; None if all pairs are kept.

        None after a review, too: what is left of the labels is chosen by its margins, and holds fewer flips.
        """
        if self._labels.is_reviewed.any():
            return None
        is_open = np.flatnonzero(self._labels.is_open)
        return calibrate(
            self.margins()[is_open],
            self.judgement.estimate,
            np.array(self.judgement.decisions)[is_open] != "keep",
            annotators=[self.data.pairs[i].annotator for i in is_open],
            seed=self.args.seed,
            clusters=self._labels.clusters[is_open],
        )

    def training(self) -> PairDataset:
        """The weighted pairs to train on."""
        is_flipped: NDArray[np.bool_] = np.array(self.judgement.decisions) == "flip"
        return training_set(self.data, np.array(self.judgement.weights), is_flipped)

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds that each stage took."""
        stages = {**Stages(self.folder / self.args.scorer).seconds, **Stages(self.folder).seconds}
        return {f"audit {name}": value for name, value in stages.items()}


def _doubt_trusted(labels: Labels, margins: Floats, estimate: FlipEstimate) -> None:
    """Warn if labels may be taken for right only because as many of the trusted ones are contradicted."""
    contradicted = labels.sign * margins < 0
    trusted, others = contradicted[labels.is_trusted | labels.is_vouched], contradicted[labels.is_open]
    if len(trusted) and estimate.is_informative and estimate.low == 0.0 and others.mean() > estimate.high:
        share = float(trusted.mean())
        if wilson_interval(share, len(trusted))[1] >= others.mean():
            logger.warning(
                "Held-out margins contradict %.0f %% of the trusted labels and %.0f %% of all others. Either the data "
                "is as right as they are, or nobody has checked them: then leave them out.",
                100 * share,
                100 * others.mean(),
            )
