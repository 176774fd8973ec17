"""The embedded task: the true reward of any text, correctly labelled pairs, and a tiny language model of a grammar.

In: a grammar and seeds. Out: the gold reward of any response; `Pair`s whose labels are right; a tokenizer and a
language model of 0.4 million parameters that has learned to write like the grammar.

The one idea: which sentences are well written, what they are about and what they say is known exactly, because a
grammar writes them; so it is known which response is better and how good any policy is.

Add a task: add a grammar in `ropo_bench.grammar`; every function here takes it as `grammar`.
"""

import math
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    get_cosine_schedule_with_warmup,
)

from ropo.pairs import Pair
from ropo_bench.grammar import REVIEWS, SUPPORT, Grammar, sample_prompt, sample_response

__all__ = [
    "REVIEWS",
    "SUPPORT",
    "Grammar",
    "gold_reward",
    "make_model",
    "make_pairs",
    "make_tokenizer",
    "pretrain",
    "sample_prompt",
    "sample_response",
    "save_toy",
]

NUM_TEXTS = 20_000  # enough for 19 of 20 sampled sentences to parse
NUM_HELD_OUT_TEXTS = 256

NEGATION = -0.5  # "not excellent" is blame, but milder than "terrible"
BEFORE_BUT, AFTER_BUT = 0.5, 1.5  # the clause after "but" is the one that is meant
MAX_PRAISE, PRAISE_SCALE = 2.5, 4.0
BROKEN, BROKEN_WORDS = 1.0, 6  # penalty for a sentence that does not parse, and for every six words of it if it is long
OFF_TOPIC, MISPLACED, REPEATED = 0.75, 0.75, 0.4
FLOOR = -4.0


def gold_reward(prompt: str, response: str, *, grammar: Grammar = REVIEWS) -> float:
    """The true reward of any text as a response to a prompt: well-written praise of the topic.

    ::

        r = 2.5·tanh(s/4) − broken − 0.75·off_topic − 0.75·misplaced − 0.4·repeated,   at least −4

    - s, sentiment: the sum of the words' `values`, each times the `degrees` and negations before it in its clause
      ("not" is −½); the clause before "but" counts half, the one after it one and a half times. The bound keeps
      more praise from paying for ever.
    - broken: sentences that the grammar cannot write, an unfinished last one included; a long one counts once for
      every six words. Praise in a broken sentence counts nothing, blame in it counts.
    - off_topic: topic nouns and aspects that do not belong to the prompt's topic.
    - misplaced: sentences after the longest beginning whose order the grammar can write, such as a fourth sentence
      or one after the closing.
    - repeated: uses of a word after its first, over the words that matter (those with a value, nouns, aspects).

    An empty response gets −4. On text of the grammar all penalties are 0, the mean is about 0 and the standard
    deviation about 1. So pairs teach praise alone, and a policy that is pushed too far shows it: one that says a strong
    word again and again, writes without end or breaks its sentences loses more than it gains.

    Args:
        prompt: A prompt that names a topic of the grammar.
        response: Any text; marks need not be divided from words by spaces.
        grammar: The grammar that judges it.

    Returns:
        The reward, in [−4, 2.5).

    Raises:
        ValueError: If the prompt names no topic of the grammar.

    Examples:
        >>> prompt = "Review the soup at the Blue Door ."
        >>> round(gold_reward(prompt, "the taste was excellent ."), 3)
        1.155
        >>> round(gold_reward(prompt, "the taste was not excellent ."), 3)
        -0.612
        >>> round(gold_reward(prompt, "excellent excellent excellent"), 3)
        -1.8
    """
    noun = grammar.topic(prompt)
    words = re.findall(r"\w+|[^\w\s]", response)
    if not words:
        return FLOOR
    sentiment, broken, kinds = _read(words, grammar)
    on_topic = {noun, *grammar.topics[noun].aspects}
    num_off_topic = sum(word in grammar.subjects and word not in on_topic for word in words)
    num_placed = max(n for n in range(len(kinds) + 1) if tuple(kinds[:n]) in grammar.beginnings)
    reward = (
        MAX_PRAISE * math.tanh(sentiment / PRAISE_SCALE)
        - BROKEN * broken
        - OFF_TOPIC * num_off_topic
        - MISPLACED * (len(kinds) - num_placed)
        - REPEATED * grammar.num_repeated(words)
    )
    return max(FLOOR, reward)


