"""Settings that every command on a model has, and how a config is written as YAML."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import yaml
from pydantic import BaseModel, ConfigDict, Field

from alps.core.settings import RESOURCES, Setting, describe_fields

if TYPE_CHECKING:
    import torch


class RunConfig(BaseModel):
    """Base of the configs of all commands: frozen and strict; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    device: Annotated[str, Setting(RESOURCES, "NAME", affects_weights=False)] = Field(
        default="auto", description="Device to compute on: auto, cpu or cuda:N."
    )
    dtype: Annotated[str, Setting(RESOURCES, "NAME")] = Field(
        default="auto", description="Data type of the weights: auto (the checkpoint's), float32, bfloat16 or float16."
    )

    def pick_device(self) -> torch.device:
        """Return the device to run on.

        Raises:
            ConfigError: when it does not exist on this machine.
        """
        # Help texts are made from configs, and do not wait for torch.
        from alps.core.device import pick_device

        return pick_device(self.device)

    def to_yaml(self) -> str:
        """Return the resolved settings as YAML, one key a line, in the order of `describe_fields`."""
        values = self.model_dump()
        ordered = {field.name: values[field.name] for field in describe_fields(type(self))}
        return yaml.safe_dump(ordered, sort_keys=False, allow_unicode=True)
