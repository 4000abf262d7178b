"""Tests of the layout of blocks: every tensor that the table names is in a model of its family."""

from __future__ import annotations

import pytest

from alps.models.blocks import find_blocks
from alps.models.shrink_families import FAMILIES, family_of
from alps.models.shrink_layout import Cut, cuts_of
from helpers.decoders import DENSE, MOE, STRUCTURED, decoder


def test_a_mixture_has_its_axes_in_order() -> None:
    cuts = cuts_of(FAMILIES["gpt_oss"])
    assert cuts.index(Cut("mlp.experts.gate_up_proj", 0, ("expert",))) < cuts.index(
        Cut("mlp.experts.gate_up_proj", 2, ("expert_channel", "expert_channel"), interleaved=True)
    )
    assert Cut("mlp.experts.down_proj", 1, ("expert_channel",)) in cuts
    assert Cut("mlp.router.bias", 0, ("expert",)) in cuts
    assert Cut("self_attn.sinks", 0, ("head",)) in cuts
    assert not [cut for cut in cuts_of(FAMILIES["qwen2_moe"]) if "shared" in cut.tensor]
    shared = [cut for cut in cuts_of(FAMILIES["deepseek_v3"]) if "shared" in cut.tensor]
    assert {cut.runs for cut in shared} == {("shared_channel",)}


@pytest.mark.slow
def test_every_weight_that_the_table_names_exists() -> None:
    """Biases, norms and corrections depend on the configuration; weights do not."""
    names: dict[str, set[str]] = {}
    for kind in (*DENSE, *MOE, *STRUCTURED, "hunyuan_v1_moe"):
        model = decoder(kind)
        names.setdefault(family_of(model).model_type, set()).update(
            name for block in find_blocks(model) for name in block.module.state_dict()
        )
    for model_type, family in FAMILIES.items():
        missing = {cut.tensor for cut in cuts_of(family)} - names[model_type]
        # DeepSeek without a low rank of queries has q_proj in the place of q_a_proj and q_b_proj.
        optional = {"self_attn.q_proj.weight"} if model_type.startswith("deepseek") else set[str]()
        optional |= {"self_attn.q_norm.weight", "self_attn.k_norm.weight"} if model_type == "cohere" else set()
        optional |= (
            {f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")} if model_type == "qwen3_moe" else set()
        )
        assert not {name for name in missing if "bias" not in name} - optional, model_type


@pytest.mark.parametrize("kind", ["qwen3", "gemma3"])
def test_norms_of_single_heads_are_not_cut(kind: str) -> None:
    assert not [cut for cut in cuts_of(family_of(decoder(kind))) if "norm" in cut.tensor]
