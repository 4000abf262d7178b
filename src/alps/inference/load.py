"""A model whose pruned layers stay packed, from a directory that `alps pack` wrote."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig
from transformers.pytorch_utils import Conv1D

from alps.checkpoints.bitmask_codec import PackedMatrix, pack
from alps.checkpoints.compression import check_compression
from alps.checkpoints.manifest import MANIFEST_NAME, Manifest, read_manifest
from alps.checkpoints.safetensors_io import DTYPES, list_tensors
from alps.checkpoints.tensor_codec import decode_matrix, decode_tensor
from alps.checkpoints.unpack import check_file
from alps.checkpoints.weight_files import read_weight_file
from alps.core.device import pick_device
from alps.core.errors import CheckpointError, ConfigError
from alps.inference.convert import packed_layer, put, refuse_saving, rows_out, tied_parameters
from alps.inference.semi_structured import check_device, semi_structure
from alps.models.demo_model import resolve_model_path
from alps.models.load import load_model, parse_dtype, quiet, readable
from alps.models.meta_model import empty_model


def load(path: str | Path, device: str = "cpu", dtype: str = "auto", semi_structured: bool = False) -> Any:
    """Load a causal language model for inference.

    Of a directory that `alps pack` wrote, linear layers that are packed there become `PackedLinear` and stay packed in
    memory; tensors are read one at a time, and the dense model is never there. It is a transformers model like any
    other, in evaluation mode, whose parameters ask for no gradients; `save_pretrained` refuses. A packed embedding,
    fused expert weight or tied matrix has no packed product: it becomes dense. Any other directory, GGUF file or hub
    name is loaded as transformers loads it, dense; `alps.pack_linears(model)` packs that in memory.

    Args:
        path: a packed directory, or what `alps prune` takes as MODEL.
        device: `cpu`, `cuda:N`, or `auto`. Packed layers have kernels for CPUs, and for GPUs in Triton; elsewhere torch
            unpacks rows for every use.
        dtype: `auto` keeps the checkpoint's; or float32, bfloat16, float16.
        semi_structured: give layers of a packed directory that are 2:4 to torch's semi-structured tensors, on a GPU.

    Raises:
        CheckpointError: when a file of a packed directory is missing or damaged, or tensors do not belong to the model.
        ConfigError, UnsupportedModel: when transformers cannot make the model, or `semi_structured` has nothing to do.
    """
    place, wanted = pick_device(device), parse_dtype(dtype)
    if semi_structured:
        check_device(place)
    if not is_packed(path):
        if semi_structured:
            raise ConfigError(
                f"'{path}' is not packed, and semi_structured is for packed layers: `alps pack` it first."
            )
        return load_model(resolve_model_path(str(path)), wanted).requires_grad_(False).to(place)
    model = load_packed(Path(path).expanduser(), wanted).to(place)
    if semi_structured:
        semi_structure(model)
    return model


def is_packed(path: str | Path) -> bool:
    """Whether that is a directory that `alps pack` wrote."""
    return (Path(path).expanduser() / MANIFEST_NAME).is_file()


def load_packed(directory: Path, dtype: torch.dtype | None = None) -> nn.Module:
    """A packed directory as a model on the CPU; see `load`."""
    manifest = read_manifest(directory)
    if manifest.compression:
        check_compression()
    for name, record in {**manifest.shards, **manifest.files}.items():
        check_file(directory / name, record.bytes, record.sha256)
    with quiet(), readable(str(directory)):
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        model = _skeleton(config, dtype or config.dtype or _first_dtype(manifest))
    try:
        _fill(model, directory, manifest)
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"'{directory}' contradicts itself ({error}): pack the checkpoint again.") from None
    model.tie_weights()  # type: ignore[operator]
    empty = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if empty:
        raise CheckpointError(
            f"'{directory}' lacks {len(empty)} tensors of {type(model).__name__}, first {empty[0]}: unpack it and load "
            "that."
        )
    if (directory / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(directory)
    refuse_saving(model)
    return model.requires_grad_(False).eval()


def _skeleton(config: Any, dtype: torch.dtype) -> nn.Module:
    """The model with parameters that have no memory, in the dtypes in which transformers would load them."""
    model = empty_model(config, dtype)
    kept = list(getattr(model, "_keep_in_fp32_modules_strict", None) or ()) if dtype != torch.float32 else []
    if dtype == torch.float16:
        kept += getattr(model, "_keep_in_fp32_modules", None) or ()
    for name, parameter in model.named_parameters():
        if any(f".{part}." in f".{name}." for part in kept):
            parameter.data = parameter.data.float()
    return model


class _Names:
    """Where tensors of a checkpoint belong in a model: names of files may have the base model's prefix or lack it."""

    def __init__(self, model: nn.Module) -> None:
        self._kind = type(model).__name__
        self._shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
        self._prefix = f"{getattr(model, 'base_model_prefix', '')}."
        self._ignored = list(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())

    def find(self, stored: str, shape: list[int]) -> str | None:
        """The name in the model; None for what transformers would ignore, too.

        Raises:
            CheckpointError: when the model has no such tensor, or one of another shape.
        """
        for name in (stored, self._prefix + stored, stored.removeprefix(self._prefix)):
            if name in self._shapes:
                if self._shapes[name] != shape:
                    raise CheckpointError(
                        f"Tensor {stored} has shape {shape}, and {self._kind} one of {self._shapes[name]}: config.json "
                        "is not that of the checkpoint."
                    )
                return name
        if any(re.search(pattern, stored) for pattern in self._ignored):
            return None
        raise CheckpointError(
            f"{self._kind} has no tensor called {stored}, transformers makes others of it when it loads the dense "
            "checkpoint: use what `alps unpack` writes."
        )


