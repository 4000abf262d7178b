"""Settings of `alps eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, Field

from alps.core.errors import ConfigError
from alps.core.run_config import RunConfig
from alps.core.settings import BOS, MEASUREMENTS, TASKS, Setting
from alps.pruning.config import split_names


class EvaluateConfig(RunConfig):
    """All settings of `alps eval`."""

    model: Annotated[str, Setting(MEASUREMENTS)] = Field(
        description="Model: a directory, packed or not, a .gguf file, a hub name (owner/name), or smollm2-135m."
    )
    texts: Annotated[list[str], Setting(MEASUREMENTS, "TEXT", flag="text", repeated=True)] = Field(
        default=[],
        description="Text for perplexity: a text or .jsonl file, wikitext2:FILE for a raw WikiText-2 file, or "
        "wikitext2, c4, ptb, python-docs; repeatable.",
    )
    reference: Annotated[str | None, Setting(MEASUREMENTS, "MODEL")] = Field(
        default=None, description="The dense model, from which the divergence on the same windows is measured."
    )
    seqlen: Annotated[int, Setting(MEASUREMENTS, "N")] = Field(
        default=2048, ge=2, description="Tokens per window of a text."
    )
    windows: Annotated[int | None, Setting(MEASUREMENTS, "N", default="all")] = Field(
        default=None, ge=1, description="Use only the first N windows of each text."
    )
    bos: Annotated[bool, Setting(MEASUREMENTS)] = Field(default=False, description=BOS)
    card: Annotated[bool, Setting(MEASUREMENTS)] = Field(
        default=False, description="Add the figures to the metadata of MODEL's README.md, in the form that hubs read."
    )
    tasks: Annotated[list[str], BeforeValidator(split_names), Setting(TASKS, "NAME,...")] = Field(
        default=[], description="Zero-shot tasks, such as piqa,arc_easy; they need the package lm-eval."
    )
    task_data: Annotated[str | None, Setting(TASKS, "FOLDER", default="lm-eval's, from the hub")] = Field(
        default=None, description="Folder of local items, TASK.jsonl each."
    )
    limit: Annotated[int | None, Setting(TASKS, "N", default="all")] = Field(
        default=None, ge=1, description="Score only the first N items of each task."
    )
    batch_size: Annotated[int, Setting(TASKS, "N")] = Field(default=8, ge=1, description="Sequences in a forward.")

    @property
    def task_folder(self) -> Path | None:
        """Folder of local items, None for lm-eval's own."""
        return None if self.task_data is None else Path(self.task_data)

    def check_needed(self) -> None:
        """Reject a run that measures nothing, and settings without an effect.

        Raises:
            ConfigError: naming the option that is missing.
        """
        settings = self.model_fields_set
        for option, names in (
            ("texts", ("reference", "windows", "bos")),
            ("tasks", ("task_data", "limit", "batch_size")),
        ):
            for name in names:
                if option not in settings and name in settings:
                    raise _no_effect(name, option.removesuffix("s") if option == "texts" else option)
        if not settings & {"texts", "tasks"}:
            raise ConfigError("There is nothing to measure: give --text, --tasks or both.")


def _no_effect(name: str, option: str) -> ConfigError:
    flag = f"--{name.replace('_', '-')}"
    return ConfigError(f"{flag} has no effect without --{option}: give --{option} too, or leave {flag} out.")
