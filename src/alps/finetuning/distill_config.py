"""Settings of `alps distill`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from alps.core.errors import ConfigError
from alps.core.run_config import RunConfig
from alps.core.settings import CALIBRATION, HOW, Setting

if TYPE_CHECKING:
    from alps.finetuning.training_loop import Schedule

_MAX_HELD_BACK = 8


class DistillConfig(RunConfig):
    """All settings of `alps distill`."""

    minutes: Annotated[float | None, Setting(HOW, "MINUTES")] = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="Train for this time, evaluations on held-back windows included.",
    )
    steps: Annotated[int | None, Setting(HOW, "N")] = Field(
        default=None,
        ge=1,
        description="Train for this number of steps instead; equal settings then give equal weights.",
    )
    lr: Annotated[float, Setting(HOW, "RATE")] = Field(
        default=3e-4, gt=0, allow_inf_nan=False, description="Largest learning rate of Adam."
    )
    batch_tokens: Annotated[int, Setting(HOW, "N")] = Field(
        default=2048, ge=1, description="Tokens per step, rounded up to whole windows."
    )
    calibration: Annotated[str, Setting(CALIBRATION, "TEXT")] = Field(
        default="c4", description="Training text: a text or .jsonl file, wikitext2, c4, ptb or python-docs."
    )
    samples: Annotated[int, Setting(CALIBRATION, "N")] = Field(
        default=512, ge=2, description="Windows; an eighth of them, at most 8, is held back to choose the best weights."
    )
    seqlen: Annotated[int, Setting(CALIBRATION, "N")] = Field(default=512, ge=2, description="Tokens per window.")
    seed: Annotated[int, Setting(CALIBRATION, "N")] = Field(
        default=0, ge=0, lt=2**63, description="Seed of the choice and the order of the windows."
    )

    def schedule(self) -> Schedule:
        """Budget, batches and seed of the training.

        Raises:
            ConfigError: when both or neither of `minutes` and `steps` are given.
        """
        # Help texts are made from configs, and do not wait for torch.
        from alps.finetuning.training_loop import Schedule

        if (self.minutes is None) == (self.steps is None):
            raise ConfigError("Give either --minutes (such as 30) or --steps (such as 200), and not both.")
        seconds = None if self.minutes is None else 60 * self.minutes
        batch = -(-self.batch_tokens // self.seqlen)
        return Schedule(seconds, self.steps, batch, self.held_back, self.seed)

    @property
    def held_back(self) -> int:
        """Windows that are not trained on."""
        return min(max(self.samples // 8, 1), _MAX_HELD_BACK)
