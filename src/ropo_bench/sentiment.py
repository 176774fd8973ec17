"""Controlled sentiment: a small language model of real film reviews, and a classifier of their labels as the truth.

In: the sentence polarity data (Pang & Lee 2005), a cache folder, seeds. Out: the model's folder, a
`WordReward`, and `Pair`s whose labels are right by it.

The one idea: what a label means is defined, not guessed. The snippets are dealt into two parts by a hash of their text.
One, without its labels, teaches a language model to write; the labels of the other fit the reward that judges whatever
is written. This is the controlled sentiment of the DPO paper (arXiv:2305.18290), small enough for one core.

Three choices make it measurable at this size. The model knows the words that are frequent in its part and no others, so
every text that it can write is tokenised in one way. A prompt is the first words of a snippet with the space behind
them, so prompt and response may be joined as they are. And responses whose rewards are nearer than `MIN_GAP` are not
made a pair.
"""

import copy
import itertools
import math
import random
import re
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from ropo.data.tokenize import encode_prompts
from ropo.pairs import Pair
from ropo.provenance import hash_value, read_json, write_json
from ropo.sampling.engine import Sampling
from ropo.sampling.generate import Sample, sample_responses
from ropo_bench.toy import make_model
from ropo_bench.word_reward import WordReward, fit_on_texts

FILES = {"rt-polarity.pos": True, "rt-polarity.neg": False}
HOMEPAGE = "https://www.cs.cornell.edu/people/pabo/movie-review-data/"

MODEL_SHARE = 0.6  # of the snippets; the labels of the others fit the reward
NUM_WORDS = 3000  # that the model knows
L2, MIN_COUNT = 4.0, 2  # of the reward; see `fit_on_texts`
NUM_PROMPT_WORDS = 3
HELD_OUT_PROMPTS = 0.25  # share of the prompts
MAX_LENGTH, MAX_NEW_TOKENS = 64, 40
MIN_GAP = 1.0  # log-odds between the two responses of a pair
BLOCK = 500  # prompts that are sampled together: a longer list of pairs starts with the shorter one

NUM_EPOCHS, BATCH_SIZE, LEARNING_RATE, WEIGHT_DECAY = 8, 16, 4e-3, 0.1
NUM_WARMUP_STEPS, HELD_OUT_TEXTS = 100, 0.05

WORDS = ("it", "it's", "its", "this", "there", "there's", "that", "that's")
"""The subject of noise of kind `topic`: prompts that point at the film and do not name it."""


@dataclass(frozen=True, slots=True)
class Snippet:
    """One line of the data: a sentence or so of a review, and whether the review was favourable."""

    text: str
    is_positive: bool


def read_snippets(source: Path | None) -> list[Snippet]:
    """Read the sentence polarity data.

    Args:
        source: A zip file that contains rt-polarity.pos and rt-polarity.neg, or a folder with the two.

    Returns:
        The snippets, each text once, the favourable ones first.

    Raises:
        ValueError: If there is no such data.
    """
    hint = (
        f"Download the sentence polarity dataset v1.0 (Pang & Lee 2005, CC BY 4.0) from {HOMEPAGE} and pass its folder "
        "or a zip file of it."
    )
    if source is None or not source.exists():
        got = "none" if source is None else f"{source}, which does not exist"
        raise ValueError(f"The task sentiment needs source, the folder or zip file of its data; got {got}. {hint}")
    found = _read_zip(source) if source.is_file() else {p.name: p.read_bytes() for p in source.iterdir() if p.is_file()}
    if missing := [name for name in FILES if name not in found]:
        raise ValueError(f"The task sentiment needs {' and '.join(FILES)} in {source}; got no {missing[0]}. {hint}")
    # Not splitlines(): the text holds characters that it takes for the end of a line.
    lines = {
        line.strip(): is_positive for name, is_positive in FILES.items() for line in _decode(found[name]).split("\n")
    }
    return [Snippet(text, is_positive) for text, is_positive in lines.items() if text]


