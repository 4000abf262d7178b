"""Runs of the block loop on small models, on the CPU."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from alps.models.blocks import find_blocks
from alps.pruning.context import RunContext
from alps.pruning.pipeline import BlockResults, prune_blocks
from alps.pruning.recipe import PruneRecipe
from alps.solvers import Method, get_method
from alps.solvers.patterns import Pattern

_CONTEXT = {field.name for field in fields(RunContext)}


def make_recipe(method: Method | str, pattern: Pattern, **options: Any) -> PruneRecipe:
    """Return a recipe whose method may be a name."""
    return PruneRecipe(method=get_method(method) if isinstance(method, str) else method, pattern=pattern, **options)


def make_context(**options: Any) -> RunContext:
    """Return a context on the CPU."""
    return RunContext(device=torch.device("cpu"), **options)


def prune(model: nn.Module, ids: Tensor | None, method: Method | str, pattern: Pattern, **options: Any) -> BlockResults:
    """Prune a model in place; options are fields of `PruneRecipe` and of `RunContext`."""
    context = make_context(**{name: value for name, value in options.items() if name in _CONTEXT})
    recipe = make_recipe(method, pattern, **{name: value for name, value in options.items() if name not in _CONTEXT})
    return prune_blocks(model, find_blocks(model), ids, recipe, context)
