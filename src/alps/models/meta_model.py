"""Open a checkpoint without its weights: a skeleton on the meta device that knows where each of its tensors lies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, GenerationConfig

from alps.checkpoints.safetensors_io import list_tensors
from alps.checkpoints.weight_files import INDEX_NAME, SINGLE_NAME, find_weight_files
from alps.core.errors import first_line
from alps.models.auto_class import auto_class
from alps.models.hub import fetched_directory
from alps.models.key_mapping import find_origin
from alps.models.lazy_weights import LazyWeights
from alps.models.load import looks_local, quiet, readable


def open_lazy_model(place: str, dtype: torch.dtype | None) -> LazyWeights | str:
    """A model whose weights stay in its checkpoint, or why this one has to be loaded whole.

    Args:
        place: what `alps.models.load.load_model` takes.
        dtype: of the weights in memory; None keeps the checkpoint's.

    Raises:
        CheckpointError: when a file of the checkpoint is damaged.
    """
    with quiet(), readable(place):
        directory = Path(place).expanduser() if looks_local(place) else fetched_directory(place)
    if directory is None or not any((directory / name).is_file() for name in (SINGLE_NAME, INDEX_NAME)):
        return "it has no safetensors files"
    files = {file: list_tensors(file) for file in find_weight_files(directory)}
    stored = {one.name: one for tensors in files.values() for one in tensors}
    try:
        model = _skeleton(directory, dtype, {one.dtype for one in stored.values() if one.dtype.is_floating_point})
    except Exception as error:
        return f"transformers cannot build it without its weights ({first_line(error)})"
    if _keeps_float32(model):
        return "some of its weights are kept in float32 whatever the checkpoint's dtype"
    shapes = {name: one.shape for name, one in stored.items()}
    prefix = str(getattr(model, "base_model_prefix", ""))
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    origins = {}
    for name, parameter in model.named_parameters():
        candidates = (find_origin(one, parameter.shape, shapes, prefix) for one in names[id(parameter)])
        found = next((one for one in candidates if one is not None), None)
        if found is None:
            return f"its checkpoint holds {name} under another name"
        if not all(stored[part].dtype.is_floating_point for row in found.parts for part in row):
            return f"its checkpoint holds {name} in integers"
        origins[name] = found
    persistent = model.state_dict().keys()
    for name, buffer in model.named_buffers():
        if buffer.is_meta:
            return f"{name} has no values before weights are loaded"
        if name in persistent:
            found = find_origin(name, buffer.shape, shapes, prefix)
            if found is None:
                return f"its checkpoint holds {name} under another name"
            with torch.no_grad():
                buffer.copy_(found.join(lambda part: stored[part].read()))
    return LazyWeights(model, directory, files, origins)


def empty_model(config: Any, dtype: torch.dtype) -> nn.Module:
    """A model of transformers whose parameters, all of one dtype, have no memory.

    Buffers that no checkpoint holds, such as rotary frequencies, are computed as ever.
    """
    with init_empty_weights(include_buffers=False), _UnfilledOnMeta():
        model: nn.Module = auto_class(config).from_config(config, dtype=dtype)
    model.config.dtype = dtype  # from_config says it in newer releases only
    model.tie_weights()  # type: ignore[operator]
    return model


def _skeleton(directory: Path, dtype: torch.dtype | None, stored: set[torch.dtype]) -> nn.Module:
    with quiet():
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        chosen = dtype or getattr(config, "dtype", None)
        if not isinstance(chosen, torch.dtype):
            (chosen,) = stored  # several raise a ValueError: transformers takes the first one it meets
        model = empty_model(config, chosen)
        if (directory / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(directory)
    model.config._name_or_path = str(directory)  # type: ignore[union-attr]
    return model.eval()


class _UnfilledOnMeta(TorchFunctionMode):
    """Tensors without values are parameters that are not there yet.

    accelerate lets each take memory for a moment, which a large model does not survive: pieces of many sizes that were
    freed add up.
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
    halves = {torch.float16: ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")}
    names = halves.get(dtype, ("_keep_in_fp32_modules_strict",) if dtype == torch.bfloat16 else ())
    return any(getattr(model, name, None) for name in names)
