"""Narrower experts: the channels that each expert keeps, chosen and refitted on the tokens routed to it.

legend  X      inputs of an expert's last map, times the routing weights       (n, m)
        w      token weights                                                   (n,)
        lam    max(m / n, 0.01) * mean(diag(X^T w X))                          scalar
        H      X^T w X + lam I                                                 (m, m)
The problem of each expert is that of a dense MLP (`alps.solvers.group_problem`) with the Gram H of its own tokens. lam
has the effect of m more tokens of white inputs, so that an expert with few tokens stays close to its weight. An expert
without tokens keeps the channels of the largest columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alps.calibration.expert_records import MixtureTokens
from alps.calibration.expert_refit import output_maps
from alps.calibration.masked_router import Mixture
from alps.core.errors import ConfigError
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
    for site, inputs in output_maps(mixture, tokens.hidden, kept):
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
        channels.append(selection.kept)
        errors.append(selection.objective / energy if energy else 0.0)
        counts.append(len(rows))
    return NarrowExperts(torch.stack(channels), errors, counts)
