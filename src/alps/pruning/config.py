"""Settings of a pruning run: one description for command line, YAML, `alps.prune` and docs/reference/settings.md."""

from __future__ import annotations

import dataclasses
import math
import reprlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError, model_validator

from alps.core.errors import ConfigError, did_you_mean, truncate
from alps.core.settings import HOW, WHAT, Setting, load_config
from alps.core.yaml_io import read_mapping
from alps.finetuning.reconstruction_parameters import DEFAULT_RECONSTRUCT_TARGET, ReconstructionParameters
from alps.pruning.calibrated_config import CalibratedConfig
from alps.pruning.presets import PAPER, PRESETS, apply_preset
from alps.solvers.names import EFFORT_NAMES, METHOD_NAMES

# Help texts are made from configs, and do not wait for torch: what needs it is imported by the methods.
if TYPE_CHECKING:
    from alps.pruning.layer_rules import Rules
    from alps.pruning.recipe import PruneRecipe
    from alps.solvers.base import Method
    from alps.solvers.patterns import Pattern

SETTINGS_NAME = "alps.yaml"

_BY_PRESET = "by preset"


def split_names(names: Any) -> Any:
    """Split a text with commas into names; return anything else unchanged."""
    return [name for part in names.split(",") if (name := part.strip())] if isinstance(names, str) else names


def split_overrides(overrides: Any) -> Any:
    """Split `NAME=PATTERN,NAME=PATTERN` into a dictionary; return anything else unchanged.

    Raises:
        ConfigError: for a part without an equals sign.
    """
    if not isinstance(overrides, str):
        return overrides
    pairs = [part.rpartition("=") for part in split_names(overrides)]
    for rule, _, pattern in pairs:
        if not rule:
            raise ConfigError(
                f"Override '{truncate(pattern)}' names no layers: write NAME=PATTERN, such as *.k_proj=0.5."
            )
    return {rule.strip(): _override_value(value.strip()) for rule, _, value in pairs}


def _override_value(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def parse_options(options: Any) -> Any:
    """Read a mapping from a YAML text such as `{damping: 0.02}`; return anything else unchanged.

    Raises:
        ConfigError: for a text that is not a YAML mapping.
    """
    return read_mapping(options, "options") if isinstance(options, str) else options


class PruneConfig(CalibratedConfig):
    """All settings of a pruning run; those that are not given take the values of the `preset`."""

    sparsity: Annotated[float | None, Setting(WHAT, "SHARE")] = Field(
        default=None,
        description="Share of the weights to remove from every linear layer, such as 0.7; this or --pattern.",
    )
    pattern: Annotated[str | None, Setting(WHAT, "N:M")] = Field(
        default=None, description="Keep N of every M consecutive inputs, such as 2:4; this or --sparsity."
    )
    overrides: Annotated[
        dict[str, float | str], BeforeValidator(split_overrides), Setting(WHAT, "NAME=PATTERN,...")
    ] = Field(
        default={}, description="Own sparsity or pattern for layers by name, with *: '*.k_proj=0.5,*.v_proj=2:4'."
    )
    keep_dense: Annotated[list[str], BeforeValidator(split_names), Setting(WHAT, "NAME,...")] = Field(
        default=[], description="Names of layers to leave dense, with *: 'model.layers.0.*,*.down_proj'."
    )
    keep_zeros: Annotated[bool, Setting(WHAT)] = Field(
        default=False, description="Keep the zeros that the model already has, and count them towards the sparsity."
    )
    method: Annotated[str, Setting(HOW, "NAME", METHOD_NAMES)] = Field(default="alps", description="Pruning method.")
    effort: Annotated[str, Setting(HOW, "NAME", EFFORT_NAMES)] = Field(
        default="normal",
        description="Iterations of ALPS: high runs several times as many as normal, for a smaller error.",
    )
    refit: Annotated[bool, Setting(HOW)] = Field(
        default=False, description="After any method, compute the optimal weights on its mask by conjugate gradients."
    )
    options: Annotated[dict[str, Any], BeforeValidator(parse_options), Setting(HOW, "YAML")] = Field(
        default={}, description="Hyper-parameters of the method, such as '{damping: 0.02, admm: {rho: 0.3}}'."
    )
    preset: Annotated[str, Setting(HOW, "NAME", tuple(PRESETS), affects_weights=False)] = Field(
        default=PAPER,
        description="Defaults for the settings marked 'by preset'; best needs 131,072 calibration tokens or more.",
    )
    true_sequential: Annotated[bool, Setting(HOW, default=_BY_PRESET)] = Field(
        default=False,
        description="Prune the layers of a block one after the other, each on inputs that the pruning has changed.",
    )
    dense_target: Annotated[float, Setting(HOW, "SHARE", default=_BY_PRESET)] = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Share of the dense model's outputs in what a layer is fitted to, from 0 to 1.",
    )
    allocation: Annotated[
        Literal["uniform", "owl", "error", "sensitivity"], Setting(HOW, "NAME", default=_BY_PRESET)
    ] = Field(default="uniform", description="Distribution of the zeros over the layers.")
    row_weights: Annotated[Literal["equal", "block-output"], Setting(HOW, "NAME", default=_BY_PRESET)] = Field(
        default="equal",
        description="Weight of each output channel in a layer's error: by its effect on the block's output, or equal.",
    )
    reconstruct_epochs: Annotated[int, Setting(HOW, "N", default=_BY_PRESET)] = Field(
        default=0,
        ge=0,
        description="Epochs of block reconstruction: tuning the kept weights to the dense block's outputs on the first "
        "32,768 tokens. Training ends after 98,304 tokens.",
    )
    reconstruct_target: Annotated[float, Setting(HOW, "SHARE", default=_BY_PRESET)] = Field(
        default=DEFAULT_RECONSTRUCT_TARGET,
        ge=0,
        le=1,
        description="Share of the dense model's hidden states in the target of block reconstruction, from 0 to 1; the "
        "last block always aims at the dense model's predictions.",
    )
    measure_error: Annotated[bool, Setting(HOW)] = Field(
        default=True,
        description="Measure the reconstruction error of every layer, also for methods that do not need it.",
    )

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        by_rows = _prunes_by_rows(str(values.get("method", "alps")))
        return apply_preset(values, semi_structured=values.get("pattern") is not None, by_rows=by_rows)

    def build_pattern(self) -> Pattern:
        """Return the pattern.

        Raises:
            ConfigError: when both or neither of `sparsity` and `pattern` are given, or one is out of range.
        """
        from alps.solvers.patterns import SemiStructured, Unstructured, parse_pattern

        if (self.sparsity is None) == (self.pattern is None):
            raise ConfigError("Give either --sparsity (such as 0.7) or --pattern (such as 2:4), and not both.")
        if self.sparsity is not None:
            return Unstructured(self.sparsity)
        assert self.pattern is not None
        pattern = parse_pattern(self.pattern)
        if not isinstance(pattern, SemiStructured):
            raise ConfigError(f"Pattern '{self.pattern}' is not N:M: write 2:4, or use --sparsity for a fraction.")
        return pattern

    def build_method(self) -> Method:
        """Return the method with its options.

        Raises:
            ConfigError: for an unknown method, effort or option, or an option of the wrong kind.
        """
        from alps.solvers import Refitted, get_method

        base = _with_options(
            get_method(self.method, effort=self.effort),
            self.options,
            f"options of method '{self.method}'",
        )
        return Refitted(base) if self.refit else base

    def reconstruction(self) -> ReconstructionParameters | None:
        """Return the parameters of block reconstruction, None for no epochs.

        Raises:
            ConfigError: for a target without epochs.
        """
        if self.reconstruct_epochs:
            return ReconstructionParameters(epochs=self.reconstruct_epochs, target=self.reconstruct_target)
        if self.reconstruct_target != DEFAULT_RECONSTRUCT_TARGET:
            raise ConfigError(
                f"A reconstruct target of {self.reconstruct_target:g} has no effect without block reconstruction: give "
                "--reconstruct-epochs 1, or leave it out."
            )
        return None

    def rules(self) -> Rules:
        """Return the rules by layer name.

        Raises:
            ConfigError: for an override that is not a pattern.
        """
        from alps.pruning.layer_rules import Rules, parse_overrides

        return Rules(tuple(self.keep_dense), parse_overrides(self.overrides))

    def resolve(self, *, method: Method | None = None) -> PruneRecipe:
        """Return method, pattern and options as objects.

        Args:
            method: method object in place of the one named by `method`.

        Raises:
            ConfigError: for settings that do not exist or contradict each other.
        """
        from alps.pruning.recipe import PruneRecipe

        return PruneRecipe(
            method=method or self.build_method(),
            pattern=self.build_pattern(),
            rules=self.rules(),
            keep_zeros=self.keep_zeros,
            true_sequential=self.true_sequential,
            dense_target=self.dense_target,
            allocation=self.allocation,
            row_weights=self.row_weights,
            reconstruction=self.reconstruction(),
            measure_error=self.measure_error,
        )


