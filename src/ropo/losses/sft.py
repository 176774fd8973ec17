"""What may be added to any loss: the chosen response as a target of its own.

In: log-probabilities under the policy. Out: the term of each pair, not reduced.
"""

from jaxtyping import Float
from torch import Tensor

from ropo.pairs import PairLogps


def sft(policy: PairLogps) -> Float[Tensor, " pairs"]:
    """Negative log-likelihood of the chosen response, per token.

    ::

        L = −log π(y_w|x)/|y_w|                                               (arXiv:2404.19733, eq. 1, its second part)

    The mean is over the tokens of one response, then over pairs, so that a step is the same however it is divided into
    batches. TRL's `sft` takes the mean over all tokens of a batch, where long responses count more; for batches of one
    pair the two are equal. The paper's outputs are a chain of thought with its answer, here the response.

    Args:
        policy: Log-probabilities under the model in training, with token counts.

    Returns:
        Nats per token. It does not depend on which response is better, so a flipped label trains on the worse one.

    Raises:
        ValueError: If the token counts are missing.
    """
    if policy.chosen_tokens is None:
        raise ValueError("sft needs PairLogps with token counts; got none. Pass chosen_tokens.")
    return -policy.chosen / policy.chosen_tokens
