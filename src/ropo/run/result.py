"""What an audit or a run has found, as objects: the output folder with names for what it holds.

In: a finished output folder. Out: `AuditResult` and `RunResult`.

The one idea: the folder is the result. What is returned is what `load` reads, so a run that ended last week is as good
as one that has just ended.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
from datasets import Dataset, concatenate_datasets
from numpy.typing import NDArray
from safetensors.numpy import load_file

from ropo.audit.features import KINDS
from ropo.audit.run import Judgement
from ropo.audit.scorers import MARGINS_FILE, ScorerRow, Scores
from ropo.audit.weights import Choice
from ropo.noise.estimate import FlipEstimate
from ropo.noise.review_order import has_suspects, review_order
from ropo.provenance import Json, read_json
from ropo.report.notebook import as_html, as_text, summary_rows
from ropo.run.evaluation import Evaluation
from ropo.run.ledger import read_ledger
from ropo.run.setup import Decided

Floats = NDArray[np.float64]

_TEXTS = ("prompt", "chosen", "rejected")


class _Folder:
    """What both results have: their folder and the files that every output folder holds."""

    folder: Path

    @cached_property
    def summary(self) -> Json:
        """What `summary.json` holds."""
        summary: Json = read_json(self.folder / "summary.json")
        return summary

    @cached_property
    def ledger(self) -> pa.Table:
        """One row per pair and round; what the columns are, `ropo.run.ledger.SCHEMA` says."""
        return read_ledger(self.folder / "ledger.parquet")

    @property
    def report(self) -> Path:
        """The page for a browser."""
        return self.folder / "report.html"

    def __repr__(self) -> str:
        return as_text(f"{type(self).__name__}({str(self.folder)!r})", self._rows())

    def _repr_html_(self) -> str:
        return as_html(type(self).__name__, self._rows())

    def _rows(self) -> list[tuple[str, str]]:
        return [*summary_rows(self.summary), ("report", str(self.report))]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class AuditResult(_Folder):
    """How many labels of a dataset are wrong, which, and what follows.

    Arrays have one entry per pair, in the order of `ledger`'s round 0: the data, then trusted pairs.

    Attributes:
        folder: The output folder.
        estimate: The flip rate; ask `is_informative` first.
        rho: Share of pairs to filter out, and why.
        alpha: Of ROPO's loss in the training that follows, and why.
        beta: Of the loss in the training that follows, and why.
        decisions: "keep", "drop" or "flip", shape (pairs,).
        weights: Weight in training, shape (pairs,).
        margins_nats: Held-out margin as the data labels the pair, shape (pairs,).
        p_flip: P(label is wrong), shape (pairs,).
        margins_by_scorer: Held-out margins by what gave them, on one scale, each (pairs,): kinds of features, or the
            checks of models in training.
        comparisons: How often each scorer agrees with labels that it has not seen.
        is_open: Whether nobody has judged the label, shape (pairs,).
    """

    folder: Path
    estimate: FlipEstimate
    rho: Choice
    alpha: Choice
    beta: Choice
    decisions: NDArray[np.str_]
    weights: Floats
    margins_nats: Floats
    p_flip: Floats
    margins_by_scorer: Mapping[str, Floats]
    comparisons: tuple[ScorerRow, ...]
    is_open: NDArray[np.bool_]

    @classmethod
    def load(cls, folder: str | Path) -> "AuditResult":
        """The audit in an output folder.

        Args:
            folder: Of `run_audit`, or of a `run_rounds` that audits.

        Raises:
            FileNotFoundError: If there is no finished one.
            DamagedFileError: If one of its files is damaged.
        """
        folder = _finished(folder, "AuditResult.load", needs="audit/judgement.json")
        judged, scores = Judgement.read(folder / "audit" / "judgement.json"), Scores.read(folder / "audit")
        tensors = load_file(folder / "audit" / MARGINS_FILE)
        is_of_models = any(row.name == "models" and row.is_taken for row in scores.rows)
        names = [f"check {i + 1}" for i in range(len(scores.views))] if is_of_models else KINDS
        return cls(
            folder=folder,
            estimate=judged.estimate,
            rho=judged.rho,
            alpha=judged.alpha,
            beta=judged.beta,
            decisions=np.array(judged.decisions),
            weights=np.array(judged.weights, dtype=np.float64),
            margins_nats=scores.margins,
            p_flip=tensors["p_flip"],
            margins_by_scorer=dict(zip(names, scores.views, strict=True)),
            comparisons=scores.rows,
            is_open=tensors.get("is_open", np.ones(len(scores.margins), dtype=bool)),
        )

    def suspects(self, num_pairs: int = 20) -> Dataset:
        """The pairs that a person should read first, the most suspect one in front, as `review.csv` has them.

        They come by P(flipped). Where that calls no pair flipped, those that held-out margins contradict come by
        margin, and `p_flip` is None.

        Args:
            num_pairs: At most so many.

        Returns:
            Columns `row`, `pair_id`, `p_flip`, `margin_nats`, `decision`, and, after `run_audit`, the texts `prompt`,
            `chosen`, `rejected` as the data labels them.
        """
        by_margin = not has_suspects(self.p_flip, self.is_open, is_informative=self.estimate.is_informative)
        order = review_order(self.p_flip, self.margins_nats, by_margin=by_margin)
        is_shown = self.is_open & (self.margins_nats < 0) if by_margin else self.is_open
        places = [int(i) for i in order if is_shown[i]][:num_pairs]
        names = self._first_round.take(places).select(["row", "pair_id"])
        texts = self._texts()
        rows = names["row"].to_pylist()
        columns = {
            "p_flip": pa.array([None if by_margin else float(self.p_flip[i]) for i in places], pa.float64()),
            "margin_nats": pa.array(self.margins_nats[places]),
            "decision": pa.array(self.decisions[places].tolist(), pa.string()),
        }
        for name, column in columns.items():
            names = names.append_column(name, column)
        if not texts or not rows:
            return Dataset(names)
        shown = _dataset([{name: texts[row][name] for name in _TEXTS} for row in rows])
        return concatenate_datasets([Dataset(names), shown], axis=1)

    def cleaned(self) -> Dataset:
        """The pairs to train on, as `cleaned.jsonl` holds them: flipped ones are swapped, dropped ones left out.

        Raises:
            FileNotFoundError: After `run_rounds`, which trains on them and writes none.
        """
        path = self.folder / "cleaned.jsonl"
        if not path.exists():
            raise FileNotFoundError(f"cleaned needs the output folder of run_audit; {self.folder} has no {path.name}.")
        return _dataset(_lines(path))

    @cached_property
    def _first_round(self) -> pa.Table:
        return self.ledger.filter(pa.compute.equal(self.ledger["round"], 0))

    def _texts(self) -> dict[int, Json]:
        """Texts as labelled, by row; none where the folder holds none."""
        paths = [self.folder / name for name in ("cleaned.jsonl", "dropped.jsonl")]
        found = {}
        for line in [line for path in paths if path.exists() for line in _lines(path)]:
            if line["decision"] == "flip":
                line["chosen"], line["rejected"] = line["rejected"], line["chosen"]
            found[line["row"]] = line
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundResult:
    """What one round has decided and made.

    Attributes:
        number: From 0.
        estimate: The flip rate that it went by.
        rho: Share of pairs to filter out, and why.
        alpha: Of ROPO's loss, and why.
        beta: Of the loss, and why.
        num_pairs: Pairs of the data.
        num_kept: Of these, kept.
        num_dropped: Of these, dropped; a new pair may have come in its place.
        num_flipped: Of these, flipped.
        num_resampled: New pairs that the round made.
        num_resampled_trained_on: New pairs of earlier rounds that it trained on.
    """

    number: int
    estimate: FlipEstimate
    rho: Choice
    alpha: Choice
    beta: Choice
    num_pairs: int
    num_kept: int
    num_dropped: int
    num_flipped: int
    num_resampled: int
    num_resampled_trained_on: int


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class RunResult(_Folder):
    """An aligned model, and how it came about.

    Attributes:
        folder: The output folder, which `from_pretrained` reads as a model.
        rounds: One entry per round, in order.
        evaluation: What the models make of the evaluation set; None without.
        audit: What was found about the labels; None where nothing was audited.
    """

    folder: Path
    rounds: tuple[RoundResult, ...]
    evaluation: Evaluation | None
    audit: AuditResult | None

    @classmethod
    def load(cls, folder: str | Path) -> "RunResult":
        """The run in an output folder.

        Args:
            folder: Of `run_rounds`.

        Raises:
            FileNotFoundError: If there is no finished one.
            DamagedFileError: If one of its files is damaged.
        """
        folder = _finished(folder, "RunResult.load", needs="rounds/00/decisions.json")
        summary = read_json(folder / "summary.json")
        if summary["task"] == "audit":
            raise FileNotFoundError(
                f"RunResult.load needs the results of a training; those in {folder} are of an audit that came after "
                "it. Repeat the command of the training, which writes its results again."
            )
        return cls(
            folder=folder,
            rounds=tuple(_round(folder, entry) for entry in summary["rounds"]),
            evaluation=summary["evaluation"] and Evaluation.from_json(summary["evaluation"]),
            audit=None if summary["num_contradicted"] is None else AuditResult.load(folder),
        )


def _round(folder: Path, entry: Json) -> RoundResult:
    here = folder / "rounds" / f"{entry['round']:02d}"
    decided = Decided.read(here / "decisions.json")
    counts: Json = {name: entry[name] for name in RoundResult.__dataclass_fields__ if name in entry}
    counts |= {"rho": decided.rho, "alpha": decided.alpha, "beta": decided.beta}
    estimate = FlipEstimate.from_json(read_json(here / "flip_estimate.json"))
    return RoundResult(number=entry["round"], estimate=estimate, **counts)


def _finished(folder: str | Path, taker: str, *, needs: str) -> Path:
    """The folder, if a run has ended there."""
    folder = Path(folder)
    for name in ("summary.json", needs):
        if not (folder / name).exists():
            raise FileNotFoundError(
                f"{taker} needs the output folder of a finished run; {folder} holds no {name}. Check the path, or run "
                "the command again."
            )
    return folder


def _dataset(lines: Sequence[Json]) -> Dataset:
    """Lines as they are: calls of tools keep their arguments, which differ from call to call."""
    return Dataset.from_list(list(lines), on_mixed_types="use_json")


def _lines(path: Path) -> list[Json]:
    return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]
