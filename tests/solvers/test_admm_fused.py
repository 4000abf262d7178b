"""Tests of the fused ADMM steps: equal to the published steps in float32, and close in bfloat16."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Literal

import pytest
import torch
from torch import Tensor

from alps.core import half_precision as precision
from alps.core.statistics import InputStats
from alps.solvers import Alps, alps
from alps.solvers.admm import PlainSteps
from alps.solvers.admm_fused import FusedSteps
from alps.solvers.hessian import ScaledHessian, scaled
from alps.solvers.patterns import Pattern, SemiStructured, Unstructured, keep_largest
from helpers.problems import PROBLEMS, Problem, correlated_inputs, hessian64, normal, objective64

Precision = Literal["auto", "float32", "bfloat16"]
PRECISIONS: tuple[Precision, ...] = ("auto", "float32", "bfloat16")
PATTERNS: list[Pattern] = [Unstructured(0.5), Unstructured(0.7), SemiStructured(2, 4)]
# Penalties that stay equal, grow and fall; None is a restart.
SCHEDULE = [0.1, 0.1, 0.1, 0.13, 0.13, 0.13, None, 0.02, 0.02, 0.024, 0.03, 0.03, 0.5, 0.5]


def medium() -> Problem:
    """Make a problem large enough for ALPS to use the fused steps."""
    return Problem(normal(50, 256, 320), correlated_inputs(51, 960, 320))


def spiked() -> Problem:
    """Make a problem with one direction of a thousand times the variance of the others."""
    common = normal(61, 960, 1) * normal(62, 1, 320)
    return Problem(normal(60, 256, 320), normal(63, 960, 320) + 1000**0.5 * common)


def state_of(problem: Problem) -> tuple[ScaledHessian, Tensor]:
    """Return the scaled Hessian, and the dense weight in its coordinates."""
    state = scaled(InputStats.of(problem.inputs), 0.01)
    return state, problem.weight / state.scale


def distance(result: Tensor, exact: Tensor) -> float:
    return float((result.double() - exact.double()).norm() / exact.double().norm())


def flips(first: Tensor, second: Tensor) -> int:
    return int(torch.count_nonzero(first ^ second))


def both_steps(problem: Problem, pattern: Pattern) -> Iterator[tuple[PlainSteps, FusedSteps]]:
    """Yield the published and the fused steps, before the schedule and after every entry of it."""
    state, dense = state_of(problem)
    before = dense.clone()
    plain = PlainSteps(state, dense, dense @ state.matrix, pattern)
    streaming = FusedSteps(state, dense, pattern, torch.float32)
    yield plain, streaming
    for rho in SCHEDULE:
        for steps in (plain, streaming):
            steps.restart() if rho is None else steps.step(rho)
        if rho is not None:
            assert streaming.gap() == pytest.approx(plain.gap(), rel=0.01, abs=1e-6)
        yield plain, streaming
    assert torch.equal(dense, before)


# The fused steps are at least twice as close to float64 as the published ones, as measured. The distance between the
# two, at most 4e-5, is the rounding of C = N H in the published form.
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("problem", [name for name in PROBLEMS if name != "zero_weight"])
def test_fused_steps_in_float32_match_the_published_steps(problem: str, pattern: Pattern) -> None:
    made = PROBLEMS[problem]()
    if not pattern.fits(made.weight.shape[1]):
        pattern = Unstructured(0.3)
    for plain, streaming in both_steps(made, pattern):
        assert torch.equal(streaming.mask, plain.mask)
        assert distance(copy.deepcopy(streaming).projected(), plain.projected()) < 1e-4


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_fused_steps_match_the_published_steps_on_a_larger_layer(pattern: Pattern) -> None:
    """Allow for entries so close to the cut that rounding decides: up to 54 of 80,000 as measured."""
    for plain, streaming in both_steps(medium(), pattern):
        assert flips(streaming.mask, plain.mask) <= 160
        assert distance(copy.deepcopy(streaming).projected(), plain.projected()) < 0.03


def test_later_steps_do_not_modify_a_mask() -> None:
    state, dense = state_of(medium())
    steps = FusedSteps(state, dense, Unstructured(0.7), torch.float32)
    first = steps.mask
    before = first.clone()
    steps.step(0.1)
    assert torch.equal(first, before) and flips(steps.mask, before) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_the_last_projection_is_exact(pattern: Pattern, dtype: torch.dtype) -> None:
    """Use a layer so large that earlier projections may be off by an entry or two."""
    state, dense = state_of(Problem(normal(70, 512, 400), correlated_inputs(71, 800, 400)))
    steps = FusedSteps(state, dense, pattern, dtype)
    kept = dense.numel() - pattern.pruned_count(dense.numel())
    for rho in (0.1, 0.1, 0.13):
        steps.step(rho)
        assert abs(int(steps.mask.sum()) - kept) <= 2e-5 * kept
    Z = steps._Z.clone()
    D, mask = steps.projected(), steps.mask
    expected = keep_largest(Z.abs(), pattern)
    assert torch.equal(mask, expected) and int(mask.sum()) == kept
    assert torch.equal(D, torch.where(expected, Z, 0.0))


def exact_weights(state: ScaledHessian, dense: Tensor, rho: float, steps: int, pattern: Pattern) -> Tensor:
    """Return W after some steps from the start by Eq. 4 in float64."""
    H, N = state.matrix.double(), dense.double()
    W = N
    D, V = torch.where(keep_largest(dense.abs(), pattern), N, 0.0), torch.zeros_like(N)
    for _ in range(steps):
        right: Tensor = N @ H - V + rho * D
        W = right @ torch.linalg.inv(H + rho * torch.eye(len(H), dtype=torch.float64))
        Z = W + V / rho
        D = torch.where(keep_largest(Z.abs(), pattern), Z, 0.0)
        V = rho * (Z - D)
    return W


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("rho", [0.02, 0.1])
def test_a_bfloat16_step_survives_one_strong_direction(rho: float, pattern: Pattern) -> None:
    """Check that the right-hand side, which is a thousand times as large in this direction, is not rounded."""
    state, dense = state_of(spiked())
    exact = exact_weights(state, dense, rho, 1, pattern)
    steps = FusedSteps(state, dense, pattern, torch.bfloat16)
    steps.step(rho)
    assert float((steps._weights() - exact).norm() / dense.norm()) < 0.01
    D = torch.where(keep_largest(dense.abs(), pattern), dense, 0.0)
    right = (dense @ state.matrix + rho * D).bfloat16()
    naive = right @ state.inverse(rho, torch.bfloat16)
    assert float((naive - exact).norm() / dense.norm()) > 0.05


@pytest.mark.parametrize("make", [medium, spiked])
def test_bfloat16_rounding_errors_do_not_accumulate(make: Callable[[], Problem]) -> None:
    """Compare after six steps; the distance is 0.026 as measured, mostly from entries at the cut."""
    state, dense = state_of(make())
    steps = FusedSteps(state, dense, SemiStructured(2, 4), torch.bfloat16)
    for _ in range(6):
        steps.step(0.1)
    exact = exact_weights(state, dense, 0.1, 6, SemiStructured(2, 4))
    assert float((steps._weights() - exact).norm() / dense.norm()) < 0.05


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("make", [medium, spiked])
def test_bfloat16_solutions_have_nearly_the_same_error(make: Callable[[], Problem], pattern: Pattern) -> None:
    """Compare objectives with damping (within 0.25 % as measured over 12 seeds) and without (1.7 %)."""
    weight, inputs = make()
    stats = InputStats.of(inputs)
    hessian, _ = hessian64(inputs)
    damped, true = [], []
    for name in PRECISIONS[1:]:
        method = Alps(precision=name)
        solution = method.solve(weight, method.prepare(stats), pattern)
        assert int((~solution.mask).sum()) == pattern.pruned_count(weight.numel())
        assert not bool(solution.weight[~solution.mask].any())
        damped.append(float(objective64(solution.weight, weight, hessian).sum()))
        true.append(stats.energy(solution.weight - weight))
    assert damped[1] == pytest.approx(damped[0], rel=0.005)
    assert true[1] == pytest.approx(true[0], rel=0.025)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("name", PRECISIONS)
def test_reported_errors_match_float64(name: Precision, pattern: Pattern) -> None:
    weight, inputs = medium()
    stats = InputStats.of(inputs)
    outputs = (inputs.double() @ weight.double().T).square().sum()
    plain, refined = Alps(precision=name, refit_steps=0), Alps(precision=name)
    before = plain.solve(weight, plain.prepare(stats), pattern)
    after = refined.solve(weight, refined.prepare(stats), pattern)
    assert torch.equal(before.mask, after.mask)
    true = [
        float((inputs.double() @ (solution.weight.double() - weight.double()).T).square().sum() / outputs)
        for solution in (before, after)
    ]
    assert after.info.error_before_refit == before.info.error_after_refit == pytest.approx(true[0], rel=1e-3)
    assert after.info.error_after_refit == pytest.approx(true[1], rel=1e-3)


def test_the_refit_stops_at_a_small_gain() -> None:
    weight, inputs = medium()
    stats = InputStats.of(inputs)
    steps = []
    for gain in (0.0, 1e-5, 1e-3, 0.9):
        method = Alps(refit_steps=50, refit_tolerance=0.0, refit_gain=gain)
        steps.append(method.solve(weight, method.prepare(stats), Unstructured(0.7)).info.refit_steps)
    assert steps[0] == 50 > steps[1] > steps[2] >= steps[3] == 1


@pytest.mark.parametrize("fast", [True, False])
def test_auto_precision_depends_on_the_device_and_the_size(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alps, "has_fast_bfloat16", lambda _device: fast)
    for (weight, inputs), expected in (
        (medium(), PRECISIONS[2 if fast else 1]),
        (PROBLEMS["correlated"](), PRECISIONS[1]),
    ):
        answers: dict[str, Tensor] = {}
        for name in PRECISIONS:
            method = Alps(precision=name)
            answers[name] = method.solve(weight, method.prepare(InputStats.of(inputs)), Unstructured(0.7)).weight
        assert torch.equal(answers["auto"], answers[expected])
        assert not torch.equal(answers["float32"], answers["bfloat16"])


@pytest.mark.parametrize(
    ("avx", "amx", "answer"),
    [(True, False, True), (False, True, True), (False, False, False), (None, True, True), (None, None, False)],
)
def test_fast_bfloat16_depends_on_the_instruction_set(
    avx: bool | None, amx: bool | None, answer: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Use None for a torch version without the function, for which the result must be False."""
    for name, value in (("_is_avx512_bf16_supported", avx), ("_is_amx_tile_supported", amx)):
        monkeypatch.setattr(torch.cpu, name, value if value is None else (lambda value=value: value), raising=False)
    assert precision.has_fast_bfloat16(torch.device("cpu")) is answer
    assert not precision.has_fast_bfloat16(torch.device("meta"))
