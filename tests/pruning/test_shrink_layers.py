"""Cuts of one block: refits against least squares on explicit tokens, heads against enumeration, exact slices."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from alps.calibration.residual_statistics import HELD_BACK, ResidualSums
from alps.core.distributed import SINGLE_PROCESS, ProcessGroup
from alps.models.blocks import Block, find_blocks
from alps.models.shrink_families import family_of
from alps.models.shrink_slices import slice_block
from alps.models.shrunk_model import empty_shrunk_model
from alps.models.shrunk_weights import fill_module
from alps.models.sites import Site
from alps.models.structure import Target
from alps.pruning.shrink_layers import MASSIVE, massive_channels, whole_groups
from alps.reporting.shrink_report import CutRecord
from alps.solvers.dense_residual import DAMPING, choose_correction, corrected_weight
from alps.solvers.group_problem import GroupProblem, refit
from helpers.shrink_runs import CPU, BlockCase, block_case, layer_inputs, make_cutter
from helpers.shrinking import distance
from helpers.thread_group import run_in_threads

Tiny = Callable[..., Any]
_OUTER = {"llama": "mlp.down_proj", "opt": "fc2", "opt-postnorm": "fc2", "gpt2": "mlp.c_proj"}
_MANY = 2 * HELD_BACK + 1


@pytest.fixture
def many() -> Tensor:
    """Token ids of so many windows that two are held back."""
    return torch.randint(2, 64, (_MANY, 16), generator=torch.Generator().manual_seed(6))


def _site(block: Block, name: str) -> Site:
    (site,) = (site for site in block.sites if site.name == f"{block.name}.{name}")
    return site


def _held(tokens: int) -> Tensor:
    """True for tokens of held-back windows, of 16 tokens each."""
    window = torch.arange(tokens) // 16
    return window % HELD_BACK == HELD_BACK - 1


def _target(case: BlockCase, name: str, x: Tensor, missing: Tensor, dense: Tensor) -> tuple[Tensor, float]:
    """Target of a layer, from explicit tokens in float64, and the share of the dense hidden states in it."""
    held = _held(len(x))
    sums = []
    for part in (~held, held, torch.ones_like(held)):
        weighted = x[part] * case.weights[part][:, None]
        sums.append((weighted.T @ x[part], missing[part].T @ weighted))
    correction = choose_correction(*sums[0], *sums[1])
    return corrected_weight(dense, *sums[2], correction), correction.share


def _least_squares(case: BlockCase, x: Tensor, target: Tensor, columns: Tensor) -> Tensor:
    """Weight on some columns that fits the outputs of a target, damped towards it; zero elsewhere."""
    root = case.weights.sqrt()[:, None]
    damping = (DAMPING * float((root * x).square().sum(dim=0).mean())) ** 0.5 * torch.eye(x.shape[1]).double()
    rows = torch.cat([root * x, damping])
    weight = torch.zeros_like(target)
    weight[:, columns] = torch.linalg.lstsq(rows[:, columns], rows @ target.T, driver="gelsd").solution.T
    return weight


def _error(case: BlockCase, x: Tensor, target: Tensor, weight: Tensor) -> float:
    """||V - W*||_H^2 / ||W*||_H^2, over tokens and damping rows; the removal of dead columns costs nothing."""
    root = case.weights.sqrt()[:, None]
    damping = DAMPING * float((root * x).square().sum(dim=0).mean())

    def norm(matrix: Tensor) -> float:
        return float((root * (x @ matrix.T)).square().sum() + damping * matrix.square().sum())

    return norm((weight - target) * (x != 0).any(dim=0)) / norm(target)


def test_without_a_removal_and_without_a_share_the_weights_stay_to_the_bit(
    tiny_model: Tiny, kind: str, ids: Tensor
) -> None:
    """Seven windows hold none back, so that nothing is corrected."""
    case = block_case(tiny_model(kind), Target(), ids)
    kept, cuts = case.cutter.cut(case.block, case.states)
    assert kept.channels is kept.heads is kept.kv_heads is None
    assert [cut.share for cut in cuts] == [0.0] * len(cuts) and all(cut.error < 1e-20 for cut in cuts)
    assert [cut.unit for cut in cuts] == (["head", "channel"] if kind == "llama" else ["channel"])
    before = case.original.module.state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in case.block.module.state_dict().items())


@pytest.mark.parametrize("windows", [7, _MANY])
def test_the_mlp_refit_is_least_squares_on_explicit_tokens(
    tiny_model: Tiny, kind: str, many: Tensor, windows: int
) -> None:
    case = block_case(tiny_model(kind), Target(mlp_width=32), many[:windows])
    name = f"{case.block.name}.{_OUTER[kind]}"
    dense = _site(case.original, _OUTER[kind]).read().double()
    kept, (*_, cut) = case.cutter.cut(case.block, case.states)
    assert kept.channels is not None and kept.channels.tolist() == cut.kept == sorted(set(cut.kept))
    assert (len(cut.kept), cut.total, cut.tokens) == (32, dense.shape[1], 16 * windows)
    # The attention of the block is refitted before, so that the inputs are those of the block with it.
    probe = case.block.clone()
    _site(probe, _OUTER[kind]).write(dense.float())
    x, y, output = layer_inputs(case, probe, name)
    goal = torch.cat([t.reshape(-1, t.shape[-1]) for t in case.states.dense_outputs]).double()
    recorded = torch.cat([t.reshape(-1, t.shape[-1]) for t in case.states.dense_sites[name]]).double()
    missing = recorded - y if kind == "opt-postnorm" else goal - output
    if windows < HELD_BACK:
        target, share = dense, 0.0
    else:
        target, share = _target(case, name, x, missing, dense)
        assert share > 0
    assert cut.share == pytest.approx(share, rel=1e-3)
    written = _site(case.block, _OUTER[kind]).read().double()
    assert distance(written, _least_squares(case, x, target, kept.channels)) < 1e-4
    removed = [channel for channel in range(cut.total) if channel not in cut.kept]
    assert not bool(written[:, removed].any())
    assert cut.error == pytest.approx(_error(case, x, target, written), rel=1e-3)


def test_the_attention_makes_up_for_what_is_missing_before_the_block(tiny_model: Tiny, many: Tensor) -> None:
    """Its target is the dense hidden state behind it: dense input plus dense attention."""
    case = block_case(tiny_model("llama"), Target(mlp_width=32), many)
    name = f"{case.block.name}.self_attn.o_proj"
    _, (cut, _) = case.cutter.cut(case.block, case.states)
    dense = _site(case.original, "self_attn.o_proj").read().double()
    x, y, _ = layer_inputs(case, case.original, name)
    parts = (list(case.states.dense_inputs), case.states.inputs.hidden)
    before, hidden = (torch.cat(part).flatten(0, 1).double() for part in parts)
    recorded = torch.cat(case.states.dense_sites[name]).flatten(0, 1).double()
    target, share = _target(case, name, x, recorded + before - y - hidden, dense)
    assert cut.share == pytest.approx(share, rel=1e-3) and share > 0
    assert distance(_site(case.block, "self_attn.o_proj").read().double(), target) < 1e-4
    assert (cut.unit, cut.kept, cut.total) == ("head", [0, 1, 2, 3], 4) and cut.error < 1e-20


def test_the_refit_is_stationary(tiny_model: Tiny, many: Tensor) -> None:
    case = block_case(tiny_model("llama"), Target(mlp_width=32), many)
    site = _site(case.block, "mlp.down_proj")
    problem, _ = case.cutter.build_problem(site, case.cutter.collect(case.block, site, case.states), 1)
    for seed in range(3):
        kept = torch.randperm(44, generator=torch.Generator().manual_seed(seed))[:32].sort().values
        change = -problem.target.clone()
        change[:, kept] += refit(problem, kept)
        gradient = (change @ problem.hessian)[:, kept]
        assert float(gradient.norm() / (problem.target @ problem.hessian).norm()) < 1e-9


_HEADS = {
    "one query head of each KV group": (Target(heads=2), 2),
    "one KV group": (Target(kv_heads=1), 1),
    "one query head of one KV group": (Target(heads=1, kv_heads=1), 1),
}


@pytest.mark.parametrize("case_name", _HEADS)
def test_heads_are_those_of_an_enumeration_by_least_squares(tiny_model: Tiny, ids: Tensor, case_name: str) -> None:
    """Four query heads of 8 inputs each, two on every KV head."""
    target, kv_heads = _HEADS[case_name]
    case = block_case(tiny_model("llama"), target, ids)
    x, _, _ = layer_inputs(case, case.original, f"{case.original.name}.self_attn.o_proj")
    dense = _site(case.original, "self_attn.o_proj").read().double()

    def fit(heads: tuple[int, ...]) -> Tensor:
        columns = torch.cat([torch.arange(8 * head, 8 * head + 8) for head in heads])
        return _least_squares(case, x, dense, columns)

    def best(sets: list[tuple[int, ...]]) -> tuple[int, ...]:
        return min(sets, key=lambda heads: _error(case, x, dense, fit(heads)))

    group = best([(0, 1), (2, 3)])
    sets: dict[str, list[tuple[int, ...]]] = {
        "one query head of each KV group": list(itertools.product((0, 1), (2, 3))),
        "one KV group": [group],
        # KV groups go first, whole; then query heads inside those that stay.
        "one query head of one KV group": [(head,) for head in group],
    }
    expected = best(sets[case_name])
    kept, (cut, _) = case.cutter.cut(case.block, case.states)
    assert kept.heads is not None and tuple(kept.heads.tolist()) == expected
    assert (kept.kv_heads is None) == (kv_heads == 2)
    if kept.kv_heads is not None:
        assert kept.kv_heads.tolist() == [group[0] // 2]
    if case_name == "one KV group":
        assert cut.kept == [group[0] // 2] and (cut.unit, cut.total) == ("kv_head", 2)
    else:
        assert cut.kept == list(expected) and (cut.unit, cut.total) == ("head", 4)
    assert distance(_site(case.block, "self_attn.o_proj").read().double(), fit(expected)) < 1e-4
    assert cut.error == pytest.approx(_error(case, x, dense, fit(expected)), rel=1e-3)


@pytest.mark.parametrize(
    ("kind", "target"),
    [
        ("llama", Target(mlp_width=30)),
        ("llama", Target(mlp_width=30, heads=2)),
        ("llama", Target(kv_heads=1)),
        ("opt-postnorm", Target(mlp_width=30)),
        ("gpt2", Target(mlp_width=30)),
    ],
)
def test_the_slice_computes_what_the_masked_block_computes(
    tiny_model: Tiny, kind: str, ids: Tensor, target: Target
) -> None:
    model = tiny_model(kind)
    case = block_case(model, target, ids)
    kept, _ = case.cutter.cut(case.block, case.states)
    tensors = slice_block(case.block.module.state_dict(), family_of(model), case.cutter.structure, kept)
    small = find_blocks(empty_shrunk_model(model, find_blocks(model), target))[1]
    fill_module(small.module, tensors)
    with torch.no_grad():
        for batch in range(len(case.states.inputs.hidden)):
            masked, sliced, dense = (
                case.states.inputs.run(1, block.module, batch, CPU) for block in (case.block, small, case.original)
            )
            assert distance(sliced, masked) < 1e-6 < 1e-3 < distance(dense, masked)


def _sums(largest: list[float]) -> ResidualSums:
    sums = ResidualSums.zeros((2, len(largest)))
    return ResidualSums(4, sums.gram, sums.cross, sums.energy, torch.tensor(largest).double())


def test_massive_channels_stand_out_from_the_median_of_the_active_ones() -> None:
    weight = torch.ones(2, 6)
    assert massive_channels(_sums([1, 2, 1, 1, 1, 1]), weight, 3) == []
    assert massive_channels(_sums([1, 1, 1, 1, 1, MASSIVE - 1]), weight, 3) == []
    assert massive_channels(_sums([1, 1, MASSIVE + 1, 1, 1, 500]), weight, 3) == [2, 5]
    assert massive_channels(_sums([1, 1, MASSIVE + 1, 1, 1, 500]), weight, 1) == [5]
    # What a channel contributes depends on its weight, too.
    weight[:, 5] = 1e-4
    assert massive_channels(_sums([1, 1, 1, 1, 1, 500]), weight, 3) == []
    # Most channels are dead; that makes none of the others massive.
    assert massive_channels(_sums([0, 0, 0, 0, 1, 2]), torch.ones(2, 6), 3) == []
    assert massive_channels(_sums([0.0] * 6), torch.ones(2, 6), 3) == []


def test_a_massive_channel_is_kept_though_it_is_cheap_and_counted(tiny_model: Tiny) -> None:
    model = tiny_model("llama")
    cutter, site = make_cutter(model, Target(mlp_width=32)), _site(find_blocks(model)[1], "mlp.down_proj")
    draw = torch.randn(200, 44, generator=torch.Generator().manual_seed(0)).double()
    # Channel 7 is as good as silent in the weighted Gram; its one large activation has next to no weight.
    draw[:, 7] *= 1e-3
    problem = GroupProblem(draw.T @ draw + 0.01 * torch.eye(44).double(), site.read().double())
    sums = ResidualSums.zeros((32, 44))
    sums.largest += 1
    assert 7 not in cutter.choose_channels(problem, sums, site, 32).kept.tolist()
    sums.largest[7] = 1e4
    choice = cutter.choose_channels(problem, sums, site, 32)
    assert 7 in choice.kept.tolist() and choice.protected == 1 and len(choice.kept) == 32


def test_ranks_cut_alike_and_as_one_process(tiny_model: Tiny, many: Tensor) -> None:
    target = Target(mlp_width=32, heads=2)

    def cut(model: Any, group: ProcessGroup) -> tuple[list[CutRecord], dict[str, Tensor]]:
        case = block_case(model, target, many, batch=1, group=group)
        return case.cutter.cut(case.block, case.states)[1], case.block.module.state_dict()

    cuts, alone = cut(tiny_model("llama"), SINGLE_PROCESS)
    models = [tiny_model("llama") for _ in range(2)]
    for records, state in run_in_threads(2, lambda group: cut(models[group.rank], group)):
        for record, expected in zip(records, cuts, strict=True):
            assert (record.kept, record.tokens) == (expected.kept, expected.tokens)
            assert record.share == pytest.approx(expected.share) and record.error == pytest.approx(expected.error)
        assert all(distance(state[name], tensor) < 1e-5 for name, tensor in alone.items())


def test_members_of_groups_are_in_order() -> None:
    assert whole_groups(torch.tensor([0, 3]), 2).tolist() == [0, 1, 6, 7]
