"""Routing among some of the experts of a full block, as the router of the smaller block would do it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from alps.models.shrink_layout import Family

# Score of an expert that must not be chosen: its softmax and its sigmoid are zero in every dtype.
_UNREACHABLE = -3e4


@contextmanager
def route_among(module: nn.Module, family: Family, experts: Tensor) -> Iterator[None]:
    """Context in which the router of a block sends tokens to some of its experts only.

    The forward of its class runs, with the rules for scores, groups and weights; a block without experts is unchanged.

    Args:
        module: the block.
        family: of the model.
        experts: numbers of the experts that can be chosen.
    """
    name = "" if family.experts is None else f"{family.experts.mixture}.{family.experts.router}"
    if family.experts is None or name not in dict(module.named_modules()):
        yield
        return
    router = module.get_submodule(name)
    mode = _RoutingMask(len(router.get_parameter("weight")), experts)
    state = router.state_dict()
    corrections = {name: state[name].clone() for name in family.experts.corrections if name in state}
    handles = [
        router.register_forward_pre_hook(mode.begin),
        router.register_forward_hook(mode.end, always_call=True),
    ]
    try:
        for name in corrections:
            state[name][..., mode.removed.to(state[name].device)] = -torch.inf
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name, values in corrections.items():
            state[name].copy_(values)


class _RoutingMask(TorchFunctionMode):
    """Mode in which products with one output for each expert have unreachable ones."""

    def __init__(self, count: int, experts: Tensor) -> None:
        super().__init__()
        self.removed = torch.ones(count, dtype=torch.bool)
        self.removed[experts.cpu()] = False

    def begin(self, _router: nn.Module, _args: Any) -> None:
        """Enter the mode before a forward of the router."""
        self.__enter__()  # type: ignore[no-untyped-call]

    def end(self, _router: nn.Module, _args: Any, _outputs: Any) -> None:
        """Leave the mode after a forward of the router, even one that failed."""
        self.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        outputs = func(*args, **(kwargs or {}))
        if func is F.linear and outputs.shape[-1] == len(self.removed):
            return outputs.masked_fill(self.removed.to(outputs.device), _UNREACHABLE)
        return outputs
