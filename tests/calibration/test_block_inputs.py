"""The skeleton pass: replaying the blocks with what it recorded is the model, and the model is left as it was."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from alps.calibration.block_inputs import batch_tokens, capture_block_inputs, to_device
from alps.core.errors import UnsupportedModel
from alps.models.blocks import find_blocks
from helpers.decoders import decoder

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


def test_batches_are_as_many_tokens_as_suit_the_device(tiny_model: Callable[..., Any]) -> None:
    dense, experts = find_blocks(tiny_model("llama")), find_blocks(decoder("qwen2_moe"))
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert [batch_tokens(dense, cpu), batch_tokens(dense, gpu), batch_tokens(experts, cpu)] == [512, 4096, 4096]


def test_batches_may_differ_in_size_and_a_window_is_run_alone(tiny_model: Callable[..., Any], ids: Tensor) -> None:
    blocks = find_blocks(model := tiny_model("llama"))
    sizes = [3, 1, len(ids) - 4]
    inputs = capture_block_inputs(model, blocks, ids, sizes)
    assert [len(hidden) for hidden in inputs.hidden] == sizes
    with torch.no_grad():
        whole = inputs.run(0, blocks[0].module, 0, torch.device("cpu"))
        alone = [inputs.run(0, blocks[0].module, 0, torch.device("cpu"), window=window) for window in range(3)]
    torch.testing.assert_close(torch.cat(alone), whole)
    assert not torch.equal(alone[0], alone[1])


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
        wrong = inputs.arguments[0][7].run(blocks[1].module, expected[0])
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


def test_a_forward_that_someone_else_put_on_a_block_survives(tiny_model: Callable[..., Any], ids: Tensor) -> None:
    # accelerate's dispatch of a model over devices replaces the forward of instances in just this way.
    model = tiny_model("llama")
    blocks = find_blocks(model)
    real = blocks[1].module.forward

    def doubled(*args: Any, **kwargs: Any) -> Any:
        return 2 * real(*args, **kwargs)

    blocks[1].module.forward = doubled
    capture_block_inputs(model, blocks, ids, 3)
    assert blocks[1].module.__dict__.get("forward") is doubled


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
    assert len(capture_block_inputs(model, find_blocks(model), ids, 3).arguments) == 3


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


def test_arguments_are_moved_through_tuples_lists_and_dicts() -> None:
    tensor = torch.ones(2)
    moved = to_device({"mask": None, "tables": (tensor, [tensor, 3]), "flag": True}, torch.device("meta"))
    assert moved["mask"] is None and moved["flag"] is True and moved["tables"][1][1] == 3
    assert moved["tables"][0].is_meta and moved["tables"][1][0].is_meta
    assert isinstance(moved["tables"], tuple) and isinstance(moved["tables"][1], list)


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
    assert all(sorted(of_block) == [1, 2] for of_block in inputs.arguments)
