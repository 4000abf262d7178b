"""Allocate one total of zeros unevenly over the layers of a model.

legend  p    sparsity over all layers                                   scalar
        p_s  sparsity of layer s                                        scalar
        n_s  weights of layer s                                         scalar
        E_s  predicted relative error of layer s over its sparsity      function
        c_s  weight of that error                                       scalar
Every allocation but OWL's minimises sum_s c_s E_s(p_s) under sum_s n_s p_s = p sum_s n_s with limits on every p_s: at
the optimum all layers inside the limits lose equally much by one more zero. `error` weights all layers equally.
`sensitivity` weights a layer by its part in the change of the model's predictions when its block is pruned, per unit of
its error: mean KL to the dense model's predictions on a few calibration windows, without gradients. OWL (Yin et al.,
arXiv 2310.05175): a block's sparsity falls with its share of outliers, entries of |W_ij| ||X_j|| above 5 times the mean
of their layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from alps.core.errors import ConfigError
from alps.models.blocks import Block
from alps.pruning.context import RunContext
from alps.pruning.recipe import PruneRecipe
from alps.pruning.sensitivity import SiteProfile, profile_sites, sensitivities
from alps.solvers.error_curve import POINTS, ErrorCurve
from alps.solvers.patterns import Pattern, Unstructured
from alps.solvers.topk import redistribute

_OWL_RANGE = 0.08
# Sparsities of layers stay within this distance of that of the model.
_MAX_DEVIATION = 0.15
# Windows and tokens on which predictions are compared.
PROBE_WINDOWS, PROBE_TOKENS = 2, 256
# Calibration tokens of curves and outliers.
ALLOCATION_TOKENS = 4096


def minimise_error(
    curves: Sequence[ErrorCurve], weights: Sequence[float], sparsity: float, max_deviation: float
) -> list[int]:
    """Return the zeros of every layer that minimise the weighted errors; their sum is that of a uniform allocation.

    Args:
        curves: of the layers.
        weights: c_s, none negative.
        sparsity: p.
        max_deviation: every p_s stays within [p - max_deviation, p + max_deviation], and within [0, 1].
    """
    sizes = torch.tensor([curve.entries for curve in curves], dtype=torch.float64)
    grid = torch.linspace(0, 1, POINTS, dtype=torch.float64)
    low, high = max(sparsity - max_deviation, 0.0), min(sparsity + max_deviation, 1.0)
    # Marginal loss of a zero, over the sparsity; a running maximum keeps it from falling where scores tie.
    slopes = torch.stack([w * c.errors.diff() / c.entries for c, w in zip(curves, weights, strict=True)])
    slopes = slopes.cummax(dim=1).values * (POINTS - 1)

    def sparsities(price: float) -> Tensor:
        return grid[torch.searchsorted(slopes, torch.full((len(curves), 1), price, dtype=torch.float64)).squeeze(1)]

    total = _uniform_total(curves, sparsity)
    bottom, top = 0.0, float(slopes.max()) * 2 + 1
    for _ in range(200):
        price = (bottom + top) / 2
        if float((sparsities(price).clamp(low, high) * sizes).sum()) < total:
            bottom = price
        else:
            top = price
    below, above = (sparsities(price).clamp(low, high) * sizes for price in (bottom, top))
    return _exact_counts(below, above, sizes, total)


def _uniform_total(curves: Sequence[ErrorCurve], sparsity: float) -> int:
    return sum(Unstructured(sparsity).pruned_count(curve.entries) for curve in curves)


def _exact_counts(below: Tensor, above: Tensor, sizes: Tensor, total: int) -> list[int]:
    """Return counts between two solutions on either side of the total that add up to it."""
    gap = float((above - below).sum())
    mixed = below + (above - below) * ((total - float(below.sum())) / gap if gap > 0 else 0.0)
    counts = [round(float(count)) for count in mixed]
    for index in sorted(range(len(counts)), key=lambda i: -float(sizes[i])) * 2:
        missing = total - sum(counts)
        counts[index] = min(max(counts[index] + missing, 0), int(sizes[index]))
    assert sum(counts) == total
    return counts


def check_fit(blocks: list[Block], pattern: Pattern, patterns: Mapping[str, Pattern]) -> None:
    """Refuse a pattern whose groups do not divide the inputs of every layer.

    Args:
        blocks: with the layers to prune.
        pattern: of all layers without a pattern of their own.
        patterns: of single layers by name.

    Raises:
        ConfigError: naming the layers.
    """
    misfits = [
        site for block in blocks for site in block.sites if not patterns.get(site.name, pattern).fits(site.shape[1])
    ]
    if misfits:
        pattern = patterns.get(misfits[0].name, pattern)
        names = ", ".join(f"{site.name} ({site.shape[1]})" for site in misfits[:3])
        more = f" and {len(misfits) - 3} more" if len(misfits) > 3 else ""
        raise ConfigError(
            f"Pattern {pattern} does not divide the number of inputs of {names}{more}: "
            "choose a group size that does, or an unstructured sparsity."
        )


def allocate_sparsity(
    model: nn.Module, blocks: list[Block], windows: Tensor, recipe: PruneRecipe, context: RunContext
) -> dict[str, Pattern]:
    """Return the patterns of all layers by name, none for a uniform allocation.

    Args:
        model: dense, in evaluation mode.
        blocks: decoder blocks with the layers over which zeros are spread.
        windows: calibration token ids (windows, tokens).
        recipe: allocation and pattern. With `keep_zeros` no layer gets fewer zeros than it has, and the others get
            fewer in exchange.
        context: device, and progress of one step for every block, two with probes.

    Raises:
        ConfigError: when every layer has a pattern of its own.
    """
    name, pattern = recipe.allocation, recipe.pattern
    if name == "uniform" or pattern.keeps_all:
        return {}
    assert isinstance(pattern, Unstructured)
    if not any(block.sites for block in blocks):
        raise ConfigError(
            f"Allocation '{name}' has no layers to allocate: every layer has its own pattern; use uniform."
        )
    windows = windows[: max(ALLOCATION_TOKENS // windows.shape[1], 1)]
    context.progress.start(f"allocation {name}", len(blocks) * (2 if name == "sensitivity" else 1))
    try:
        profiles = list(profile_sites(model, blocks, windows, pattern, context))
        weights = [1.0] * len(profiles)
        if name == "sensitivity":
            probe = windows[:PROBE_WINDOWS, :PROBE_TOKENS]
            weights = sensitivities(model, blocks, probe, profiles, pattern, context)
    finally:
        context.progress.finish()
    if name == "owl":
        counts = _owl_counts(profiles, pattern.sparsity)
    else:
        counts = minimise_error([p.curve for p in profiles], weights, pattern.sparsity, _MAX_DEVIATION)
    if recipe.keep_zeros:
        sizes = torch.tensor([p.curve.entries for p in profiles])
        room = sizes - torch.tensor([p.zeros for p in profiles])
        counts = (sizes - redistribute(sizes - torch.tensor(counts), room)).tolist()
    return {p.site.name: Unstructured(k / p.curve.entries) for p, k in zip(profiles, counts, strict=True)}


def _owl_counts(profiles: Sequence[SiteProfile], sparsity: float) -> list[int]:
    """Return the zeros of OWL: densities of blocks over twice `_OWL_RANGE` around the mean, by their outliers."""
    sizes = torch.tensor([p.curve.entries for p in profiles], dtype=torch.float64)
    # Blocks without a layer to prune are left out.
    owner = torch.unique(torch.tensor([p.block for p in profiles]), return_inverse=True)[1]
    outliers = torch.tensor([p.outliers for p in profiles], dtype=torch.float64)
    blocks = int(owner.max()) + 1
    weights = torch.zeros(blocks, dtype=torch.float64).index_add(0, owner, sizes)
    share = torch.zeros(blocks, dtype=torch.float64).index_add(0, owner, sizes * outliers) / weights
    spread = (share - share.min()) / (share.max() - share.min()).clamp_min(1e-12) * 2 * _OWL_RANGE
    density = 1 - sparsity + spread - (spread * weights).sum() / weights.sum()
    zeros = (1 - density.clamp(0, 1))[owner] * sizes
    return _exact_counts(zeros, zeros, sizes, _uniform_total([p.curve for p in profiles], sparsity))
