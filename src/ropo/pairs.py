"""The nouns of the project and the one number all other rooms read.

In: text of a preference pair; summed log-probabilities of its two responses.
Out: `Pair`, `PairLogps`, `PairFeatures`, and `margin`, the implicit-reward margin h of each pair.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

Messages = list[dict[str, Any]]
Text = str | Messages  # plain text, or a conversation in the `{"role": ..., "content": ...}` form


def pair_id(prompt: Text, first: Text, second: Text) -> str:
    """Name a pair by its content, whichever response is called chosen.

    Args:
        prompt: The prompt.
        first: One response.
        second: The other response; the order of the two does not matter.

    Returns:
        16 hexadecimal digits. The same text gives the same id in every run and on every machine.

    Examples:
        >>> pair_id("Hi", "a", "b") == pair_id("Hi", "b", "a")
        True
        >>> pair_id("Hi", "a", "b") == pair_id("Ho", "a", "b")
        False
    """
    responses = sorted(json.dumps(response, sort_keys=True) for response in (first, second))
    content = json.dumps([prompt, *responses], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def said(message: Mapping[str, Any]) -> str:
    """What a message says, for people: its content, then its tool calls as JSON.

    Examples:
        >>> said({"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "weather"}}]})
        '{"tool_calls": [{"function": {"name": "weather"}}]}'
    """
    calls = message.get("tool_calls")
    parts = [str(message.get("content") or "")]
    if calls:
        parts.append(json.dumps({"tool_calls": calls}, ensure_ascii=False, default=str))
    return "\n".join(filter(None, parts))


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One preference: for `prompt`, somebody preferred `chosen` to `rejected` (perhaps wrongly).

    Attributes:
        prompt: What both responses answer.
        chosen: The response that the label calls better.
        rejected: The response that the label calls worse.
        row: Place in the input, counted from 0 over rows (not over lines of text). A resampled pair
            carries the row of the pair whose prompt it answers.
        origin: "data" for a pair that was read, "trusted" for one that is known to be right, "resampled" for one that
            we made.
        annotator: Who labelled the pair, if the data says so.
        weight: Weight that the data gives the pair, 0 or more; 1 when it gives none.
        verdict: What a person has said about the label: "right", "wrong", "drop", or None for nothing.
        is_vouched: Whether the verdict is that of a trusted pair, which was chosen for being right.
        source: Dataset and row in it, such as "b.jsonl:3", where several are mixed and `row` counts on through all.
        parent_id: Id of the pair whose prompt a resampled pair answers; None for others.
        id: `pair_id` of the three texts; computed when not given.
    """

    prompt: Text
    chosen: Text
    rejected: Text
    row: int
    origin: str = "data"
    annotator: str | None = None
    weight: float = 1.0
    verdict: str | None = None
    is_vouched: bool = False
    source: str | None = None
    parent_id: str | None = None
    id: str = field(default="")

    def __post_init__(self) -> None:
        if not self.id:
            object.__setattr__(self, "id", pair_id(self.prompt, self.chosen, self.rejected))

    @property
    def place(self) -> str:
        """Where it was read, for messages."""
        return f"row {self.row}" + (f" ({self.source})" if self.source else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class PairLogps:
    """Log-probability of each response of each pair under one model, summed over response tokens.

    Attributes:
        chosen: Shape (pairs,), nats.
        rejected: Shape (pairs,), nats.
        chosen_tokens: Shape (pairs,), number of tokens summed into `chosen`; only losses that work
            per token need it.
        rejected_tokens: Likewise for `rejected`.

    Raises:
        ValueError: If a tensor is not one-dimensional or the shapes differ.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_tokens: Tensor | None = None
    rejected_tokens: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("chosen", "rejected", "chosen_tokens", "rejected_tokens"):
            value = getattr(self, name)
            if value is None:
                continue
            if value.ndim != 1:
                raise ValueError(
                    f"PairLogps.{name} needs shape (pairs,); got {tuple(value.shape)}. "
                    "Per-token log-probs? Sum them first."
                )
            if value.shape != self.chosen.shape:
                raise ValueError(
                    f"PairLogps.{name} needs one value per pair, {len(self.chosen)}; got {len(value)}. "
                    "Chosen and rejected must come from the same pairs."
                )

    def __len__(self) -> int:
        return len(self.chosen)

    def detach(self) -> "PairLogps":
        """The same numbers without gradients."""
        return replace(self, chosen=self.chosen.detach(), rejected=self.rejected.detach())

    def __getitem__(self, index: Any) -> "PairLogps":
        """Select pairs with a slice, a list of positions or a tensor."""
        return PairLogps(
            chosen=self.chosen[index],
            rejected=self.rejected[index],
            chosen_tokens=None if self.chosen_tokens is None else self.chosen_tokens[index],
            rejected_tokens=None if self.rejected_tokens is None else self.rejected_tokens[index],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PairFeatures:
    """Numbers that a model gives each pair, chosen minus rejected: swapping the two changes every sign.

    Attributes:
        blocks: By name, each of shape (pairs, numbers), float32. `ropo.logps.features` says what they are.

    Raises:
        ValueError: If there is no block, one is not two-dimensional, or they hold different numbers of pairs.
    """

    blocks: Mapping[str, np.ndarray]

    def __post_init__(self) -> None:
        shapes = {name: block.shape for name, block in self.blocks.items()}
        if len({shape[:1] for shape in shapes.values()}) != 1 or any(len(shape) != 2 for shape in shapes.values()):
            raise ValueError(
                f"PairFeatures needs blocks of shape (pairs, numbers), all of the same pairs; got {shapes}."
            )

    def __len__(self) -> int:
        return len(next(iter(self.blocks.values())))


def margin(policy: PairLogps, reference: PairLogps, *, beta: float) -> Float[Tensor, " pairs"]:
    """Implicit-reward margin of each pair: how much more the policy prefers `chosen` than the reference does.

    ::

        h = β·{[log π(y_w|x) − log π_ref(y_w|x)] − [log π(y_l|x) − log π_ref(y_l|x)]}   (arXiv:2305.18290, eq. 7)

    σ(h) is the probability that the policy gives to the label being right.

    Args:
        policy: Log-probabilities under the model in training.
        reference: Log-probabilities under the frozen model, same pairs in the same order.
        beta: Strength of the pull to the reference, per nat. Usual 0.01-0.5.

    Returns:
        The margin h, a log-odds in nats.

    Raises:
        ValueError: If the two hold a different number of pairs; torch would silently broadcast 1 against 3.

    Examples:
        >>> import torch
        >>> policy = PairLogps(chosen=torch.tensor([-12.0]), rejected=torch.tensor([-13.5]))
        >>> reference = PairLogps(chosen=torch.tensor([-12.5]), rejected=torch.tensor([-12.8]))
        >>> round(margin(policy, reference, beta=0.1).item(), 6)
        0.12
    """
    if len(policy) != len(reference):
        raise ValueError(
            f"margin needs the same pairs from policy and reference; got {len(policy)} and {len(reference)}. "
            "Score both models on one batch."
        )
    return beta * ((policy.chosen - reference.chosen) - (policy.rejected - reference.rejected))


def margin_per_token(policy: PairLogps, *, beta: float) -> Float[Tensor, " pairs"]:
    """Reference-free margin of mean log-probabilities per token.

    ::

        m = β·[log π(y_w|x)/|y_w| − log π(y_l|x)/|y_l|]                                  (arXiv:2405.14734, eq. 4)

    Args:
        policy: Log-probabilities under the model in training, with token counts.
        beta: Scale of the reward. SimPO uses 2-2.5.

    Returns:
        The margin m, in nats.

    Raises:
        ValueError: If the token counts are missing.
    """
    if policy.chosen_tokens is None or policy.rejected_tokens is None:
        raise ValueError(
            "margin_per_token needs PairLogps with token counts; got none. Pass chosen_tokens and rejected_tokens."
        )
    return beta * (policy.chosen / policy.chosen_tokens - policy.rejected / policy.rejected_tokens)
