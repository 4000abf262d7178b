"""The refit of another method: its support, the least-squares weights on it, and both errors."""

from __future__ import annotations

import pytest
import torch

from alps.core.statistics import InputStats, relative_error
from alps.solvers import Alps, Magnitude, Refitted, Wanda, get_method
from alps.solvers.patterns import Pattern, SemiStructured, Unstructured
from helpers.problems import correlated, hessian64


@pytest.mark.parametrize("pattern", [Unstructured(0.7), SemiStructured(2, 4)], ids=str)
def test_weights_are_the_least_squares_answer_on_the_support_of_the_other_method(pattern: Pattern) -> None:
    weight, inputs = correlated()
    base, stats = Wanda(), InputStats.of(inputs)
    method = Refitted(base, max_steps=1000, tolerance=1e-7)
    plain = base.solve(weight, base.prepare(stats), pattern)
    refitted = method.solve(weight, method.prepare(stats), pattern)
    assert torch.equal(refitted.mask, plain.mask)
    H, _ = hessian64(inputs)
    right = weight.double() @ H
    for row, kept in enumerate(plain.mask):
        exact = torch.linalg.solve(H[kept][:, kept], right[row, kept])
        torch.testing.assert_close(refitted.weight[row, kept].double(), exact, rtol=1e-3, atol=1e-4)
    info = refitted.info
    assert info.error_before_refit == pytest.approx(relative_error(plain.weight, weight, stats), rel=1e-3)
    assert info.error_after_refit == pytest.approx(relative_error(refitted.weight, weight, stats), rel=1e-3)
    assert info.error_after_refit is not None and info.error_after_refit < 0.7 * (info.error_before_refit or 0)
    assert info.refit_steps > 0 and info.refit_residual is not None and info.refit_residual < 1e-6


def test_a_refit_is_named_after_its_method_and_prunes_as_it_does() -> None:
    assert get_method("wanda", refit=True) == Refitted(Wanda()) and Refitted(Wanda()).name == "wanda+refit"
    assert Refitted(Wanda()).by_rows and not Refitted(Magnitude()).by_rows
    traced = Refitted(Alps()).traced()
    assert isinstance(traced.base, Alps) and traced.base.trace_errors


def test_few_steps_are_kept_and_counted() -> None:
    weight, inputs = correlated()
    stats = InputStats.of(inputs)
    errors = []
    for steps in (1, 2, 50):
        method = Refitted(Magnitude(), max_steps=steps, tolerance=0.0)
        info = method.solve(weight, method.prepare(stats), Unstructured(0.7)).info
        assert info.refit_steps == steps
        errors.append(info.error_after_refit or 0.0)
    assert errors == sorted(errors, reverse=True) and len(set(errors)) == 3
