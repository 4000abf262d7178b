"""Input statistics: sites that share an input, and sums that are those of the real inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from alps.calibration.block_capture import capture_block_inputs
from alps.calibration.block_inputs import BlockInputs
from alps.calibration.input_statistics import observe
from alps.core.statistics import Needs
from alps.models.blocks import Block, find_blocks

_CPU = torch.device("cpu")
_GROUPS = {
    "llama": [{"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate_proj", "up_proj"}, {"down_proj"}],
    "opt": [{"q_proj", "k_proj", "v_proj"}, {"out_proj"}, {"fc1"}, {"fc2"}],
    "opt-postnorm": [{"q_proj", "k_proj", "v_proj"}, {"out_proj"}, {"fc1"}, {"fc2"}],
    "gpt2": [{"c_attn"}, {"c_proj"}, {"c_fc"}, {"c_proj"}],
}


def _advance(block: Block, inputs: BlockInputs) -> None:
    with torch.no_grad():
        for batch in range(len(inputs.hidden)):
            inputs.hidden[batch] = inputs.run(block.index, block.module, batch, _CPU)


def test_sites_that_read_one_tensor_share_one_record(tiny_model: Callable[..., Any], kind: str, ids: Tensor) -> None:
    model = tiny_model(kind)
    blocks = find_blocks(model)
    inputs = capture_block_inputs(model, blocks, ids, 3)
    seen = observe(blocks[0], inputs, Needs.GRAM, _CPU)
    assert [{site.kind for site in shared.sites} for shared in seen.shared] == _GROUPS[kind]
    names = [site.name for shared in seen.shared for site in shared.sites]
    assert sorted(names) == sorted(site.name for site in blocks[0].sites)
    assert seen.unused == []


@pytest.mark.parametrize("batch_size", [2, 7])
def test_the_sums_are_those_of_the_real_inputs(
    tiny_model: Callable[..., Any],
    kind: str,
    ids: Tensor,
    site_inputs: Callable[[nn.Module, Tensor], dict[str, Tensor]],
    batch_size: int,
) -> None:
    model = tiny_model(kind)
    blocks = find_blocks(model)
    real = site_inputs(model, ids)
    inputs = capture_block_inputs(model, blocks, ids, batch_size)
    for block in blocks:
        seen = observe(block, inputs, Needs.GRAM, _CPU)
        for shared in seen.shared:
            for site in shared.sites:
                x = real[site.name]
                assert shared.stats.tokens == len(x) == ids.numel()
                for got, expected in (
                    (shared.stats.gram(), x.T @ x),
                    (shared.stats.square, x.square().sum(dim=0)),
                    (shared.stats.total, x.sum(dim=0)),
                ):
                    scale = float(expected.abs().max())
                    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-5 * scale)
        _advance(block, inputs)


@pytest.mark.parametrize("needs", [Needs.NOTHING, Needs.MOMENTS])
def test_a_gram_is_collected_only_where_it_is_needed(tiny_model: Callable[..., Any], ids: Tensor, needs: Needs) -> None:
    model = tiny_model("llama")
    blocks = find_blocks(model)
    seen = observe(blocks[0], capture_block_inputs(model, blocks, ids, 3), needs, _CPU)
    assert all(shared.stats.upper is None for shared in seen.shared)
    assert all(shared.stats.tokens == ids.numel() for shared in seen.shared)


def test_observing_changes_neither_the_block_nor_its_inputs(tiny_model: Callable[..., Any], ids: Tensor) -> None:
    model = tiny_model("gpt2")
    blocks = find_blocks(model)
    inputs = capture_block_inputs(model, blocks, ids, 3)
    hidden = [tensor.clone() for tensor in inputs.hidden]
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    observe(blocks[0], inputs, Needs.GRAM, _CPU)
    assert all(torch.equal(a, b) for a, b in zip(inputs.hidden, hidden, strict=True))
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_hooks_are_removed_when_the_block_raises(tiny_model: Callable[..., Any], ids: Tensor) -> None:
    model = tiny_model("llama")
    blocks = find_blocks(model)
    inputs = capture_block_inputs(model, blocks, ids, 3)
    inputs.hidden[1] = inputs.hidden[1][..., :5]  # the second batch cannot be run
    with pytest.raises(RuntimeError):
        observe(blocks[0], inputs, Needs.GRAM, _CPU)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_sites_that_receive_nothing_are_reported(tiny_model: Callable[..., Any], ids: Tensor) -> None:
    class Spare(nn.Module):
        """A block with a linear map that its forward never calls."""

        def __init__(self, real: nn.Module) -> None:
            super().__init__()
            self.real, self.spare = real, nn.Linear(32, 32)

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.real(*args, **kwargs)

    model = tiny_model("llama")
    model.model.layers = nn.ModuleList([Spare(layer) for layer in model.model.layers])
    blocks = find_blocks(model)
    assert [len(block.sites) for block in blocks] == [8, 8, 8]
    seen = observe(blocks[0], capture_block_inputs(model, blocks, ids, 3), Needs.GRAM, _CPU)
    assert [site.name for site in seen.unused] == ["model.layers.0.spare"]
    assert len([site for shared in seen.shared for site in shared.sites]) == 7


def test_equal_tensors_that_are_not_the_same_are_kept_apart(ids: Tensor) -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, hidden: Tensor) -> Tensor:
            first, second, third = self.a(hidden), self.b(hidden.clone()), self.c(hidden)
            return torch.as_tensor(first + second + third)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(64, 8)
            self.layers = nn.ModuleList([Layer()])

        def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
            return self.layers[0](self.embed(input_ids))

    model = Model()
    blocks = find_blocks(model)
    seen = observe(blocks[0], capture_block_inputs(model, blocks, ids, 2), Needs.GRAM, _CPU)
    assert [[site.kind for site in shared.sites] for shared in seen.shared] == [["a", "c"], ["b"]]
    first, second = (shared.stats for shared in seen.shared)
    assert first.tokens == second.tokens == ids.numel()
    assert torch.equal(first.gram(), second.gram())


def test_a_site_that_first_receives_something_in_a_late_batch_is_not_forgotten(ids: Tensor) -> None:
    class Routed(nn.Module):
        """Sends the windows that begin with an even token to one map, the others to the other."""

        def __init__(self) -> None:
            super().__init__()
            self.even, self.odd = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, hidden: Tensor) -> Tensor:
            even = hidden[:, 0, 0] % 2 == 0
            out = torch.zeros_like(hidden)
            for selected, linear in ((even, self.even), (~even, self.odd)):
                if bool(selected.any()):
                    out[selected] = linear(hidden[selected])
            return out

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.anchor = nn.Parameter(torch.zeros(1))
            self.layers = nn.ModuleList([Routed()])

        def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
            return self.layers[0](input_ids[..., None].float().expand(-1, -1, 8))

    windows = ids[:4].clone()
    windows[:, 0] = torch.tensor([2, 4, 3, 6])
    model = Model()
    blocks = find_blocks(model)
    seen = observe(blocks[0], capture_block_inputs(model, blocks, windows, 1), Needs.GRAM, _CPU)
    assert [([site.kind for site in shared.sites], shared.stats.tokens) for shared in seen.shared] == [
        (["even"], 3 * windows.shape[1]),
        (["odd"], windows.shape[1]),
    ]
    assert seen.unused == []
    assert seen.shared[1].stats.total[0] == windows[2].sum()


class _Around(nn.Module):
    """A causal model around one block of width 8: embedding, block, nothing."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 8)
        self.layers = nn.ModuleList([block])

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Tensor:
        hidden: Tensor = self.layers[0](self.embed(input_ids))
        return hidden


