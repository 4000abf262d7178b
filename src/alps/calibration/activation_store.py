"""Storage of hidden states between blocks: in memory, and beyond a limit in memory-mapped files."""

from __future__ import annotations

import os
import tempfile
import weakref
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from alps.core.errors import CheckpointError


@dataclass
class ActivationStore:
    """Storage of hidden states.

    Attributes:
        device: of the stored tensors; None keeps the device of each.
        limit: bytes in memory; further tensors go to files. None for no limit.
        folder: of the files, which have no name and vanish with the process.
        held: bytes in memory now.
    """

    device: torch.device | None = None
    limit: int | None = None
    folder: Path | None = None
    held: int = field(default=0, init=False)

    def store(self, states: Tensor) -> Tensor:
        """Return a tensor with the same values for long storage.

        Raises:
            CheckpointError: when the disk has no room.
        """
        if self.limit is not None and self.held + states.nbytes > self.limit:
            return self._to_file(states)
        stored = states if self.device is None else states.to(self.device)
        if self.limit is not None:
            self.held += stored.nbytes
            weakref.finalize(stored, self._release, stored.nbytes)
        return stored

    def _release(self, nbytes: int) -> None:
        self.held -= nbytes

    def _to_file(self, states: Tensor) -> Tensor:
        try:
            with tempfile.NamedTemporaryFile(prefix=".activations.partial-", dir=self.folder) as file:
                # Space is allocated now: writing to the map of a full disk would kill the process without a message.
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, states.nbytes)
                else:
                    file.truncate(states.nbytes)
                mapped = torch.from_file(file.name, shared=True, size=states.numel(), dtype=states.dtype)
        except OSError as error:
            raise CheckpointError(
                f"Activations cannot be stored in '{self.folder or tempfile.gettempdir()}' "
                f"({error.strerror or error}): make room, or raise --activation-memory."
            ) from None
        return mapped.view(states.shape).copy_(states)
