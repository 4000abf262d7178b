"""Choice of what structured pruning removes: blocks, experts, or the mix of structure for a speed.

Choices are made before the first block is shrunk. The journal keeps them, and a resumed run takes them from there.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from alps.core.distributed import ProcessGroup
from alps.data.loaded_model import LoadedModel
from alps.models.structure import Target
from alps.pruning.block_removal import choose_removals
from alps.pruning.latency import Runtime, transformers_runtime
from alps.pruning.latency_llama import llama_runtime
from alps.pruning.shrink_config import LLAMA, ShrinkConfig
from alps.pruning.shrink_context import ShrinkContext
from alps.pruning.shrink_experts import ExpertCut, check_windows, choose_kept_experts
from alps.pruning.shrink_pipeline import make_run
from alps.pruning.shrink_plan import ShrinkPlan, describe_plan, log_plan
from alps.pruning.speedup_search import SpeedupSearch, choose_mix
from alps.reporting.shrink_report import BlockRemoval, ExpertSelection, SpeedupRecord


@dataclass(frozen=True, kw_only=True)
class ShrinkChoice:
    """Units that go, and how they were chosen.

    Attributes:
        plan: of the smaller model; its target may still have placeholders for blocks.
        target: complete numbers of units, with the blocks that stay.
        removals: removed blocks in the order of their removal.
        experts: that stay; None if all do.
        search: for a speed; None if the settings name numbers of units.
        speedup: its record; None without one.
        seconds: wall time by phase of `SHRINK_PHASES`.
    """

    plan: ShrinkPlan
    target: Target
    removals: list[BlockRemoval]
    experts: ExpertSelection | None
    search: SpeedupSearch | None
    speedup: SpeedupRecord | None
    seconds: dict[str, float]

    def confirmed(self, group: ProcessGroup) -> ShrinkChoice:
        """Return the choice with the speed of the chosen structure, which the main rank measures."""
        search, speedup = self.search, self.speedup
        if search is None or speedup is None:
            return self
        start = time.perf_counter()
        speed = group.broadcast_from_main(lambda: search.measure(self.target))
        seconds = {**self.seconds, "removal": self.seconds["removal"] + time.perf_counter() - start}
        return replace(self, speedup=speedup.model_copy(update={"measured": speed}), seconds=seconds)


def choose_structure(config: ShrinkConfig, plan: ShrinkPlan, ids: Tensor, context: ShrinkContext) -> ShrinkChoice:
    """Choose what goes, or take the choices from the journal.

    Args:
        config: the settings.
        plan: the open model, in evaluation mode, and what it becomes.
        ids: calibration windows (windows, tokens) of all ranks.
        context: device, ranks, journal.

    Raises:
        ConfigError: when no mix reaches the speed, or there are too few windows.
        SolveFailed, CheckpointError: from the quick passes of a search.
    """
    start = time.perf_counter()
    search, speedup = open_search(config, plan, context.device), None
    if search is None:
        removals = _removals(config, plan, ids, context)
    else:
        speedup = choose_mix(search, ids, context, partial(make_run, plan.loaded, plan.structure))
        removals = speedup.removals[: speedup.chosen.removed]
        plan = describe_plan(plan.loaded, search.target(speedup.chosen, removals))
        log_plan(plan, context.group)
    removal_seconds = time.perf_counter() - start
    removed = {removal.block for removal in removals}
    kept = tuple(index for index in range(plan.structure.blocks) if index not in removed)
    experts, experts_seconds = _experts(plan, ids, context)
    return ShrinkChoice(
        plan=plan,
        target=replace(plan.target, kept_blocks=kept),
        removals=removals,
        experts=experts,
        search=search,
        speedup=speedup,
        seconds={"removal": removal_seconds, "experts": experts_seconds},
    )


def open_runtime(name: str, loaded: LoadedModel, device: torch.device) -> Runtime:
    """Return the runtime of a name of `RUNTIMES`, for models like the one that is open."""
    return llama_runtime(loaded.tokenizer) if name == LLAMA else transformers_runtime(device)


def open_search(config: ShrinkConfig, plan: ShrinkPlan, device: torch.device) -> SpeedupSearch | None:
    """Return the search for the speed that the settings name; None if they name numbers of units."""
    if config.speedup is None or plan.choices is None:
        return None
    return SpeedupSearch(
        model=plan.loaded.model,
        blocks=plan.loaded.blocks(),
        speed=config.speedup,
        runtime_name=config.runtime,
        runtime=open_runtime(config.runtime, plan.loaded, device),
        choices=plan.choices,
    )


def _removals(config: ShrinkConfig, plan: ShrinkPlan, ids: Tensor, context: ShrinkContext) -> list[BlockRemoval]:
    """Return the blocks to remove: those of the settings, those that the journal holds, or new ones."""
    if config.drop_blocks or config.blocks is None:
        return [BlockRemoval(block=index, kl=None) for index in config.drop_blocks]
    removals = context.journal.load_removals()
    if removals is None:
        loaded, count = plan.loaded, config.blocks
        blocks = loaded.blocks()
        if context.group.is_main:
            context.progress.start("choose blocks", count * len(blocks))
        try:
            removals = context.group.broadcast_from_main(
                lambda: choose_removals(
                    loaded.model,
                    blocks,
                    ids,
                    count,
                    device=context.device,
                    on_block_done=lambda _: context.progress.step(""),
                )
            )
        finally:
            context.progress.finish()
        context.journal.save_removals(removals)
    return removals


def _experts(plan: ShrinkPlan, ids: Tensor, context: ShrinkContext) -> tuple[ExpertSelection | None, float]:
    """Return the choice of the experts that stay, None if all do, and the seconds that it took."""
    start, cut = time.perf_counter(), ExpertCut(plan.structure, plan.target)
    if cut.is_needed:
        check_windows(ids)
    if not cut.cuts_experts:
        return None, 0.0
    loaded, count = plan.loaded, plan.target.experts or 0
    selection = choose_kept_experts(loaded.model, loaded.blocks(), ids, count, context)
    return selection, time.perf_counter() - start
