"""Plan of a structured pruning run: the open model, and what it will look like."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

from torch import Tensor

from alps.core.distributed import ProcessGroup
from alps.data.loaded_model import LoadedModel
from alps.data.mixture import CalibrationMix
from alps.models.shrink_families import family_of
from alps.models.shrink_layout import Family
from alps.models.shrunk_model import check_target, empty_shrunk_model
from alps.models.structure import Structure, Target, read_structure
from alps.pruning.run_inputs import open_for_run
from alps.pruning.shrink_config import ShrinkConfig
from alps.pruning.shrink_experts import ExpertCut
from alps.pruning.shrink_target import changed_fields, check_experts, describe_target, resolve_target, size_record
from alps.pruning.speedup_candidates import Choices, list_choices
from alps.reporting.shrink_report import SizeRecord

_LOG = logging.getLogger("alps")


@dataclass(frozen=True, kw_only=True)
class ShrinkPlan:
    """A model that is open, and what it will look like.

    Attributes:
        loaded: the dense model.
        structure: of it.
        target: complete numbers of units that stay. Blocks that are still to be chosen are placeholders.
        before, after: sizes of the dense and the smaller model.
        lines: description for the user.
        choices: of which the target is still to be chosen for a speed; None if the settings name it.
    """

    loaded: LoadedModel
    structure: Structure
    target: Target
    before: SizeRecord
    after: SizeRecord
    lines: list[str]
    choices: Choices | None = None


def open_plan(config: ShrinkConfig, source: CalibrationMix | Tensor, loaded: LoadedModel | None = None) -> ShrinkPlan:
    """Open a model, and find what it will look like.

    Raises:
        ConfigError, UnsupportedModel, CheckpointError: for a model or numbers that cannot be.
    """
    loaded = loaded or open_for_run(config, source)
    blocks = loaded.blocks()
    structure = read_structure(loaded.model, blocks)
    check_experts(config, family_of(loaded.model), structure)
    if config.speedup is not None:
        # Everything stays until the mix is chosen; what cannot be chosen is refused here.
        choices = list_choices(loaded.model, blocks, structure, config.align)
        return describe_plan(loaded, Target().complete(structure), choices)
    return describe_plan(loaded, resolve_target(config, structure))


def describe_plan(loaded: LoadedModel, target: Target, choices: Choices | None = None) -> ShrinkPlan:
    """Find what a model will look like.

    Raises:
        ConfigError, UnsupportedModel: for numbers that cannot be.
    """
    blocks = loaded.blocks()
    structure = check_target(loaded.model, blocks, target)
    for block in blocks:
        # Refuses mixtures whose routing cannot be replayed.
        ExpertCut(structure, target).mixture(block)
    small = empty_shrunk_model(loaded.model, blocks, target)
    old, new = changed_fields(loaded.model.config, small.config)
    before = size_record(loaded.model, structure, old)
    after_structure = _smaller(structure, target)
    after = size_record(small, after_structure, new)
    return ShrinkPlan(
        loaded=loaded,
        structure=structure,
        target=target,
        before=before,
        after=after,
        lines=[
            *describe_target(before, after, after_structure),
            *_llama_lines(family_of(loaded.model), structure, after_structure),
        ],
        choices=choices,
    )


def _llama_lines(family: Family, before: Structure, after: Structure) -> list[str]:
    """Say that llama.cpp will not load the result, where that is known."""
    cuts = {
        "head": ("fewer heads", before.heads != after.heads),
        "channel": ("a narrower MLP", before.mlp_width != after.mlp_width),
    }
    refused = [words for unit, (words, is_cut) in cuts.items() if is_cut and unit in family.unloadable]
    return [
        f"llama.cpp does not load '{family.model_type}' models with {words}: leave that cut out if the result is for "
        "llama.cpp."
        for words in refused
    ]


def log_plan(plan: ShrinkPlan, group: ProcessGroup) -> None:
    """Tell the user on the main rank what the model will look like."""
    if group.is_main:
        for line in plan.lines:
            _LOG.info(line)


def _smaller(structure: Structure, target: Target) -> Structure:
    return replace(
        structure,
        blocks=len(target.kept_blocks or ()),
        mlp_width=target.mlp_width,
        heads=target.heads,
        kv_heads=target.kv_heads,
        experts=target.experts,
        expert_width=target.expert_width,
        shared_width=target.shared_width(structure),
    )
