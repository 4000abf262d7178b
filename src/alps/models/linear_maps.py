"""Linear maps: modules whose forward is the product of their inputs and their weight, plus a bias.

`nn.Linear` and `Conv1D` are such modules. A subclass may compute something else with its weight, such as a
block-diagonal product; it is compared with the product on random inputs.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

# Largest distance of a linear map's outputs from the product, relative to the product.
_TOLERANCE = 1e-3


def is_linear_layer(module: nn.Module) -> bool:
    """Check if a module is an `nn.Linear` or a `Conv1D`, or a subclass, that owns a floating-point weight matrix."""
    weight = module._parameters.get("weight")
    is_matrix = weight is not None and weight.ndim == 2 and weight.is_floating_point()
    return isinstance(module, nn.Linear | Conv1D) and is_matrix


class ProductCheck:
    """Check of subclasses of linear layers; the result for equal modules is kept."""

    def __init__(self) -> None:
        """Start without results."""
        self._results: dict[Hashable, bool] = {}

    def __call__(self, module: nn.Module) -> bool:
        """Return True if a linear layer computes its product; its weights may be on the meta device.

        The forward of its class runs on a copy with random weights, on the CPU and in float32.
        """
        if type(module) in (nn.Linear, Conv1D):
            return True
        key = _identity(module)
        if key not in self._results:
            self._results[key] = _computes_product(module)
        return self._results[key]


def _identity(module: nn.Module) -> Hashable:
    """Return what the forward of a linear layer may depend on; modules that hold other modules equal no other."""
    settings = {name: value for name, value in vars(module).items() if isinstance(value, bool | int | float | str)}
    tensors = [(name, p.shape) for name, p in module._parameters.items() if p is not None]
    is_simple = not module._modules and not module._buffers
    return type(module), *sorted(settings.items()), *tensors, None if is_simple else id(module)


def _computes_product(module: nn.Module) -> bool:
    generator = torch.Generator().manual_seed(0)
    random_copy = _random_copy(module, generator).eval()
    weight, bias = random_copy._parameters["weight"], random_copy._parameters.get("bias")
    assert weight is not None
    matrix = weight.T if isinstance(module, Conv1D) else weight
    inputs = torch.randn(2, 3, matrix.shape[1], generator=generator)
    with torch.no_grad():
        expected = F.linear(inputs, matrix, bias)
        try:
            # Called by the class: hooks and replaced forwards of the instance belong to the original.
            outputs = type(random_copy).forward(random_copy, inputs)
        except Exception:  # a forward that takes other arguments or shapes may raise anything
            return False
    if not isinstance(outputs, Tensor) or outputs.shape != expected.shape:
        return False
    return bool((outputs - expected).norm() <= _TOLERANCE * expected.norm())


def _random_copy(module: nn.Module, generator: torch.Generator) -> nn.Module:
    """Return a copy with random parameters in float32 on the CPU; buffers on the meta device become zeros."""
    replacements: dict[int, object] = {}
    for parameter in module.parameters():
        values = torch.randn(parameter.shape, generator=generator) / max(parameter.shape[-1], 1) ** 0.5
        replacements[id(parameter)] = nn.Parameter(values, requires_grad=False)
    for buffer in module.buffers():
        values = torch.zeros(buffer.shape, dtype=buffer.dtype) if buffer.is_meta else buffer.detach().cpu().clone()
        replacements[id(buffer)] = values
    return copy.deepcopy(module, replacements)
