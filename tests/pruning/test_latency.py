"""Times of generated tokens: turns, medians, the fit, and random models in transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from alps.models.blocks import find_blocks
from alps.models.shrunk_model import empty_shrunk_model
from alps.models.structure import Structure, Target, read_structure
from alps.pruning.latency import fill_randomly, fit_latency, measure_ratios, transformers_runtime
from helpers.fake_runtime import FakeRuntime

_CPU = torch.device("cpu")
_STRUCTURE = Structure(blocks=12, hidden=64, mlp_width=1024, heads=16, kv_heads=16, head_dim=4)


def _probes() -> list[Target]:
    targets = [Target(mlp_width=768), Target(mlp_width=512), Target(heads=8), Target(kept_blocks=tuple(range(9)))]
    return [target.complete(_STRUCTURE) for target in targets]


def _numbers(target: Target) -> tuple[int, int, int]:
    return len(target.kept_blocks or ()), target.mlp_width or 0, target.heads or 0


def test_linear_times_are_fitted_exactly() -> None:
    clock = FakeRuntime(fixed=3.0, per_block=0.2, per_channel=0.001, per_head=0.03)
    dense = clock.seconds(12, 1024, 16)
    fit = fit_latency(_STRUCTURE, _probes(), [clock.seconds(*_numbers(target)) / dense for target in _probes()])
    for removed, width, heads in ((0, 1024, 16), (3, 256, 4), (1, 640, 13)):
        expected = dense / clock.seconds(12 - removed, width, heads)
        assert fit.speedup(removed=removed, mlp_width=width, heads=heads) == pytest.approx(expected, rel=1e-12)


def test_two_widths_share_one_slope_of_least_squares() -> None:
    fit = fit_latency(_STRUCTURE, _probes(), [0.9, 0.7, 1.02, 0.8])
    slope = (256 * 0.1 + 512 * 0.3) / (256**2 + 512**2)
    assert fit.per_channel == pytest.approx(slope / 12, rel=1e-12)
    assert fit.per_head == 0.0, "noise must not make fewer heads slower"
    assert fit.per_block == pytest.approx(0.2 / 3, rel=1e-12)
    assert fit.speedup(removed=12, mlp_width=0, heads=0) > 0


def test_models_take_turns_and_two_are_in_memory_at_a_time(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama")
    blocks = find_blocks(model)
    runtime, done = FakeRuntime(), list[float]()
    targets = [Target(mlp_width=22), Target(heads=2)]

    def smaller() -> Any:
        for target in targets:
            assert len(runtime.running) == 1
            yield empty_shrunk_model(model, blocks, target)

    ratios = measure_ratios(runtime, empty_shrunk_model(model, blocks, Target()), smaller(), done.append)
    dense, first, second = (3, 44, 4), (3, 22, 4), (3, 44, 2)
    expected = [runtime.seconds(*numbers) / runtime.seconds(*dense) for numbers in (first, second)]
    assert ratios == pytest.approx(expected, rel=2e-3) and done == ratios and not runtime.running
    # After one call each to warm up, the one that goes first alternates.
    assert runtime.calls[:6] == [dense, first, first, dense, dense, first]
    assert runtime.calls.count(first) == runtime.calls.count(second) == 6


def test_a_random_model_generates_and_is_gone(tiny_model: Callable[..., Any]) -> None:
    """An end-of-sequence token, and sampling, of the model's own settings have no effect."""
    model = tiny_model("gpt2")
    model.generation_config = GenerationConfig(eos_token_id=list(range(64)), do_sample=True, max_length=3)
    small = empty_shrunk_model(model, find_blocks(model), Target(mlp_width=64))
    calls = list[int]()
    small.register_forward_pre_hook(lambda *_: calls.append(1))
    with transformers_runtime(_CPU)(small) as generate:
        assert 0 < generate(5) < 5
        assert len(calls) == 6, "one forward for the prompt and the first token, one for each other"
        assert not any(parameter.is_meta for parameter in small.parameters())
    assert all(parameter.is_meta for parameter in small.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_weights_keep_dtypes_ties_and_tables(tiny_model: Callable[..., Any], dtype: torch.dtype) -> None:
    model = tiny_model("gpt2", dtype)
    structure = read_structure(model, find_blocks(model))
    small: Any = empty_shrunk_model(model, find_blocks(model), Target(mlp_width=64))
    fill_randomly(small, _CPU)
    assert small.lm_head.weight is small.transformer.wte.weight
    assert {parameter.dtype for parameter in small.parameters()} == {dtype}
    assert small.transformer.h[0].mlp.c_fc.weight.shape == (structure.hidden, 64)
    assert 0.01 < float(small.lm_head.weight.float().std()) < 0.03
    llama: Any = empty_shrunk_model(tiny_model("llama"), find_blocks(tiny_model("llama")), Target(mlp_width=22))
    fill_randomly(llama, _CPU)
    assert torch.equal(llama.model.rotary_emb.inv_freq, tiny_model("llama").model.rotary_emb.inv_freq)
