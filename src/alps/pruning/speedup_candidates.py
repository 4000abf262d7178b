"""Mixes of MLP width, heads and blocks that are predicted to reach a speed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from alps.core.errors import ConfigError, UnsupportedModel
from alps.models.blocks import Block
from alps.models.shrunk_model import check_target
from alps.models.structure import Structure, Target
from alps.pruning.block_removal import removable
from alps.pruning.latency import LatencyFit
from alps.pruning.shrink_target import width_step
from alps.reporting.shrink_report import CandidateRecord

# A quick pass takes minutes, so that few candidates are measured.
MAX_CANDIDATES = 6
# A removed block saves more time than its parameters suggest, so that many may go; each costs a round of the choice.
_LARGEST_SHARE_OF_BLOCKS = 1 / 4
_SMALLEST_SHARE_OF_WIDTH = 1 / 4
_SHARES_OF_HEADS = (3 / 4, 1 / 2)


@dataclass(frozen=True)
class Choices:
    """Numbers of units that a mix may keep, the dense model's first, then descending.

    Attributes:
        structure: of the dense model.
        widths: MLP widths; 0 alone for a model without dense MLPs.
        heads: numbers of query heads.
        blocks: numbers of blocks.
    """

    structure: Structure
    widths: Sequence[int]
    heads: Sequence[int]
    blocks: Sequence[int]

    def probes(self) -> list[Target]:
        """List the structures from whose times those of all others follow: each has one kind of unit removed."""
        structure = self.structure
        widths = {_nearest(self.widths, share * self.widths[0]) for share in (3 / 4, 1 / 2)}
        targets = [Target(mlp_width=width) for width in sorted(widths, reverse=True)]
        targets += [Target(heads=heads) for heads in self.heads[-1:]]
        if len(self.blocks) > 1:
            targets.append(Target(kept_blocks=_without(structure, _LARGEST_SHARE_OF_BLOCKS)))
        dense = Target().complete(structure)
        return [target for target in (t.complete(structure) for t in targets) if target != dense]


def list_choices(model: nn.Module, blocks: Sequence[Block], structure: Structure, align: int | None) -> Choices:
    """List the numbers of units that a plain checkpoint of a model may have.

    Args:
        model: dense; its weights may be on the meta device.
        blocks: of the model.
        structure: of the model.
        align: multiple of the widths; None for 256, 128 or 64.

    Raises:
        UnsupportedModel: when nothing can be removed.
    """
    width, heads = structure.mlp_width or 0, structure.heads or 0
    step = width_step(width, align)
    widths = [n for n in range((width - 1) // step * step, 0, -step) if n >= _SMALLEST_SHARE_OF_WIDTH * width]
    if not widths or not _is_allowed(model, blocks, Target(mlp_width=widths[0])):
        widths = []
    kept_heads = {_kept_heads(structure, share) for share in _SHARES_OF_HEADS}
    fewer = [n for n in sorted(kept_heads - {heads}, reverse=True) if _is_allowed(model, blocks, Target(heads=n))]
    count = _share_of_blocks(structure, _LARGEST_SHARE_OF_BLOCKS)
    if count and not _is_allowed(model, blocks, Target(kept_blocks=_without(structure, _LARGEST_SHARE_OF_BLOCKS))):
        count = 0
    if not (widths or fewer or count):
        raise UnsupportedModel("--speedup found nothing that can be removed from this model: choose another one.")
    numbers = [structure.blocks - removed for removed in range(count + 1)]
    return Choices(structure, [width, *widths], [heads, *fewer], numbers)


def list_candidates(choices: Choices, fit: LatencyFit, wanted: float) -> list[CandidateRecord]:
    """List the mixes that are predicted to reach a speed and of which none keeps all that another one keeps.

    Args:
        choices: numbers of units.
        fit: of the times.
        wanted: speed in units of the dense model's.

    Returns:
        At most `MAX_CANDIDATES`, evenly spread over the numbers of blocks and heads.

    Raises:
        ConfigError: when no mix reaches the speed.
    """
    best, mixes = 0.0, list[CandidateRecord]()
    for blocks in choices.blocks:
        for heads in choices.heads:
            for width in choices.widths:
                removed = choices.structure.blocks - blocks
                speed = fit.speedup(removed=removed, mlp_width=width, heads=heads)
                best = max(best, speed)
                if speed >= wanted:
                    mixes.append(
                        CandidateRecord(removed=removed, blocks=blocks, mlp_width=width, heads=heads, predicted=speed)
                    )
                    break
    if not mixes:
        raise ConfigError(
            f"--speedup {wanted:g} cannot be reached: with all that may be removed the model is predicted to be "
            f"{best:.2f} times as fast; give less."
        )
    return spread([mix for mix in mixes if not any(_keeps_more(other, mix) for other in mixes)], MAX_CANDIDATES)


def spread(mixes: Sequence[CandidateRecord], count: int) -> list[CandidateRecord]:
    """Return at most `count` mixes, evenly spaced, with the first and the last one."""
    if len(mixes) <= count:
        return list(mixes)
    return [mixes[round(number * (len(mixes) - 1) / (count - 1))] for number in range(count)]


def _keeps_more(mix: CandidateRecord, other: CandidateRecord) -> bool:
    """Check if a mix keeps everything that another one keeps, and more."""
    numbers, others = ((m.blocks, m.mlp_width, m.heads) for m in (mix, other))
    return numbers != others and all(a >= b for a, b in zip(numbers, others, strict=True))


def _kept_heads(structure: Structure, share: float) -> int:
    """Return a number of heads of which each KV head has equally many, or, one each, of which any number may stay."""
    heads, group = structure.heads or 0, structure.group
    if group == 1:
        return max(round(share * heads), 1)
    return max(round(share * group), 1) * (heads // group)


def _share_of_blocks(structure: Structure, share: float) -> int:
    """Return a share of the blocks, at least one if any can be removed."""
    return min(max(int(structure.blocks * share), 1), len(removable(structure.blocks)))


def _without(structure: Structure, share: float) -> tuple[int, ...]:
    """Return the blocks that stay when a share of them goes."""
    removed = removable(structure.blocks)[: _share_of_blocks(structure, share)]
    return tuple(index for index in range(structure.blocks) if index not in removed)


def _is_allowed(model: nn.Module, blocks: Sequence[Block], target: Target) -> bool:
    try:
        check_target(model, blocks, target)
    except (ConfigError, UnsupportedModel):
        return False
    return True


def _nearest(numbers: Sequence[int], wanted: float) -> int:
    return min(numbers, key=lambda number: abs(number - wanted))
