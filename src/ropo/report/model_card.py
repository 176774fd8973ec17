"""The README.md of a model folder.

In: the summary of a run. Out: Markdown, with the metadata that the hub reads.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ropo.losses import LOSSES


def model_card(summary: Mapping[str, Any]) -> str:
    """The README.md of the model folder: what was done, on which data, what the labels looked like.

    Args:
        summary: What `summary.json` holds.
    """
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
