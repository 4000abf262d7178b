"""Checks of a model that the caller holds in memory: its weights have to be there, as plain tensors on one device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers.pytorch_utils import Conv1D

from alps.core.errors import UnsupportedModel
from alps.models.architecture_check import check_model_class

_BY_NAME = "load it without device_map, or give alps the name of its checkpoint, which it prunes one block at a time"


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside the wrappers of torch.compile and data parallelism, whose weights are its own."""
    while True:
        if isinstance(model, nn.DataParallel | DistributedDataParallel):
            model = model.module
        elif (inner := model._modules.get("_orig_mod")) is not None:
            model = inner
        else:
            return model


def eager(model: nn.Module) -> AbstractContextManager[None]:
    """Context in which parts that were compiled by `Module.compile` run as written, since hooks need that."""
    if any(module._compiled_call_impl is not None for module in model.modules()):
        stance: AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
        return stance
    return nullcontext()


def check_weights_in_memory(model: nn.Module) -> None:
    """Refuse a model some of whose weights are elsewhere.

    Args:
        model: a causal language model, unwrapped.

    Raises:
        UnsupportedModel: for a model of another kind, one that returns tuples, and weights that are offloaded, sharded,
            spread over several devices, or on the meta device.
    """
    check_model_class(model)
    if not hasattr(model, "get_input_embeddings"):
        raise UnsupportedModel(f"{type(model).__name__} is not a model of transformers: give the model inside it.")
    if getattr(getattr(model, "config", None), "return_dict", True) is False:
        raise UnsupportedModel("The model returns tuples: set model.config.return_dict = True.")
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "device_mesh") or hasattr(parameter, "_fsdp_flattened") or hasattr(parameter, "ds_id"):
            raise UnsupportedModel(
                f"The model is sharded over processes ({name} is a part of a weight): {_BY_NAME}, with torchrun if "
                "there are several processes."
            )
    if any(_offloads(hook) for module in model.modules() for hook in _hooks(module)):
        raise UnsupportedModel(f"Weights of the model are offloaded by accelerate: {_BY_NAME}.")
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise UnsupportedModel(f"The model has no weights ({name} is on the meta device): {_BY_NAME}.")
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    if len(devices) > 1:
        raise UnsupportedModel(f"The model is spread over {' and '.join(devices)}: {_BY_NAME}.")


def check_writable_weights(model: nn.Module) -> None:
    """Refuse a model whose weights cannot be replaced by others, because they are not plain matrices.

    Args:
        model: that has passed `check_weights_in_memory`.

    Raises:
        UnsupportedModel: for quantized weights, adapters, and weights that are computed from others.
    """
    quantization = getattr(getattr(model, "config", None), "quantization_config", None)
    # Weights from a GGUF file are plain tensors.
    if quantization is not None and "gguf" not in str(quantization).lower():
        raise UnsupportedModel("The model is quantized: prune the unquantized checkpoint instead.")
    for name, parameter in model.named_parameters():
        if not _is_plain(parameter):
            raise UnsupportedModel(
                f"The model is quantized ({name} is {str(parameter.dtype).removeprefix('torch.')} in a "
                f"{type(parameter).__name__}): prune the unquantized checkpoint instead."
            )
    for name, module in model.named_modules():
        if type(module).__module__.partition(".")[0] == "peft":
            raise UnsupportedModel(
                f"The model holds adapters of PEFT ({name or type(module).__name__}): merge them first, by "
                "model = model.merge_and_unload()."
            )
        if name.rpartition(".")[2] == "_orig_mod":
            raise UnsupportedModel(
                f"{name.removesuffix('._orig_mod')} is wrapped by torch.compile, which changes the names of its "
                "weights: compile it after pruning."
            )
        if isinstance(module, nn.Linear | Conv1D) and module._parameters.get("weight") is None:
            raise UnsupportedModel(
                f"The weight of {name} is computed from other tensors: make it a parameter first, by "
                "torch.nn.utils.parametrize.remove_parametrizations or torch.nn.utils.prune.remove."
            )


def _is_plain(parameter: Tensor) -> bool:
    """Check if a parameter is an ordinary tensor of two bytes or more a number."""
    is_ordinary = type(parameter) in (nn.Parameter, Tensor) and type(parameter.data) is Tensor
    return is_ordinary and parameter.dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _hooks(module: nn.Module) -> Iterator[Any]:
    """Yield the hooks of accelerate on a module."""
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:
        yield from getattr(hook, "hooks", (hook,))


def _offloads(hook: Any) -> bool:
    return bool(getattr(hook, "offload", False)) or type(hook).__name__ == "CpuOffload"