def _read_zip(path: Path) -> dict[str, bytes]:
    if not zipfile.is_zipfile(path):
        raise ValueError(f"The task sentiment needs a zip file or a folder as source; got {path}. Unpack it first.")
    with zipfile.ZipFile(path) as archive:
        return {Path(name).name: archive.read(name) for name in archive.namelist() if Path(name).name in FILES}


def _decode(data: bytes) -> str:
    """As UTF-8, in which the data is passed on in places, else as the authors published it."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def share_of_hash(text: str, what: str) -> float:
    """A number in [0, 1) that belongs to a text: where it falls when things are shared out."""
    return int(hash_value([what, text])[:12], 16) / 16**12


def split_snippets(snippets: Sequence[Snippet]) -> tuple[list[Snippet], list[Snippet]]:
    """Deal the snippets into those of the language model and those of the reward, by a hash of their text."""
    parts: tuple[list[Snippet], list[Snippet]] = ([], [])
    for snippet in snippets:
        parts[share_of_hash(snippet.text, "part") >= MODEL_SHARE].append(snippet)
    return parts


def prepare(folder: Path, source: Path | None) -> Path:
    """Make what the task needs once: model, tokenizer, gold reward, prompts.

    Written aside and renamed: a killed run leaves nothing half-made, and of two runs at once the faster one counts.

    Args:
        folder: Where it is kept, under a name that changes with the data and the choices of this file.
        source: As for `read_snippets`.

    Returns:
        A folder with `model/`, `gold_reward.json`, `prompts.json` and `about.json`: held-out loss of the model, nats
        per token, and accuracy of the gold reward on the labels of the model's part, which it has not seen.
    """
    snippets = read_snippets(source)
    choices = [MODEL_SHARE, NUM_WORDS, L2, MIN_COUNT, NUM_PROMPT_WORDS, HELD_OUT_PROMPTS, MAX_LENGTH]
    training = [NUM_EPOCHS, BATCH_SIZE, LEARNING_RATE, WEIGHT_DECAY, NUM_WARMUP_STEPS, HELD_OUT_TEXTS]
    labelled = [[one.text, one.is_positive] for one in snippets]
    made = folder / f"sentiment_{hash_value([labelled, choices, training])[:12]}"
    if made.exists():
        return made
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".sentiment.") as name:
        aside = Path(name) / "made"
        _prepare(aside, snippets)
        try:
            aside.rename(made)
        except OSError:  # not empty: another process was faster
            if not made.exists():
                raise
    return made


def _prepare(folder: Path, snippets: Sequence[Snippet]) -> None:
    for_model, for_reward = split_snippets(snippets)
    reward = fit_reward(for_reward)
    texts = [one.text for one in for_model]
    tokenizer = make_tokenizer(texts)
    model = make_model(tokenizer, initializer_range=0.04, max_new_tokens=MAX_NEW_TOKENS)
    nats_per_token = pretrain(model, tokenizer, texts)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    reward.save(folder / "gold_reward.json")
    write_json(folder / "prompts.json", find_prompts([one.text for one in snippets], tokenizer))
    write_json(
        folder / "about.json", {"nats_per_token": nats_per_token, "gold_accuracy": accuracy_of(reward, for_model)}
    )


def fit_reward(snippets: Sequence[Snippet]) -> WordReward:
    """Fit the gold reward: the log-odds that a text comes from a favourable review."""
    return fit_on_texts(
        [one.text for one in snippets], [one.is_positive for one in snippets], l2=L2, min_count=MIN_COUNT
    )


def accuracy_of(reward: WordReward, snippets: Sequence[Snippet]) -> float:
    """Share of labels that the sign of a reward tells."""
    return float(np.mean([(reward("", one.text) > 0) == one.is_positive for one in snippets]))


def make_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Build a tokenizer with one token per word, for the most frequent words; the data divides words by spaces.

    It adds no special tokens by itself. A prompt that ends with a space and a response may be tokenised apart and
    joined, and decoding gives back the words of any response that the model can write.

    Returns:
        A tokenizer with `<pad>`, `<eos>` and `<unk>` as tokens 0 to 2.
    """
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    counts = Counter(word for text in texts for word in text.split())
    words = sorted(counts, key=lambda word: (-counts[word], word))[:NUM_WORDS]
    ids = {word: index for index, word in enumerate((*special.values(), *words))}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=special["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=2 * MAX_LENGTH, clean_up_tokenization_spaces=False, **special
    )


