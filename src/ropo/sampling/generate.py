"""Sample responses to prompts, shard by shard, so that a killed run resumes where it was.

In: a model or an engine, prompts as token ids, a folder for the shards. Out: K responses per prompt, as text, and
whether each ended.

The one idea: prompts are sorted by length and dealt into shards; a finished shard is a file whose name is a digest of
everything that made it, so it is found again, never sampled twice, and of no use to another model or other options.
"""

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ropo.processes import meet
from ropo.progress import Progress
from ropo.provenance import hash_value, write_aside
from ropo.sampling.engine import Advance, Engine, Prompt, Response, Sampling, seeded
from ropo.sampling.transformers_engine import TransformersEngine

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample(Response):
    """One sampled response, and the place of its prompt in the input."""

    prompt: int


def sample_responses(
    model: PreTrainedModel | Engine,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    seed: int = 0,
    folder: Path | None = None,
    model_digest: str | None = None,
    title: str = "Sampling responses",
) -> list[Sample]:
    """Draw responses to prompts.

    The same call gives the same text: each prompt has its own seed (see `engine`), and the global random state is
    neither read nor moved. With several processes each samples its share of the shards and all return everything.

    Args:
        model: A causal language model on its device, or an engine from `engines.open_engine`.
        tokenizer: The model's, for padding and decoding.
        prompts: Token ids of each prompt.
        sampling: How many responses per prompt, how long, and how they are drawn.
        seed: Random seed.
        folder: Where finished shards are kept; None to keep none.
        model_digest: Names the model by its content; needed with `folder`.
        title: Of the progress that is shown.

    Returns:
        `sampling.num_candidates` samples per prompt, in the order of the prompts.

    Raises:
        ValueError: If a prompt is empty, or shards are to be kept without `model_digest`.
    """
    _check(prompts, folder, model_digest)
    if not prompts:
        return []
    engine = TransformersEngine(lambda: model, tokenizer) if isinstance(model, nn.Module) else model
    state = PartialState()
    shards = _deal(seeded(prompts, seed), sampling, engine.tokens_per_shard, num_processes=state.num_processes)
    mine = shards[state.process_index :: state.num_processes]
    files = {} if folder is None else _files(folder, mine, sampling, {**engine.identity, "model": model_digest})
    read = ((number, _read(path, len(mine[number]), sampling)) for number, path in files.items())
    known = {number: responses for number, responses in read if responses}
    if known:
        logger.info("%d of %d shards of samples are read from %s", len(known), len(mine), folder)
    samples: list[tuple[int, int, Sample]] = []
    num_known = sum(len(mine[number]) for number in known)
    with Progress(title, sum(map(len, mine)), unit=" prompts", is_shown=state.is_main_process) as progress:
        progress.skip(num_known)
        advance = _with_rate(progress)
        for number, shard in enumerate(mine):
            sampled = known.get(number) or engine.sample([prompt for _, prompt in shard], sampling, advance)
            if number in files and number not in known:
                _write(files[number], sampled)
            for (place, _), responses in zip(shard, sampled, strict=True):
                samples += [(place, k, Sample(prompt=place, **asdict(one))) for k, one in enumerate(responses)]
    meet()  # one may have been sampling for much longer than the others
    if state.num_processes > 1:
        samples = gather_object(samples)
    return [sample for _, _, sample in sorted(samples, key=lambda item: item[:2])]


def _check(prompts: Sequence[Sequence[int]], folder: Path | None, model_digest: str | None) -> None:
    if folder is not None and not model_digest:
        raise ValueError(
            "sample_responses needs model_digest to keep shards; got none. Pass a digest that changes with the model, "
            "or no folder."
        )
    if empty := [i for i, ids in enumerate(prompts) if not len(ids)]:
        raise ValueError(f"Sampling needs prompts with tokens; got none in prompt {empty[0]}. Leave it out.")


_Shard = list[tuple[int, Prompt]]  # prompts and their places in the input


def _deal(prompts: Sequence[Prompt], sampling: Sampling, tokens_per_shard: int, *, num_processes: int) -> list[_Shard]:
    """Deal prompts into shards of neighbouring lengths and equal cost, the longest first.

    There are as many shards as `tokens_per_shard` asks for, and then some, so that all processes get as many.
    """
    order = sorted(enumerate(prompts), key=lambda item: -len(item[1].ids))
    costs = [sampling.num_candidates * (len(prompt.ids) + sampling.max_new_tokens) for _, prompt in order]
    num_turns = -(-sum(costs) // (tokens_per_shard * num_processes))
    each = -(-sum(costs) // (num_turns * num_processes))
    shards: dict[int, _Shard] = {}
    before = 0
    for item, cost in zip(order, costs, strict=True):
        shards.setdefault((2 * before + cost) // (2 * each), []).append(item)  # where its middle falls
        before += cost
    return list(shards.values())


def _files(folder: Path, shards: Sequence[_Shard], sampling: Sampling, made_by: dict[str, Any]) -> dict[int, Path]:
    """Where each shard is kept, under a digest of everything that makes it."""
    paths = {}
    for number, shard in enumerate(shards):
        prompts = [[list(prompt.ids), prompt.seed] for _, prompt in shard]
        digest = hash_value({"made_by": made_by, "sampling": asdict(sampling), "prompts": prompts})
        paths[number] = folder / f"{digest[:32]}.jsonl"
    return paths


def _write(path: Path, responses: Sequence[Sequence[Response]]) -> None:
    rows = [
        json.dumps({"prompt": i, "candidate": k, **asdict(response)}, ensure_ascii=False)
        for i, candidates in enumerate(responses)
        for k, response in enumerate(candidates)
    ]
    rows.append(json.dumps({"sha256": hash_value(rows)}))
    with write_aside(path) as aside:
        aside.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")


def _read(path: Path, num_prompts: int, sampling: Sampling) -> list[list[Response]] | None:
    """The responses of a finished shard; None if there is none or the file was changed."""
    if not path.exists():
        return None
    responses: list[list[Response]] = [[] for _ in range(num_prompts)]
    try:
        # Not splitlines(): a text may hold characters that it takes for the end of a line.
        *rows, last = path.read_text(encoding="utf-8").split("\n")[:-1]
        for row in map(json.loads, rows if json.loads(last) == {"sha256": hash_value(rows)} else []):
            ids = None if row["ids"] is None else tuple(row["ids"])
            values = {**{name: row[name] for name in Response.__slots__}, "ids": ids}
            responses[row["prompt"]].append(Response(**values))
    except (ValueError, KeyError, IndexError, TypeError):
        responses = []
    if [len(candidates) for candidates in responses] != [sampling.num_candidates] * num_prompts:
        logger.warning("%s is not what was written there; its prompts are sampled again.", path)
        return None
    return responses


def _with_rate(progress: Progress) -> Advance:
    """Count prompts, and show tokens per second beside them."""
    num_tokens, start = 0, time.monotonic()

    def advance(more_prompts: int, more_tokens: int) -> None:
        nonlocal num_tokens
        num_tokens += more_tokens
        progress.advance(more_prompts, f"{num_tokens / max(time.monotonic() - start, 1e-9):.0f} tokens/s")

    return advance
