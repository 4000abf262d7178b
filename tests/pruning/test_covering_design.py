"""Every option of pruning runs on every architecture of the tables."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from pydantic.fields import FieldInfo
from torch import nn

import alps
from alps.core.settings import Setting
from alps.models.blocks import find_blocks
from alps.pruning.config import PruneConfig
from helpers.decoders import DENSE, HYBRID, MOE, RECENT, decoder
from helpers.vision import VISION, vision_model

# Together these rows hold every value of every option.
_ROWS: dict[str, dict[str, Any]] = {
    "best": {"sparsity": 0.6, "preset": "best"},
    "all at once": {
        "sparsity": 0.6,
        "true_sequential": True,
        "dense_target": 0.4,
        "allocation": "sensitivity",
        "row_weights": "block-output",
        "reconstruct_epochs": 1,
        "reconstruct_target": 0.4,
        "activation_memory": 0.0,
    },
    "alps 2:4": {"pattern": "2:4", "effort": "high", "preset": "paper", "offload": True, "options": {"damping": 0.02}},
    "wanda": {"sparsity": 0.6, "method": "wanda", "allocation": "owl", "refit": True, "keep_dense": ["*.1.*"]},
    "sparsegpt": {"sparsity": 0.6, "method": "sparsegpt", "allocation": "error", "dense_target": 0.4},
    "dsnot": {
        "pattern": "2:4",
        "method": "dsnot-sparsegpt",
        "keep_zeros": True,
        "true_sequential": True,
        "preset": "fast",
    },
    "dsnot 0.6": {"sparsity": 0.6, "method": "dsnot"},
    "magnitude": {"sparsity": 0.6, "method": "magnitude", "measure_error": False, "overrides": {"*.0.*": 0.5}},
}
# Not a matter of the architecture.
_ELSEWHERE = {"model", "calibration", "samples", "seqlen", "seed", "bos", "device", "dtype"}


def _choices(field: FieldInfo) -> list[Any]:
    setting = next(item for item in field.metadata if isinstance(item, Setting))
    return [choice for choice in setting.choices or get_args(field.annotation) if isinstance(choice, str)]


def test_the_rows_hold_every_value_of_every_option() -> None:
    for name, field in PruneConfig.model_fields.items():
        if name not in _ELSEWHERE:
            values = [row[name] for row in _ROWS.values() if name in row]
            assert any(value != field.default for value in values), f"no row changes {name}"
            missing = [choice for choice in _choices(field) if choice not in [*values, field.default]]
            assert not missing, f"no row has {name} = {missing}"


def _zeros(model: nn.Module) -> dict[str, int]:
    return {site.name: int((site.read() == 0).sum()) for block in find_blocks(model) for site in block.sites}


def _check(model: nn.Module, row: str) -> None:
    """Prune a model by a row, and assert that counts are exact and that all other matrices are unchanged."""
    options = _ROWS[row]
    ids = torch.randint(2, 60, (5, 16), generator=torch.Generator().manual_seed(5))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    report = alps.prune(model, calibration=ids, **options)
    zeros = {layer.name: layer.zeros for layer in report.layers}
    assert zeros and {name: count for name, count in _zeros(model).items() if name in zeros} == zeros
    sizes = {layer.name: layer.shape[0] * layer.shape[1] for layer in report.layers}
    if "overrides" not in options:
        # Single layers have another share where the sparsity is allocated; the sum never has.
        expected = sum(round((0.6 if "sparsity" in options else 0.5) * size) for size in sizes.values())
        assert abs(sum(zeros.values()) - expected) <= len(sizes), (sum(zeros.values()), expected)
    dense = {record.name for record in report.dense}
    assert dense.isdisjoint(f"{name}.weight" for name in zeros)
    for name in dense:
        assert torch.equal(model.get_parameter(name), before[name]), name
    with torch.no_grad():
        assert bool(torch.isfinite(model(input_ids=ids, use_cache=False).logits).all())


@pytest.mark.parametrize("kind", ["gemma3n", "gemma4", "zaya", "bamba", "rwkv"])
def test_the_best_preset_runs_on_recent_architectures(kind: str) -> None:
    _check(decoder(kind), "best")


@pytest.mark.slow
@pytest.mark.parametrize("row", _ROWS)
@pytest.mark.parametrize("kind", [*DENSE, *MOE, *HYBRID, *RECENT, *VISION])
def test_every_option_runs_on_every_architecture(kind: str, row: str) -> None:
    _check(vision_model(kind) if kind in VISION else decoder(kind), row)
