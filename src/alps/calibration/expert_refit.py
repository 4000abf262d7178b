"""Refit of a block's kept experts to the dense mixture's outputs, on tokens as they are routed without the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

from alps.calibration.dense_reference import MAX_CACHE_BYTES, input_hooks
from alps.calibration.expert_records import MixtureTokens, run_in_batches
from alps.calibration.masked_router import Mixture, down_inputs, masked_routing, route
from alps.calibration.replaced_forward import replaced_forward
from alps.core.errors import ConfigError
from alps.models.sites import Site
from alps.solvers.expert_refit import ExpertInputs, refit_output_maps

# Tokens of the prior, as multiples of an expert's inputs. The one of lowest held-out error is used.
PRIORS = (1.0, 4.0, 16.0)
# Every window of this number is held out.
HELD_OUT = 5
_SWEEPS = 2
# A shared expert's output must be this close to a multiple of its own map's output, token by token.
_MULTIPLE = 1e-3


# Linear map, and a function that computes the numbers of its tokens and their weighted inputs.
OutputMap = tuple[Site, Callable[[], ExpertInputs]]


@dataclass(frozen=True)
class ExpertRefit:
    """Result of a refit.

    Attributes:
        error_before: weighted squared error on held-out tokens with unchanged weights, relative to the target's.
        error_after: the same with the weights that were written.
        prior: multiple of the inputs in the prior; None if the weights were left unchanged.
    """

    error_before: float
    error_after: float
    prior: float | None


def refit_experts(
    mixture: Mixture,
    tokens: MixtureTokens,
    kept: Sequence[int],
    *,
    channels: Sequence[Tensor] = (),
    priors: Sequence[float] = PRIORS,
) -> ExpertRefit:
    """Refit the last maps of the kept experts, then that of a shared expert, and write them.

    Held-out windows choose the prior. If no prior lowers their error, the weights stay as they are. Three copies of the
    last maps are in memory.

    Args:
        mixture: with its dense weights.
        tokens: recorded inputs and targets.
        kept: numbers of the kept experts; only they are routed to, and only they are changed.
        channels: that stay of each kept expert, then of the shared expert; the other columns of their last maps are
            zero already, and remain so. Those without an entry keep all.
        priors: multiples of the inputs to try.

    Raises:
        ConfigError: if the tokens are from a single window.
    """
    windows = int(tokens.windows.max()) + 1
    if windows < 2:
        raise ConfigError("Experts cannot be refitted on one calibration window: use at least two.")
    fit, held_out = tokens.split(min(HELD_OUT, windows))
    maps = output_maps(mixture, fit.hidden, kept)
    maps += shared_maps(mixture, fit.hidden)
    for i, numbers in enumerate(channels):
        maps[i] = (maps[i][0], partial(_restricted, maps[i][1], numbers))
    dense = [site.read().clone() for site, _ in maps]
    with masked_routing(mixture, kept):
        residual = fit.target - run_in_batches(mixture.run, fit.hidden)
        error_before = best_error = _relative_error(mixture, held_out)
        best, best_prior = dense, None
        for prior in priors:
            changes = refit_output_maps(
                residual,
                [inputs for _, inputs in maps],
                fit.weights,
                prior_tokens=prior * maps[0][0].shape[1],
                sweeps=_SWEEPS,
            )
            refitted = [
                weight if change is None else site.write(weight.float() + change)
                for (site, _), weight, change in zip(maps, dense, changes, strict=True)
            ]
            error = _relative_error(mixture, held_out)
            if error < best_error:
                best, best_prior, best_error = refitted, prior, error
            _write(maps, dense)
    _write(maps, best)
    return ExpertRefit(error_before, best_error, best_prior)


def _write(maps: Sequence[OutputMap], weights: Sequence[Tensor]) -> None:
    for (site, _), weight in zip(maps, weights, strict=True):
        site.write(weight)


def _relative_error(mixture: Mixture, tokens: MixtureTokens) -> float:
    weights = tokens.weights[:, None]
    error = (run_in_batches(mixture.run, tokens.hidden) - tokens.target).square() * weights
    energy = tokens.target.square() * weights
    return float(error.sum(dtype=torch.float64) / energy.sum(dtype=torch.float64))


def output_maps(mixture: Mixture, hidden: Tensor, kept: Sequence[int]) -> list[OutputMap]:
    """Return the last map of each kept expert with its inputs, times the routing weights.

    Inputs are computed when the functions are called, and cached up to `MAX_CACHE_BYTES`.

    Args:
        mixture: with its dense weights.
        hidden: inputs (tokens, features) of the mixture, which are routed among the kept experts.
        kept: numbers of the kept experts.
    """
    index, weights = route(mixture, hidden, kept)
    maps, free_bytes = list[OutputMap](), MAX_CACHE_BYTES
    for expert in kept:
        rows, places = ((index == expert) & (weights != 0)).nonzero(as_tuple=True)
        site = down_inputs(mixture, hidden[:1], expert)[0]
        inputs: Callable[[], ExpertInputs] = partial(
            _expert_inputs, mixture, hidden, expert, rows, weights[rows, places].float()
        )
        size = 4 * len(rows) * site.shape[1]
        if size <= free_bytes:
            inputs, free_bytes = cache(inputs), free_bytes - size
        maps.append((site, inputs))
    return maps


def _expert_inputs(mixture: Mixture, hidden: Tensor, expert: int, rows: Tensor, weights: Tensor) -> ExpertInputs:
    if not len(rows):
        return rows, hidden.new_empty(0, 0, dtype=torch.float32)
    return rows, down_inputs(mixture, hidden[rows], expert)[1].float() * weights[:, None]


def _restricted(inputs: Callable[[], ExpertInputs], channels: Tensor) -> ExpertInputs:
    """Return the inputs of a map with zeros in all but some channels."""
    rows, X = inputs()
    if not len(rows):
        return rows, X
    return rows, torch.zeros_like(X).index_copy_(1, channels, X[:, channels])


def shared_maps(mixture: Mixture, hidden: Tensor) -> list[OutputMap]:
    """Return the last map of a shared expert with its weighted inputs; nothing if there is not exactly one.

    The weight of a token is the ratio of what the mixture adds to what the map returns, such as a sigmoid gate.
    """
    if len(mixture.shared) != 1 or not mixture.shared_sites:
        return []
    calls: list[tuple[Site, Tensor]] = []
    outputs: list[Tensor] = []
    handle = mixture.shared[0].register_forward_hook(lambda _module, _args, output: outputs.append(output))
    try:
        with (
            replaced_forward(mixture.experts, _zeros),
            input_hooks(mixture.shared_sites, lambda site, x: calls.append((site, x.flatten(0, -2)))),
        ):
            added = run_in_batches(mixture.run, hidden)
    finally:
        handle.remove()
    site = calls[-1][0]
    inputs = torch.cat([x for called, x in calls if called is site]).float()
    output = torch.cat([part.flatten(0, -2) for part in outputs]).float()
    weights = (added * output).sum(dim=1) / output.square().sum(dim=1).clamp_min(1e-30)
    if float((output * weights[:, None] - added).norm()) > _MULTIPLE * float(added.norm()):
        return []
    rows = torch.arange(len(hidden), device=hidden.device)
    weighted = inputs * weights[:, None]
    return [(site, lambda: (rows, weighted))]


def _zeros(hidden: Tensor, *_routing: Tensor) -> Tensor:
    return torch.zeros_like(hidden)