def _prunes_by_rows(method: str) -> bool:
    from alps.solvers import METHODS

    return method in METHODS and METHODS[method]().by_rows


def load_prune_config(path: Path | None, overrides: dict[str, Any]) -> PruneConfig:
    """Make a config from a YAML file, with every override that is not None on top.

    A `sparsity` override also clears the file's `pattern`, and the other way round.

    Raises:
        ConfigError: for a missing or broken file, unknown keys, or values of the wrong kind.
    """
    return load_config(PruneConfig, path, overrides, _merge)


def _merge(values: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    for key, other in (("sparsity", "pattern"), ("pattern", "sparsity")):
        if key in overrides and other not in overrides:
            values.pop(other, None)
    return {**values, **overrides}


def _with_options(method: Any, options: dict[str, Any], where: str) -> Any:
    """Return a frozen dataclass with some of its fields replaced, checked against their types."""
    fields = {field.name: field for field in dataclasses.fields(method)}
    changes = {}
    for key, value in options.items():
        if key not in fields:
            raise ConfigError(
                f"Setting '{truncate(key)}' is not among the {where} ({', '.join(fields) or 'it has none'})."
                f"{did_you_mean(str(key), fields)}"
            )
        if isinstance(value, float | int) and not 0 <= value < math.inf:
            raise ConfigError(f"Setting '{key}' of the {where} is wrong: {reprlib.repr(value)} is below 0 or infinite.")
        current = getattr(method, key)
        if dataclasses.is_dataclass(current) and isinstance(value, dict):
            changes[key] = _with_options(current, value, f"{key} {where}")
            continue
        try:
            changes[key] = TypeAdapter(_hints(method)[key]).validate_python(value)
        except ValidationError as error:
            reason = f"{error.errors()[0]['msg'].lower()}, not {reprlib.repr(value)}"
            raise ConfigError(f"Setting '{key}' of the {where} is wrong: {reason}.") from None
    return dataclasses.replace(method, **changes)


def _hints(method: Any) -> dict[str, Any]:
    return get_type_hints(type(method))
