"""A reward model as judge: two rewards per pair, and the probability that follows from their difference.

In: a sequence classifier with one label, pairs. Out: σ(r_chosen − r_rejected).
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ropo.data.problems import rows_left_out
from ropo.data.tokenize import TokenizedPair, tokenize_pairs
from ropo.judge.answer_cache import Answers
from ropo.logps.batch import batches_by_length, plain_batch
from ropo.logps.cache import reference_hash
from ropo.models.digest import at_commit
from ropo.models.files import (
    TOKENIZER_SETTINGS,
    ModelKind,
    check_json,
    explained,
    for_config,
    load_whole,
    make_skeleton,
    not_finite,
)
from ropo.models.fit import check_ids, ids_of
from ropo.models.sharding import whole_models
from ropo.pairs import Pair
from ropo.progress import Progress
from ropo.provenance import hash_value

logger = logging.getLogger(__name__)

_MAX_POSITIONS = {"cpu": 4096, "cuda": 32768}  # of a batch; small ones stay in a CPU's cache, a GPU wants to be filled


_PLACE = "A reward model needs a folder or hub id with safetensors weights, a tokenizer and no code of its own"


def _check_config(config: PretrainedConfig, name_or_path: str) -> None:
    if config.num_labels != 1:
        raise ValueError(
            f"A reward model needs one label; got {name_or_path!r} with num_labels={config.num_labels}. Name a "
            "sequence classifier trained on preferences."
        )


_REWARD_MODEL = ModelKind(
    auto_class=lambda _: AutoModelForSequenceClassification,
    noun="A reward model",
    place=_PLACE,
    check=_check_config,
    advice="Name a sequence classifier trained on preferences.",
)


class RewardModelJudge:
    """A reward model: σ(r_chosen − r_rejected), the Bradley-Terry probability that `chosen` is better.

    Reads a pair as training does: conversations by the chat template, plain text as prompt and response in one with an
    end-of-sequence token. A pair that does not fit into the model's context as a whole gets None.

    Args:
        name_or_path: Folder or hub id of a sequence classifier with one label, as safetensors. Code that comes with it
            is never run.
        folder: Where answers are kept, under a hash of the weights and of the pair's token ids.

    Raises:
        ValueError: If there is no reward model. Checked here, since the judge is asked only after hours of training.
    """

    def __init__(self, name_or_path: str, folder: Path) -> None:
        self.name_or_path = name_or_path
        self._load_options = at_commit(name_or_path, {})
        make_skeleton(_REWARD_MODEL, name_or_path, self._load_options)
        self._answers = Answers(folder, "reward_model")

    def __call__(self, pairs: Sequence[Pair]) -> list[float | None]:
        """Judge pairs: load the model, score what was never scored, let the model go.

        Raises:
            ValueError: If the model cannot be loaded, or its tokenizer cannot read the pairs or has other tokens.
        """
        if not pairs:
            return []
        model, tokenizer = load_reward_model(self.name_or_path, self._load_options)
        max_length = _context_tokens(model, tokenizer)
        numbered = [replace(pair, row=i) for i, pair in enumerate(pairs)]
        tokenized = tokenize_pairs(numbered, tokenizer, max_length=max_length)
        is_cut = rows_left_out(tokenized.problems) | {one.row for one in tokenized.problems if one.kind == "truncated"}
        if is_cut:
            logger.warning(
                "The reward model gives no verdict on %d of %d pairs: they do not fit into its %d tokens, or have "
                "nothing to compare.",
                len(is_cut),
                len(pairs),
                max_length,
            )
        check_ids(model, tokenizer, ids_of(tokenized.pairs, tokenized.tokens), name_or_path=self.name_or_path)
        name = reference_hash(model, use_bf16=False)
        whole = {
            pair.row: (_key(name, tokens), tokens)
            for pair, tokens in zip(tokenized.pairs, tokenized.tokens, strict=True)
            if pair.row not in is_cut
        }
        missing = {key: tokens for key, tokens in whole.values() if self._answers.get(key) is None}
        self._answers.share(missing, lambda mine: self._score(model, mine))
        answers = [self._answers.get(whole[i][0]) if i in whole else None for i in range(len(pairs))]
        if num_not_finite := sum(not isinstance(answers[i], float) for i in whole):
            logger.warning(
                "The reward model gives no verdict on %d of %d pairs: its rewards are not finite.",
                num_not_finite,
                len(pairs),
            )
        return [p if isinstance(p, float) else None for p in answers]

    def _score(self, model: PreTrainedModel, missing: Mapping[str, TokenizedPair]) -> None:
        keys, tokens = list(missing), list(missing.values())
        lengths = [2 * (len(pair.prompt) + max(len(pair.chosen), len(pair.rejected))) for pair in tokens]
        limit = _MAX_POSITIONS.get(model.device.type, _MAX_POSITIONS["cuda"])
        with (
            torch.no_grad(),
            Progress(
                "Asking the reward model", len(keys), unit=" pairs", is_shown=PartialState().is_main_process
            ) as progress,
        ):
            for where in batches_by_length(lengths, max_tokens=limit):
                rewards = rewards_of(model, [tokens[i] for i in where])
                p_right = torch.sigmoid(rewards[0::2] - rewards[1::2]).tolist()
                self._answers.add({keys[i]: p for i, p in zip(where, p_right, strict=True) if np.isfinite(p)})
                progress.advance(len(where))


def _key(model: str, tokens: TokenizedPair) -> str:
    return hash_value([model, *(ids.tolist() for ids in (tokens.prompt, tokens.chosen, tokens.rejected))])


def load_reward_model(
    name_or_path: str, load_options: Mapping[str, Any] | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a reward model and its tokenizer.

    Args:
        name_or_path: Folder or hub id.
        load_options: Passed to `from_pretrained`.

    Raises:
        ValueError: If there is no sequence classifier as safetensors, it needs code of its own, or weights are missing
            or not finite.
    """
    with whole_models():
        model = load_whole(_REWARD_MODEL, name_or_path, load_options)
    tokenizer = _tokenizer(name_or_path, load_options)
    if names := not_finite(model):
        raise ValueError(f"A reward model needs finite weights; {name_or_path} has NaN or infinity in {names}.")
    model.config.use_cache = False  # nothing is generated
    return model.to(PartialState().device).eval(), tokenizer


