"""The tasks of `speed.py`: a model, its tokenizer and pairs, the same in every process."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ropo import load_pairs
from ropo.data.tokenize import tokenize_pairs
from ropo.logps.batch import batches_by_length
from ropo_bench import toy

TASKS = ("hh", "toy", "gemma", "large")
LORA: dict[str, Any] = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
LARGE_SHAPE = {
    "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
    "num_attention_heads": 32, "num_key_value_heads": 4, "max_position_embeddings": 2048,
}  # fmt: skip
LARGE_WORDS = (512, 256, 256)  # of prompt, chosen and rejected, on average


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A model, its tokenizer and pairs."""

    name: str
    model: Any
    tokenizer: Any
    pairs: list[Any]
    tokens: list[Any]
    batch_size: int
    max_length: int
    learning_rate: float

    @property
    def has_bf16(self) -> bool:
        """Whether all of it runs under bfloat16 autocast."""
        return self.name in ("gemma", "large")

    @property
    def peft_config(self) -> LoraConfig | None:
        """Of the adapter that is trained."""
        return LoraConfig(**LORA, task_type="CAUSAL_LM") if self.name == "gemma" else None


def make_task(name: str, source: str | None, num_pairs: int, order: str, folder: str | None = None) -> Task:
    """Make the model and take pairs spread over the data, whole batches, the same in every process."""
    batch_size, max_length = 8, 512
    if name == "toy":
        tokenizer, pairs, batch_size = toy.make_tokenizer(), toy.make_pairs(num_pairs, seed=1), 16
        model: Any = toy.make_model(tokenizer)
    elif name == "large":
        tokenizer, model, pairs = make_large(num_pairs)
        max_length = LARGE_SHAPE["max_position_embeddings"]
    elif name == "gemma":
        pairs, batch_size, max_length = load_pairs(source).pairs, 4, 256
        tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    else:
        pairs = load_pairs(source).pairs
        tokenizer, model = make_tokenizer_and_model(pairs)
    found = tokenize_pairs(pairs, tokenizer, max_length=max_length)
    count = min(num_pairs, len(found.pairs)) // batch_size * batch_size
    places = list(range(0, len(found.pairs), len(found.pairs) // count))[:count]
    if order == "by length":
        places = _by_length(places, [len(found.tokens[i]) for i in places], batch_size)
    return Task(
        name=name,
        model=model.float(),
        tokenizer=tokenizer,
        pairs=[found.pairs[i] for i in places],
        tokens=[found.tokens[i] for i in places],
        batch_size=batch_size,
        max_length=max_length,
        learning_rate=1e-6 if name == "large" else 1e-4,  # of so many random weights all move at once
    )


def _by_length(places: list[int], lengths: list[int], batch_size: int) -> list[int]:
    """Batches of similar length in any order: what the length-grouping sampler of `transformers` makes of a long run.

    It sorts 50 batches at a time, but fewer where there are few pairs, which would fill up rows as no long run does.
    """
    batches = list(batches_by_length(lengths, max_tokens=batch_size * max(lengths), max_pairs=batch_size))
    random.Random(0).shuffle(batches)
    return [places[i] for batch in batches for i in batch]


def make_tokenizer_and_model(pairs: Sequence[Any]) -> tuple[Any, Any]:
    """Byte-level BPE learned from the pairs, and a Llama of 6.9 million parameters."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        special_tokens=["<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator([f"{pair.prompt}{pair.chosen}{pair.rejected}" for pair in pairs], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="</s>")
    shape = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "num_attention_heads": 8}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=4096, pad_token_id=0, eos_token_id=1, bos_token_id=1, **shape))
    return tokenizer, model


def make_large(num_pairs: int) -> tuple[Any, Any, list[Any]]:
    """A vocabulary of numbered words, a Llama of `LARGE_SHAPE`, and pairs of random words of about `LARGE_WORDS`."""
    raw = Tokenizer(models.WordLevel({f"w{i}": i for i in range(LARGE_SHAPE["vocab_size"])}, unk_token="w0"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="w0", eos_token="w1")
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(LlamaConfig(**LARGE_SHAPE, pad_token_id=0, eos_token_id=1, bos_token_id=1))
    chance = random.Random(0)

    def text(mean: int) -> str:
        count = round(mean * chance.uniform(0.5, 1.5))
        return " ".join(f"w{chance.randrange(2, LARGE_SHAPE['vocab_size'])}" for _ in range(count))

    rows = []
    for _ in range(num_pairs):
        prompt, chosen, rejected = map(text, LARGE_WORDS)
        rows.append({"prompt": prompt, "chosen": f" {chosen}", "rejected": f" {rejected}"})
    return tokenizer, model, load_pairs(rows).pairs
