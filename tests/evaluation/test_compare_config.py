"""Settings of comparisons: runs in their order, methods with settings, and mistakes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from alps.core.errors import CheckpointError, ConfigError
from alps.evaluation.compare_config import COMPARISON_NAME, CompareConfig, load_compare_config, method_settings

_VALUES: dict[str, Any] = {
    "model": "m",
    "methods": ["wanda", "alps+true_sequential+dense_target=0.4"],
    "sparsity": [0.5],
    "pattern": ["2:4"],
    "seeds": 2,
    "texts": ["text.txt"],
}


def test_settings_come_from_yaml_and_back(tmp_path: Path) -> None:
    asked = CompareConfig.model_validate({**_VALUES, "pattern": ["2:4", "4:8"], "tasks": ["piqa"], "limit": 3})
    path = tmp_path / "compare.yaml"
    path.write_text(asked.to_yaml())
    assert load_compare_config(path, {}) == asked
    assert load_compare_config(path, {"seeds": 3, "samples": None}) == asked.model_copy(update={"seeds": 3})
    path.write_text("model: x\npattern: [2:4, 4:8]\nsparsities: [0.5]\n")
    with pytest.raises(ConfigError, match=r"Setting 'sparsities' in .* is unknown\. Did you mean 'sparsity'"):
        load_compare_config(path, {})


def test_runs_have_every_pattern_and_method_of_a_seed_before_the_next_seed() -> None:
    runs = CompareConfig.model_validate(_VALUES).runs()
    methods = ["wanda", "alps+true_sequential+dense_target=0.4"]
    assert [run.key for run in runs] == [(m, p, seed) for seed in (0, 1) for p in ("0.5", "2:4") for m in methods]
    assert runs[1].title == "alps+true_sequential+dense_target=0.4 0.5, seed 0"
    settings = runs[3].config
    assert (settings.method, settings.pattern, settings.sparsity, settings.seed) == ("alps", "2:4", None, 0)
    assert (settings.true_sequential, settings.dense_target, settings.model) == (True, 0.4, "m")


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("wanda", {"method": "wanda"}),
        ("wanda+refit", {"method": "wanda", "refit": True}),
        ("best+reconstruct_epochs=0", {"preset": "best", "reconstruct_epochs": 0}),
        ("alps+keep_dense=*.o_proj", {"method": "alps", "keep_dense": "*.o_proj"}),
        ("alps+options={damping: 0.1}", {"method": "alps", "options": {"damping": 0.1}}),
    ],
)
def test_a_method_may_bring_settings(method: str, settings: dict[str, Any]) -> None:
    assert method_settings(method) == settings


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"sparsity": [], "pattern": []}, "There is no pattern to prune to"),
        ({"texts": []}, "There is nothing to measure"),
        ({"task_data": "folder"}, "--task-data has no effect without --tasks"),
        ({"methods": ["wanda", "wanda"]}, "The run wanda 0.5, seed 0 occurs twice"),
        ({"methods": ["wanda+refitt"]}, "Did you mean 'refit'"),
    ],
)
def test_comparisons_that_cannot_be_are_refused(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        CompareConfig.model_validate({**_VALUES, **changes}).runs()
    assert complaint in str(caught.value)


def test_a_comparison_may_grow_and_not_change(tmp_path: Path) -> None:
    first = CompareConfig.model_validate(_VALUES)
    first.check_continues(tmp_path)
    (tmp_path / COMPARISON_NAME).write_text(first.to_yaml())
    grown = {"methods": ["magnitude"], "sparsity": [0.6], "pattern": [], "seeds": 5}
    CompareConfig.model_validate({**_VALUES, **grown}).check_continues(tmp_path)
    with pytest.raises(CheckpointError, match="holds a comparison with samples 128, not 64"):
        CompareConfig.model_validate({**_VALUES, "samples": 64}).check_continues(tmp_path)


def test_lists_can_be_written_as_text() -> None:
    config = CompareConfig.model_validate({**_VALUES, "sparsity": "0.5, 0.7", "methods": "wanda,alps"})
    assert config.sparsity == [0.5, 0.7] and config.methods == ["wanda", "alps"]
    with pytest.raises(ConfigError, match=r"Sparsities '0\.5;0\.7' are not numbers"):
        CompareConfig.model_validate({**_VALUES, "sparsity": "0.5;0.7"})
