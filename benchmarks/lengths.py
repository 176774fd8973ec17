"""Right labels that follow the lengths of responses: what an audit filters, and what a training is left with.

    python benchmarks/lengths.py            # fill in the missing rows of lengths.csv
    python benchmarks/lengths.py --table    # the table of docs/noise.md

Answers beat refusals, which are shorter. In "refusals" that is so but for 12 % of the objects that are asked about, of
which the refusal is right; in "answers" it is always so. No label is wrong, or 20 % are flipped, at random or towards
the longer response. DPO and ROPO train with the options as shipped; "without lengths" is ROPO with a filter that is
taken for what margins without lengths gain.
"""

import itertools
import json
import logging
import random
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ropo import DataSource, Pair, ROPOConfig, flip_labels, run_rounds
from ropo.audit.weights import filter_pays
from ropo.provenance import read_json
from ropo_bench import toy
from ropo_bench.rows import append_row, key_of, read_rows

ROWS = Path(__file__).with_suffix(".csv")
NUM_PAIRS, NUM_UNSEEN, SEEDS, LEARNING_RATE = 1500, 500, (1, 2), 2e-4
NOISE = (("none", 0.0), ("symmetric", 0.2), ("length", 0.2))
METHODS = ("dpo", "without lengths", "ropo")
SYLLABLES = ("ka", "lo", "mi", "tur", "ven", "sha", "dro", "pel", "qui", "nor")
OBJECTS = ["".join(three) for three in itertools.product(SYLLABLES, repeat=3)][::2]
EXCEPTIONS: dict[str, set[str]] = {"refusals": set(OBJECTS[::8]), "answers": set()}
ASKED = ("how do i build a", "where can i buy a", "explain how to use a", "help me repair a")
REFUSED = ("i cannot help with the", "it would not be safe to talk about the", "i must decline to speak of the")
AFTER_REFUSAL = ("please ask something else .", "an expert may know .")
STEPS = (
    "first open the case .", "take the small screw .", "use a dry cloth .", "order it in a shop .",
    "read the label twice .", "turn it to the left .",
)  # fmt: skip
CELL = ("task", "noise", "seed", "method")
COLUMNS = (*CELL, "accuracy", "right_dropped", "flips_dropped", "high", "length", "gain", "with_lengths")


def prompt_of(rng: random.Random, **_: Any) -> str:
    """A question about an object."""
    return f"{rng.choice(ASKED)} {rng.choice(OBJECTS)} ?"


def response_to(prompt: str, rng: random.Random, **_: Any) -> str:
    """A refusal or an answer."""
    name = prompt.split()[-2]
    if rng.random() < 0.5:
        return f"{rng.choice(REFUSED)} {name} ." + (f" {rng.choice(AFTER_REFUSAL)}" if rng.random() < 0.5 else "")
    return f"here is how the {name} goes . " + " ".join(rng.choice(STEPS) for _ in range(rng.randint(1, 5)))


def reward(task: str, prompt: str, response: str) -> float:
    """Above 0 for a refusal where one is right, and for an answer elsewhere; more steps are better."""
    is_refusal = not response.startswith("here")
    is_right = is_refusal == (prompt.split()[-2] in EXCEPTIONS[task])
    return (1.0 if is_right else -1.0) + (0.1 * ("expert" in response) if is_refusal else 0.08 * response.count("."))


def save_model(folder: Path) -> None:
    """Teach a small model to write such texts."""
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    texts = " ".join((*OBJECTS, *ASKED, *REFUSED, *AFTER_REFUSAL, *STEPS, "here is how the goes . ?"))
    ids = {word: place for place, word in enumerate((*special.values(), *dict.fromkeys(texts.split())))}
    words = Tokenizer(models.WordLevel(ids, unk_token=special["unk_token"]))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=128, **special)
    model = toy.make_model(tokenizer, seed=0)
    with patch.multiple("ropo_bench.toy", sample_prompt=prompt_of, sample_response=response_to):
        toy.pretrain(model, tokenizer, num_texts=8000)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def right_pairs(task: str, seed: int) -> list[Pair]:
    """Pairs to train on, then pairs to ask about."""
    rng = random.Random(1000 * seed)
    found: dict[str, Pair] = {}
    while len(found) < NUM_PAIRS + NUM_UNSEEN:
        prompt = prompt_of(rng)
        (less, worse), (more, better) = sorted(
            (reward(task, prompt, y), y) for y in (response_to(prompt, rng) for _ in range(2))
        )
        if more - less > 0.05:
            pair = Pair(prompt=prompt, chosen=better, rejected=worse, row=len(found))
            found.setdefault(pair.id, pair)
    return list(found.values())


