"""Tests of damping, scaling and factors of the Hessian against dense float64."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from alps.core.errors import SolveFailed
from alps.core.statistics import InputStats
from alps.solvers import hessian as hessian_module
from alps.solvers.hessian import (
    ScaledHessian,
    absolute_damping,
    column_squares,
    damped,
    inner,
    inverse_factor,
    invert_,
    row_inner,
    rows_per_chunk,
    scaled,
)
from helpers.problems import PROBLEMS, correlated, correlated_inputs, hessian64, huge_range, normal, zero_inputs

NAMES = ["gaussian", "correlated", "dead_inputs", "few_tokens", "huge_range", "huge_token", "one_input"]


def handmade(eigenvalues: list[float]) -> InputStats:
    """Make inconsistent statistics with mean square 1 and a Gram with the given eigenvalues."""
    size = len(eigenvalues)
    basis = torch.linalg.qr(normal(5, size, size).double()).Q
    gram = (basis * torch.tensor(eigenvalues, dtype=torch.float64)) @ basis.T
    return InputStats(1000, torch.zeros(size), torch.ones(size), gram.float())


def inputs_of(name: str) -> Tensor:
    return PROBLEMS[name]().inputs


@pytest.mark.parametrize("name", NAMES)
def test_damping_is_added_to_the_diagonal_only(name: str) -> None:
    inputs = inputs_of(name)
    hessian, damping = damped(InputStats.of(inputs), 0.01)
    exact, lam = hessian64(inputs, 0.01)
    assert damping == pytest.approx(lam, rel=1e-6)
    size = exact.diagonal().sqrt()
    assert float(((hessian.double() - exact) / size / size[:, None]).abs().max()) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_scaled_is_the_unit_diagonal_hessian(name: str) -> None:
    inputs = inputs_of(name)
    state = scaled(InputStats.of(inputs), 0.01)
    exact, lam = hessian64(inputs, 0.01)
    scale = exact.diagonal().rsqrt()
    assert torch.equal(state.matrix.diagonal(), torch.ones(len(scale)))
    torch.testing.assert_close(state.scale.double(), scale, rtol=1e-5, atol=0)
    torch.testing.assert_close(state.matrix.double(), exact * scale * scale[:, None], rtol=1e-5, atol=1e-5)
    assert state.damping == pytest.approx(lam, rel=1e-6)


def test_zero_inputs_have_damping_one() -> None:
    stats = InputStats.of(zero_inputs().inputs)
    assert absolute_damping(stats, 0.01) == 1.0
    state = scaled(stats, 0.01)
    assert torch.equal(state.matrix, torch.eye(40)) and torch.equal(state.scale, torch.ones(40))
    assert any("40 of 40 inputs were zero" in note for note in state.notes)
    factor = inverse_factor(stats, 0.01)
    upper, damping, notes = factor.upper, factor.damping, factor.notes
    assert torch.equal(upper, torch.eye(40)) and damping == 1.0 and notes == []


def test_dead_inputs_and_few_tokens_are_noted() -> None:
    dead = scaled(InputStats.of(inputs_of("dead_inputs")), 0.01).notes
    assert dead == ["6 of 40 inputs were zero on every calibration token"]
    few = scaled(InputStats.of(inputs_of("few_tokens")), 0.01).notes
    assert few == ["10 calibration tokens for 40 inputs: use more samples"]
    assert scaled(InputStats.of(inputs_of("gaussian")), 0.01).notes == []


@pytest.mark.parametrize("rho", [0.004, 0.1, 3.0])
@pytest.mark.parametrize("name", NAMES)
def test_inverse_matches_the_shifted_matrix_in_float64(name: str, rho: float) -> None:
    state = scaled(InputStats.of(inputs_of(name)), 0.01)
    shifted = state.matrix.double() + rho * torch.eye(len(state.scale), dtype=torch.float64)
    exact = torch.linalg.inv(shifted)
    assert float((state.inverse(rho).double() - exact).norm() / exact.norm()) < 1e-4


def test_inverses_are_cached_by_penalty() -> None:
    state = scaled(InputStats.of(correlated().inputs), 0.01)
    first, second = state.inverse(0.1), state.inverse(0.2)
    assert state.inverse(0.1) is first and state.inverse(0.2) is second
    assert not torch.equal(first, second)
    assert torch.equal(state.matrix.diagonal(), torch.ones(40)), "the shift must not stay in the matrix"


@pytest.mark.parametrize("name", NAMES)
def test_undamped_energy_is_that_of_the_outputs(name: str) -> None:
    weight, inputs = PROBLEMS[name]()
    state = scaled(InputStats.of(inputs), 0.01)
    exact = float((inputs.double() @ weight.double().T).square().sum())
    assert state.undamped_energy(weight / state.scale) == pytest.approx(exact, rel=1e-4)


def test_undamped_energy_of_zero_inputs_is_zero() -> None:
    """Check exact zero, because relative errors divide one energy by another."""
    state = scaled(InputStats.of(zero_inputs().inputs), 0.01)
    assert [state.undamped_energy(normal(seed, 12, 40)) for seed in range(10)] == [0.0] * 10


@pytest.mark.parametrize("name", NAMES)
def test_inverse_factor_squares_to_the_inverse(name: str) -> None:
    stats = InputStats.of(inputs_of(name))
    factor = inverse_factor(stats, 0.01)
    upper, damping, notes = factor.upper, factor.damping, factor.notes
    hessian, lam = damped(stats, 0.01)
    assert torch.equal(upper, upper.triu()) and bool((upper.diagonal() > 0).all())
    assert damping == lam and notes == []
    inverse = torch.linalg.inv(hessian.double())
    product = upper.double().T @ upper.double()
    assert float((product - inverse).norm() / inverse.norm()) < 1e-6


def test_the_factor_is_accurate_with_very_small_damping() -> None:
    """Check 1 / U_jj^2, the part of input j that later inputs do not explain, against rounding."""
    inputs = huge_range().inputs
    upper = inverse_factor(InputStats.of(inputs), 1e-6).upper
    stats = InputStats.of(inputs)
    hessian = stats.gram().double() + 1e-6 * float(stats.square.double().mean()) * torch.eye(40)
    for j in (0, 20, 39):
        exact = torch.linalg.inv(hessian[j:, j:])[0, 0]
        assert float(upper[j, j].double().square() / exact) == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize(("lowest", "raised"), [(-0.05, 0.1), (-0.5, 1.0), (-5.0, 10.0)])
def test_damping_is_raised_with_a_note(lowest: float, raised: float) -> None:
    stats = handmade([lowest, 1.0, 2.0, 3.0, 1.5, 0.5])
    factor = inverse_factor(stats, 0.01)
    upper, damping, notes = factor.upper, factor.damping, factor.notes
    assert damping == pytest.approx(raised)
    assert notes == [f"damping raised to {raised:g} of the mean diagonal"]
    exact = torch.linalg.inv(stats.gram().double() + raised * torch.eye(6))
    torch.testing.assert_close(upper.double().T @ upper.double(), exact, rtol=1e-3, atol=1e-4)


def test_indefinite_sums_beyond_any_damping_are_rejected() -> None:
    with pytest.raises(SolveFailed, match="indefinite under any damping"):
        inverse_factor(handmade([-50.0, 1.0, 2.0, 3.0]), 0.01)


def test_the_scaled_hessian_raises_its_damping_as_the_factor_does() -> None:
    stats = handmade([-0.5, 1.0, 1.2, 1.4, 1.1, 0.9])
    state = scaled(stats, 0.01)
    factor = inverse_factor(stats, 0.01)
    damping, notes = factor.damping, factor.notes
    assert state.damping == damping and state.notes[0] == notes[0] == "damping raised to 1 of the mean diagonal"
    exact = torch.linalg.inv(state.matrix.double() + 0.1 * torch.eye(6))
    torch.testing.assert_close(state.inverse(0.1).double(), exact, rtol=1e-4, atol=1e-5)
    with pytest.raises(SolveFailed, match="indefinite under any damping"):
        scaled(handmade([-50.0, 1.0, 2.0, 3.0]), 0.01)


def unit_diagonal(inputs: Tensor) -> Tensor:
    """Return the Gram scaled to unit diagonal plus 0.1 I, in float64."""
    gram = inputs.double().T @ inputs.double()
    scale = gram.diagonal().rsqrt()
    return gram * scale * scale[:, None] + 0.1 * torch.eye(len(scale), dtype=torch.float64)


# Condition numbers of 15 and of 100; halving costs up to five times the error of one Cholesky inverse, as measured.
@pytest.mark.parametrize(("make", "limit"), [(normal, 1e-6), (correlated_inputs, 3e-5)], ids=["white", "correlated"])
@pytest.mark.parametrize("size", [1, 2, 319, 320, 321, 500, 700])
def test_invert_is_the_inverse_at_every_depth_of_halving(
    size: int, make: Callable[[int, int, int], Tensor], limit: float
) -> None:
    exact = unit_diagonal(make(size, 2 * size + 8, size))
    result = exact.float()
    assert invert_(result)
    inverse = torch.linalg.inv(exact)
    assert float((result.double() - inverse).norm() / inverse.norm()) < limit
    assert float((result - result.T).norm() / result.norm()) < 1e-6


@pytest.mark.parametrize("size", [2, 320, 500, 700])
@pytest.mark.parametrize("place", ["first half", "second half", "Schur complement"])
def test_invert_returns_false_for_indefinite_matrices(place: str, size: int) -> None:
    """Include a matrix that is indefinite although both diagonal blocks are the identity."""
    matrix = torch.eye(size)
    if place == "Schur complement":
        matrix[0, -1] = matrix[-1, 0] = 1.5
    else:
        index = 0 if place == "first half" else -1
        matrix[index, index] = -1.0
    assert not invert_(matrix)


def test_a_large_indefinite_matrix_is_refused() -> None:
    matrix = torch.eye(400)
    matrix[0, -1] = matrix[-1, 0] = 1.5
    state = ScaledHessian(matrix.clone(), torch.ones(400), 0.0)
    with pytest.raises(SolveFailed, match=r"not positive definite at rho = 0\.1"):
        state.inverse(0.1)
    assert torch.equal(state.matrix, matrix), "the attempt must not spoil the matrix"
    assert bool(torch.isfinite(state.inverse(1.0)).all())


def test_a_bfloat16_inverse_is_the_float32_one_rounded() -> None:
    state = scaled(InputStats.of(correlated().inputs), 0.01)
    low, full = state.inverse(0.1, torch.bfloat16), state.inverse(0.1)
    assert low.dtype == torch.bfloat16 and full.dtype == torch.float32
    assert torch.equal(low, full.bfloat16())
    assert state.inverse(0.1, torch.bfloat16) is low and state.inverse(0.1) is full


def test_inverses_beyond_the_cache_size_are_recomputed(monkeypatch: pytest.MonkeyPatch) -> None:
    state = scaled(InputStats.of(correlated().inputs), 0.01)
    monkeypatch.setattr(hessian_module, "_CACHE_BYTES", 2 * 40 * 40 * 4)
    kept, also, beyond = (state.inverse(rho) for rho in (0.1, 0.2, 0.3))
    assert state.inverse(0.1) is kept and state.inverse(0.2) is also
    again = state.inverse(0.3)
    assert again is not beyond and torch.equal(again, beyond)


def test_the_cache_on_a_gpu_depends_on_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    for memory, kept in ((80 * 2**30, 5 * 2**30), (2**30, 2**28)):
        facts = SimpleNamespace(total_memory=memory)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, facts=facts: facts)
        assert hessian_module.inverse_cache_bytes(torch.device("cuda")) == kept
    assert hessian_module.inverse_cache_bytes(torch.device("cpu")) == 2**28


@pytest.mark.parametrize("name", NAMES)
def test_undamped_subtracts_the_damping_term(name: str) -> None:
    weight, inputs = PROBLEMS[name]()
    state = scaled(InputStats.of(inputs), 0.01)
    hessian, damping = hessian64(inputs)
    delta = weight.double()
    exact = float(((delta @ hessian) * delta).sum())
    share = damping * float(delta.square().sum())
    assert state.undamped(exact, weight / state.scale) == pytest.approx(exact - share, rel=1e-4)


def test_a_penalty_below_rounding_is_inverted_in_float64() -> None:
    """Use all inputs twice: a singular matrix of unit diagonal, which is indefinite by rounding in float32."""
    inputs = correlated_inputs(21, 2000, 200)
    state = scaled(InputStats.of(torch.cat([inputs, inputs], dim=1)), 0.0)
    eye = torch.eye(400, dtype=torch.float64)
    assert not invert_(state.matrix + 1e-5 * eye.float())
    # The result is symmetric only up to rounding, which a nearly singular matrix amplifies: compare the lower triangle.
    lower = state.matrix.double().tril(-1)
    exact = torch.linalg.inv(lower + lower.T + (1 + 1e-5) * eye)
    assert float((state.inverse(1e-5).double() - exact).norm() / exact.norm()) < 1e-6
    with pytest.raises(SolveFailed, match="not positive definite at rho = 1e-08"):
        state.inverse(1e-8)


# One row, rows that end within a chunk, rows that fill two chunks and a part, and rows longer than a chunk.
SHAPES = [(1, 1), (5, 7), (1753, 300), (3, 300_000)]


def integers(seed: int, *shape: int) -> Tensor:
    """Make small whole numbers, whose sums are exact in float32."""
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).float()


def test_chunks_consist_of_whole_rows() -> None:
    assert [rows_per_chunk(torch.empty(shape)) for shape in SHAPES] == [2**18, 2**18 // 7, 873, 1]


@pytest.mark.parametrize("shape", SHAPES)
def test_sums_of_whole_numbers_are_exact(shape: tuple[int, int]) -> None:
    A, B = integers(1, *shape), integers(2, *shape)
    a, b = A.double(), B.double()
    assert torch.equal(row_inner(A, B).double(), (a * b).sum(dim=1))
    assert inner(A, B) == float((a * b).sum())
    assert torch.equal(column_squares(A).double(), a.square().sum(dim=0))


@pytest.mark.parametrize("shape", SHAPES)
def test_sums_are_accurate_to_float32_rounding(shape: tuple[int, int]) -> None:
    A, B = normal(3, *shape), normal(4, *shape)
    a, b = A.double(), B.double()
    size = float((a * b).abs().sum())
    assert inner(A, B) == pytest.approx(float((a * b).sum()), abs=1e-6 * size)
    torch.testing.assert_close(column_squares(A).double(), a.square().sum(dim=0), rtol=1e-5, atol=0)


def test_sums_of_rows_are_added_in_float64() -> None:
    """Use three times 2^24 - 1, which float32 cannot represent."""
    A = torch.zeros(3, 4)
    A[:, 1] = 2**24 - 1
    assert inner(A, torch.ones(3, 4)) == 3 * (2**24 - 1)
