"""Records of mixtures: replayed outputs, targets, positions of tokens and limits."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from alps.calibration.expert_records import MixtureTokens, expert_problem, record_tokens
from alps.calibration.masked_router import Mixture, find_mixture
from alps.core.distributed import ProcessGroup
from alps.models.blocks import Block
from alps.solvers.expert_selection import replayed_output
from helpers.mixtures import EACH_KIND, EXPERTS, GROUPED, find_mixture_blocks, inputs_of, mixture_model, sliced_model
from helpers.thread_group import run_in_threads

_CPU = torch.device("cpu")


def _record(
    kind: str, ids: Tensor, tokens: int = 40, *, grouped: bool = False
) -> tuple[object, Block, Mixture, MixtureTokens]:
    model = mixture_model(kind, 16 if grouped else EXPERTS, grouped=grouped)
    block, mixture = find_mixture_blocks(model)[-1]
    inputs = inputs_of(model, ids, block.index)
    return model, block, mixture, record_tokens(mixture, block, inputs, device=_CPU, tokens=tokens)


@pytest.mark.parametrize("kind", EACH_KIND)
def test_the_replay_of_a_subset_is_the_routed_part_of_the_sliced_mixture(kind: str, ids: Tensor) -> None:
    _check_replay(kind, ids, grouped=False)


@pytest.mark.parametrize("kind", GROUPED)
def test_the_replay_of_a_grouped_router_is_that_of_the_sliced_mixture(kind: str, ids: Tensor) -> None:
    _check_replay(kind, ids, grouped=True)


def _check_replay(kind: str, ids: Tensor, *, grouped: bool) -> None:
    model, block, mixture, tokens = _record(kind, ids, grouped=grouped)
    problem = expert_problem(mixture, tokens)
    assert problem.groups == (4 if grouped else 1)
    kept = [0, 2, 4, 7, 8, 9, 13, 14] if grouped else [0, 3, 4, 6, 7]
    sliced = next(m for b, m in find_mixture_blocks(sliced_model(model, kept)) if b.index == block.index)
    with torch.no_grad():
        expected = sliced.run(tokens.hidden) - tokens.target  # shared experts cancel
    replayed = replayed_output(problem, kept) - problem.target
    assert float((replayed - expected).norm()) < 1e-5 * float(tokens.target.norm())
    assert float(expected.norm()) > 1e-2 * float(tokens.target.norm())


def test_tokens_are_spread_equally_over_the_windows(ids: Tensor) -> None:
    _, _, _, tokens = _record("mixtral", ids, tokens=3 * len(ids))
    assert tokens.windows.tolist() == [window for window in range(len(ids)) for _ in range(3)]
    _, _, _, every = _record("mixtral", ids, tokens=10**6)
    assert len(every.hidden) == ids.numel()
    # Every recorded token is one of its window.
    by_window = every.hidden.view(*ids.shape, -1)
    for hidden, window in zip(tokens.hidden, tokens.windows, strict=True):
        assert bool((by_window[window] == hidden).all(dim=1).any())
    assert float(tokens.weights.mean()) == pytest.approx(1)
    fit, held_out = tokens.split(2)
    assert set(held_out.windows.tolist()) == set(range(1, len(ids), 2))
    assert len(fit.hidden) + len(held_out.hidden) == len(tokens.hidden)


def test_outputs_of_all_experts_stay_within_the_limit(ids: Tensor) -> None:
    _, _, mixture, tokens = _record("olmoe", ids)
    limit = EXPERTS * 10 * 32 * 4
    assert expert_problem(mixture, tokens, limit=limit).outputs.shape == (EXPERTS, 10, 32)
    assert expert_problem(mixture, tokens, most=7).outputs.shape == (EXPERTS, 7, 32)


def test_the_target_holds_a_share_of_the_dense_models_outputs(ids: Tensor) -> None:
    model = mixture_model("qwen3_moe")
    block, mixture = find_mixture_blocks(model)[-1]
    dense_inputs = inputs_of(model, ids, block.index)
    inputs = dense_inputs.copy()
    inputs.hidden[:] = [hidden + 0.1 * hidden.roll(1, dims=1) for hidden in inputs.hidden]
    dense = list[Tensor]()
    handle = mixture.module.register_forward_hook(lambda _module, _args, output: dense.append(output))
    with torch.no_grad():
        for batch in range(len(dense_inputs.hidden)):
            dense_inputs.run(block.index, block.module, batch, _CPU)
    handle.remove()

    def target(share: float) -> Tensor:
        return record_tokens(mixture, block, inputs, device=_CPU, tokens=10**6, dense_outputs=dense, share=share).target

    exact = record_tokens(mixture, block, dense_inputs, device=_CPU, tokens=10**6).target
    assert torch.allclose(target(1.0), exact, atol=1e-6)
    assert torch.allclose(target(0.5), (target(0.0) + exact) / 2, atol=1e-6)
    assert not torch.allclose(target(0.0), exact, atol=1e-3)
    assert find_mixture(block) is not None


def test_ranks_record_the_tokens_of_all_windows(ids: Tensor) -> None:
    model = mixture_model("glm4_moe")
    block, mixture = find_mixture_blocks(model)[0]
    alone = record_tokens(mixture, block, inputs_of(model, ids, block.index), device=_CPU, tokens=5 * len(ids))

    def record(group: ProcessGroup) -> MixtureTokens:
        copied = copy.deepcopy(model)
        block, mixture = find_mixture_blocks(copied)[0]
        inputs = inputs_of(copied, group.shard(ids), block.index, 1)
        return record_tokens(mixture, block, inputs, device=_CPU, tokens=5 * len(ids), group=group)

    for tokens in run_in_threads(2, record):
        for name in ("hidden", "target", "windows"):
            assert torch.allclose(getattr(tokens, name), getattr(alone, name), rtol=1e-5, atol=1e-5), name
