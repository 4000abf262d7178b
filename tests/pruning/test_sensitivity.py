"""Profiles of the layers of a dense model, and what each of them matters to its predictions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from alps.core.errors import SolveFailed
from alps.models.blocks import find_blocks
from alps.pruning.sensitivity import SiteProfile, profile_sites, sensitivities
from alps.solvers.error_curve import POINTS
from alps.solvers.patterns import SemiStructured, Unstructured, keep_largest
from helpers.model_comparison import mean_kl, output_error, same_models
from helpers.runs import make_context

_PATTERN = Unstructured(0.6)


def test_profiles_are_those_of_the_real_inputs(
    tiny_model: Callable[..., Any],
    kind: str,
    ids: Tensor,
    site_inputs: Callable[[nn.Module, Tensor], dict[str, Tensor]],
) -> None:
    model = tiny_model(kind)
    with torch.no_grad():
        find_blocks(model)[1].sites[0].read()[0, :7] = 0
    blocks = find_blocks(model)
    profiles = list(profile_sites(model, blocks, ids, _PATTERN, make_context()))
    real = site_inputs(model, ids)
    assert {profile.site.name for profile in profiles} == {site.name for block in blocks for site in block.sites}
    for profile in profiles:
        weight, x = profile.site.read(), real[profile.site.name]
        norms = x.norm(dim=0)
        torch.testing.assert_close(profile.norms.double(), norms, rtol=1e-4, atol=1e-6)
        scores = weight.abs().double() * norms
        assert profile.outliers == pytest.approx(float((scores > 5 * scores.mean()).double().mean()), abs=2e-3)
        cut = torch.where(keep_largest(weight.abs() * profile.norms, _PATTERN), weight, 0.0)
        assert profile.cut_error == pytest.approx(output_error(weight, cut, x), rel=1e-3)
        assert profile.zeros == int((weight == 0).sum()) and f".{profile.block}." in profile.site.name
        assert profile.curve.entries == weight.numel()
        assert float(profile.curve.errors[-1]) > float(profile.curve.errors[POINTS // 2]) > 0
    assert sum(profile.zeros for profile in profiles) == 7


def test_a_sensitivity_is_a_share_of_the_divergence_of_its_pruned_block(
    tiny_model: Callable[..., Any], ids: Tensor
) -> None:
    model, dense = tiny_model("llama"), tiny_model("llama")
    blocks, pattern = find_blocks(model), SemiStructured(2, 4)
    profiles = list(profile_sites(model, blocks, ids, pattern, make_context()))
    values = sensitivities(model, blocks, ids, profiles, pattern, make_context())
    assert same_models(model, dense), "the model is left as it was"
    assert len(values) == len(profiles) == 21 and min(values) > 0

    def measure(pruned: list[SiteProfile]) -> tuple[float, float]:
        """Return the divergence with some layers of a block pruned, and the change of the block's output."""
        outputs: list[Tensor] = []
        before = [profile.site.read().clone() for profile in pruned]
        for one in (dense, model):
            layer = one.model.layers[pruned[0].block]
            hook = layer.register_forward_hook(lambda _module, _args, output: outputs.append(output))
            for profile, weight in zip(pruned, before, strict=True):
                cut = torch.where(keep_largest(weight.abs() * profile.norms, pattern), weight, 0.0)
                profile.site.write(cut if one is model else weight)
            with torch.no_grad():
                one(input_ids=ids)
            hook.remove()
        divergence = mean_kl(dense, model, ids)
        for profile, weight in zip(pruned, before, strict=True):
            profile.site.write(weight)
        y, changed = (output.double() for output in outputs)
        return divergence, float(((changed - y).square().sum(-1) / y.square().sum(-1)).mean())

    for index in range(3):
        part = [i for i, profile in enumerate(profiles) if profile.block == index]
        divergence, together = measure([profiles[i] for i in part])
        for i in part[::3]:
            share = measure([profiles[i]])[1] / together
            assert values[i] == pytest.approx(divergence * share / profiles[i].cut_error, rel=0.05)


def test_a_layer_without_influence_has_no_sensitivity(tiny_model: Callable[..., Any], ids: Tensor) -> None:
    model = tiny_model("llama")
    blocks = find_blocks(model)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.zero_()
    profiles = list(profile_sites(model, blocks, ids, _PATTERN, make_context()))
    values = sensitivities(model, blocks, ids, profiles, _PATTERN, make_context())
    muted = {p.site.name: v for p, v in zip(profiles, values, strict=True) if ".1.mlp." in p.site.name}
    assert len(muted) == 3 and max(muted.values()) < 1e-6 < min(v for v in values if v not in muted.values())


def test_values_that_are_not_finite_are_refused_with_their_layer(tiny_model: Callable[..., Any], ids: Tensor) -> None:
    model = tiny_model("llama")
    model.model.layers[1].input_layernorm.register_forward_hook(lambda *args: args[2] * torch.inf)
    with pytest.raises(SolveFailed, match=r"^Block 1: the inputs of model\.layers\.1\.self_attn\.q_proj, .* hold NaN"):
        list(profile_sites(model, find_blocks(model), ids, _PATTERN, make_context()))
    model = tiny_model("llama")
    blocks = find_blocks(model)
    profiles = list(profile_sites(model, blocks, ids, _PATTERN, make_context()))
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.inf)
    with pytest.raises(SolveFailed, match=r"^The predictions with block 0 pruned"):
        sensitivities(model, blocks, ids, profiles, _PATTERN, make_context())
