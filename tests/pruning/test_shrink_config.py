"""Settings of structured pruning: what contradicts itself, presets, YAML files, and what the weights depend on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from alps.core.errors import ConfigError
from alps.pruning.shrink_config import SHRINK_PRESETS, ShrinkConfig, load_shrink_config, split_numbers


def _config(**settings: Any) -> ShrinkConfig:
    return load_shrink_config(None, {"model": "m", **settings})


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({}, "Nothing is to be removed: give --mlp, --heads, --kv-groups, --blocks, --experts or --speedup."),
        ({"align": 64}, "Nothing is to be removed"),
        ({"mlp": 0.25, "mlp_width": 64}, "--mlp and --mlp-width say the same in two ways: give one of them."),
        ({"heads": 0.25, "num_heads": 6}, "--heads and --num-heads say"),
        ({"blocks": 1, "drop_blocks": [3]}, "--blocks and --drop-blocks say"),
        ({"experts": 0.25, "num_experts": 6}, "--experts and --num-experts say"),
        ({"expert_mlp": 0.25, "expert_mlp_width": 64}, "--expert-mlp and --expert-mlp-width say"),
        ({"drop_blocks": "3,5,3"}, "--drop-blocks names a block twice: 3,5,3."),
        ({"speedup": 1.2, "kv_groups": 2}, "--speedup chooses what to remove: leave --kv-groups out."),
        ({"speedup": 1.2, "drop_blocks": [3]}, "--speedup chooses what to remove: leave --drop-blocks out."),
        ({"speedup": 1.2, "runtime": "llama"}, "Did you mean 'llama.cpp'?"),
    ],
)
def test_contradictions_are_one_sentence(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError) as refused:
        _config(**settings).check_cuts()
    assert complaint in str(refused.value) and "\n" not in str(refused.value)


def test_all_kinds_can_be_removed_together() -> None:
    _config(mlp=0.25, heads=0.5, kv_groups=2, blocks=1, experts=0.5, expert_mlp=0.5).check_cuts()


@pytest.mark.parametrize(
    "settings",
    [
        {"mlp": 0.0},
        {"mlp": 1.0},
        {"heads": -0.1},
        {"mlp_width": 0},
        {"num_heads": 0},
        {"kv_groups": 0},
        {"blocks": 0},
        {"drop_blocks": [-1]},
        {"drop_blocks": "2,x"},
        {"align": 0},
        {"samples": 1},
        {"seqlen": 1},
        {"seed": -1},
        {"reconstruct_epochs": -1},
        {"activation_memory": float("inf")},
        {"preset": "bset"},
        {"mlpp": 0.25},
        {"speedup": 1.0},
        {"speedup": float("inf")},
    ],
)
def test_values_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as refused:
        _config(**settings)
    assert "\n" not in str(refused.value) and next(iter(settings)) in str(refused.value).lower().replace("-", "_")


def test_numbers_may_be_a_text_with_commas() -> None:
    assert _config(drop_blocks="21, 22,3,").drop_blocks == [21, 22, 3]
    assert split_numbers([1, 2]) == [1, 2] and split_numbers("a,1") == "a,1" and split_numbers("") == []


def test_presets_are_defaults() -> None:
    assert _config(mlp=0.5).reconstruction() is None
    best = _config(mlp=0.5, preset="best")
    assert best.reconstruct_epochs == SHRINK_PRESETS["best"]["reconstruct_epochs"] == 2
    parameters = best.reconstruction()
    assert parameters is not None and parameters.epochs == 2
    assert _config(mlp=0.5, preset="best", reconstruct_epochs=0).reconstruction() is None


def test_an_override_clears_the_other_way_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: m\nmlp: 0.25\nnum_heads: 6\ndrop_blocks: [1, 2]\nsamples: 8\n")
    plain = load_shrink_config(path, {"mlp": None, "mlp_width": None})
    assert (plain.mlp, plain.mlp_width, plain.num_heads, plain.drop_blocks, plain.samples) == (0.25, None, 6, [1, 2], 8)
    changed = load_shrink_config(path, {"mlp_width": 128, "heads": 0.5, "blocks": 1, "seed": 3})
    assert (changed.mlp, changed.mlp_width, changed.heads, changed.num_heads) == (None, 128, 0.5, None)
    assert (changed.blocks, changed.drop_blocks, changed.seed) == (1, [], 3)
    changed.check_cuts()
    with pytest.raises(ConfigError, match="say the same in two ways"):
        load_shrink_config(path, {"mlp_width": 128, "mlp": 0.5}).check_cuts()


def test_a_speed_and_numbers_of_units_clear_each_other(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: m\nmlp: 0.25\nkv_groups: 2\ndrop_blocks: [1]\nseed: 5\n")
    fast = load_shrink_config(path, {"speedup": 1.25})
    fast.check_cuts()
    assert (fast.speedup, fast.mlp, fast.kv_groups, fast.drop_blocks, fast.seed) == (1.25, None, None, [], 5)
    path.write_text("model: m\nspeedup: 1.25\n")
    narrow = load_shrink_config(path, {"mlp": 0.5})
    narrow.check_cuts()
    assert (narrow.speedup, narrow.mlp) == (None, 0.5)


def test_yaml_repeats_the_settings(tmp_path: Path) -> None:
    config = _config(mlp=0.25, drop_blocks="2,1", preset="best", calibration="naïve.txt", activation_memory=0.5)
    path = tmp_path / "alps.yaml"
    path.write_text(config.to_yaml())
    assert load_shrink_config(path, {}) == config


def test_what_changes_no_weight_is_not_in_the_fingerprint() -> None:
    fields = _config(mlp=0.25).fingerprint_fields()
    same = {"model": "n", "offload": True, "device": "cpu", "activation_memory": 0.0, "calibration": "x"}
    assert _config(mlp=0.25, **same).fingerprint_fields() == fields
    assert _config(mlp=0.25, preset="best", reconstruct_epochs=0).fingerprint_fields() == fields
    others: list[dict[str, Any]] = [
        {"mlp": 0.5},
        {"heads": 0.5},
        {"kv_groups": 2},
        {"drop_blocks": [1]},
        {"align": 1},
        {"mlp": None, "speedup": 1.2},
        {"seed": 1},
        {"samples": 4},
        {"bos": True},
        {"dtype": "float32"},
        {"preset": "best"},
    ]
    for settings in others:
        assert _config(**{"mlp": 0.25, **settings}).fingerprint_fields() != fields, settings


def test_limits_of_memory_are_bytes() -> None:
    assert _config().activation_bytes is None
    assert _config(activation_memory=0.0).activation_bytes == 0
    assert _config(activation_memory=1.5).activation_bytes == 3 * 2**29


def test_an_unknown_device_is_refused() -> None:
    assert _config(device="cpu").pick_device().type == "cpu"
    with pytest.raises(ConfigError, match="cannot be used here"):
        _config(device="quantum").pick_device()
