"""Tests of ALPS: the parts of its loop against float64, and the whole against the statements of the paper."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from alps.core.statistics import InputStats
from alps.solvers import Alps, Magnitude, admm, get_method
from alps.solvers.admm import AdmmSettings
from alps.solvers.base import SolveInfo, Status
from alps.solvers.hessian import ScaledHessian, scaled
from alps.solvers.patterns import Pattern, SemiStructured, Unstructured, keep_largest
from helpers.problems import IN, OUT, PROBLEMS, correlated, correlated_inputs, hessian64, normal, objective64

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
def test_a_traced_solve_records_the_error_of_D_without_changing_weights(pattern: Pattern) -> None:
    weight, inputs = correlated()
    stats, plain = InputStats.of(inputs), Alps()
    traced = plain.traced()
    solution = traced.solve(weight, traced.prepare(stats), pattern)
    untraced = plain.solve(weight, plain.prepare(stats), pattern)
    assert torch.equal(solution.weight, untraced.weight)
    assert all(point.error is None for point in untraced.info.trace)
    # Run the published loop in float64 with the penalties of the trace.
    X, W = inputs.double(), weight.double()
    G = X.T @ X
    H = G + 0.01 * G.diagonal().mean() * torch.eye(len(G), dtype=torch.float64)
    scale = H.diagonal().rsqrt()
    dense, H = W / scale, H * scale * scale[:, None]

    def projected(Z: Tensor) -> Tensor:
        return torch.where(keep_largest(Z.abs().float(), pattern), Z, 0.0)

    D, V, first = projected(dense), torch.zeros_like(dense), solution.info.trace[0]
    assert solution.info.restarts == 0 and first.iteration == 3
    for _ in range(3):
        inverse = torch.linalg.inv(H + first.rho * torch.eye(len(H), dtype=torch.float64))
        Z = (dense @ H - V + first.rho * D) @ inverse + V / first.rho
        D, V = projected(Z), first.rho * (Z - projected(Z))
    error = float((X @ (D * scale - W).T).square().sum() / (X @ W.T).square().sum())
    assert first.error == pytest.approx(error, rel=1e-3)
    assert solution.info.trace[-1].error == pytest.approx(solution.info.error_before_refit, rel=1e-3)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_fused_steps_record_the_error_of_D(pattern: Pattern) -> None:
    weight, inputs = correlated()
    method = Alps(precision="bfloat16", trace_errors=True)
    info = method.solve(weight, method.prepare(InputStats.of(inputs)), pattern).info
    assert info.trace[-1].error == pytest.approx(info.error_before_refit, rel=1e-2)
    assert info.error_before_refit is not None and (info.trace[0].error or 0) > 1.02 * info.error_before_refit


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


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("seed", [9, 10, 11])
def test_white_inputs_give_nearly_the_error_of_magnitude(seed: int, pattern: Pattern) -> None:
    """Compare with magnitude, which is optimal on white inputs.

    The splitting misses the optimum by up to 2.3 % as measured: in early iterations its multiplier lifts one pruned
    weight after another, and it does not restart.
    """
    weight = normal(seed, OUT, IN)
    method = Alps()
    solution = method.solve(weight, method.prepare(InputStats.of(8 * torch.eye(IN))), pattern)
    assert solution.info.restarts == 0
    torch.testing.assert_close(solution.weight[solution.mask], weight[solution.mask], rtol=1e-6, atol=0)
    best = float(weight[~keep_largest(weight.abs(), pattern)].double().square().sum())
    result = float(weight[~solution.mask].double().square().sum())
    assert best * (1 - 1e-9) <= result <= 1.03 * best


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


def test_the_refit_lowers_the_error_and_is_recorded() -> None:
    weight, inputs = correlated()
    stats = InputStats.of(inputs)
    hessian, _ = hessian64(inputs)
    plain, refined = Alps(refit_steps=0), Alps()
    before = plain.solve(weight, plain.prepare(stats), Unstructured(0.7))
    after = refined.solve(weight, refined.prepare(stats), Unstructured(0.7))
    assert torch.equal(before.mask, after.mask)
    old = float(objective64(before.weight, weight, hessian).sum())
    assert float(objective64(after.weight, weight, hessian).sum()) < 0.99 * old
    outputs = (inputs.double() @ weight.double().T).square().sum()
    for solution, reported in (
        (before, after.info.error_before_refit),
        (after, after.info.error_after_refit),
    ):
        delta = solution.weight.double() - weight.double()
        true = (inputs.double() @ delta.T).square().sum() / outputs
        assert reported == pytest.approx(float(true), rel=1e-3)
    assert 0 < after.info.refit_steps <= 10


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("exponents", [2, 6])
def test_scaling_inputs_by_powers_of_two_changes_no_bit(exponents: int, pattern: Pattern) -> None:
    """Scale by powers of two, which do not change rounding, so that the scaled problem is equal to the bit."""
    weight, inputs = correlated()
    sizes = 2.0 ** torch.randint(-exponents, exponents + 1, (IN,), generator=torch.Generator().manual_seed(3))
    method = Alps(damping=0.0)
    first = method.solve(weight, method.prepare(InputStats.of(inputs)), pattern)
    second = method.solve(weight / sizes, method.prepare(InputStats.of(inputs * sizes)), pattern)
    assert torch.equal(first.mask, second.mask)
    assert torch.equal(first.weight, second.weight * sizes)
    plain = Magnitude()
    moved, unmoved = plain.solve(weight / sizes, None, pattern), plain.solve(weight, None, pattern)
    assert not torch.equal(moved.mask, unmoved.mask), "the sizes did matter to the weights"


def test_extreme_input_scales_give_the_same_support() -> None:
    weight, inputs = correlated()
    sizes = torch.exp(4 * normal(5, IN))
    assert float(sizes.max() / sizes.min()) > 1e5
    method = Alps(damping=1e-20)
    first = method.solve(weight, method.prepare(InputStats.of(inputs)), Unstructured(0.7))
    second = method.solve(weight / sizes, method.prepare(InputStats.of(inputs * sizes)), Unstructured(0.7))
    assert torch.equal(first.mask, second.mask)
    hessian, _ = hessian64(inputs)
    apart = objective64(second.weight * sizes, first.weight, hessian).sum()
    assert float(apart) < 1e-6 * float(objective64(first.weight, torch.zeros_like(weight), hessian).sum())


# Largest ratios of ALPS's objective to the other method's over ten seeds and three patterns, with a margin above the
# measured 0.041, 0.082, 0.291, 0.074, 0.055.
SHARES = {"magnitude": 0.05, "wanda": 0.1, "sparsegpt": 0.35, "dsnot": 0.1, "dsnot-sparsegpt": 0.07}
# Means of these ratios after a refit of the other method's weights, so that only the supports differ, with a margin
# above the measured 0.72, 0.53, 0.82.
REFITTED_SHARES = {"50%": 0.8, "70%": 0.6, "2:4": 0.92}


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_alps_has_a_smaller_error_than_other_methods(pattern: Pattern) -> None:
    others = [*SHARES, *(f"{name}+refit" for name in SHARES)]
    shares: dict[str, list[float]] = {name: [] for name in others}
    for seed in range(10):
        weight, inputs = normal(100 + seed, OUT, IN), correlated_inputs(200 + 10 * seed, 160, IN)
        stats = InputStats.of(inputs)
        hessian, _ = hessian64(inputs)
        error = {}
        for name in ["alps", *others]:
            method = get_method(name.removesuffix("+refit"), refit=name.endswith("+refit"))
            solution = method.solve(weight, method.prepare(stats), pattern)
            error[name] = float(objective64(solution.weight, weight, hessian).sum())
        for name in others:
            shares[name].append(error["alps"] / error[name])
    for name, limit in SHARES.items():
        assert max(shares[name]) < limit, name
        refitted = shares[f"{name}+refit"]
        assert sum(refitted) / len(refitted) < REFITTED_SHARES[str(pattern)], name
