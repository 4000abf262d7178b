"""Replay of the blocks with the recorded inputs gives the model's outputs, and the model is left unchanged."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from alps.calibration.activation_store import ActivationStore
from alps.calibration.block_capture import capture_block_inputs
from alps.calibration.lm_head import LMHead
from alps.core.errors import UnsupportedModel
from alps.models.blocks import find_blocks
from helpers.handing_models import MODELS, REFUSED, HandingModel

_CPU = torch.device("cpu")


def _block_outputs(model: nn.Module, ids: Tensor) -> tuple[list[Tensor], Tensor]:
    """Outputs of every block of the real model, by plain hooks, and the logits."""
    outputs: list[Tensor] = []

    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        outputs.append(output if torch.is_tensor(output) else output[0])

    handles = [block.module.register_forward_hook(keep) for block in find_blocks(model)]
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    for handle in handles:
        handle.remove()
    return outputs, logits


def _logits_from(model: nn.Module, ids: Tensor, last: Tensor) -> Tensor:
    """The model's logits when its last block answers `last`."""
    block = find_blocks(model)[-1].module

    def answer(_module: nn.Module, _args: Any, output: Any) -> Any:
        return last if torch.is_tensor(output) else (last, *output[1:])

    handle = block.register_forward_hook(answer)
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids).logits
    handle.remove()
    return logits


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 9])
def test_replaying_the_blocks_is_the_model(
    tiny_model: Callable[..., Any], kind: str, ids: Tensor, batch_size: int
) -> None:
    model = tiny_model(kind)
    blocks = find_blocks(model)
    expected, logits = _block_outputs(model, ids)
    # The blocks must matter, or replaying wrong ones would pass.
    assert all((a - b).abs().max() > 0.1 for a, b in pairwise(expected))
    inputs = capture_block_inputs(model, blocks, ids, batch_size)
    assert [len(hidden) for hidden in inputs.hidden] == [len(batch) for batch in torch.split(ids, batch_size)]
    with torch.no_grad():
        for block, real in zip(blocks, expected, strict=True):
            for batch in range(len(inputs.hidden)):
                inputs.hidden[batch] = inputs.run(block.index, block.module, batch, _CPU)
            replayed = torch.cat(inputs.hidden)
            torch.testing.assert_close(replayed, real, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(_logits_from(model, ids, replayed), logits, rtol=1e-5, atol=1e-5)


def _gemma() -> Any:
    """Blocks of two kinds: sliding and full attention take other masks and other rotary tables."""
    config = Gemma3TextConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=44,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = Gemma3ForCausalLM(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0, 0.3)
    return model


def test_every_block_is_replayed_with_its_own_arguments(ids: Tensor) -> None:
    model = _gemma()
    blocks = find_blocks(model)
    expected, _ = _block_outputs(model, ids)
    inputs = capture_block_inputs(model, blocks, ids, 7)
    with torch.no_grad():
        for block, real in zip(blocks, expected, strict=True):
            inputs.hidden[0] = inputs.run(block.index, block.module, 0, _CPU)
            torch.testing.assert_close(inputs.hidden[0], real, rtol=1e-5, atol=1e-5)
        wrong = inputs.calls.run(0, blocks[1].module, expected[0], {}, batch=0).hidden
    assert (wrong - expected[1]).abs().max() > 1e-2, "the arguments of another block would do as well"


def test_a_replay_with_a_changed_block_is_not_the_model(tiny_model: Callable[..., Any], kind: str, ids: Tensor) -> None:
    model = tiny_model(kind)
    blocks = find_blocks(model)
    expected, logits = _block_outputs(model, ids)
    inputs = capture_block_inputs(model, blocks, ids, 7)
    with torch.no_grad():
        blocks[0].sites[0].parameter.mul_(0.5)
        changed = inputs.run(0, blocks[0].module, 0, _CPU)
    assert (changed - expected[0]).abs().max() > 1e-3
    assert (_logits_from(model, ids, expected[-1].flip(-1)) - logits).abs().max() > 1e-3


def test_the_model_is_left_as_it_was(tiny_model: Callable[..., Any], kind: str, ids: Tensor) -> None:
    model = tiny_model(kind)
    blocks = find_blocks(model)
    _, before = _block_outputs(model, ids)
    capture_block_inputs(model, blocks, ids, 3)
    assert all("forward" not in block.module.__dict__ for block in blocks)
    assert torch.equal(_block_outputs(model, ids)[1], before)


@pytest.mark.parametrize("stage", ["embedding", "first block", "head"])
def test_the_model_is_left_as_it_was_when_it_raises(tiny_model: Callable[..., Any], ids: Tensor, stage: str) -> None:
    model = tiny_model("llama")
    blocks = find_blocks(model)
    _, before = _block_outputs(model, ids)
    where = {
        "embedding": model.get_input_embeddings(),
        "first block": blocks[0].module.mlp,
        "head": model.get_output_embeddings(),
    }[stage]

    def fail(*_args: Any) -> None:
        raise RuntimeError("out of memory, say")

    handle = where.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory, say"):
        capture_block_inputs(model, blocks, ids, 3)
    handle.remove()
    assert all("forward" not in block.module.__dict__ for block in blocks)
    assert torch.equal(_block_outputs(model, ids)[1], before)


class _Layers(nn.Module):
    """A model that calls its three blocks in any order it is told to, and may do something between them."""

    def __init__(self, order: list[int], between: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 8)
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(8, 8)) for _ in range(3)])
        self.order, self.between = order, between

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Tensor:
        hidden: Tensor = self.embed(input_ids)
        for index in self.order:
            hidden = self.layers[index](hidden)
            hidden = hidden + self.between if self.between else hidden
        return hidden


