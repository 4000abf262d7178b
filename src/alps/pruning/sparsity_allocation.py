"""Where the zeros go: one total, spread unevenly over the sites.

legend  p    sparsity asked for over all sites                          scalar
        p_s  sparsity of site s                                         scalar
        n_s  weights of site s                                          scalar
        E_s  predicted relative error of site s over its sparsity       function
        c_s  weight of that error                                       scalar
Every budget but OWL's minimises sum_s c_s E_s(p_s) under sum_s n_s p_s = p sum_s n_s with a floor and a cap on every
p_s: at the optimum all sites inside the limits lose equally much by one more zero. `error` weighs all sites alike;
`sensitivity` weighs a site by how far the model's answers move when it is pruned alone, per unit of its error: mean KL
to the dense model's answers on a few calibration windows, no gradients. OWL (Yin et al., arXiv 2310.05175): a block's
sparsity falls with its share of outliers, entries of |W_ij| ||X_j|| above 5 times the mean of their site.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from alps.core.errors import ConfigError
from alps.core.progress import NoProgress, Progress
from alps.models.blocks import Block
from alps.pruning.sensitivity import SiteProfile, profile_sites, sensitivities
from alps.solvers.error_curve import POINTS, ErrorCurve
from alps.solvers.patterns import Pattern, Unstructured
from alps.solvers.topk import redistribute

ALLOCATIONS = ("uniform", "owl", "error", "sensitivity")
_OWL_RANGE = 0.08
# Sparsities stay within this distance of the one asked for.
_REACH = 0.15
# Windows and tokens on which the model's answers are compared.
PROBE_WINDOWS, PROBE_TOKENS = 2, 256
# Calibration tokens that curves and outliers are read from.
PLAN_TOKENS = 16384
_CPU = torch.device("cpu")


def allocate(curves: Sequence[ErrorCurve], weights: Sequence[float], sparsity: float, reach: float) -> list[int]:
    """Zeros for every site that minimise the weighted errors; as many in all as a uniform budget has.

    Args:
        curves: of the sites.
        weights: c_s, none negative.
        sparsity: p.
        reach: every p_s stays within [p - reach, p + reach], and within [0, 1].
    """
    sizes = torch.tensor([curve.entries for curve in curves], dtype=torch.float64)
    grid = torch.linspace(0, 1, POINTS, dtype=torch.float64)
    low, high = max(sparsity - reach, 0.0), min(sparsity + reach, 1.0)
    # Marginal loss of a zero, over the sparsity; a running maximum keeps it from falling where scores tie.
    slopes = torch.stack([w * c.errors.diff() / c.entries for c, w in zip(curves, weights, strict=True)])
    slopes = slopes.cummax(dim=1).values * (POINTS - 1)

    def shares(price: float) -> Tensor:
        return grid[torch.searchsorted(slopes, torch.full((len(curves), 1), price, dtype=torch.float64)).squeeze(1)]

    wanted = _uniform_total(curves, sparsity)
    bottom, top = 0.0, float(slopes.max()) * 2 + 1
    for _ in range(200):
        price = (bottom + top) / 2
        if float((shares(price).clamp(low, high) * sizes).sum()) < wanted:
            bottom = price
        else:
            top = price
    return _exact((shares(bottom).clamp(low, high) * sizes), (shares(top).clamp(low, high) * sizes), sizes, wanted)


def _uniform_total(curves: Sequence[ErrorCurve], sparsity: float) -> int:
    return sum(Unstructured(sparsity).pruned_count(curve.entries) for curve in curves)


def _exact(below: Tensor, above: Tensor, sizes: Tensor, wanted: int) -> list[int]:
    """Counts between two solutions on either side of the total that meet it exactly."""
    gap = float((above - below).sum())
    mixed = below + (above - below) * ((wanted - float(below.sum())) / gap if gap > 0 else 0.0)
    counts = [round(float(count)) for count in mixed]
    for index in sorted(range(len(counts)), key=lambda i: -float(sizes[i])) * 2:
        missing = wanted - sum(counts)
        counts[index] = min(max(counts[index] + missing, 0), int(sizes[index]))
    assert sum(counts) == wanted
    return counts


def check_fit(blocks: list[Block], pattern: Pattern, patterns: Mapping[str, Pattern]) -> None:
    """Refuse a pattern whose groups do not divide the inputs of every site.

    Raises:
        ConfigError: naming the sites.
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


