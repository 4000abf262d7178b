"""LoRA under the mask of a pruned weight: layers compute and merge `W + mask * scaling * B A`.

Plain LoRA trains `W + scaling * B A`, which is dense. Zeros that are set after its merge take a part of what was
trained away. Here the same product is masked in every forward pass, so that the merged layer is the trained one, as
SparsePEFT does (SQFT, arXiv 2410.03750).

PEFT calls a variant of LoRA where a layer has one, which is how its own variants are made (`peft.tuners.lora.layer`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from alps.core.errors import UnsupportedModel
from alps.finetuning.zero_mask import ZeroMask

_REMEDY = "call alps.keep_zeros before get_peft_model, which sets the zeros again at the end of its context"


class MaskedLora:
    """Variant of LoRA for one layer, with the interface of `peft.tuners.lora.layer.LoraVariant`.

    Args:
        mask: of the layer's weight.
    """

    def __init__(self, mask: ZeroMask) -> None:
        self._mask = mask

    def supports_lora_conversion(self) -> bool:
        """Return False: the masked product has no low rank."""
        return False

    def init(self, module: Any, adapter_name: str, **kwargs: Any) -> None:
        """Do nothing, since the parameters are those of plain LoRA."""

    def merge_safe(self, module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """Return the merged weight; its zeros stay zeros."""
        with torch.no_grad():
            return orig_weight + self._product(module, active_adapter).to(orig_weight.dtype)

    def merge_unsafe(self, module: Any, active_adapter: str, orig_weight: Tensor) -> None:
        """Merge into the weight in place; its zeros stay zeros."""
        with torch.no_grad():
            orig_weight += self._product(module, active_adapter)

    def unmerge(self, module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """Return the weight without the adapter."""
        with torch.no_grad():
            return orig_weight - self._product(module, active_adapter).to(orig_weight.dtype)

    def forward(self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **_kwargs: Any) -> Tensor:
        """Add the masked product with the inputs to the output of the layer without an adapter.

        The dense product is computed again in the backward pass, so that one layer's is in memory at a time.
        """
        bias = module.lora_B[active_adapter].bias

        def run(inputs: Tensor) -> Tensor:
            weight = self._product(module, active_adapter)
            scaled = None if bias is None else bias * module.scaling[active_adapter]
            return F.linear(inputs, weight.T if module.fan_in_fan_out else weight, scaled)

        inputs = module.lora_dropout[active_adapter](x)
        if not torch.is_grad_enabled():
            return result + run(inputs)
        output: Tensor = checkpoint(run, inputs, use_reentrant=False, preserve_rng_state=False)
        return result + output

    def _product(self, module: Any, adapter: str) -> Tensor:
        """Return `mask * scaling * B A` in the shape of the weight and the dtype of the adapter."""
        product: Tensor = _Masked.apply(module.get_delta_weight(adapter), self._mask)  # type: ignore[no-untyped-call]
        return product


class _Masked(torch.autograd.Function):
    """Product of a tensor and a mask, whose gradient is masked, too."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, mask: ZeroMask) -> Tensor:
        ctx.mask = mask
        return mask.applied_to(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.mask.applied_to(gradient), None


def adapter_modules(model: nn.Module) -> set[int]:
    """Return the ids of all modules that adapters of PEFT add to the layers of a model."""
    return {
        id(module)
        for _, wrapper in _adapted_layers(model)
        for name, child in wrapper.named_children()
        if name != "base_layer"
        for module in child.modules()
    }


def mask_adapters(model: nn.Module, masks: Mapping[int, ZeroMask]) -> int:
    """Put every LoRA adapter of a layer that has zeros under the mask of these.

    Args:
        model: with or without adapters of PEFT.
        masks: by the id of the parameter.

    Returns:
        Number of layers with adapters under a mask.

    Raises:
        UnsupportedModel: for adapters that are no plain LoRA of a linear layer, or that are merged at present.
    """
    layers = []
    for name, wrapper in _adapted_layers(model):
        base = wrapper
        while hasattr(base, "base_layer"):
            base = base.base_layer
        mask = next((masks[id(p)] for p in base.parameters(recurse=False) if id(p) in masks), None)
        if mask is not None:
            _check_plain(name, wrapper)
            layers.append((wrapper, mask))
    for wrapper, mask in layers:
        wrapper.lora_variant.update(dict.fromkeys(wrapper.lora_A, MaskedLora(mask)))
    return len(layers)


def _adapted_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the layers that PEFT has wrapped, with their names."""
    for name, module in model.named_modules():
        if type(module).__module__.partition(".")[0] == "peft" and hasattr(module, "base_layer"):
            yield name, module


def _check_plain(name: str, wrapper: Any) -> None:
    kind = type(wrapper)
    if (kind.__module__, kind.__name__) != ("peft.tuners.lora.layer", "Linear") or not hasattr(wrapper, "lora_variant"):
        raise UnsupportedModel(
            f"The adapter of {name} ({kind.__name__}) cannot be trained under the mask of its zeros, only LoRA of PEFT "
            f"0.18 or newer on linear layers can: {_REMEDY}."
        )
    variants = [variant for variant in wrapper.lora_variant.values() if not isinstance(variant, MaskedLora)]
    if variants:
        raise UnsupportedModel(
            f"The adapter of {name} is a variant of LoRA, such as DoRA, which cannot be trained under the mask of its "
            f"zeros: {_REMEDY}."
        )
    if wrapper.merged:
        raise UnsupportedModel(
            f"The adapter of {name} is merged, so zeros of the layer are gone: call model.unmerge_adapter() before "
            "alps.keep_zeros."
        )
