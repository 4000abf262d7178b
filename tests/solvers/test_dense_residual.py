"""Target of the refit to the dense model: least squares on explicit inputs, and the best correction by a scan."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from alps.core.errors import SolveFailed
from alps.solvers.dense_residual import (
    DAMPING,
    NO_CORRECTION,
    Correction,
    choose_correction,
    corrected_weight,
    damped_gram,
    residual_change,
)
from alps.solvers.group_problem import GroupProblem, refit


class _Problem:
    """Weighted tokens of a layer with 4 outputs and 6 inputs, and what is missing behind it."""

    def __init__(self, seed: int, tokens: int = 40, truth: Tensor | None = None) -> None:
        generator = torch.Generator().manual_seed(seed)
        draw: dict[str, Any] = {"generator": generator, "dtype": torch.float64}
        self.x = torch.randn(tokens, 6, **draw) @ torch.randn(6, 6, **draw)
        self.w = torch.rand(tokens, **draw) + 0.1
        noise = torch.randn(tokens, 4, **draw)
        self.r = noise if truth is None else self.x @ truth.T + 0.5 * noise
        self.dense = torch.randn(4, 6, **draw)

    @property
    def gram(self) -> Tensor:
        return (self.x * self.w[:, None]).T @ self.x

    @property
    def cross(self) -> Tensor:
        return (self.r * self.w[:, None]).T @ self.x

    def damped(self, fraction: float, weight: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and outputs as rows of an undamped problem, with rows that pull to a weight (out, in)."""
        root = self.w.sqrt()[:, None]
        damping = (fraction * float(self.gram.diagonal().mean())) ** 0.5 * torch.eye(6).double()
        return torch.cat([root * self.x, damping]), torch.cat([root * outputs, damping @ weight.T])

    def error(self, change: Tensor) -> float:
        """Weighted squared error that a change of the weight leaves."""
        return float(((self.r - self.x @ change.T).square().sum(dim=1) * self.w).sum())


def _least_squares(x: Tensor, y: Tensor) -> Tensor:
    """Minimiser V of ||y - x V^T||, by QR, shape (out, in)."""
    solution: Tensor = torch.linalg.lstsq(x, y, driver="gelsd").solution
    return solution.T


@pytest.mark.parametrize("fraction", [0.01, 0.3])
def test_the_change_is_the_damped_least_squares_solution_on_tokens(fraction: float) -> None:
    problem = _Problem(0)
    # Damping is a row of sqrt(mu) for every input, whose missing output is zero: towards no change.
    x, r = problem.damped(fraction, torch.zeros(4, 6).double(), problem.r)
    change = residual_change(problem.gram, problem.cross, fraction)
    assert change.dtype == torch.float64
    torch.testing.assert_close(change, _least_squares(x, r), rtol=1e-9, atol=1e-12)
    stationary = problem.cross - change @ damped_gram(problem.gram, fraction)
    assert float(stationary.norm() / problem.cross.norm()) < 1e-12


@pytest.mark.parametrize("correction", [NO_CORRECTION, Correction(0.3, 0.1), Correction(1.0, 0.01)])
def test_the_refit_on_some_columns_is_direct_least_squares(correction: Correction) -> None:
    """Fit the kept columns to the outputs of W + t D on the tokens; the damping pulls to W + t D, too."""
    problem, kept = _Problem(1), torch.tensor([0, 2, 3])
    dense = problem.dense.float()
    target = corrected_weight(dense, problem.gram, problem.cross, correction)
    wanted = dense.double() + correction.share * residual_change(problem.gram, problem.cross, correction.fraction)
    torch.testing.assert_close(target, wanted, rtol=1e-12, atol=1e-12)
    x, y = problem.damped(DAMPING, wanted, problem.x @ wanted.T)
    layer = GroupProblem(damped_gram(problem.gram), target)
    torch.testing.assert_close(refit(layer, kept), _least_squares(x[:, kept], y), rtol=1e-9, atol=1e-11)


def test_a_full_share_without_removal_fits_the_dense_outputs_and_what_is_missing() -> None:
    """One damped least squares for W + D: the tokens pull to X W^T + r, the damping to W."""
    problem = _Problem(2)
    target = corrected_weight(problem.dense, problem.gram, problem.cross, Correction(1.0, DAMPING))
    x, y = problem.damped(DAMPING, problem.dense, problem.x @ problem.dense.T + problem.r)
    torch.testing.assert_close(target, _least_squares(x, y), rtol=1e-9, atol=1e-11)
    assert problem.error(target - problem.dense) < problem.error(torch.zeros(4, 6).double())


@pytest.mark.parametrize("seed", range(6))
def test_the_correction_is_the_minimiser_on_held_back_tokens(seed: int) -> None:
    truth = torch.randn(4, 6, generator=torch.Generator().manual_seed(9)).double() * (seed - 1) / 10
    fitted, held = _Problem(10 + seed, 20, truth), _Problem(20 + seed, 15, truth)

    def error(share: float, fraction: float) -> float:
        return held.error(share * residual_change(fitted.gram, fitted.cross, fraction))

    chosen = choose_correction(fitted.gram, fitted.cross, held.gram, held.cross)
    assert 0 <= chosen.share <= 1
    scanned = min(error(step / 100, fraction) for fraction in (0.03, 0.3, 3.0) for step in range(101))
    least = error(chosen.share, chosen.fraction)
    assert least <= scanned * (1 + 1e-12) and least >= scanned * (1 - 1e-3)


def test_shares_are_clamped_and_a_correction_that_only_harms_is_left_out() -> None:
    held = _Problem(3)
    # What is missing on the held-back tokens is a hundred times as much, or the opposite, or nothing at all.
    assert choose_correction(held.gram, held.cross, held.gram, 100 * held.cross).share == 1.0
    for gram, cross in (
        (held.gram, -held.cross),
        (held.gram, torch.zeros(4, 6).double()),
        (torch.zeros(6, 6).double(), held.cross),
    ):
        assert choose_correction(held.gram, held.cross, gram, cross) == NO_CORRECTION
    assert torch.equal(corrected_weight(held.dense, held.gram, held.cross, NO_CORRECTION), held.dense)


def test_the_gram_is_symmetric_and_damped_by_the_mean_of_its_diagonal() -> None:
    gram = _Problem(4).gram
    gram[0, 1] += 1e-3
    hessian = damped_gram(gram, 0.5)
    assert torch.equal(hessian, hessian.T)
    torch.testing.assert_close(hessian.diagonal(), gram.diagonal() + 0.5 * gram.diagonal().mean())
    assert torch.equal(damped_gram(torch.zeros(3, 3).double()), torch.eye(3).double())
    # Without any input the dense weight stays.
    zeros = torch.zeros(3, 3).double(), torch.zeros(2, 3).double()
    assert torch.equal(corrected_weight(torch.ones(2, 3), *zeros, Correction(1.0, 0.1)), torch.ones(2, 3).double())


@pytest.mark.parametrize("which", ["gram", "cross"])
def test_sums_that_are_not_finite_are_refused(which: str) -> None:
    problem = _Problem(5)
    sums = {"gram": problem.gram, "cross": problem.cross}
    sums[which][1, 1] = torch.nan
    with pytest.raises(SolveFailed, match="not finite"):
        residual_change(**sums, fraction=0.1)