def _fill(model: nn.Module, directory: Path, manifest: Manifest) -> None:
    """Put every tensor of the directory where it belongs, one at a time."""
    names, tied = _Names(model), tied_parameters(model)
    shards = {name: _reader(directory / name) for name in manifest.shards}
    compressed = bool(manifest.compression)
    for stored, record in manifest.tensors.items():
        name = names.find(stored, record.shape)
        if name is None:
            continue
        owner, _, own = name.rpartition(".")
        module, part = model.get_submodule(owner), shards[record.shard]
        dtype: torch.dtype = getattr(module, own).dtype
        if record.kept is not None and type(module) is nn.Linear and own == "weight" and name not in tied:
            packed = decode_matrix(stored, record, compressed, part)
            values = _typed(packed.values, record.dtype, [record.kept]).to(dtype)
            _put_packed(model, owner, module, replace(packed, values=values))
            continue
        bits = decode_tensor(stored, record, compressed, part)
        tensor = _typed(bits, record.dtype, record.shape).to(dtype)
        if record.kept is not None and type(module) is Conv1D and own == "weight" and name not in tied:
            _put_packed(model, owner, module, pack(rows_out(module, tensor)))
        elif own in module._parameters:
            module._parameters[own] = nn.Parameter(tensor, requires_grad=False)
        else:
            module._buffers[own] = tensor


def _reader(path: Path) -> Callable[[str], Tensor]:
    """Tensors of a file by their names, read into memory of their own: a mapped file would stay there beside them."""
    stored = {one.name: one for one in list_tensors(read_weight_file(path))}
    return lambda name: stored[name].read()


def _typed(data: Tensor, dtype: str, shape: list[int]) -> Tensor:
    """The bytes of a contiguous tensor as one of another dtype, in safetensors' words, and shape."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype} is not known")
    return data.reshape(-1).view(torch.uint8).view(DTYPES[dtype]).view(shape)


def _put_packed(model: nn.Module, name: str, module: nn.Module, packed: PackedMatrix) -> None:
    layer = packed_layer(module, packed)
    layer.check()
    put(model, name, layer)


def _first_dtype(manifest: Manifest) -> torch.dtype:
    """That of the first tensor of floating point, as transformers has it where config.json names none."""
    found = (DTYPES[record.dtype] for record in manifest.tensors.values() if record.dtype in DTYPES)
    return next((dtype for dtype in found if dtype.is_floating_point), torch.float32)
