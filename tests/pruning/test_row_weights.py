"""Weights of output channels: against exact Jacobians, and what a walk makes of them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import alps
from alps.calibration.block_capture import capture_block_inputs
from alps.calibration.block_inputs import BlockInputs
from alps.calibration.moe_statistics import LayerInput
from alps.core.distributed import ProcessGroup
from alps.core.errors import ConfigError
from alps.core.phase_timer import PhaseTimer
from alps.core.statistics import InputSums
from alps.models.blocks import find_blocks
from alps.pruning.layer_solver import LayerSolver
from alps.pruning.row_weights import ROW_WEIGHT_TOKENS, _slopes, _windows, compute_row_weights
from alps.solvers.patterns import Unstructured, parse_pattern
from helpers.decoders import DENSE, MOE, decoder
from helpers.runs import make_context, make_recipe

_CPU = torch.device("cpu")


def _inputs(model: nn.Module, ids: Tensor) -> BlockInputs:
    return capture_block_inputs(model, find_blocks(model), ids, 4)


def _exact(model: nn.Module, inputs: BlockInputs) -> dict[str, Tensor]:
    """Mean over r of the squared slopes, by a backward pass for every entry of the output, for the first window."""
    block, sums = find_blocks(model)[0], dict[str, Tensor]()
    outputs: dict[str, Tensor] = {}
    for site in block.sites:
        site.module.register_forward_hook(lambda _m, _a, z, name=site.name: outputs.update({name: z}))
    with torch.enable_grad():
        states = inputs.run(0, block.module, 0, _CPU, window=0)
        relative = states / states.detach().norm(dim=-1, keepdim=True)
        for one in relative.flatten():
            slopes = torch.autograd.grad(one, list(outputs.values()), retain_graph=True, allow_unused=True)
            for name, slope in zip(outputs, slopes, strict=True):
                assert slope is not None
                sums[name] = sums.get(name, torch.zeros(())) + slope.flatten(0, -2).square().sum(dim=0)
    return {name: total / total.mean() for name, total in sums.items()}


def test_weights_are_those_of_the_exact_jacobian(ids: Tensor) -> None:
    windows = ids[:1].expand(ROW_WEIGHT_TOKENS // ids.shape[1], -1)
    found = compute_row_weights(
        find_blocks(model := decoder("llama"))[0], _inputs(model, windows), _CPU, ProcessGroup()
    )
    wanted = _exact(model, _inputs(model, ids[:1]))
    assert found.keys() == wanted.keys() and len(found) == 7
    for name, weights in found.items():
        # 256 directions for one window: a square's relative error is sqrt(2 / 256) or less, and four of them are rare.
        torch.testing.assert_close(weights, wanted[name], rtol=0.35, atol=0.02)
        assert weights.dtype == torch.float32 and abs(float(weights.mean()) - 1) < 1e-3
        assert float((weights - wanted[name]).mean().abs()) < 1e-3
    # Queries and keys count very differently, which equal weights would not show.
    assert float(wanted["model.layers.0.self_attn.q_proj"].max()) > 3


@pytest.mark.parametrize("kind", [*DENSE, *MOE])
def test_every_architecture_is_left_as_it_was(kind: str, ids: Tensor) -> None:
    model = decoder(kind)
    blocks, inputs = find_blocks(model), _inputs(model, ids)
    with torch.no_grad():
        before = inputs.run(0, blocks[0].module, 0, _CPU)
        found = compute_row_weights(blocks[0], inputs, _CPU, ProcessGroup())
        assert torch.equal(before, inputs.run(0, blocks[0].module, 0, _CPU))
    assert all(parameter.grad is None for parameter in model.parameters())
    alone = [site for site in blocks[0].sites if site.expert is None]
    for site in alone:
        if kind in DENSE:
            assert found[site.name].shape == (site.shape[0],) and float(found[site.name].min()) >= 1e-4
    assert set(found) <= {site.name for site in alone}


def test_a_site_that_is_not_called_once_is_left_out(ids: Tensor) -> None:
    model = decoder("llama")
    mlp = model.model.layers[0].mlp
    mlp.forward = lambda x: mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * (mlp.up_proj(x) + mlp.up_proj(2 * x)))
    found = compute_row_weights(find_blocks(model)[0], _inputs(model, ids), _CPU, ProcessGroup())
    kinds = {name.rpartition(".")[2] for name in found}
    assert kinds == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj"}


def test_a_block_may_write_into_what_a_site_gave(ids: Tensor) -> None:
    found, gains = list[dict[str, Tensor]](), torch.linspace(1, 3, 48)
    for changed in (lambda z: z.mul_(gains), lambda z: z * gains):
        model = decoder("llama")
        mlp = model.model.layers[0].mlp
        mlp.forward = lambda x, m=mlp, c=changed: m.down_proj(m.act_fn(c(m.gate_proj(x))) * m.up_proj(x))
        found.append(compute_row_weights(find_blocks(model)[0], _inputs(model, ids), _CPU, ProcessGroup()))
    assert found[0].keys() == found[1].keys() and len(found[0]) == 7
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_a_channel_that_nothing_reads_counts_a_little(ids: Tensor) -> None:
    model = decoder("llama")
    block = find_blocks(model)[0]
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[:, 3] = 0
    weights = compute_row_weights(block, _inputs(model, ids), _CPU, ProcessGroup())["model.layers.0.mlp.up_proj"]
    assert float(weights[3]) == float(torch.tensor(1e-4)) and int((weights > 1e-4).sum()) == len(weights) - 1


@pytest.mark.parametrize("size", [1, 2, 3])
def test_processes_share_the_same_windows_out(size: int) -> None:
    windows = torch.zeros(20, 512, 4)
    found = []
    for rank in range(size):
        group = ProcessGroup(rank, size) if size > 1 else ProcessGroup()
        mine = windows[rank::size]
        inputs = BlockInputs(list(torch.split(mine, 3)), window_tokens=mine.shape[1])
        for batch, window, number in _windows(inputs, group):
            assert 3 * batch + window == number // size and number % size == rank
            found.append(number)
    assert sorted(found) == list(range(8))


def test_directions_belong_to_the_window(ids: Tensor) -> None:
    model = decoder("llama")
    block, inputs = find_blocks(model)[0], _inputs(model, ids)

    def slopes(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        found = _slopes(block.sites, lambda: inputs.run(0, block.module, 0, _CPU, window=0), generator)[0]
        assert found is not None
        return found

    assert torch.equal(slopes(1), slopes(1)) and not torch.equal(slopes(1), slopes(2))


def test_magnitude_keeps_the_best_support_of_the_weighed_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    """On white inputs the weighed error is the sum of d_j W_ij^2: the best of all supports keeps its largest."""
    weights = torch.tensor([9.0, 0.5, 0.25])
    model = decoder("llama")
    block = find_blocks(model)[0]
    site = block.sites[0]
    with torch.no_grad():
        dense = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
        site.module.weight = nn.Parameter(dense.clone())
    source = LayerInput(InputSums.of(torch.eye(4)), [site])
    solver = LayerSolver(
        recipe=make_recipe("magnitude", Unstructured(0.5), row_weights="block-output"),
        context=make_context(),
        patterns={},
        traced=False,
        timer=PhaseTimer(_CPU),
    )
    solver.solve_input(block, source, {site.name: weights})
    found = site.read().clone()
    cost = (weights[:, None] * dense.square()).flatten()
    best = min(float(cost.sum() - cost[list(kept)].sum()) for kept in combinations(range(12), 6))
    lost = float((weights[:, None] * (found - dense).square()).sum())
    assert lost == pytest.approx(best, rel=1e-5) and int((found == 0).sum()) == 6
    assert torch.allclose(found[found != 0], dense[found != 0])
    by_size = solver.recipe.method.solve(dense, None, Unstructured(0.5)).weight
    assert float((weights[:, None] * (by_size - dense).square()).sum()) > best * 1.1


@pytest.mark.parametrize("method", ["alps", "sparsegpt", "magnitude"])
def test_a_walk_loses_less_where_it_counts(method: str, tiny_model: Callable[..., Any]) -> None:
    ids = torch.randint(2, 64, (24, 16), generator=torch.Generator().manual_seed(5))
    dense = tiny_model("llama")
    block = find_blocks(dense)[0]
    inputs = _inputs(dense, ids)
    weights = compute_row_weights(block, inputs, _CPU, ProcessGroup())
    received: dict[str, Tensor] = {}
    for site in block.sites:
        site.module.register_forward_pre_hook(lambda _m, a, n=site.name: received.update({n: a[0].flatten(0, -2)}))
    inputs.run(0, block.module, 0, _CPU)
    lost = []
    for channels in ("equal", "block-output"):
        model = tiny_model("llama")
        report = alps.prune(model, sparsity=0.6, method=method, calibration=ids, row_weights=channels)
        assert all(site.zeros == round(0.6 * site.entries) for site in report.layers)
        assert ("row_weights" in report.seconds) == (channels == "block-output")
        sites = zip(find_blocks(model)[0].sites, block.sites, strict=True)
        # The first input of the block is the same in both models.
        with torch.no_grad():
            shares = [
                (weights[old.name] * (received[old.name] @ (new.read() - old.read()).T).square()).sum()
                / (weights[old.name] * (received[old.name] @ old.read().T).square()).sum()
                for new, old in list(sites)[:2]
            ]
        lost.append(float(sum(shares)))
    assert lost[1] < 0.97 * lost[0]


@pytest.mark.parametrize(
    ("pattern", "method", "words"),
    [
        ("2:4", "alps", "2:4 does not allow"),
        (0.6, "wanda", "wanda prunes every row to the same"),
        (0.6, "dsnot", "dsnot prunes"),
    ],
)
def test_what_moves_no_zero_is_refused(
    pattern: str | float, method: str, words: str, tiny_model: Callable[..., Any], ids: Tensor
) -> None:
    with pytest.raises(ConfigError, match=words):
        alps.prune(
            tiny_model("llama"),
            pattern=parse_pattern(str(pattern)),
            method=method,
            calibration=ids,
            row_weights="block-output",
        )


def test_magnitude_reads_calibration_windows_then(tiny_model: Callable[..., Any], ids: Tensor) -> None:
    options: dict[str, Any] = {"sparsity": 0.6, "method": "magnitude", "measure_error": False, "calibration": ids}
    alps.prune(plain := tiny_model("llama"), **options)
    alps.prune(weighted := tiny_model("llama"), row_weights="block-output", **options)
    pairs = zip(plain.parameters(), weighted.parameters(), strict=True)
    assert not all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        (
            {"row_weights": "blok-output"},
            "Setting 'row_weights' in the arguments is wrong: 'blok-output' is unknown.* Did you mean 'block-output'",
        ),
        (
            {"true_sequential": "yes"},
            "Setting 'true_sequential' in the arguments is wrong: input should be a valid boolean",
        ),
    ],
)
def test_python_refuses_what_is_no_choice(
    setting: dict[str, Any], words: str, tiny_model: Callable[..., Any], ids: Tensor
) -> None:
    with pytest.raises(ConfigError, match=words):
        alps.prune(tiny_model("llama"), sparsity=0.6, calibration=ids, **setting)


def test_a_report_says_which_channels_count_alike(tiny_model: Callable[..., Any], ids: Tensor) -> None:
    model = tiny_model("llama")
    mlp = model.model.layers[0].mlp
    mlp.forward = lambda x: mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * (mlp.up_proj(x) + mlp.up_proj(2 * x)))
    report = alps.prune(model, sparsity=0.6, method="sparsegpt", calibration=ids, row_weights="block-output")
    alike = [site.name for site in report.layers if "its rows weigh the same" in str(site.solve.get("notes"))]
    assert alike == ["model.layers.0.mlp.up_proj"]


def test_states_whose_norm_float16_cannot_hold_still_tell(tiny_model: Callable[..., Any], ids: Tensor) -> None:
    model = tiny_model("llama").half()
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(2e4 * model.get_input_embeddings().weight.sign())
    found = compute_row_weights(find_blocks(model)[0], _inputs(model, ids), _CPU, ProcessGroup())
    assert {"model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj"} <= set(found)
