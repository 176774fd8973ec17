"""The contract of the output folder: model with card, ledger, summary, report.

In: finished rounds, or a finished audit. Out: `ledger.parquet`, `summary.json`, `report.html` in `O/`; and `O/` as a
Hugging Face model folder, or `cleaned.jsonl`, `dropped.jsonl` and `review.csv`.
"""

import json
import logging
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from filecmp import cmp
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from accelerate import PartialState

from ropo.audit import Audit
from ropo.audit.options import AuditOptions
from ropo.audit.weights import Choice
from ropo.data.load import Loaded
from ropo.data.problems import Problem, rows_left_out, summarise
from ropo.data.review import read_verdicts, with_verdicts, write_review
from ropo.losses import LOSSES, BoundLoss, gradient_weight
from ropo.noise.reading import calls_some, reading_order
from ropo.pairs import Pair
from ropo.provenance import (
    machine,
    read_json,
    saying_if_full,
    sync,
    sync_entry,
    versions,
    write_aside,
    write_json,
)
from ropo.report import write_report
from ropo.run.ledger import ledger_table, write_ledger
from ropo.run.rounds import Round
from ropo.stages import Stages

logger = logging.getLogger(__name__)

_CURVE_MARGINS = np.linspace(-6, 6, 121)


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """What a run was given.

    Attributes:
        loaded: The data as it was read.
        problems: All problems found in it.
        lengths: Tokens of prompt and longer response of each pair, before anything was cut.
        command: What the user typed.
    """

    loaded: Loaded
    problems: Sequence[Problem]
    lengths: Sequence[int]
    command: str


