"""The dense reference: true-sequential order and dense target, compared with forward passes of whole models."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import alps.solvers.dense_target
from alps.calibration.block_capture import capture_block_inputs
from alps.calibration.dense_reference import DenseReference
from alps.calibration.input_statistics import discover, observe
from alps.core.statistics import InputStats, Needs
from alps.models.blocks import find_blocks
from alps.solvers import get_method
from alps.solvers.hessian import absolute_damping
from alps.solvers.patterns import SemiStructured
from helpers import runs

_CPU = torch.device("cpu")
_HALF = SemiStructured(2, 4)
Inputs = Callable[[nn.Module, Tensor], dict[str, Tensor]]


@pytest.fixture
def _trusting(monkeypatch: pytest.MonkeyPatch, ids: Tensor) -> None:
    """Let few tokens move a target as far as many would: the damping is a tenth of the mean diagonal."""
    monkeypatch.setattr(alps.solvers.dense_target, "PRIOR_TOKENS", 0.1 * ids.numel())


def _prune(model: nn.Module, ids: Tensor, method: str = "sparsegpt", **options: Any) -> None:
    runs.prune(model, ids, method, _HALF, **options)


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {site.name: site.read().clone() for block in find_blocks(model) for site in block.sites}


@pytest.mark.usefixtures("_trusting")
@pytest.mark.parametrize("true_sequential", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.6])
def test_every_site_is_solved_on_the_inputs_of_its_order_and_target(
    tiny_model: Callable[..., Any], kind: str, ids: Tensor, site_inputs: Inputs, true_sequential: bool, share: float
) -> None:
    dense, model = tiny_model(kind), tiny_model(kind)
    _prune(model, ids, true_sequential=true_sequential, dense_target=share)
    answers, originals = _weights(model), site_inputs(dense, ids)
    prefix, method = copy.deepcopy(dense), get_method("sparsegpt")
    for block in find_blocks(prefix):
        received = site_inputs(prefix, ids)
        for site in block.sites:
            if true_sequential:
                received = _before(prefix, block.sites, site, answers, ids, site_inputs)
            X, X_d, W = received[site.name].double(), originals[site.name].double(), site.read().double()
            stats = InputStats.of(X)
            H = X.T @ X + absolute_damping(stats, 0.1) * torch.eye(X.shape[1], dtype=torch.float64)
            target = W + share * W @ torch.linalg.solve(H, (X.T @ (X_d - X))).T
            expected = method.solve(target.float(), method.prepare(stats), _HALF).weight
            agree = ((expected != 0) == (answers[site.name] != 0)).float().mean()
            assert agree > 0.98, site.name
            assert float((X @ (expected - answers[site.name]).double().T).norm() / (X @ W.T).norm()) < 0.03, site.name
        for site in block.sites:
            site.write(answers[site.name])


def _before(
    prefix: nn.Module, sites: list[Any], site: Any, answers: dict[str, Tensor], ids: Tensor, site_inputs: Inputs
) -> dict[str, Tensor]:
    """Inputs of all sites when those that precede this site's input are pruned; sites of one input are not."""
    trial = copy.deepcopy(prefix)
    twins = {other.name: other for block in find_blocks(trial) for other in block.sites}
    plain = site_inputs(prefix, ids)
    own = plain[site.name]
    for other in sites:
        if plain[other.name].shape == own.shape and torch.equal(plain[other.name], own):
            break
        twins[other.name].write(answers[other.name])
    return site_inputs(trial, ids)


def test_discovery_finds_the_groups_in_the_order_of_the_forward(tiny_model: Callable[..., Any], ids: Tensor) -> None:
    model = tiny_model("llama")
    blocks = find_blocks(model)
    groups = discover(blocks[0], capture_block_inputs(model, blocks, ids, 3), _CPU)
    assert [[site.kind for site in group] for group in groups] == [
        ["q_proj", "k_proj", "v_proj"],
        ["o_proj"],
        ["gate_proj", "up_proj"],
        ["down_proj"],
    ]


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("batch_size", [2, 7])
def test_the_drift_is_that_of_the_real_inputs(
    tiny_model: Callable[..., Any], kind: str, ids: Tensor, site_inputs: Inputs, grouped: bool, batch_size: int
) -> None:
    dense, model = tiny_model(kind), tiny_model(kind)
    for site in find_blocks(model)[0].sites:
        site.write(site.read() * 0.7)
    real, real_dense = site_inputs(model, ids), site_inputs(dense, ids)
    blocks, dense_blocks = find_blocks(model), find_blocks(dense)
    inputs, dense_inputs = (
        capture_block_inputs(model, blocks, ids, batch_size),
        capture_block_inputs(dense, dense_blocks, ids, batch_size),
    )
    reference = DenseReference(dense_inputs)
    for block, dense_block in zip(blocks, dense_blocks, strict=True):
        groups = discover(block, inputs, _CPU) if grouped else []
        reference.begin_block(dense_block)
        seen = observe(block, inputs, Needs.INPUT_SHIFT, _CPU, groups=groups, reference=reference)
        assert sorted(s.name for shared in seen.shared for s in shared.sites) == sorted(s.name for s in block.sites)
        for shared in seen.shared:
            assert shared.stats.input_shift is not None and shared.stats.tokens == ids.numel()
            X, X_d = (inputs_of[shared.name].double() for inputs_of in (real, real_dense))
            expected = (X_d - X).T @ X
            torch.testing.assert_close(shared.stats.input_shift.double(), expected, rtol=1e-3, atol=1e-3)
        inputs.advance(block.index, block.module, _CPU)
        reference.advance(_CPU)


