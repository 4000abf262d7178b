"""Load models for inference; the layers of a packed directory stay packed in memory."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.pytorch_utils import Conv1D

from alps.checkpoints.bitmask_codec import PackedMatrix, pack
from alps.checkpoints.compression import check_compression
from alps.checkpoints.manifest import MANIFEST_NAME, Manifest, read_manifest
from alps.checkpoints.safetensors_io import DTYPES, list_tensors
from alps.checkpoints.tensor_codec import decode_matrix, decode_tensor
from alps.checkpoints.unpack import check_file
from alps.checkpoints.weight_files import read_weight_file
from alps.core.errors import CheckpointError
from alps.inference.convert import as_out_in, packed_layer, refuse_saving, set_module, tied_parameters
from alps.models.architecture_check import check_config
from alps.models.configuration import load_config
from alps.models.load import quiet, readable
from alps.models.meta_model import empty_model
from alps.models.tied_head import is_other_head, untie_config


def is_packed(path: str | Path) -> bool:
    """Return whether `path` is a directory written by `alps pack`."""
    return (Path(path).expanduser() / MANIFEST_NAME).is_file()


def load_packed(directory: Path, dtype: torch.dtype | None = None) -> nn.Module:
    """Load a directory written by `alps pack` on the CPU, with its packed linear layers kept packed.

    Tensors are read one at a time, so that the dense model is never in memory. The result is a transformers model in
    evaluation mode without gradients; its `save_pretrained` raises. Packed embeddings, fused expert weights and tied
    matrices become dense, because no packed product exists for them.

    Args:
        directory: a directory written by `alps pack`.
        dtype: dtype of the model; None for the dtype of the checkpoint.

    Raises:
        CheckpointError: if a file is missing or damaged, or its tensors do not fit the model.
        UnsupportedModel: if it is no causal language model.
    """
    manifest = read_manifest(directory)
    if manifest.compression:
        check_compression()
    for name, record in manifest.files.items():
        check_file(directory / name, record.bytes, record.sha256)
    with quiet(), readable(str(directory)):
        config = load_config(str(directory))
        check_config(config, str(directory))
    for name, shard in manifest.shards.items():
        check_file(directory / name, shard.bytes, shard.sha256)
    with quiet(), readable(str(directory)):
        model = _skeleton(config, dtype or config.dtype or _first_dtype(manifest))
    try:
        _fill(model, directory, manifest)
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"'{directory}' is inconsistent ({error}): pack the checkpoint again.") from None
    if is_other_head(model):
        untie_config(model.config, str(directory))
    model.tie_weights()  # type: ignore[operator]
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if missing:
        raise CheckpointError(
            f"'{directory}' lacks {len(missing)} tensors of {type(model).__name__}, the first is {missing[0]}: unpack "
            "it with `alps unpack`, and load the result."
        )
    if (directory / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(directory)
    refuse_saving(model)
    return model.requires_grad_(False).eval()


def _skeleton(config: Any, dtype: torch.dtype) -> nn.Module:
    """Create the model on the meta device, with the dtypes that transformers would load."""
    model = empty_model(config, dtype)
    float32_modules = list(getattr(model, "_keep_in_fp32_modules_strict", None) or ()) if dtype != torch.float32 else []
    if dtype == torch.float16:
        float32_modules += getattr(model, "_keep_in_fp32_modules", None) or ()
    for name, parameter in model.named_parameters():
        if any(f".{module}." in f".{name}." for module in float32_modules):
            parameter.data = parameter.data.float()
    return model


class _NameMap:
    """Map from tensor names of a checkpoint to those of a model; either may have the base model's prefix or lack it."""

    def __init__(self, model: nn.Module) -> None:
        self._kind = type(model).__name__
        self._shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
        self._prefix = f"{getattr(model, 'base_model_prefix', '')}."
        self._ignored = list(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())

    def find(self, stored: str, shape: list[int]) -> str | None:
        """Return the name of a tensor in the model; None for tensors that transformers would ignore.

        Args:
            stored: name in the checkpoint.
            shape: shape in the checkpoint.

        Raises:
            CheckpointError: if the model has no such tensor, or has one of another shape.
        """
        for name in (stored, self._prefix + stored, stored.removeprefix(self._prefix)):
            if name in self._shapes:
                if self._shapes[name] != shape:
                    raise CheckpointError(
                        f"Tensor {stored} has shape {shape}, but {self._kind} expects {self._shapes[name]}: restore "
                        "the config.json of this checkpoint."
                    )
                return name
        if any(re.search(pattern, stored) for pattern in self._ignored):
            return None
        raise CheckpointError(
            f"{self._kind} has no tensor {stored}, which transformers converts to others when it loads the dense "
            "checkpoint: load the output of `alps unpack` instead."
        )


def _fill(model: nn.Module, directory: Path, manifest: Manifest) -> None:
    """Load all tensors of the directory into the model, one at a time."""
    names, tied = _NameMap(model), tied_parameters(model)
    shards = {name: _reader(directory / name) for name in manifest.shards}
    compressed = bool(manifest.compression)
    for stored, record in manifest.tensors.items():
        name = names.find(stored, record.shape)
        if name is None:
            continue
        owner, _, attribute = name.rpartition(".")
        module, read_part = model.get_submodule(owner), shards[record.shard]
        dtype: torch.dtype = getattr(module, attribute).dtype
        stays_packed = record.kept is not None and attribute == "weight" and name not in tied
        if record.kept is not None and stays_packed and type(module) is nn.Linear:
            packed = decode_matrix(stored, record, compressed, read_part)
            values = _as_dtype(packed.values, record.dtype, [record.kept]).to(dtype)
            _set_packed(model, owner, module, replace(packed, values=values))
            continue
        data = decode_tensor(stored, record, compressed, read_part)
        tensor = _as_dtype(data, record.dtype, record.shape).to(dtype)
        if stays_packed and type(module) is Conv1D:
            _set_packed(model, owner, module, pack(as_out_in(module, tensor)))
        elif attribute in module._parameters:
            module._parameters[attribute] = nn.Parameter(tensor, requires_grad=False)
        else:
            module._buffers[attribute] = tensor


def _reader(path: Path) -> Callable[[str], Tensor]:
    """Return a function that reads a tensor of a file by its name.

    Tensors are copied into their own memory, because a mapped file would stay in memory as well.
    """
    stored = {tensor.name: tensor for tensor in list_tensors(read_weight_file(path))}
    return lambda name: stored[name].read()


def _as_dtype(data: Tensor, dtype: str, shape: list[int]) -> Tensor:
    """View the bytes of a contiguous tensor as a safetensors dtype and a shape."""
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype}")
    return data.reshape(-1).view(torch.uint8).view(DTYPES[dtype]).view(shape)


def _set_packed(model: nn.Module, name: str, module: nn.Module, packed: PackedMatrix) -> None:
    layer = packed_layer(module, packed)
    layer.check()
    set_module(model, name, layer)


def _first_dtype(manifest: Manifest) -> torch.dtype:
    """Return the dtype of the first floating-point tensor, which transformers uses if config.json names none."""
    dtypes = (DTYPES[record.dtype] for record in manifest.tensors.values() if record.dtype in DTYPES)
    return next((dtype for dtype in dtypes if dtype.is_floating_point), torch.float32)
