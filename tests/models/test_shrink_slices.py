"""Tests of slices and masks of single blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from alps.models.blocks import find_blocks
from alps.models.shrink_families import FAMILIES, family_of
from alps.models.shrink_slices import Kept, mask_block, sites_of, slice_block
from alps.models.structure import Structure, read_structure
from helpers.decoders import decoder


def test_slices_have_the_rows_and_columns_of_kept_units() -> None:
    model = decoder("qwen2")
    blocks = find_blocks(model)
    state = blocks[1].module.state_dict()
    kept = Kept(torch.tensor([0, 5, 47]), torch.tensor([1, 3]), torch.tensor([0, 1]))
    sliced = slice_block(state, family_of(model), read_structure(model, blocks), kept)
    rows = torch.tensor([*range(8, 16), *range(24, 32)])
    assert torch.equal(sliced["self_attn.q_proj.weight"], state["self_attn.q_proj.weight"][rows])
    assert torch.equal(sliced["self_attn.q_proj.bias"], state["self_attn.q_proj.bias"][rows])
    assert torch.equal(sliced["self_attn.o_proj.weight"], state["self_attn.o_proj.weight"][:, rows])
    assert torch.equal(sliced["self_attn.k_proj.weight"], state["self_attn.k_proj.weight"])
    assert torch.equal(sliced["mlp.up_proj.weight"], state["mlp.up_proj.weight"][[0, 5, 47]])
    assert torch.equal(sliced["mlp.down_proj.weight"], state["mlp.down_proj.weight"][:, [0, 5, 47]])
    assert sliced["input_layernorm.weight"] is state["input_layernorm.weight"]
    assert sliced.keys() == state.keys()


def test_fused_maps_are_sliced_in_each_of_their_runs() -> None:
    model = decoder("phi3")
    blocks = find_blocks(model)
    state = blocks[0].module.state_dict()
    kept = Kept(torch.tensor([2, 3]), torch.tensor([3]), torch.tensor([1]))
    sliced = slice_block(state, family_of(model), read_structure(model, blocks), kept)
    assert torch.equal(sliced["mlp.gate_up_proj.weight"], state["mlp.gate_up_proj.weight"][[2, 3, 50, 51]])
    qkv = state["self_attn.qkv_proj.weight"]
    assert torch.equal(sliced["self_attn.qkv_proj.weight"], torch.cat([qkv[24:32], qkv[40:48], qkv[56:64]]))


def test_experts_are_sliced_with_channels_of_their_own() -> None:
    model = decoder("gpt_oss")
    blocks = find_blocks(model)
    state = blocks[0].module.state_dict()
    channels = torch.tensor([[0, 2], [5, 47]])
    kept = Kept(experts=torch.tensor([1, 3]), expert_channels=channels)
    sliced = slice_block(state, family_of(model), read_structure(model, blocks), kept)
    for new, (expert, (first, second)) in enumerate(zip((1, 3), channels.tolist(), strict=True)):
        rows = [2 * first, 2 * first + 1, 2 * second, 2 * second + 1]
        gates, down = state["mlp.experts.gate_up_proj"][expert], state["mlp.experts.down_proj"][expert]
        assert torch.equal(sliced["mlp.experts.gate_up_proj"][new], gates[:, rows])
        assert torch.equal(
            sliced["mlp.experts.gate_up_proj_bias"][new], state["mlp.experts.gate_up_proj_bias"][expert, rows]
        )
        assert torch.equal(sliced["mlp.experts.down_proj"][new], down[[first, second]])
        assert torch.equal(sliced["mlp.experts.down_proj_bias"][new], state["mlp.experts.down_proj_bias"][expert])
        assert torch.equal(sliced["mlp.router.weight"][new], state["mlp.router.weight"][expert])
        assert torch.equal(sliced["mlp.router.bias"][new], state["mlp.router.bias"][expert])


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        (Kept(channels=torch.tensor([3, 2])), "'channel' are not ascending numbers below 48"),
        (Kept(channels=torch.tensor([1, 48])), "'channel' are not ascending"),
        (Kept(channels=torch.tensor([], dtype=torch.long)), "'channel' are not ascending"),
        (Kept(heads=torch.tensor([0, 1])), r"query heads on KV heads are not equally many on each: \[0, 1\]"),
        (Kept(heads=torch.tensor([0, 1, 2])), "query heads on KV heads are not equally many"),
        (Kept(heads=torch.tensor([0, 2]), kv_heads=torch.tensor([1])), "query heads on KV heads"),
        (Kept(kv_heads=torch.tensor([1])), "KV heads leave with their query heads"),
        (Kept(expert_channels=torch.tensor([[0, 1]])), "not 4 rows of ascending numbers below 24"),
        (Kept(experts=torch.tensor([2]), expert_channels=torch.tensor([[1, 1]])), "not 1 rows of ascending numbers"),
    ],
)
def test_units_that_no_plain_checkpoint_could_keep_are_refused(kept: Kept, message: str) -> None:
    model = decoder("qwen3_moe" if kept.expert_channels is not None else "llama")
    blocks = find_blocks(model)
    structure = read_structure(model, blocks)
    for function in (slice_block, mask_block):
        argument: Any = blocks[0].module if function is mask_block else blocks[0].module.state_dict()
        with pytest.raises(ValueError, match=message):
            function(argument, family_of(model), structure, kept)


def test_experts_of_groups_leave_equally() -> None:
    structure = Structure(1, 32, experts=8, expert_width=8, expert_groups=2)
    with pytest.raises(ValueError, match="experts in groups are not equally many"):
        slice_block({}, FAMILIES["deepseek_v3"], structure, Kept(experts=torch.tensor([0, 1, 2, 4])))
    assert slice_block({}, FAMILIES["deepseek_v3"], structure, Kept(experts=torch.tensor([0, 1, 5, 7]))) == {}


def test_sites_of_mixtures_are_their_second_projections() -> None:
    model = decoder("deepseek_v3")
    blocks = find_blocks(model)
    sites = sites_of(blocks[1], family_of(model))
    assert [site.name for site in sites.experts] == [f"{blocks[1].name}.mlp.experts.down_proj.{n}" for n in range(4)]
    assert sites.shared is not None and sites.shared.name == f"{blocks[1].name}.mlp.shared_experts.down_proj"
    assert sites.mlp is None and sites.attention is not None
    assert sites_of(blocks[0], family_of(model)).mlp is not None and not sites_of(blocks[0], family_of(model)).experts


def test_masks_are_zeros_in_the_output_projections_alone() -> None:
    for kind in ("llama", "gpt2"):
        model = decoder(kind)
        blocks, family = find_blocks(model), family_of(model)
        structure = read_structure(model, blocks)
        heads = None if family.attention is None else torch.tensor([0, 3])
        kept = Kept(torch.tensor([1, 7]), heads, None if heads is None else torch.tensor([0, 1]))
        sites = sites_of(blocks[0], family)
        before = {name: tensor.clone() for name, tensor in blocks[0].module.state_dict().items()}
        mask_block(blocks[0].module, family, structure, kept)
        changed = {n for n, tensor in blocks[0].module.state_dict().items() if not torch.equal(tensor, before[n])}
        projections = [site for site in (sites.mlp, sites.attention) if site is not None]
        assert changed == {site.parameter_name.removeprefix(f"{blocks[0].name}.") for site in projections}
        assert sites.mlp is not None and columns(sites.mlp.read()) == [1, 7]
        if sites.attention is not None:
            assert columns(sites.attention.read()) == [*range(8), *range(24, 32)]


def columns(weight: Tensor) -> list[int]:
    """Return the columns of a matrix that are not zero."""
    return [int(column) for column in weight.any(0).nonzero()]