def _read(words: list[str], grammar: Grammar) -> tuple[float, float, list[str]]:
    """Sentiment, number of broken sentences (long ones count more), and the kinds of the others in their order."""
    sentiment = broken = 0.0
    kinds: list[str] = []
    for sentence in _sentences(words):
        value = _sentiment(sentence, grammar)
        kind = grammar.parse(sentence)
        if kind is None:
            sentiment += min(value, 0.0)
            broken += max(1.0, len(sentence) / BROKEN_WORDS)
        else:
            sentiment += value
            kinds.append(kind)
    return sentiment, broken, kinds


def _sentences(words: list[str]) -> Iterator[list[str]]:
    """Cut after each full stop; what follows the last one is a sentence too."""
    start = 0
    for end, word in enumerate(words, 1):
        if word == "." or end == len(words):
            yield words[start:end]
            start = end


def _sentiment(sentence: list[str], grammar: Grammar) -> float:
    total, factor, clause = 0.0, 1.0, 1.0
    for word in sentence:
        if word in grammar.negations:
            factor *= NEGATION
        elif word in grammar.degrees:
            factor *= grammar.degrees[word]
        elif word in grammar.values:
            total += clause * factor * grammar.values[word]
            factor = 1.0
        elif word == "but" and clause == 1.0:
            total, factor, clause = BEFORE_BUT * total, 1.0, AFTER_BUT
        elif word in {"and", "but", ","}:
            factor = 1.0
    return total


def make_pairs(num_pairs: int, *, seed: int, min_gap: float = 0.05, grammar: Grammar = REVIEWS) -> list[Pair]:
    """Draw preference pairs whose labels are right.

    Args:
        num_pairs: How many.
        seed: Same seed, same pairs. A longer list starts with the shorter one.
        min_gap: Two responses whose gold rewards differ by less are drawn again, so no label is a matter of taste.
        grammar: The grammar that writes and judges them.

    Returns:
        Pairs with rows 0, 1, ..., ids all different. Prompt and responses are plain text; of two independent responses
        the one with the higher gold reward is `chosen`.
    """
    rng = random.Random(seed)
    pairs: dict[str, Pair] = {}
    while len(pairs) < num_pairs:
        prompt = sample_prompt(rng, grammar=grammar)
        responses = [sample_response(prompt, rng, grammar=grammar) for _ in range(2)]
        (worse, rejected), (better, chosen) = sorted((gold_reward(prompt, y, grammar=grammar), y) for y in responses)
        if better - worse >= min_gap:
            pair = Pair(prompt=prompt, chosen=chosen, rejected=rejected, row=len(pairs))
            pairs.setdefault(pair.id, pair)
    return list(pairs.values())


def make_tokenizer(*, grammar: Grammar = REVIEWS) -> PreTrainedTokenizerFast:
    """Build a tokenizer with one token per word of the grammar.

    It adds no special tokens by itself, so a prompt and a response may be tokenised apart and joined; decoding gives
    the text back.

    Returns:
        A tokenizer with `<pad>`, `<bos>`, `<eos>` and `<unk>` as tokens 0 to 3.
    """
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    ids = {word: index for index, word in enumerate((*special.values(), *grammar.words))}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=special["unk_token"]))
    # Every mark is cut off, so that a prompt and a response joined without a space still give the tokens of both.
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=128, clean_up_tokenization_spaces=False, **special
    )


