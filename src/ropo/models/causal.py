"""Which models are causal language models: what a run can align, and as which class it is loaded.

In: a model's configuration. Out: `CAUSAL_LM`, with which `files` loads and checks it; or a refusal.
"""

from typing import Any

from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
)
from transformers.models.auto import modeling_auto

from ropo.models.files import ModelKind

NEEDS_MODEL = "model_name_or_path needs a folder with a model, or the id of one on the hub"

_OTHER_HEADS = {
    name
    for mapping in (
        modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_NEXT_SENTENCE_PREDICTION_MAPPING_NAMES,
    )
    for name in mapping.values()
} - set(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
# Model types whose language model reads both ways unless its configuration says otherwise.
_READS_BOTH_WAYS = {*modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, "bert-generation", "xlnet"} - set(
    modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
)

# Their language model is only called with an image.
_NEEDS_IMAGE = {"blip", "blip-2", "instructblip", "instructblipvideo", "kosmos-2", "kosmos-2.5", "pix2struct"}


def _check_causal(config: PretrainedConfig, name_or_path: str) -> None:
    """Refuse what `transformers` would turn into a causal language model with a new head, or without a causal mask.

    Raises:
        ValueError: If the model was trained with another head, or its tokens see the ones that follow.
    """
    made_as = (config.architectures or [""])[0]
    own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    is_causal = getattr(config, "is_decoder", False) or getattr(config, "causal", False)
    if made_as in _OTHER_HEADS:
        why = made_as
    elif config.model_type in _READS_BOTH_WAYS and not is_causal:
        why = f"{made_as or config.model_type}, whose tokens see the ones that follow: is_decoder is not set"
    elif not own_code and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not _reads_images(config):
        why = made_as or config.model_type
    else:
        return
    raise ValueError(
        f"A run needs a causal language model; got {name_or_path!r} ({why}). Name one that was trained to predict the "
        "next token."
    )


def _reads_images(config: PretrainedConfig) -> bool:
    """Whether a causal language model is one part of the model, beside one that reads images and is not called."""
    text = config.get_text_config(decoder=True)
    is_one = text is not config and not (config.is_encoder_decoder or text.is_encoder_decoder)
    return is_one and config.model_type not in _NEEDS_IMAGE and type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def _auto_class(config: PretrainedConfig) -> Any:
    """Loaded whole, so that what is saved is the model that was given: nothing moves what reads images."""
    is_part = type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return AutoModelForImageTextToText if is_part else AutoModelForCausalLM


CAUSAL_LM = ModelKind(
    auto_class=_auto_class,
    noun="A language model",
    place=NEEDS_MODEL,
    check=_check_causal,
    advice="Copy the model again, or correct its config.json (num_hidden_layers, tie_word_embeddings, ...).",
)
"""The model that is aligned, and the reference."""
