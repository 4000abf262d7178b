"""What a budget reads of every site before anything is pruned: its error curve, its outliers, its influence.

`sensitivities` measures how far the model's answers move when a site is pruned alone, per unit of its error: mean KL to
the dense model's answers on a few calibration windows, no gradients.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from alps.calibration.block_inputs import batch_tokens, capture_block_inputs
from alps.calibration.input_statistics import observe
from alps.calibration.lm_head import Change, divergences
from alps.core.progress import Progress
from alps.core.statistics import Needs
from alps.models.blocks import Block, on_device
from alps.models.sites import Site
from alps.solvers.error_curve import ErrorCurve, error_curve, inverse_diagonal, removal_costs
from alps.solvers.objective import relative_error
from alps.solvers.patterns import Pattern, keep_largest
from alps.solvers.topk import apply_mask

# Entries of |W_ij| ||X_j|| above so many times the mean of their site are outliers (OWL, arXiv 2310.05175).
_OUTLIER = 5.0
_DAMPING = 0.01


@dataclass(frozen=True)
class SiteProfile:
    """What is known of a site before anything is pruned.

    Attributes:
        site, block: the site, and the index of its block.
        zeros: weights that are zero already.
        curve: its predicted error over sparsity.
        outliers: share of its weights times input norms that stand out.
        norms: of its inputs, shape (in,).
        cut_error: its relative error when it is cut by Wanda's score at the sparsity asked for.
    """

    site: Site
    block: int
    zeros: int
    curve: ErrorCurve
    outliers: float
    norms: Tensor
    cut_error: float


def profile_sites(
    model: nn.Module, blocks: list[Block], windows: Tensor, pattern: Pattern, device: torch.device, progress: Progress
) -> Iterator[SiteProfile]:
    """Readings of all sites, from the dense model on `windows` (windows, tokens); cuts are to `pattern`.

    The watcher is told of every block.
    """
    inputs = capture_block_inputs(model, blocks, windows, max(batch_tokens(blocks, device) // windows.shape[1], 1))
    for block in blocks:
        with on_device(block, device):
            for shared in observe(block, inputs, Needs.GRAM, device).shared:
                stats = shared.sums.into_stats()
                diagonal, norms = inverse_diagonal(stats, _DAMPING), stats.norms()
                for site in shared.sites:
                    weight = site.read().float()
                    scores = weight.abs() * norms
                    cut = apply_mask(weight, keep_largest(scores, pattern))
                    yield SiteProfile(
                        site=site,
                        block=block.index,
                        zeros=int((weight == 0).sum()),
                        curve=error_curve(weight, removal_costs(weight, diagonal), stats),
                        outliers=float((scores > _OUTLIER * scores.mean()).float().mean()),
                        norms=norms,
                        cut_error=relative_error(cut, weight, stats),
                    )
            inputs.advance(block.index, block.module, device)
        progress.step(f"block {block.index} read")


def sensitivities(
    model: nn.Module,
    blocks: list[Block],
    windows: Tensor,
    readings: Sequence[SiteProfile],
    pattern: Pattern,
    device: torch.device,
    progress: Progress,
) -> list[float]:
    """KL per unit of relative error of every site, from cutting it alone by Wanda's score.

    The experts of one parameter are cut together, and share the KL per unit of their summed error: a probe of a few
    tokens would leave many of them alone without a token. The watcher is told of every block.
    """
    together: dict[str, list[SiteProfile]] = {}
    for reading in readings:
        together.setdefault(reading.site.parameter_name, []).append(reading)
    names = [[name for name, group in together.items() if group[0].block == block.index] for block in blocks]
    changes: list[list[Change]] = [[partial(_cut, together[name], pattern) for name in mine] for mine in names]
    found = {}

    def told(block: Block) -> None:
        progress.step(f"block {block.index} probed")

    for mine, values in zip(names, divergences(model, blocks, windows, device, changes, told), strict=True):
        for name, value in zip(mine, values, strict=True):
            error = sum(reading.cut_error for reading in together[name])
            found[name] = max(value, 0.0) / max(error, 1e-12)
    return [found[reading.site.parameter_name] for reading in readings]


@contextmanager
def _cut(group: Sequence[SiteProfile], pattern: Pattern) -> Iterator[None]:
    """Cut the sites of one parameter by Wanda's score for the time of the body."""
    parameter = group[0].site.parameter
    dense = parameter.detach().clone()
    for reading in group:
        weight = reading.site.read().float()
        reading.site.write(apply_mask(weight, keep_largest(weight.abs() * reading.norms, pattern)))
    try:
        yield
    finally:
        parameter.detach().copy_(dense)
