"""Tests of ALPS as a whole: its trace against float64, its error against other methods, scales and the refit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from alps.core.statistics import InputStats
from alps.solvers import Alps, Magnitude, get_method
from alps.solvers.patterns import Pattern, SemiStructured, Unstructured, keep_largest
from helpers.problems import IN, OUT, correlated, correlated_inputs, hessian64, normal, objective64

PATTERNS: list[Pattern] = [Unstructured(0.5), Unstructured(0.7), SemiStructured(2, 4)]


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
