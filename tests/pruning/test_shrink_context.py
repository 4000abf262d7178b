"""Smaller blocks in a journal: kept and restored to the bit, by the rank whose turn it is, and refused when damaged."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from alps.checkpoints.journal import Journal, follow_journal, open_journal
from alps.core.distributed import SINGLE_PROCESS, ProcessGroup
from alps.core.errors import CheckpointError
from alps.models.blocks import find_blocks
from alps.models.shrunk_model import empty_shrunk_model
from alps.models.shrunk_weights import ShrunkModel, fill_module
from alps.models.structure import Target
from alps.pruning.shrink_context import ShrinkContext, ShrinkJournal
from alps.reporting.shrink_report import BlockRemoval, CutRecord, ShrunkBlock
from helpers.thread_group import run_in_threads

Tiny = Callable[..., Any]
_CPU = torch.device("cpu")
_CUT = CutRecord(layer="x", unit="channel", kept=[0, 2], total=3, error=0.1, share=0.3, tokens=9)
_RECORD = ShrunkBlock(block=2, cuts=[_CUT], error=0.25, reconstruction=None, seconds={"total": 1.0})


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    with open_journal(tmp_path / "out", {"job": "test"}) as opened:
        yield opened


def _small(tiny_model: Tiny) -> tuple[ShrunkModel, list[dict[str, Any]]]:
    """A shorter model without weights, and the tensors of its blocks."""
    model = tiny_model("llama")
    blocks = find_blocks(model)
    small = ShrunkModel.of(empty_shrunk_model(model, blocks, Target(kept_blocks=(0, 2))))
    return small, [dict(blocks[number].module.state_dict()) for number in (0, 2)]


def test_a_block_comes_back_to_the_bit(tiny_model: Tiny, journal: Journal) -> None:
    small, tensors = _small(tiny_model)
    kept = ShrinkJournal(journal, SINGLE_PROCESS)
    assert kept.restore(0, small.blocks[0], _CPU) is None
    assert all(parameter.is_meta for parameter in small.model.parameters())
    fill_module(small.blocks[0].module, tensors[0])
    kept.save(0, small.blocks[0].module, _RECORD)
    small.release(0)
    assert kept.finished == 1 and kept.record(0) == _RECORD
    assert kept.restore(0, small.blocks[0], _CPU) == _RECORD
    state = small.blocks[0].module.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in tensors[0].items())
    assert kept.restore(1, small.blocks[1], _CPU) is None


def test_ranks_write_in_turn_and_the_main_rank_finishes(tiny_model: Tiny, journal: Journal) -> None:
    models = [_small(tiny_model) for _ in range(2)]
    # The ranks differ here, so that the files say who has written them.
    models[1] = (models[1][0], [{name: 2 * tensor for name, tensor in part.items()} for part in models[1][1]])

    def work(group: ProcessGroup) -> int:
        small, tensors = models[group.rank]
        own = journal if group.is_main else follow_journal(journal.directory.with_name("out"))
        kept = ShrinkJournal(own, group)
        for position in range(2):
            fill_module(small.blocks[position].module, tensors[position])
            kept.save(position, small.blocks[position].module, _RECORD)
        kept.save_removals([BlockRemoval(block=1, kl=0.5)])
        return kept.finished

    assert run_in_threads(2, work) == [2, 2]
    for position in range(2):
        tensors = models[position][1][position]
        stored = journal.tensors(position)
        assert stored.keys() == tensors.keys()
        assert all(torch.equal(stored[name].read(), tensor) for name, tensor in tensors.items())
    assert ShrinkJournal(journal, SINGLE_PROCESS).load_removals() == [BlockRemoval(block=1, kl=0.5)]


def test_removals_are_kept_before_the_first_block(journal: Journal) -> None:
    kept = ShrinkJournal(journal, SINGLE_PROCESS)
    assert kept.load_removals() is None and not journal.holds_work
    removals = [BlockRemoval(block=7, kl=0.125), BlockRemoval(block=3, kl=None)]
    kept.save_removals(removals)
    assert kept.load_removals() == removals and journal.holds_work


def test_weights_that_are_not_finite_are_not_kept(tiny_model: Tiny, journal: Journal) -> None:
    small, tensors = _small(tiny_model)
    tensors[0]["mlp.up_proj.weight"][0, 0] = torch.nan
    fill_module(small.blocks[0].module, tensors[0])
    with pytest.raises(CheckpointError, match="NaN"):
        ShrinkJournal(journal, SINGLE_PROCESS).save(0, small.blocks[0].module, _RECORD)
    assert journal.finished == 0


@pytest.mark.parametrize("damage", ["record", "name", "shape"])
def test_a_damaged_block_is_refused(damage: str, tiny_model: Tiny, journal: Journal) -> None:
    small, tensors = _small(tiny_model)
    if damage == "name":
        tensors[0]["mlp.other.weight"] = tensors[0].pop("mlp.up_proj.weight")
    if damage == "shape":
        tensors[0]["mlp.up_proj.weight"] = tensors[0]["mlp.up_proj.weight"][:-1].clone()
    journal.save_tensors(0, tensors[0])
    record = _RECORD.model_dump(mode="json")
    journal.save_record(0, json.loads("{}") if damage == "record" else record)
    with pytest.raises(CheckpointError, match=r"Block 0 in '.*out\.partial' is damaged: delete that directory"):
        ShrinkJournal(journal, SINGLE_PROCESS).restore(0, small.blocks[0], _CPU)


def test_a_context_works_alone_and_silently_by_default(journal: Journal) -> None:
    context = ShrinkContext(device=_CPU, journal=ShrinkJournal(journal, SINGLE_PROCESS))
    assert context.group.size == 1 and context.activation_bytes is None and not context.offload
    context.progress.start("nothing", 1)
    context.progress.finish()
