"""Tests of the dense target: W* minimises the layer problem, and pruning W* reproduces the dense outputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from alps.core.errors import SolveFailed
from alps.core.statistics import InputStats, InputSums, Needs
from alps.solvers import get_method
from alps.solvers.dense_target import shifted_weight, target_damping, target_shift
from alps.solvers.hessian import absolute_damping
from alps.solvers.patterns import Unstructured


def _inputs(tokens: int = 200, size: int = 12, drift: float = 0.3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    X = torch.randn(tokens, size, generator=generator) @ torch.randn(size, size, generator=generator)
    X_d = X + drift * torch.randn(tokens, size, generator=generator) + 0.2 * X.roll(1, dims=1)
    return X, X_d, torch.randn(7, size, generator=generator)


def _sums(X: Tensor, X_d: Tensor, parts: int = 1) -> InputSums:
    sums = InputSums.zeros(X.shape[1], Needs.INPUT_SHIFT)
    for inputs, dense_inputs in zip(X.chunk(parts), X_d.chunk(parts), strict=True):
        sums.update(inputs, dense_inputs)
    return sums


def _stats(X: Tensor, X_d: Tensor) -> InputStats:
    return _sums(X, X_d).to_stats()


def _objective(W_hat: Tensor, W: Tensor, X: Tensor, X_d: Tensor, share: float, damping: float) -> Tensor:
    Y = X @ W.T + share * (X_d - X) @ W.T
    return (X @ W_hat.T - Y).square().sum() + damping * (W_hat - W).square().sum()


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_the_target_weight_minimises_the_objective(share: float) -> None:
    X, X_d, W = _inputs()
    stats = _stats(X, X_d)
    X, X_d, W64 = X.double(), X_d.double(), W.double()
    damping = absolute_damping(stats, 0.01)
    best = shifted_weight(W, target_shift(stats, share, 0.01)).double().requires_grad_()
    (slope,) = torch.autograd.grad(_objective(best, W64, X, X_d, share, damping), best)
    far = W64.clone().mul_(0).requires_grad_()
    (reference,) = torch.autograd.grad(_objective(far, W64, X, X_d, share, damping), far)
    assert float(slope.norm()) < 1e-4 * float(reference.norm())
    moved = float((best.detach() - W64).norm() / W64.norm())
    assert moved == 0 if share == 0 else moved > 0.01


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_the_objective_is_the_distance_to_the_target_weight(share: float) -> None:
    X, X_d, W = _inputs()
    stats = _stats(X, X_d)
    damping = absolute_damping(stats, 0.01)
    best = shifted_weight(W, target_shift(stats, share, 0.01)).double()
    X, X_d, W = X.double(), X_d.double(), W.double()
    H = X.T @ X + damping * torch.eye(X.shape[1], dtype=torch.float64)
    least = _objective(best, W, X, X_d, share, damping)
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        other = torch.randn(W.shape, generator=generator, dtype=torch.float64)
        distance = ((other - best) @ H * (other - best)).sum()
        rise = _objective(other, W, X, X_d, share, damping) - least
        torch.testing.assert_close(rise, distance, rtol=1e-4, atol=0.0)


def test_alps_reaches_the_dense_outputs_better_with_the_dense_target() -> None:
    X, X_d, W = _inputs(tokens=400, size=32)
    stats = _stats(X, X_d)
    method = get_method("alps")
    state = method.prepare(stats)
    plain = method.solve(W, state, Unstructured(0.5)).weight
    aimed = method.solve(shifted_weight(W, target_shift(stats, 1.0, 0.01)), state, Unstructured(0.5)).weight
    expected = X_d @ W.T
    assert float((X @ aimed.T - expected).square().sum()) < 0.95 * float((X @ plain.T - expected).square().sum())
    # The plain solve has the smaller error in the paper's objective.
    assert float((X @ plain.T - X @ W.T).square().sum()) < float((X @ aimed.T - X @ W.T).square().sum())


def test_without_input_shift_the_target_is_the_dense_weight() -> None:
    X, _, W = _inputs()
    assert torch.equal(shifted_weight(W, target_shift(_stats(X, X), 1.0, 0.01)), W)


def test_an_indefinite_gram_is_refused() -> None:
    X, X_d, _ = _inputs()
    stats = _stats(X, X_d)
    assert stats.upper is not None
    stats.upper.diagonal().neg_()
    with pytest.raises(SolveFailed, match="not positive definite"):
        target_shift(stats, 1.0, 0.01)


def test_few_tokens_move_the_target_less_than_many() -> None:
    assert [target_damping(tokens) for tokens in (0, 1024, 16_384, 131_072, 10**8)] == [16_384, 16, 1, 0.125, 0.01]
    X, X_d, W = _inputs(tokens=512)
    few, many = _stats(X, X_d), _sums(X.repeat(64, 1), X_d.repeat(64, 1)).to_stats()
    near, far = (
        float((shifted_weight(W, target_shift(stats, 1.0, target_damping(stats.tokens))) - W).norm())
        for stats in (few, many)
    )
    assert 0 < near < 0.3 * far


def test_directions_of_small_variance_keep_the_dense_weight() -> None:
    scale = torch.ones(12).index_fill(0, torch.tensor([3]), 1e-2)
    generator = torch.Generator().manual_seed(2)
    X = torch.randn(16_384, 12, generator=generator) * scale
    shift = target_shift(_stats(X, 1.5 * X), 1.0, target_damping(len(X)))
    quiet, loud = float(shift[3, 3]), shift.diagonal()[scale == 1]
    assert 0 < quiet < 1e-3 and bool((loud > 0.2).all() & (loud < 0.3).all())
