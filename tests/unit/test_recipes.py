"""The recipes are valid, and each line of the paper's says where its value comes from."""

import re
from pathlib import Path

import pytest
import yaml

from ropo.cli.arguments import parse_train

RECIPES = sorted((Path(__file__).parents[2] / "examples" / "recipes").glob("*.yaml"))
PAPERS = [path for path in RECIPES if path.name not in ("ropo.yaml", "resampling.yaml")]
WORDS = ["--model_name_or_path", "mistralai/Mistral-7B-v0.1", "--output_dir", "o", "--use_cpu"]


def name(path):
    return path.name


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_recipes_are_understood(path):
    recipe = yaml.safe_load(path.read_text())
    data = [] if "dataset_name" in recipe else ["--dataset_name", "d"]
    given, args = parse_train([*WORDS, *data, "--config", str(path)])
    for option, value in recipe.items():
        kept = getattr(args, option) if hasattr(args, option) else getattr(given, option)
        is_number = isinstance(kept, float)  # written as 5e-7, which YAML alone reads as text
        assert kept == float(value) if is_number else str(getattr(kept, "value", kept)) == str(value), option


def test_the_papers_datasets_are_there():
    assert {path.stem for path in PAPERS} == {"alpaca_comparison", "tldr", "ultrafeedback"}


@pytest.mark.parametrize("path", PAPERS, ids=name)
def test_every_value_says_where_it_comes_from(path):
    text = path.read_text()
    assert "NEVER RUN" in text
    assert f"examples/recipes/{path.name}" in text
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert len(lines) == len(yaml.safe_load(text))
    for line in lines:
        assert re.fullmatch(r"\w+: \S+  # (paper|second-hand|ours|its README)\b.*", line), line


@pytest.mark.parametrize("path", PAPERS, ids=name)
def test_what_is_known_of_the_paper_stands_in_it(path):
    recipe = yaml.safe_load(path.read_text())
    assert (recipe["loss"], recipe["alpha"], recipe["decision_rule"]) == ("ropo", 14, "lowest_loss")
    assert recipe["rounds"] > 1
    assert recipe["num_candidates"] > 0
