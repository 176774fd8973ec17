"""What to say when a training step fails: which pairs or weights are not finite, what fits into less memory.

In: the model and the batch that failed. Out: a message that says what to change.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ropo.logps.batch import Batch
from ropo.models.files import not_finite
from ropo.pairs import Pair


def check_finite(model: nn.Module, loss: Tensor, pairs: Sequence[Pair], positions: Tensor, *, step: int) -> None:
    """Stop at the first loss that is not finite.

    Args:
        model: In training.
        loss: Of each pair of the batch.
        pairs: All pairs of the dataset.
        positions: Of the pairs of the batch in `pairs`.
        step: Optimizer steps done.

    Raises:
        FloatingPointError: If a loss is not finite; the message names the weights or, if these are, the pairs.
    """
    if bool(torch.isfinite(loss).all()):
        return
    if names := not_finite(model):
        remedy = "Lower the learning rate, or use bf16 instead of fp16" if step else "Take another copy of it"
        raise FloatingPointError(f"The model has NaN or infinity in {names} at step {step}. {remedy}.")
    where = positions[~torch.isfinite(loss)].tolist()
    names = ", ".join(f"{pairs[i].place} (pair {pairs[i].id})" for i in where[:10])
    raise FloatingPointError(
        f"The loss is not finite for {names} at step {step}. Lower the learning rate, use bf16 instead of fp16, or "
        "look at these pairs with `ropo validate`."
    )


def how_to_save_memory(pieces: Sequence[Batch], *, needs_whole_batch: bool, is_sharded: bool) -> str:
    """What to change when the largest piece of a batch does not fit, in a few sentences.

    Args:
        pieces: Of the batch that failed.
        needs_whole_batch: Whether the loss sees all pairs of a step at once.
        is_sharded: Whether processes gather weights for each other, so that no batch is taken in pieces.
    """
    tokens = max(piece["input_ids"].numel() for piece in pieces)
    text = f"Training ran out of the device's memory in a forward and backward pass over {tokens:,} tokens. "
    if max(len(piece["position"]) for piece in pieces) == 1:
        return text + "It was a single pair: lower max_length, use bf16 and activation_checkpointing, or use_peft."
    if not (needs_whole_batch or is_sharded):
        text += f"Set max_tokens_per_batch to {tokens // 2} or less: a step and its loss stay the same. "
    elif needs_whole_batch:
        text += "This loss sees the pairs of a step at once: lower max_length, or share the step among more processes. "
    else:
        text += "Halve per_device_train_batch_size and double gradient_accumulation_steps. "
    return text + "Or use bf16, activation_checkpointing or use_peft."
