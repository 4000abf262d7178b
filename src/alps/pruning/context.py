"""The environment of a pruning run: device, process group, progress, memory limits, journal."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from alps.core.distributed import ProcessGroup
from alps.core.progress import NoProgress, Progress
from alps.pruning.resume import NullJournal, RunJournal


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """Device, ranks and limits of a run. Nothing in it changes the pruned weights.

    Attributes:
        device: where blocks run and layers are solved; every block is brought there and back.
        group: ranks of the run, which share windows and layers.
        progress: receives one step for every layer.
        offload: keep the activations between blocks in host memory.
        activation_bytes: limit of the activations in memory, in bytes; the others go to files. None for no limit.
        spill_folder: folder of those files; None for the system's folder of temporary files.
        journal: keeps every finished block, and restores those of an earlier process.
    """

    device: torch.device
    group: ProcessGroup = field(default_factory=ProcessGroup)
    progress: Progress = field(default_factory=NoProgress)
    offload: bool = False
    activation_bytes: int | None = None
    spill_folder: Path | None = None
    journal: RunJournal = field(default_factory=NullJournal)
