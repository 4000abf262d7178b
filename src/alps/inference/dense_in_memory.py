"""Tensors of a checkpoint that will be dense in memory though they are packed on disk, found before packing."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import nn

from alps.checkpoints.safetensors_io import list_tensors
from alps.checkpoints.weight_files import find_weight_files
from alps.core.errors import AlpsError, first_line
from alps.inference.packing_plan import READ_BY_CODE, PackingPlan, plan_packing
from alps.inference.weight_reads import find_read_layers
from alps.models.configuration import load_config
from alps.models.load import quiet
from alps.models.meta_model import empty_model
from alps.models.recorded_load import load_recorded
from alps.models.recorded_tensor import RecordedTensor

_LOG = logging.getLogger("alps")


def find_dense_in_memory(directory: Path) -> dict[str, str]:
    """Return the tensors of a checkpoint that `alps.load` makes dense if they are packed, each with the reason.

    No values are read, except those of a head that might not be tied to the embedding.

    Args:
        directory: a checkpoint with safetensors files.

    Returns:
        Reasons by the names of tensors with two dimensions or more. If the model cannot be loaded there are none, and
        a warning says so.
    """
    tensors = {tensor.name: tensor for file in find_weight_files(directory) for tensor in list_tensors(file)}
    matrices = {name for name, tensor in tensors.items() if len(tensor.shape) > 1}
    recorded = {
        name: RecordedTensor.stored(name, list(tensor.shape), tensor.dtype, tensor.read)
        for name, tensor in tensors.items()
    }
    try:
        with quiet():
            config = load_config(str(directory))
            model = load_recorded(config, recorded, name=str(directory))
    except Exception as error:  # transformers raises anything for what it cannot load
        reason = str(error) if isinstance(error, AlpsError) else first_line(error)
        _LOG.warning(f"What is packed cannot be loaded packed, only unpacked: {reason}")
        return {}
    plan = plan_packing(model, matrices.__contains__)
    return plan.dense | dict.fromkeys(_read_by_code(model, plan), READ_BY_CODE)


def _read_by_code(model: nn.Module, plan: PackingPlan) -> list[str]:
    """Return the tensors of the checkpoint that are weights of layers of the plan, and that other code reads."""
    names = {name: plan.layers[layer] for name, layer in model.named_modules() if layer in plan.layers}
    with quiet():
        read = find_read_layers(empty_model(model.config, torch.float32), names)
    return [names[name] for name in names if name in read]
