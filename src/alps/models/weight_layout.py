"""Tensors of a model in memory under the names, and in the files, of the checkpoint that it was loaded from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion

from alps.checkpoints.safetensors_io import TensorOnDisk, TensorToWrite, list_tensors
from alps.checkpoints.weight_files import INDEX_NAME, SINGLE_NAME, WeightFile, find_weight_files

Layout = Mapping[WeightFile, list[TensorToWrite]]


def lay_out_weights(model: nn.Module, source: Path) -> Layout | None:
    """Return the tensors of every weight file of a checkpoint, with the values of a model that was loaded from it.

    Tensors that the model does not hold, such as those of parts that it does not build, keep the checkpoint's values.

    Args:
        model: in memory.
        source: directory of the checkpoint.

    Returns:
        The tensors by file; None when the checkpoint has no safetensors files, or a tensor of the model has no place in
        them.
    """
    if not any((source / name).is_file() for name in (SINGLE_NAME, INDEX_NAME)):
        return None
    files = {file: list_tensors(file) for file in find_weight_files(source)}
    stored = {tensor.name: tensor.shape for tensors in files.values() for tensor in tensors}
    values = _checkpoint_values(model, stored)
    if any(stored.get(name) != tuple(value.shape) for name, value in values.items()):
        return None
    return {file: [_pending(tensor, values.get(tensor.name)) for tensor in tensors] for file, tensors in files.items()}


def _checkpoint_values(model: Any, stored: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Return the tensors of a model by their names in a checkpoint, tied ones under a name that it holds."""
    state = dict(model.state_dict())
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for aliases in names.values():
        keep = next((name for name in aliases if name in stored), aliases[0])
        for name in aliases:
            if name != keep:
                state.pop(name, None)
    values: dict[str, Tensor] = revert_weight_conversion(model, state)
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    return {_stored_name(name, prefix, stored): value for name, value in values.items()}


def _stored_name(name: str, prefix: str, stored: Mapping[str, tuple[int, ...]]) -> str:
    """Return the name of a tensor in the checkpoint, which may lack the prefix of the base model."""
    candidates = (name, name.removeprefix(prefix), f"{prefix}{name}")
    return next((candidate for candidate in candidates if candidate in stored), name)


def _pending(tensor: TensorOnDisk, value: Tensor | None) -> TensorToWrite:
    if value is None:
        return TensorToWrite(tensor.name, tensor.dtype, tensor.shape, tensor.read)
    return TensorToWrite(tensor.name, value.dtype, tensor.shape, lambda: value)
