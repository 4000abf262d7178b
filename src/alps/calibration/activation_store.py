"""Where hidden states wait for the next block: in memory, and beyond a limit in files that are mapped into it."""

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
class Activations:
    """A place for hidden states.

    Attributes:
        device: where they are kept; None leaves each where it is.
        limit: bytes that may be kept there; the rest goes to files. None for no limit.
        folder: for the files, which have no name and are gone with the process.
        held: bytes that are kept in memory now.
    """

    device: torch.device | None = None
    limit: int | None = None
    folder: Path | None = None
    held: int = field(default=0, init=False)

    def place(self, states: Tensor) -> Tensor:
        """The same values, kept for long.

        Raises:
            CheckpointError: when the disk has no room for them.
        """
        if self.limit is not None and self.held + states.nbytes > self.limit:
            return self._in_file(states)
        placed = states if self.device is None else states.to(self.device)
        if self.limit is not None:
            self.held += placed.nbytes
            weakref.finalize(placed, self._let_go, placed.nbytes)
        return placed

    def _let_go(self, nbytes: int) -> None:
        self.held -= nbytes

    def _in_file(self, states: Tensor) -> Tensor:
        try:
            with tempfile.NamedTemporaryFile(prefix=".activations.partial-", dir=self.folder) as file:
                # Room is taken now: a disk that is full later would end the process without a word.
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, states.nbytes)
                else:
                    file.truncate(states.nbytes)
                mapped = torch.from_file(file.name, shared=True, size=states.numel(), dtype=states.dtype)
        except OSError as error:
            raise CheckpointError(
                f"Activations cannot be kept in '{self.folder or tempfile.gettempdir()}' "
                f"({error.strerror or error}): make room, or raise --activation-memory."
            ) from None
        return mapped.view(states.shape).copy_(states)
