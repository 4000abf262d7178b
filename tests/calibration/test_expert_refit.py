"""Refit of kept experts: held-out errors, unchanged routers and removed experts, shared experts, and the fallback."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from alps.calibration.expert_records import MixtureTokens, record_tokens
from alps.calibration.expert_refit import output_maps, refit_experts, shared_maps
from alps.calibration.expert_width import narrow_experts, narrow_shared_expert
from alps.calibration.masked_router import Mixture, masked_routing
from alps.core.errors import ConfigError
from helpers.mixtures import EACH_KIND, find_mixture_blocks, inputs_of, mixture_model

_CPU = torch.device("cpu")
_KEPT = [0, 1, 3, 4, 6, 7]


def _record(kind: str, windows: int = 60) -> tuple[Any, Mixture, MixtureTokens]:
    model = mixture_model(kind)
    block, mixture = find_mixture_blocks(model)[-1]
    ids = torch.randint(64, (windows, 16), generator=torch.Generator().manual_seed(3))
    inputs = inputs_of(model, ids, block.index, batch_size=20)
    return model, mixture, record_tokens(mixture, block, inputs, device=_CPU, tokens=10**6)


def _error(mixture: Mixture, tokens: MixtureTokens) -> float:
    with torch.no_grad(), masked_routing(mixture, _KEPT):
        difference = mixture.run(tokens.hidden) - tokens.target
    weights = tokens.weights[:, None]
    return float((difference.square() * weights).sum() / (tokens.target.square() * weights).sum())


@pytest.mark.parametrize("kind", EACH_KIND)
def test_a_refit_lowers_the_held_out_error_and_changes_output_maps_alone(kind: str) -> None:
    model, mixture, tokens = _record(kind)
    _, held_out = tokens.split(5)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    error = _error(mixture, held_out)
    refit = refit_experts(mixture, tokens, _KEPT)
    assert refit.error_before == pytest.approx(error, rel=1e-4)
    assert refit.error_after == pytest.approx(_error(mixture, held_out), rel=1e-4)
    assert refit.error_after < refit.error_before
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    expected = {mixture.sites[-1].parameter_name}
    expected |= {name for name in before if "shared" in name and name.endswith("down_proj.weight")}
    prefix = mixture.sites[-1].parameter_name.rpartition(".experts.")[0]
    assert changed == {name for name in expected if name.startswith(prefix)}
    down = mixture.sites[-1].parameter
    for expert in (2, 5):
        assert torch.equal(down[expert], before[mixture.sites[-1].parameter_name][expert])


def test_a_refit_of_narrow_experts_leaves_their_other_columns_zero() -> None:
    _, mixture, tokens = _record("deepseek_v3", windows=20)
    narrow = narrow_experts(mixture, tokens, _KEPT, 16)
    shared = narrow_shared_expert(mixture, tokens, 16)
    channels = [*narrow.channels, *shared.channels]
    maps = [*output_maps(mixture, tokens.hidden, _KEPT), *shared_maps(mixture, tokens.hidden)]
    before = [site.read().clone() for site, _ in maps]
    refit = refit_experts(mixture, tokens, _KEPT, channels=channels)
    assert refit.prior is not None and refit.error_after < refit.error_before
    for (site, _), weight, kept in zip(maps, before, channels, strict=True):
        columns = torch.zeros(site.shape[1], dtype=torch.bool).index_fill(0, kept, True)
        assert not site.read()[:, ~columns].any()
        assert not torch.equal(site.read()[:, columns], weight[:, columns])


def test_weights_stay_when_no_prior_lowers_the_held_out_error() -> None:
    model, mixture, tokens = _record("olmoe", windows=10)
    # Targets of the fitted windows say nothing about those of the others.
    noise = torch.randn(tokens.target.shape, generator=torch.Generator().manual_seed(4))
    fit = (tokens.windows % 5 != 4)[:, None]
    misleading = MixtureTokens(tokens.hidden, torch.where(fit, noise * 9, tokens.target), tokens.windows)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    refit = refit_experts(mixture, misleading, _KEPT)
    assert refit.prior is None and refit.error_after == refit.error_before
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_single_window_is_refused() -> None:
    _, mixture, tokens = _record("olmoe", windows=1)
    with pytest.raises(ConfigError, match="at least two"):
        refit_experts(mixture, tokens, _KEPT)


def test_a_refit_is_deterministic() -> None:
    weights = []
    for _ in range(2):
        _, mixture, tokens = _record("qwen2_moe", windows=20)
        refit_experts(mixture, tokens, _KEPT)
        weights.append(mixture.sites[-1].parameter.detach().clone())
    assert torch.equal(*weights)
