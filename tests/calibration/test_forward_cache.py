"""Passes that go on behind what is settled: the bits of passes from the start of the block, and less work."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from alps.calibration.activation_store import ActivationStore
from alps.calibration.block_capture import capture_block_inputs
from alps.calibration.block_inputs import BlockInputs
from alps.calibration.dense_reference import DenseReference
from alps.calibration.forward_cache import CachedForward, CachedSubmodule
from alps.calibration.layer_order import calibrate
from alps.core.statistics import InputStats, Needs
from alps.finetuning.reconstruction_parameters import ReconstructionParameters
from alps.models.blocks import Block, find_blocks
from alps.models.sites import Site
from alps.solvers.patterns import SemiStructured
from helpers import runs
from helpers.decoders import DENSE, MOE, RECENT, decoder
from helpers.unusual_modules import DoublingAttention, InPlaceBlock, StridedMlp

# GPT-BigCode of transformers 5.0 scripts a function, which torch deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
_CPU = torch.device("cpu")


def _change(site: Site) -> None:
    weight = site.read()
    site.write(weight * (weight.abs() > 0.1).to(weight.dtype))


def _pass(block: Block, inputs: BlockInputs, dense: DenseReference) -> list[InputStats]:
    """Prunes a block in sequential order, and steps on; what was observed."""
    seen = []
    for observed in calibrate(block, inputs, Needs.INPUT_SHIFT, _CPU, true_sequential=True, reference=dense):
        for shared in observed.shared:
            seen.append(shared.stats)
            for site in shared.sites:
                _change(site)
    inputs.advance(block.index, block.module, _CPU)
    dense.advance(_CPU)
    return seen


def _walked(model: nn.Module, ids: Tensor, resumed: bool) -> tuple[list[InputStats], list[Tensor], list[list[str]]]:
    """Sums, outputs and last layers of the cached submodules of every block, over all blocks."""
    blocks = find_blocks(model)
    inputs = capture_block_inputs(model, blocks, ids, 3)
    dense = DenseReference.start(inputs, needed=True)
    sums, states, parts = list[InputStats](), list[Tensor](), list[list[str]]()
    for block in blocks:
        settled = CachedForward(block, inputs, _CPU) if resumed else inputs
        dense.begin_block(block)
        sums += _pass(block, settled, dense)
        states.append(torch.cat(inputs.hidden))
        if isinstance(settled, CachedForward):
            parts.append([part.last.kind for part in settled.submodules or ()])
            assert not any(part.inputs or part.outputs for part in settled.submodules or ())
    return sums, states, parts


def _observed(block: Block, inputs: BlockInputs, advances: bool = True) -> CachedForward:
    """After all passes over a block whose sites stay as they are."""
    settled = CachedForward(block, inputs, _CPU, advances)
    for _ in calibrate(block, settled, Needs.GRAM, _CPU, true_sequential=True):
        pass
    return settled


@pytest.mark.parametrize("kind", [*DENSE, *MOE, *RECENT])
def test_sums_and_states_are_those_of_passes_from_the_start(kind: str, ids: Tensor) -> None:
    plain_sums, plain_states, _ = _walked(decoder(kind), ids, resumed=False)
    sums, states, parts = _walked(decoder(kind), ids, resumed=True)
    assert all(torch.equal(a, b) for a, b in zip(states, plain_states, strict=True))
    for mine, theirs in zip(sums, plain_sums, strict=True):
        assert mine.tokens == theirs.tokens and mine.upper is not None and theirs.upper is not None
        assert torch.equal(mine.upper, theirs.upper)
        assert (mine.input_shift is None) == (theirs.input_shift is None)
        assert (
            mine.input_shift is None or theirs.input_shift is None or torch.equal(mine.input_shift, theirs.input_shift)
        )
    if kind in RECENT:
        return
    # BLOOM's and MPT's parts end with the sum that goes round them, XGLM's attention returns its weights, too;
    # blocks with experts are run from the start.
    assert all(parts) != (kind in {"bloom", "mpt", "xglm", *MOE}), parts


def test_parts_are_attention_and_mlp_by_their_last_sites(ids: Tensor) -> None:
    assert _walked(decoder("llama"), ids, resumed=True)[2][0] == ["o_proj", "down_proj"]
    assert _walked(decoder("gpt2"), ids, resumed=True)[2][0] == ["c_proj", "c_proj"]
    # OPT's two maps stand in the block itself.
    assert _walked(decoder("opt"), ids, resumed=True)[2][0] == ["out_proj"]
    assert not any(_walked(decoder("mixtral"), ids, resumed=True)[2])


def test_every_site_is_multiplied_once_a_batch(ids: Tensor) -> None:
    model = decoder("llama")
    blocks = find_blocks(model)
    inputs = capture_block_inputs(model, blocks, ids, 2)
    batches, products = len(inputs.hidden), Counter[str]()
    settled, dense = CachedForward(blocks[0], inputs, _CPU), DenseReference.start(inputs, needed=True)
    dense.begin_block(blocks[0])
    for site in blocks[0].sites:
        site.module.register_forward_hook(lambda *_, kind=site.kind: products.update([kind]))
    discovered = 1
    _pass(blocks[0], settled, dense)
    # One window twice to learn and to prove what can be left out; the second time by the last sites alone.
    expected = {site.kind: batches + discovered + 1 for site in blocks[0].sites}
    assert products == {**expected, "o_proj": expected["o_proj"] + 1, "down_proj": expected["down_proj"] + 1}


def _walked_both_ways(change: Callable[[Any], None], ids: Tensor) -> tuple[nn.Module, list[str]]:
    """Checks that passes that go on have the bits of those that do not; the model, and the parts of its first block."""
    found = []
    for resumed in (False, True):
        model = decoder("llama")
        change(model.model)
        found.append(_walked(model, ids, resumed))
    for mine, theirs in zip(found[1][0], found[0][0], strict=True):
        assert mine.upper is not None and theirs.upper is not None and torch.equal(mine.upper, theirs.upper)
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))
    return model, found[1][2][0]


def test_a_part_that_changes_what_its_last_site_gave_is_run_whole(ids: Tensor) -> None:
    def change(decoder: Any) -> None:
        for layer in decoder.layers:
            layer.self_attn = DoublingAttention(layer.self_attn)

    assert _walked_both_ways(change, ids)[1] == ["down_proj"]


def test_a_block_may_write_into_what_a_part_gave(ids: Tensor) -> None:
    def change(decoder: Any) -> None:
        for place, layer in enumerate(decoder.layers):
            decoder.layers[place] = InPlaceBlock(layer)

    assert _walked_both_ways(change, ids)[1] == ["o_proj", "down_proj"]


def test_a_view_of_something_wider_is_not_kept(ids: Tensor) -> None:
    def change(decoder: Any) -> None:
        for layer in decoder.layers:
            layer.mlp = StridedMlp(layer.mlp)

    model, _ = _walked_both_ways(change, ids)
    blocks = find_blocks(model)
    settled = _observed(blocks[0], capture_block_inputs(model, blocks, ids, 2))
    assert {part.last.kind: len(part.inputs) + len(part.outputs) for part in settled.submodules or ()} == {
        "o_proj": len(settled.hidden),
        "down_proj": 0,
    }


@pytest.mark.parametrize("step", [1, -1])
def test_any_order_and_passes_that_repeat_a_batch(step: int, ids: Tensor) -> None:
    """A last site that is observed before others of its part, or twice, tells what it receives once they are pruned."""
    found = []
    for resumed in (False, True):
        model = decoder("llama")
        blocks = find_blocks(model)
        inputs = capture_block_inputs(model, blocks, ids, 2)
        settled = CachedForward(blocks[0], inputs, _CPU) if resumed else inputs
        for site in blocks[0].sites[::step]:
            if isinstance(settled, CachedForward):
                settled.begin_pass([[site]])
            for batch in (*range(len(inputs.hidden)), 0):
                settled.run(0, blocks[0].module, batch, _CPU)
            _change(site)
        settled.advance(0, blocks[0].module, _CPU)
        found.append(torch.cat(settled.hidden))
    assert torch.equal(*found)


def test_a_single_window_begins_at_the_start(ids: Tensor) -> None:
    model = decoder("llama")
    blocks = find_blocks(model)
    inputs = capture_block_inputs(model, blocks, ids, 2)
    settled = _observed(blocks[0], inputs)
    settled.begin_pass([])
    with torch.no_grad():
        mine = settled.run(0, blocks[0].module, 0, _CPU, window=1)
        assert torch.equal(mine, inputs.run(0, blocks[0].module, 0, _CPU, window=1))
        assert torch.equal(settled.run(0, blocks[0].module, 0, _CPU), inputs.run(0, blocks[0].module, 0, _CPU))


def test_parts_are_kept_while_memory_allows(ids: Tensor) -> None:
    model = decoder("llama")
    blocks = find_blocks(model)
    inputs = capture_block_inputs(model, blocks, ids, 2)
    attention, mlp = 4 * ids.numel() * 32, 4 * ids.numel() * 48
    for limit, kinds in ((attention - 1, []), (attention, ["o_proj"]), (attention + mlp, ["o_proj", "down_proj"])):
        inputs.activations = ActivationStore(limit=limit)
        settled = CachedForward(blocks[0], inputs, _CPU)
        settled.begin_pass([])
        assert [part.last.kind for part in settled.submodules or ()] == kinds


def test_nothing_is_kept_for_a_pass_that_does_not_come(ids: Tensor) -> None:
    model = decoder("llama")
    blocks = find_blocks(model)
    settled = _observed(blocks[0], capture_block_inputs(model, blocks, ids, 2), advances=False)
    assert settled.submodules is not None
    assert [len(part.outputs) + len(part.inputs) for part in settled.submodules] == [len(settled.hidden), 0]


@pytest.mark.parametrize("matching", [None, ReconstructionParameters(epochs=1, tokens=48)])
def test_a_walk_gives_the_same_bits(
    matching: ReconstructionParameters | None,
    ids: Tensor,
    tiny_model: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers = []
    every: list[Callable[[CachedForward], list[CachedSubmodule]]] = [CachedForward._find_affordable, lambda _self: []]
    for parts in every:
        monkeypatch.setattr(CachedForward, "_find_affordable", parts)
        model = tiny_model("llama")
        pattern = SemiStructured(2, 4)
        runs.prune(model, ids, "sparsegpt", pattern, true_sequential=True, dense_target=0.4, reconstruction=matching)
        answers.append([parameter.clone() for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*answers, strict=True))
