"""From logits and noise to the next tokens: pure functions, the same on every device.

In: logits of the next token, noise of the row. Out: token ids.

The one idea: all random numbers are drawn beforehand, one integer per token of a response, from a generator of the
prompt. A token then follows by inverting the distribution function in whole numbers, which no device rounds.

Shapes: B rows, V vocabulary, K candidates, N new tokens.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

_WEIGHT_BITS, _NOISE_BITS = 32, 30  # their product must fit into 63 bits
_PROMISING = 256  # tokens that are looked at first when top_p cuts the tail off
_MAX_LOGITS = 2**26  # drawn from at once; more are cut into pieces of rows


def draw_noise(seed: int, *, num_candidates: int, max_new_tokens: int) -> Int[Tensor, "candidates tokens"]:
    """All random numbers that one prompt needs.

    Returns:
        Whole numbers, uniform in [0, 2³⁰), on the CPU.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2**_NOISE_BITS, (num_candidates, max_new_tokens), generator=generator, dtype=torch.int32)


def choose_tokens(
    logits: Float[Tensor, "rows vocabulary"], noise: Int[Tensor, " rows"], *, temperature: float, top_p: float
) -> Int[Tensor, " rows"]:
    """Draw one token per row.

    ::

        w_v = ⌊2³²·softmax(logits/temperature)_v⌋,   W_v = w_1 + … + w_v,   token = min {v : W_v > ⌊noise·W_V/2³⁰⌋}

    A token of probability p is drawn with a probability within 2⁻³⁰ of p; one below 2⁻³² is never drawn.

    Args:
        logits: Of the next token, any floating type.
        noise: Whole numbers uniform in [0, 2³⁰).
        temperature: Divides the logits.
        top_p: Tokens are drawn from the likeliest ones that together reach this probability.

    Returns:
        Token ids; −1 where the logits are not numbers.
    """
    piece = max(_MAX_LOGITS // logits.shape[1], 1)
    parts = zip(logits.split(piece), noise.split(piece), strict=True)
    return torch.cat([_choose(logits_BV, noise_B, temperature, top_p) for logits_BV, noise_B in parts])


def _choose(logits_BV: Tensor, noise_B: Tensor, temperature: float, top_p: float) -> Tensor:
    probs_BV = (logits_BV.float() / temperature).softmax(dim=-1)
    is_broken_B = probs_BV[:, 0].isnan()  # one logit that is not a number makes the whole row so
    if top_p < 1:
        weights_BV, ids_BV = _likeliest(probs_BV, top_p)
    else:  # in the order of the vocabulary: any order will do
        weights_BV, ids_BV = _weights(probs_BV), None
    cumulative_BV = weights_BV.cumsum(dim=-1)
    target_B = (noise_B.long() * cumulative_BV[:, -1]) >> _NOISE_BITS
    # Never past the last place, but for logits that are no numbers; a GPU does not forgive an index out of bounds.
    place_B = (cumulative_BV <= target_B[:, None]).sum(dim=-1).clamp(max=cumulative_BV.shape[1] - 1)
    tokens_B = place_B if ids_BV is None else ids_BV.gather(1, place_B[:, None]).squeeze(1)
    return torch.where(is_broken_B, -1, tokens_B)


def _weights(probs_BV: Tensor) -> Tensor:
    weights_BV: Tensor = (probs_BV * 2**_WEIGHT_BITS).long()
    return weights_BV


def _likeliest(probs_BV: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """Falling weights, 0 past the token with which they reach `top_p`, and the tokens they belong to."""
    size, threshold = min(_PROMISING, probs_BV.shape[1]), max(1, int(top_p * 2**_WEIGHT_BITS))
    values_BV, ids_BV = probs_BV.topk(size, dim=-1)
    if size < probs_BV.shape[1] and not bool((_weights(values_BV).sum(dim=-1) >= threshold).all()):
        values_BV, ids_BV = probs_BV.sort(dim=-1, descending=True)
    weights_BV = _weights(values_BV)
    before_BV = weights_BV.cumsum(dim=-1) - weights_BV
    return weights_BV * (before_BV < threshold), ids_BV
