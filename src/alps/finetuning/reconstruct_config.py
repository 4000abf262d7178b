"""Settings of `alps reconstruct`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from alps.core.run_config import RunConfig
from alps.core.settings import CALIBRATION, HOW, RESOURCES, Setting
from alps.finetuning.reconstruction_parameters import DEFAULT_RECONSTRUCT_TARGET, ReconstructionParameters


class ReconstructConfig(RunConfig):
    """All settings of `alps reconstruct`."""

    epochs: Annotated[int, Setting(HOW, "N")] = Field(
        default=1, ge=1, description="Passes over the calibration windows."
    )
    target: Annotated[float, Setting(HOW, "SHARE")] = Field(
        default=DEFAULT_RECONSTRUCT_TARGET,
        ge=0,
        le=1,
        description="Share of the dense model's hidden states in the target, from 0 to 1; 0 takes the dense block's "
        "output for the pruned model's inputs. The last block always aims at the dense model's predictions.",
    )
    lr: Annotated[float, Setting(HOW, "RATE")] = Field(
        default=3e-4, gt=0, allow_inf_nan=False, description="Largest learning rate of Adam."
    )
    calibration: Annotated[str, Setting(CALIBRATION, "TEXT")] = Field(
        default="c4", description="Calibration text, as in `alps prune`; self is sampled from the dense model."
    )
    samples: Annotated[int, Setting(CALIBRATION, "N")] = Field(
        default=128,
        ge=2,
        description="Calibration windows; at least one of them is held back to choose the best weights.",
    )
    seqlen: Annotated[int, Setting(CALIBRATION, "N")] = Field(
        default=2048, ge=2, description="Tokens per calibration window."
    )
    seed: Annotated[int, Setting(CALIBRATION, "N")] = Field(
        default=0, ge=0, lt=2**63, description="Seed of the choice and the order of the calibration windows."
    )
    offload: Annotated[bool, Setting(RESOURCES)] = Field(
        default=False, description="Keep activations in CPU memory between blocks."
    )

    def parameters(self) -> ReconstructionParameters:
        """Return the parameters of the block reconstruction."""
        return ReconstructionParameters(
            epochs=self.epochs, max_tokens=None, max_distinct_tokens=None, target=self.target, lr=self.lr
        )