def _tokenizer(name_or_path: str, load_options: Mapping[str, Any] | None) -> PreTrainedTokenizerBase:
    check_json(name_or_path, load_options, TOKENIZER_SETTINGS)
    with explained(_PLACE, name_or_path):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name_or_path, **for_config(load_options))
    return tokenizer


def _context_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Longest text that the model was made for; tokenizers without a limit hold a number beyond all lengths."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return min(int(tokenizer.model_max_length), positions or 2**31)


def rewards_of(model: PreTrainedModel, tokens: Sequence[TokenizedPair]) -> torch.Tensor:
    """Rewards of one batch.

    Returns:
        Rewards of chosen and rejected of each pair in turn, shape (2·pairs,), on the CPU.
    """
    pad_token_id = model.config.get_text_config().pad_token_id
    if pad_token_id is not None and pad_token_id >= 0:
        batch = plain_batch(tokens, pad_token_id=pad_token_id)
        rows = [(batch["input_ids"], batch["attention_mask"])]
    else:  # such a model reads its reward at the last position, so nothing may be padded
        texts = [np.concatenate([pair.prompt, end]) for pair in tokens for end in (pair.chosen, pair.rejected)]
        ids = [torch.from_numpy(text.astype(np.int64))[None] for text in texts]
        rows = [(one, torch.ones_like(one)) for one in ids]
    rewards = [
        model(input_ids=input_ids.to(model.device), attention_mask=mask.to(model.device)).logits[:, 0]
        for input_ids, mask in rows
    ]
    return torch.cat(rewards).double().cpu()
