"""Opening of a checkpoint without reading its weights: a model on the meta device, linked to its files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import GenerationConfig

from alps.checkpoints.safetensors_io import TensorOnDisk, list_tensors
from alps.checkpoints.weight_files import INDEX_NAME, SINGLE_NAME, find_weight_files
from alps.core.errors import AlpsError, CheckpointError, first_line
from alps.models.auto_class import auto_class
from alps.models.completeness import check_unused
from alps.models.configuration import load_config
from alps.models.hub import fetch_directory
from alps.models.key_mapping import KeyMapping, find_key_mapping
from alps.models.lazy_weights import LazyWeights
from alps.models.load import looks_local, quiet, readable
from alps.models.tied_head import stores_other_head, untie_config


class _NotLazy(Exception):
    """Reason why a checkpoint has to be loaded whole, as the end of a sentence."""


def open_lazy_model(name: str, dtype: torch.dtype | None) -> LazyWeights | str:
    """Open a model whose weights stay in its checkpoint.

    Args:
        name: directory or hub name, as for `alps.models.load.load_model`.
        dtype: of the weights in memory; None keeps the checkpoint's.

    Returns:
        The weights; or the reason why this checkpoint has to be loaded whole, as the end of a sentence.

    Raises:
        CheckpointError: when a file of the checkpoint is damaged.
    """
    with quiet(), readable(name):
        directory = Path(name).expanduser() if looks_local(name) else fetch_directory(name)
    if directory is None or not any((directory / file).is_file() for file in (SINGLE_NAME, INDEX_NAME)):
        return "it has no safetensors files"
    files = {file: list_tensors(file) for file in find_weight_files(directory)}
    stored = {tensor.name: tensor for tensors in files.values() for tensor in tensors}
    try:
        with quiet():
            config = load_config(str(directory))
            model = _meta_model(directory, config, dtype, stored)
            if stores_other_head(model, _reader(model, stored)):
                untie_config(config, name)
                model = _meta_model(directory, config, dtype, stored)
    except AlpsError:
        raise
    except Exception as error:
        return f"transformers cannot build it without its weights ({first_line(error)})"
    if _keeps_float32(model):
        return "some of its weights are kept in float32 whatever the checkpoint's dtype"
    try:
        mappings = _map_parameters(model, stored)
        used = {part for mapping in mappings.values() for row in mapping.parts for part in row}
        used |= _load_buffers(model, stored)
    except _NotLazy as reason:
        return str(reason)
    check_unused(name, model, stored, used)
    return LazyWeights(model, directory, files, mappings)


def empty_model(config: Any, dtype: torch.dtype) -> nn.Module:
    """Build a model of transformers on the meta device, with all parameters in one dtype.

    Buffers that no checkpoint holds, such as rotary frequencies, have their values.
    """
    with init_empty_weights(include_buffers=False), _EmptyOnMeta():
        kind = auto_class(config)
        build = kind.from_config if hasattr(kind, "from_config") else kind._from_config
        model: nn.Module = build(config, dtype=dtype)
    model.config.dtype = dtype  # older releases of transformers do not record it
    model.tie_weights()  # type: ignore[operator]
    return model


def _meta_model(
    directory: Path, config: Any, dtype: torch.dtype | None, stored: Mapping[str, TensorOnDisk]
) -> nn.Module:
    model_dtype = dtype or getattr(config, "dtype", None)
    if not isinstance(model_dtype, torch.dtype):
        # Raises for several, of which transformers would take the first.
        (model_dtype,) = {tensor.dtype for tensor in stored.values() if tensor.dtype.is_floating_point}
    model = empty_model(config, model_dtype)
    if (directory / "generation_config.json").is_file():
        model.generation_config = _generation_config(directory)
    model.config._name_or_path = str(directory)  # type: ignore[union-attr]
    return model.eval()


def _generation_config(directory: Path) -> GenerationConfig:
    try:
        return GenerationConfig.from_pretrained(directory)
    except Exception as error:  # its checks raise errors of many kinds
        path = directory / "generation_config.json"
        raise CheckpointError(f"'{path}' cannot be used ({first_line(error)}): correct or remove it.") from error


def _reader(model: nn.Module, stored: Mapping[str, TensorOnDisk]) -> Callable[[str], Tensor | None]:
    """Return a function that maps the stored tensor of a parameter into memory, or returns None if there is none."""
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    prefix = str(getattr(model, "base_model_prefix", ""))

    def read(name: str) -> Tensor | None:
        mapping = find_key_mapping(name, model.get_parameter(name).shape, shapes, prefix)
        return None if mapping is None else mapping.load(lambda part: stored[part].memory_map())

    return read


def _map_parameters(model: nn.Module, stored: Mapping[str, TensorOnDisk]) -> dict[str, KeyMapping]:
    """Return the tensors of the checkpoint for every parameter; a tied parameter may have any of its names there."""
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    prefix = str(getattr(model, "base_model_prefix", ""))
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    mappings = {}
    for name, parameter in model.named_parameters():
        candidates = (find_key_mapping(alias, parameter.shape, shapes, prefix) for alias in names[id(parameter)])
        mapping = next((candidate for candidate in candidates if candidate is not None), None)
        if mapping is None:
            raise _NotLazy(f"its checkpoint holds {name} under another name")
        if not all(stored[part].dtype.is_floating_point for row in mapping.parts for part in row):
            raise _NotLazy(f"its checkpoint holds {name} in integers")
        mappings[name] = mapping
    return mappings


def _load_buffers(model: nn.Module, stored: Mapping[str, TensorOnDisk]) -> set[str]:
    """Copy the values of all persistent buffers from the checkpoint, and return the tensors that were read."""
    used = set[str]()
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    prefix = str(getattr(model, "base_model_prefix", ""))
    persistent = model.state_dict().keys()
    for name, buffer in model.named_buffers():
        if buffer.is_meta:
            raise _NotLazy(f"{name} has no values before weights are loaded")
        if name in persistent:
            mapping = find_key_mapping(name, buffer.shape, shapes, prefix)
            if mapping is None:
                raise _NotLazy(f"its checkpoint holds {name} under another name")
            with torch.no_grad():
                buffer.copy_(mapping.load(lambda part: stored[part].read()))
            used |= {part for row in mapping.parts for part in row}
    return used


class _EmptyOnMeta(TorchFunctionMode):
    """Mode in which `torch.empty` allocates nothing: in the constructor of a model it makes parameters only.

    accelerate moves parameters to the meta device after they were allocated. In a large model the freed pieces of many
    sizes fragment the heap until memory runs out.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = torch.device("meta")
        return func(*args, **kwargs)


def _keeps_float32(model: nn.Module) -> bool:
    dtype = next(model.parameters()).dtype
    attributes = {
        torch.float16: ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"),
        torch.bfloat16: ("_keep_in_fp32_modules_strict",),
    }
    return any(getattr(model, name, None) for name in attributes.get(dtype, ()))
