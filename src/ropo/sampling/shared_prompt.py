"""The fast decoder: each prompt is read once for all its candidates, and new rows take the places of ended ones.

In: a job. Out: responses as they end, the same as `ask_generate` gives up to rounding.

The one idea: all rows stand at the right end of one cache, so whatever their lengths they write the same column next. A
row can then leave, and those of a new prompt can enter, by copying the cache once. Which models allow this is found out
by comparing with the plain forward (`choose_decoder`), not by a list of names.

Add a decoder: write a function `Job -> Ended` and add a line to DECODERS.

Shapes: B rows, T positions, V vocabulary, N new tokens.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from ropo.logps.shared_prefix import has_exact_products
from ropo.sampling.call import Caller, Ended, Job
from ropo.sampling.growing_cache import bytes_per_token, new_cache, regroup
from ropo.sampling.plain_generate import ask_forward, ask_generate, ask_generate_alone, generated_both_ways

_SPARE_COLUMNS = 64  # columns that the cache can grow by before it is copied
_LEAVE_SHARE = 4  # rows are regrouped when one in so many has ended; before, copying costs more than their idle steps
_REFUSALS = (TypeError, ValueError, RuntimeError, KeyError, AttributeError, IndexError)  # of a model that is called
_BATCH_DEPENDENT_ROPE = {"dynamic", "longrope"}  # a row's positions follow from the longest row of its batch


def share_prompts(job: Job) -> Ended:
    """Sample with one forward per prompt and a batch that is filled up as rows end."""
    waiting, num_candidates = deque(job.places), job.sampling.num_candidates
    flight = _Flight(job)
    while waiting or flight.num_rows:
        num_free = (job.num_rows - flight.num_rows + flight.num_done) // num_candidates
        yield from flight.regroup([waiting.popleft() for _ in range(min(num_free, len(waiting)))])
        while not flight.is_due:
            flight.step()


@dataclass(slots=True)
class _Row:
    """One response in the making, as it stood when rows were last regrouped."""

    place: int
    candidate: int
    num_columns: int  # of it in the cache: its prompt and all its tokens but the last
    drawn: list[int]


@dataclass(frozen=True, slots=True)
class _Entering:
    """Rows of prompts just read, their state, and a cache with one row per prompt."""

    rows: list[_Row]
    state: dict[str, Tensor]
    cache: Cache


class _Flight:
    """Rows that are decoded together.

    A row that has ended stays in the batch until it leaves, at the same position; what it computes is not read.
    """

    def __init__(self, job: Job) -> None:
        self._job, self._device = job, job.call.device
        self._stop = torch.tensor(job.stop_ids, dtype=torch.long, device=self._device)
        self._num_spare = min(_SPARE_COLUMNS, job.sampling.max_new_tokens)
        self._cache = new_cache()
        self._rows: list[_Row] = []
        self._since: list[Tensor] = []  # tokens drawn in each step since rows were regrouped
        self._width = 0
        self._mask_BT = torch.zeros(0, 0)
        # Of each row: last token, its position, number of tokens drawn, their limit, noise, whether it has ended.
        self._state: dict[str, Tensor] = {}
        self.num_done = 0

    @property
    def num_rows(self) -> int:
        """Rows in the batch, ended or not."""
        return len(self._rows)

    @property
    def is_due(self) -> bool:
        """Whether rows are to be regrouped before the next step."""
        return self.num_done * _LEAVE_SHARE >= self.num_rows or len(self._since) == self._num_spare

    def step(self) -> None:
        """Draw one token for every row."""
        state, seen = self._state, self._width + len(self._since) + 1
        logits_BV = self._job.call(
            state["last"][:, None], self._mask_BT[:, :seen], state["position"][:, None], self._cache
        )
        where_B = state["count"].clamp(max=state["noise"].shape[1] - 1)
        state["last"] = self._job.choose(logits_BV, state["noise"].gather(1, where_B[:, None]).squeeze(1))
        is_open_B = ~state["has_ended"]
        state["position"] = state["position"] + is_open_B
        state["count"] = state["count"] + is_open_B
        state["has_ended"] = state["has_ended"] | self._ends(state)
        self._since.append(state["last"])
        self._look()

    def _ends(self, state: Mapping[str, Tensor]) -> Tensor:
        return (state["last"][:, None] == self._stop).any(dim=1) | (state["count"] >= state["most"])

    def _look(self) -> None:
        """Read from the device, at one go, what the host must know before the next step."""
        counts = torch.stack([self._state["has_ended"].sum(), (self._state["last"] < 0).sum()])
        self.num_done, num_broken = counts.tolist()
        self._job.check(num_broken, self.num_rows)

    def regroup(self, enters: Sequence[int]) -> Ended:
        """Remove rows that have ended and add those of new prompts.

        Args:
            enters: Places of prompts, longest first.

        Yields:
            The responses of the rows that leave.
        """
        steps = torch.stack(self._since, dim=1).tolist() if self._since else [[] for _ in self._rows]
        has_ended = self._state["has_ended"].tolist() if self._rows else []
        stays = []
        for i, (row, tokens) in enumerate(zip(self._rows, steps, strict=True)):
            row.drawn += tokens
            row.num_columns += len(tokens)
            if has_ended[i]:
                yield row.place, row.candidate, row.drawn
            else:
                stays.append(i)
        entering = [self._read(places) for places in self._parts(enters)]
        self._rows = [self._rows[i] for i in stays] + [row for group in entering for row in group.rows]
        self._since = []
        if not self._rows:
            self._cache, self._state, self.num_done = new_cache(), {}, 0
            return
        stays_B = torch.tensor(stays, dtype=torch.long, device=self._device)
        states = [{name: tensor[stays_B] for name, tensor in self._state.items()}] if stays else []
        states += [group.state for group in entering]
        self._state = {name: torch.cat([state[name] for state in states]) for name in states[0]}
        self._width = max(row.num_columns for row in self._rows)
        regroup(
            self._cache,
            stays_B,
            [group.cache for group in entering],
            repeats=self._job.sampling.num_candidates,
            width=self._width,
            num_spare=self._num_spare,
        )
        pads_B1 = torch.tensor([[self._width - row.num_columns] for row in self._rows], device=self._device)
        self._mask_BT = (torch.arange(self._width + self._num_spare, device=self._device) >= pads_B1).long()
        self._look()

    def _parts(self, places: Sequence[int]) -> Iterator[Sequence[int]]:
        """Prompts that are read at once."""
        start = 0
        while start < len(places):
            size = self._job.call.prompts_per_read(len(self._job.prompts[places[start]].ids))
            yield places[start : start + size]
            start += size

    def _read(self, places: Sequence[int]) -> _Entering:
        """Read prompts and draw the first token of every candidate."""
        job, num_candidates = self._job, self._job.sampling.num_candidates
        lengths = [len(job.prompts[i].ids) for i in places]
        cache = new_cache()
        logits_BV = job.call.read([job.prompts[i].ids for i in places], cache).repeat_interleave(num_candidates, dim=0)
        noise_BN = job.noise(places)
        values = {"position": lengths, "count": [1] * len(places), "most": [job.most[i] for i in places]}
        state = {
            name: torch.tensor(value, device=self._device).repeat_interleave(num_candidates)
            for name, value in values.items()
        }
        state |= {"noise": noise_BN, "last": job.choose(logits_BV, noise_BN[:, 0])}
        state["has_ended"] = self._ends(state)
        first = iter(state["last"].tolist())
        rows = [
            _Row(place, candidate, length, [next(first)])
            for place, length in zip(places, lengths, strict=True)
            for candidate in range(num_candidates)
        ]
        return _Entering(rows, state, cache)


def choose_decoder(call: Caller, ids: Sequence[int], *, longest: int) -> tuple[str, str, int]:
    """Find out how a model may be decoded, by comparing with the plain forward.

    Args:
        call: The model.
        ids: A prompt.
        longest: Most tokens that a prompt and its response will have.

    Returns:
        A name in DECODERS, the reason in a few words, and the bytes of the cache per token (0 if not known).
    """
    text = [ids[i % len(ids)] for i in range(20)]
    call.first_position = _first_position(call, text)
    obstacle = _obstacle(call, longest=longest)
    if obstacle is None:
        try:
            cached_BV, plain_BV, num_bytes = _both_ways(call, text)
        except _REFUSALS as error:
            obstacle = f"the model does not take our cache ({type(error).__name__}: {str(error)[:120]})"
        else:
            off, agrees = _compared(call, cached_BV, plain_BV)
            if agrees:
                return "share_prompts", f"it agrees with the plain forward to {off:.1e} nats", num_bytes
            obstacle = f"our cache changes this model's log-probabilities by up to {off:.3g} nats"
    name, more = _way_to_generate(call, text)
    return name, obstacle + more, 0


def _way_to_generate(call: Caller, text: Sequence[int]) -> tuple[str, str]:
    """Whether `generate` may draw several rows at once, or one, or none; and why not several."""
    off = []
    for name, starts in (("generate", (0, 5)), ("generate_alone", (0,))):
        try:
            both = generated_both_ways(call, [text[start : start + 11] for start in starts], num_read=8)
        except _REFUSALS:  # it is met again, where it can be told
            return "generate", ""
        difference, agrees = _compared(call, *both)
        off.append(difference)
        if agrees:
            return name, f"; in a batch, `generate` is off by {off[0]:.3g} nats" if name == "generate_alone" else ""
    return "forward", f"; `generate` is off by {off[-1]:.3g} nats, so every token reads its text anew"


def _compared(call: Caller, found_BV: Tensor, plain_BV: Tensor) -> tuple[float, bool]:
    """Largest difference in nats, and whether it is no more than rounding."""
    # Minus infinity on both sides is agreement.
    difference_BV = torch.where(found_BV == plain_BV, 0.0, (found_BV - plain_BV).abs())
    # A wrong mask or position shifts a log-probability by nats; rounding in half precision by a per cent or so.
    is_exact = has_exact_products(call.model) and not torch.is_autocast_enabled(call.device.type)
    relative, absolute = (1e-4, 1e-3) if is_exact else (2e-2, 0.5)
    return float(difference_BV.max()), bool((difference_BV <= absolute + relative * plain_BV.abs()).all())


def _first_position(call: Caller, text: Sequence[int]) -> int:
    """The position that the model gives the first token: RoBERTa and its kind count on from their padding."""
    after_padding = (getattr(call.config, "pad_token_id", None) or 0) + 1

    def off(first: int) -> float:
        """By how many nats the model says something else than with positions of its own."""
        call.first_position = first
        return float((call.read([text], None).log_softmax(dim=-1) - plain_BV).nan_to_num().abs().max())

    try:
        plain_BV = call.plain(text).log_softmax(dim=-1)
        # Where positions are relative, any start agrees but for rounding.
        return after_padding if 10 * off(after_padding) < off(0) else 0
    except _REFUSALS:
        return 0  # whatever it is, it is met again


def _obstacle(call: Caller, *, longest: int) -> str | None:
    """What rules `share_prompts` out before it is tried, in a few words, or None."""
    if getattr(getattr(call.model, "active_peft_config", None), "is_prompt_learning", False):
        return "prompt learning puts virtual tokens before the prompt"
    try:
        kinds = {type(layer) for layer in DynamicCache(config=call.causal_lm.config).layers}
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        return f"the model has no ordinary cache ({type(error).__name__})"
    if not kinds <= {DynamicLayer, DynamicSlidingWindowLayer}:
        return "the model remembers something else than keys and values"
    chunk = getattr(call.config, "attention_chunk_size", None)
    if chunk is not None and chunk < longest:
        return f"the model attends to chunks of {chunk} tokens, which do not move with a row"
    rope = getattr(call.config, "rope_parameters", None) or {}
    if {part.get("rope_type") for part in (rope, *rope.values()) if isinstance(part, dict)} & _BATCH_DEPENDENT_ROPE:
        return "the model's positions depend on the longest row of a batch"
    return None


def _both_ways(call: Caller, text: Sequence[int]) -> tuple[Tensor, Tensor, int]:
    """Log-probabilities by way of the cache and by the plain forward, each (B, V), and bytes of the cache per token.

    Rows of different lengths are read, doubled, continued, regrouped with a new one, and continued again.
    """
    long, short, late = list(text[:12]), list(text[3:8]), list(text[1:10])
    cache, read, read_late = new_cache(), new_cache(), new_cache()
    call.read([long, short], read)
    call.read([late], read_late)
    regroup(cache, torch.zeros(0, dtype=torch.long), [read], repeats=2, width=12, num_spare=1)
    rows = [[*row, text[12 + i]] for i, row in enumerate([long, long, short, short])]
    cached, plain = [_continued(call, rows, cache)], [call.plain(row) for row in rows]
    regroup(cache, torch.tensor([1, 2]), [read_late], repeats=2, width=13, num_spare=1)
    rows = [[*row, text[16 + i]] for i, row in enumerate([rows[1], rows[2], late, late])]
    cached.append(_continued(call, rows, cache))
    plain += [call.plain(row) for row in rows]
    return torch.cat(cached).log_softmax(dim=-1), torch.cat(plain).log_softmax(dim=-1), bytes_per_token(read)


def _continued(call: Caller, rows: Sequence[Sequence[int]], cache: Cache) -> Tensor:
    """Logits after the last token of each row; the tokens before it are in the cache."""
    ids_BT, mask_BT = call.left_padded(rows)
    missing = cache.get_seq_length() + 1 - mask_BT.shape[1]
    mask_BT = torch.nn.functional.pad(mask_BT, (missing, 0))
    return call(ids_BT[:, -1:], mask_BT, mask_BT.sum(dim=1, keepdim=True) - 1, cache)


DECODERS: Mapping[str, Callable[[Job], Ended]] = MappingProxyType(
    {
        "share_prompts": share_prompts,
        "generate": ask_generate,
        "generate_alone": ask_generate_alone,
        "forward": ask_forward,
    }
)
