"""Numbers of units from shares and settings, and the description of the smaller model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from alps.core.errors import ConfigError, UnsupportedModel
from alps.models.blocks import find_blocks
from alps.models.shrink_families import FAMILIES
from alps.models.shrunk_model import empty_shrunk_model
from alps.models.structure import Structure, Target, read_structure
from alps.pruning.shrink_config import ShrinkConfig
from alps.pruning.shrink_target import (
    aligned,
    changed_fields,
    check_experts,
    describe_target,
    resolve_target,
    size_record,
)

# Of SmolLM2-135M, of LLaMA-2-7B, and of a model without an MLP that can be cut.
_GROUPED = Structure(30, 576, 1536, 9, 3, 64)
_SINGLE = Structure(32, 4096, 11008, 32, 32, 128)
_BARE = Structure(6, 64, None, 4, 4, 16)


def _resolve(structure: Structure, **settings: Any) -> Target:
    return resolve_target(ShrinkConfig(model="m", **settings), structure)


@pytest.mark.parametrize(
    ("share", "width", "align", "kept"),
    [
        (0.25, 1536, None, 1280),  # 4.5 multiples of 256 are 5: a half is rounded up
        (0.5, 1536, None, 768),
        (0.25, 1536, 64, 1152),
        (0.25, 11008, None, 8192),  # 32.25 multiples of 256
        (0.25, 14336, None, 10752),
        (0.25, 1408, None, 1024),  # 8.25 of 128; 1408 is no multiple of 256
        (0.25, 172, None, 128),  # no multiple of 64 either
        (0.25, 172, 1, 129),
        (0.99, 1536, None, 256),
    ],
)
def test_widths_are_multiples(share: float, width: int, align: int | None, kept: int) -> None:
    assert aligned("--mlp", share, width, align) == kept
    assert kept % (align or 64) == 0


def test_a_share_that_rounds_to_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--mlp 0\.05 of 1536 rounds to nothing in multiples of 256: give more, or"):
        aligned("--mlp", 0.05, 1536, None)
    assert aligned("--mlp", 0.05, 1536, 64) == 1472


@pytest.mark.parametrize(
    ("structure", "settings", "kept"),
    [
        (_GROUPED, {"mlp": 0.25}, (1280, 9, 3, 30)),
        (_GROUPED, {"mlp_width": 1000}, (1000, 9, 3, 30)),
        (_GROUPED, {"heads": 0.34}, (1536, 6, 3, 30)),
        (_GROUPED, {"num_heads": 6}, (1536, 6, 3, 30)),
        (_GROUPED, {"kv_groups": 2}, (1536, 6, 2, 30)),
        (_GROUPED, {"kv_groups": 2, "heads": 0.34}, (1536, 4, 2, 30)),
        (_GROUPED, {"kv_groups": 2, "num_heads": 2}, (1536, 2, 2, 30)),
        (_GROUPED, {"heads": 0.99}, (1536, 3, 3, 30)),
        (_SINGLE, {"heads": 0.25}, (11008, 24, 24, 32)),
        (_SINGLE, {"num_heads": 16}, (11008, 16, 16, 32)),
        (_SINGLE, {"heads": 0.01, "mlp": 0.5}, None),
        (_GROUPED, {"blocks": 3, "mlp": 0.5}, (768, 9, 3, 27)),
        (_GROUPED, {"drop_blocks": [0, 29]}, (1536, 9, 3, 28)),
    ],
)
def test_shares_become_numbers(
    structure: Structure, settings: dict[str, Any], kept: tuple[int, int, int, int] | None
) -> None:
    if kept is None:
        with pytest.raises(ConfigError, match=r"--heads 0\.01 of 32 heads rounds to nothing"):
            _resolve(structure, **settings)
        return
    target = _resolve(structure, **settings)
    assert (target.mlp_width, target.heads, target.kv_heads, len(target.kept_blocks or ())) == kept


def test_blocks_that_are_still_to_be_chosen_are_candidates() -> None:
    assert _resolve(_GROUPED, blocks=2).kept_blocks == (0, 1, *range(4, 30))
    assert _resolve(_GROUPED, drop_blocks=[28, 0]).kept_blocks == (*range(1, 28), 29)


@pytest.mark.parametrize(
    ("structure", "settings", "complaint"),
    [
        (_GROUPED, {}, "Nothing is to be removed"),
        (_GROUPED, {"mlp_width": 1536}, "Nothing would be removed"),
        (_GROUPED, {"num_heads": 9, "kv_groups": 3}, "Nothing would be removed"),
        (_BARE, {"mlp": 0.25}, "the model has none"),
        (_GROUPED, {"heads": 0.1}, "--heads 0.1 of 3 query heads in a KV group rounds to nothing"),
        (_GROUPED, {"drop_blocks": [3, 30]}, "--drop-blocks names block 30, and the model has 30, from 0 on"),
        (_GROUPED, {"blocks": 27}, "27 blocks cannot be removed of 30: the first and the last 2 stay"),
    ],
)
def test_impossible_numbers_are_one_sentence(structure: Structure, settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError) as refused:
        _resolve(structure, **settings)
    assert complaint in str(refused.value) and str(refused.value).endswith(".") and "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["experts", "num_experts", "expert_mlp", "expert_mlp_width"])
def test_models_without_experts_lose_none(name: str) -> None:
    config = ShrinkConfig.model_validate(
        {"model": "m", name: 4 if name in ("num_experts", "expert_mlp_width") else 0.25}
    )
    option = f"--{name.replace('_', '-')}"
    with pytest.raises(ConfigError, match=f"^{option} is for mixtures of experts, and the model has no experts.$"):
        check_experts(config, FAMILIES["llama"], _GROUPED)
    with pytest.raises(UnsupportedModel, match="Experts of 'jetmoe' models cannot be removed: its attention has as"):
        check_experts(config, FAMILIES["jetmoe"], _GROUPED)
    check_experts(config, FAMILIES["mixtral"], replace(_GROUPED, experts=8, expert_width=64))


@pytest.mark.parametrize(
    ("groups", "settings", "kept"),
    [
        (1, {"experts": 0.25}, (96, 768)),
        (1, {"experts": 0.254}, (95, 768)),
        (1, {"experts": 0.99}, (8, 768)),  # a token takes 8
        (1, {"num_experts": 100, "expert_mlp": 0.25}, (100, 512)),  # 2.25 multiples of 256
        (1, {"expert_mlp": 0.25, "align": 64}, (128, 576)),
        (1, {"expert_mlp_width": 600}, (128, 600)),
        (8, {"experts": 0.254}, (96, 768)),  # 11.9 of 16 in each group
        (8, {"experts": 0.3}, (88, 768)),
        (8, {"experts": 0.99}, (16, 768)),  # a token takes 8 of 4 groups
        (1, {"experts": 0.003}, None),
        (8, {"experts": 0.03}, None),
    ],
)
def test_experts_leave_in_whole_numbers_from_all_groups(
    groups: int, settings: dict[str, Any], kept: tuple[int, int] | None
) -> None:
    structure = Structure(
        48,
        2048,
        None,
        32,
        4,
        128,
        experts=128,
        expert_width=768,
        experts_per_token=8,
        expert_groups=groups,
        groups_per_token=(groups + 1) // 2,
    )
    if kept is None:
        with pytest.raises(
            ConfigError, match=rf"of 128 experts in {groups} groups, of which a token takes 8, rounds to"
        ):
            _resolve(structure, **settings)
        return
    target = _resolve(structure, **settings)
    assert (target.experts, target.expert_width) == kept


def test_odd_widths_of_experts_are_multiples_of_eight() -> None:
    structure = Structure(4, 32, None, 4, 2, 8, experts=8, expert_width=24, experts_per_token=2)
    assert _resolve(structure, expert_mlp=0.3).expert_width == 16
    with pytest.raises(ConfigError, match=r"--expert-mlp 0\.1 of 24 rounds to nothing in multiples of 8"):
        _resolve(structure, expert_mlp=0.1)


def test_all_but_the_ends_can_go() -> None:
    assert _resolve(_GROUPED, blocks=26).kept_blocks == (0, 1, 28, 29)


def test_sizes_and_fields_are_those_of_the_models(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama", torch.bfloat16)
    blocks = find_blocks(model)
    structure = read_structure(model, blocks)
    target = Target(mlp_width=40, heads=2, kept_blocks=(0, 2))
    small: Any = empty_shrunk_model(model, blocks, target)
    old, new = changed_fields(model.config, small.config)
    assert new == {"intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
    assert old == {"intermediate_size": 44, "num_hidden_layers": 3, "num_attention_heads": 4}
    before, after = (
        size_record(model, structure, old),
        size_record(small, read_structure(small, find_blocks(small)), new),
    )
    assert before.parameters == sum(p.numel() for p in model.parameters()) and before.nbytes == 2 * before.parameters
    # Embeddings and head 64 x 32 each, two blocks, the last norm.
    attention, mlp = 2 * (16 * 32) + 2 * (16 * 32), 3 * 40 * 32
    assert after.parameters == 2 * 64 * 32 + 2 * (attention + mlp + 2 * 32) + 32
    # Keys and values of 2 KV heads of 8 entries in each block, 2 bytes each.
    assert (before.kv_bytes, after.kv_bytes) == (2 * 2 * 8 * 3 * 2, 2 * 2 * 8 * 2 * 2)
    lines = describe_target(before, after, read_structure(small, find_blocks(small)))
    assert lines[0] == ("Config: intermediate_size 44 -> 40, num_hidden_layers 3 -> 2, num_attention_heads 4 -> 2.")
    percent = f"{100 * (1 - after.parameters / before.parameters):.1f} % fewer"
    assert f"{before.parameters:,} -> {after.parameters:,} ({percent})" in lines[1]
    assert lines[2] == "Key-value cache: 192 -> 128 bytes a token."
    assert "MLP width 40 and heads x head_dim 16" in lines[3]
    assert lines[4] == "Tensor parallelism: 2 ranks divide heads, KV heads and MLP width."


def test_even_widths_are_not_complained_of() -> None:
    size = size_record(torch.nn.Linear(2, 2), _BARE, {})
    lines = describe_target(size, size, Structure(32, 4096, 8192, 32, 8, 128))
    assert not any("K-quants" in line for line in lines) and lines[-1].startswith("Tensor parallelism: 2, 4, 8 ranks")
    odd = describe_target(size, size, Structure(30, 576, 1280, 9, 3, 64))
    assert "heads x head_dim 576" in odd[-2] and "MLP width" not in odd[-2]
    assert odd[-1].startswith("Tensor parallelism: no 2, 4 or 8")


def test_long_lists_of_the_configuration_are_cut() -> None:
    size = size_record(torch.nn.Linear(2, 2), _BARE, {"layer_types": ["full_attention"] * 12})
    line = describe_target(size, size, _BARE)[0]
    assert line.count("... (12)") == 2 and len(line) < 120
