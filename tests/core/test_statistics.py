"""InputSums and InputStats: what is summed equals dense float64 sums, in whatever pieces and dtypes it arrives."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from alps.core.statistics import InputStats, InputSums, Needs, relative_error, relative_errors
from helpers.problems import IN, OUT, PROBLEMS, normal

WIDTHS = (1, 7, 255, 256, 257, 600)


def integers(seed: int, *shape: int) -> Tensor:
    """Return small whole numbers: all their sums are exact in float32, so that tests can demand equality."""
    return torch.randint(-9, 10, shape, generator=torch.Generator().manual_seed(seed)).float()


@pytest.mark.parametrize("width", WIDTHS)
def test_sums_of_whole_numbers_are_exact(width: int) -> None:
    inputs = integers(width, 11, width)
    exact = inputs.double()
    stats = InputStats.of(inputs)
    assert stats.tokens == 11
    assert torch.equal(stats.total.double(), exact.sum(dim=0))
    assert torch.equal(stats.square.double(), exact.square().sum(dim=0))
    assert torch.equal(stats.gram().double(), exact.T @ exact)


@pytest.mark.parametrize("width", [255, 257])
def test_rounding_stays_that_of_float32(width: int) -> None:
    inputs = normal(width, 200, width)
    exact = inputs.double()
    gram = InputStats.of(inputs).gram().double()
    # The worst case of a float32 sum of 200 products; half precision anywhere would be far outside.
    bound = 200 * 2.0**-24 * (exact.abs().T @ exact.abs())
    assert bool(((gram - exact.T @ exact).abs() <= bound).all())


@pytest.mark.parametrize("width", WIDTHS)
def test_gram_is_symmetric_to_the_bit(width: int) -> None:
    gram = InputStats.of(normal(width, 30, width)).gram()
    assert torch.equal(gram, gram.T)


def test_gram_is_a_fresh_copy() -> None:
    stats = InputStats.of(integers(1, 5, 8))
    before = stats.gram()
    stats.gram().zero_()
    assert torch.equal(stats.gram(), before) and bool(before.any())


@pytest.mark.parametrize("width", [8, 257])
def test_parts_add_up(width: int) -> None:
    inputs = integers(2, 24, width)
    whole = InputStats.of(inputs)
    added = (InputSums.of(inputs[:7]) + InputSums.of(inputs[7:])).to_stats()
    updated = InputSums.of(inputs[:20])
    updated.update(inputs[20:])
    for other in (added, updated.to_stats(), InputStats.of(inputs.reshape(2, 3, 4, width))):
        assert other.tokens == whole.tokens == 24
        assert torch.equal(other.total, whole.total)
        assert torch.equal(other.square, whole.square)
        assert torch.equal(other.gram(), whole.gram())


def test_the_input_shift_is_a_sum_over_tokens() -> None:
    dense, inputs = integers(3, 24, 8).double(), integers(4, 24, 8).double()
    sums = InputSums.zeros(8, Needs.INPUT_SHIFT)
    for part in (slice(7), slice(7, 24)):
        sums.update(inputs[part].float(), dense[part].float())
    stats = sums.to_stats()
    assert stats.input_shift is not None and stats.is_finite()
    assert torch.equal(stats.input_shift.double(), (dense - inputs).T @ inputs)
    sums.update(inputs.float(), torch.full((24, 8), torch.nan))
    assert not sums.to_stats().is_finite()


def test_inputs_in_bfloat16_lose_nothing() -> None:
    generator = torch.Generator().manual_seed(6)
    X = (torch.randn(3, 200, 300, generator=generator) * torch.logspace(-2, 2, 300)).bfloat16()
    X_d = (X.float() * (1 + 0.2 * torch.randn(X.shape, generator=generator))).bfloat16()
    sums = InputSums.zeros(300, Needs.INPUT_SHIFT)
    sums.update(X, X_d)
    stats = sums.into_stats()
    rows, dense = (x.double().flatten(0, 1) for x in (X, X_d))
    scale = rows.norm(dim=0)
    gram = (stats.gram() - rows.T @ rows) / scale / scale[:, None]
    assert float(gram.abs().max()) < 1e-6
    assert stats.input_shift is not None
    shift = (stats.input_shift - (dense - rows).T @ rows) / scale / scale[:, None]
    # Differences that are not bfloat16 numbers are rounded to eight bits, each by itself.
    assert float(shift.abs().max()) < 1e-4


def test_adding_leaves_the_parts_alone() -> None:
    left, right = InputSums.of(integers(3, 4, 6)), InputSums.of(integers(4, 5, 6))
    before = left.to_stats().gram()
    together = left + right
    together.update(integers(5, 3, 6))
    assert left.tokens == 4 and torch.equal(left.to_stats().gram(), before)
    assert together.tokens == 12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_summed_in_float32(dtype: torch.dtype) -> None:
    # 300^2 overflows float16, and 40 * 300^2 = 3 600 000 needs more than bfloat16's 8 bits.
    inputs = torch.cat([300 * torch.ones(39, 5), torch.full((1, 5), 299.0)]).to(dtype)
    exact = inputs.double()
    stats = InputStats.of(inputs)
    for sums in (stats.total, stats.square, stats.gram()):
        assert sums.dtype == torch.float32
    assert torch.equal(stats.total.double(), exact.sum(dim=0))
    assert torch.equal(stats.square.double(), exact.square().sum(dim=0))
    assert torch.equal(stats.gram().double(), exact.T @ exact)


def test_moments_agree_with_torch() -> None:
    inputs = normal(6, 500, 9) * torch.linspace(0.1, 3, 9) + torch.linspace(-1, 1, 9)
    stats = InputStats.of(inputs, Needs.MOMENTS)
    exact = inputs.double()
    torch.testing.assert_close(stats.mean().double(), exact.mean(dim=0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(stats.norms().double(), exact.norm(dim=0), rtol=1e-5, atol=0)
    torch.testing.assert_close(stats.variance().double(), exact.var(dim=0, correction=0), rtol=1e-4, atol=1e-6)


def test_constant_inputs_have_no_negative_variance() -> None:
    variance = InputStats.of(torch.full((1000, 4), 0.7), Needs.MOMENTS).variance()
    assert bool((variance >= 0).all()) and float(variance.max()) < 1e-4


def test_only_what_is_needed_is_held() -> None:
    inputs = integers(7, 10, 5)
    light = InputStats.of(inputs, Needs.MOMENTS)
    assert light.upper is None
    assert torch.equal(light.square, InputStats.of(inputs).square)
    with pytest.raises(AssertionError, match="not collected"):
        light.gram()
    sums = InputSums.of(inputs, Needs.MOMENTS)
    assert (sums + sums).to_stats().upper is None


def test_empty_sums_are_finite() -> None:
    stats = InputSums.zeros(3, Needs.GRAM).to_stats()
    assert stats.tokens == 0 and stats.is_finite()
    assert stats.mean().tolist() == stats.variance().tolist() == stats.norms().tolist() == [0.0] * 3


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_numbers_are_noticed(bad: float) -> None:
    inputs = integers(8, 10, 5)
    assert InputStats.of(inputs).is_finite()
    inputs[3, 2] = bad
    assert not InputStats.of(inputs).is_finite()
    assert not InputStats.of(inputs, Needs.MOMENTS).is_finite()


def test_gradients_are_not_recorded() -> None:
    inputs = integers(9, 4, 3).requires_grad_()
    assert not InputStats.of(inputs).total.requires_grad


@pytest.mark.parametrize("width", WIDTHS)
def test_energy_of_whole_numbers_is_exact(width: int) -> None:
    inputs, delta = integers(width, 11, width), integers(width + 1, 5, width)
    exact = (inputs.double() @ delta.double().T).square().sum()
    assert InputStats.of(inputs).energy(delta) == float(exact)


@pytest.mark.parametrize("width", [7, 257])
def test_energy_rounds_as_float32_does(width: int) -> None:
    inputs, delta = normal(width, 200, width), normal(width + 1, 12, width)
    exact = (inputs.double() @ delta.double().T).square().sum()
    assert InputStats.of(inputs).energy(delta) == pytest.approx(float(exact), rel=1e-5)


@pytest.mark.parametrize("width", [7, 257])
def test_energy_is_never_negative(width: int) -> None:
    """Changes that no output sees: their energy is rounding, of either sign."""
    direction = normal(1, width)
    stats = InputStats.of(normal(2, 50, 1) * direction)
    changes = (normal(seed, 4, width) for seed in range(20))
    unseen = [change - (change @ direction)[:, None] * direction / direction.square().sum() for change in changes]
    energies = [stats.energy(change) for change in unseen]
    assert min(energies) == 0.0
    assert max(energies) < 1e-6 * stats.energy(normal(0, 4, width))


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_below_the_diagonal_is_read(width: int) -> None:
    stats, delta = InputStats.of(integers(width, 11, width)), integers(width + 1, 5, width)
    gram, energy = stats.gram(), stats.energy(delta)
    assert stats.upper is not None
    stats.upper.masked_fill_(torch.ones(width, width).tril(-1).bool(), torch.nan)
    assert torch.equal(stats.gram(), gram)
    assert stats.energy(delta) == energy


def test_energy_needs_a_gram() -> None:
    with pytest.raises(AssertionError, match="not collected"):
        InputStats.of(integers(7, 10, 5), Needs.MOMENTS).energy(integers(8, 3, 5))


def test_average_tokens_are_those_of_the_mean_and_scale_with_the_inputs() -> None:
    inputs = integers(3, 8, 5)
    sums = InputSums.of(inputs)
    stats, six, doubled = sums.to_stats(), sums.rescaled(6).to_stats(), InputSums.of(2 * inputs).rescaled(6).to_stats()
    assert six.tokens == doubled.tokens == 6
    assert torch.equal(six.total, inputs.sum(dim=0) * 0.75) and torch.equal(six.mean(), stats.mean())
    assert torch.equal(six.gram(), inputs.T @ inputs * 0.75) and torch.equal(doubled.gram(), 4 * six.gram())
    assert torch.equal(six.square, six.gram().diagonal())
    both = (sums + sums.rescaled(6)).to_stats()
    assert both.tokens == 14 and torch.equal(both.gram(), inputs.T @ inputs * 1.75)
    assert float(InputSums.zeros(5, Needs.GRAM).rescaled(6).square.abs().sum()) == 0


@given(st.lists(st.integers(1, 7), min_size=1, max_size=6), st.integers(0, 2**32))
@settings(max_examples=30)
def test_windows_add_up_to_the_same_bits_in_any_order_and_in_any_batches(sizes: list[int], seed: int) -> None:
    """As they are dealt to several processes; their sizes differ a hundredfold, as those of sink tokens do."""
    generator = torch.Generator().manual_seed(seed)
    windows = torch.randn(sum(sizes), 12, 40, generator=generator) * torch.logspace(-1, 1, 40)
    dense = windows + 0.1 * torch.randn(windows.shape, generator=generator)

    def added(order: list[int], batches: list[int]) -> InputStats:
        sums, left = InputSums.zeros(40, Needs.INPUT_SHIFT), iter(order)
        for batch in ([next(left) for _ in range(size)] for size in batches):
            part = InputSums.zeros(40, Needs.INPUT_SHIFT)
            part.update(windows[batch], dense[batch])
            sums = part + sums
        return sums.to_stats()

    item = added(list(range(len(windows))), [len(windows)])
    other = added(torch.randperm(len(windows), generator=generator).tolist(), sizes)
    assert item.tokens == other.tokens == 12 * len(windows)
    assert torch.equal(item.gram(), other.gram()) and torch.equal(item.total, other.total)
    assert item.input_shift is not None and other.input_shift is not None
    assert torch.equal(item.square, other.square) and torch.equal(item.input_shift, other.input_shift)


def test_sums_are_let_go_of_when_they_are_released() -> None:
    inputs = normal(4, 20, 300)
    sums = InputSums.zeros(300, Needs.INPUT_SHIFT)
    sums.update(inputs, 2 * inputs)
    kept, held = sums.to_stats(), sum(part.nbytes for part in sums.tensors())
    assert held == InputSums.nbytes(300, Needs.INPUT_SHIFT) + sums.total.nbytes + sums.square.nbytes
    released = sums.into_stats()
    assert torch.equal(released.gram(), kept.gram())
    assert (
        released.input_shift is not None
        and kept.input_shift is not None
        and torch.equal(released.input_shift, kept.input_shift)
    )
    assert sum(part.nbytes for part in sums.tensors()) == sums.total.nbytes + sums.square.nbytes


@pytest.mark.parametrize("problem", ["gaussian", "correlated", "dead_inputs", "one_output", "huge_token"])
def test_errors_are_those_of_the_outputs(problem: str) -> None:
    weight, inputs = PROBLEMS[problem]()
    other = normal(7, *weight.shape)
    outputs = inputs.double() @ weight.double().T
    expected = [
        float((inputs.double() @ pruned.double().T - outputs).square().sum() / outputs.square().sum())
        for pruned in (other, 0.5 * weight)
    ]
    assert expected[1] == pytest.approx(0.25)
    stats = InputStats.of(inputs)
    assert relative_errors([other, 0.5 * weight], weight, stats) == pytest.approx(expected, rel=1e-4)
    assert relative_error(other, weight, stats) == pytest.approx(expected[0], rel=1e-4)


def test_the_error_of_an_output_of_zero_is_zero() -> None:
    stats = InputStats.of(torch.zeros(5, IN))
    assert relative_errors([torch.ones(OUT, IN), torch.zeros(OUT, IN)], normal(1, OUT, IN), stats) == [0.0, 0.0]
