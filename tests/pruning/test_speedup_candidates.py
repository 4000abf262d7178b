"""Candidates of `--speedup`: against all mixes, and what each family leaves to choose."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest

from alps.core.errors import ConfigError, UnsupportedModel
from alps.models.blocks import find_blocks
from alps.models.structure import Structure, read_structure
from alps.pruning.latency import LatencyFit
from alps.pruning.speedup_candidates import MAX_CANDIDATES, Choices, list_candidates, list_choices, spread

_STRUCTURE = Structure(blocks=16, hidden=64, mlp_width=1024, heads=16, kv_heads=4, head_dim=4)
_CHOICES = Choices(_STRUCTURE, [1024, 768, 512, 256], [16, 12, 8], [16, 15, 14])


def _pareto(fit: LatencyFit, wanted: float) -> set[tuple[int, int, int]]:
    """Return all mixes that are fast enough, without those that keep less of everything than another one."""
    fast = [
        mix
        for mix in product(_CHOICES.blocks, _CHOICES.widths, _CHOICES.heads)
        if fit.speedup(removed=16 - mix[0], mlp_width=mix[1], heads=mix[2]) >= wanted
    ]
    return {mix for mix in fast if not any(m != mix and all(map(int.__ge__, m, mix)) for m in fast)}


@pytest.mark.parametrize("seed", range(20))
def test_candidates_are_the_mixes_that_keep_most(seed: int) -> None:
    draw = random.Random(seed)
    fit = LatencyFit(_STRUCTURE, draw.uniform(0.02, 0.05), draw.uniform(0, 3e-5), draw.uniform(0, 1e-3))
    wanted = draw.uniform(1.02, 1.3)
    expected = _pareto(fit, wanted)
    if not expected:
        with pytest.raises(ConfigError, match="cannot be reached"):
            list_candidates(_CHOICES, fit, wanted)
        return
    candidates = list_candidates(_CHOICES, fit, wanted)
    mixes = {(mix.blocks, mix.mlp_width, mix.heads) for mix in candidates}
    assert len(mixes) == len(candidates) == min(len(expected), MAX_CANDIDATES) and mixes <= expected
    assert all(mix.predicted >= wanted and mix.removed == 16 - mix.blocks and mix.kl is None for mix in candidates)


def test_many_mixes_are_thinned_out_evenly() -> None:
    fit = LatencyFit(_STRUCTURE, 0.03, 2e-5, 5e-4)
    choices = Choices(_STRUCTURE, range(1024, 0, -1), [16, 12, 8], [16, 15, 14])
    mixes = list_candidates(choices, fit, 1.2)
    assert len(mixes) == MAX_CANDIDATES and {mix.blocks for mix in mixes} == {16, 15, 14}
    assert spread(mixes, 3) == [mixes[0], mixes[2], mixes[5]] and spread(mixes, 9) == mixes


def test_probes_have_one_kind_of_unit_removed() -> None:
    numbers = [(len(t.kept_blocks or ()), t.mlp_width, t.heads) for t in _CHOICES.probes()]
    assert numbers == [(16, 768, 16), (16, 512, 16), (16, 1024, 8), (12, 1024, 16)]
    short = Choices(_STRUCTURE, [1024], [16], [16, 15])
    assert [len(target.kept_blocks or ()) for target in short.probes()] == [12]


def test_choices_follow_the_family(tiny_model: Callable[..., Any]) -> None:
    """LLaMA loses any heads, as Mistral; OPT none. Blocks at the ends stay, so that three blocks are too few."""

    def choices(model: Any, align: int) -> tuple[Any, Any, Any]:
        blocks = find_blocks(model)
        result = list_choices(model, blocks, read_structure(model, blocks), align)
        return list(result.widths), list(result.heads), list(result.blocks)

    assert choices(tiny_model("llama"), 8) == ([44, 40, 32, 24, 16], [4, 2], [3])
    assert choices(tiny_model("opt"), 16) == ([64, 48, 32, 16], [4], [3])
    with pytest.raises(UnsupportedModel, match="nothing that can be removed"):
        choices(tiny_model("opt"), 64)
