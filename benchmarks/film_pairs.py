"""Pairs of real sentences whose right label is known: a favourable and an unfavourable one of film reviews.

    python benchmarks/film_pairs.py SENTENCE_POLARITY.zip FOLDER

In: the sentence polarity data (docs/benchmark.md says where it is from). Out: FOLDER/film_train.jsonl (1,000 pairs) and
FOLDER/film_test.jsonl (500), no sentence in two of them. Which sentence is in which pair is drawn with seed 0. The
favourable one is chosen, so a model is asked to be kind to films; benchmarks/real_model.py flips labels.
"""

import json
import random
import sys
from pathlib import Path

from ropo_bench.sentiment import read_snippets

NUM_TRAIN, NUM_TEST = 1000, 500


def main(source: Path, folder: Path) -> None:
    """Write both files."""
    snippets = read_snippets(source)
    draw = random.Random(0)
    favourable, other = (
        draw.sample([snippet.text for snippet in snippets if snippet.is_positive is kind], NUM_TRAIN + NUM_TEST)
        for kind in (True, False)
    )
    rows = [
        {"prompt": f"What do you say of film {number}?", "chosen": f" {chosen}", "rejected": f" {rejected}"}
        for number, (chosen, rejected) in enumerate(zip(favourable, other, strict=True), 1)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("film_train", rows[:NUM_TRAIN]), ("film_test", rows[NUM_TRAIN:])):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
