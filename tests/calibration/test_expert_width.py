"""Narrower experts: stationarity, the same number of channels, starving experts and descent."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch

from alps.calibration.expert_records import MixtureTokens, record_tokens
from alps.calibration.expert_refit import output_maps, shared_maps
from alps.calibration.expert_width import narrow_experts, narrow_shared_expert
from alps.calibration.masked_router import Mixture, masked_routing
from alps.core.errors import ConfigError, UnsupportedModel
from helpers.mixtures import EACH_KIND, find_mixture_blocks, inputs_of, mixture_model

_CPU = torch.device("cpu")
_KEPT = [0, 2, 3, 5, 6, 7]


def _record(kind: str) -> tuple[Any, Mixture, MixtureTokens]:
    model = mixture_model(kind)
    block, mixture = find_mixture_blocks(model)[-1]
    ids = torch.randint(64, (12, 16), generator=torch.Generator().manual_seed(3))
    inputs = inputs_of(model, ids, block.index, batch_size=12)
    return model, mixture, record_tokens(mixture, block, inputs, device=_CPU, tokens=10**6)


@pytest.mark.parametrize("kind", EACH_KIND)
def test_each_expert_keeps_equally_many_channels_at_stationary_weights(kind: str) -> None:
    _, mixture, tokens = _record(kind)
    before = mixture.sites[-1].parameter.detach().clone()
    maps = output_maps(mixture, tokens.hidden, _KEPT)
    dense = [site.read().clone() for site, _ in maps]
    narrow = narrow_experts(mixture, tokens, _KEPT, 16)
    assert narrow.channels.shape == (6, 16)
    for number, ((site, inputs), weight) in enumerate(zip(maps, dense, strict=True)):
        channels = narrow.channels[number]
        rows, X = inputs()
        assert narrow.tokens[number] == len(rows)
        if not len(rows):
            continue
        X, omega = X.double(), tokens.weights[rows].double()
        gram = X.T @ (X * omega[:, None])
        gram += max(X.shape[1] / len(X), 0.01) * gram.diagonal().mean() * torch.eye(X.shape[1], dtype=torch.float64)
        difference = (site.read() - weight).double()
        gradient = difference @ gram
        assert float(gradient[:, channels].norm()) < 1e-5 * float((weight.double() @ gram).norm())
        objective, energy = (float(((W @ gram) * W).sum()) for W in (difference, weight.double()))
        assert narrow.errors[number] == pytest.approx(objective / energy, rel=1e-3)
        removed = [i for i in range(X.shape[1]) if i not in channels.tolist()]
        assert not site.read()[:, removed].any()
    assert sum(map(bool, narrow.tokens)) >= 4
    for expert in (1, 4):
        assert torch.equal(mixture.sites[-1].parameter[expert], before[expert])


def test_the_narrowed_mixture_is_closer_than_one_of_the_largest_columns() -> None:
    errors = []
    for chosen in ("solved", "largest"):
        _, mixture, tokens = _record("mixtral")
        if chosen == "solved":
            narrow_experts(mixture, tokens, range(8), 24)
        else:
            for site, _ in output_maps(mixture, tokens.hidden, range(8)):
                norms = site.read().norm(dim=0)
                site.write(site.read() * (norms >= norms.topk(24).values[-1]))
        with torch.no_grad(), masked_routing(mixture, range(8)):
            errors.append(float((mixture.run(tokens.hidden) - tokens.target).norm() / tokens.target.norm()))
    assert errors[0] < 0.8 * errors[1]


def test_an_expert_without_tokens_keeps_its_largest_columns() -> None:
    _, mixture, tokens = _record("olmoe")
    with torch.no_grad():
        routed = [len(inputs()[0]) for _, inputs in output_maps(mixture, tokens.hidden[:2], range(8))]
    unused = routed.index(0)
    site = output_maps(mixture, tokens.hidden[:2], [unused, *[i for i in range(8) if i != unused]])[0][0]
    weight = site.read().clone()
    narrow = narrow_experts(mixture, tokens.part(torch.arange(2)), range(8), 20)
    assert narrow.tokens[unused] == 0
    largest = weight.norm(dim=0).topk(20).indices.sort().values
    assert torch.equal(narrow.channels[unused], largest)
    assert torch.allclose(site.read()[:, largest], weight[:, largest])


def test_a_width_out_of_range_is_refused() -> None:
    _, mixture, tokens = _record("olmoe")
    with pytest.raises(ConfigError, match="49 channels cannot be kept of the 48"):
        narrow_experts(mixture, tokens, range(8), 49)


def test_channels_of_one_expert_are_the_best_of_all_sets() -> None:
    _, mixture, tokens = _record("qwen3_moe")
    ((site, inputs),) = output_maps(mixture, tokens.hidden, [0, 1])[:1]
    weight = site.read().double()
    rows, X = inputs()
    narrow = narrow_experts(mixture, tokens, [0, 1], 22)
    X = X.double() * tokens.weights[rows].double().sqrt()[:, None]
    gram = X.T @ X
    gram += max(24 / len(X), 0.01) * gram.diagonal().mean() * torch.eye(24, dtype=torch.float64)
    inverse = torch.linalg.inv(gram)
    energy = weight.T @ weight
    costs = {
        pair: float((torch.linalg.inv(inverse[list(pair)][:, pair]) * energy[list(pair)][:, pair]).sum())
        for pair in combinations(range(24), 2)
    }
    best = min(costs, key=costs.__getitem__)
    assert narrow.channels[0].tolist() == [i for i in range(24) if i not in best]


def test_the_shared_expert_keeps_channels_at_stationary_weights() -> None:
    _, mixture, tokens = _record("glm4_moe")
    ((site, inputs),) = shared_maps(mixture, tokens.hidden)
    weight, (rows, X) = site.read().double().clone(), inputs()
    narrow = narrow_shared_expert(mixture, tokens, 16)
    assert narrow.channels.shape == (1, 16) and narrow.tokens == [len(tokens.hidden)] == [len(rows)]
    X, omega = X.double(), tokens.weights.double()
    gram = X.T @ (X * omega[:, None])
    gram += max(24 / len(X), 0.01) * gram.diagonal().mean() * torch.eye(24, dtype=torch.float64)
    gradient = (site.read().double() - weight) @ gram
    assert float(gradient[:, narrow.channels[0]].norm()) < 1e-5 * float((weight @ gram).norm())
    removed = [i for i in range(24) if i not in narrow.channels[0].tolist()]
    assert not site.read()[:, removed].any() and site.read()[:, narrow.channels[0]].any(dim=0).all()


def test_a_mixture_without_a_shared_expert_has_none_to_narrow() -> None:
    _, mixture, tokens = _record("olmoe")
    with pytest.raises(UnsupportedModel, match="does not add the output of its shared expert unchanged"):
        narrow_shared_expert(mixture, tokens, 16)