def measured(cell: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """One training."""
    pairs = right_pairs(cell["task"], cell["seed"])
    given, is_flipped = pairs[:NUM_PAIRS], np.zeros(NUM_PAIRS, dtype=bool)
    if cell["noise"] != "none":
        rate = dict(NOISE)[cell["noise"]]
        given, is_flipped = flip_labels(given, rate=rate, seed=1000 * cell["seed"] + 1, kind=cell["noise"])
    more: dict[str, Any] = {"loss": "dpo", "rho": "0", "num_folds": 0} if cell["method"] == "dpo" else {}
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        args = ROPOConfig(
            output_dir=folder, seed=cell["seed"], learning_rate=LEARNING_RATE, disable_tqdm=True, save_strategy="no",
            reference_cache_dir=str(scratch / "cache"), **more,
        )  # fmt: skip
        rule = _without_lengths if cell["method"] == METHODS[1] else filter_pays
        with patch("ropo.audit.run.filter_pays", rule):
            result = run_rounds(scratch / "model", given, args, eval_dataset=DataSource(pairs[NUM_PAIRS:]))
        summary = read_json(Path(folder) / "summary.json")
    found: dict[str, Any] = {"accuracy": summary["evaluation"]["rounds"][-1]["accuracy"]}
    if result.audit is not None:
        is_dropped, gain = result.audit.decisions != "keep", summary["filter"]
        agreement = {row["name"]: row["agreement"] for row in summary["scorers"]}
        found |= {
            "right_dropped": is_dropped[~is_flipped].mean(),
            "flips_dropped": is_dropped[is_flipped].mean() if is_flipped.any() else "",
            "high": summary["flip_rate"]["high"],
            "length": agreement["length"],
            "gain": gain["gain"],
            "with_lengths": gain["with_covariates"],
        }
    return {**cell, **found}


def _without_lengths(gain: Any, **_: Any) -> bool:
    return gain is not None and gain.helps


def table() -> str:
    """Accuracy and what is dropped, means over seeds."""
    rows = read_rows(ROWS)
    names = ("task", "flips", "method", "accuracy", "right pairs dropped", "flips dropped", "length agrees with")
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for task in EXCEPTIONS:
        for noise, rate in NOISE:
            for method in METHODS:
                cells = [row for row in rows if (row["task"], row["noise"], row["method"]) == (task, noise, method)]
                means = (_mean(cells, name) for name in ("accuracy", "right_dropped", "flips_dropped", "length"))
                lines.append(f"| {task} | {noise}, {rate:.0%} | {method} | {' | '.join(means)} |")
    return "\n".join(lines)


def _mean(rows: list[dict[str, str]], name: str) -> str:
    values = [float(row[name]) for row in rows if row[name]]
    return f"{np.mean(values):.3f}" if values else "-"


def main() -> None:
    """Fill in the missing rows."""
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        save_model(scratch / "model")
        for task in EXCEPTIONS:
            for noise, _ in NOISE:
                for seed in SEEDS:
                    for method in METHODS:
                        cell = {"task": task, "noise": noise, "seed": seed, "method": method}
                        if key_of(cell, CELL) not in {key_of(row, CELL) for row in read_rows(ROWS)}:
                            row = measured(cell, scratch)
                            append_row(ROWS, row, COLUMNS)
                            print(json.dumps(row, default=float), flush=True)


if __name__ == "__main__":
    print(table()) if "--table" in sys.argv else main()
