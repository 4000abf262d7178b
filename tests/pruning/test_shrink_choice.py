"""Choice of what goes, by name, by measurement or from the journal, before anything is shrunk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from alps.checkpoints.journal import Journal
from alps.core.distributed import SINGLE_PROCESS
from alps.pruning import shrink_choice
from alps.pruning.shrink_choice import choose_structure
from alps.pruning.shrink_config import ShrinkConfig
from alps.pruning.shrink_context import ShrinkContext, ShrinkJournal
from alps.pruning.shrink_plan import open_plan

_IDS = torch.arange(3, 67).view(4, 16)


def _context(folder: Path) -> ShrinkContext:
    folder.mkdir()
    journal = ShrinkJournal(Journal(folder, {}, {}), SINGLE_PROCESS)
    return ShrinkContext(device=torch.device("cpu"), journal=journal)


def test_named_blocks_are_taken_as_they_are(stories: Path, tmp_path: Path) -> None:
    config = ShrinkConfig(model=str(stories), mlp_width=128, drop_blocks=[3, 1])
    choice = choose_structure(config, open_plan(config, _IDS), _IDS, _context(tmp_path / "journal"))
    assert [(removal.block, removal.kl) for removal in choice.removals] == [(3, None), (1, None)]
    assert choice.target.kept_blocks == (0, 2, 4) and choice.target.mlp_width == 128
    assert choice.experts is None and choice.search is None
    assert choice.confirmed(SINGLE_PROCESS) is choice and choice.seconds.keys() == {"removal", "experts"}


def test_measured_blocks_are_kept_in_the_journal(
    stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ShrinkConfig(model=str(stories), blocks=1)
    plan, context = open_plan(config, _IDS), _context(tmp_path / "journal")
    # Until the blocks are chosen, the plan removes the first ones that may go.
    assert plan.target.kept_blocks is not None and len(plan.target.kept_blocks) == 4
    choice = choose_structure(config, plan, _IDS, context)
    ((block, kl),) = ((removal.block, removal.kl) for removal in choice.removals)
    assert kl is not None and kl > 0
    assert choice.target.kept_blocks == tuple(index for index in range(5) if index != block)
    monkeypatch.setattr(shrink_choice, "choose_removals", None)
    again = choose_structure(config, plan, _IDS, context)
    assert (again.removals, again.target) == (choice.removals, choice.target)
