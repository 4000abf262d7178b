"""Tests of exact and approximate top-k selection against a stable sort."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from alps.solvers import topk as selection
from alps.solvers.topk import LocalScores, apply_mask, approx_topk_mask, topk_mask

DISTINCT = ("normal", "uniform", "heavy tails", "ascending", "descending", "shifted")
TIED = ("few values", "constant", "mostly zero", "bfloat16")
many = settings(max_examples=200)


def vector(kind: str, size: int, seed: int = 0) -> Tensor:
    """Return seeded float32 scores; kinds in `DISTINCT` have almost no ties."""
    draw = torch.Generator().manual_seed(seed)
    normal = torch.randn(size, generator=draw)
    return {
        "normal": normal.abs(),
        "uniform": torch.rand(size, generator=draw),
        "heavy tails": normal.double().exp().pow(4).float(),
        "ascending": torch.arange(size).float(),
        "descending": torch.arange(size, 0, -1).float(),
        "shifted": 1000 + normal,
        "few values": torch.randint(0, 5, (size,), generator=draw).float(),
        "constant": torch.full((size,), 0.25),
        "mostly zero": normal.abs() * (torch.rand(size, generator=draw) < 0.1),
        "bfloat16": normal.abs().bfloat16().float(),
    }[kind]


def stable_top(scores: Tensor, kept: int) -> Tensor:
    """Return the mask of the largest entries by a stable sort; among equal entries the first are kept."""
    mask = torch.zeros(len(scores), dtype=torch.bool)
    mask[scores.sort(descending=True, stable=True).indices[:kept]] = True
    return mask


def check_nearly(scores: Tensor, kept: int, slack: float) -> int:
    """Check the result of `approx_topk_mask`, and return the error of its count."""
    before, out = scores.clone(), torch.full_like(scores, torch.nan)
    assert approx_topk_mask(LocalScores(scores), kept, slack, out) is out
    assert torch.equal(scores, before)
    assert bool(((out == 0) | (out == 1)).all())
    off = int(out.sum(dtype=torch.float64)) - kept
    assert abs(off) <= slack * kept
    dropped = scores[out == 0]
    assert not len(dropped) or float(scores[out == 1].min()) >= float(dropped.max())
    return off


@pytest.mark.parametrize("kind", DISTINCT + TIED)
@pytest.mark.parametrize("size", [5000, 70_001, 200_000])
def test_approx_topk_mask_is_one_cut_within_the_slack(kind: str, size: int) -> None:
    scores = vector(kind, size)
    for share in (0.003, 0.3, 0.97):
        for slack in (2e-5, 1e-3, 0.05):
            kept = round(share * size)
            assert abs(check_nearly(scores, kept, slack)) <= slack * kept


def test_approx_topk_mask_uses_its_slack() -> None:
    """Check that counts differ from the exact ones."""
    off = [check_nearly(vector("normal", 200_000, seed), 60_000, 0.01) for seed in range(5)]
    assert any(off)


@pytest.mark.parametrize("size", [70_001, 200_000])
def test_large_groups_of_ties_are_split_by_position(size: int) -> None:
    """Use a vector whose cut is among equal entries, so that only the exact selection succeeds."""
    scores = torch.where(torch.arange(size) % 2 == 0, 1.0, vector("uniform", size, 3))
    kept, out = size // 4, torch.empty(size)
    approx_topk_mask(LocalScores(scores), kept, 1e-3, out)
    assert torch.equal(out.bool(), stable_top(scores, kept))


@many
@given(st.sampled_from(DISTINCT + TIED), st.integers(2, 900), st.integers(0, 99), st.floats(0, 1), st.floats(0, 0.5))
def test_small_vectors_are_selected_exactly(kind: str, size: int, seed: int, share: float, slack: float) -> None:
    scores = vector(kind, size, seed)
    kept = min(max(round(share * size), 1), size - 1)
    assert check_nearly(scores, kept, slack) == 0
    assert torch.equal(topk_mask(scores, kept), stable_top(scores, kept))


@many
@given(st.sampled_from(DISTINCT + TIED), st.integers(2, 900), st.integers(0, 99), st.floats(0, 1), st.floats(0, 0.5))
def test_misleading_samples_do_not_change_results(kind: str, size: int, seed: int, share: float, slack: float) -> None:
    """Use vectors for which samples are uninformative, in chunks of 128."""
    scores = vector(kind, size, seed)
    kept = min(max(round(share * size), 1), size - 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "_MIN_SAMPLED_SIZE", 1)
        patch.setattr(selection, "_CPU_CHUNK", 128)
        check_nearly(scores, kept, slack)
        assert torch.equal(topk_mask(scores, kept), stable_top(scores, kept))


@pytest.mark.parametrize("kind", ["normal", "heavy tails", "few values", "bfloat16", "mostly zero"])
@pytest.mark.parametrize("size", [2**18 + 1, 300_001, 2**19 + 64])
def test_topk_mask_of_several_chunks_matches_a_stable_sort(kind: str, size: int) -> None:
    """Use sizes whose last chunk is whole or not, and divisible by the group of 32 or not."""
    scores = vector(kind, size, 7)
    for kept in (1, round(0.3 * size), size - 1):
        assert torch.equal(topk_mask(scores, kept), stable_top(scores, kept))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_apply_mask_matches_where_except_for_the_sign_of_zero(dtype: torch.dtype) -> None:
    values, mask = vector("normal", 999, 1).sub(0.7).to(dtype).view(27, 37), vector("uniform", 999).view(27, 37) < 0.5
    before = values.clone()
    result = apply_mask(values, mask)
    assert result.dtype == dtype and torch.equal(result, torch.where(mask, values, 0.0))
    assert torch.equal(values, before) and mask.dtype == torch.bool
