"""Choice of the transformers class for a checkpoint: a causal language model, or one that also reads images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
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

# Files of a processor of images and videos; the tokenizer is saved separately.
_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")


def auto_class(config: Any) -> Any:
    """Return the class of transformers that loads the whole model with this configuration; an auto class if one does.

    For some configurations the causal language model is only the text part of the checkpoint, and others belong to no
    auto class, such as that of Mllama's text part alone. The class named in the checkpoint then decides.
    """
    kind = type(config)
    if (named := _named_class(config)) is not None:
        return named
    if kind not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForCausalLM
    whole = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[kind].__name__
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING or whole in (getattr(config, "architectures", None) or ()):
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def has_auto_class(config: Any) -> bool:
    """Check if transformers has a language model with this configuration."""
    return _is_mapped(type(config)) or _named_class(config) is not None


def model_class(config: Any) -> type:
    """Return the class of the whole model with this configuration, for which transformers must have one."""
    if (named := _named_class(config)) is not None:
        return named
    whole = auto_class(config) is AutoModelForImageTextToText
    mapping = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING if whole else MODEL_FOR_CAUSAL_LM_MAPPING
    chosen: type = mapping[type(config)]
    return chosen


def loadable_class(config: Any) -> tuple[Any, Any]:
    """Return the class of transformers that an auto class would load a checkpoint into, and its own configuration.

    That is a part of `config` if the causal language model is the text part of a model of text and images.
    """
    kind: Any = model_class(config)
    sub_configs: dict[str, Any] = getattr(config, "sub_configs", {})
    is_part = "text_config" in sub_configs and getattr(kind, "config_class", None) is sub_configs["text_config"]
    return kind, config.get_text_config() if is_part else config


def _is_mapped(kind: type) -> bool:
    return kind in MODEL_FOR_CAUSAL_LM_MAPPING or kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def _named_class(config: Any) -> type | None:
    """Return the causal language model that a configuration without an auto class names; None if there is none."""
    if _is_mapped(type(config)):
        return None
    names = getattr(config, "architectures", None) or ()
    classes = (getattr(transformers, name) for name in names if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    return next((kind for kind in classes if kind.config_class is type(config)), None)


def reads_images(architecture: str) -> bool:
    """Check if a class of that name can be loaded by AutoModelForImageTextToText only."""
    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    return architecture in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values() and architecture not in causal


def text_config(model: nn.Module) -> Any:
    """Return the configuration of a model's text part, which of a text-only model is its own; None without any."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def is_composite(model: nn.Module) -> bool:
    """Check if a model has other parts than a text model, such as a vision tower."""
    return text_config(model) is not getattr(model, "config", None)


def processor_files(model: nn.Module, source: str) -> list[Path]:
    """Return the image-processor files of a vision-language checkpoint; empty for text-only models.

    Args:
        model: loaded from the checkpoint.
        source: directory or hub name of the checkpoint.
    """
    if not is_composite(model) or not source:
        return []
    paths = (find_cached(source, name) for name in _PROCESSOR_FILES)
    return [path for path in paths if path is not None]
