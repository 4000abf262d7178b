"""The environment of a structured pruning run, with its journal."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pydantic import ValidationError
from torch import nn

from alps.checkpoints.journal import Journal
from alps.checkpoints.safetensors_io import check_result
from alps.core.distributed import ProcessGroup
from alps.core.errors import CheckpointError
from alps.models.blocks import Block
from alps.models.shrunk_weights import fill_module
from alps.pruning.environment import RunEnvironment
from alps.reporting.shrink_report import BlockRemoval, ExpertSelection, ShrunkBlock, SpeedupRecord

_REMOVALS, _EXPERTS, _SPEEDUP = "removals", "experts", "speedup"


@dataclass(frozen=True)
class ShrinkJournal:
    """Smaller blocks in a directory next to the output.

    Attributes:
        journal: files of the directory.
        group: ranks of the run. They write the tensors of blocks in turn; the main rank marks a block as finished.
    """

    journal: Journal
    group: ProcessGroup

    @property
    def finished(self) -> int:
        """Number of finished blocks, which are the first ones that stay."""
        return self.journal.finished

    def record(self, position: int) -> ShrunkBlock:
        """Return the record of a finished block.

        Raises:
            CheckpointError: when it is damaged.
        """
        try:
            return ShrunkBlock.model_validate(self.journal.record(position))
        except ValidationError:
            raise self._damaged(position) from None

    def restore(self, position: int, block: Block, device: torch.device) -> ShrunkBlock | None:
        """Load the weights of a finished block into its module; return None, and change nothing, for any other.

        Raises:
            CheckpointError: when the files of the block are damaged.
        """
        if position >= self.finished:
            return None
        stored = self.journal.tensors(position)
        try:
            fill_module(block.module, {name: tensor.read() for name, tensor in stored.items()}, device)
        except (KeyError, AssertionError):
            raise self._damaged(position) from None
        return self.record(position)

    def save(self, position: int, module: nn.Module, record: ShrunkBlock) -> None:
        """Keep the weights and the record of a block that is finished now.

        Raises:
            CheckpointError: when the files cannot be written, or the weights hold NaN.
        """
        if position % self.group.size == self.group.rank:
            check_result(module, str(self.journal.directory))
            self.journal.save_tensors(position, dict(module.state_dict()))
        self.group.barrier()
        if self.group.is_main:
            self.journal.save_record(position, record.model_dump(mode="json"))
        self.group.barrier()

    def load_removals(self) -> list[BlockRemoval] | None:
        """Return the removed blocks that were chosen before; None if they were not."""
        removals = self.journal.notes.get(_REMOVALS)
        return None if removals is None else [BlockRemoval.model_validate(removal) for removal in removals]

    def save_removals(self, removals: list[BlockRemoval]) -> None:
        """Keep the chosen removals."""
        if self.group.is_main:
            self.journal.note(_REMOVALS, [removal.model_dump(mode="json") for removal in removals])

    def load_experts(self) -> ExpertSelection | None:
        """Return the experts that were chosen before; None if they were not."""
        selection = self.journal.notes.get(_EXPERTS)
        return None if selection is None else ExpertSelection.model_validate(selection)

    def save_experts(self, selection: ExpertSelection) -> None:
        """Keep the chosen experts."""
        if self.group.is_main:
            self.journal.note(_EXPERTS, selection.model_dump(mode="json"))

    def load_speedup(self) -> SpeedupRecord | None:
        """Return the search for a speed as far as it has come; None if it has not begun."""
        search = self.journal.notes.get(_SPEEDUP)
        return None if search is None else SpeedupRecord.model_validate(search)

    def save_speedup(self, search: SpeedupRecord) -> None:
        """Keep the search for a speed."""
        if self.group.is_main:
            self.journal.note(_SPEEDUP, search.model_dump(mode="json"))

    def _damaged(self, position: int) -> CheckpointError:
        return CheckpointError(
            f"Block {position} in '{self.journal.directory}' is damaged: delete that directory and start again."
        )


@dataclass(frozen=True, kw_only=True)
class ShrinkContext(RunEnvironment):
    """Device, ranks, limits and journal of a structured pruning run.

    Attributes:
        journal: keeps every finished block, and all choices.
    """

    journal: ShrinkJournal
