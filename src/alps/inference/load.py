"""Load models for inference; the layers of a packed directory stay packed in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.pytorch_utils import Conv1D

from alps.checkpoints.bitmask_codec import PackedMatrix, pack
from alps.checkpoints.compression import check_compression
from alps.checkpoints.manifest import MANIFEST_NAME, Manifest, read_manifest
from alps.checkpoints.packed_config import check_packed_config
from alps.checkpoints.safetensors_io import DTYPES, list_tensors
from alps.checkpoints.tensor_codec import decode_matrix, decode_tensor
from alps.checkpoints.unpack import check_file
from alps.checkpoints.weight_files import read_weight_file
from alps.core.errors import CheckpointError
from alps.inference.convert import as_out_in, packed_layer, replace_module
from alps.inference.packed_experts import replace_experts, run_experts_singly
from alps.inference.packing_plan import plan_packing
from alps.inference.save import save_packed
from alps.inference.torch_backend import unpack_rows
from alps.models.architecture_check import check_config
from alps.models.configuration import load_config
from alps.models.load import quiet, readable
from alps.models.recorded_load import load_recorded
from alps.models.recorded_tensor import RecordedTensor
from alps.models.tied_head import is_other_head, untie_config


def is_packed(path: str | Path) -> bool:
    """Return whether `path` is a directory written by `alps pack`."""
    return (Path(path).expanduser() / MANIFEST_NAME).is_file()


def load_packed(directory: Path, dtype: torch.dtype | None = None) -> nn.Module:
    """Load a directory written by `alps pack` on the CPU, with its packed linear layers kept packed.

    Tensors are read one at a time, so that the dense model is never in memory. The result is a transformers model in
    evaluation mode without gradients; its `save_pretrained` writes a packed directory. Packed embeddings, fused expert
    weights and tied matrices become dense, because no packed product exists for them.

    Args:
        directory: a directory written by `alps pack`.
        dtype: dtype of the model; None for the dtype of the checkpoint.

    Raises:
        CheckpointError: if a file is missing or damaged, or its tensors do not fit the model.
        UnsupportedModel: if it is no causal language model.
    """
    manifest = read_manifest(directory)
    for name, record in manifest.files.items():
        check_file(directory / name, record.bytes, record.sha256)
    check_packed_config(directory, manifest)
    with quiet(), readable(str(directory)):
        config = load_config(str(directory), packed=True)
        check_config(config, str(directory))
    model = build_packed(directory, manifest, config, dtype=dtype)
    if (directory / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(directory)
    return model.requires_grad_(False).eval()


def build_packed(
    directory: Path, manifest: Manifest, config: Any, *, kind: Any = None, dtype: torch.dtype | None = None
) -> nn.Module:
    """Build a model of the tensors of a packed directory, which are checked and read one at a time.

    Args:
        directory: with the shards.
        manifest: its content.
        config: configuration of the model, without `quantization_config`.
        kind: class of the model; None for that of the configuration.
        dtype: dtype of the model; None for the dtype of the checkpoint.

    Raises:
        CheckpointError: if a shard is missing or damaged, or its tensors do not fit the model.
    """
    if manifest.compression:
        check_compression()
    for name, shard in manifest.shards.items():
        check_file(directory / name, shard.bytes, shard.sha256)
    try:
        tensors = _Tensors(directory, manifest)
        with quiet(), readable(str(directory)):
            model = load_recorded(config, tensors.recorded(), name=str(directory), kind=kind, dtype=dtype)
        _fill(model, tensors)
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"'{directory}' is inconsistent ({error}): pack the checkpoint again.") from None
    if is_other_head(model):
        untie_config(model.config, str(directory))
    save_packed(model, manifest)
    return model


class _Tensors:
    """Tensors of the checkpoint in a packed directory."""

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self._manifest, self._compressed = manifest, bool(manifest.compression)
        self._shards = {name: _reader(directory / name) for name in manifest.shards}

    def recorded(self) -> dict[str, RecordedTensor]:
        """Return all tensors, by their names in the checkpoint, before any is read."""
        return {
            name: RecordedTensor.stored(name, record.shape, _dtype(record.dtype), partial(self.read, name))
            for name, record in self._manifest.tensors.items()
        }

    def read(self, name: str) -> Tensor:
        """Read a tensor, and unpack it if it is packed."""
        record = self._manifest.tensors[name]
        data = decode_tensor(name, record, self._compressed, self._shards[record.shard])
        return _as_dtype(data, record.dtype, record.shape)

    def is_packed(self, name: str) -> bool:
        """Return whether a tensor is packed in the directory."""
        return self._manifest.tensors[name].kept is not None

    def is_left_dense(self, name: str) -> bool:
        """Return whether packing found that a tensor has to be dense in memory."""
        return name in self._manifest.dense_in_memory

    def read_packed(self, name: str, dtype: torch.dtype) -> PackedMatrix:
        """Read a packed matrix, with its values in a dtype."""
        record = self._manifest.tensors[name]
        packed = decode_matrix(name, record, self._compressed, self._shards[record.shard])
        return replace(packed, values=_as_dtype(packed.values, record.dtype, [record.kept or 0]).to(dtype))


def _fill(model: nn.Module, tensors: _Tensors) -> None:
    """Read all tensors of a model, one at a time."""
    plan = plan_packing(model, tensors.is_packed, tensors.is_left_dense)
    for module, attribute in plan.experts:
        replace_experts(module, attribute, _expert_matrices(module, attribute, tensors))
    run_experts_singly(model)
    dense = dict[int, nn.Parameter]()
    for module in model.modules():
        for attribute, parameter in module._parameters.items():
            if isinstance(parameter, RecordedTensor) and not (attribute == "weight" and module in plan.layers):
                if id(parameter) not in dense:
                    dense[id(parameter)] = nn.Parameter(parameter.compute(), requires_grad=False)
                module._parameters[attribute] = dense[id(parameter)]
        for attribute, buffer in module._buffers.items():
            if isinstance(buffer, RecordedTensor):
                module._buffers[attribute] = buffer.compute()
    for module, stored in plan.layers.items():
        weight = module.get_parameter("weight")
        if isinstance(module, Conv1D):
            matrix = pack(as_out_in(module, cast(RecordedTensor, weight).compute()))
        else:
            matrix = tensors.read_packed(stored, weight.dtype)
        layer = packed_layer(module, matrix)
        layer.check()
        replace_module(model, module, layer)


def _expert_matrices(module: nn.Module, attribute: str, tensors: _Tensors) -> Iterator[Tensor]:
    """Iterate over the slices of a fused parameter; of its experts one is dense at a time."""
    parameter = cast(RecordedTensor, module.get_parameter(attribute))
    if parameter.source is None:
        for number in range(len(parameter)):
            part = parameter.part(number)
            yield part.compute() if isinstance(part, RecordedTensor) else part
        return
    packed, rows = tensors.read_packed(parameter.source, parameter.dtype), parameter.shape[1]
    for first in range(0, len(packed.mask), rows):
        yield unpack_rows(packed, first, first + rows)


def _reader(path: Path) -> Callable[[str], Tensor]:
    """Return a function that reads a tensor of a file by its name.

    Tensors are copied into their own memory, because a mapped file would stay in memory as well.
    """
    stored = {tensor.name: tensor for tensor in list_tensors(read_weight_file(path))}
    return lambda name: stored[name].read()


def _as_dtype(data: Tensor, dtype: str, shape: list[int]) -> Tensor:
    """View the bytes of a contiguous tensor as a safetensors dtype and a shape."""
    return data.reshape(-1).view(torch.uint8).view(_dtype(dtype)).view(shape)


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise ValueError(f"unknown dtype {name}")
    return DTYPES[name]
