"""The environment of a run over the blocks of a model: device, process group, progress, memory limits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from alps.calibration.activation_store import ActivationStore
from alps.core.device import exact_float32
from alps.core.distributed import ProcessGroup
from alps.core.half_precision import half_matmul_in_float32
from alps.core.memory import out_of_memory_as_error
from alps.core.progress import NoProgress, Progress

_ON_HOST, _IN_FILES = "keep activations on the CPU with --offload", "keep activations in files with --activation-memory"
_SMALLER = "or use --dtype bfloat16"


@dataclass(frozen=True, kw_only=True)
class RunEnvironment:
    """Device, ranks and limits of a run. Nothing in it changes the resulting weights.

    Attributes:
        device: where blocks run and layers are solved; every block is brought there and back.
        group: ranks of the run, which share windows and layers.
        progress: receives one step for every unit of work.
        offload: keep the activations between blocks in host memory.
        activation_bytes: limit of the activations in memory, in bytes; the others go to files. None for no limit.
        spill_folder: folder of those files; None for the system's folder of temporary files.
    """

    device: torch.device
    group: ProcessGroup = field(default_factory=ProcessGroup)
    progress: Progress = field(default_factory=NoProgress)
    offload: bool = False
    activation_bytes: int | None = None
    spill_folder: Path | None = None

    def activation_store(self) -> ActivationStore:
        """Return an empty store for activations between blocks, within the limits."""
        storage = torch.device("cpu") if self.offload else self.device
        return ActivationStore(storage, self.activation_bytes, self.spill_folder)

    @contextmanager
    def computation(self, *models: nn.Module, fewer_samples: bool = True) -> Iterator[None]:
        """Context in which blocks of models run: exact float32, half precision where the device has it.

        Args:
            models: whose blocks run.
            fewer_samples: whether fewer calibration windows would need less memory.

        Raises:
            SolveFailed: when memory runs out; names the settings that need less.
        """
        last = f"give fewer --samples, {_SMALLER}" if fewer_samples else _SMALLER
        hints = (f"{hint}, {last}" for hint in (_ON_HOST, _IN_FILES))
        with out_of_memory_as_error(*hints), exact_float32(), half_matmul_in_float32(self.device, *models):
            yield
