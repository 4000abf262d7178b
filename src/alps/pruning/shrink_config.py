"""Settings of structured pruning: described once, for the command line, YAML files, `alps.shrink` and the docs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from alps.core.errors import ConfigError, check_choice
from alps.core.settings import CALIBRATION, HOW, WHAT, Setting, load_config
from alps.finetuning.reconstruction_parameters import ReconstructionParameters
from alps.pruning.calibrated_config import CalibratedConfig

# Two ways to say how much of a kind of structure goes; at most one of them may be given.
_ALTERNATIVES = (
    ("mlp", "mlp_width"),
    ("heads", "num_heads"),
    ("blocks", "drop_blocks"),
    ("experts", "num_experts"),
    ("expert_mlp", "expert_mlp_width"),
)
_CUTS = (*(name for pair in _ALTERNATIVES for name in pair), "kv_groups")
LLAMA = "llama.cpp"
RUNTIMES = ("transformers", LLAMA)

# Defaults of the settings marked 'by preset'.
SHRINK_PRESETS: dict[str, dict[str, Any]] = {"layers": {"reconstruct_epochs": 0}, "best": {"reconstruct_epochs": 2}}

_Share = Annotated[float | None, Setting(WHAT, "SHARE")]
_Count = Annotated[int | None, Setting(WHAT, "N")]


def split_numbers(numbers: Any) -> Any:
    """Split a text with commas into integers; return anything else, and a text that holds no integers, unchanged."""
    if not isinstance(numbers, str):
        return numbers
    try:
        return [int(part) for part in numbers.split(",") if part.strip()]
    except ValueError:
        return numbers


class ShrinkConfig(CalibratedConfig):
    """All settings of structured pruning."""

    mlp: _Share = Field(
        default=None, gt=0, lt=1, description="Share of the MLP channels to remove from every block, such as 0.25."
    )
    mlp_width: _Count = Field(default=None, ge=1, description="MLP channels to keep in every block, in place of --mlp.")
    heads: _Share = Field(
        default=None, gt=0, lt=1, description="Share of the query heads to remove, the same number in every KV group."
    )
    num_heads: _Count = Field(default=None, ge=1, description="Query heads to keep, in place of --heads.")
    kv_groups: _Count = Field(
        default=None, ge=1, description="KV groups to keep: key and value heads with their query heads."
    )
    blocks: _Count = Field(default=None, ge=1, description="Number of whole blocks to remove.")
    drop_blocks: Annotated[
        list[Annotated[int, Field(ge=0)]], BeforeValidator(split_numbers), Setting(WHAT, "I,J,...")
    ] = Field(default=[], description="Blocks to remove by their index from 0, in place of --blocks.")
    experts: _Share = Field(
        default=None, gt=0, lt=1, description="Share of the experts to remove from every mixture, all of them whole."
    )
    num_experts: _Count = Field(default=None, ge=1, description="Experts to keep, in place of --experts.")
    expert_mlp: _Share = Field(
        default=None, gt=0, lt=1, description="Share of the channels to remove inside every expert."
    )
    expert_mlp_width: _Count = Field(
        default=None, ge=1, description="Channels to keep inside every expert, in place of --expert-mlp."
    )
    speedup: Annotated[float | None, Setting(WHAT, "TIMES")] = Field(
        default=None,
        gt=1,
        allow_inf_nan=False,
        description="Speed of generation to reach on this machine, in units of the dense model's: the mix of MLP "
        "width, heads and blocks is chosen by measurement. In place of all settings above.",
    )
    runtime: Annotated[str, Setting(WHAT, "NAME", RUNTIMES)] = Field(
        default="transformers", description="Runtime in which --speedup measures."
    )
    align: Annotated[int | None, Setting(WHAT, "N", default="256, 128 or 64, as the width is a multiple of it")] = (
        Field(default=None, ge=1, description="Multiple to which widths given as shares are rounded.")
    )
    preset: Annotated[str, Setting(HOW, "NAME", tuple(SHRINK_PRESETS), affects_weights=False)] = Field(
        default="layers",
        description="Defaults for the settings marked 'by preset'; best adds block reconstruction, and needs 131,072 "
        "calibration tokens or more.",
    )
    reconstruct_epochs: Annotated[int, Setting(HOW, "N", default="by preset")] = Field(
        default=0,
        ge=0,
        description="Epochs of block reconstruction: tuning the smaller block to the dense block's outputs.",
    )
    # At least two windows, since some are held out.
    samples: Annotated[int, Setting(CALIBRATION, "N")] = Field(default=128, ge=2, description="Calibration windows.")
    seqlen: Annotated[int, Setting(CALIBRATION, "N")] = Field(
        default=1024, ge=2, description="Tokens per calibration window."
    )

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        name = values.get("preset", "layers")
        check_choice("Preset", name, SHRINK_PRESETS)
        return {**SHRINK_PRESETS[name], **values}

    def check_cuts(self) -> None:
        """Refuse settings that remove nothing, or say twice how much of a kind goes.

        Raises:
            ConfigError: see above.
        """
        cuts = [name for name in _CUTS if getattr(self, name) not in (None, [])]
        check_choice("Runtime", self.runtime, RUNTIMES)
        if self.speedup is not None and cuts:
            raise ConfigError(f"--speedup chooses what to remove: leave {_option(cuts[0])} out.")
        if not cuts and self.speedup is None:
            raise ConfigError(
                "Nothing is to be removed: give --mlp, --heads, --kv-groups, --blocks, --experts or --speedup."
            )
        for first, second in _ALTERNATIVES:
            if first in cuts and second in cuts:
                raise ConfigError(f"{_option(first)} and {_option(second)} say the same in two ways: give one of them.")
        if len(set(self.drop_blocks)) < len(self.drop_blocks):
            raise ConfigError(f"--drop-blocks names a block twice: {','.join(map(str, self.drop_blocks))}.")

    def reconstruction(self) -> ReconstructionParameters | None:
        """Return the parameters of block reconstruction, None for no epochs."""
        if not self.reconstruct_epochs:
            return None
        return ReconstructionParameters(epochs=self.reconstruct_epochs, max_tokens=None, max_distinct_tokens=None)


def load_shrink_config(path: Path | None, overrides: dict[str, Any]) -> ShrinkConfig:
    """Make a config from a YAML file, with every override that is not None on top.

    An override of one way to say how much is removed clears the file's other ways.

    Raises:
        ConfigError: for a missing or broken file, unknown keys, or values of the wrong kind.
    """
    return load_config(ShrinkConfig, path, overrides, _merge)


def _merge(values: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    for pair in _ALTERNATIVES:
        for key, other in (pair, pair[::-1]):
            if key in overrides and other not in overrides:
                values.pop(other, None)
    if "speedup" in overrides:
        values = {name: value for name, value in values.items() if name not in _CUTS}
    elif any(name in overrides for name in _CUTS):
        values.pop("speedup", None)
    return {**values, **overrides}


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
