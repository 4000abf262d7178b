"""Profiles of the layers of a dense model: error curve, outliers, and sensitivity of the model's predictions.

`sensitivities` measures the change of the model's predictions when a layer is pruned alone, per unit of its error: mean
KL to the dense model's predictions on a few calibration windows, without gradients.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from alps.calibration.block_capture import capture_block_inputs
from alps.calibration.block_inputs import batch_tokens
from alps.calibration.input_statistics import observe
from alps.calibration.lm_head import Change, measure_divergences
from alps.calibration.replay_check import check_replay
from alps.core.errors import SolveFailed
from alps.core.statistics import Needs
from alps.models.blocks import Block, on_device
from alps.models.sites import Site
from alps.pruning.context import RunContext
from alps.pruning.layer_solver import check_finite_inputs
from alps.solvers.error_curve import ErrorCurve, error_curve, inverse_diagonal, removal_costs
from alps.solvers.patterns import Pattern, keep_largest
from alps.solvers.topk import apply_mask

# Entries of |W_ij| ||X_j|| above this multiple of the mean of their layer are outliers (OWL, arXiv 2310.05175).
_OUTLIER = 5.0
_DAMPING = 0.01


@dataclass(frozen=True)
class SiteProfile:
    """Properties of a layer of the dense model.

    Attributes:
        site: the layer.
        block: index of its block.
        zeros: weights that are zero already.
        curve: predicted error over the sparsity.
        outliers: share of outliers among its weights times input norms.
        norms: of its inputs, shape (in,).
        cut_error: relative error when it is pruned by Wanda's scores to the pattern of the run.
    """

    site: Site
    block: int
    zeros: int
    curve: ErrorCurve
    outliers: float
    norms: Tensor
    cut_error: float


def profile_sites(
    model: nn.Module, blocks: list[Block], windows: Tensor, pattern: Pattern, context: RunContext
) -> Iterator[SiteProfile]:
    """Yield the profiles of all layers of a dense model.

    Args:
        model: dense, in evaluation mode.
        blocks: its decoder blocks, with the layers to profile.
        windows: calibration token ids (windows, tokens).
        pattern: of the run.
        context: device, and progress of one step for every block.

    Raises:
        SolveFailed: when inputs of a layer are not finite.
    """
    device = context.device
    inputs = capture_block_inputs(model, blocks, windows, max(batch_tokens(blocks, device) // windows.shape[1], 1))
    check_replay(model, blocks, inputs, windows, device)
    for block in blocks:
        with on_device(block, device):
            for source in observe(block, inputs, Needs.GRAM, device).shared:
                stats = source.sums.into_stats()
                check_finite_inputs(stats, block, source.sites)
                diagonal, norms = inverse_diagonal(stats, _DAMPING), stats.norms()
                for site in source.sites:
                    weight = site.read().float()
                    scores, energy = weight.abs() * norms, stats.energy(weight)
                    cut = apply_mask(weight, keep_largest(scores, pattern))
                    yield SiteProfile(
                        site=site,
                        block=block.index,
                        zeros=int((weight == 0).sum()),
                        curve=error_curve(weight, removal_costs(weight, diagonal), energy),
                        outliers=float((scores > _OUTLIER * scores.mean()).float().mean()),
                        norms=norms,
                        cut_error=stats.energy(cut - weight) / energy if energy > 0 else 0.0,
                    )
            inputs.advance(block.index, block.module, device)
        context.progress.step(f"block {block.index} profiled")


def sensitivities(
    model: nn.Module,
    blocks: list[Block],
    windows: Tensor,
    profiles: Sequence[SiteProfile],
    pattern: Pattern,
    context: RunContext,
) -> list[float]:
    """Return the KL per unit of relative error of every layer when it is pruned alone by Wanda's scores.

    The experts of one parameter are pruned together, and share the KL per unit of their summed error: a probe of a few
    tokens would leave many of them without a token.

    Args:
        model: dense, in evaluation mode.
        blocks: its decoder blocks.
        windows: token ids of the probe (windows, tokens).
        profiles: of the layers.
        pattern: of the run.
        context: device, and progress of one step for every block.

    Raises:
        SolveFailed: when predictions are not finite.
    """
    parameters: dict[str, list[SiteProfile]] = {}
    for profile in profiles:
        parameters.setdefault(profile.site.parameter_name, []).append(profile)
    names = [[name for name, part in parameters.items() if part[0].block == block.index] for block in blocks]
    changes: list[list[Change]] = [[partial(_cut, parameters[name], pattern) for name in part] for part in names]
    values: dict[str, float] = {}

    def report(block: Block) -> None:
        context.progress.step(f"block {block.index} probed")

    divergence_lists = measure_divergences(model, blocks, windows, changes, device=context.device, on_block_done=report)
    for part, kls in zip(names, divergence_lists, strict=True):
        for name, kl in zip(part, kls, strict=True):
            if not math.isfinite(kl):
                raise SolveFailed(
                    f"The predictions with {name} pruned, or those of the dense model, are NaN or infinite: run with "
                    "--dtype bfloat16 or float32."
                )
            error = sum(profile.cut_error for profile in parameters[name])
            values[name] = max(kl, 0.0) / max(error, 1e-12)
    return [values[profile.site.parameter_name] for profile in profiles]


@contextmanager
def _cut(profiles: Sequence[SiteProfile], pattern: Pattern) -> Iterator[None]:
    """Context in which the layers of one parameter are pruned by Wanda's scores."""
    parameter = profiles[0].site.parameter
    dense = parameter.detach().clone()
    for profile in profiles:
        weight = profile.site.read().float()
        profile.site.write(apply_mask(weight, keep_largest(weight.abs() * profile.norms, pattern)))
    try:
        yield
    finally:
        parameter.detach().copy_(dense)
