"""AdamW on float32 master copies of the kept weights only, so that a pruned weight cannot come back.

A pruned entry has no master, no gradient and no moment, and is never written to. The model holds the weights in their
stored precision, so that every loss is that of the checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import TracebackType

import torch
from torch import Tensor, nn

from alps.models.blocks import Block
from alps.models.routers import routing_parameters
from alps.models.sites import Site

_CLIP = 1.0
_BETAS = (0.9, 0.95)


@dataclass(frozen=True)
class TrainableParameter:
    """Parameter to train.

    Attributes:
        parameter: of a model, in the dtype in which it computes.
        mask: boolean, shape of the parameter, True = kept; None trains every entry, and lets it become zero.
        stored_dtype: dtype of the parameter in a checkpoint.
    """

    parameter: Tensor
    mask: Tensor | None
    stored_dtype: torch.dtype

    @cached_property
    def _kept(self) -> Tensor:
        """Positions of the kept entries in the flattened parameter, with which a CPU is faster than with the mask."""
        assert self.mask is not None
        dtype = torch.int32 if self.mask.numel() < 2**31 else torch.int64
        return self.mask.flatten().nonzero().squeeze(1).to(dtype)

    def gather(self, dense: Tensor) -> Tensor:
        """Return the kept entries of a tensor of the parameter's shape, as a vector."""
        return dense.flatten() if self.mask is None else dense.flatten().index_select(0, self._kept)

    def scatter(self, values: Tensor) -> None:
        """Write a vector to the kept entries of the parameter; all others keep their bits."""
        with torch.no_grad():
            if self.mask is None:
                self.parameter.copy_(values.view_as(self.parameter))
            else:
                self.parameter.view(-1).index_copy_(0, self._kept.long(), values.to(self.parameter.dtype))

    def round(self, master: Tensor) -> Tensor:
        """Convert a master copy to the stored dtype.

        A kept weight that rounds to zero becomes the smallest normal number, since a zero would count as pruned.
        """
        values = master.to(self.stored_dtype)
        if self.mask is None:
            return values
        return values.masked_fill_(values == 0, torch.finfo(self.stored_dtype).tiny)


def trainable_parameters(block: Block, norms: bool) -> list[TrainableParameter]:
    """List the trainable parameters of a block, without those that are fixed.

    Args:
        block: pruned block.
        norms: include norms and biases, except those of routers.

    Returns:
        Layers that have a nonzero weight, with their masks, and norms and biases.
    """
    sites: dict[int, list[Site]] = {}
    for site in block.sites:
        sites.setdefault(id(site.parameter), []).append(site)
    routing = routing_parameters(block.module)
    trainable = []
    for name, parameter in block.module.named_parameters():
        if name in block.frozen:
            continue
        if id(parameter) in sites:
            mask = _nonzero_mask(parameter, sites[id(parameter)])
            trainable += [TrainableParameter(parameter, mask, parameter.dtype)] if bool(mask.any()) else []
        elif norms and parameter.ndim == 1 and id(parameter) not in routing:
            trainable.append(TrainableParameter(parameter, None, parameter.dtype))
    return trainable


def _nonzero_mask(parameter: Tensor, sites: Sequence[Site]) -> Tensor:
    """Return the mask of the nonzero weights; of a fused parameter only those of the experts among `sites`."""
    mask = parameter.detach() != 0
    experts = {site.expert for site in sites if site.expert is not None}
    if experts:
        for expert in set(range(len(mask))) - experts:
            mask[expert] = False
    return mask


class MaskedAdamW:
    """AdamW on float32 master copies of parameters; a context that restores the model's gradient flags.

    Within the context only the trainable parameters get gradients. A backward pass adds each gradient to the sums of
    its master immediately, so that gradients of several passes add up and no dense gradient stays in memory.

    Args:
        model: contains the parameters; all others are frozen within the context.
        trainable: parameters to train; those with an empty mask are left out.
        lr: largest step size.
        sum_dtype: dtype of the gradient sums.
    """

    def __init__(
        self,
        model: nn.Module,
        trainable: Sequence[TrainableParameter],
        lr: float,
        sum_dtype: torch.dtype = torch.float32,
    ) -> None:
        self._model, self._lr = model, lr
        self._trainable = [entry for entry in trainable if entry.mask is None or bool(entry.mask.any())]
        self._masters = [entry.gather(entry.parameter.detach()).float().clone() for entry in self._trainable]
        self._sums = [torch.zeros_like(master, dtype=sum_dtype) for master in self._masters]
        fused = all(master.device.type in ("cpu", "cuda") for master in self._masters)
        self._adam = torch.optim.AdamW(self._masters, lr=lr, betas=_BETAS, weight_decay=0.0, fused=fused)

    @property
    def entries(self) -> int:
        """Number of trained weights."""
        return sum(master.numel() for master in self._masters)

    def __enter__(self) -> MaskedAdamW:
        self._flags = [(parameter, parameter.requires_grad) for parameter in self._model.parameters()]
        self._model.requires_grad_(False)
        self._hooks = []
        for entry, sums in zip(self._trainable, self._sums, strict=True):
            entry.parameter.requires_grad_(True)
            hook = entry.parameter.register_post_accumulate_grad_hook(_grad_hook(entry, sums))  # type: ignore[no-untyped-call]
            self._hooks.append(hook)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)

    def all_reduce_grads(self, all_reduce_sum: Callable[[Tensor], Tensor]) -> None:
        """Sum the gradients over the ranks that train the same weights on other batches."""
        for sums in self._sums:
            sums.copy_(all_reduce_sum(sums))

    def step(self, share: float, passes: int = 1) -> bool:
        """Clip the gradients, take a step of AdamW, and write the weights to the model.

        Args:
            share: of the largest step size.
            passes: divisor of the gradient sums.

        Returns:
            False, with the weights unchanged, when a gradient is not finite.
        """
        for master, sums in zip(self._masters, self._sums, strict=True):
            master.grad = sums.div_(passes).to(master.dtype)
        norm = torch.nn.utils.clip_grad_norm_(self._masters, _CLIP)
        if not bool(norm.isfinite()):
            return False
        for group in self._adam.param_groups:
            group["lr"] = self._lr * share
        self._adam.step()
        for entry, master, sums in zip(self._trainable, self._masters, self._sums, strict=True):
            sums.zero_()
            entry.scatter(entry.round(master))
        return True

    def snapshot(self) -> list[Tensor]:
        """Copy the trained entries, in their stored dtype."""
        return [entry.gather(entry.parameter.detach()).to(entry.stored_dtype, copy=True) for entry in self._trainable]

    def restore(self, snapshot: list[Tensor]) -> None:
        """Write a snapshot to the model. Training must end then, since the master copies are not restored."""
        for entry, values in zip(self._trainable, snapshot, strict=True):
            entry.scatter(values)


def _grad_hook(entry: TrainableParameter, sums: Tensor) -> Callable[[Tensor], None]:
    def hook(parameter: Tensor) -> None:
        assert parameter.grad is not None
        sums.add_(entry.gather(parameter.grad))
        parameter.grad = None

    return hook
