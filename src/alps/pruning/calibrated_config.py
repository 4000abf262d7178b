"""Settings that `alps prune` and `alps shrink` share: the model, its calibration, and the limits of a run."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from alps.core.json_text import to_json
from alps.core.run_config import RunConfig
from alps.core.settings import BOS, CALIBRATION, MODEL, RESOURCES, WHAT, Setting, describe_fields


class CalibratedConfig(RunConfig):
    """Base of the configs of runs that keep a journal."""

    model: Annotated[str, Setting(WHAT, affects_weights=False)] = Field(description=MODEL)
    calibration: Annotated[str, Setting(CALIBRATION, "TEXT", affects_weights=False)] = Field(
        default="c4",
        description="Calibration text: a text or .jsonl file, wikitext2, c4, ptb, python-docs, or self (sampled from "
        "the model); a mix is written TEXT:WEIGHT,TEXT:WEIGHT.",
    )
    samples: Annotated[int, Setting(CALIBRATION, "N")] = Field(default=128, ge=1, description="Calibration windows.")
    seqlen: Annotated[int, Setting(CALIBRATION, "N")] = Field(
        default=2048, ge=2, description="Tokens per calibration window."
    )
    seed: Annotated[int, Setting(CALIBRATION, "N")] = Field(
        default=0, ge=0, lt=2**63, description="Seed of the choice of calibration windows."
    )
    bos: Annotated[bool, Setting(CALIBRATION)] = Field(default=False, description=BOS)
    offload: Annotated[bool, Setting(RESOURCES, affects_weights=False)] = Field(
        default=False, description="Keep activations in CPU memory between blocks."
    )
    activation_memory: Annotated[float | None, Setting(RESOURCES, "GIB", default="no limit", affects_weights=False)] = (
        Field(
            default=None,
            ge=0,
            allow_inf_nan=False,
            description="GiB of activations to keep in memory; the others go to files next to OUT.",
        )
    )

    @property
    def activation_bytes(self) -> int | None:
        """Limit of the activations in memory in bytes, None for no limit."""
        return None if self.activation_memory is None else int(self.activation_memory * 2**30)

    def fingerprint_fields(self) -> dict[str, str]:
        """Return every setting that the weights depend on, by name, as text, in the order of `describe_fields`.

        Model and calibration text are left out: a run identifies them by their content.
        """
        names = [field.name for field in describe_fields(type(self)) if field.setting.affects_weights]
        values = self.model_dump(mode="json", include=set(names))
        return {name: value if isinstance(value := values[name], str) else to_json(value) for name in names}
