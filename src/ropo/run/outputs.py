"""The contract of the output folder: model with card, ledger, summary, report.

In: finished rounds, or a finished audit. Out: `ledger.parquet`, `summary.json`, `report.html` in `O/`; and `O/` as a
Hugging Face model folder, or `cleaned.jsonl`, `dropped.jsonl` and `review.csv`.
"""

import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from filecmp import cmp
from pathlib import Path

import numpy as np
import pyarrow as pa
from accelerate import PartialState

from ropo.audit import Audit
from ropo.data.review import read_verdicts, with_verdicts, write_review
from ropo.models.source import Model
from ropo.noise.review_order import has_suspects, review_order
from ropo.pairs import Pair
from ropo.processes import meet
from ropo.provenance import Json, read_json, saying_if_full, sync, sync_entry, write_aside, write_json
from ropo.report import write_report
from ropo.report.model_card import model_card
from ropo.run.evaluation import Evaluation
from ropo.run.ledger import ledger_table, write_ledger
from ropo.run.prepare import Prepared
from ropo.run.rounds import Round
from ropo.run.summary import audit_summary, train_summary

logger = logging.getLogger(__name__)

MERGED = "merged"
"""Where the whole model is in the output folder of an adapter, if it is asked for."""


def publish(rounds: Sequence[Round], made: Prepared, evaluation: Evaluation | None = None) -> None:
    """Write everything that a run promises, from what its rounds have on disk.

    Args:
        rounds: Finished rounds, in order.
        made: What the run was given.
        evaluation: What the models make of the evaluation set; None without.
    """
    folder, ledger = made.folder, pa.concat_tables([_ledger_of(this) for this in rounds])
    summary = train_summary(rounds, made, evaluation)
    if PartialState().is_main_process:
        new = [pair for this in rounds for pair in this.new_pairs()]
        log = [
            {"round": this.number, **line} for this in rounds for line in read_json(this.folder / "training_log.json")
        ]
        checks = None if rounds[0].audit is None else _by_row(rounds[0].audit)
        pairs = [*made.loaded.pairs, *new]
        with _published(folder) as aside:
            if _copy_model(rounds[-1].model_folder, aside, published=folder):
                shutil.rmtree(folder / MERGED, ignore_errors=True)  # it holds another adapter
            for path in made.model.processor_files():
                shutil.copyfile(path, aside / path.name)
            (aside / "README.md").write_text(_card(summary, rounds[-1].model_folder), encoding="utf-8")
            write_ledger(aside / "ledger.parquet", ledger)
            write_report(aside, ledger=ledger, summary=summary, pairs=pairs, training_log=log, checks=checks)
            write_json(aside / "summary.json", summary)
    meet()


def had_evaluation(folder: Path) -> bool:
    """Whether the results in an output folder are with an evaluation."""
    path = folder / "summary.json"
    return path.exists() and bool(read_json(path).get("evaluation"))


def publish_audit(audit: Audit, made: Prepared) -> None:
    """Write everything that an audit promises.

    Args:
        audit: A finished one.
        made: What it was given.
    """
    margins = audit.margins()
    ledger = ledger_table(
        audit.data.pairs,
        round_number=0,
        margins=margins,
        losses=np.logaddexp(0.0, -margins),
        weights=np.array(audit.judgement.weights, dtype=np.float64),
        p_flip=audit.p_flip(),
        decisions=audit.judgement.decisions,
        held_out_margins=margins,
    )
    folder, pairs, summary = made.folder, made.loaded.pairs, audit_summary(audit, made)
    if PartialState().is_main_process:
        _write_tables(folder, audit)
        with _published(folder) as aside:
            write_ledger(aside / "ledger.parquet", ledger)
            write_report(aside, ledger=ledger, summary=summary, pairs=pairs, training_log=[], checks=_by_row(audit))
            write_json(aside / "summary.json", summary)
    meet()


def _card(summary: Json, model: Path) -> str:
    return model_card(summary, is_adapter=(model / "adapter_config.json").exists())


def publish_merged(model: Model, folder: Path) -> None:
    """Write the trained model as one whole model to `merged/`, for programs that take no adapters.

    Args:
        model: What the run was given.
        folder: The output folder of a finished run, which holds the adapter.
    """
    if PartialState().is_main_process:
        with write_aside(folder / MERGED) as aside:
            model.merged(folder).save_pretrained(aside)
            model.tokenizer.save_pretrained(aside)
            for path in model.processor_files():
                shutil.copyfile(path, aside / path.name)
        logger.info("Adapter and model, merged: %s", folder / MERGED)
    meet()


