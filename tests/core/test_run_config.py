"""Settings of all commands, and configs as YAML."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import pytest
import torch
import yaml
from pydantic import Field

from alps.core.errors import ConfigError
from alps.core.run_config import RunConfig
from alps.core.settings import HOW, WHAT, Setting, load_config, make_config


class _Config(RunConfig):
    steps: Annotated[int, Setting(HOW)] = Field(default=3, description="Steps.")
    model: Annotated[str, Setting(WHAT)] = Field(default="é: m", description="Model.")


def test_yaml_has_the_order_of_panels_and_gives_the_same_config(tmp_path: Path) -> None:
    config = _Config(steps=4, dtype="float32")
    text = config.to_yaml()
    assert list(yaml.safe_load(text)) == ["model", "steps", "device", "dtype"]
    (tmp_path / "run.yaml").write_text(text)
    assert load_config(_Config, tmp_path / "run.yaml", {}) == config


def test_unknown_keys_and_other_types_are_refused() -> None:
    for values in ({"step": 3}, {"steps": "3"}, {"dtype": 1}):
        with pytest.raises(ConfigError):
            make_config(_Config, values, "here")


def test_devices_are_looked_up_when_they_are_needed() -> None:
    assert _Config(device="cpu").pick_device() == torch.device("cpu")
    with pytest.raises(ConfigError, match="quantum"):
        _Config(device="quantum").pick_device()
