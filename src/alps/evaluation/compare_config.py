"""What a comparison is asked to do: methods, patterns and seeds on one model, measured on the same texts and tasks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from alps.core.errors import CheckpointError, ConfigError
from alps.core.yaml_io import format_validation_error, read_value, read_yaml
from alps.pruning.config import PruneConfig, load_prune_config
from alps.pruning.presets import PRESETS

COMPARISON_NAME = "compare.yaml"
# A comparison may grow in these; everything else has to stay as it was for its runs to be comparable.
_MAY_GROW = ("methods", "sparsity", "pattern", "seeds")


class Combination(BaseModel):
    """One run of a comparison; what tells it apart is `alps.reporting.compare_results.Result.key`."""

    model_config = ConfigDict(frozen=True)

    method: str
    pattern: str
    seed: int
    settings: PruneConfig

    @property
    def key(self) -> tuple[str, str, int | None]:
        return self.method, self.pattern, self.seed

    @property
    def title(self) -> str:
        """As progress and errors name it."""
        return f"{self.method} {self.pattern}, seed {self.seed}"


class CompareConfig(BaseModel):
    """Settings of `alps compare`. Unknown keys are refused.

    Attributes:
        model: directory, GGUF file, hub name, or `smollm2-135m`.
        methods: each a method or a preset, with settings of `alps prune` after plus signs: `wanda+refit`,
            `alps+order=sequential+target=0.4`.
        sparsity, pattern: fractions of zeros, and N:M patterns; together at least one.
        seeds: how many, counted from 0; each draws its own calibration windows.
        calibration, samples, seqlen: as in `alps.pruning.config.PruneConfig`.
        texts, eval_seqlen, windows: what perplexity and divergence are taken on, as for `alps eval`.
        tasks, task_data, limit: zero-shot tasks, as for `alps eval`.
        prompts, prompt_tokens: to be continued greedily by every model, and by how many tokens.
        device, dtype: as in `alps.pruning.config.PruneConfig`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    model: str
    methods: list[str] = Field(default=["magnitude", "wanda", "sparsegpt", "dsnot", "alps"], min_length=1)
    sparsity: list[float] = []
    pattern: list[str] = []
    seeds: int = Field(default=1, ge=1)
    calibration: str = "c4"
    samples: int = Field(default=128, ge=1)
    seqlen: int = Field(default=2048, ge=2)
    texts: list[str] = ["wikitext2", "c4"]
    eval_seqlen: int = Field(default=2048, ge=2)
    windows: int | None = Field(default=None, ge=1)
    tasks: list[str] = []
    task_data: str | None = None
    limit: int | None = Field(default=None, ge=1)
    prompts: list[str] = []
    prompt_tokens: int = Field(default=48, ge=1)
    device: str = "auto"
    dtype: str = "auto"

    def combinations(self) -> list[Combination]:
        """All runs: the first seed of everything first, so that an early table is a whole one.

        Raises:
            ConfigError: for no pattern, no text and no task, the same run twice, or settings that do not exist.
        """
        if not self.sparsity and not self.pattern:
            raise ConfigError("There is no pattern to prune to: give --sparsity (such as 0.5,0.7), --pattern, or both.")
        if not self.texts and not self.tasks:
            raise ConfigError("There is nothing to measure: give --text, --tasks or both.")
        if self.task_data is not None and not self.tasks:
            raise ConfigError("--task-data has no effect without --tasks: give --tasks too, or leave it out.")
        found = list(self._all())
        for one in found:
            if sum(one.key == other.key for other in found) > 1:
                raise ConfigError(f"The run {one.title} is asked for twice: name each method and pattern once.")
        return found

    def _all(self) -> Iterator[Combination]:
        for seed in range(self.seeds):
            aims: list[dict[str, Any]] = [{"sparsity": one} for one in self.sparsity]
            for aim in [*aims, *({"pattern": one} for one in self.pattern)]:
                for method in self.methods:
                    settings = self._settings(method, aim, seed)
                    pattern = aim["pattern"] if "pattern" in aim else f"{aim['sparsity']:g}"
                    yield Combination(method=method, pattern=pattern, seed=seed, settings=settings)

    def _settings(self, method: str, aim: dict[str, Any], seed: int) -> PruneConfig:
        shared = {key: getattr(self, key) for key in ("model", "calibration", "samples", "seqlen", "device", "dtype")}
        return load_prune_config(None, {**shared, "seed": seed, **aim, **method_settings(method)})

    def check_continues(self, folder: Path) -> None:
        """Refuse to go on with a comparison that was begun with other settings, named in the sentence.

        Raises:
            CheckpointError: when what is in `folder` was measured under other conditions.
        """
        path = folder / COMPARISON_NAME
        if not path.exists():
            return
        before = load_compare_config(path, {})
        for key in type(self).model_fields:
            old, new = getattr(before, key), getattr(self, key)
            if key not in _MAY_GROW and old != new:
                raise CheckpointError(
                    f"'{folder}' holds a comparison with {key} {old!r}, and {new!r} is asked for: "
                    "give the same settings to go on with it, or another --out."
                )

    def to_yaml(self) -> str:
        """The settings, one key a line."""
        return yaml.safe_dump(self.model_dump(), sort_keys=False, allow_unicode=True)


def load_compare_config(path: Path | None, overrides: dict[str, Any]) -> CompareConfig:
    """Settings of a comparison from a YAML file, with every override that is not None on top.

    Raises:
        ConfigError: for a missing or broken file, unknown keys, or values of the wrong kind.
    """
    values = read_yaml(path) if path else {}
    given = {key: value for key, value in overrides.items() if value is not None}
    try:
        return CompareConfig.model_validate({**values, **given})
    except ValidationError as error:
        where = str(path) if path else "the command line"
        raise ConfigError(format_validation_error(error, where, CompareConfig.model_fields)) from None


def method_settings(method: str) -> dict[str, Any]:
    """Settings of `alps prune` for a method or a preset and what follows it after plus signs.

    `alps+order=sequential+target=0.4`; a key alone is true, as in `wanda+refit`.
    """
    name, *words = method.split("+")
    return {"preset" if name in PRESETS else "method": name, **dict(map(_setting, words))}


def _setting(word: str) -> tuple[str, Any]:
    key, equals, value = word.partition("=")
    if key == "keep_dense" and equals:
        return key, value  # a name may begin with a star, which YAML would take for something else
    return key, read_value(value, word) if equals else True
