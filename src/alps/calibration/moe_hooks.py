"""Mixtures of experts: what each expert's slice of a fused parameter is multiplied with, and tokens sent elsewhere.

The inputs of an expert's second map are no module's input. What is watched is the products themselves: while a block
runs, every product of torch whose second operand lies where a slice lies is a call of that slice.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from alps.calibration.block_inputs import replaced_forward
from alps.core.errors import UnsupportedModel
from alps.models.sites import Site

# Products of inputs with a weight by the name of the function: `linear` takes (out, in), the others (in, out).
_PRODUCTS = {"linear", "matmul", "mm", "bmm"}
# What the forwards that take any routing call their second argument.
_ROUTINGS = {"top_k_index", "router_indices"}


class _Products(TorchFunctionMode):
    """Calls `callback(site, x)` before every product of rows x with a watched slice."""

    def __init__(self, sites: Sequence[Site], callback: Callable[[Site, Tensor], None]) -> None:
        super().__init__()
        self._callback = callback
        self._sites = {site.read().data_ptr(): site for site in sites}
        self._fused = {site.parameter.data_ptr() for site in sites}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _PRODUCTS:
            x, weight = [*args, *kwargs.values()][:2]
            if weight.ndim == 3 and weight.data_ptr() in self._fused:
                # All experts at once, each with as many rows: those of tokens that went elsewhere are zero.
                for rows, one in zip(x, weight, strict=True):
                    self._note(rows[(rows != 0).any(dim=-1)], one)
            elif weight.ndim == 2:
                self._note(x, weight.T if name == "linear" else weight)
        return func(*args, **kwargs)

    def _note(self, x: Tensor, weight: Tensor) -> None:
        """One product x W with W (in, out)."""
        site = self._sites.get(weight.data_ptr())
        if site is None or weight.numel() != site.entries:
            return
        if weight.stride() != site.read().T.stride():
            raise UnsupportedModel(
                f"{site.parameter_name} of {type(site.module).__name__} is multiplied from the other side than its "
                "layout was taken to say: this mixture of experts cannot be pruned."
            )
        if x.numel():
            self._callback(site, x)


@contextmanager
def matmul_hooks(sites: Sequence[Site], callback: Callable[[Site, Tensor], None]) -> Iterator[None]:
    """Call `callback(site, x)` before every product of a slice of `sites` for the time of the body.

    Experts run by their plain forward meanwhile, which multiplies one expert after the other.

    Raises:
        UnsupportedModel: inside the body, when a slice is used as (in, out) and was taken for (out, in), or reversed.
    """
    modules = {id(site.module): site.module for site in sites}
    with ExitStack() as stack:
        for module in modules.values():
            if _has_kernels(module):
                stack.enter_context(replaced_forward(module, partial(_plain(module), module)))
        if sites:
            stack.enter_context(_Products(sites, callback))
        yield


def reroutable(module: nn.Module) -> bool:
    """Whether a module of experts has transformers' interface: (hidden states, expert numbers, weights)."""
    names = list(inspect.signature(_plain(module)).parameters)
    return _has_kernels(module) and len(names) == 4 and names[2] in _ROUTINGS


@contextmanager
def rerouted(module: nn.Module, instead: Callable[[Tensor, Callable[[int], None]], None]) -> Iterator[None]:
    """Replace what a module of experts does for the time of the body.

    Args:
        module: one that is `reroutable`.
        instead: is given the hidden states (tokens, features), and a function that sends all of them to one expert.
    """
    plain = _plain(module)
    signature = inspect.signature(plain)

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        _, hidden, index, weights = signature.bind(module, *args, **kwargs).arguments.values()

        def send(expert: int) -> None:
            plain(module, hidden, torch.full_like(index[:, :1], expert), torch.ones_like(weights[:, :1]))

        instead(hidden, send)
        return torch.zeros_like(hidden)

    with replaced_forward(module, forward):
        yield


def _has_kernels(module: nn.Module) -> bool:
    """Whether transformers chooses how these experts are computed; such a class says how its weights lie."""
    return hasattr(module, "is_transposed") and hasattr(type(module).forward, "__wrapped__")


def _plain(module: nn.Module) -> Callable[..., Any]:
    """The forward that a class was written with, beneath transformers' choice of kernels."""
    forward = type(module).forward
    plain: Callable[..., Any] = getattr(forward, "__wrapped__", forward)
    return plain
