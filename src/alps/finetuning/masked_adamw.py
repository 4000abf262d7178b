"""Masked training: float32 masters of the kept weights alone, so that a pruned weight cannot come back.

A pruned entry has no master, no gradient and no moment, and nothing is ever written to it. The model itself holds the
weights as they will be stored, so that every loss is that of the checkpoint that would be written now.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor, nn

from alps.models.blocks import Block
from alps.models.sites import Site, routing_parameters

_CLIP = 1.0
_BETAS = (0.9, 0.95)


@dataclass(frozen=True)
class TrainableParameter:
    """A parameter to train.

    Attributes:
        parameter: of a model, in the dtype in which it computes.
        mask: boolean, shape of the parameter, True = kept; None trains every entry, and lets it become zero.
        stored: dtype in which a checkpoint keeps the parameter.
    """

    parameter: Tensor
    mask: Tensor | None
    stored: torch.dtype

    def take(self, dense: Tensor) -> Tensor:
        """The kept entries of a tensor of the parameter's shape, as a vector."""
        return dense.flatten() if self.mask is None else dense.masked_select(self.mask)

    def put(self, values: Tensor) -> None:
        """Write the kept entries; all others are left alone."""
        with torch.no_grad():
            if self.mask is None:
                self.parameter.copy_(values.view_as(self.parameter))
            else:
                self.parameter.masked_scatter_(self.mask, values.to(self.parameter.dtype))

    def rounded(self, master: Tensor) -> Tensor:
        """The master as it is stored. A kept weight that rounds to zero becomes the smallest normal number instead:
        it would join the pruned ones otherwise."""
        values = master.to(self.stored)
        if self.mask is None:
            return values
        return values.masked_fill_(values == 0, torch.finfo(self.stored).tiny)


def trainable_parameters(block: Block, norms: bool) -> list[TrainableParameter]:
    """Sites with a weight left, with their masks, and all norms and biases but routers' if wanted; nothing fixed."""
    sites: dict[int, list[Site]] = {}
    for site in block.sites:
        sites.setdefault(id(site.parameter), []).append(site)
    routing = routing_parameters(block.module)
    found = []
    for name, parameter in block.module.named_parameters():
        if name in block.frozen:
            continue
        if id(parameter) in sites:
            mask = _kept(parameter, sites[id(parameter)])
            found += [TrainableParameter(parameter, mask, parameter.dtype)] if bool(mask.any()) else []
        elif norms and parameter.ndim == 1 and id(parameter) not in routing:
            found.append(TrainableParameter(parameter, None, parameter.dtype))
    return found


def _kept(parameter: Tensor, sites: Sequence[Site]) -> Tensor:
    """Mask of the nonzero weights; of a fused parameter those of the experts among `sites`."""
    mask = parameter.detach() != 0
    experts = {site.expert for site in sites if site.expert is not None}
    if experts:
        for expert in set(range(len(mask))) - experts:
            mask[expert] = False
    return mask


class MaskedAdamW:
    """float32 masters of parameters and AdamW on them; use as a context, which gives the model's flags back.

    Within the context only the tuned parameters take gradients, and each gradient is moved to the sums of its master as
    soon as a backward pass has it: gradients of several passes add up in `sums`, and no dense ones stay in memory.
    """

    def __init__(
        self, model: nn.Module, tuned: Sequence[TrainableParameter], rate: float, sums: torch.dtype = torch.float32
    ) -> None:
        self._model, self._rate = model, rate
        self._tuned = [entry for entry in tuned if entry.mask is None or bool(entry.mask.any())]
        self._masters = [entry.take(entry.parameter.detach()).float().clone() for entry in self._tuned]
        self._sums = [torch.zeros_like(master, dtype=sums) for master in self._masters]
        fused = all(master.device.type in ("cpu", "cuda") for master in self._masters)
        self._adam = torch.optim.AdamW(self._masters, lr=rate, betas=_BETAS, weight_decay=0.0, fused=fused)

    @property
    def entries(self) -> int:
        """Weights that are trained."""
        return sum(master.numel() for master in self._masters)

    def __enter__(self) -> MaskedAdamW:
        self._flags = [(parameter, parameter.requires_grad) for parameter in self._model.parameters()]
        self._model.requires_grad_(False)
        self._hooks = []
        for entry, sums in zip(self._tuned, self._sums, strict=True):
            entry.parameter.requires_grad_(True)
            hook = entry.parameter.register_post_accumulate_grad_hook(_mover(entry, sums))  # type: ignore[no-untyped-call]
            self._hooks.append(hook)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)

    def add_up(self, total: Callable[[Tensor], Tensor]) -> None:
        """Sum the gradients over the processes that train the same weights on other batches."""
        for sums in self._sums:
            sums.copy_(total(sums))

    def step(self, share: float, passes: int = 1) -> bool:
        """Clip the gradients, take one step of Adam at this share of its largest size, and publish the weights.

        Args:
            share: of the largest step size.
            passes: of which the mean gradient is taken; 1 for the sum of all.

        Returns:
            False, with nothing changed, when a gradient is not finite.
        """
        for master, sums in zip(self._masters, self._sums, strict=True):
            master.grad = sums.div_(passes).to(master.dtype)
        norm = torch.nn.utils.clip_grad_norm_(self._masters, _CLIP)
        if not bool(norm.isfinite()):
            return False
        for group in self._adam.param_groups:
            group["lr"] = self._rate * share
        self._adam.step()
        for entry, master, sums in zip(self._tuned, self._masters, self._sums, strict=True):
            sums.zero_()
            entry.put(entry.rounded(master))
        return True

    def snapshot(self) -> list[Tensor]:
        """The trained entries as they are now, in the dtype in which they are stored."""
        return [entry.take(entry.parameter.detach()).to(entry.stored, copy=True) for entry in self._tuned]

    def restore(self, kept: list[Tensor]) -> None:
        """Put a snapshot back into the model; the masters stay where they are, so training ends with this."""
        for entry, values in zip(self._tuned, kept, strict=True):
            entry.put(values)


def _mover(entry: TrainableParameter, sums: Tensor) -> Callable[[Tensor], None]:
    def move(parameter: Tensor) -> None:
        assert parameter.grad is not None
        sums.add_(entry.take(parameter.grad))
        parameter.grad = None

    return move
