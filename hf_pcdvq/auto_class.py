"""Which of Transformers' auto classes has all of a model that writes text: of one that reads images, also what reads them."""

from __future__ import annotations

from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def auto_class_of(config: PreTrainedConfig) -> Any:
    """The auto class for a model with this config. Its `architectures` tell where there are two."""
    text = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    images = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(type(config), None)
    # Some models that also read images are causal language models too, of some only the language model is, of some none.
    whole = images is not None and (text is None or images.__name__ in (config.architectures or ()))
    return AutoModelForImageTextToText if whole else AutoModelForCausalLM
