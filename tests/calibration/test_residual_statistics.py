"""Sums behind the refit to the dense model: float64 sums over tokens, whatever the batches, order and ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from alps.calibration import residual_statistics
from alps.calibration.block_capture import capture_block_inputs
from alps.calibration.residual_statistics import (
    HELD_BACK,
    Missing,
    ResidualSums,
    SplitSums,
    advance_recording,
    collect_residuals,
)
from alps.core.distributed import SINGLE_PROCESS, ProcessGroup
from alps.models.blocks import find_blocks
from helpers.thread_group import run_in_threads

Tiny = Callable[..., Any]
_CPU = torch.device("cpu")
_WINDOWS = 2 * HELD_BACK + 3
_SITE = "model.layers.0.mlp.down_proj"


def _draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _naive(x: Tensor, r: Tensor, w: Tensor) -> dict[str, Tensor]:
    """Sums over tokens, one at a time, in float64."""
    x, r, w = x.double(), r.double(), w.double()
    gram, cross = torch.zeros(x.shape[1], x.shape[1]).double(), torch.zeros(r.shape[1], x.shape[1]).double()
    energy = torch.zeros(1).double()
    for token in range(len(x)):
        gram += w[token] * torch.outer(x[token], x[token])
        cross += w[token] * torch.outer(r[token], x[token])
        energy += w[token] * r[token].square().sum()
    return {
        "gram": gram,
        "cross": cross,
        "energy": energy,
        "largest": x.abs().amax(dim=0),
    }


def _assert_close(sums: ResidualSums, naive: dict[str, Tensor], tolerance: float) -> None:
    for name, expected in naive.items():
        tensor = getattr(sums, name)
        assert tensor.dtype == torch.float64 and tensor.shape == expected.shape
        assert float((tensor - expected).abs().max()) <= tolerance * float(expected.abs().max()), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_are_those_over_single_tokens(dtype: torch.dtype) -> None:
    x, r, w = _draw(3, 11, 6).to(dtype), _draw(3, 11, 4), _draw(3, 11).abs() + 0.1
    sums = ResidualSums.zeros((4, 6))
    for window in range(3):
        sums.update(x[window], r[window], w[window])
    assert sums.tokens == 33
    _assert_close(sums, _naive(x.flatten(0, 1), r.flatten(0, 1), w.flatten()), 1e-6)


def test_windows_are_added_without_rounding() -> None:
    """A small window behind a large one is not lost, as it would be in float32."""
    large, small = 4096 * torch.ones(1, 1), torch.ones(1, 1)
    sums = ResidualSums.zeros((1, 1))
    sums.update(large, large, torch.ones(1))
    sums.update(small, small, torch.ones(1))
    assert float(sums.gram) == float(sums.cross) == float(sums.energy) == 2**24 + 1
    swapped = ResidualSums.zeros((1, 1))
    swapped.update(small, small, torch.ones(1))
    swapped.update(large, large, torch.ones(1))
    assert torch.equal(sums.gram, swapped.gram)


def test_parts_add_up_and_a_weight_counts_as_that_many_tokens() -> None:
    x, r = _draw(8, 5), _draw(8, 3)
    halves = [ResidualSums.zeros((3, 5)) for _ in range(2)]
    for half, sums in enumerate(halves):
        sums.update(x[4 * half : 4 * half + 4], r[4 * half : 4 * half + 4], torch.ones(4))
    total = SplitSums(*halves).total
    assert total.tokens == 8
    _assert_close(total, _naive(x, r, torch.ones(8)), 1e-6)
    doubled, repeated = ResidualSums.zeros((3, 5)), ResidualSums.zeros((3, 5))
    doubled.update(x, r, torch.full((8,), 2.0))
    repeated.update(torch.cat([x, x]), torch.cat([r, r]), torch.ones(16))
    assert torch.allclose(doubled.gram, repeated.gram, rtol=1e-6) and torch.allclose(doubled.cross, repeated.cross)
    assert torch.allclose(doubled.energy, repeated.energy, rtol=1e-6)


def _goal(windows: Sequence[int]) -> Tensor:
    """Goals of some windows, which depend on their numbers only."""
    return torch.stack([torch.randn(8, 32, generator=torch.Generator().manual_seed(number)) for number in windows])


def _collect(
    model: Any, ids: Tensor, batch: int | list[int], numbers: list[int], group: ProcessGroup = SINGLE_PROCESS
) -> SplitSums:
    """Sums of the first block's output projection; the weight of a token is that of its output."""
    blocks = find_blocks(model)
    inputs = capture_block_inputs(model, blocks, ids, batch)
    (site,) = (site for site in blocks[0].sites if site.name == _SITE)
    sizes = [len(hidden) for hidden in inputs.hidden]
    parts = torch.split(_goal(numbers), sizes)

    def missing(number: int, y: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
        assert y.shape == output.shape == parts[number].shape
        return parts[number] - y, 1 / output.square().sum(dim=-1)

    return collect_residuals(blocks[0], inputs, site, missing, device=_CPU, group=group)


@pytest.fixture
def windows() -> Tensor:
    """Token ids of so many windows that two of them are held back."""
    return torch.randint(2, 64, (_WINDOWS, 8), generator=torch.Generator().manual_seed(5))


def _direct(model: Any, windows: Tensor, numbers: list[int]) -> dict[str, Tensor]:
    """Sums from hooks on the whole model."""
    seen: dict[str, Any] = {}
    module = model.model.layers[0]
    handles = [
        module.mlp.down_proj.register_forward_hook(lambda _m, args, out: seen.update(x=args[0], y=out)),
        module.register_forward_hook(lambda _m, _args, out: seen.update(out=out[0] if isinstance(out, tuple) else out)),
    ]
    with torch.no_grad():
        model(input_ids=windows[numbers])
    for handle in handles:
        handle.remove()
    x, r = seen["x"].flatten(0, 1), (_goal(numbers) - seen["y"]).flatten(0, 1)
    return _naive(x, r, 1 / seen["out"].double().square().sum(dim=-1).flatten())


def test_a_block_gives_the_sums_of_the_whole_model(tiny_model: Tiny, windows: Tensor) -> None:
    model = tiny_model("llama")
    sums = _collect(model, windows, 4, list(range(_WINDOWS)))
    held = [HELD_BACK - 1, 2 * HELD_BACK - 1]
    fitted = [number for number in range(_WINDOWS) if number not in held]
    assert (sums.fitted.tokens, sums.held_back.tokens) == (8 * len(fitted), 16)
    _assert_close(sums.fitted, _direct(model, windows, fitted), 1e-5)
    _assert_close(sums.held_back, _direct(model, windows, held), 1e-5)


def test_few_windows_hold_none_back(tiny_model: Tiny, windows: Tensor) -> None:
    sums = _collect(tiny_model("llama"), windows[: HELD_BACK - 1], 3, list(range(HELD_BACK - 1)))
    assert sums.held_back.tokens == 0 and float(sums.held_back.gram.abs().max()) == 0
    assert torch.equal(sums.total.gram, sums.fitted.gram)


def _distance(one: ResidualSums, other: ResidualSums) -> float:
    pairs = zip((*one.tensors(), one.largest), (*other.tensors(), other.largest), strict=True)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def test_batches_and_the_order_of_windows_do_not_matter(tiny_model: Tiny, windows: Tensor) -> None:
    model, numbers = tiny_model("llama"), list(range(_WINDOWS))
    sums = _collect(model, windows, 4, numbers)
    for batch in (1, 7, _WINDOWS):
        other = _collect(model, windows, batch, numbers)
        # Forwards of other batches round otherwise, in float32.
        assert _distance(other.fitted, sums.fitted) < 1e-6 and _distance(other.held_back, sums.held_back) < 1e-6
    flipped = _collect(model, windows.flip(0), 4, numbers[::-1])
    assert flipped.total.tokens == sums.total.tokens and _distance(flipped.total, sums.total) < 1e-6


@pytest.mark.parametrize("batch", [1, 4, _WINDOWS])
def test_no_more_windows_are_summed_up_than_the_inputs_need(
    tiny_model: Tiny, windows: Tensor, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two tokens for each of 44 inputs are 11 windows of 8, whose eighth is held back."""
    monkeypatch.setattr(residual_statistics, "LEAST_TOKENS", 8)
    monkeypatch.setattr(residual_statistics, "TOKENS_PER_INPUT", 2)
    model = tiny_model("llama")
    sums = _collect(model, windows, batch, list(range(_WINDOWS)))
    assert (sums.fitted.tokens, sums.held_back.tokens) == (80, 8)
    _assert_close(sums.total, _direct(model, windows, list(range(11))), 1e-5)
    monkeypatch.setattr(residual_statistics, "LEAST_TOKENS", 8 * 13 - 1)
    assert _collect(model, windows, batch, list(range(_WINDOWS))).total.tokens == 8 * 13


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_hold_back_the_windows_of_one_process(tiny_model: Tiny, windows: Tensor, size: int) -> None:
    alone = _collect(tiny_model("llama"), windows, 1, list(range(_WINDOWS)))
    models = [tiny_model("llama") for _ in range(size)]

    def work(group: ProcessGroup) -> SplitSums:
        numbers = list(range(_WINDOWS))[group.rank :: size]
        return _collect(models[group.rank], group.shard(windows), 1, numbers, group)

    for sums in run_in_threads(size, work):
        for part, expected in ((sums.fitted, alone.fitted), (sums.held_back, alone.held_back)):
            assert part.tokens == expected.tokens
            assert _distance(part, expected) < 1e-13
            assert torch.equal(part.largest, expected.largest)


@pytest.mark.parametrize("batch", [2, 3])
def test_outputs_of_layers_are_recorded_and_no_hook_stays(tiny_model: Tiny, windows: Tensor, batch: int) -> None:
    model = tiny_model("llama")
    blocks = find_blocks(model)
    inputs = capture_block_inputs(model, blocks, windows[:3], batch)
    sites = [site for site in blocks[0].sites if site.name.endswith(("o_proj", "down_proj"))]
    recorded = advance_recording(blocks[0], inputs, sites, _CPU)
    seen: dict[str, Tensor] = {}
    handles = [
        site.module.register_forward_hook(lambda _m, _a, out, name=site.name: seen.__setitem__(name, out))
        for site in sites
    ]
    with torch.no_grad():
        hidden = model(input_ids=windows[:3], output_hidden_states=True).hidden_states[1]
    for handle in handles:
        handle.remove()
    assert recorded.keys() == seen.keys()
    for name, expected in seen.items():
        assert [len(part) for part in recorded[name]] == [len(part) for part in inputs.hidden]
        torch.testing.assert_close(torch.cat(recorded[name]), expected)
    torch.testing.assert_close(torch.cat(inputs.hidden), hidden)

    def fail(_batch: int, _y: Tensor, _output: Tensor) -> tuple[Tensor, Tensor]:
        raise RuntimeError("stop")

    failing: Missing = fail
    with pytest.raises(RuntimeError, match="stop"):
        collect_residuals(blocks[0], inputs, sites[0], failing, device=_CPU)
    assert not any(site.module._forward_hooks for site in sites)