def publish(
    rounds: Sequence[Round], *, folder: Path, read: Read, evaluation: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Write everything that a run promises, from what its rounds have on disk.

    Args:
        rounds: Finished rounds, in order.
        folder: The output folder.
        read: What the run was given.
        evaluation: What `evaluation.evaluate` found; None without an evaluation set.

    Returns:
        The summary.
    """
    ledger = pa.concat_tables([_ledger_of(this) for this in rounds])
    summary = {**_summary(rounds, folder=folder, read=read), "evaluation": evaluation}
    if PartialState().is_main_process:
        new = [pair for this in rounds for pair in this.new_pairs()]
        log = [
            {"round": this.number, **line} for this in rounds for line in read_json(this.folder / "training_log.json")
        ]
        checks = None if rounds[0].audit is None else _by_row(rounds[0].audit)
        pairs = [*read.loaded.pairs, *new]
        with _published(folder) as aside:
            _copy_model(rounds[-1].model_folder, aside, published=folder)
            (aside / "README.md").write_text(_model_card(summary), encoding="utf-8")
            write_ledger(aside / "ledger.parquet", ledger)
            write_report(aside, ledger=ledger, summary=summary, pairs=pairs, training_log=log, checks=checks)
            write_json(aside / "summary.json", summary)
    PartialState().wait_for_everyone()
    return summary


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


def _copy_model(model: Path, aside: Path, *, published: Path) -> None:
    """Copy every file that is not published already: weights need not be on the disk a third time for a moment."""
    for path in sorted(model.rglob("*")):
        name = path.relative_to(model)
        if path.is_file() and not ((published / name).is_file() and cmp(path, published / name, shallow=False)):
            (aside / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, aside / name)


def _ledger_of(this: Round) -> pa.Table:
    found = this.decisions()
    return ledger_table(
        this.data.pairs,
        round_number=this.number,
        margins=this.margins(),
        losses=this.losses(),
        weights=np.array(found["weights"], dtype=np.float64),
        p_flip=this.p_flip(),
        decisions=found["decisions"],
        held_out_margins=None if this.audit is None else this.audit.margins(),
    )


def _round_summary(this: Round) -> dict[str, Any]:
    found, estimate = this.decisions(), read_json(this.folder / "flip_estimate.json")
    counts = Counter(found["decisions"][: this.num_data])
    told = read_json(path) if (path := this.folder / "resampling.json").exists() else {}
    return {
        "round": this.number,
        "flip_rate": _flip_rate(estimate),
        "is_informative": estimate["is_informative"],
        "obstacle": estimate["obstacle"],
        "reason": estimate["reason"],
        **_chosen({name: Choice(**found[name]) for name in ("rho", "alpha")}),
        "num_pairs": this.num_data,
        "num_kept": counts["keep"],
        "num_dropped": counts["drop"] + counts["resample"],
        "num_flipped": counts["flip"],
        "num_resampled": len(this.new_pairs()),
        "num_resampled_trained_on": len(this.data) - this.num_read,
        **{name: told.get(name, default) for name, default in (("num_judged", 0), ("refused", {}))},
    }


def _chosen(choices: Mapping[str, Choice]) -> dict[str, Any]:
    """Each value, and under `..._why` why it is so."""
    return {key: value for name, one in choices.items() for key, value in ((name, one.value), (f"{name}_why", one.why))}


def _flip_rate(estimate: Mapping[str, Any]) -> dict[str, Any]:
    """The rate with its interval.

    No rate where it cannot be told, and no interval where the margins are those of a model that has seen the labels:
    nobody should read 0 % there.
    """
    is_held_out = estimate.get("margins") != "in-sample"
    return {
        "estimate": estimate["rate"] if estimate["is_informative"] else None,
        "low": estimate["low"] if is_held_out else None,
        "high": estimate["high"] if is_held_out else None,
    }


def _summary(rounds: Sequence[Round], *, folder: Path, read: Read) -> dict[str, Any]:
    args, audit = rounds[0].args, rounds[0].audit
    per_round = [_round_summary(this) for this in rounds]
    final = per_round[-1]
    loss = rounds[0].loss
    has_curve = not loss.spec.needs_whole_batch and "moments" not in loss.spec.inputs
    curve = gradient_weight(loss, torch.from_numpy(_CURVE_MARGINS)) if has_curve else None
    seconds = _audit_seconds(folder, audit)
    for this in rounds:
        seconds |= {f"round {this.number} {name}": value for name, value in this.stages.seconds.items()}
    names = ("flip_rate", "is_informative", "obstacle", "reason", "rho", "rho_why", "alpha", "alpha_why")
    return {
        "task": "train",
        **{name: final[name] for name in (*names, "num_pairs", "num_kept", "num_dropped", "num_flipped")},
        "num_resampled": final["num_resampled_trained_on"],
        **_about_labels(audit, num_trusted=rounds[0].num_read - rounds[0].num_data),
        **_about_run(args, read, seconds, loss),
        "rounds": per_round,
        "model": rounds[0].source.name_or_path,
        "model_fingerprint": _fingerprint(folder),
        "weight_curve": None
        if curve is None
        else {"loss": loss.name, "margin": _CURVE_MARGINS.tolist(), "weight": curve.tolist()},
    }


def _audit_seconds(folder: Path, audit: Audit | None) -> dict[str, float]:
    return {**Stages(folder / "reference").seconds, **(audit.seconds if audit else {})}


def _fingerprint(folder: Path) -> str:
    """Of the initial model; the run has written it before any work."""
    fingerprint: str = read_json(folder / "ropo_config.json")["model"][0]
    return fingerprint


def _about_run(
    args: AuditOptions, read: Read, seconds: dict[str, float], loss: BoundLoss | None = None
) -> dict[str, Any]:
    """What was read, how long it took, and the options: with the loss that was trained, where one was."""
    problems = summarise(read.problems)
    config = {name: value for name, value in args.to_dict().items() if not name.endswith("_token")}
    if loss is not None:
        config |= {"loss": loss.name, "alpha": str(loss.options["alpha"]) if "alpha" in loss.options else None}
    return {
        "num_rows": read.loaded.num_rows,
        "num_left_out": len(rows_left_out(read.problems) - {None}),
        "problems": problems,
        "token_lengths": _token_lengths(read.lengths, args.max_length, problems.get("truncated", 0)),
        "seconds": seconds,
        "versions": versions(),
        "machine": machine(),
        "config": config,
        "command": read.command,
        "data_sha256": read.loaded.sha256,
    }


def _token_lengths(lengths: Sequence[int], max_length: int, num_truncated: int) -> dict[str, int]:
    """Quantiles of the lengths, and the `max_length` (a multiple of 64) that leaves 99 of 100 pairs whole."""
    median, p90, p99 = (int(np.quantile(lengths, share, method="higher")) for share in (0.5, 0.9, 0.99))
    return {
        "max_length": max_length,
        "median": median,
        "p90": p90,
        "p99": p99,
        "longest": max(lengths),
        "num_truncated": num_truncated,
        "suggested": 64 * -(-p99 // 64),
    }


def _about_labels(audit: Audit | None, *, num_trusted: int = 0) -> dict[str, Any]:
    """What only an audit knows; empty values without one."""
    if audit is None:
        names = ("num_contradicted", "calibration", "noise_left", "filter", "flip_rate_with_length")
        nothing = dict.fromkeys(names)
        return {"annotators": [], "scorers": [], "num_trusted": num_trusted, **nothing}
    estimate, calibration, filter_ = audit.judgement.estimate, audit.calibration(), audit.scores.filter
    with_length = audit.judgement.with_length
    return {
        "annotators": estimate["annotators"],
        "scorers": [asdict(row) for row in audit.scores.rows],
        "filter": None if filter_ is None else {**asdict(filter_), "helps": filter_.helps},
        "flip_rate_with_length": None if with_length is None else _flip_rate(with_length),
        "num_trusted": estimate["num_trusted"],
        "num_contradicted": audit.num_contradicted,
        "calibration": None if calibration is None else calibration.to_dict(),
        "noise_left": audit.judgement.noise_left,
    }


def publish_audit(audit: Audit, *, folder: Path, read: Read) -> dict[str, Any]:
    """Write everything that an audit promises.

    Args:
        audit: A finished one.
        folder: The output folder.
        read: What the run was given.

    Returns:
        The summary.
    """
    judged, pairs, margins = audit.judgement, audit.data.pairs, audit.margins()
    estimate, p_flip = judged.estimate, audit.p_flip()
    ledger = ledger_table(
        pairs,
        round_number=0,
        margins=margins,
        losses=np.logaddexp(0.0, -margins),
        weights=np.array(judged.weights, dtype=np.float64),
        p_flip=p_flip,
        decisions=judged.decisions,
        held_out_margins=margins,
    )
    is_data = [pair.origin == "data" for pair in pairs]
    counts = Counter(what for what, own in zip(judged.decisions, is_data, strict=True) if own)
    summary = {
        "task": "audit",
        "flip_rate": _flip_rate(estimate),
        "is_informative": estimate["is_informative"],
        "obstacle": estimate["obstacle"],
        "reason": estimate["reason"],
        **_chosen({"rho": judged.rho, "alpha": judged.alpha}),
        "num_pairs": sum(is_data),
        "num_kept": counts["keep"],
        "num_dropped": counts["drop"],
        "num_flipped": counts["flip"],
        "num_resampled": 0,
        **_about_labels(audit),
        **_about_run(audit.args, read, _audit_seconds(folder, audit)),
        "rounds": [],
        "model": audit.source.name_or_path,
        "model_fingerprint": _fingerprint(folder),
        "weight_curve": None,
    }
    if PartialState().is_main_process:
        _write_tables(folder, audit)
        pairs = read.loaded.pairs
        with _published(folder) as aside:
            write_ledger(aside / "ledger.parquet", ledger)
            write_report(aside, ledger=ledger, summary=summary, pairs=pairs, training_log=[], checks=_by_row(audit))
            write_json(aside / "summary.json", summary)
    PartialState().wait_for_everyone()
    return summary


def _by_row(audit: Audit) -> dict[int, list[float]]:
    """Views of the held-out margin, by row of the data."""
    columns = audit.scores.views.T.tolist()
    return {pair.row: column for pair, column in zip(audit.data.pairs, columns, strict=True) if pair.origin == "data"}


def _write_tables(folder: Path, audit: Audit) -> None:
    """`cleaned.jsonl` for any trainer, `dropped.jsonl` for the rest, `review.csv` for a person."""
    judged, p_flip, margins = audit.judgement, audit.p_flip(), audit.margins()
    rows = list(zip(audit.data.pairs, p_flip, judged.decisions, judged.weights, strict=True))
    is_data = np.array([pair.origin == "data" for pair, *_ in rows])
    is_open = is_data & [pair.verdict is None for pair, *_ in rows]
    is_informative = judged.estimate["is_informative"]
    by_margin = not calls_some(p_flip, is_open, is_informative=is_informative)
    order = [int(i) for i in reading_order(p_flip, margins, by_margin=by_margin) if is_data[i]]
    in_order = [(rows[i][0], p_flip[i] if is_informative else None, margins[i], rows[i][2]) for i in order]
    rows = [row for row in rows if row[0].origin == "data"]
    for name, wanted in (("cleaned.jsonl", ("keep", "flip")), ("dropped.jsonl", ("drop",))):
        with write_aside(folder / name) as aside:
            lines = [_cleaned(*row) for row in rows if row[2] in wanted]
            aside.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    _write_review(folder / "review.csv", in_order)


def _write_review(path: Path, rows: Sequence[tuple[Pair, Any, Any, str]]) -> None:
    """The table for a person; what a person has filled in already stands in the new one again, or beside it."""
    pairs = [row[0] for row in rows]
    try:
        pairs = with_verdicts(pairs, read_verdicts(path) if path.exists() else {})
    except (ValueError, OSError) as error:
        kept = path.with_name("review.before.csv")
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


def _cleaned(pair: Pair, p_flip: float, decision: str, weight: float) -> dict[str, Any]:
    """A row as any trainer reads it: a flipped pair is turned round already."""
    chosen, rejected = (pair.rejected, pair.chosen) if decision == "flip" else (pair.chosen, pair.rejected)
    return {
        "prompt": pair.prompt,
        "chosen": chosen,
        "rejected": rejected,
        **({} if pair.annotator is None else {"annotator": pair.annotator}),
        "weight": weight,
        "decision": decision,
        "p_flip": round(float(p_flip), 6),
        "row": pair.row,
        "pair_id": pair.id,
    }


def _model_card(summary: dict[str, Any]) -> str:
    """The README.md of the model folder: what was done, on which data, what the labels looked like."""
    config, rate = summary["config"], summary["flip_rate"]
    noise = (
        f"{100 * rate['estimate']:.1f} % (90 % interval {100 * rate['low']:.1f}-{100 * rate['high']:.1f} %)"
        if summary["is_informative"]
        else f"cannot tell: {summary['reason']}"
    )
    counts = ", ".join(str(summary[name]) for name in ("num_kept", "num_dropped", "num_flipped"))
    spec = LOSSES[config["loss"]]
    options = "\n".join(f"{name}: {value}" for name, value in sorted(config.items()) if value is not None)
    base = "" if Path(summary["model"]).exists() else f"base_model: {summary['model']}\n"  # a path is no hub id
    return f"""---
library_name: transformers
{base}tags:
- ropo
- preference-optimization
- dpo
---

# {Path(config["output_dir"]).name}

Aligned from `{summary["model"]}` on {summary["num_pairs"]} preference pairs with the loss `{config["loss"]}`
({spec.paper}) in {len(summary["rounds"])} round(s).

| | |
|---|---|
| estimated share of flipped labels | {noise} |
| pairs kept, dropped, flipped in the last decision | {counts} |
| resampled pairs in the last training | {summary["num_resampled"]} |
| SHA-256 of the data | `{summary["data_sha256"]}` |

`report.html` tells more, `ledger.parquet` holds every pair.

## Configuration

```yaml
{options}
```

## Citation

```bibtex
@inproceedings{{liang2025ropo,
  title     = {{{{ROPO}}: Robust Preference Optimization for Large Language Models}},
  author    = {{Liang, Xize and Chen, Chao and Qiu, Shuang and Wang, Jie and Wu, Yue and Fu, Zhihang and
               Chen, Hanzhu and Wu, Feng and Ye, Jieping}},
  booktitle = {{Proceedings of the 42nd International Conference on Machine Learning}},
  series    = {{PMLR}},
  volume    = {{267}},
  pages     = {{37131--37161}},
  year      = {{2025}},
  note      = {{arXiv:2404.04102}}
}}
```
"""
