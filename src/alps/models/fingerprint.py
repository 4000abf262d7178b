"""Hashes of a model's configuration and weights; models with equal hashes compute the same."""

from __future__ import annotations

import hashlib
import inspect
import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

# Origin and library version of a checkpoint, which do not affect what it computes.
_IGNORED_SETTINGS = ("_name_or_path", "_model_name_or_path", "transformers_version")
# Fields that no forward on calibration windows depends on: what is returned, what is sampled, labels of classifiers,
# names, and what acts in training only. The dtype of the weights is hashed with them.
_SIDE_SETTINGS = re.compile(
    r"_?(output_attentions|output_hidden_states|return_dict|use_return_dict|use_cache|architectures|auto_map|dtype"
    r"|torch_dtype|name_or_path|_name_or_path|_?model_name_or_path|transformers_version|id2label|label2id|num_labels"
    r"|problem_type|finetuning_task|task_specific_params|tokenizer_class|prefix|torchscript|_attn_implementation"
    r"|bos_token_id|eos_token_id|sep_token_id|decoder_start_token_id|pretraining_tp|use_mambapy)"
    r"|.*(dropout|pdrop|layerdrop|initializer_range|aux_loss_coef)"
)
_WORD = re.compile(r"[A-Za-z_]\w*")


def model_sha256(model: nn.Module) -> str:
    """Return the sha256 over the configuration, and over name, shape, dtype and bytes of all parameters and buffers."""
    config: Any = getattr(model, "config", None)
    settings = {} if config is None else {k: v for k, v in config.to_dict().items() if k not in _IGNORED_SETTINGS}
    return _hash(model, json.dumps(settings, sort_keys=True, default=str))


def forward_sha256(model: nn.Module) -> str:
    """Return the sha256 over all parameters and buffers, and over what a forward reads of the configuration."""
    return _hash(model, forward_settings(model))


def forward_settings(model: nn.Module) -> str:
    """Return the class of a model and the fields of its configuration that a forward may depend on, as JSON.

    Fields of generation, of outputs and of training are left out, so that a run continues after they were corrected.
    So are fields that no code of the library mentions, such as remarks of other programs.
    """
    config: Any = getattr(model, "config", None)
    ignored = _generation_settings(config) | _unknown_settings(model, config)
    if not any(_reads_padding(module) for module in model.modules()):
        ignored.add("pad_token_id")
    settings = {} if config is None else _without_side_settings(config.to_dict(), ignored)
    return json.dumps([type(model).__name__, settings], sort_keys=True, default=str)


def _without_side_settings(settings: dict[str, Any], ignored: set[str]) -> dict[str, Any]:
    return {
        name: _without_side_settings(value, ignored) if isinstance(value, dict) else value
        for name, value in settings.items()
        if name not in ignored and not _SIDE_SETTINGS.fullmatch(str(name))
    }


def _generation_settings(config: Any) -> set[str]:
    """Return the names of generation settings that the class of a configuration does not define as its own."""
    own = set(inspect.signature(type(config).__init__).parameters)
    return set(GenerationConfig().to_dict()) - own - {"pad_token_id"}


def _unknown_settings(model: nn.Module, config: Any) -> set[str]:
    """Return the names of settings that neither their class nor any code of the model or the library mentions."""
    if config is None:
        return set()
    declared = {name for kind in type(config).__mro__ for name in inspect.signature(kind).parameters}
    names = {str(name) for name in config.to_dict()} - declared
    classes = {*type(config).__mro__, *(kind for module in model.modules() for kind in type(module).__mro__)}
    library = Path(transformers.__file__).parent
    paths = {file for kind in classes if (file := getattr(sys.modules.get(kind.__module__), "__file__", None))}
    paths |= {str(path) for folder in (library, library / "integrations") for path in folder.glob("*.py")}
    for path in sorted(paths):
        if not names:
            break
        names -= set(_WORD.findall(Path(path).read_text(encoding="utf-8", errors="replace")))
    return names


def _reads_padding(module: nn.Module) -> bool:
    """Check if a module other than an embedding keeps the padding id, from which some count positions."""
    return hasattr(module, "padding_idx") and not isinstance(module, nn.Embedding | nn.EmbeddingBag | PreTrainedModel)


def _hash(model: nn.Module, settings: str) -> str:
    digest = hashlib.sha256(settings.encode())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        digest.update(f"\n{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