class _Twice(nn.Module):
    """Calls its first, its last or no site twice: on what it returned, or on the same tensor again."""

    def __init__(self, twice: str, same: bool = False) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)
        self.twice, self.same = twice, same

    def forward(self, hidden: Tensor) -> Tensor:
        for name, linear in (("first", self.first), ("last", self.last)):
            out: Tensor = linear(hidden)
            hidden = linear(hidden if self.same else out) if name == self.twice else out
        return hidden


def _all_inputs(model: nn.Module, ids: Tensor, batch_size: int) -> dict[str, list[Tensor]]:
    """Everything that every linear map received in full forwards of all batches, call by call, float64."""
    received: dict[str, list[Tensor]] = {}

    def hook(name: str) -> Callable[..., None]:
        def keep(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            received.setdefault(name, []).append(args[0].detach().double().flatten(0, -2))

        return keep

    maps = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    handles = [module.register_forward_pre_hook(hook(name)) for name, module in maps]
    with torch.no_grad():
        for batch in torch.split(ids, batch_size):
            model(input_ids=batch)
    for handle in handles:
        handle.remove()
    return received


def _check_sums(model: nn.Module, ids: Tensor, batch_size: int) -> dict[str, int]:
    """Assert that the sums of the first block are those of full forwards; tokens of every site."""
    real = _all_inputs(model, ids, batch_size)
    blocks = find_blocks(model)
    seen = observe(blocks[0], capture_block_inputs(model, blocks, ids, batch_size), Needs.GRAM, _CPU)
    tokens = {}
    for shared in seen.shared:
        for site in shared.sites:
            x = torch.cat(real[site.name])
            tokens[site.kind] = shared.stats.tokens
            assert shared.stats.tokens == len(x)
            for got, expected in ((shared.stats.gram(), x.T @ x), (shared.stats.total, x.sum(dim=0))):
                scale = float(expected.abs().max())
                torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-5 * scale)
    assert seen.unused == []
    return tokens