def pretrain(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], *, seed: int = 0
) -> float:
    """Teach a model to write like the texts: next-token training with AdamW, warm-up and a cosine to zero.

    Stops after the first epoch that does not lower the loss on texts held out, and keeps the best weights. Words that
    the tokenizer does not know are read and never learned as an answer.

    Args:
        model: Trained in place, left in eval mode.
        tokenizer: From `make_tokenizer`.
        texts: What to learn; a share `HELD_OUT_TEXTS` of them, at least one, is held out.
        seed: Of the order of the texts.

    Returns:
        Mean loss on the held-out texts, nats per known word, the end counted.
    """
    rng = random.Random(seed)
    rows = [[*ids[: MAX_LENGTH - 1], tokenizer.eos_token_id] for ids in tokenizer(list(texts))["input_ids"]]
    rng.shuffle(rows)
    num_held_out = math.ceil(HELD_OUT_TEXTS * len(rows))
    held_out, rows = rows[:num_held_out], rows[num_held_out:]
    num_steps = NUM_EPOCHS * math.ceil(len(rows) / BATCH_SIZE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / NUM_WARMUP_STEPS, 0.5 * (1 + math.cos(math.pi * min(step / num_steps, 1)))),
    )
    best, weights = math.inf, copy.deepcopy(model.state_dict())
    for _ in range(NUM_EPOCHS):
        rng.shuffle(rows)
        model.train()
        for batch in _batches(rows):
            optimizer.zero_grad()
            total, num_tokens = _loss(model, batch, tokenizer)
            (total / num_tokens).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        model.eval()
        with torch.no_grad():
            totals = [(total.item(), num) for total, num in (_loss(model, b, tokenizer) for b in _batches(held_out))]
        now = sum(total for total, _ in totals) / sum(num for _, num in totals)
        if now >= best:
            break
        best, weights = now, copy.deepcopy(model.state_dict())
    model.load_state_dict(weights)
    return best


def _batches(rows: Sequence[list[int]]) -> Iterator[Sequence[list[int]]]:
    return (rows[start : start + BATCH_SIZE] for start in range(0, len(rows), BATCH_SIZE))


def _loss(model: LlamaForCausalLM, rows: Sequence[list[int]], tokenizer: PreTrainedTokenizerFast) -> tuple[Tensor, int]:
    """Summed loss of the known words and their number; padded on the right: causal attention never looks there."""
    pad = torch.nn.utils.rnn.pad_sequence
    ids_BT = pad([torch.tensor(row) for row in rows], batch_first=True, padding_value=tokenizer.pad_token_id)
    targets_BT = ids_BT[:, 1:]
    is_counted_BT = (targets_BT != tokenizer.pad_token_id) & (targets_BT != tokenizer.unk_token_id)
    logits_BTV = model(input_ids=ids_BT[:, :-1]).logits
    total = torch.nn.functional.cross_entropy(logits_BTV[is_counted_BT], targets_BT[is_counted_BT], reduction="sum")
    return total, max(int(is_counted_BT.sum()), 1)


