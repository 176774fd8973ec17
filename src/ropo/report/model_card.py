"""The README.md of a model folder.

In: the summary of a run. Out: Markdown, with the metadata that the hub reads.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, try_to_load_from_cache

from ropo.audit.weights import CHOICES
from ropo.losses import LOSSES

_OF_MACHINE = ("output_dir", "reference_cache_dir", "audit_from", "run_name", "logging_dir")


def model_card(summary: Mapping[str, Any], *, is_adapter: bool) -> str:
    """The README.md of the model folder: what was done, on which data, what the labels looked like.

    Args:
        summary: What `summary.json` holds.
        is_adapter: Whether the folder holds an adapter in place of a whole model.
    """
    config, rate = summary["config"], summary["flip_rate"]
    noise = (
        f"{100 * rate['estimate']:.1f} % (90 % interval {100 * rate['low']:.1f}-{100 * rate['high']:.1f} %)"
        if summary["is_informative"]
        else f"cannot tell: {summary['reason']}"
    )
    counts = ", ".join(str(summary[name]) for name in ("num_kept", "num_dropped", "num_flipped"))
    chosen = ", ".join("-" if (value := summary.get(name)) is None else f"{value:.4g}" for name in CHOICES)
    num_rounds = len(summary["rounds"])
    spec = LOSSES[config["loss"]]
    given = {name: value for name, value in sorted(config.items()) if value is not None and not _is_private(name)}
    options = "\n".join(f"{name}: {value}" for name, value in given.items())
    return f"""---
{_metadata(summary, is_adapter=is_adapter)}
---

# {Path(config["output_dir"]).absolute().name}

Aligned from `{summary["model"]}` on {summary["num_pairs"]} preference pairs with the loss `{config["loss"]}`
({spec.paper}) in {num_rounds} round{"" if num_rounds == 1 else "s"}.

| | |
|---|---|
| estimated share of flipped labels | {noise} |
| pairs kept, dropped, flipped in the last decision | {counts} |
| ρ, α and β of the last training | {chosen} |
| resampled pairs in the last training | {summary["num_resampled"]} |
| SHA-256 of the data | `{summary["data_sha256"]}` |

The run's `report.html` tells more, and its `ledger.parquet` holds every pair.

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


def _metadata(summary: Mapping[str, Any], *, is_adapter: bool) -> str:
    """What the hub reads, as YAML."""
    model = Path(summary["model"])
    base = None if model.exists() else str(summary["model"])  # a path is no hub id
    found = ModelCardData(
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-generation",
        base_model=base,
        base_model_relation=None if base is None else "adapter" if is_adapter else "finetune",
        datasets=summary["datasets"] or None,
        tags=["ropo", "preference-optimization", "dpo"],
        **_license_of(model),
    )
    return found.to_yaml().strip()


def _license_of(model: Path) -> dict[str, Any]:
    """The license of the base model, as its README says it; nothing where that is not on this machine."""
    try:
        path = model / "README.md" if model.is_dir() else try_to_load_from_cache(str(model), "README.md")
        found = ModelCard.load(path).data.to_dict() if isinstance(path, str | Path) and Path(path).is_file() else {}
    except ValueError:  # no metadata, or none that can be read
        return {}
    return {name: str(found[name]) for name in ("license", "license_name", "license_link") if name in found}


def _is_private(option: str) -> bool:
    """Whether an option speaks of a machine or a network, which nobody else should read of."""
    return option in _OF_MACHINE or option.endswith("_url")