@contextmanager
def _published(folder: Path) -> Iterator[Path]:
    """Give a folder to write results to, and rename them into place when all are whole: report and summary last.

    So whoever finds a summary finds the model, ledger and report that it is about.

    Args:
        folder: The output folder.

    Raises:
        DiskFullError: If there is no room; what was published before is untouched.
    """
    aside = folder / ".results.partial"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        with saying_if_full(folder):
            aside.mkdir()
            yield aside
            sync(aside)
            (folder / "summary.json").unlink(missing_ok=True)
            files = (path for path in aside.rglob("*") if path.is_file())
            for path in sorted(files, key=lambda path: (path.name == "summary.json", path.stem == "report", path)):
                place = folder / path.relative_to(aside)
                place.parent.mkdir(parents=True, exist_ok=True)
                path.replace(place)
            sync_entry(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _copy_model(model: Path, aside: Path, *, published: Path) -> bool:
    """Copy every file that is not published already: weights need not be on the disk a third time for a moment.

    Returns:
        Whether weights were among them.
    """
    has_weights = False
    for path in sorted(model.rglob("*")):
        name = path.relative_to(model)
        if path.is_file() and not ((published / name).is_file() and cmp(path, published / name, shallow=False)):
            (aside / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, aside / name)
            has_weights |= path.suffix == ".safetensors"
    return has_weights


def _ledger_of(this: Round) -> pa.Table:
    found = this.decided()
    return ledger_table(
        this.data.pairs,
        round_number=this.number,
        margins=this.margins(),
        losses=this.losses(),
        weights=np.array(found.weights, dtype=np.float64),
        p_flip=this.p_flip(),
        decisions=found.decisions,
        held_out_margins=None if this.audit is None else this.audit.margins(),
    )


def _by_row(audit: Audit) -> dict[int, list[float]]:
    """Views of the held-out margin, by row of the data."""
    columns = audit.scores.views.T.tolist()
    return {pair.row: column for pair, column in zip(audit.data.pairs, columns, strict=True) if pair.origin == "data"}


def _write_tables(folder: Path, audit: Audit) -> None:
    """`cleaned.jsonl` for any trainer, `dropped.jsonl` for the rest, `review.csv` for a person."""
    judged, p_flip, margins = audit.judgement, audit.p_flip(), audit.margins()
    is_informative = judged.estimate.is_informative
    shown = p_flip.tolist() if is_informative else [None] * len(p_flip)  # what cannot be told is left empty
    rows = list(zip(audit.data.pairs, shown, judged.decisions, judged.weights, strict=True))
    is_data = np.array([pair.origin == "data" for pair, *_ in rows])
    is_open = is_data & [pair.verdict is None for pair, *_ in rows]
    by_margin = not has_suspects(p_flip, is_open, is_informative=is_informative)
    order = [int(i) for i in review_order(p_flip, margins, by_margin=by_margin) if is_data[i]]
    in_order = [(rows[i][0], rows[i][1], margins[i], rows[i][2]) for i in order]
    rows = [row for row in rows if row[0].origin == "data"]
    for name, is_trained in (("cleaned.jsonl", True), ("dropped.jsonl", False)):
        with write_aside(folder / name) as aside:
            # Other trainers know no weights, and would train fully on what has none.
            lines = [_cleaned(*row) for row in rows if (row[2] != "drop" and row[3] > 0) == is_trained]
            aside.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    _write_review(folder / "review.csv", in_order)


def _write_review(path: Path, rows: Sequence[tuple[Pair, float | None, float, str]]) -> None:
    """The table for a person; what a person has filled in already stands in the new one again, or beside it."""
    pairs = [row[0] for row in rows]
    try:
        pairs = with_verdicts(pairs, read_verdicts(path) if path.exists() else {})
    except (ValueError, OSError) as error:
        names = ("review.before.csv", *(f"review.before.{number}.csv" for number in range(2, 1000)))
        kept = next(one for one in map(path.with_name, names) if not one.exists())  # each may hold a person's work
        path.replace(kept)
        logger.warning("%s\nIt could not be read, so it is now %s.", error, kept)
    with write_aside(path) as aside:
        write_review(
            aside,
            pairs,
            p_flip={pair.row: p for pair, p, _, _ in rows},
            margins={pair.row: margin for pair, _, margin, _ in rows},
            decisions={pair.row: what for pair, _, _, what in rows},
        )


def _cleaned(pair: Pair, p_flip: float | None, decision: str, weight: float) -> Json:
    """A row as any trainer reads it: a flipped pair is swapped already."""
    chosen, rejected = (pair.rejected, pair.chosen) if decision == "flip" else (pair.chosen, pair.rejected)
    return {
        "prompt": pair.prompt,
        "chosen": chosen,
        "rejected": rejected,
        **({} if pair.annotator is None else {"annotator": pair.annotator}),
        "weight": weight,
        "decision": decision,
        "p_flip": None if p_flip is None else round(float(p_flip), 6),
        "row": pair.row,
        **({} if pair.source is None else {"source": pair.source}),
        "pair_id": pair.id,
    }