def find_prompts(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> dict[str, list[str]]:
    """The beginnings of the texts: their first words with the space behind them.

    Args:
        texts: Any.
        tokenizer: Beginnings with a word that it does not know, or with a mark, are left out.

    Returns:
        Different prompts to train on and, others, to test on ("train", "held_out"), dealt by a hash of the prompt.
    """
    known = tokenizer.get_vocab()
    found: dict[str, list[str]] = {"train": [], "held_out": []}
    for prompt in sorted({" ".join(text.split()[:NUM_PROMPT_WORDS]) + " " for text in texts}):
        words = prompt.split()
        if len(words) == NUM_PROMPT_WORDS and all(re.match(r"\w", word) and word in known for word in words):
            found["held_out" if share_of_hash(prompt, "prompt") < HELD_OUT_PROMPTS else "train"].append(prompt)
    return found


def make_pairs(
    made: Path, num_pairs: int, *, seed: int, kind: str = "train", min_gap: float = MIN_GAP, first_row: int = 0
) -> list[Pair]:
    """Sample preference pairs whose labels are right.

    Both responses are drawn from the model at temperature 1; the one with the higher gold reward is `chosen`. Drawn
    again: responses that are empty, hold a word unknown to the model or do not end within `MAX_NEW_TOKENS`, and two
    whose rewards are too near. What was sampled is kept in `made`, so all methods and processes share it.

    Args:
        made: The folder that `prepare` gave.
        num_pairs: How many.
        seed: Same seed, same pairs. A longer list starts with the shorter one.
        kind: "train" or "held_out": the two have no prompt in common.
        min_gap: Two responses whose gold rewards differ by less are drawn again.
        first_row: Row of the first pair.

    Returns:
        Pairs with consecutive rows, ids all different.

    Raises:
        ValueError: If the data is too small for the model to write `num_pairs` different pairs.
    """
    gold_reward = load_reward(made)
    pairs: dict[str, Pair] = {}
    for number in itertools.count():
        if len(pairs) >= num_pairs:
            break
        num_before = len(pairs)
        for prompt, first, second in _block(made, kind, seed, number):
            (worse, rejected), (better, chosen) = sorted((gold_reward(prompt, y), y) for y in (first, second))
            if better - worse >= min_gap:
                pair = Pair(prompt=prompt, chosen=chosen, rejected=rejected, row=first_row + len(pairs))
                pairs.setdefault(pair.id, pair)
        if len(pairs) == num_before:
            raise ValueError(
                f"The task sentiment needs responses of which {num_pairs} pairs differ by {min_gap}; got {num_before}, "
                f"and none from {BLOCK} more prompts. Ask for fewer pairs, or give more snippets."
            )
    return list(pairs.values())[:num_pairs]


def load_reward(made: Path) -> WordReward:
    """The gold reward that `prepare` has fitted."""
    return WordReward.load(made / "gold_reward.json")


def _block(made: Path, kind: str, seed: int, number: int) -> Iterator[tuple[str, str, str]]:
    """Prompts with two responses that are whole; sampled once, then read."""
    tokenizer = AutoTokenizer.from_pretrained(made / "model")
    model = AutoModelForCausalLM.from_pretrained(made / "model")
    prompts = read_json(made / "prompts.json")[kind]
    if not prompts:
        raise ValueError(f"The task sentiment needs prompts to draw {kind} pairs; got none. Give more snippets.")
    name = hash_value([kind, seed, number])
    drawn = random.Random(name).choices(prompts, k=BLOCK)
    samples = sample_responses(
        model,
        tokenizer,
        encode_prompts(drawn, tokenizer),
        Sampling(num_candidates=2, max_new_tokens=MAX_NEW_TOKENS),
        seed=int(name[:15], 16),
        folder=made / "samples",
        model_digest=made.name,
        title="Sampling pairs",
    )
    for first, second in zip(samples[::2], samples[1::2], strict=True):
        if all(_is_whole(sample, tokenizer) for sample in (first, second)):
            yield drawn[first.prompt], first.text, second.text


def _is_whole(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Ended, not empty, and of known words alone: `<unk>` is not part of the text, so its place would be missing."""
    return sample.is_finished and sample.num_tokens == len(tokenizer(sample.text)["input_ids"]) > 0
