"""The contract of the output folder: model with card, ledger, summary, report.

In: finished rounds. Out: `O/` as a Hugging Face model folder, `ledger.parquet`, `summary.json`, `report.html`.
"""

import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from accelerate import PartialState

from ropo.data.load import Loaded
from ropo.data.problems import Problem, summarise
from ropo.ledger import ledger_table, write_ledger
from ropo.losses import LOSSES, bind_loss, gradient_weight
from ropo.provenance import machine, read_json, versions, write_aside, write_json
from ropo.report import write_report
from ropo.rounds import Round
from ropo.stages import Stages

_CURVE_MARGINS = np.linspace(-6, 6, 121)


def publish(
    rounds: Sequence[Round], *, folder: Path, loaded: Loaded, problems: Sequence[Problem], command: str
) -> dict[str, Any]:
    """Write everything that a run promises, from what its rounds have on disk.

    Args:
        rounds: Finished rounds, in order.
        folder: The output folder.
        loaded: The data as it was read.
        problems: All problems found in it.
        command: What the user typed.

    Returns:
        The summary.
    """
    ledger = pa.concat_tables([_ledger_of(this) for this in rounds])
    summary = _summary(rounds, folder=folder, loaded=loaded, problems=problems, command=command)
    if PartialState().is_main_process:
        write_ledger(folder / "ledger.parquet", ledger)
        write_json(folder / "summary.json", summary)
        new = [pair for this in rounds for pair in this.new_pairs()]
        log = [
            {"round": this.number, **line} for this in rounds for line in read_json(this.folder / "training_log.json")
        ]
        write_report(folder, ledger=ledger, summary=summary, pairs=[*loaded.pairs, *new], training_log=log)
        # The trainer leaves a pickle of its arguments beside the weights; nobody should have to open one.
        ignore = shutil.ignore_patterns("training_args.bin")
        shutil.copytree(rounds[-1].model_folder, folder, dirs_exist_ok=True, ignore=ignore)
        with write_aside(folder / "README.md") as aside:
            aside.write_text(_model_card(summary), encoding="utf-8")
    PartialState().wait_for_everyone()
    return summary


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
    )


def _round_summary(this: Round) -> dict[str, Any]:
    found, estimate = this.decisions(), read_json(this.folder / "flip_estimate.json")
    counts = Counter(found["decisions"][: this.num_data])
    return {
        "round": this.number,
        "flip_rate": {"estimate": estimate["rate"], "low": estimate["low"], "high": estimate["high"]},
        "is_informative": estimate["is_informative"],
        "reason": estimate["reason"],
        "rho": found["rho"],
        "rho_reason": found["reason"],
        "num_pairs": this.num_data,
        "num_kept": counts["keep"],
        "num_dropped": counts["drop"] + counts["resample"],
        "num_flipped": counts["flip"],
        "num_resampled": len(this.new_pairs()),
        "num_resampled_trained_on": len(this.data) - this.num_data,
        "refused": read_json(path)["refused"] if (path := this.folder / "resampling.json").exists() else {},
    }


def _summary(
    rounds: Sequence[Round], *, folder: Path, loaded: Loaded, problems: Sequence[Problem], command: str
) -> dict[str, Any]:
    args = rounds[0].args
    per_round = [_round_summary(this) for this in rounds]
    final = per_round[-1]
    loss = bind_loss(args.loss, beta=args.beta, options=args.loss_options)
    curve = gradient_weight(loss, torch.from_numpy(_CURVE_MARGINS)) if not LOSSES[args.loss].needs_whole_batch else None
    seconds = dict(Stages(folder / "rounds").seconds)
    for this in rounds:
        seconds |= {f"round {this.number} {name}": value for name, value in this.stages.seconds.items()}
    return {
        **{name: final[name] for name in ("flip_rate", "is_informative", "reason", "rho", "num_pairs", "num_kept")},
        **{name: final[name] for name in ("num_dropped", "num_flipped")},
        "num_resampled": final["num_resampled_trained_on"],
        "num_rows": loaded.num_rows,
        "problems": summarise(problems),
        "seconds": seconds,
        "versions": versions(),
        "machine": machine(),
        "rounds": per_round,
        "config": {name: value for name, value in args.to_dict().items() if "token" not in name},
        "command": command,
        "model": rounds[0].source.name_or_path,
        "data_sha256": loaded.sha256,
        "weight_curve": None
        if curve is None
        else {"loss": args.loss, "margin": _CURVE_MARGINS.tolist(), "weight": curve.tolist()},
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
    last = f", the last with `{config['last_loss']}`" if len(summary["rounds"]) > 1 else ""
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
({spec.paper}) in {len(summary["rounds"])} round(s){last}.

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
