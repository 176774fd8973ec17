"""Every causal language model of the installed `transformers`, tiny: no layout is accepted that is wrong.

`python tests/equivalence/test_architectures.py` writes the table in docs/architectures.md; the slow test compares.
"""

import copy
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from ropo.data.tokenize import TokenizedPair
from ropo.logps.batch import LAYOUTS
from ropo.logps.choose import choose_layout, varies_in_training
from ropo.logps.dropout import turn_dropout_off
from ropo.logps.shared_prefix import FORWARDS
from ropo.logps.small_copy import small_copies

TABLE = Path(__file__).parents[2] / "docs" / "architectures.md"
# Tokens of prompt, chosen and rejected: longer than every window of a tiny model, and one pair that is taken by blocks.
PAIRS = [(9, 10, 12), (40, 30, 9), (160, 20, 50)]
# Wrong masks change these models' log-probabilities by 0.03 to 200 nats, rounding by less than 2e-3.
TOLERANCE_NATS = 1e-2
# Families of each kind for the fast suite: one kind of layer, windows, chunks, sinks, scaled and bounded logits, nested
# configurations, experts, latent attention, learned positions, biases by distance, recurrent and hybrid layers.
FEW = {
    "llama": "packed",
    "gemma3": "packed",
    "gemma2": "shared prefix",
    "gpt_oss": "shared prefix",
    "cohere2": "packed",
    "llama4_text": "plain rows",
    "deepseek_v3": "packed",
    "gpt2": "packed",
    "bloom": "plain rows",
    "gpt_neo": "plain rows",
    "mamba": "plain rows",
    "qwen3_next": "plain rows",
    "llava": "packed",
    "qwen3_vl": "packed",
}
# Not text in, text out; no language model by themselves; or random (Reformer draws its buckets).
LEFT_OUT = {"musicgen", "musicgen_melody", "trocr", "git", "whisper", "reformer"}

# Where dropout is kept: in modules, in numbers of theirs by several names, in the configuration that layers read.
WITH_DROPOUT = ("gpt2", "opt", "seed_oss", "gpt_bigcode", "bloom", "falcon", "persimmon", "starcoder2", "bart", "xlm")
# Draw blocks of attention, or experts, whatever the configuration says.
VARYING = {"big_bird", "phimoe"}


@dataclass(frozen=True)
class Row:
    """What was found for a family.

    Attributes:
        family: As `model_type` names it.
        layout: In words.
        why: Why it is not shared, if it is not.
        error_nats: Largest difference to the plain forward.
    """

    family: str
    layout: str
    why: str
    error_nats: float


def make_tokens(vocabulary: int) -> list[TokenizedPair]:
    rng = np.random.default_rng(7)
    return [
        TokenizedPair(**{
            name: rng.integers(3, vocabulary, size).astype(np.int32)
            for name, size in zip(("prompt", "chosen", "rejected"), sizes, strict=True)
        })
        for sizes in PAIRS
    ]  # fmt: skip


def logps_in(layout: str, model: torch.nn.Module, tokens: list[TokenizedPair]) -> torch.Tensor:
    with torch.no_grad():
        found = FORWARDS[layout](model, LAYOUTS[layout](tokens, pad_token_id=0))
    return torch.stack([found.chosen, found.rejected])


def default_config(family: str) -> tuple[type, PreTrainedConfig]:
    names = {**MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, **MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    model_class = getattr(transformers, names[family])
    config = CONFIG_MAPPING[family]()
    if model_class.config_class == config.sub_configs.get("text_config"):  # as `AutoModelForCausalLM` does
        config = config.get_text_config()
    if hasattr(config, "is_decoder"):
        config.is_decoder = True
    return model_class, config


def examine(family: str) -> Row | None:
    """Choose a layout for a tiny model of a family and compare it with the plain forward; None if there is no model."""
    model_class, config = default_config(family)
    for model in small_copies(model_class, config):
        tokens = make_tokens(model.get_input_embeddings().weight.shape[0])
        try:
            wanted = logps_in("plain", model, tokens)
        except Exception:
            continue
        if wanted.isfinite().all():
            layout, reason = choose_layout(model, tokens, pad_token_id=0)
            error = float((logps_in(layout, model, tokens) - wanted).abs().max())
            return Row(family, layout.replace("_", " "), reason.partition("since ")[2] or reason, error)
    return None


@pytest.mark.parametrize("family", FEW)
def test_a_family_of_each_kind(family):
    row = examine(family)
    assert row is not None
    assert row.layout == FEW[family], row.why
    assert row.error_nats < TOLERANCE_NATS


def with_dropout(config: PreTrainedConfig) -> PreTrainedConfig:
    """A configuration with much of every dropout but that of whole layers, which may happen to leave out none."""
    for name, value in list(vars(config).items()):
        if isinstance(value, PreTrainedConfig):
            with_dropout(value)
        elif ("drop" in name and "layerdrop" not in name) and type(value) in (int, float):
            setattr(config, name, 0.5)
    return config


def changes_in_training(family: str) -> tuple[float, float] | None:
    """Largest change of log-probabilities by training, with and without dropout, in nats; None if there is no model."""
    try:
        model_class, config = default_config(family)
        model = next(small_copies(model_class, with_dropout(config)))
        tokens = make_tokens(model.get_input_embeddings().weight.shape[0])[:2]
        wanted = logps_in("plain", model, tokens)
    except Exception:
        return None
    before = model.config.to_dict()
    found = []
    for turn in (lambda _: None, turn_dropout_off):
        turn(model)
        found.append(float((logps_in("plain", copy.deepcopy(model).train(), tokens) - wanted).abs().max()))
    assert model.config.to_dict() == before  # as it is saved
    return found[0], found[1]


@pytest.mark.parametrize("family", WITH_DROPOUT)
def test_dropout_is_off(family):
    with_it, without = changes_in_training(family)
    assert with_it > 0.01
    assert without < 1e-4


@pytest.mark.parametrize(("family", "varies"), [("llama", False), ("opt", False), ("phimoe", True)])
def test_what_else_is_drawn_is_told(family, varies):
    model_class, config = default_config(family)
    assert varies_in_training(next(small_copies(model_class, config))) == varies


def examine_all() -> list[Row]:
    rows = []
    for family in sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - LEFT_OUT):
        try:
            row = examine(family)
        except Exception as error:
            logging.getLogger(__name__).info("%s: %r", family, error)
            continue
        rows += [row] if row is not None else []
    return rows


