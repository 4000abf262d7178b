"""Settings of `alps compare`, and the runs that they stand for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from alps.core.errors import CheckpointError, ConfigError
from alps.core.run_config import RunConfig
from alps.core.settings import BOS, CALIBRATION, MEASUREMENTS, MODEL, WHAT, Setting, load_config
from alps.core.yaml_io import read_value
from alps.pruning.config import PruneConfig, load_prune_config, split_names
from alps.pruning.presets import PRESETS
from alps.solvers.names import METHOD_NAMES

COMPARISON_NAME = "compare.yaml"
# Settings that may change when a comparison is continued; with other changes its runs would not be comparable.
_EXTENDABLE = ("methods", "sparsity", "pattern", "seeds")


def split_numbers(numbers: Any) -> Any:
    """Split a text with commas into numbers; return anything else unchanged.

    Raises:
        ConfigError: for a part that is not a number.
    """
    if not isinstance(numbers, str):
        return numbers
    try:
        return [float(word) for word in split_names(numbers)]
    except ValueError:
        raise ConfigError(f"Sparsities '{numbers}' are not numbers: write them as 0.5,0.7.") from None


class ComparisonRun(BaseModel):
    """Run of a comparison.

    Attributes:
        method, pattern, seed: names in tables, and the key of the run.
        config: settings of the pruning run.
    """

    model_config = ConfigDict(frozen=True)

    method: str
    pattern: str
    seed: int
    config: PruneConfig

    @property
    def key(self) -> tuple[str, str, int | None]:
        """Identity of the run, as in `alps.reporting.compare_results.Result.key`."""
        return self.method, self.pattern, self.seed

    @property
    def title(self) -> str:
        """Name of the run in messages."""
        return f"{self.method} {self.pattern}, seed {self.seed}"


class CompareConfig(RunConfig):
    """All settings of `alps compare`."""

    model: Annotated[str, Setting(WHAT)] = Field(description=MODEL)
    methods: Annotated[list[str], BeforeValidator(split_names), Setting(WHAT, "NAME,...")] = Field(
        default=["magnitude", "wanda", "sparsegpt", "dsnot", "alps"],
        min_length=1,
        description=f"Methods and presets, of {', '.join([*METHOD_NAMES, *PRESETS])}. Settings of `alps prune` may "
        "follow each after plus signs, as in wanda+refit or alps+dense_target=0.4.",
    )
    sparsity: Annotated[list[float], BeforeValidator(split_numbers), Setting(WHAT, "SHARE,...")] = Field(
        default=[], description="Shares of the weights to remove, such as 0.5,0.7."
    )
    pattern: Annotated[list[str], BeforeValidator(split_names), Setting(WHAT, "N:M,...")] = Field(
        default=[], description="N:M patterns, such as 2:4,4:8."
    )
    seeds: Annotated[int, Setting(CALIBRATION, "N")] = Field(
        default=1, ge=1, description="Number of calibration draws, for mean and deviation; the seeds count from 0."
    )
    calibration: Annotated[str, Setting(CALIBRATION, "TEXT")] = Field(
        default="c4", description="Calibration text, as in `alps prune`."
    )
    samples: Annotated[int, Setting(CALIBRATION, "N")] = Field(default=128, ge=1, description="Calibration windows.")
    seqlen: Annotated[int, Setting(CALIBRATION, "N")] = Field(
        default=2048, ge=2, description="Tokens per calibration window."
    )
    bos: Annotated[bool, Setting(CALIBRATION)] = Field(default=False, description=BOS)
    texts: Annotated[list[str], Setting(MEASUREMENTS, "TEXT", flag="text", repeated=True)] = Field(
        default=["wikitext2", "c4"], description="Text for perplexity and divergence, as in `alps eval`; repeatable."
    )
    eval_seqlen: Annotated[int, Setting(MEASUREMENTS, "N")] = Field(
        default=2048, ge=2, description="Tokens per window of such a text."
    )
    windows: Annotated[int | None, Setting(MEASUREMENTS, "N", default="all")] = Field(
        default=None, ge=1, description="Use only the first N windows of each text."
    )
    tasks: Annotated[list[str], BeforeValidator(split_names), Setting(MEASUREMENTS, "NAME,...")] = Field(
        default=[], description="Zero-shot tasks; they need the package lm-eval."
    )
    task_data: Annotated[str | None, Setting(MEASUREMENTS, "FOLDER", default="lm-eval's, from the hub")] = Field(
        default=None, description="Folder of local items, TASK.jsonl each."
    )
    limit: Annotated[int | None, Setting(MEASUREMENTS, "N", default="all")] = Field(
        default=None, ge=1, description="Score only the first N items of each task."
    )
    prompts: Annotated[list[str], Setting(MEASUREMENTS, "TEXT", flag="prompt", repeated=True)] = Field(
        default=[], description="Prompt that every model continues greedily; repeatable."
    )
    prompt_tokens: Annotated[int, Setting(MEASUREMENTS, "N")] = Field(
        default=48, ge=1, description="Tokens per continuation."
    )

    def runs(self) -> list[ComparisonRun]:
        """List all runs, those of the first seed first, so that an early table is complete.

        Raises:
            ConfigError: for no pattern, for no text and no task, for the same run twice, or for unknown settings.
        """
        if not self.sparsity and not self.pattern:
            raise ConfigError("There is no pattern to prune to: give --sparsity (such as 0.5,0.7), --pattern, or both.")
        if not self.texts and not self.tasks:
            raise ConfigError("There is nothing to measure: give --text, --tasks or both.")
        if self.task_data is not None and not self.tasks:
            raise ConfigError("--task-data has no effect without --tasks: give --tasks too, or leave it out.")
        runs = list(self._all_runs())
        for run in runs:
            if sum(run.key == other.key for other in runs) > 1:
                raise ConfigError(f"The run {run.title} occurs twice: name each method and pattern once.")
        return runs

    def _all_runs(self) -> Iterator[ComparisonRun]:
        for seed in range(self.seeds):
            patterns: list[tuple[str, dict[str, Any]]] = [
                (f"{share:g}", {"sparsity": share}) for share in self.sparsity
            ]
            patterns += [(pattern, {"pattern": pattern}) for pattern in self.pattern]
            for pattern, setting in patterns:
                for method in self.methods:
                    config = self._prune_config(method, setting, seed)
                    yield ComparisonRun(method=method, pattern=pattern, seed=seed, config=config)

    def _prune_config(self, method: str, pattern: dict[str, Any], seed: int) -> PruneConfig:
        shared = {
            key: getattr(self, key) for key in ("model", "calibration", "samples", "seqlen", "bos", "device", "dtype")
        }
        return load_prune_config(None, {**shared, "seed": seed, **pattern, **method_settings(method)})

    def check_continues(self, folder: Path) -> None:
        """Reject a directory with a comparison under other settings.

        Raises:
            CheckpointError: naming the first setting that differs.
        """
        path = folder / COMPARISON_NAME
        if not path.exists():
            return
        before = load_compare_config(path, {})
        for key in type(self).model_fields:
            old, new = getattr(before, key), getattr(self, key)
            if key not in _EXTENDABLE and old != new:
                raise CheckpointError(
                    f"'{folder}' holds a comparison with {key} {old!r}, not {new!r}: "
                    "give the same settings to continue it, or another OUT."
                )


def load_compare_config(path: Path | None, overrides: dict[str, Any]) -> CompareConfig:
    """Make the config of a comparison from a YAML file, with every override that is not None on top.

    Raises:
        ConfigError: for a missing or broken file, unknown keys, or values of the wrong kind.
    """
    return load_config(CompareConfig, path, overrides)


def method_settings(method: str) -> dict[str, Any]:
    """Parse a method or preset with settings after plus signs, as in `alps+true_sequential+dense_target=0.4`.

    Returns:
        Settings of `alps prune`; a key without a value is True, as in `wanda+refit`.
    """
    name, *words = method.split("+")
    return {"preset" if name in PRESETS else "method": name, **dict(map(_setting, words))}


def _setting(word: str) -> tuple[str, Any]:
    key, equals, value = word.partition("=")
    if key == "keep_dense" and equals:
        return key, value  # a star at the beginning is an alias in YAML
    return key, read_value(value, word) if equals else True