def plan(
    model: nn.Module,
    blocks: list[Block],
    windows: Tensor,
    name: str,
    pattern: Pattern,
    device: torch.device = _CPU,
    respect_zeros: bool = False,
    progress: Progress | None = None,
) -> dict[str, Pattern]:
    """Patterns of all sites under a budget.

    Args:
        model: dense, in evaluation mode.
        blocks: its decoder blocks, with those sites that the zeros are spread over.
        windows: calibration token ids (windows, tokens).
        name: one of `ALLOCATIONS`.
        pattern: over all sites; unstructured unless the budget is uniform.
        device: where a block is run; it is brought there and back.
        respect_zeros: no site gets fewer zeros than it has; what that adds is taken from the others.
        watcher: told of every block that is read, or probed.

    Raises:
        ConfigError: for an unknown budget, or one that is not uniform with an N:M pattern.
    """
    if name == "uniform" or pattern.keeps_all:
        return {}
    assert isinstance(pattern, Unstructured)
    if not any(block.sites for block in blocks):
        raise ConfigError(f"Budget '{name}' has nothing to spread: every layer has its own pattern; use uniform.")
    sparsity = pattern.sparsity
    windows = windows[: max(PLAN_TOKENS // windows.shape[1], 1)]
    progress = progress or NoProgress()
    progress.start(f"budget {name}", len(blocks) * (2 if name == "sensitivity" else 1))
    try:
        readings = list(profile_sites(model, blocks, windows, pattern, device, progress))
        weights = [1.0] * len(readings)
        if name == "sensitivity":
            probe = windows[:PROBE_WINDOWS, :PROBE_TOKENS]
            weights = sensitivities(model, blocks, probe, readings, pattern, device, progress)
    finally:
        progress.finish()
    if name == "owl":
        counts = _owl_counts(readings, sparsity)
    else:
        counts = allocate([r.curve for r in readings], weights, sparsity, _REACH)
    if respect_zeros:
        sizes = torch.tensor([r.curve.entries for r in readings])
        room = sizes - torch.tensor([r.zeros for r in readings])
        counts = (sizes - redistribute(sizes - torch.tensor(counts), room)).tolist()
    return {r.site.name: Unstructured(k / r.curve.entries) for r, k in zip(readings, counts, strict=True)}


def _owl_counts(readings: Sequence[SiteProfile], sparsity: float) -> list[int]:
    """Zeros by OWL: densities of the blocks spread over twice `_OWL_RANGE` around the mean, by outliers."""
    sizes = torch.tensor([r.curve.entries for r in readings], dtype=torch.float64)
    # Blocks without a site to prune are left out.
    owner = torch.unique(torch.tensor([r.block for r in readings]), return_inverse=True)[1]
    outliers = torch.tensor([r.outliers for r in readings], dtype=torch.float64)
    blocks = int(owner.max()) + 1
    inside = torch.zeros(blocks, dtype=torch.float64).index_add(0, owner, sizes)
    share = torch.zeros(blocks, dtype=torch.float64).index_add(0, owner, sizes * outliers) / inside
    spread = (share - share.min()) / (share.max() - share.min()).clamp_min(1e-12) * 2 * _OWL_RANGE
    density = 1 - sparsity + spread - (spread * inside).sum() / inside.sum()
    zeros = (1 - density.clamp(0, 1))[owner] * sizes
    return _exact(zeros, zeros, sizes, _uniform_total([r.curve for r in readings], sparsity))