def make_model(
    tokenizer: PreTrainedTokenizerFast, *, seed: int = 0, initializer_range: float = 0.08, max_new_tokens: int = 64
) -> LlamaForCausalLM:
    """Make a small Llama with random weights.

    Two layers and tied embeddings with a wide initialisation: copying the topic from the prompt, the one thing that a
    response must not get wrong, is then learned from few texts.

    Returns:
        The model in float32 on the CPU, with a generation config that samples at temperature 1.
    """
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=True,
        initializer_range=initializer_range,
        max_position_embeddings=tokenizer.model_max_length,
        **special,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, max_new_tokens=max_new_tokens, **special
    )
    return model


def pretrain(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    *,
    num_texts: int = NUM_TEXTS,
    batch_size: int = 32,
    learning_rate: float = 4e-3,
    seed: int = 0,
    grammar: Grammar = REVIEWS,
    on_step: Callable[[int, int, float], None] | None = None,
) -> float:
    """Teach a model to write like the grammar: next-token training on prompt, response and end token.

    One pass over fresh texts; there is no second epoch because the grammar has no end of texts.

    Args:
        model: Trained in place, left in eval mode.
        tokenizer: The tokenizer of the same grammar.
        num_texts: Texts to draw and to train on.
        batch_size: Texts per step.
        learning_rate: Peak of the warm-up and cosine schedule of AdamW.
        seed: Of the texts.
        grammar: The grammar that writes them.
        on_step: Called after each step with its number from 1, the number of steps, and the loss of the step in nats
            per token.

    Returns:
        Mean loss on held-out texts in nats per response token, the end token counted.
    """
    rng = random.Random(seed)
    texts = [_encode(tokenizer, rng, grammar) for _ in range(num_texts + NUM_HELD_OUT_TEXTS)]
    held_out, texts = texts[:NUM_HELD_OUT_TEXTS], texts[NUM_HELD_OUT_TEXTS:]
    # Not sorted by length: the mean over the tokens of a batch would give the tokens of short texts more weight.
    batches = [texts[start : start + batch_size] for start in range(0, num_texts, batch_size)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01, fused=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, len(batches) // 10, len(batches))
    model.train()
    for step, batch in enumerate(batches, 1):
        loss = _loss(model, batch, with_prompt=True)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if on_step is not None:
            on_step(step, len(batches), loss.item())
    model.eval()
    with torch.no_grad():
        return _loss(model, held_out, with_prompt=False).item()


def _encode(tokenizer: PreTrainedTokenizerFast, rng: random.Random, grammar: Grammar) -> tuple[list[int], list[int]]:
    prompt = sample_prompt(rng, grammar=grammar)
    response = sample_response(prompt, rng, grammar=grammar)
    ids: list[int] = tokenizer(response)["input_ids"]
    return tokenizer(prompt)["input_ids"], [*ids, tokenizer.eos_token_id]


def _loss(model: LlamaForCausalLM, texts: list[tuple[list[int], list[int]]], *, with_prompt: bool) -> Tensor:
    """Mean loss per token of a batch, padded on the right with anything: causal attention never looks there."""
    rows, labels = [], []
    for prompt, response in texts:
        rows.append(torch.tensor(prompt + response))
        labels.append(torch.tensor((prompt if with_prompt else [-100] * len(prompt)) + response))
    pad = torch.nn.utils.rnn.pad_sequence
    inputs_BT = pad(rows, batch_first=True)
    labels_BT = pad(labels, batch_first=True, padding_value=-100)
    loss: Tensor = model(input_ids=inputs_BT.to(model.device), labels=labels_BT.to(model.device)).loss
    return loss


def save_toy(
    path: Path,
    *,
    num_texts: int = NUM_TEXTS,
    seed: int = 0,
    grammar: Grammar = REVIEWS,
    on_step: Callable[[int, int, float], None] | None = None,
) -> float:
    """Make, pre-train and save the tiny language model as a Hugging Face folder, with tokenizer and generation config.

    Returns:
        Held-out loss in nats per response token.
    """
    tokenizer = make_tokenizer(grammar=grammar)
    model = make_model(tokenizer, seed=seed)
    nats_per_token = pretrain(model, tokenizer, num_texts=num_texts, seed=seed, grammar=grammar, on_step=on_step)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return nats_per_token
