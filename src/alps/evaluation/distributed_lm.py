"""lm-eval's model in memory, whose items several processes share out: each has every N-th, the first adds them up.

lm-eval asks a model which process it is, and leaves the messages to it. Imported only where lm-eval is installed.
"""

from __future__ import annotations

from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor, nn

from alps.core.distributed import ProcessGroup


class SharedModel(HFLM):  # type: ignore[misc]
    """A model as lm-eval takes it, in one of the processes of `group`."""

    def __init__(self, group: ProcessGroup, model: nn.Module, tokenizer: Any, batch_size: int) -> None:
        super().__init__(model, tokenizer=tokenizer, batch_size=batch_size)
        self._group, self._rank, self._world_size = group, group.rank, group.size

    def all_gather(self, tensor: Tensor) -> Tensor:
        """One number of every process, by rank."""
        return torch.tensor(self._group.all_gather_object(tensor.item()))

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """The values of all processes, by rank, for one of them."""
        found = self._group.all_gather_object(obj)
        return found if self._group.rank == dst else None

    def barrier(self) -> None:
        """Go on when every process is here."""
        self._group.barrier()
