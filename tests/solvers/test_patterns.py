"""Tests of patterns: exact counts, ties by position, and parsing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from alps.core.errors import ConfigError
from alps.solvers.patterns import (
    Pattern,
    SemiStructured,
    Unstructured,
    keep_largest,
    parse_pattern,
    topk_mask,
)

KINDS = ("normal", "bfloat16", "few values", "equal", "signed zeros and infinities")
many = settings(max_examples=150)
ratios = st.floats(0, 1, exclude_max=True, allow_nan=False)
seeds = st.integers(0, 10_000)


def scores_of(kind: str, seed: int, rows: int, columns: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    if kind == "normal":
        return torch.randn(rows, columns, generator=draw)
    if kind == "bfloat16":
        return (1 + 0.02 * torch.randn(rows, columns, generator=draw)).to(torch.bfloat16)
    if kind == "equal":
        return torch.full((rows, columns), 0.25)
    values = [0.0, 1.0, 1.0078125] if kind == "few values" else [-0.0, 0.0, torch.inf, 1e-45, 3e38]
    return torch.tensor(values)[torch.randint(0, len(values), (rows, columns), generator=draw)]


def naive_top(values: list[float], kept: int) -> list[bool]:
    """Return the mask of the largest values by a stable sort; among equal values the first are kept."""
    order = sorted(range(len(values)), key=lambda i: -values[i])
    chosen = set(order[:kept])
    return [i in chosen for i in range(len(values))]


def naive_groups(scores: Tensor, keep: int, group: int) -> Tensor:
    rows = []
    for row in scores.tolist():
        mask: list[bool] = []
        for start in range(0, len(row), group):
            mask += naive_top(row[start : start + group], keep)
        rows.append(mask)
    return torch.tensor(rows)


@many
@given(st.sampled_from(KINDS), seeds, st.integers(1, 9), st.integers(1, 33), ratios)
def test_matrix_scope_matches_a_stable_sort(kind: str, seed: int, rows: int, columns: int, ratio: float) -> None:
    scores = scores_of(kind, seed, rows, columns)
    mask = keep_largest(scores, Unstructured(ratio))
    assert mask.shape == scores.shape and mask.dtype == torch.bool
    assert int((~mask).sum()) == round(ratio * rows * columns)
    naive = naive_top(scores.flatten().tolist(), rows * columns - round(ratio * rows * columns))
    assert mask.flatten().tolist() == naive


@many
@given(st.sampled_from(KINDS), seeds, st.integers(1, 9), st.integers(1, 33), ratios)
def test_row_scope_has_even_and_exact_counts(kind: str, seed: int, rows: int, columns: int, ratio: float) -> None:
    scores = scores_of(kind, seed, rows, columns)
    mask = keep_largest(scores, Unstructured(ratio), scope="row")
    kept = mask.sum(dim=1).tolist()
    assert max(kept) - min(kept) <= 1
    assert rows * columns - sum(kept) == round(ratio * rows * columns)
    for row in range(rows):
        assert mask[row].tolist() == naive_top(scores[row].tolist(), kept[row])


@many
@given(
    st.sampled_from(KINDS),
    seeds,
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(2, 12),
    st.integers(0, 10),
)
def test_groups_match_a_stable_sort(kind: str, seed: int, rows: int, groups: int, group: int, keep: int) -> None:
    pattern = SemiStructured(1 + keep % (group - 1), group)
    scores = scores_of(kind, seed, rows, groups * group)
    mask = keep_largest(scores, pattern)
    assert (mask.reshape(-1, group).sum(dim=1) == pattern.keep).all()
    assert int((~mask).sum()) == pattern.pruned_count(scores.numel())
    assert torch.equal(mask, naive_groups(scores, pattern.keep, group))
    assert torch.equal(mask, keep_largest(scores, pattern, scope="row"))


def test_counts_of_known_patterns() -> None:
    assert Unstructured(0.7).pruned_count(10) == 7
    assert Unstructured(0.7).pruned_count(576 * 1536) == 619_315
    assert SemiStructured(2, 4).pruned_count(16) == 8
    assert SemiStructured(1, 4).pruned_count(16) == 12
    assert SemiStructured(3, 5).pruned_count(40) == 16
    assert SemiStructured(1, 4).sparsity == 0.75


def test_two_of_four_keeps_the_larger_ones() -> None:
    scores = torch.tensor([[1.0, 4.0, 3.0, 2.0, 5.0, 5.0, 5.0, 5.0]])
    expected = torch.tensor([[False, True, True, False, True, True, False, False]])
    assert torch.equal(keep_largest(scores, SemiStructured(2, 4)), expected)


def test_large_vectors_of_ties_are_exact() -> None:
    scores = torch.ones(1 << 20)
    assert topk_mask(scores, 1).nonzero().tolist() == [[0]]
    scores[12345] = 2.0
    mask = topk_mask(scores, 700_001)
    assert int(mask.sum()) == 700_001
    assert bool(mask[:700_001].all())


@pytest.mark.parametrize("kind", [*KINDS, "sawtooth", "sorted"])
@pytest.mark.parametrize("kept", [1, 2, 999, 35_000, 69_999, 70_000])
def test_large_vectors_match_a_stable_sort(kind: str, kept: int) -> None:
    """Use vectors that are sampled first; the period of the sawtooth is the stride, so that its sample is constant."""
    size = 70_001
    if kind == "sawtooth":
        scores = (torch.arange(size) % 61).float()
    elif kind == "sorted":
        scores = torch.arange(size).float()
    else:
        scores = scores_of(kind, 4, 1, size)[0]
    order = scores.float().sort(descending=True, stable=True).indices
    expected = torch.zeros(size, dtype=torch.bool)
    expected[order[:kept]] = True
    assert torch.equal(topk_mask(scores, kept), expected)


def test_topk_mask_of_none_and_of_all() -> None:
    scores = torch.tensor([3.0, 1.0, 2.0])
    assert topk_mask(scores, 0).tolist() == [False] * 3
    assert topk_mask(scores, 3).tolist() == [True] * 3
    assert topk_mask(scores, 1).tolist() == [True, False, False]


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("0.7", Unstructured(0.7)),
        ("70%", Unstructured(0.7)),
        (" 12.5 % ", Unstructured(0.125)),
        ("0", Unstructured(0.0)),
        ("2:4", SemiStructured(2, 4)),
        (" 1 : 4 ", SemiStructured(1, 4)),
        ("10:16", SemiStructured(10, 16)),
    ],
)
def test_parse_pattern(text: str, pattern: Pattern) -> None:
    assert parse_pattern(text) == pattern


@pytest.mark.parametrize("pattern", [Unstructured(0.7), Unstructured(0.125), SemiStructured(2, 4)])
def test_a_printed_pattern_reads_back(pattern: Pattern) -> None:
    assert parse_pattern(str(pattern)) == pattern


@pytest.mark.parametrize(
    "text",
    [
        "",
        "half",
        "1",
        "1.5",
        "-0.1",
        "100%",
        "-3%",
        "70%%",
        "nan",
        "inf",
        "0:4",
        "4:4",
        "5:4",
        "2:4:8",
        "-1:4",
    ],
)
def test_invalid_patterns_are_rejected(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_pattern(text)


def test_errors_name_valid_patterns() -> None:
    with pytest.raises(ConfigError, match=r"fraction such as 0\.7, or N:M such as 2:4"):
        parse_pattern("half")
    with pytest.raises(ConfigError, match=r"outside \[0, 1\)"):
        Unstructured(1.0)
    with pytest.raises(ConfigError, match="number KEPT first"):
        SemiStructured(4, 4)


def test_fits_and_keeps_all() -> None:
    assert SemiStructured(2, 4).fits(8) and not SemiStructured(2, 4).fits(6)
    assert Unstructured(0.5).fits(7)
    assert Unstructured(0.0).keeps_all and not Unstructured(0.01).keeps_all
    assert not SemiStructured(3, 4).keeps_all
