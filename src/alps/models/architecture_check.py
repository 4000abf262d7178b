"""Check that a model is a decoder-only causal language model, from its configuration and the name of its class.

Which class is for which task is read from the tables of transformers, so that nothing here lists models.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Sequence
from typing import Any

import transformers
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel
from transformers.models.auto import modeling_auto as tables

from alps.core.errors import UnsupportedModel
from alps.models.auto_class import has_auto_class, model_class

_ADVICE = "alps takes only decoder-only causal language models, of text or of text and images"
_TASK_TABLE = re.compile(r"MODEL_FOR_(\w+?)(?:_MAPPING)?_NAMES")
_LANGUAGE_MODEL_TABLES = ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT")
# Tables that also hold classes of other tables, the vaguest first.
_VAGUE_TABLES = ("PRETRAINING", "SEQ_TO_SEQ_CAUSAL_LM", "MULTIMODAL_LM")
# Tables of models that are parts of others, without a task of their own.
_PART_TABLES = ("IMAGE", "BACKBONE")


def check_config(config: Any, name: str) -> None:
    """Refuse a checkpoint whose configuration is not that of a decoder-only causal language model.

    Args:
        config: of transformers.
        name: of the checkpoint, as the user gave it.

    Raises:
        UnsupportedModel: saying what the model is.
    """
    classes = list(getattr(config, "architectures", None) or ())
    subject = f"Model '{name}' ({classes[0] if classes else f'of type {config.model_type}'})"
    _check_encoder_decoder(config, subject)
    _check_task(config, classes, subject)
    if not has_auto_class(config):
        raise UnsupportedModel(f"{subject} is not a causal language model of transformers: {_ADVICE}.")
    _check_attention(config, model_class(config), subject)


def check_model_class(model: nn.Module) -> None:
    """Refuse a model in memory that is not a decoder-only causal language model.

    Args:
        model: any module; only those of transformers can be judged.

    Raises:
        UnsupportedModel: saying what the model is.
    """
    if not isinstance(model, PreTrainedModel):
        return
    subject = f"The model ({type(model).__name__})"
    _check_encoder_decoder(model.config, subject)
    classes = [kind.__name__ for kind in type(model).__mro__ if issubclass(kind, PreTrainedModel)]
    _check_task(model.config, [name for name in classes if not name.endswith("PreTrainedModel")], subject)
    _check_attention(model.config, type(model), subject)


def names_language_model(classes: Sequence[str]) -> bool:
    """Check if one of the classes is a language model of transformers, or is called like one."""
    return any(name in _language_models() or _task_suffix(name) in _language_model_suffixes() for name in classes)


def _check_encoder_decoder(config: Any, subject: str) -> None:
    if any(getattr(part, "is_encoder_decoder", False) for part in (config, _text_config(config))):
        raise UnsupportedModel(f"{subject} is an encoder-decoder: {_ADVICE}.")


def _check_task(config: Any, classes: Sequence[str], subject: str) -> None:
    """Refuse a model of another task; a class that transformers does not have is judged by its name."""
    if not classes or any(name in _language_models() for name in classes):
        return
    name, causal = next(filter(_is_known, classes), classes[0]), _causal_class(config)
    if not _is_known(name) and _task_suffix(name) in (None, *_language_model_suffixes()):
        return
    if causal and name in _base_classes():
        raise UnsupportedModel(f"{subject} is a base model without an output head: {_head_advice(config, causal)}.")
    task = _tasks().get(name)
    advice = f"prune the {causal} that it was made from" if causal else _ADVICE
    raise UnsupportedModel(f"{subject} is {f'for {task}' if task else 'not a causal language model'}: {advice}.")


def _head_advice(config: Any, causal: str) -> str:
    if getattr(_text_config(config), "tie_word_embeddings", False):
        return f'if the embeddings are its head, write {causal} for "architectures" into its config.json'
    return f"give a checkpoint of {causal}"


def _check_attention(config: Any, kind: type, subject: str) -> None:
    """Refuse decoders that read the outputs of an encoder, and encoders, which also attend to later tokens."""
    cross = getattr(config, "add_cross_attention", None)
    reads_encoder = "encoder_hidden_states" in inspect.signature(getattr(kind, "forward")).parameters  # noqa: B009
    if _default_encoder_decoder(config) or (reads_encoder and cross is not False):
        raise UnsupportedModel(
            f"{subject} is the decoder of an encoder-decoder, and its cross-attention needs the encoder: {_ADVICE}."
        )
    if _is_encoder(config):
        raise UnsupportedModel(f"{subject} is an encoder, since is_decoder is false in its configuration: {_ADVICE}.")


def _is_encoder(config: Any) -> bool:
    """Check if a model is an encoder that can be made a decoder, and is not."""
    is_masked = getattr(config, "model_type", "") in tables.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return getattr(config, "is_decoder", None) is False and (is_masked or hasattr(config, "add_cross_attention"))


def _default_encoder_decoder(config: Any) -> bool:
    """Check if the class of a configuration is that of encoder-decoders, whatever this configuration says.

    The constructor of a lone decoder, such as WhisperForCausalLM, changes what its configuration says.
    """
    parameter = inspect.signature(type(config)).parameters.get("is_encoder_decoder")
    return parameter is not None and parameter.default is True


def _text_config(config: Any) -> Any:
    try:
        return config.get_text_config()
    except (ValueError, AttributeError):  # it has several text parts, or is not of transformers
        return config


def _causal_class(config: Any) -> str:
    """Return the name of the causal language model with this configuration; empty if there is none."""
    kind = type(config)
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING or _is_encoder(config):
        return ""
    return str(MODEL_FOR_CAUSAL_LM_MAPPING[kind].__name__)


def _is_known(name: str) -> bool:
    return name in _tasks() or name in _base_classes() or name in _exports()


def _task_suffix(name: str) -> str | None:
    """Return the end of the name of a class that says what it is for, such as ForCausalLM."""
    match = re.search(r"For[A-Z]\w*$", name)
    return None if match is None else match[0]


@functools.cache
def _language_models() -> frozenset[str]:
    return frozenset(name for table in _LANGUAGE_MODEL_TABLES for name in _classes(f"MODEL_FOR_{table}_MAPPING_NAMES"))


@functools.cache
def _language_model_suffixes() -> frozenset[str]:
    return frozenset(suffix for name in _language_models() if (suffix := _task_suffix(name)))


@functools.cache
def _exports() -> frozenset[str]:
    return frozenset(dir(transformers))


@functools.cache
def _base_classes() -> frozenset[str]:
    return frozenset(_classes("MODEL_MAPPING_NAMES"))


@functools.cache
def _tasks() -> dict[str, str]:
    """Return the task of every class in a table of transformers, except those of language models."""
    names = {match[1]: name for name in dir(tables) if (match := _TASK_TABLE.fullmatch(name))}
    clear = sorted(names.keys() - {*_LANGUAGE_MODEL_TABLES, *_VAGUE_TABLES, *_PART_TABLES})
    return {
        name: _task_words(table)
        for table in (*_VAGUE_TABLES, *clear)
        if table in names
        for name in _classes(names[table])
    }


def _task_words(table: str) -> str:
    words = table.replace("SEQ_2_SEQ", "TO_TEXT").replace("SEQ_TO_SEQ_CAUSAL_LM", "SEQUENCE_TO_SEQUENCE").split("_")
    spoken = ["language modelling" if word == "LM" else word for word in words]
    # Abbreviations are without vowels, such as CTC, and remain in capitals.
    return " ".join(word.lower() if set(word) & set("AEIOUY") else word for word in spoken)


def _classes(table: str) -> list[str]:
    entries = getattr(tables, table, {}).values()
    return [name for entry in entries for name in ((entry,) if isinstance(entry, str) else entry)]
