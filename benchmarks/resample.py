"""Does resampling dropped prompts pay, by which rule, behind which guards, with how many samples?

    python benchmarks/resample.py                  # fill in the missing cells of resample.csv
    python benchmarks/resample.py --scratch=DIR    # the same; several processes with one folder share the work
    python benchmarks/resample.py --table          # the tables of docs/resampling.md, from the rows

The embedded task, 3,000 pairs, 0, 20 and 40 % of the labels flipped, five seeds, the options that `benchmarks/noise.py`
found for ROPO. Each cell is audited and trained on once; all variants start from there: they sample responses to the
prompts of the dropped pairs, choose new pairs, and train once more on kept and new pairs for as many steps, from the
start or, where it says so, from the first training's model ("carry on"). Accuracy on 2,000 held-out pairs with right
labels; gold reward and distance to the start (nats) on 1,000 samples; "right" is the share of new pairs whose chosen
response has the higher gold reward. Seconds are those of sampling, scoring and choosing, on one core.
"""

import logging
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from noise import COMMON, MIN_GAP, NUM_HELD_OUT
from scipy.stats import t
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from ropo import Pair, ROPOConfig, ROPOTrainer, __version__, flip_labels, run_audit
from ropo.data.tokenize import encode_prompts, tokenize_pairs
from ropo.logps.batch import Batching
from ropo.logps.score import score_pairs
from ropo.pairs import PairLogps
from ropo.resample.new_pairs import NewPairs, Scored, Scoring, resample_pairs
from ropo.resample.select import Criteria
from ropo.run.ledger import read_ledger
from ropo.sampling.engine import Sampling
from ropo.sampling.generate import Sample, sample_responses
from ropo.train.dataset import PairDataset
from ropo.train.objective import losses_of, margins_of
from ropo_bench.policy_score import PolicyScore, score_policy
from ropo_bench.rows import append_row, key_of, read_rows
from ropo_bench.task import GoldStandard, each
from ropo_bench.toy import gold_reward, make_pairs, save_toy

RESULTS = Path(__file__).with_suffix(".csv")
ROPO: dict[str, Any] = {"learning_rate": 4e-4, "beta": 1.0}
RATES, SEEDS, NUM_PAIRS, MOST_CANDIDATES = (0.2, 0.4), (1, 2, 3, 4, 5), 3000, 16
BASE: dict[str, Any] = {"sample_from": "reference", "num_candidates": 4, "selection_rule": "min_loss"}
OFF: dict[str, dict[str, Any]] = {
    "length": {"max_length_ratio": 1e6},
    "repetition": {"max_repetition": 1.0},
    "copies": {"max_copies": 10**6},
    "share": {"max_resampled_share": 1e6},
}
VARIANTS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "none, carry on": {"start": "carry on"},
    "reference, min_loss": BASE,
    "reference, threshold": {**BASE, "selection_rule": "threshold"},
    "reference, quantile": {**BASE, "selection_rule": "quantile"},
    "reference, uncertainty_aware": {**BASE, "selection_rule": "uncertainty_aware"},
    "policy, min_loss": {**BASE, "sample_from": "policy"},
    "policy, threshold": {**BASE, "sample_from": "policy", "selection_rule": "threshold"},
    "policy, quantile": {**BASE, "sample_from": "policy", "selection_rule": "quantile"},
    "policy, uncertainty_aware": {**BASE, "sample_from": "policy", "selection_rule": "uncertainty_aware"},
    "reference, min_loss, K = 1": {**BASE, "num_candidates": 1},
    "reference, min_loss, K = 16": {**BASE, "num_candidates": 16},
    "reference, min_loss, margins up to 10": {**BASE, "max_abs_margin": 10.0},
    "policy, min_loss, margins up to 10": {**BASE, "sample_from": "policy", "max_abs_margin": 10.0},
    "reference, min_loss, all text guards off": {**BASE, **{k: v for one in OFF.values() for k, v in one.items()}},
    **{f"reference, min_loss, {name} guard off": {**BASE, **off} for name, off in OFF.items()},
    "reference, min_loss, carry on": {**BASE, "start": "carry on"},
    "policy, min_loss, carry on": {**BASE, "sample_from": "policy", "start": "carry on"},
    "dropped pairs flipped": {"turn": True},
    "refined step by step": {**BASE, "num_refinements": 3},
}
STUDY_ONLY = ("start", "turn", "num_refinements")  # what no option of ours stands for
CELL = ("variant", "flip_rate", "seed")
COLUMNS = (*CELL, "accuracy", "gold", "kl", "num_dropped", "num_new", "right", "seconds", "version")