PAGE = """# Architectures

Which forward a model takes is found out by comparing, not looked up: see `ropo/logps/choose.py`. This table is what
comes out for {num_all} families of causal language models in transformers {version}: all that can be built from their
default configuration. Each was made tiny, with random weights, in float32, with its default attention, and given pairs
longer than every window. Each layout was then compared with the plain forward on other pairs: **none is accepted and
wrong**.

| layout | what it does | families |
|---|---|---|
| packed | each prompt once, all pairs in one row without padding, logits of responses only | {packed} |
| shared prefix | each prompt once, one padded row for each pair, logits of responses only | {shared_prefix} |
| plain rows | two padded rows for each pair, logits of responses only | {plain_rows} |
| plain | two padded rows for each pair, all logits | {plain} |

```sh
python tests/equivalence/test_architectures.py               # writes this page
pytest -m slow tests/equivalence/test_architectures.py       # compares
```

Attention that is `eager` by default has no packed rows; where the model also takes `sdpa`, `attn_implementation="sdpa"`
gives it some.

| family | layout | why not packed |
|---|---|---|
{rows}

## Mixtures of experts

The load-balancing loss of the routers is added where the model's configuration or `--router_aux_loss_coef` asks for it
([methods](methods.md#mixture-of-experts-models)).

## Vision-language models

Pairs of text train the language model of a vision-language model: `model_name_or_path` may be one (Qwen2-VL and
Gemma 3 are trained in tests, LLaVA with an adapter). It is loaded and saved whole. What reads images is not called,
gets no adapter and stays as it is. Models that answer only with an image (BLIP, Kosmos-2, Pix2Struct) are refused, and
so are rows with images: the column or the part of the message is named.
"""


def render(rows: list[Row]) -> str:
    """The page."""
    layouts = ("packed", "shared prefix", "plain rows", "plain")
    counts = {layout.replace(" ", "_"): sum(row.layout == layout for row in rows) for layout in layouts}
    lines = [f"| {row.family} | {row.layout} | {in_words(row)} |" for row in rows]
    return PAGE.format(num_all=len(rows), version=transformers.__version__, rows="\n".join(lines), **counts)


def in_words(row: Row) -> str:
    if row.layout == "packed":
        return ""
    if row.layout == "shared prefix":
        return "its attention is `eager` by default"
    if "by up to" in row.why:  # the number is rounding's and the machine's
        return "the layout changes its log-probabilities"
    return row.why.split(" (")[0].replace("|", "\\|")


@pytest.mark.slow
def test_all_families():
    """At least sixty, none accepted and wrong, and the page says what was found."""
    rows = examine_all()
    assert len(rows) >= 60
    assert not [row for row in rows if row.error_nats >= TOLERANCE_NATS]
    assert TABLE.read_text("utf-8") == render(rows), "the table is old: run this file with python"


@pytest.mark.slow
def test_dropout_is_off_in_all_families():
    """And those in which something else is left to chance are known."""
    found = {family: changes_in_training(family) for family in set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - LEFT_OUT}
    changes = {family: one[1] for family, one in found.items() if one is not None}
    assert len(changes) >= 120
    assert {family for family, change in changes.items() if change > 1e-4} == VARYING


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    TABLE.write_text(render(examine_all()), encoding="utf-8")
