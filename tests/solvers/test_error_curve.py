"""Predicted errors of a layer: the costs against least squares, the curve against ALPS."""

from __future__ import annotations

import pytest
import torch

from alps.core.statistics import InputStats, relative_error
from alps.solvers import Alps
from alps.solvers.error_curve import POINTS, error_curve, inverse_diagonal, removal_costs
from alps.solvers.patterns import Unstructured


def test_removal_costs_are_those_of_a_least_squares_refit() -> None:
    generator = torch.Generator().manual_seed(4)
    X = torch.randn(60, 6, generator=generator, dtype=torch.float64)
    W, stats = torch.randn(1, 6, generator=generator), InputStats.of(X)
    costs = removal_costs(W, inverse_diagonal(stats, 1e-9))
    for j in range(6):
        rest = [i for i in range(6) if i != j]
        target = X @ W[0].double()
        answer = torch.linalg.lstsq(X[:, rest], target[:, None]).solution
        left = float((X[:, rest] @ answer - target[:, None]).square().sum())
        assert float(costs[0, j]) == pytest.approx(left, rel=1e-4)


def test_the_curve_predicts_the_error_of_alps() -> None:
    generator = torch.Generator().manual_seed(3)
    X = torch.randn(600, 48, generator=generator) @ (torch.randn(48, 48, generator=generator) * 0.05 + torch.eye(48))
    W, stats = torch.randn(40, 48, generator=generator), InputStats.of(X)
    curve = error_curve(W, removal_costs(W, inverse_diagonal(stats, 0.01)), stats.energy(W))
    assert curve.entries == W.numel() and curve.errors[0] == 0
    assert (
        bool((curve.errors.diff() >= 0).all())
        and float(curve.errors[120]) < float(curve.errors[40] + curve.errors[200]) / 2
    )
    method = Alps()
    state = method.prepare(stats)
    for sparsity in (0.5, 0.7):
        error = relative_error(method.solve(W, state, Unstructured(sparsity)).weight, W, stats)
        assert float(curve.errors[round(sparsity * (POINTS - 1))]) == pytest.approx(error, rel=0.35)


def test_a_large_layer_is_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(5)
    costs = torch.rand(300, 40, generator=generator)
    exact = error_curve(costs, costs, energy=2.0)
    monkeypatch.setattr("alps.solvers.error_curve._MAX_COSTS", 4000)
    sampled = error_curve(costs, costs, energy=2.0)
    assert sampled.entries == exact.entries == 12000 and not torch.equal(sampled.errors, exact.errors)
    # The sum of the smallest costs up to a share p, for costs uniform in [0, 1].
    shares = torch.linspace(0, 1, POINTS, dtype=torch.float64)
    for curve in (exact, sampled):
        torch.testing.assert_close(curve.errors, 12000 * shares.square() / 2 / 2.0, rtol=0.0, atol=120.0)
