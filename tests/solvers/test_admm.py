"""The splitting of ALPS: its steps against float64, its penalty and its restarts against the paper."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from alps.core.statistics import InputStats
from alps.solvers import Alps, admm
from alps.solvers.admm import AdmmSettings
from alps.solvers.base import SolveInfo, Status
from alps.solvers.hessian import ScaledHessian, scaled
from alps.solvers.patterns import Pattern, SemiStructured, Unstructured, keep_largest
from helpers.problems import IN, OUT, PROBLEMS, correlated, normal

PATTERNS: list[Pattern] = [Unstructured(0.5), Unstructured(0.7), SemiStructured(2, 4)]


def scaled_problem() -> tuple[ScaledHessian, Tensor, Tensor]:
    """Return the Hessian with unit diagonal, the dense weight and the right-hand side in scaled coordinates."""
    weight, inputs = correlated()
    state = scaled(InputStats.of(inputs), 0.01)
    dense = weight / state.scale
    return state, dense, dense @ state.matrix


@pytest.mark.parametrize("rho", [0.02, 0.1, 2.5])
def test_a_w_step_solves_its_normal_equations(rho: float) -> None:
    state, dense, C = scaled_problem()
    D, V = normal(1, *dense.shape), normal(2, *dense.shape)
    right = C.double() - V.double() + rho * D.double()
    shifted = state.matrix.double() + rho * torch.eye(IN, dtype=torch.float64)
    exact = torch.linalg.solve(shifted, right.T).T
    result = admm.w_step(state.inverse(rho), C, D, V, rho=rho)
    assert float((result.double() - exact).norm() / exact.norm()) < 1e-5


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_a_projection_keeps_the_largest_and_moves_the_multiplier(pattern: Pattern) -> None:
    W, V, rho = normal(3, OUT, IN), normal(4, OUT, IN), 0.3
    D, after, mask = admm.project(W, V.clone(), rho, pattern)
    Z = W.double() + V.double() / rho
    assert torch.equal(mask, keep_largest(Z.abs(), pattern))
    torch.testing.assert_close(D.double(), torch.where(mask, Z, 0.0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(after.double(), V.double() + rho * (W.double() - D.double()), rtol=1e-5, atol=1e-5)
    assert not bool(after[mask].any()) and not bool(D[~mask].any())


def test_the_penalty_grows_as_published() -> None:
    grown = [admm.grow(1.0, share, AdmmSettings()) for share in (1.0, 0.1, 0.0999, 0.005, 0.00499, 1e-6)]
    assert grown == [1.3, 1.3, 1.2, 1.2, 1.1, 1.1]


def recompute_penalties(info: SolveInfo, k: int, settings: AdmmSettings) -> list[float]:
    """Compute the penalty at every check from the support changes, by Section 3.1 and the authors' restart."""
    rho, grown, restarts, path = settings.rho, False, 0, []
    for point in info.trace:
        path.append(rho)
        s = point.support_change
        if not grown and s < 0.005 * k and restarts < settings.max_restarts:
            rho, restarts = rho / 5, restarts + 1
            continue
        grown = True
        rho *= 1.3 if s >= 0.1 * k else 1.2 if s >= 0.005 * k else 1.1
    assert restarts == info.restarts
    return path


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("problem", ["gaussian", "correlated", "constant_inputs", "one_output", "huge_token"])
def test_the_trace_follows_the_rule(problem: str, pattern: Pattern) -> None:
    weight, inputs = PROBLEMS[problem]()
    method = Alps()
    info = method.solve(weight, method.prepare(InputStats.of(inputs)), pattern).info
    k = weight.numel() - pattern.pruned_count(weight.numel())
    assert [point.iteration for point in info.trace] == list(range(3, info.iterations + 1, 3))
    assert [point.rho for point in info.trace] == pytest.approx(recompute_penalties(info, k, method.admm))
    last = info.trace[-1]
    assert info.status is Status.CONVERGED and last.support_change == 0
    assert all(point.support_change > 0 for point in info.trace[info.restarts : -1])
    assert info.gap == last.gap < 0.1


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_the_copies_converge_as_in_theorem_1(pattern: Pattern) -> None:
    """Check max(||D+ - D||, ||W - D||) <= const / rho_t for penalties whose inverses have a finite sum."""
    state, dense, C = scaled_problem()
    D, V, rho = torch.where(keep_largest(dense.abs(), pattern), dense, 0.0), torch.zeros_like(dense), 0.1
    gaps, moves, penalties = [], [], []
    for _ in range(90):
        W = admm.w_step(state.inverse(rho), C, D, V, rho=rho)
        before = D
        D, V, _ = admm.project(W, V, rho, pattern)
        gaps.append(float((W - D).norm()))
        moves.append(float((D - before).norm()))
        penalties.append(rho)
        rho *= 1.1
    products = [p * max(g, m) for p, g, m in zip(penalties, gaps, moves, strict=True)]
    assert max(products) <= 2 * products[0]
    # Late in the loop the distance is proportional to 1 / rho, so that the product is constant.
    assert max(products[60:]) < 1.1 * min(products[60:])
    assert gaps[-1] < 1e-6 * gaps[0] and moves[-1] < 1e-3 * moves[0]


def test_restarts_are_limited() -> None:
    """Use a support that never changes, so that the fifth check ends the loop."""
    weight = torch.where(normal(9, OUT, IN).abs() > 1, 1.0, 1e-6) * normal(10, OUT, IN).sign()
    kept = weight.abs() == 1
    pattern = Unstructured(1 - int(kept.sum()) / weight.numel())
    method = Alps()
    solution = method.solve(weight, method.prepare(InputStats.of(8 * torch.eye(IN))), pattern)
    assert [point.rho for point in solution.info.trace] == pytest.approx([0.1, 0.02, 0.004, 0.0008, 0.00016])
    assert solution.info.restarts == 4 and solution.info.iterations == 15
    assert solution.info.status is Status.CONVERGED
    assert torch.equal(solution.mask, kept)
    torch.testing.assert_close(solution.weight[kept], weight[kept], rtol=1e-6, atol=0)


def test_a_restart_equals_a_run_with_the_smaller_penalty() -> None:
    """Compare a restarted run with one that starts with the smaller penalty."""
    weight, inputs = PROBLEMS["constant_inputs"]()
    method = Alps()
    first = method.solve(weight, method.prepare(InputStats.of(inputs)), Unstructured(0.7))
    assert first.info.restarts == 2
    direct = Alps(admm=AdmmSettings(rho=0.1 * 0.2 * 0.2))
    second = direct.solve(weight, direct.prepare(InputStats.of(inputs)), Unstructured(0.7))
    assert second.info.restarts == 0 and second.info.iterations == first.info.iterations - 6
    assert torch.equal(first.mask, second.mask) and torch.equal(first.weight, second.weight)


def test_the_iteration_limit_is_reported() -> None:
    weight, inputs = correlated()
    method = Alps(admm=AdmmSettings(max_iterations=6))
    solution = method.solve(weight, method.prepare(InputStats.of(inputs)), Unstructured(0.7))
    assert solution.info.status is Status.MAX_ITERATIONS and solution.info.iterations == 6
    assert solution.info.notes == ["the support was still changing after 6 iterations"]
    settled = Alps(admm=AdmmSettings(settle_after=5, settle_share=0.5))
    info = settled.solve(weight, settled.prepare(InputStats.of(inputs)), Unstructured(0.7)).info
    assert info.status is Status.SETTLED and info.iterations == 6 and info.notes == []
