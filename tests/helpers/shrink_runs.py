"""Runs of structured pruning on small models, on the CPU, down to single blocks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from alps.calibration.block_capture import capture_block_inputs
from alps.calibration.block_inputs import BlockInputs
from alps.checkpoints.journal import Journal
from alps.core.distributed import SINGLE_PROCESS, ProcessGroup
from alps.core.progress import NoProgress
from alps.models.blocks import Block, find_blocks
from alps.models.shrink_families import adds_output, family_of
from alps.models.structure import Target, read_structure
from alps.pruning.shrink_config import ShrinkConfig
from alps.pruning.shrink_job import shrink_checkpoint
from alps.pruning.shrink_layers import BlockStates, Cutter
from alps.reporting.shrink_report import ShrinkReport

CPU = torch.device("cpu")


def make_cutter(model: nn.Module, target: Target, group: ProcessGroup = SINGLE_PROCESS) -> Cutter:
    """Return the cutter of a model."""
    structure = read_structure(model, find_blocks(model))
    return Cutter(
        family=family_of(model),
        structure=structure,
        target=target.complete(structure),
        adds_output=adds_output(model),
        device=CPU,
        group=group,
    )


@dataclass(frozen=True)
class BlockCase:
    """A block of a tiny model with hidden states of its own in a shrunk model.

    Attributes:
        cutter: of the model.
        block: a copy, to be cut.
        original: the same block, left as it is.
        states: around it.
        weights: of all tokens, by the dense outputs, (tokens,), float64.
    """

    cutter: Cutter
    block: Block
    original: Block
    states: BlockStates
    weights: Tensor


def block_case(
    model: nn.Module,
    target: Target,
    ids: Tensor,
    *,
    noise: float = 0.3,
    batch: int = 4,
    group: ProcessGroup = SINGLE_PROCESS,
) -> BlockCase:
    """Return the second block of a model, behind a first one whose outputs differ by noise in the shrunk model.

    Args:
        model: with two blocks or more.
        target: of the smaller model.
        ids: token ids of all windows.
        noise: of the hidden states in the shrunk model, relative to those of the dense one.
        batch: windows in a batch.
        group: of ranks, which share the windows.
    """
    cutter, blocks = make_cutter(model, target, group), find_blocks(model)
    states = capture_block_inputs(model, blocks, group.shard(ids), batch)
    states.advance(0, blocks[0].module, CPU)
    dense = states.copy()
    _add_noise(states, noise, group, len(ids))
    sites, inputs = cutter.record_dense(blocks[1], dense)
    goal = torch.cat([hidden.reshape(-1, hidden.shape[-1]) for hidden in dense.hidden]).double()
    return BlockCase(
        cutter=cutter,
        block=blocks[1].clone(),
        original=blocks[1],
        states=BlockStates(inputs=states, dense_inputs=inputs, dense_sites=sites, dense_outputs=dense.hidden),
        weights=1 / goal.square().sum(dim=1),
    )


def _add_noise(states: BlockInputs, noise: float, group: ProcessGroup, windows: int) -> None:
    """Add noise to the hidden states that depends on the number of the window alone."""
    shape = states.hidden[0].shape[1:]
    everything = torch.randn(windows, *shape, generator=torch.Generator().manual_seed(8))
    parts = torch.split(group.shard(everything), [len(hidden) for hidden in states.hidden])
    for batch, part in enumerate(parts):
        hidden = states.hidden[batch]
        states.hidden[batch] = hidden + noise * hidden.square().mean().sqrt() * part


def layer_inputs(case: BlockCase, block: Block, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Run a block on the shrunk model's hidden states; return a layer's inputs and outputs, and the block's outputs.

    Returns:
        All in float64, with tokens as rows.
    """
    (site,) = (site for site in block.sites if site.name == name)
    seen: list[tuple[Tensor, Tensor]] = []
    handle = site.module.register_forward_hook(lambda _module, args, output: seen.append((args[0], output)))
    inputs, outputs = case.states.inputs, list[Tensor]()
    with torch.no_grad():
        for batch in range(len(inputs.hidden)):
            outputs.append(inputs.run(block.index, block.module, batch, CPU))
    handle.remove()
    columns: Any = zip(*seen, strict=True)
    x, y, output = (torch.cat([t.reshape(-1, t.shape[-1]) for t in part]).double() for part in (*columns, outputs))
    return x, y, output


# A run of a second that goes all ways: channels, heads, KV groups and a block, patched and reconstructed.
EVERYTHING: dict[str, Any] = {
    "mlp": 0.25,
    "num_heads": 4,
    "kv_groups": 2,
    "blocks": 1,
    "reconstruct_epochs": 1,
    "samples": 8,
    "seqlen": 32,
}


def run_shrink(settings: dict[str, Any], out: Path, *, resume: bool = False, **changed: Any) -> ShrinkReport:
    """Shrink a model by its settings, of which those that are None are left out."""
    values = {name: value for name, value in {**settings, **changed}.items() if value is not None}
    return shrink_checkpoint(ShrinkConfig.model_validate(values), out, NoProgress(), resume=resume)


def weight_bytes(folder: Path) -> bytes:
    """Return the bytes of the one weight file of a checkpoint."""
    return (folder / "model.safetensors").read_bytes()


def comparable(report: ShrinkReport) -> dict[str, Any]:
    """Return what two equal runs have equal in their reports: all but times, memory and versions."""
    fields = report.model_dump(exclude={"seconds", "peak_host_bytes", "peak_device_bytes", "versions"})
    for block in fields["blocks"]:
        del block["seconds"]
    return fields


def stop_after(blocks: int, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a run fail when it has kept so many blocks."""
    keep = Journal.save_tensors

    def failing(self: Journal, index: int, *rest: Any) -> None:
        if index == blocks:
            raise error
        keep(self, index, *rest)

    monkeypatch.setattr(Journal, "save_tensors", failing)
