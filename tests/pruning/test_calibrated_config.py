"""Settings that pruning and structured pruning share."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from alps.core.settings import describe_fields
from alps.pruning.calibrated_config import CalibratedConfig
from alps.pruning.config import PruneConfig
from alps.pruning.shrink_config import ShrinkConfig

_PANELS = ["What to prune", "How", "Calibration", "Resources"]


@pytest.mark.parametrize("config", [PruneConfig, ShrinkConfig])
def test_shared_settings_stand_between_those_of_the_command(config: type[CalibratedConfig]) -> None:
    fields = list(describe_fields(config))
    assert fields[0].name == "model"
    assert list(dict.fromkeys(field.setting.panel for field in fields)) == _PANELS
    shared = [field.name for field in describe_fields(CalibratedConfig)]
    assert shared == [field.name for field in fields if field.name in shared]
    assert shared[-4:] == ["device", "dtype", "offload", "activation_memory"]


def test_the_fingerprint_holds_what_the_weights_depend_on() -> None:
    entries = CalibratedConfig(model="m", samples=3, bos=True, device="cpu", offload=True).fingerprint_fields()
    assert entries == {"samples": "3", "seqlen": "2048", "seed": "0", "bos": "true", "dtype": "auto"}


def test_the_fingerprint_has_the_order_of_the_panels() -> None:
    assert list(PruneConfig(model="m").fingerprint_fields())[:2] == ["sparsity", "pattern"]
    assert list(ShrinkConfig(model="m").fingerprint_fields())[-2:] == ["bos", "dtype"]


def test_structured_pruning_has_bounds_of_its_own() -> None:
    assert PruneConfig(model="m", samples=1).samples == 1
    with pytest.raises(ValidationError, match="greater than or equal to 2"):
        ShrinkConfig(model="m", samples=1)
    assert (PruneConfig(model="m").seqlen, ShrinkConfig(model="m").seqlen) == (2048, 1024)


def test_a_limit_in_gib_is_one_in_bytes() -> None:
    assert CalibratedConfig(model="m").activation_bytes is None
    assert CalibratedConfig(model="m", activation_memory=0.5).activation_bytes == 2**29
    assert CalibratedConfig(model="m", activation_memory=0.0).activation_bytes == 0