def test_blocks_called_once_in_order_are_accepted(ids: Tensor) -> None:
    model = _Layers([0, 1, 2])
    assert len(capture_block_inputs(model, find_blocks(model), ids, 3).calls.arguments) == 3


@pytest.mark.parametrize(
    "order",
    [[0, 1], [0, 0, 1, 2], [0, 1, 1, 2], [0, 1, 2, 2], [0, 2, 1], [1, 2]],
    ids=["last never", "first twice", "middle twice", "last twice", "out of order", "first never"],
)
def test_blocks_that_are_not_walked_in_a_row_are_refused(ids: Tensor, order: list[int]) -> None:
    model = _Layers(order)
    with pytest.raises(UnsupportedModel, match="_Layers"):
        capture_block_inputs(model, find_blocks(model), ids, 3)


def test_a_model_that_works_between_its_blocks_is_refused(ids: Tensor) -> None:
    model = _Layers([0, 1, 2], between=1.0)
    with pytest.raises(UnsupportedModel, match="_Layers"):
        capture_block_inputs(model, find_blocks(model), ids, 3)


def test_the_output_head_runs_for_one_window_only(tiny_model: Callable[..., Any], kind: str, ids: Tensor) -> None:
    model = tiny_model(kind)
    calls = {"head": 0, "embedding": 0}

    def count(name: str) -> Callable[..., None]:
        def forwarded(*_args: Any) -> None:
            calls[name] += 1
            if name == "head":
                assert len(_args[1][0]) == 1

        return forwarded

    model.get_output_embeddings().register_forward_hook(count("head"))
    model.get_input_embeddings().register_forward_hook(count("embedding"))
    inputs = capture_block_inputs(model, find_blocks(model), ids, 2)
    # That window first, then four batches.
    assert calls == {"head": 1, "embedding": 5}
    assert [len(hidden) for hidden in inputs.hidden] == [2, 2, 2, 1]
    for of_block in inputs.calls.arguments:
        # One set of arguments for batches of one size: they do not depend on the tokens.
        assert of_block[0] is of_block[1] is of_block[2] and len(of_block) == 4


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_arguments_and_handed_values_belong_to_their_windows(name: str, batch_size: int) -> None:
    model = HandingModel(name)
    ids = torch.randint(0, 64, (6, 8), generator=torch.Generator().manual_seed(2))
    blocks = find_blocks(model)
    expected, logits = _block_outputs(model, ids)
    inputs = capture_block_inputs(model, blocks, ids, batch_size)
    other = inputs.copy()
    with torch.no_grad():
        for block, real in zip(blocks, expected, strict=True):
            real = inputs.calls.layout.from_model(real)
            for batch in range(len(inputs.hidden)):
                start = batch * batch_size
                for window in range(batch_size):
                    single = inputs.run(block.index, block.module, batch, _CPU, window=window)
                    torch.testing.assert_close(single[0], real[start + window])
            inputs.advance(block.index, block.module, _CPU)
            torch.testing.assert_close(torch.cat(inputs.hidden), real)
        # Another pass begins with the same values: runs leave nothing behind.
        for block in blocks:
            other.advance(block.index, block.module, _CPU)
    assert all(torch.equal(a, b) for a, b in zip(inputs.hidden, other.hidden, strict=True))
    assert not any(inputs.handed_on), "values that no later block reads are still held"
    head = LMHead(model, blocks, inputs.calls.layout)
    torch.testing.assert_close(head(torch.cat(inputs.hidden), ids), logits)


@pytest.mark.parametrize("name", MODELS)
def test_the_blocks_of_these_models_read_what_is_handed_to_them(name: str) -> None:
    # The test above would pass for any arguments if the blocks did not read them.
    ids = torch.randint(0, 64, (6, 8), generator=torch.Generator().manual_seed(2))
    logits = [HandingModel(name, strength)(ids).logits for strength in (0.3, 0.0)]
    assert (logits[0] - logits[1]).abs().max() > 1e-2 or name == "streams"


def test_arguments_of_windows_obey_the_memory_limit() -> None:
    ids = torch.randint(0, 64, (6, 8), generator=torch.Generator().manual_seed(2))
    blocks = find_blocks(model := HandingModel("tokens"))
    inputs = capture_block_inputs(model, blocks, ids, 2, activations=ActivationStore(limit=0))
    assert inputs.activations.held == 0
    for block in blocks:
        inputs.advance(block.index, block.module, _CPU)
    torch.testing.assert_close(torch.cat(inputs.hidden), _block_outputs(model, ids)[0][-1])


def test_an_argument_that_depends_on_several_windows_at_once_is_refused() -> None:
    ids = torch.randint(0, 64, (6, 8), generator=torch.Generator().manual_seed(2))
    model = HandingModel("batch")
    with pytest.raises(UnsupportedModel, match=REFUSED["batch"]):
        capture_block_inputs(model, find_blocks(model), ids, 2)
