"""Loading and saving of a checkpoint by transformers itself, before any of its tensors is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import revert_weight_conversion

from alps.core.errors import CheckpointError
from alps.models.auto_class import loadable_class
from alps.models.completeness import check_missing, check_unused
from alps.models.recorded_tensor import RecordedTensor


def load_recorded(
    config: Any,
    tensors: Mapping[str, RecordedTensor],
    *,
    name: str,
    kind: Any = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Load a model whose parameters are records of the checkpoint's tensors.

    The loader of transformers renames and converts them, so that whatever transformers loads can be loaded. The values
    of few tensors are read: of a head that might not be tied to the embedding.

    Args:
        config: of the model.
        tensors: of the checkpoint, by their names there.
        name: of the checkpoint, for error messages.
        kind: class of the model, with this configuration; None for the one that `loadable_class` chooses.
        dtype: of the model; None for that of the checkpoint.

    Returns:
        A model in evaluation mode. Its parameters and persistent buffers are recorded tensors.

    Raises:
        CheckpointError: if a tensor has another shape than that of the model.
        ConfigError: see `check_missing` and `check_unused`.
        UnsupportedModel: see `check_unused`.
    """
    if kind is None:
        kind, config = loadable_class(config)
    model, info = kind.from_pretrained(
        None,
        config=config,
        state_dict=dict(tensors),
        dtype=dtype or "auto",
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    check_missing(name, model, info.get("missing_keys", ()))
    check_unused(name, model, info.get("unexpected_keys", ()))
    for key in sorted(info.get("mismatched_keys", ()), key=str):
        stored, shape, expected = key
        raise CheckpointError(
            f"Tensor {stored} of '{name}' has shape {list(shape)}, but {kind.__name__} expects {list(expected)}: "
            "restore the config.json of this checkpoint."
        )
    return model.eval()  # type: ignore[no-any-return]


def record_checkpoint(model: nn.Module, tensors: Mapping[str, RecordedTensor]) -> dict[str, RecordedTensor]:
    """Return the tensors of the checkpoint that a model was loaded from, as records of the model's tensors.

    The saver of transformers reverts the renaming and conversion of its loader.

    Args:
        model: loaded by transformers.
        tensors: of the model, by their names in it.
    """
    return dict(revert_weight_conversion(model, dict(tensors)))
