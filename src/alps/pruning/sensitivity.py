"""Profiles of the layers of a dense model: error curve, outliers, and sensitivity of the model's predictions.

`sensitivities` measures the change of the model's predictions when layers are pruned, per unit of their error: mean KL
to the dense model's predictions on a few calibration windows, without gradients.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from alps.calibration.block_capture import capture_block_inputs
from alps.calibration.block_inputs import batch_tokens
from alps.calibration.input_statistics import observe
from alps.calibration.lm_head import Change, measure_divergences
from alps.calibration.replay_check import check_replay
from alps.core.errors import SolveFailed
from alps.core.statistics import Needs
from alps.finetuning.block_reconstruction import relative_loss
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
    """Return the KL per unit of relative error of every layer, when layers are pruned by Wanda's scores.

    The layers of a block are pruned together and carried to the predictions, which takes a seventh of the time of doing
    so one by one. The KL of the block is divided among them by their shares in the change of the block's output.

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
    parts = [[profile for profile in profiles if profile.block == block.index] for block in blocks]
    shares = _output_shares(model, blocks, windows, parts, pattern, context)
    changes: list[list[Change]] = [[partial(_cut, part, pattern)] if part else [] for part in parts]

    def report(block: Block) -> None:
        context.progress.step(f"block {block.index} probed")

    divergences = measure_divergences(model, blocks, windows, changes, device=context.device, on_block_done=report)
    values: dict[str, float] = {}
    for block, part, kls in zip(blocks, parts, divergences, strict=True):
        if not all(map(math.isfinite, kls)):
            raise SolveFailed(
                f"The predictions with block {block.index} pruned, or those of the dense model, are NaN or infinite: "
                "run with --dtype bfloat16 or float32."
            )
        for name, layers in _by_parameter(part).items():
            error = sum(profile.cut_error for profile in layers)
            values[name] = max(kls[0], 0.0) * shares[name] / max(error, 1e-12)
    return [values[profile.site.parameter_name] for profile in profiles]


def _output_shares(
    model: nn.Module,
    blocks: list[Block],
    windows: Tensor,
    parts: Sequence[Sequence[SiteProfile]],
    pattern: Pattern,
    context: RunContext,
) -> dict[str, float]:
    """Return by parameter the change of its block's output when it is pruned alone, over that when all layers are.

    A change is the mean over tokens of ||y' - y||^2 / ||y||^2. Without any change the share is 0.
    """
    inputs = capture_block_inputs(model, blocks, windows, len(windows))
    shares: dict[str, float] = {}
    with torch.no_grad():
        for block, part in zip(blocks, parts, strict=True):
            with on_device(block, context.device):
                run = partial(inputs.run, block.index, block.module, 0, context.device)
                output = run()

                def change(layers: Sequence[SiteProfile], run: Any = run, output: Tensor = output) -> float:
                    with _cut(layers, pattern):
                        return float(relative_loss(run(), output))

                together = change(part) if part else 0.0
                for name, layers in _by_parameter(part).items():
                    shares[name] = change(layers) / together if together > 0 else 0.0
                inputs.advance(block.index, block.module, context.device)
    return shares


def _by_parameter(profiles: Sequence[SiteProfile]) -> dict[str, list[SiteProfile]]:
    """Group profiles by the name of their parameter, which the experts of a fused one share."""
    groups: dict[str, list[SiteProfile]] = {}
    for profile in profiles:
        groups.setdefault(profile.site.parameter_name, []).append(profile)
    return groups


@contextmanager
def _cut(profiles: Sequence[SiteProfile], pattern: Pattern) -> Iterator[None]:
    """Context in which layers are pruned by Wanda's scores."""
    parameters = {id(profile.site.parameter): profile.site.parameter for profile in profiles}
    dense = {key: parameter.detach().clone() for key, parameter in parameters.items()}
    for profile in profiles:
        weight = profile.site.read().float()
        profile.site.write(apply_mask(weight, keep_largest(weight.abs() * profile.norms, pattern)))
    try:
        yield
    finally:
        for key, parameter in parameters.items():
            parameter.detach().copy_(dense[key])
