"""How fast responses are sampled, by the engine `transformers` and by `model.generate` in the order of the data.

    python benchmarks/generation.py ../shared/data/hh_harmless_base_test.jsonl.gz          # writes generation.csv
    python benchmarks/generation.py PAIRS --num_prompts 16 --num_repeats 2 --output x.csv  # a look
    python benchmarks/generation.py --table                                                # the table of the results

PAIRS is anything `ropo train` reads as text. The model is a Llama made in code: 6.2 million parameters, random weights,
a vocabulary of 4096 learned from the prompts. Such a model hardly ever ends a response, so its head has a bias for the
end, found by trial, that makes responses 45 tokens long on average, with a nearly constant chance to end at each token.

Both ways get the same prompts, draw 8 responses to each, turn them into text, and decode as many rows together, as many
as the engine chooses. What `generate` gets is prompts in the order of the data, padded on the left, with
num_return_sequences=8. Each pair of runs is a row of the CSV; a ratio belongs to its pair, so that whatever slows the
machine down slows both. Tokens are those of the responses, without ends and padding.
"""

import argparse
import csv
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

from ropo import load_pairs
from ropo.data.tokenize import encode_prompts
from ropo.provenance import machine
from ropo.sampling import transformers_engine as in_transformers
from ropo.sampling.call import Caller
from ropo.sampling.engine import Sampling
from ropo.sampling.generate import sample_responses
from ropo.sampling.shared_prompt import choose_decoder

RESULTS = Path(__file__).with_suffix(".csv")
VOCABULARY, MEAN_LENGTH, NUM_CANDIDATES = 4096, 45, 8
SHAPE = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 8}
COLUMNS = (
    "pair", "ours_tokens_per_second", "generate_tokens_per_second", "ratio", "ours_seconds", "generate_seconds",
    "ours_tokens", "generate_tokens", "num_prompts", "mean_prompt_tokens", "longest_prompt_tokens", "num_candidates",
    "num_rows", "max_new_tokens", "mean_response_tokens", "num_parameters", "dtype", "threads", "cores", "device",
    "torch",
)  # fmt: skip


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE learned from the texts."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="</s>")


