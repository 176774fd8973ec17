"""The plain forward: two rows per pair, all logits, one gather. Obvious, slow, and the judge of the fast one.

In: a causal language model and a `plain_batch`. Out: `PairLogps`.

Shapes: B rows, T positions, V vocabulary, N response tokens.
"""

import torch
from torch import Tensor, nn

from ropo.logps.batch import Batch
from ropo.pairs import PairLogps


def plain_logps(model: nn.Module, batch: Batch) -> PairLogps:
    """Summed log-probability of every response, computed from the model's own logits.

    ::

        log π(y|x) = Σ_t log softmax(logits_{t−1})[y_t]          over the response tokens only

    Args:
        model: Any causal language model of `transformers`, wrapped or not.
        batch: What `plain_batch` returns, on the model's device.

    Returns:
        Log-probabilities in float32 with token counts; carries gradients when they are enabled.
    """
    logits_NV = plain_logits(model, batch)
    logps_N = torch.log_softmax(logits_NV, dim=-1).gather(1, batch["target"][:, None]).squeeze(1)
    return sum_by_response(logps_N, batch["response"], num_pairs=len(batch["input_ids"]) // 2)


def plain_logits(model: nn.Module, batch: Batch) -> Tensor:
    """The model's own logits where a response token is predicted, shape (N, V), float32; arguments of `plain_logps`."""
    logits_BTV = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    found: Tensor = of_tokens(logits_BTV, batch).flatten(0, 1)[batch["source"]].float()
    return found


def of_tokens(values_BTX: Tensor, batch: Batch) -> Tensor:
    """What a model puts out at the tokens of a plain batch, before which an adapter may put virtual ones."""
    return values_BTX[:, -batch["input_ids"].shape[1] :]


def sum_by_response(logps_N: Tensor, response_N: Tensor, *, num_pairs: int) -> PairLogps:
    """Add up token log-probabilities per response.

    Args:
        logps_N: Log-probability of each response token, shape (N,).
        response_N: Owner of each token, shape (N,): 2·pair for chosen, 2·pair + 1 for rejected.
        num_pairs: Number of pairs in the batch.

    Returns:
        Sums in float32 and token counts.
    """
    logps_N = logps_N.float()
    sums = logps_N.new_zeros(2 * num_pairs).index_add(0, response_N, logps_N)
    # Not `bincount`, which waits for the device to learn how long its result is.
    counts = torch.zeros_like(sums, dtype=torch.long).index_add(0, response_N, torch.ones_like(response_N))
    return PairLogps(chosen=sums[0::2], rejected=sums[1::2], chosen_tokens=counts[0::2], rejected_tokens=counts[1::2])