@pytest.mark.parametrize("grouped", [False, True])
def test_the_drift_of_a_prefix_is_that_of_its_windows(
    tiny_model: Callable[..., Any], ids: Tensor, site_inputs: Inputs, grouped: bool
) -> None:
    dense, model = tiny_model("llama"), tiny_model("llama")
    for site in find_blocks(model)[0].sites:
        site.write(site.read() * 0.7)
    blocks = find_blocks(model)
    inputs, dense_inputs = (capture_block_inputs(one, find_blocks(one), ids, 2) for one in (model, dense))
    reference = DenseReference.start(dense_inputs, needed=True, batches=2)
    real, prefix, dense_prefix = site_inputs(model, ids), site_inputs(model, ids[:4]), site_inputs(dense, ids[:4])
    assert reference.batches == 2 < len(inputs.hidden)
    for block, dense_block in zip(blocks, find_blocks(dense), strict=True):
        reference.begin_block(dense_block)
        groups = discover(block, inputs, _CPU) if grouped else []
        for shared in observe(block, inputs, Needs.INPUT_SHIFT, _CPU, groups=groups, reference=reference).shared:
            X, X_p, X_d = (inputs_of[shared.name].double() for inputs_of in (real, prefix, dense_prefix))
            assert shared.stats.input_shift is not None and shared.stats.tokens == ids.numel()
            torch.testing.assert_close(shared.stats.input_shift.double(), (X_d - X_p).T @ X_p, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(shared.stats.gram().double(), X.T @ X, rtol=1e-3, atol=1e-3)
        inputs.advance(block.index, block.module, _CPU)
        reference.advance(_CPU)
    assert len(reference.outputs) == 2


def test_a_group_is_observed_alone_and_its_batch_ends_there(tiny_model: Callable[..., Any], ids: Tensor) -> None:
    model = tiny_model("llama")
    blocks = find_blocks(model)
    inputs = capture_block_inputs(model, blocks, ids, 2)
    group = discover(blocks[0], inputs, _CPU)[0]
    called: list[str] = []
    hook = model.model.layers[0].mlp.down_proj.register_forward_hook(lambda *_: called.append("down"))
    seen = observe(blocks[0], inputs, Needs.GRAM, _CPU, groups=[group])
    hook.remove()
    assert called == [] and [shared.sites for shared in seen.shared] == [group]
    assert seen.shared[0].stats.tokens == ids.numel() and seen.unused == []


def test_advancing_keeps_the_stream_whole(tiny_model: Callable[..., Any], ids: Tensor) -> None:
    model = tiny_model("opt")
    blocks = find_blocks(model)
    inputs = capture_block_inputs(model, blocks, ids, 2)
    other = inputs.copy()
    before = [hidden.clone() for hidden in other.hidden]
    inputs.advance(0, blocks[0].module, _CPU)
    assert all(torch.equal(a, b) for a, b in zip(before, other.hidden, strict=True))
    assert not torch.equal(inputs.hidden[0], other.hidden[0])


@pytest.mark.usefixtures("_trusting")
def test_the_dense_target_brings_the_outputs_nearer_to_the_dense_models(
    tiny_model: Callable[..., Any], ids: Tensor
) -> None:
    dense = tiny_model("llama")
    with torch.no_grad():
        expected = dense(input_ids=ids).logits
    distances = {}
    for share in (0.0, 1.0):
        model = tiny_model("llama")
        _prune(model, ids, method="alps", dense_target=share)
        with torch.no_grad():
            distances[share] = float((model(input_ids=ids).logits - expected).square().sum())
    assert distances[1.0] < 0.97 * distances[0.0]


def test_a_reference_that_is_not_needed_does_nothing(tiny_model: Callable[..., Any], ids: Tensor) -> None:
    blocks = find_blocks(model := tiny_model("llama"))
    inputs = capture_block_inputs(model, blocks, ids, 3)
    hidden = list(inputs.hidden)
    reference = DenseReference.start(inputs, needed=False)
    reference.begin_block(blocks[0])
    reference.record(blocks[0].sites, _CPU)
    reference.advance(_CPU)
    assert reference.block is None and all(a is b for a, b in zip(hidden, inputs.hidden, strict=True))


def test_a_reference_advances_once_a_block(tiny_model: Callable[..., Any], ids: Tensor) -> None:
    blocks = find_blocks(model := tiny_model("llama"))
    inputs = capture_block_inputs(model, blocks, ids, 3)
    reference = DenseReference.start(inputs, needed=True)
    inputs.advance(0, blocks[0].module, _CPU)
    reference.begin_block(blocks[0])
    for _ in range(2):
        reference.advance(_CPU)
        assert all(torch.equal(a, b) for a, b in zip(inputs.hidden, reference.outputs, strict=True))


def test_a_recorded_block_runs_once_and_its_record_ends_with_it(tiny_model: Callable[..., Any], ids: Tensor) -> None:
    blocks = find_blocks(model := tiny_model("llama"))
    inputs = capture_block_inputs(model, blocks, ids, 3)
    reference = DenseReference.start(inputs, needed=True)
    runs: list[nn.Module] = []
    for count, block in enumerate(blocks, start=1):
        reference.begin_block(block)
        assert reference.block is not None
        reference.block.module.register_forward_pre_hook(lambda module, _: runs.append(module))
        reference.record(block.sites[:1], _CPU)
        for batch, hidden in enumerate(inputs.hidden):
            (x,) = reference.collect_inputs({block.sites[0].name}, batch, _CPU, stop_early=True)[block.sites[0].name]
            assert x.shape == hidden.shape
        reference.advance(_CPU)
        assert len(runs) == count * len(inputs.hidden) == 3 * count
