"""Configs from files, options and defaults, and the description of their fields."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field

from alps.core.errors import ConfigError
from alps.core.settings import (
    CALIBRATION,
    COMMAND_LINE,
    RESOURCES,
    WHAT,
    Setting,
    describe_fields,
    load_config,
    make_config,
)


class _Config(BaseModel):
    model_config = ConfigDict(extra="forbid")

    model: str = Field(description="Name of the model.")
    eval_seqlen: Annotated[int, Setting("How", flag="seqlen")] = Field(default=2048, description="Tokens.", ge=2)
    share: Annotated[float | None, Setting(default="by preset")] = Field(default=None, description="Share.")
    order: Literal["up", "down"] = Field(default="up", description="Order.")
    texts: list[str] = Field(default=["a", "b"], description="Texts.")
    fast: bool = Field(default=False, description="Be fast.")


def test_fields_are_described_with_option_type_and_default() -> None:
    fields = {field.name: field for field in describe_fields(_Config)}
    assert [field.option for field in fields.values()] == [
        *("--seqlen", "--model", "--share", "--order", "--texts", "--fast")
    ]
    assert [field.value_type for field in fields.values()] == [int, str, float, str, str, bool]
    assert [field.default for field in fields.values()] == ["2048", "required", "by preset", "up", "a,b", "off"]
    assert fields["order"].help == "Order. One of up, down." and fields["texts"].help == "Texts."
    assert fields["eval_seqlen"].setting.panel == "How" and fields["model"].setting.panel == "Options"


class _Later(_Config):
    device: Annotated[str, Setting(RESOURCES)] = Field(default="auto", description="Device.")
    count: Annotated[int, Setting(WHAT)] = Field(default=1, description="Count.")
    seed: Annotated[int, Setting(CALIBRATION)] = Field(default=0, description="Seed.")


def test_fields_follow_the_order_of_panels_and_not_that_of_classes() -> None:
    names = [field.name for field in describe_fields(_Later)]
    assert names == ["count", "eval_seqlen", "seed", "device", "model", "share", "order", "texts", "fast"]


def test_none_stands_for_the_default() -> None:
    config = make_config(_Config, {"model": "m", "eval_seqlen": None, "order": "down"}, COMMAND_LINE)
    assert (config.model, config.eval_seqlen, config.order, config.share) == ("m", 2048, "down", None)


def test_options_beat_the_file_unless_they_are_merged_otherwise(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: m\norder: down\nfast: true\n")
    assert load_config(_Config, path, {"order": "up", "fast": None}) == _Config(model="m", order="up", fast=True)

    def merge(values: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
        assert overrides == {"order": "up"}
        return {**overrides, **values}

    assert load_config(_Config, path, {"order": "up", "fast": None}, merge).order == "down"
    assert load_config(_Config, None, {"model": "n"}).model == "n"


def test_the_origin_of_a_wrong_value_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^Setting 'eval_seqlen' in the command line is wrong: .* not 1\.$"):
        load_config(_Config, None, {"model": "m", "eval_seqlen": 1})
    path = tmp_path / "run.yaml"
    path.write_text("model: m\norder: dawn\n")
    with pytest.raises(ConfigError, match=r"in .*run\.yaml is wrong: 'dawn' is unknown, choose one of up, down\. Did"):
        load_config(_Config, path, {})
