"""Hash of a model's configuration and weights; models with equal hashes compute the same."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import nn

# Origin and library version of a checkpoint, which do not affect what it computes.
_IGNORED_SETTINGS = ("_name_or_path", "_model_name_or_path", "transformers_version")


def model_sha256(model: nn.Module) -> str:
    """Return the sha256 over the configuration, and over name, shape, dtype and bytes of all parameters and buffers."""
    config: Any = getattr(model, "config", None)
    settings = {} if config is None else {k: v for k, v in config.to_dict().items() if k not in _IGNORED_SETTINGS}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        digest.update(f"\n{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
