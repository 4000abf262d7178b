"""Routing of tokens among some of a mixture's experts, by the model's own code.

Removed experts are made unreachable to the router: their logits become -infinity in the product that computes them, and
so do their entries in biases of one value per expert. Softmax, sigmoid, groups, correction biases, renormalisation and
scaling are the code of the model, which treats the remaining experts as the router of the smaller model would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from alps.calibration.dense_reference import StopForward, input_hooks
from alps.calibration.moe_hooks import PRODUCTS, can_reroute, is_stacked, run_expert
from alps.calibration.replaced_forward import replaced_forward
from alps.core.errors import UnsupportedModel
from alps.models.blocks import Block
from alps.models.routers import find_routers, is_inside
from alps.models.sites import Site

# Tokens that pass a router or an expert at once.
_BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Mixture:
    """Mixture of experts of a block.

    Attributes:
        name: dotted name inside the block.
        module: that holds the router and the experts, and whose output is the sum over the routed experts.
        experts: child of `module` that holds the fused weights of all experts.
        sites: the experts' maps.
        routers: modules inside `module` that decide on the experts.
        shared: other children with linear layers, whose output is added for every token.
        shared_sites: maps inside `shared`.
    """

    name: str
    module: nn.Module
    experts: nn.Module
    sites: list[Site]
    routers: list[nn.Module]
    shared: list[nn.Module]
    shared_sites: list[Site]

    @property
    def count(self) -> int:
        """Number of experts."""
        return len(self.sites[0].parameter)

    @property
    def top_k(self) -> int:
        """Number of experts of a token."""
        return self._router_number("top_k")

    @property
    def groups(self) -> int:
        """Number of groups of experts from which the router chooses first; 1 for none."""
        return self._router_number("num_group")

    @property
    def chosen_groups(self) -> int:
        """Number of groups that a token may use."""
        return self._router_number("topk_group")

    def _router_number(self, attribute: str) -> int:
        numbers = (getattr(router, attribute, None) for router in self.routers)
        return next((number for number in numbers if isinstance(number, int)), 1)

    def run(self, hidden: Tensor) -> Tensor:
        """Return the output of the mixture, shared experts included, for tokens (tokens, features)."""
        output = self.module(hidden[None])
        states: Tensor = output[0] if isinstance(output, tuple) else output
        return states.reshape(len(hidden), -1)


def find_mixture(block: Block) -> Mixture | None:
    """Return the mixture of experts of a block; None for a block without experts.

    Raises:
        UnsupportedModel: if the routing among a part of the experts cannot be taken from the model's code.
    """
    sites = [site for site in block.sites if site.is_expert]
    if not sites:
        return None
    experts = sites[0].module
    names = {id(module): name for name, module in block.module.named_modules()}
    name, _, last = names[id(experts)].rpartition(".")
    if any(site.module is not experts for site in sites) or not (can_reroute(experts) or is_stacked(experts)):
        raise UnsupportedModel(
            f"Experts of {block.name} cannot be removed: {type(experts).__name__} does not take the routing of its "
            "tokens as (hidden states, expert numbers, weights); prune inside the experts with alps prune instead."
        )
    module = block.module.get_submodule(name)
    routers = [router for router in find_routers(block.module) if name and is_inside(router, [name])]
    children = {f"{name}.{child}": member for child, member in module.named_children() if child != last}
    if not routers:
        raise UnsupportedModel(
            f"Experts of {block.name} cannot be removed: no router was found next to them in {type(module).__name__}."
        )
    shared = {key: child for key, child in children.items() if not any(is_inside(router, [key]) for router in routers)}
    prefixes = [f"{block.name}.{key}" for key in shared]
    return Mixture(
        name=name,
        module=module,
        experts=experts,
        sites=sites,
        routers=[block.module.get_submodule(router) for router in routers],
        shared=list(shared.values()),
        shared_sites=[site for site in block.sites if is_inside(site.name, prefixes)],
    )


@contextmanager
def masked_routing(mixture: Mixture, kept: Sequence[int]) -> Iterator[None]:
    """Context in which the router of a mixture sends tokens to kept experts only."""
    removed = sorted(set(range(mixture.count)) - set(kept))
    if not removed:
        yield
        return
    mode = _MaskedLogits(mixture.count, removed)
    with ExitStack() as stack:
        stack.enter_context(_masked_biases(mixture, removed))
        for router in mixture.routers:
            stack.enter_context(replaced_forward(router, partial(_run_in_mode, mode, router.forward)))
        yield


def route(mixture: Mixture, hidden: Tensor, kept: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the experts and weights of tokens among kept experts.

    Args:
        mixture: on the device of `hidden`, in evaluation mode.
        hidden: inputs of the mixture (tokens, features).
        kept: numbers of the experts that tokens may be sent to.

    Returns:
        Numbers of experts, shape (tokens, k), and routing weights, shape (tokens, k).

    Raises:
        UnsupportedModel: if the router sends tokens to a removed expert with a weight.
    """
    parts = [_route_part(mixture, part, kept) for part in torch.split(hidden, _BATCH_TOKENS)]
    index, weights = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    allowed = torch.zeros(mixture.count, dtype=torch.bool, device=index.device)
    allowed[list(kept)] = True
    if bool((~allowed[index] & (weights != 0)).any()):
        raise UnsupportedModel(
            f"Experts cannot be removed from {type(mixture.module).__name__}: its router still chooses experts whose "
            "logits are -infinity."
        )
    return index, weights


