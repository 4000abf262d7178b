"""Hooks on mixtures of experts: inputs of each expert's slice of a fused parameter, and rerouting of tokens.

The inputs of an expert's second map are the input of no module. So the hooks are on the products: while a block runs,
every product of torch whose second operand has the address of a slice is a call of that slice.
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

from alps.calibration.replaced_forward import replaced_forward
from alps.core.errors import UnsupportedModel
from alps.models.sites import Site

# Functions that multiply inputs by a weight: `linear` expects (out, in), the others (in, out).
PRODUCTS = {"linear", "matmul", "mm", "bmm"}
# Names of the second argument of forwards that accept any routing.
_ROUTINGS = {"top_k_index", "router_indices"}


class _ProductHooks(TorchFunctionMode):
    """Mode that calls `callback(site, x)` before every product of rows x with the slice of a site."""

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
        if name in PRODUCTS:
            x, weight = [*args, *kwargs.values()][:2]
            if weight.ndim == 3 and weight.data_ptr() in self._fused:
                # All experts in one product with equal numbers of rows; rows of tokens routed elsewhere are zero.
                for rows, expert_weight in zip(x, weight, strict=True):
                    self._on_product(rows[(rows != 0).any(dim=-1)], expert_weight)
            elif weight.ndim == 2:
                self._on_product(x, weight.T if name == "linear" else weight)
        return func(*args, **kwargs)

    def _on_product(self, x: Tensor, weight: Tensor) -> None:
        """Call back for a product x W with W (in, out), if W is the slice of a site."""
        site = self._sites.get(weight.data_ptr())
        if site is None or weight.numel() != site.entries:
            return
        if weight.stride() != site.read().T.stride():
            raise UnsupportedModel(
                f"{site.parameter_name} of {type(site.module).__name__} has another layout than expected, with inputs "
                "and outputs exchanged: this mixture of experts cannot be pruned."
            )
        if x.numel():
            self._callback(site, x)


@contextmanager
def matmul_hooks(sites: Sequence[Site], callback: Callable[[Site, Tensor], None]) -> Iterator[None]:
    """Context in which `callback(site, x)` is called before every product with the slice of a site.

    Meanwhile experts run by their plain forward, which multiplies one expert after the other.

    Raises:
        UnsupportedModel: inside the context, when a slice is used as (in, out) and was expected as (out, in), or the
            other way round.
    """
    modules = {id(site.module): site.module for site in sites}
    with ExitStack() as stack:
        for module in modules.values():
            if _has_kernels(module):
                stack.enter_context(replaced_forward(module, partial(_plain_forward(module), module)))
        if sites:
            stack.enter_context(_ProductHooks(sites, callback))
        yield


def can_reroute(module: nn.Module) -> bool:
    """Return True if a module of experts has transformers' interface: (hidden states, expert indices, weights)."""
    names = list(inspect.signature(_plain_forward(module)).parameters)
    return _has_kernels(module) and len(names) == 4 and names[2] in _ROUTINGS


def is_stacked(module: nn.Module) -> bool:
    """Return True if a module of experts takes one input for each expert and token, as rows in the order of experts.

    Rows of tokens that are routed elsewhere are zero (Llama 4).
    """
    return not _has_kernels(module) and len(inspect.signature(_plain_forward(module)).parameters) == 2


def run_expert(module: nn.Module, hidden: Tensor, expert: int) -> Tensor:
    """Return the output of one expert for all hidden states (tokens, features), without a routing weight.

    Args:
        module: of experts, for which `can_reroute` holds.
        hidden: inputs of the expert.
        expert: its number.
    """
    index = torch.full((len(hidden), 1), expert, device=hidden.device)
    output: Tensor = _plain_forward(module)(module, hidden, index, hidden.new_ones(len(hidden), 1))
    return output


@contextmanager
def rerouted(module: nn.Module, replacement: Callable[[Tensor, Callable[[int], None]], None]) -> Iterator[None]:
    """Context in which a module of experts calls `replacement` in place of its forward, and returns zeros.

    Args:
        module: one for which `can_reroute` holds.
        replacement: gets the hidden states (tokens, features), and a function that sends all of them to one expert.
    """
    plain_forward = _plain_forward(module)
    signature = inspect.signature(plain_forward)

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        _, hidden, index, weights = signature.bind(module, *args, **kwargs).arguments.values()

        def send(expert: int) -> None:
            plain_forward(module, hidden, torch.full_like(index[:, :1], expert), torch.ones_like(weights[:, :1]))

        replacement(hidden, send)
        return torch.zeros_like(hidden)

    with replaced_forward(module, forward):
        yield


def _has_kernels(module: nn.Module) -> bool:
    """Return True if transformers chooses the kernel of these experts; such a class states its weight layout."""
    return hasattr(module, "is_transposed") and hasattr(type(module).forward, "__wrapped__")


def _plain_forward(module: nn.Module) -> Callable[..., Any]:
    """Return the forward of a class without transformers' choice of kernels."""
    forward = type(module).forward
    plain: Callable[..., Any] = getattr(forward, "__wrapped__", forward)
    return plain