def make_model() -> LlamaForCausalLM:
    """Random weights, and a head with a bias."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCABULARY, pad_token_id=0, eos_token_id=1, tie_word_embeddings=True, **SHAPE)
    model = LlamaForCausalLM(config).eval()
    head = torch.nn.Linear(config.hidden_size, VOCABULARY)
    head.weight = model.lm_head.weight
    torch.nn.init.zeros_(head.bias)
    model.lm_head = head
    return model


def set_length(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[list[int]], max_new_tokens: int
) -> None:
    """Find the bias with which responses to some prompts are MEAN_LENGTH tokens long on average."""
    bias = model.lm_head.bias.data
    bias[1] = math.log(VOCABULARY / MEAN_LENGTH)
    for seed in range(1000, 1003):
        _, num_tokens = by_engine(model, tokenizer, prompts, max_new_tokens, seed)
        bias[1] += math.log(num_tokens / len(prompts) / NUM_CANDIDATES / MEAN_LENGTH)


def by_engine(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[list[int]],
    max_new_tokens: int,
    seed: int,
) -> tuple[float, int]:
    """Seconds and tokens of the engine."""
    start = time.perf_counter()
    sampling = Sampling(num_candidates=NUM_CANDIDATES, max_new_tokens=max_new_tokens)
    found = sample_responses(model, tokenizer, prompts, sampling, seed=seed)
    return time.perf_counter() - start, sum(sample.num_tokens for sample in found)


def by_generate(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[list[int]],
    max_new_tokens: int,
    seed: int,
) -> tuple[float, int]:
    """Seconds and tokens of `model.generate`, batch by batch in the order of the data, decoded to text like ours."""
    set_seed(seed)
    per_batch, num_tokens = num_rows(model, tokenizer, prompts, max_new_tokens) // NUM_CANDIDATES, 0
    start = time.perf_counter()
    for first in range(0, len(prompts), per_batch):
        batch = prompts[first : first + per_batch]
        width = max(map(len, batch))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in batch], device=model.device)
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in batch], device=model.device)
        with torch.no_grad():
            output = model.generate(
                input_ids=ids,
                attention_mask=mask,
                num_return_sequences=NUM_CANDIDATES,
                max_new_tokens=max_new_tokens,
                do_sample=True,
                temperature=1.0,
                top_p=1.0,
                top_k=0,
                eos_token_id=1,
                pad_token_id=0,
            )
        for row in output[:, width:].tolist():
            response = row[: row.index(1)] if 1 in row else row
            tokenizer.decode(response, skip_special_tokens=True)
            num_tokens += len(response)
    return time.perf_counter() - start, num_tokens


def num_rows(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[list[int]], max_new_tokens: int
) -> int:
    """Rows that both ways decode together."""
    call, longest = Caller(model, tokenizer), max(map(len, prompts)) + max_new_tokens
    with torch.no_grad():
        _, _, num_bytes = choose_decoder(call, prompts[0], longest=longest)
    return in_transformers._num_rows(call, longest, num_bytes, NUM_CANDIDATES)


def table() -> str:
    """One line per setting: both speeds and the ratio, with mean and range over the pairs."""
    with RESULTS.open() as file:
        rows = list(csv.DictReader(file))
    shown = (
        ("ours, tokens/s", "ours_tokens_per_second", ".0f"),
        ("generate, tokens/s", "generate_tokens_per_second", ".0f"),
        ("ratio", "ratio", ".1f"),
    )
    values = []
    for _, column, form in shown:
        found = [float(row[column]) for row in rows]
        values.append(f"{statistics.mean(found):{form}} ({min(found):{form}}-{max(found):{form}})")
    head = " | ".join(name for name, *_ in shown)
    return f"| pairs of runs | {head} |\n|---|---|---|---|\n| {len(rows)} | {' | '.join(values)} |"


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", nargs="?", help="where the prompts come from")
    parser.add_argument("--num_prompts", type=int, default=48, help="prompts spread over the data")
    parser.add_argument("--num_repeats", type=int, default=3, help="pairs of runs; the first runs are not counted")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="longest response")
    parser.add_argument("--max_prompt_tokens", type=int, default=768, help="longer prompts are left out")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch")
    parser.add_argument("--output", type=Path, default=RESULTS, help="the CSV; it is written anew")
    parser.add_argument("--table", action="store_true", help="print the table of the results")
    args = parser.parse_args()
    if args.table:
        print(table())
        return
    torch.set_num_threads(args.threads)
    texts = [str(pair.prompt) for pair in load_pairs(args.pairs).pairs]
    tokenizer, model = make_tokenizer(texts), make_model()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    every = encode_prompts(texts, tokenizer)
    fitting = [ids for ids in every if len(ids) <= args.max_prompt_tokens]
    prompts = fitting[:: max(len(fitting) // args.num_prompts, 1)][: args.num_prompts]
    lengths = [len(ids) for ids in prompts]
    conditions = {
        "num_prompts": len(prompts),
        "mean_prompt_tokens": round(statistics.mean(lengths)),
        "longest_prompt_tokens": max(lengths),
        "num_candidates": NUM_CANDIDATES,
        "num_rows": num_rows(model, tokenizer, prompts, args.max_new_tokens),
        "max_new_tokens": args.max_new_tokens,
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "cores": machine()["cores"],
        "device": machine()["device"],
        "torch": torch.__version__,
    }
    set_length(model, tokenizer, prompts[::3], args.max_new_tokens)
    for way in (by_engine, by_generate):
        way(model, tokenizer, prompts[:2], 8, 0)
    rows: list[dict[str, Any]] = []
    for number in range(args.num_repeats):
        order = (by_engine, by_generate) if number % 2 == 0 else (by_generate, by_engine)
        found = {way: way(model, tokenizer, prompts, args.max_new_tokens, number) for way in order}
        (ours_seconds, ours_tokens), (generate_seconds, generate_tokens) = found[by_engine], found[by_generate]
        speeds = ours_tokens / ours_seconds, generate_tokens / generate_seconds
        rows.append(
            {
                "pair": number,
                "ours_tokens_per_second": round(speeds[0], 1),
                "generate_tokens_per_second": round(speeds[1], 1),
                "ratio": round(speeds[0] / speeds[1], 2),
                "ours_seconds": round(ours_seconds, 2),
                "generate_seconds": round(generate_seconds, 2),
                "ours_tokens": ours_tokens,
                "generate_tokens": generate_tokens,
                "mean_response_tokens": round(ours_tokens / len(prompts) / NUM_CANDIDATES, 1),
                **conditions,
            }
        )
        print({name: rows[-1][name] for name in COLUMNS[:4]}, flush=True)
        with args.output.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
    ratios = [row["ratio"] for row in rows]
    print(f"ratio {statistics.mean(ratios):.2f}, from {min(ratios):.2f} to {max(ratios):.2f} over {len(ratios)} pairs")


if __name__ == "__main__":
    main()