def expert_output(mixture: Mixture, hidden: Tensor, expert: int) -> Tensor:
    """Return the output of one expert for inputs of the mixture (tokens, features), without a routing weight.

    Where the routing weight multiplies the input of the expert (Llama 4), it is a part of the expert, and `route`
    returns 1. Such a weight does not depend on the other experts.
    """
    with torch.no_grad():
        return torch.cat([_run_part(mixture, part, expert) for part in torch.split(hidden, _BATCH_TOKENS)])


def down_inputs(mixture: Mixture, hidden: Tensor, expert: int) -> tuple[Site, Tensor]:
    """Return the last map of an expert, and its inputs (tokens, in) for inputs of the mixture (tokens, features)."""
    calls: list[tuple[Site, Tensor]] = []
    sites = [site for site in mixture.sites if site.expert == expert]
    with input_hooks(sites, lambda site, x: calls.append((site, x))):
        expert_output(mixture, hidden, expert)
    last = calls[-1][0]
    inputs = torch.cat([x for site, x in calls if site is last])
    assert len(inputs) == len(hidden)
    return last, inputs


def _route_part(mixture: Mixture, hidden: Tensor, kept: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the experts and weights of a batch of tokens."""
    arguments = _expert_arguments(mixture, hidden, kept)
    if is_stacked(mixture.experts):
        return _stacked_routing(mixture, arguments[0])
    _, index, weights = arguments
    return index, weights


def _run_part(mixture: Mixture, hidden: Tensor, expert: int) -> Tensor:
    """Return the output of an expert for a batch of tokens."""
    if not is_stacked(mixture.experts):
        return run_expert(mixture.experts, hidden, expert)
    (stacked,) = _expert_arguments(mixture, hidden, [expert])
    output: Tensor = mixture.experts(stacked)
    return output.view(mixture.count, *hidden.shape)[expert]


def _expert_arguments(mixture: Mixture, hidden: Tensor, kept: Sequence[int]) -> tuple[Tensor, ...]:
    """Return the arguments with which a mixture calls its experts, when tokens are routed among kept experts."""
    arguments: list[Tensor] = []

    def stop(*args: Tensor) -> None:
        arguments.extend(args)
        raise StopForward

    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(masked_routing(mixture, kept))
        stack.enter_context(replaced_forward(mixture.experts, stop))
        for shared in mixture.shared:
            stack.enter_context(replaced_forward(shared, _identity))
        with suppress(StopForward):
            mixture.run(hidden)
    return tuple(arguments)


def _stacked_routing(mixture: Mixture, stacked: Tensor) -> tuple[Tensor, Tensor]:
    """Return experts and weights (tokens, k) of inputs (experts * tokens, features) that are zero where not routed."""
    routed = (stacked.view(mixture.count, -1, stacked.shape[-1]) != 0).any(dim=-1).T.float()
    weights, index = routed.sort(dim=1, descending=True, stable=True)
    return index[:, : mixture.top_k], weights[:, : mixture.top_k]


class _MaskedLogits(TorchFunctionMode):
    """Mode in which products with one output per expert give -infinity for removed experts."""

    def __init__(self, experts: int, removed: Sequence[int]) -> None:
        super().__init__()
        self._experts, self._removed = experts, removed

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in PRODUCTS and output.shape[-1] == self._experts:
            output[..., self._removed] = float("-inf")
        return output


def _run_in_mode(mode: TorchFunctionMode, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with mode:
        return forward(*args, **kwargs)


@contextmanager
def _masked_biases(mixture: Mixture, removed: Sequence[int]) -> Iterator[None]:
    """Context in which parameters and buffers of one value per expert are -infinity for removed experts."""
    modules = [mixture.module, *(module for router in mixture.routers for module in router.modules())]
    tensors = {
        id(tensor): tensor
        for module in modules
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))
        if tensor.numel() == tensor.shape[-1:].numel() == mixture.count and tensor.is_floating_point()
    }
    before = [tensor.detach().clone() for tensor in tensors.values()]
    try:
        for tensor in tensors.values():
            tensor.detach()[..., removed] = float("-inf")
        yield
    finally:
        for tensor, values in zip(tensors.values(), before, strict=True):
            tensor.detach().copy_(values)


def _identity(hidden: Tensor) -> Tensor:
    return hidden
