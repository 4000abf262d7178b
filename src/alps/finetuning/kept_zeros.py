"""Zeros that stay zeros while a pruned model is trained by any loop: hooks on gradients, optimisers and adapters."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from alps.core.errors import UnsupportedModel
from alps.finetuning.masked_lora import adapter_modules, mask_adapters
from alps.finetuning.zero_mask import ZeroMask
from alps.inference.convert import packed_modules
from alps.models.blocks import find_blocks
from alps.models.memory_check import unwrap


class KeptZeros:
    """Handle of `keep_zeros`, and a context that ends it.

    Attributes:
        zeros: number of zeros that are kept.
        entries: number of weights of the layers that have zeros.
        layers: number of parameters that have zeros.
        adapters: number of layers whose LoRA adapters are under a mask.
    """

    def __init__(self, model: nn.Module, masks: Sequence[ZeroMask], adapters: int) -> None:
        self._masks = list(masks)
        self.zeros, self.entries = sum(mask.zeros for mask in masks), sum(mask.entries for mask in masks)
        self.layers, self.adapters = len(masks), adapters
        self._hooks = [_mask_gradients(mask) for mask in masks]
        self._hooks.append(register_optimizer_step_post_hook(self._after_step))
        # The hook on optimisers is global: it must not outlive the model.
        weakref.finalize(model, self._hooks[-1].remove)

    @property
    def nbytes(self) -> int:
        """Bytes of the masks: one bit for each weight."""
        return sum(mask.nbytes for mask in self._masks)

    def __repr__(self) -> str:
        text = f"{self.zeros:,} zeros of {self.entries:,} weights in {self.layers} layers"
        return f"KeptZeros({text}, {self.adapters} adapters)" if self.adapters else f"KeptZeros({text})"

    def __enter__(self) -> KeptZeros:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def apply(self) -> None:
        """Set all zeros again, for example after adapters were merged that were not under the mask."""
        for mask in self._masks:
            mask.apply()

    def remove(self) -> None:
        """Set all zeros again and remove the hooks; adapters stay under the mask under which they were trained."""
        for hook in self._hooks:
            hook.remove()
        self.apply()

    def _after_step(self, optimiser: Optimizer, _args: Any, _kwargs: Any) -> None:
        """Set the zeros of the parameters of an optimiser again after its step, whatever it adds to them."""
        held = {id(parameter) for group in optimiser.param_groups for parameter in group["params"]}
        for mask in self._masks:
            if id(mask.parameter) in held:
                mask.apply()


def keep_zeros(model: nn.Module) -> KeptZeros:
    """Keep every zero of a pruned model zero while any training loop trains it.

    The gradients of the zeros are zero from now on, and the zeros are set again after every step of any optimiser of
    torch: the other weights become what they would be if the zeros were no parameters. This holds until `remove` or the
    end of the context. The masks take one bit for each weight.

    LoRA adapters of PEFT that the model has already are trained under the mask, so that a merge keeps the zeros and
    gives the model that was trained. If adapters are added and merged later, the zeros are set again by `apply` or at
    the end of the context.

    Args:
        model: a pruned causal language model in memory, or one of PEFT around it. Zeros are those of the linear layers
            in its decoder blocks, as `alps inspect` counts them.

    Returns:
        A handle, which is a context manager: `with alps.keep_zeros(model): trainer.train()`.

    Raises:
        UnsupportedModel: when the model has no zeros, or is packed, quantized, sharded or on the meta device, and for
            adapters that cannot be trained under a mask.
    """
    base: Any = unwrap(model)
    if hasattr(base, "get_base_model"):
        base = base.get_base_model()
    _check(base)
    added = adapter_modules(base)
    owners = {
        id(site.parameter): (site.parameter_name, site.module, site.attribute)
        for block in find_blocks(base)
        for site in block.sites
        if id(site.module) not in added
    }
    masks = {key: mask for key, owner in owners.items() if (mask := ZeroMask(*owner)).zeros}
    if not masks:
        raise UnsupportedModel(
            f"{type(base).__name__} has no zeros in the linear layers of its blocks: load the pruned checkpoint, and "
            "call alps.keep_zeros before the first step or merge."
        )
    adapters = mask_adapters(base, masks)
    return KeptZeros(base, list(masks.values()), adapters)


def _check(model: nn.Module) -> None:
    """Refuse a model whose zeros cannot be read."""
    if next(packed_modules(model), None) is not None:
        raise UnsupportedModel("The layers of the model are packed: train the unpacked checkpoint, see `alps unpack`.")
    quantization = getattr(getattr(model, "config", None), "quantization_config", None)
    # Weights from a GGUF file are plain tensors.
    if quantization is not None and "gguf" not in str(quantization).lower():
        raise UnsupportedModel(
            f"The model is quantized ({str(quantization)[:80]}): train the unquantized checkpoint, and quantize it "
            "afterwards."
        )
    for name, parameter in model.named_parameters():
        if parameter.is_meta or any(hasattr(parameter, mark) for mark in ("device_mesh", "_fsdp_flattened", "ds_id")):
            raise UnsupportedModel(
                f"{name} is sharded or on the meta device, so its zeros cannot be read: call alps.keep_zeros on a "
                "model whose weights are in the memory of this process."
            )


def _mask_gradients(mask: ZeroMask) -> torch.utils.hooks.RemovableHandle:
    """Register a hook that masks each gradient before it is added to the parameter's, also if it is frozen now."""
    parameter = mask.parameter
    assert parameter is not None
    flag = parameter.requires_grad
    parameter.requires_grad_(True)

    def hook(gradient: Tensor) -> Tensor:
        return mask.applied_to(gradient)

    handle: torch.utils.hooks.RemovableHandle = parameter.register_hook(hook)  # type: ignore[no-untyped-call]
    parameter.requires_grad_(flag)
    return handle
