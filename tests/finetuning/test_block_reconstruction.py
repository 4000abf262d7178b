"""Block matching: the loss against a loop, the best state, exact masks, and nothing left behind on the parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import alps
from alps.calibration.block_capture import capture_block_inputs
from alps.calibration.block_inputs import BlockInputs
from alps.calibration.lm_head import LMHead
from alps.core.errors import SolveFailed
from alps.finetuning.block_reconstruction import OutputLoss, reconstruct_block, relative_loss
from alps.finetuning.reconstruction_parameters import ReconstructionParameters
from alps.models.blocks import Block, find_blocks
from alps.reporting.records import ReconstructionRecord

CPU = torch.device("cpu")
# Windows of 16 tokens, three in a batch: eight batches, of which the last is held back.
FAST = ReconstructionParameters(epochs=3, lr=2e-3, target=1.0)
BITS = {4: torch.int32, 2: torch.int16}


@dataclass
class Recording(BlockInputs):
    """Notes which batches are run through the watched block with gradients and which without."""

    watched: nn.Module | None = None
    trained: list[int] = field(default_factory=list)
    looked_at: list[int] = field(default_factory=list)

    def run(
        self, index: int, block: nn.Module, batch: int, device: torch.device, *, window: int | None = None
    ) -> Tensor:
        if not window and block is self.watched:
            (self.trained if torch.is_grad_enabled() else self.looked_at).append(batch)
        return super().run(index, block, batch, device, window=window)


@dataclass
class Case:
    """The first block of a pruned model, what it receives, and what the dense one answers."""

    block: Block
    inputs: Recording
    targets: list[Tensor]
    twin: Block

    def match(self, settings: ReconstructionParameters = FAST, seed: int = 0) -> ReconstructionRecord:
        return reconstruct_block(
            self.block, self.inputs, self.targets, settings, device=CPU, dense_block=self.twin, seed=seed
        )

    def bits(self) -> dict[str, Tensor]:
        return {
            name: parameter.detach().clone().view(BITS[parameter.element_size()])
            for name, parameter in self.block.module.named_parameters()
        }


@pytest.fixture
def case(tiny_model: Callable[..., Any]) -> Callable[..., Case]:
    def build(kind: str = "llama", dtype: torch.dtype = torch.float32) -> Case:
        ids = torch.randint(2, 64, (24, 16), generator=torch.Generator().manual_seed(5))
        dense = tiny_model(kind, dtype)
        pruned = copy.deepcopy(dense)
        alps.prune(pruned, sparsity=0.6, method="magnitude", measure_error=False)
        first = find_blocks(dense)
        targets = capture_block_inputs(dense, first, ids, 3)
        targets.advance(0, first[0].module, CPU)
        blocks = find_blocks(pruned)
        inputs = capture_block_inputs(pruned, blocks, ids, 3)
        watched = Recording(inputs.hidden, inputs.calls, inputs.window_tokens, watched=blocks[0].module)
        return Case(blocks[0], watched, targets.hidden, first[0])

    return build


def naive(output: Tensor, target: Tensor) -> list[float]:
    """||y - t||^2 / ||t||^2 of every token, number by number."""
    found = []
    for y, t in zip(output.double().flatten(0, -2).tolist(), target.double().flatten(0, -2).tolist(), strict=True):
        found.append(sum((a - b) ** 2 for a, b in zip(y, t, strict=True)) / sum(b * b for b in t))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_loss_is_the_mean_over_tokens_of_the_relative_error(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    output, target = (torch.randn(2, 5, 7, generator=generator).to(dtype) for _ in range(2))
    rows = naive(output, target)
    assert float(relative_loss(output, target)) == pytest.approx(sum(rows) / 10, rel=1e-5)


def test_a_massive_token_counts_no_more_than_any_other() -> None:
    generator = torch.Generator().manual_seed(2)
    target = torch.randn(1, 6, 8, generator=generator)
    output = target + 0.3 * torch.randn(1, 6, 8, generator=generator)
    loss, rows = float(relative_loss(output, target)), naive(output, target)
    scale = torch.ones(1, 6, 1)
    scale[0, 2] = 1e4
    assert float(relative_loss(scale * output, scale * target)) == pytest.approx(loss, rel=1e-5)
    # Three times the error of one token adds eight times its own share, and nothing elsewhere.
    wrong = output.clone()
    wrong[0, 2] = target[0, 2] + 3 * (output[0, 2] - target[0, 2])
    assert float(relative_loss(scale * wrong, scale * target)) == pytest.approx(loss + 8 * rows[2] / 6, rel=1e-5)


def test_a_token_without_energy_gives_a_finite_loss() -> None:
    assert bool(relative_loss(torch.ones(1, 2, 3), torch.zeros(1, 2, 3)).isfinite())


@pytest.mark.parametrize("target", [0.0, 0.4, 1.0])
def test_the_record_tells_the_loss_on_the_held_back_batch_before_and_after(
    case: Callable[..., Case], target: float
) -> None:
    one = case()
    # Of a first block both models receive the same: what comes from a pruned prefix does not.
    generator = torch.Generator().manual_seed(6)
    one.inputs.hidden = [x + 0.3 * x.std() * torch.randn(x.shape, generator=generator) for x in one.inputs.hidden]
    with torch.no_grad():
        near = BlockInputs.run(one.inputs, 0, one.twin.module, 7, CPU)
    assert float(relative_loss(near, one.targets[7])) > 0.01
    wanted = (1 - target) * near.double() + target * one.targets[7].double()

    def held_back() -> float:
        with torch.no_grad():
            output = BlockInputs.run(one.inputs, 0, one.block.module, 7, CPU)
        return sum(naive(output, wanted)) / (3 * 16)

    before = held_back()
    record = one.match(replace(FAST, target=target))
    assert record.before == pytest.approx(before, rel=1e-5)
    assert record.after == pytest.approx(held_back(), rel=1e-5)
    assert record.after < 0.9 * record.before
    assert record.steps == 3 * 7 and 0 < record.best_step <= 21
    assert set(one.inputs.looked_at[:-1]) == {7}
    epochs = [sorted(one.inputs.trained[7 * i : 7 * i + 7]) for i in range(3)]
    assert epochs == [list(range(7))] * 3 and one.inputs.trained[:7] != one.inputs.trained[7:14]


@pytest.mark.parametrize(("limit", "steps"), [(None, 21), (21 * 48, 21), (21 * 48 - 1, 20), (4 * 48, 4), (1, 1)])
def test_training_ends_after_its_tokens(case: Callable[..., Case], limit: int | None, steps: int) -> None:
    one = case()
    record = one.match(replace(FAST, max_tokens=limit))
    assert record.steps == len(one.inputs.trained) == steps and record.best_step <= steps
    # No batch comes again before all others have.
    assert len(set(one.inputs.trained[:7])) == min(steps, 7)


@pytest.mark.parametrize(("batches", "looked_at"), [(8, {4, 5, 6, 7}), (4, {2, 3}), (2, {1})])
def test_batches_without_dense_outputs_are_left_out(
    case: Callable[..., Case], batches: int, looked_at: set[int]
) -> None:
    one = case()
    del one.targets[batches:]
    one.match(replace(FAST, held_back=0.5))
    assert set(one.inputs.looked_at) == looked_at
    assert set(one.inputs.trained) == set(range(batches)) - looked_at


@pytest.mark.parametrize("target", [0.4, 1.0])
def test_the_dense_block_runs_once_for_every_window_whatever_the_epochs(
    case: Callable[..., Case], target: float
) -> None:
    one, calls = case(), []
    one.twin.module.register_forward_pre_hook(lambda *_: calls.append(1))
    one.match(replace(FAST, target=target))
    assert len(calls) == (24 if target < 1 else 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_absurd_rate_leaves_the_block_as_it_was(case: Callable[..., Case], dtype: torch.dtype) -> None:
    one = case(dtype=dtype)
    before = one.bits()
    record = one.match(replace(FAST, epochs=2, lr=100.0))
    assert (record.after, record.best_step, record.steps) == (record.before, 0, 14)
    after = one.bits()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_best_state_is_kept_when_later_ones_are_worse(
    case: Callable[..., Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    from alps.finetuning import block_reconstruction as matching

    monkeypatch.setattr(matching._Training, "_rate_share", lambda self, done: 1.0 if done < 0.5 else 1e4)
    one = case()
    record = one.match()
    assert 0 < record.best_step <= 11 and record.steps == 21
    with torch.no_grad():
        output = BlockInputs.run(one.inputs, 0, one.block.module, 7, CPU)
    assert sum(naive(output, one.targets[7])) / 48 == pytest.approx(record.after, rel=1e-5)
    assert record.after < record.before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zeros_stay_zeros_and_kept_weights_stay_kept(case: Callable[..., Case], kind: str, dtype: torch.dtype) -> None:
    one = case(kind, dtype)
    before = one.bits()
    record = one.match()
    assert record.after < record.before
    sites = {site.parameter_name.removeprefix(one.block.name + ".") for site in one.block.sites}
    for name, bits in one.bits().items():
        assert not torch.equal(bits, before[name]), name
        if name in sites:
            # +0.0 has no bit set: neither sign nor mask may change.
            assert torch.equal(bits == 0, before[name] == 0)
            assert abs(float((bits == 0).float().mean()) - 0.6) < 0.01


@pytest.mark.parametrize("norms", [True, False])
def test_norms_and_biases_are_tuned_only_where_asked(case: Callable[..., Case], kind: str, norms: bool) -> None:
    one = case(kind)
    before = one.bits()
    one.match(ReconstructionParameters(epochs=1, lr=2e-3, norms=norms))
    for name, bits in one.bits().items():
        assert torch.equal(bits, before[name]) == (bits.ndim == 1 and not norms), name


def test_flags_and_gradients_are_given_back(case: Callable[..., Case]) -> None:
    one = case()
    parameters = list(one.block.module.parameters())
    for i, parameter in enumerate(parameters):
        parameter.requires_grad_(i % 2 == 0)
    with torch.no_grad():
        one.match()
        assert not torch.is_grad_enabled()
    assert [parameter.requires_grad for parameter in parameters] == [i % 2 == 0 for i in range(len(parameters))]
    assert all(parameter.grad is None for parameter in parameters)
    assert all(not parameter._post_accumulate_grad_hooks for parameter in parameters)


def test_equal_seeds_give_equal_weights(case: Callable[..., Case]) -> None:
    found = []
    for seed in (1, 1, 2):
        one = case()
        one.match(seed=seed)
        found.append(one.bits()["mlp.up_proj.weight"])
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_a_block_without_a_weight_left_is_looked_at_only(case: Callable[..., Case]) -> None:
    one = case()
    with torch.no_grad():
        for site in one.block.sites:
            site.parameter.zero_()
    record = one.match(ReconstructionParameters(norms=False))
    assert record.after == record.before > 0 and (record.steps, record.best_step) == (0, 0)
    assert one.inputs.trained == []


def test_a_single_batch_is_trained_on_and_looked_at(case: Callable[..., Case]) -> None:
    one = case()
    del one.inputs.hidden[1:], one.targets[1:]
    record = one.match()
    assert record.steps == 3 and record.after < record.before
    assert set(one.inputs.trained) == set(one.inputs.looked_at) == {0}


def test_a_walk_aims_at_the_share_it_is_told(tiny_model: Callable[..., Any]) -> None:
    ids = torch.randint(2, 64, (24, 16), generator=torch.Generator().manual_seed(5))
    before = []
    for share in (0.0, 0.3, 1.0):
        model = tiny_model("llama")
        options: dict[str, Any] = {"reconstruct_epochs": 1, "reconstruct_target": share, "measure_error": False}
        report = alps.prune(model, sparsity=0.6, method="magnitude", calibration=ids, **options)
        before.append([match.before for match in report.reconstructions])
    first, second, _ = zip(*before, strict=True)
    # Both sides of the first block receive the same: all shares are one there.
    assert first[0] == first[1] == first[2]
    # Later the dense stream is farther away than what the dense block makes of the pruned prefix's inputs.
    assert second[0] < second[1] < second[2]


def test_outputs_that_are_not_finite_stop_the_run(case: Callable[..., Case]) -> None:
    one = case()
    one.targets[7][0, 0, 0] = torch.inf
    with pytest.raises(SolveFailed, match="Block 0: its outputs are not finite"):
        one.match()


@pytest.mark.parametrize("target", [0.1, 1.0])
def test_the_last_block_is_matched_by_the_predictions_of_the_whole_model_whatever_the_target(
    tiny_model: Callable[..., Any], kind: str, target: float
) -> None:
    ids = torch.randint(2, 64, (24, 16), generator=torch.Generator().manual_seed(5))
    dense, model = tiny_model(kind), tiny_model(kind)
    last = find_blocks(model)[-1]
    for site in (site for block in find_blocks(model) for site in block.sites):
        weight = site.read()
        site.write(weight * (weight.abs() > weight.abs().median()))
    sides = []
    for one in (dense, model):
        blocks = find_blocks(one)
        inputs = capture_block_inputs(one, blocks, ids, 3)
        for block in blocks[: -1 if one is model else None]:
            inputs.advance(block.index, block.module, CPU)
        sides.append(inputs)
    outside = {name: p.detach().clone() for name, p in model.named_parameters() if last.name not in name}

    def divergence() -> float:
        with torch.no_grad():
            p, q = (one(input_ids=ids[-3:]).logits.double().log_softmax(-1) for one in (dense, model))
        return float((p.exp() * (p - q)).sum(-1).mean())

    before = divergence()
    predictions = OutputLoss(LMHead(model, find_blocks(model)), torch.split(ids, 3))
    parameters, twin = replace(FAST, target=target), find_blocks(dense)[-1]
    record = reconstruct_block(
        last, sides[1], sides[0].hidden, parameters, device=CPU, dense_block=twin, output_loss=predictions
    )
    assert record.before == pytest.approx(before, rel=1e-4)
    assert record.after == pytest.approx(divergence(), rel=1e-4) and record.after < 0.95 * before
    for name, value in outside.items():
        assert torch.equal(value, model.get_parameter(name)), name
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
