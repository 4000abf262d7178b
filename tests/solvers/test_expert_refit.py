"""Refit of several output maps to one sum: the joint ridge solution, starving experts and descent."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from alps.core.errors import SolveFailed
from alps.solvers.expert_refit import ExpertInputs, refit_output_maps

_TOKENS, _INPUTS, _OUTPUTS = 120, 5, 3


def _problem(sizes: Sequence[int]) -> tuple[Tensor, list[ExpertInputs], Tensor]:
    generator = torch.Generator().manual_seed(1)
    residual = torch.randn(_TOKENS, _OUTPUTS, generator=generator)
    weights = 0.5 + torch.rand(_TOKENS, generator=generator)
    experts = []
    for size in sizes:
        rows = torch.randperm(_TOKENS, generator=generator)[:size].sort().values
        experts.append((rows, torch.randn(size, _INPUTS, generator=generator) @ torch.randn(5, 5, generator=generator)))
    return residual, experts, weights


def _calls(experts: Sequence[ExpertInputs]) -> list[Callable[[], ExpertInputs]]:
    return [lambda expert=expert: expert for expert in experts]  # type: ignore[misc]


def test_many_sweeps_give_the_joint_ridge_solution() -> None:
    residual, experts, weights = _problem([80, 50, 9, 120])
    prior = 20.0
    changes = refit_output_maps(residual, _calls(experts), weights, prior_tokens=prior, sweeps=200)
    # All experts side by side, in float64: weighted inputs above the square roots of the damping.
    joint = torch.zeros(_TOKENS, 4 * _INPUTS, dtype=torch.float64)
    damping = torch.zeros(4 * _INPUTS, dtype=torch.float64)
    for i, (rows, X) in enumerate(experts):
        part = slice(i * _INPUTS, (i + 1) * _INPUTS)
        joint[rows, part] = X.double()
        energy = (X.square() * weights[rows, None]).sum(dim=0).mean()
        damping[part] = max(prior / len(rows), 0.01) * energy
    gram = joint.T @ (joint * weights[:, None]) + torch.diag(damping)
    expected = torch.linalg.solve(gram, joint.T @ (residual * weights[:, None]).double()).T
    actual = torch.cat([change for change in changes if change is not None], dim=1).double()
    assert float((actual - expected).norm()) < 1e-5 * float(expected.norm())


def test_one_sweep_lowers_the_error_and_few_tokens_change_little() -> None:
    residual, experts, weights = _problem([110, 3, 0])
    changes = refit_output_maps(residual, _calls(experts), weights, prior_tokens=5.0, sweeps=1)
    assert changes[2] is None
    first, second = changes[0], changes[1]
    assert first is not None and second is not None
    after = residual.clone()
    for (rows, X), change in zip(experts, (first, second), strict=False):
        after.index_add_(0, rows, X @ change.T, alpha=-1)
    assert float((after.square().sum(dim=1) * weights).sum()) < float((residual.square().sum(dim=1) * weights).sum())
    loose = refit_output_maps(residual, _calls(experts), weights, prior_tokens=0.0, sweeps=1)[1]
    assert loose is not None and float(second.norm()) < 0.3 * float(loose.norm())


def test_an_expert_whose_inputs_are_zero_keeps_its_weight() -> None:
    residual, experts, weights = _problem([10])
    rows, X = experts[0]
    (change,) = refit_output_maps(residual, _calls([(rows, torch.zeros_like(X))]), weights, prior_tokens=1.0)
    assert change is not None and int(change.count_nonzero()) == 0


def test_inputs_that_are_not_finite_are_refused() -> None:
    residual, experts, weights = _problem([10])
    experts[0][1][0, 0] = float("nan")
    with pytest.raises(SolveFailed, match="not finite"):
        refit_output_maps(residual, _calls(experts), weights, prior_tokens=1.0)
