"""Narrower experts: the channels that each expert keeps, chosen and refitted on the tokens routed to it.

legend  X      inputs of an expert's last map, times the routing weights       (n, m)
        w      token weights                                                   (n,)
        lam    max(m / n, 0.01) * mean(diag(X^T w X))                          scalar
        H      X^T w X + lam I                                                 (m, m)
The problem of each expert is that of a dense MLP (`alps.solvers.group_problem`) with the Gram H of its own tokens. lam
has the effect of m more tokens of white inputs, so that an expert with few tokens stays close to its weight. An expert
without tokens keeps the channels of the largest columns. A shared expert is narrowed in the same way, on all tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alps.calibration.expert_records import MixtureTokens
from alps.calibration.expert_refit import OutputMap, output_maps, shared_maps
from alps.calibration.masked_router import Mixture
from alps.core.errors import ConfigError, UnsupportedModel
from alps.solvers.expert_refit import weighted_gram
from alps.solvers.group_elimination import eliminate
from alps.solvers.group_problem import GroupProblem, refit
from alps.solvers.group_swaps import improve_by_swaps


@dataclass(frozen=True)
class NarrowExperts:
    """Channels that the kept experts of a mixture retain.

    Attributes:
        channels: numbers of the channels of every kept expert, ascending, shape (experts, width).
        errors: objective of every kept expert, relative to the energy of its output.
        tokens: number of tokens that were routed to every kept expert.
    """

    channels: Tensor
    errors: list[float]
    tokens: list[int]


def narrow_experts(mixture: Mixture, tokens: MixtureTokens, kept: Sequence[int], width: int) -> NarrowExperts:
    """Select the channels of each kept expert, and write its last map with zeros in the other columns.

    Args:
        mixture: with its dense weights.
        tokens: recorded inputs; they are routed among the kept experts.
        kept: numbers of the kept experts.
        width: channels to keep, the same number for each expert.

    Raises:
        ConfigError: if the experts have fewer channels.
    """
    channels, errors, counts = [], [], []
    for output_map in output_maps(mixture, tokens.hidden, kept):
        selected, error, count = _narrow(output_map, tokens, width)
        channels.append(selected)
        errors.append(error)
        counts.append(count)
    return NarrowExperts(torch.stack(channels), errors, counts)


def narrow_shared_expert(mixture: Mixture, tokens: MixtureTokens, width: int) -> NarrowExperts:
    """Select the channels of the expert that all tokens share, as if it were one of several.

    Args:
        mixture: with one shared expert.
        tokens: recorded inputs.
        width: channels to keep.

    Raises:
        ConfigError: if the expert has fewer channels.
        UnsupportedModel: if what the expert adds to the output is no multiple of what its last map returns.
    """
    maps = shared_maps(mixture, tokens.hidden)
    if not maps:
        raise UnsupportedModel(
            f"Channels of experts cannot be removed from {type(mixture.module).__name__}: it does not add the output "
            "of its shared expert unchanged."
        )
    selected, error, count = _narrow(maps[0], tokens, width)
    return NarrowExperts(selected[None], [error], [count])


def _narrow(output_map: OutputMap, tokens: MixtureTokens, width: int) -> tuple[Tensor, float, int]:
    """Write a narrower map, and return its channels, its relative objective, and the number of its tokens."""
    site, inputs = output_map
    rows, X = inputs()
    if not 1 <= width <= site.shape[1]:
        raise ConfigError(f"{width} channels cannot be kept of the {site.shape[1]} of {site.name}.")
    weight = site.read().float().clone()
    if len(rows):
        hessian = weighted_gram(X, tokens.weights[rows], prior_tokens=site.shape[1])
    else:
        hessian = torch.eye(site.shape[1], dtype=torch.float64, device=weight.device)
    problem = GroupProblem(hessian, weight)
    selection = improve_by_swaps(problem, eliminate(problem, width).kept)
    narrowed = torch.zeros_like(weight)
    narrowed[:, selection.kept] = refit(problem, selection.kept).float()
    site.write(narrowed)
    energy = float(((weight.double() @ hessian) * weight).sum())
    return selection.kept, selection.objective / energy if energy else 0.0, len(rows)
