"""Which class of transformers a checkpoint is loaded with: a causal language model, or one that reads images, too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from alps.models.hub import find_cached

# What a processor of images and videos is made of, beside the tokenizer.
_PROCESSOR = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")


def auto_class(config: Any) -> Any:
    """The class of transformers that loads a model with this configuration whole.

    Some configurations have a causal language model that is only the text part of the checkpoint: where the checkpoint
    says that it is more, it is loaded as what it says.
    """
    kind = type(config)
    if kind not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForCausalLM
    whole = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[kind].__name__
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING or whole in (getattr(config, "architectures", None) or ()):
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def reads_images(architecture: str) -> bool:
    """Whether a class of this name is loaded with AutoModelForImageTextToText alone."""
    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    return architecture in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values() and architecture not in causal


def text_config(model: nn.Module) -> Any:
    """The configuration of a model's text part: its own where it is nothing else, None where there is none."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def is_composite(model: nn.Module) -> bool:
    """Whether a model is more than its text part."""
    return text_config(model) is not getattr(model, "config", None)


def processor_files(model: nn.Module, place: str) -> list[Path]:
    """What makes images into inputs of a model that reads them, beside its weights at `place`; of others nothing."""
    if not is_composite(model) or not place:
        return []
    found = (find_cached(place, name) for name in _PROCESSOR)
    return [path for path in found if path is not None]