@pytest.mark.parametrize("same", [False, True])
@pytest.mark.parametrize("twice", ["first", "last", "none"])
def test_a_site_that_is_called_twice_gets_both_inputs_in_every_batch(ids: Tensor, twice: str, same: bool) -> None:
    tokens = _check_sums(_Around(_Twice(twice, same)), ids, 2)
    assert tokens == {name: ids.numel() * (2 if name == twice else 1) for name in ("first", "last")}


class _Mixture(nn.Module):
    """Two maps that share the windows between them by their first token, then one for all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.even, self.odd, self.out = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, hidden: Tensor) -> Tensor:
        even = hidden[:, 0, 0] % 2 == 0
        mixed = torch.zeros_like(hidden)
        for selected, linear in ((even, self.even), (~even, self.odd)):
            if bool(selected.any()):
                mixed[selected] = linear(hidden[selected])
        out: Tensor = self.out(mixed)
        return out


class _Counted(_Around):
    """Feeds the block the token ids themselves."""

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Tensor:
        hidden: Tensor = self.layers[0](input_ids[..., None].float().expand(-1, -1, 8))
        return hidden


@pytest.mark.parametrize(
    "firsts",
    [[2, 3, 4, 6, 5, 8], [2, 3, 5, 7, 2, 2], [2, 2, 3, 3, 2, 3], [2, 3, 2, 3, 2, 3], [2, 4, 2, 4, 3, 3]],
    ids=["both, even, both", "both, odd, even", "even, odd, both", "both always", "odd at the end"],
)
def test_nothing_is_skipped_where_sites_meet_tokens_in_only_some_batches(ids: Tensor, firsts: list[int]) -> None:
    """A batch in which every site received tokens does not predict the next one."""
    windows = ids[:6].clone()
    windows[:, 0] = torch.tensor(firsts)
    tokens = _check_sums(_Counted(_Mixture()), windows, 2)
    odd = sum(first % 2 for first in firsts)
    width = windows.shape[1]
    assert tokens == {"even": (6 - odd) * width, "odd": odd * width, "out": 6 * width}


def test_later_batches_stop_at_the_last_input(tiny_model: Callable[..., Any], kind: str, ids: Tensor) -> None:
    model = tiny_model(kind)
    blocks = find_blocks(model)
    inputs = capture_block_inputs(model, blocks, ids, 2)
    runs: dict[str, int] = {}

    def count(name: str) -> Callable[..., None]:
        def forwarded(*_args: Any) -> None:
            runs[name] = runs.get(name, 0) + 1

        return forwarded

    handles = [site.module.register_forward_hook(count(site.name)) for site in blocks[0].sites]
    handles.append(blocks[0].module.register_forward_hook(count("block")))
    seen = observe(blocks[0], inputs, Needs.GRAM, _CPU)
    for handle in handles:
        handle.remove()
    batches, last = len(inputs.hidden), {site.name for site in seen.shared[-1].sites}
    assert batches == 4 and len(last) == 1
    assert runs == {site.name: 1 if site.name in last else batches for site in blocks[0].sites} | {"block": 1}
    assert all(shared.stats.tokens == ids.numel() for shared in seen.shared)


def test_the_first_batch_stops_there_too_in_a_block_like_one_before(
    tiny_model: Callable[..., Any], kind: str, ids: Tensor
) -> None:
    model = tiny_model(kind)
    blocks = find_blocks(model)
    inputs = capture_block_inputs(model, blocks, ids, 2)
    expected = observe(blocks[1], inputs, Needs.GRAM, _CPU)
    ended: list[str] = []
    for block in blocks[:2]:
        block.module.register_forward_hook(lambda *_, name=block.name: ended.append(name))
    inputs.called_once.clear()
    for block in blocks[:2]:
        seen = observe(block, inputs, Needs.GRAM, _CPU)
    # The first block ran to its end once, the second one never; its sums are those of a block that did.
    assert ended == [blocks[0].name]
    assert [[site.name for site in shared.sites] for shared in seen.shared] == [
        [site.name for site in shared.sites] for shared in expected.shared
    ]
    for shared, reference in zip(seen.shared, expected.shared, strict=True):
        assert shared.stats.tokens == ids.numel() and torch.equal(shared.stats.gram(), reference.stats.gram())
