"""The settings of a pruning run: validated, read from YAML, overridden by flags, saved beside the weights."""

from __future__ import annotations

import dataclasses
import json
import math
import reprlib
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import torch
import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from alps.core.device import pick_device
from alps.core.errors import ConfigError, did_you_mean, truncate
from alps.core.yaml_io import format_validation_error, read_yaml
from alps.finetuning.block_reconstruction import DEFAULT_RECONSTRUCT_TARGET, ReconstructionParameters
from alps.pruning.layer_rules import Rules, parse_overrides
from alps.pruning.presets import PAPER, apply_preset
from alps.pruning.recipe import PruneRecipe
from alps.solvers import METHODS, Method, Refitted, get_method
from alps.solvers.dense_target import parse_target
from alps.solvers.patterns import Pattern, SemiStructured, Unstructured, parse_pattern

SETTINGS_NAME = "alps.yaml"


def split_names(names: Any) -> Any:
    """The names in a text with commas; anything else as it is."""
    return [name for part in names.split(",") if (name := part.strip())] if isinstance(names, str) else names


class PruneConfig(BaseModel):
    """What `alps prune` was asked to do. Unknown keys are refused.

    Attributes:
        model: directory, GGUF file, hub name, or `smollm2-135m`.
        sparsity: fraction of every site's weights to remove, or None when `pattern` is given.
        pattern: N:M with the number kept first, or None when `sparsity` is given.
        method: a name of `alps.solvers.METHODS`.
        options: hyper-parameters of the method by name; nested for ALPS's `admm`.
        effort: `high` lets ALPS take several times as long for a smaller error; see `alps.solvers.admm.EFFORTS`.
        refit: optimal weights on the method's support, by conjugate gradients.
        preset: one of `alps.pruning.presets.PRESETS`; what it says holds where nothing else is said.
        order: `block` or `sequential`, see `alps.pruning.pipeline.BlockPruner`.
        target: `pruned`, `dense`, or a share of the dense target between 0 and 1; see `alps.solvers.dense_target`.
        match: epochs of block matching, see `alps.finetuning.block_reconstruction`; 0 for none.
        match_target: what it aims at: `pruned`, `dense`, or a share of the dense stream between 0 and 1.
        budget: where the zeros go, one of `alps.pruning.sparsity_allocation.ALLOCATIONS`.
        channels: what the rows of a site count: `equal`, or `block-output`, see `alps.pruning.row_weights`.
        keep_dense: names with wildcards of what stays dense, see `alps.pruning.layer_rules`; one text with commas, too.
        overrides: sparsity or N:M of the linear layers that a name with wildcards names, in place of the one above; of
            several that name a layer the last one holds.
        respect_zeros: zeros that the model has stay zero, and count towards the sparsity.
        calibration: text, `self` or a mix, see `alps.data.mixture.load_calibration`.
        samples, seqlen, seed: calibration windows, tokens in each, and how they are drawn.
        device, dtype: `auto` takes the first GPU if any, and the checkpoint's dtype.
        offload: keep activations on the CPU between blocks.
        activation_memory: GiB of activations kept in memory between blocks; the rest goes to files beside the output.
        errors: measure every site's reconstruction error, also for methods that do without the Gram.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    model: str
    sparsity: float | None = None
    pattern: str | None = None
    method: str = "alps"
    effort: str = "normal"
    options: dict[str, Any] = {}
    refit: bool = False
    preset: str = PAPER
    order: Literal["block", "sequential"] = "block"
    target: str | float = "pruned"
    match: int = Field(default=0, ge=0)
    match_target: str | float = DEFAULT_RECONSTRUCT_TARGET
    budget: str = "uniform"
    channels: Literal["equal", "block-output"] = "equal"
    keep_dense: Annotated[list[str], BeforeValidator(split_names)] = []
    overrides: dict[str, float | str] = {}
    respect_zeros: bool = False
    calibration: str = "c4"
    samples: int = Field(default=128, ge=1)
    seqlen: int = Field(default=2048, ge=2)
    seed: int = Field(default=0, ge=0, lt=2**63)
    device: str = "auto"
    dtype: str = "auto"
    offload: bool = False
    activation_memory: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    errors: bool = True

    def build_pattern(self) -> Pattern:
        """The pattern asked for.

        Raises:
            ConfigError: when both or neither of `sparsity` and `pattern` are given, or one is out of range.
        """
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
        """The method with its options.

        Raises:
            ConfigError: for an unknown method, effort or option, or an option of the wrong kind.
        """
        base = _with_options(
            get_method(self.method, effort=self.effort),
            self.options,
            f"options of method '{self.method}'",
        )
        return Refitted(base) if self.refit else base

    def target_share(self) -> float:
        """Share of the dense target; see `parse_target`."""
        return parse_target(self.target)

    def matching(self) -> ReconstructionParameters | None:
        """Block matching, if it is asked for; see `make_reconstruction`."""
        return make_reconstruction(self.match, self.match_target)

    def rules(self) -> Rules:
        """What is said of parts of the model by name.

        Raises:
            ConfigError: for an override that is no pattern.
        """
        return Rules(tuple(self.keep_dense), parse_overrides(self.overrides))

    def resolve(self) -> PruneRecipe:
        """Method, pattern and options as objects.

        Raises:
            ConfigError: for settings that do not exist or contradict each other.
        """
        pattern = self.build_pattern()
        return PruneRecipe(
            method=self.build_method(),
            pattern=pattern,
            rules=self.rules(),
            keep_zeros=self.respect_zeros,
            true_sequential=self.order == "sequential",
            dense_target=self.target_share(),
            allocation=self.budget,
            row_weights=self.channels,
            reconstruction=self.matching(),
            measure_error=self.errors,
        )

    def place(self) -> torch.device:
        """The device to run on.

        Raises:
            ConfigError: when it does not exist here.
        """
        return pick_device(self.device)

    def facts(self) -> dict[str, str]:
        """Every setting that the pruned weights depend on, by name; model and text are told by their content."""
        apart = {"model", "calibration", "device", "offload", "activation_memory", "preset"}
        values = self.model_dump(mode="json", exclude=apart)
        return {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}

    def to_yaml(self) -> str:
        """The resolved settings, one key a line."""
        return yaml.safe_dump(self.model_dump(), sort_keys=False, allow_unicode=True)


def make_reconstruction(epochs: int, target: str | float) -> ReconstructionParameters | None:
    """Block matching of so many epochs, None for 0 of them.

    Raises:
        ConfigError: for a target that is none, or another than the default where nothing is matched.
    """
    share = parse_target(target, "match_target")
    if not epochs and share != DEFAULT_RECONSTRUCT_TARGET:
        raise ConfigError(
            f"Match target '{target}' aims at nothing where nothing is matched: give --match 1, or leave it out."
        )
    return ReconstructionParameters(epochs=epochs, target=share) if epochs else None


def load_prune_config(path: Path | None, overrides: dict[str, Any]) -> PruneConfig:
    """Settings from a YAML file, with every override that is not None on top.

    A `sparsity` override also clears the file's `pattern`, and the other way round.

    Raises:
        ConfigError: for a missing or broken file, unknown keys, or values of the wrong kind.
    """
    values = read_yaml(path) if path else {}
    given = {key: value for key, value in overrides.items() if value is not None}
    for key, other in (("sparsity", "pattern"), ("pattern", "sparsity")):
        if key in given and other not in given:
            values.pop(other, None)
    chosen = {**values, **given}
    method = METHODS.get(str(chosen.get("method", "alps")))
    by_rows = method is not None and method().by_rows
    resolved = apply_preset(chosen, chosen.get("pattern") is not None, by_rows)
    try:
        return PruneConfig.model_validate(resolved)
    except ValidationError as error:
        raise ConfigError(
            format_validation_error(error, str(path) if path else "the command line", PruneConfig.model_fields)
        ) from None


def _with_options(method: Any, options: dict[str, Any], where: str) -> Any:
    """A copy of a frozen dataclass with some of its fields replaced, checked against their types."""
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
