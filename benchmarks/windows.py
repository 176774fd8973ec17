"""What shared prompts save in a model with sliding windows: the layouts of one Gemma-3-like model, in turn.

    python benchmarks/windows.py            # measures and prints the table of docs/performance.md

Each turn takes one training step (forward and backward) in each layout on the same pairs, in an order that changes from
turn to turn; printed are the median and range over the turns, and the ratio to the plain layout of the same turn.
"""

import statistics
import time
from typing import Any

import numpy as np
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from ropo.data.tokenize import TokenizedPair
from ropo.logps.batch import LAYOUTS
from ropo.logps.choose import choose_layout
from ropo.logps.shared_prefix import FORWARDS, enable_response_logps
from ropo.logps.tree_attention import NAME

_VOCABULARY, _NUM_PAIRS, _TURNS = 32_768, 8, 5
_WAYS = ("plain", "plain_rows", "shared_prefix", "packed")


def make_model(window: int) -> Any:
    """Six layers of width 256, every third with full attention, logits of 32,768 words."""
    kinds = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    config = Gemma3TextConfig(
        vocab_size=_VOCABULARY, hidden_size=256, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=1, head_dim=64, sliding_window=window, layer_types=kinds,
    )  # fmt: skip
    torch.manual_seed(0)
    return Gemma3ForCausalLM(config).eval()


def make_pairs() -> list[TokenizedPair]:
    """Pairs of about 350 tokens, prompt and longer response together."""
    rng = np.random.default_rng(0)
    sizes = [(int(rng.integers(180, 280)), *(int(n) for n in rng.integers(60, 120, 2))) for _ in range(_NUM_PAIRS)]
    parts = [[rng.integers(3, _VOCABULARY, size).astype(np.int32) for size in three] for three in sizes]
    return [TokenizedPair(prompt=prompt, chosen=chosen, rejected=rejected) for prompt, chosen, rejected in parts]


def step_seconds(model: Any, pairs: list[TokenizedPair], way: str) -> float:
    """One training step without the optimizer's."""
    model.config._attn_implementation = NAME if way == "packed" else "sdpa"
    batch = LAYOUTS[way](pairs, pad_token_id=0)
    model.zero_grad()
    start = time.perf_counter()
    logps = FORWARDS[way](model, batch)
    (logps.rejected - logps.chosen).sum().backward()
    return time.perf_counter() - start


def main() -> None:
    """Measure and print."""
    pairs = make_pairs()
    print("| window | layout | pairs/s | to plain |\n|---|---|---|---|")
    for window in (512, 128):
        model = make_model(window)
        layout, reason = choose_layout(model, pairs, pad_token_id=0, is_trained=True)
        if layout != "packed":
            raise RuntimeError(f"packed rows cannot be measured: {reason}")
        enable_response_logps(model)
        seconds: dict[str, list[float]] = {way: [] for way in _WAYS}
        for turn in range(_TURNS + 1):
            for way in (*_WAYS[turn % 4 :], *_WAYS[: turn % 4]):
                found = step_seconds(model, pairs, way)
                if turn:  # the first one warms up
                    seconds[way].append(found)
        for way in _WAYS:
            rates = [_NUM_PAIRS / one for one in seconds[way]]
            ratios = [plain / one for plain, one in zip(seconds["plain"], seconds[way], strict=True)]
            cells = " | ".join(f"{statistics.median(x):.2g} ({min(x):.2g}-{max(x):.2g})" for x in (rates, ratios))
            print(f"| {window} | {way.replace('_', ' ')} | {cells} |")


if __name__ == "__main__":
    main()