class Cell:
    """One noisy data set, audited and trained on once, and everything that its variants share.

    Args:
        rate: Share of flipped labels.
        seed: Of everything.
        base: Folder of the toy model.
        folder: For the audit.
    """

    def __init__(self, rate: float, seed: int, base: Path, folder: Path) -> None:
        pairs = make_pairs(NUM_PAIRS + NUM_HELD_OUT, seed=1000 * seed, min_gap=MIN_GAP)
        self.seed, self.base, self.folder, self.held_out = seed, base, folder, pairs[NUM_PAIRS:]
        self.noisy, _ = flip_labels(pairs[:NUM_PAIRS], rate=rate, seed=1000 * seed + 1)
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        self.reference = AutoModelForCausalLM.from_pretrained(base)
        self.args = ROPOConfig(output_dir=str(folder), seed=seed, **COMMON, **ROPO)
        summary = run_audit(base, self.noisy, self.args).summary
        self.loss = self.args.bound_loss(summary["alpha"])
        ledger = read_ledger(folder / "ledger.parquet").to_pandas()
        is_kept = {row: what == "keep" for row, what in zip(ledger["row"], ledger["decision"], strict=True)}
        self.kept = [pair for pair in self.noisy if is_kept[pair.row]]
        self.dropped = [pair for pair in self.noisy if not is_kept[pair.row]]
        self.first = self.train(self.kept, None, halfway=folder / "halfway")
        self.first.save_pretrained(folder / "first")
        self.kept_losses = losses_of(self._margins(self.kept), self.loss)
        self.samples: dict[str, tuple[list[Sample], float]] = {}
        self.scores: dict[tuple[Any, ...], PolicyScore] = {}

    def _scored(self, model: PreTrainedModel, pairs: Sequence[Pair]) -> PairLogps:
        tokens = tokenize_pairs(pairs, self.tokenizer, max_length=128).tokens
        return score_pairs(model, tokens, Batching(pad_token_id=self.tokenizer.pad_token_id))

    def _margins(self, pairs: Sequence[Pair]) -> np.ndarray:
        return margins_of(self._scored(self.first, pairs), self._scored(self.reference, pairs), self.loss)

    def train(self, pairs: Sequence[Pair], start: Path | None, *, halfway: Path | None = None) -> PreTrainedModel:
        """Train on pairs for as many steps as all pairs of the data would take."""
        tokenized = tokenize_pairs(pairs, self.tokenizer, max_length=128)
        data = PairDataset(tokenized.pairs, tokenized.tokens, reference=self._scored(self.reference, pairs))
        args = self.args.of_stage(
            self.folder, seed=self.seed + (start is not None), num_train_epochs=NUM_PAIRS / len(data)
        )
        model = AutoModelForCausalLM.from_pretrained(start or self.base)
        trainer = ROPOTrainer(model, args, data, processing_class=self.tokenizer, loss=self.loss)
        if halfway is not None:
            trainer.save_halfway(halfway)
        trainer.train()
        return trainer.model

    def new_pairs(self, options: dict[str, Any]) -> tuple[NewPairs, float]:
        """New pairs of a variant and the seconds that they took."""
        args = ROPOConfig(
            output_dir=str(self.folder), rounds=2, **{k: v for k, v in options.items() if k not in STUDY_ONLY}, **COMMON
        )
        who, num = args.sample_from, args.num_candidates
        if who not in self.samples:
            start = time.monotonic()
            prompts = encode_prompts([pair.prompt for pair in self.dropped], self.tokenizer)
            drawn = sample_responses(
                self.first if who == "policy" else self.reference, self.tokenizer, prompts,
                Sampling(num_candidates=MOST_CANDIDATES, max_new_tokens=48), seed=self.seed,
            )  # fmt: skip
            self.samples[who] = drawn, time.monotonic() - start
        drawn, seconds = self.samples[who]
        samples = [one for i, one in enumerate(drawn) if i % MOST_CANDIDATES < num]
        start = time.monotonic()
        for number in range(options.get("num_refinements", 0)):
            samples = self.refined(samples, seed=self.seed + 100 * number + 100)

        def scored(model: PreTrainedModel) -> Scored:
            batching = Batching(pad_token_id=self.tokenizer.pad_token_id)
            return Scored(
                parents=self._scored(model, self.dropped), score=lambda tokens: score_pairs(model, tokens, batching)
            )

        needs_earlier = args.selection_rule == "uncertainty_aware"
        halfway = AutoModelForCausalLM.from_pretrained(self.folder / "halfway") if needs_earlier else None
        found = resample_pairs(
            self.dropped,
            samples,
            scoring=Scoring(
                policy=scored(self.first),
                reference=scored(self.reference),
                earlier=scored(halfway) if needs_earlier else None,
                margins_of=lambda own, base: margins_of(own, base, self.loss),
            ),
            criteria=Criteria(
                rule=args.selection_rule,
                loss_of=lambda margins: losses_of(margins, self.loss),
                kept_losses=self.kept_losses,
                guards=args.guards,
                seed=self.seed,
            ),
            tokenizer=self.tokenizer,
            max_length=128,
        )
        return found, seconds * num / MOST_CANDIDATES + time.monotonic() - start

    def refined(self, samples: Sequence[Sample], *, seed: int) -> list[Sample]:
        """One step of conditional refinement: each sample's second half is drawn anew, and stays if its margin grows.

        The idea of stepwise conditioning (arXiv:2304.11433): a step starts from what is there, and is accepted only if
        the margin over the previous step is above 0.
        """
        begun = [self._ids(sample.text)[: sample.num_tokens // 2] for sample in samples]
        prompts = encode_prompts([self.dropped[sample.prompt].prompt for sample in samples], self.tokenizer)
        drawn = sample_responses(
            self.reference, self.tokenizer, [[*prompt, *ids] for prompt, ids in zip(prompts, begun, strict=True)],
            Sampling(num_candidates=1, max_new_tokens=48), seed=seed,
        )  # fmt: skip
        steps = []
        for place, (old, ids, new) in enumerate(zip(samples, begun, drawn, strict=True)):
            text = self.tokenizer.decode([*ids, *self._ids(new.text)])
            if old.is_finished and new.is_finished and text != old.text and old.text.strip() and text.strip():
                parent = self.dropped[old.prompt]
                steps.append((place, text, Pair(prompt=parent.prompt, chosen=text, rejected=old.text, row=place)))
        found = list(samples)
        for (place, text, _), h in zip(steps, self._margins([pair for _, _, pair in steps]), strict=True):
            if h > 0:
                found[place] = replace(found[place], text=text, num_tokens=len(self._ids(text)))
        return found

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def measure(self, variant: str) -> dict[str, Any]:
        """Scores of a variant."""
        options = VARIANTS[variant]
        model, new, seconds, num_new, right = self.first, [], 0.0, 0, np.nan
        if options is not None and options.get("turn"):
            new = [
                Pair(prompt=one.prompt, chosen=one.rejected, rejected=one.chosen, row=one.row) for one in self.dropped
            ]
        elif options is not None and "selection_rule" in options:
            found, seconds = self.new_pairs(options)
            new = found.pairs
        if new:
            num_new = len(new)
            gaps = [gold_reward(one.prompt, one.chosen) - gold_reward(one.prompt, one.rejected) for one in new]
            right = float(np.mean(np.array(gaps) > 0))
        # Rules often agree; the same pairs from the same start need one training.
        carries_on = options is not None and options.get("start") == "carry on"
        key = (options is None, carries_on, *(one.id + str(one.chosen) for one in new))
        if key not in self.scores:
            if options is not None:
                model = self.train([*self.kept, *new], self.folder / "first" if carries_on else None)
            gold = GoldStandard(pairs=self.held_out, rewards=each(gold_reward), max_length=128, max_new_tokens=48)
            self.scores[key] = score_policy(
                model, self.reference, self.tokenizer, gold, num_samples=1000, seed=self.seed
            )
        score = self.scores[key]
        return {
            "accuracy": score.accuracy.value, "gold": score.gold.value, "kl": score.kl.value,
            "num_dropped": len(self.dropped), "num_new": num_new, "right": right, "seconds": seconds,
        }  # fmt: skip


def difference(found: Sequence[dict[str, str]], variant: str, name: str) -> str:
    """Mean difference to training once without new pairs, paired by seed, with a 90 % interval."""
    own, plain = (
        {row["seed"]: float(row[name]) for row in found if row["variant"] == one} for one in (variant, "none")
    )
    both = np.array([own[seed] - plain[seed] for seed in own if seed in plain])
    if len(both) < 2:
        return f"{both[0]:+.3f}" if len(both) else "-"
    half = t.ppf(0.95, len(both) - 1) * both.std(ddof=1) / np.sqrt(len(both))
    return f"{both.mean():+.3f} ± {half:.3f}"


def mean(rows: Sequence[dict[str, str]], name: str) -> float:
    """Mean of a column."""
    return float(np.mean([float(row[name]) for row in rows]))


def table() -> str:
    """One table per flip rate: differences to training once without new pairs, paired by seed."""
    blocks = []
    for rate in RATES:
        all_rows = [row for row in read_rows(RESULTS) if float(row["flip_rate"]) == rate]
        found = [row for row in all_rows if int(row["num_dropped"])]
        plain = [row for row in found if row["variant"] == "none"]
        if not plain:
            continue
        num_silent = sum(row["variant"] == "none" for row in all_rows) - len(plain)
        silent = f" ({num_silent} more in which the audit cannot tell, so nothing is dropped)" if num_silent else ""
        lines = [
            f"{rate:.0%} flipped, {len(plain)} seeds{silent}, {mean(plain, 'num_dropped'):.0f} pairs dropped. Trained "
            f"once, nothing resampled: accuracy {mean(plain, 'accuracy'):.3f}, gold reward {mean(plain, 'gold'):.2f}, "
            f"distance {mean(plain, 'kl'):.1f} nats.\n",
            "| variant | accuracy, difference | gold reward, difference | distance | new pairs | right | seconds |",
            "|---|---|---|---|---|---|---|",
        ]
        for variant in VARIANTS:
            rows = [row for row in found if row["variant"] == variant]
            if rows and variant != "none":
                num_new = mean(rows, "num_new")
                cells = [
                    variant, difference(found, variant, "accuracy"), difference(found, variant, "gold"),
                    f"{mean(rows, 'kl'):.1f}", f"{num_new:.0f}", f"{mean(rows, 'right'):.1%}" if num_new else "",
                    f"{mean(rows, 'seconds'):.0f}",
                ]  # fmt: skip
                lines.append(f"| {' | '.join(cells)} |")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def main() -> None:
    """Fill in the missing cells."""
    if "--table" in sys.argv:
        print(table())
        return
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    kept = [word.removeprefix("--scratch=") for word in sys.argv[1:] if word.startswith("--scratch=")]
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(kept[0] if kept else name)
        scratch.mkdir(exist_ok=True)
        base = scratch / "reviews_model"
        if not (base / "tokenizer.json").exists():
            save_toy(base, seed=0)
        for seed in SEEDS:
            for rate in RATES:
                done = {key_of(row, CELL) for row in read_rows(RESULTS)}
                cells = [{"variant": variant, "flip_rate": rate, "seed": seed} for variant in VARIANTS]
                missing = [cell for cell in cells if key_of(cell, CELL) not in done]
                if not missing or not _claim(scratch / f"resample_{rate}_{seed}"):
                    continue
                with tempfile.TemporaryDirectory(dir=scratch) as folder:
                    shared = Cell(rate, seed, base, Path(folder))
                    for cell in missing:
                        row = {**cell, **shared.measure(cell["variant"]), "version": __version__}
                        append_row(RESULTS, row, COLUMNS)
                        print(row, flush=True)


def _claim(folder: Path) -> bool:
    """Whether this process is the first to want a cell; remove the folder to have it measured again."""
    try:
        folder.mkdir()
    except FileExistsError:
        return False
    return True


if __name__ == "__main__":
    main()
