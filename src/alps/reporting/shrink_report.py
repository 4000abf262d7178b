"""Report of a structured pruning run: what was removed from every block, at what error. It becomes `shrink.json`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from alps.core.errors import CheckpointError
from alps.core.json_text import to_json
from alps.reporting.records import CalibrationRecord, ReconstructionRecord, Record

SHRINK_REPORT_NAME = "shrink.json"

# Phases of a run, whose wall times are disjoint.
SHRINK_PHASES = {
    "load": "opening the model and its tokenizer",
    "removal": "choice of the blocks to remove, or of the mix for a speed",
    "experts": "choice of the experts to keep",
    "capture": "recording of the block inputs",
    "forward": "forward passes of all blocks, without those of the cuts",
    "cut": "sums of the inputs of output projections, choice of what stays, and refits",
    "reconstruct": "block reconstruction",
    "journal": "writing of finished blocks to the journal",
    "save": "writing of the checkpoint",
}


class BlockRemoval(Record):
    """Removal of one block.

    Attributes:
        block: index in the dense model.
        kl: KL(dense || shrunk) in nats after this removal and those before it, with nothing else removed; None for a
            block that the user named.
    """

    block: int
    kl: float | None


class ExpertCandidate(Record):
    """Set of experts that one selection keeps in all mixtures, and the quality of the model with it.

    Attributes:
        name: of the selection: `joint`, `REAP` or `MSAN`.
        kl: mean KL(dense || candidate) per token in nats, on calibration windows from which nothing is selected.
        repetition: share of repeated phrases of four tokens in greedy continuations.
    """

    name: str
    kl: float
    repetition: float


class ExpertSelection(Record):
    """Choice of the experts that stay; nothing is refitted or removed yet when it is made.

    Attributes:
        chosen: name of the candidate.
        candidates: that were compared.
        dense_repetition: repetition of the model with all experts.
        kept: experts that stay, ascending, by the index of the block.
    """

    chosen: str
    candidates: list[ExpertCandidate]
    dense_repetition: float
    kept: dict[int, list[int]]


class CutRecord(Record):
    """Removal of channels, heads or experts from one layer, and the refit of what stays.

    Attributes:
        layer: name of the layer that was refitted; of experts the name of the mixture.
        unit: `channel`, `head`, `kv_head`, `expert`, `expert_channel` or `shared_channel`.
        kept: indices of the units that stay, ascending; empty for `expert_channel`, since each expert has its own.
        total: number of units in the dense layer.
        error: ||V - W*||_H^2 / ||W*||_H^2 of the refitted weight V and its target W*, with weighted tokens; of experts
            the squared error of the mixture's output on held-out tokens, relative to the target's; of their channels
            the mean over the experts.
        error_before: of experts, the error before the refit.
        share: share of the dense model's hidden states in the target, 0 to 1, chosen on held-back tokens unless it is
            of experts.
        swaps: exchanges of a kept and a removed unit after the elimination.
        protected: units that were kept because they carry a massive activation.
        tokens: calibration tokens.
    """

    layer: str
    unit: str
    kept: list[int]
    total: int
    error: float
    error_before: float | None = None
    share: float
    swaps: int = 0
    protected: int = 0
    tokens: int


class ShrunkBlock(Record):
    """Outcome of one block that stays.

    Attributes:
        block: index in the dense model.
        cuts: removals in its layers, in the order of the forward.
        error: mean over tokens of ||shrunk - dense||^2 / ||dense||^2 of the hidden states behind the block; of the
            dense model they are those behind the removed blocks that follow it.
        reconstruction: record of its reconstruction; None without one.
        seconds: wall time by phase, and in all under `total`.
    """

    block: int
    cuts: list[CutRecord]
    error: float
    reconstruction: ReconstructionRecord | None
    seconds: dict[str, float]


class SizeRecord(Record):
    """Size of a model.

    Attributes:
        parameters, nbytes: of all weights, in the checkpoint's dtype.
        kv_bytes: key-value bytes of one token in the cache, in the same dtype; None where there is no such cache.
        fields: fields of the configuration that shrinking changes, by name.
    """

    parameters: int
    nbytes: int
    kv_bytes: int | None
    fields: dict[str, Any]


class LatencyRecord(Record):
    """Measured time of a generated token of a smaller structure.

    Attributes:
        blocks, mlp_width, heads: numbers of units; 0 for a kind that the model does not have.
        ratio: its time, in units of the dense model's.
    """

    blocks: int
    mlp_width: int
    heads: int
    ratio: float


class CandidateRecord(Record):
    """Mix of structure that is predicted to reach the wanted speed.

    Attributes:
        removed: number of removed blocks, the first ones of `SpeedupRecord.removals`.
        blocks, mlp_width, heads: numbers of units that stay; 0 for a kind that the model does not have.
        predicted: speed in units of the dense model's.
        kl: mean KL(dense || candidate) per held-out token in nats, after a quick pass; None before it.
    """

    removed: int
    blocks: int
    mlp_width: int
    heads: int
    predicted: float
    kl: float | None = None

    def describe(self) -> str:
        """Return the structure and the figures in words."""
        width = [f"MLP width {self.mlp_width}"] if self.mlp_width else []
        structure = ", ".join([*width, f"{self.heads} heads", f"{self.blocks} blocks"])
        kl = "" if self.kl is None else f", KL {self.kl:.4f}"
        return f"{structure}: predicted {self.predicted:.2f} times as fast{kl}"


class SpeedupRecord(Record):
    """Search for the mix of MLP width, heads and blocks that reaches a speed at the smallest divergence.

    Attributes:
        speed: speed of generation in units of the dense model's.
        runtime: in which it was measured.
        latencies: measured structures, from which speeds are predicted.
        candidates: mixes in the order of their quick passes.
        removals: blocks in the order in which they are removed.
        fitted_tokens, held_out_tokens: calibration tokens of a quick pass, and of the divergence.
        measured: speed of the chosen structure, measured in turns with the dense model at the end.
    """

    speed: float
    runtime: str
    latencies: list[LatencyRecord]
    candidates: list[CandidateRecord]
    removals: list[BlockRemoval]
    fitted_tokens: int
    held_out_tokens: int
    measured: float | None = None

    @property
    def chosen(self) -> CandidateRecord:
        """The candidate of the smallest divergence; all of them have been measured."""
        return min(self.candidates, key=lambda candidate: math.inf if candidate.kl is None else candidate.kl)

    @property
    def outcome(self) -> str:
        """Return in a sentence whether the wanted speed was reached."""
        assert self.measured is not None
        speeds = f"{self.measured:.2f} times the dense model's speed in {self.runtime}, {self.speed:g} wanted"
        return f"Measured: {speeds}." if self.measured >= self.speed else f"The wanted speed was missed: {speeds}."


class ShrinkReport(Record):
    """Report of one structured pruning run.

    Attributes:
        model, architecture, dtype, device: of the run; the architecture is that of the written model.
        before, after: sizes.
        calibration: windows of the run.
        removals: removed blocks in the order of their removal.
        experts: choice of the experts that stay; None if all do.
        blocks: the blocks that stay, in order.
        seconds: wall time by phase of `SHRINK_PHASES`, and `total`.
        peak_host_bytes, peak_device_bytes: largest resident size of the process, and torch's largest allocation on
            the GPU.
        versions: packages, machine and commit.
        speedup: how the mix of structure was chosen; None if the settings name it.
        notes: remarks on the run, as sentences.
    """

    model: str
    architecture: str
    dtype: str
    device: str
    before: SizeRecord
    after: SizeRecord
    calibration: CalibrationRecord
    removals: list[BlockRemoval]
    experts: ExpertSelection | None = None
    blocks: list[ShrunkBlock]
    seconds: dict[str, float]
    peak_host_bytes: int
    peak_device_bytes: int
    versions: dict[str, str]
    speedup: SpeedupRecord | None = None
    notes: list[str] = Field(default_factory=list)

    @property
    def share_removed(self) -> float:
        """Share of the parameters that were removed."""
        return 1 - self.after.parameters / self.before.parameters

    def to_json(self) -> str:
        """Return the report as JSON."""
        return to_json(self.model_dump(mode="json"), indent=1)

    @classmethod
    def read(cls, folder: Path) -> ShrinkReport | None:
        """Read the report of a shrunk directory; return None if there is none.

        Raises:
            CheckpointError: when the file exists but is not a report.
        """
        path = folder / SHRINK_REPORT_NAME
        if not path.is_file():
            return None
        try:
            return cls.model_validate(json.loads(path.read_text()))
        except (OSError, ValueError, TypeError, RecursionError, ValidationError):
            raise CheckpointError(f"'{path}' is not a report of this program: remove or replace it.") from None
