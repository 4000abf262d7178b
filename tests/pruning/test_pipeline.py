"""The walk over whole tiny models: what is pruned, what is not, and on which inputs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from alps.core.errors import ConfigError, SolveFailed
from alps.finetuning.reconstruction_parameters import ReconstructionParameters
from alps.models.blocks import find_blocks
from alps.solvers import METHODS, Alps, Wanda, get_method
from alps.solvers.patterns import Pattern, SemiStructured, Unstructured
from helpers.model_comparison import bits, layer_weights, output_error
from helpers.runs import prune

_CPU = torch.device("cpu")
_HALF = SemiStructured(2, 4)


@pytest.mark.parametrize("pattern", [Unstructured(0.6), _HALF], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_every_site_gets_its_zeros_and_nothing_else_changes(
    tiny_model: Callable[..., Any], kind: str, ids: Tensor, method: str, pattern: Pattern
) -> None:
    dense, model = tiny_model(kind), tiny_model(kind)
    results = prune(model, ids, get_method(method), pattern)
    sites = layer_weights(model)
    assert sorted(record.name for record in results.layers) == sorted(sites)
    for record in results.layers:
        weight = sites[record.name]
        zeros = weight == 0
        expected = round(0.6 * weight.numel()) if isinstance(pattern, Unstructured) else weight.numel() // 2
        assert int(zeros.sum()) == record.zeros == expected
        assert record.entries == weight.numel() and record.shape == tuple(weight.shape)
        assert int((bits(weight) == 0).sum()) == expected  # +0.0, and never -0.0
        if isinstance(pattern, SemiStructured):
            assert bool((zeros.reshape(-1, 4).sum(dim=1) == 2).all())
        assert f".{record.block}." in record.name and record.name.endswith(record.kind)
        assert record.error is not None and 0 < record.error <= 1
    pruned = {f"{name}.weight" for name in sites}
    for name, parameter in dense.named_parameters():
        assert torch.equal(bits(model.get_parameter(name)), bits(parameter)) != (name in pruned), name
    tied = [m.get_input_embeddings().weight is m.get_output_embeddings().weight for m in (dense, model)]
    assert tied == [kind != "llama"] * 2


def test_records_follow_the_blocks_in_order(tiny_model: Callable[..., Any], ids: Tensor) -> None:
    results = prune(tiny_model("llama"), ids, Wanda(), _HALF)
    assert [record.block for record in results.layers] == [0] * 7 + [1] * 7 + [2] * 7
    assert [record.kind for record in results.layers[14:]] == [
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    ]


@pytest.mark.parametrize("method", ["wanda", "alps"])
def test_every_block_is_pruned_on_what_the_pruned_ones_before_it_produce(
    tiny_model: Callable[..., Any],
    kind: str,
    ids: Tensor,
    site_inputs: Callable[[nn.Module, Tensor], dict[str, Tensor]],
    method: str,
) -> None:
    dense, model = tiny_model(kind), tiny_model(kind)
    results = prune(model, ids, get_method(method), _HALF)
    weights, pruned = layer_weights(dense), layer_weights(model)
    original = site_inputs(dense, ids)
    prefix = copy.deepcopy(dense)
    for block in find_blocks(prefix):
        # Blocks before this one are pruned here, this one and those after it are dense.
        real = site_inputs(prefix, ids)
        for record in (record for record in results.layers if record.block == block.index):
            W, W_hat = weights[record.name], pruned[record.name]
            assert record.error == pytest.approx(output_error(W, W_hat, real[record.name]), rel=1e-4)
            groups = W.reshape(-1, 4)
            by_size = groups.scatter(1, groups.abs().topk(2, largest=False).indices, 0.0).view(W.shape)
            assert record.magnitude_error == pytest.approx(output_error(W, by_size, real[record.name]), rel=1e-4)
            if block.index:
                other = output_error(W, W_hat, original[record.name])
                assert record.error != pytest.approx(other, rel=1e-3), "the dense prefix would do as well"
        for site in block.sites:
            site.write(pruned[site.name])


@pytest.mark.parametrize("settings", [{}, {"offload": True}, {"measure_error": False}], ids=str)
def test_the_answer_is_the_same_to_the_bit(
    tiny_model: Callable[..., Any], kind: str, ids: Tensor, settings: dict[str, bool]
) -> None:
    first, second = tiny_model(kind), tiny_model(kind)
    one = prune(first, ids, Alps(), Unstructured(0.6))
    two = prune(second, ids, Alps(), Unstructured(0.6), **settings)
    for name, parameter in first.named_parameters():
        assert torch.equal(bits(parameter), bits(second.get_parameter(name))), name
    measured = settings.get("measure_error", True)
    assert [r.error for r in two.layers] == [r.error if measured else None for r in one.layers]


def test_other_calibration_gives_another_answer(tiny_model: Callable[..., Any], ids: Tensor) -> None:
    first, second = tiny_model("llama"), tiny_model("llama")
    prune(first, ids, Alps(), _HALF)
    prune(second, ids.flip(1), Alps(), _HALF)
    name = "model.layers.0.mlp.down_proj.weight"
    assert not torch.equal(first.get_parameter(name), second.get_parameter(name))


def test_many_batches_give_what_one_gives(
    tiny_model: Callable[..., Any], ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, split = tiny_model("opt"), tiny_model("opt")
    one = prune(whole, ids, Wanda(), _HALF)
    monkeypatch.setattr(
        "alps.pruning.first_inputs.batch_tokens", lambda *_: 40
    )  # two windows of 16 tokens, and one in the last batch
    many = prune(split, ids, Wanda(), _HALF)
    for a, b in zip(one.layers, many.layers, strict=True):
        assert a.name == b.name and a.error == pytest.approx(b.error, rel=1e-4)


def test_windows_that_the_dense_model_does_not_see_count_for_the_gram_alone(
    tiny_model: Callable[..., Any], ids: Tensor
) -> None:
    def pruned(windows: Tensor, limit: int | None) -> dict[str, Tensor]:
        parameters = ReconstructionParameters(tokens=32, lr=1e-3, target=0.1, max_distinct_tokens=limit)
        options = {"true_sequential": True, "dense_target": 0.5, "reconstruction": parameters}
        prune(model := tiny_model("llama"), windows, "alps", _HALF, **options)
        return layer_weights(model)

    # Copies of the windows scale Gram and error by four, and tell nothing new.
    few, many = ids[:6], ids[:6].repeat(4, 1)
    once, copies, all_copies = pruned(few, None), pruned(many, few.numel()), pruned(many, None)
    for name, weight in once.items():
        torch.testing.assert_close(copies[name], weight, rtol=1e-4, atol=1e-5)
    assert any(not torch.allclose(all_copies[name], weight, rtol=1e-2) for name, weight in once.items())


def test_nothing_is_forwarded_for_a_method_that_reads_no_inputs(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("gpt2")
    results = prune(model, None, "magnitude", _HALF, measure_error=False)
    assert len(results.layers) == 12
    assert all(record.error is None and record.zeros == record.entries // 2 for record in results.layers)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", ["alps", "sparsegpt"])
def test_half_precision_models_get_exact_zeros(
    tiny_model: Callable[..., Any], kind: str, ids: Tensor, dtype: torch.dtype, method: str
) -> None:
    dense, model = tiny_model(kind, dtype), tiny_model(kind, dtype)
    results = prune(model, ids, get_method(method), Unstructured(0.6))
    weights = layer_weights(dense)
    for name, weight in layer_weights(model).items():
        expected = round(0.6 * weight.numel())
        assert weight.dtype == dtype
        assert int((bits(weight) == 0).sum()) == int((weight == 0).sum()) == expected, name
        assert bool(weight.isfinite().all()) and not torch.equal(weight, weights[name])
    assert all(record.error is not None and 0 < record.error < 1 for record in results.layers)


def test_alps_beats_magnitude_at_every_site_of_a_trained_model(stories: Any, english: str) -> None:
    from alps.models.load import load_model, load_tokenizer

    model, tokenizer = load_model(str(stories)), load_tokenizer(str(stories))
    tokens = torch.tensor(tokenizer(english[:20_000], verbose=False).input_ids)
    results = prune(model, tokens[: 24 * 64].view(24, 64), Alps(), Unstructured(0.6))
    assert len(results.layers) == 35
    for record in results.layers:
        assert record.error is not None and record.magnitude_error is not None
        assert 0 < record.error < record.magnitude_error <= 1, record.name
    ratio = [record.error / record.magnitude_error for record in results.layers]  # type: ignore[operator]
    assert sum(ratio) / 35 < 0.7


def _refusal(model: Any, pattern: SemiStructured) -> str:
    with pytest.raises(ConfigError) as caught:
        prune(model, None, "magnitude", pattern, measure_error=False)
    return str(caught.value)


def test_a_pattern_that_does_not_divide_names_the_sites(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama")
    before = copy.deepcopy(model.state_dict())
    message = _refusal(model, SemiStructured(4, 8))  # 32 inputs are whole groups of 8, 44 are not
    down = [f"model.layers.{i}.mlp.down_proj (44)" for i in range(3)]
    assert f"Pattern 4:8 does not divide the number of inputs of {', '.join(down)}: " in message
    message = _refusal(model, SemiStructured(3, 7))
    assert "model.layers.0.self_attn.q_proj (32), " in message and " and 18 more" in message
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_infinite_activations_name_the_block(tiny_model: Callable[..., Any], ids: Tensor) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[int(ids[2, 3]), 0] = float("inf")
    with pytest.raises(SolveFailed, match=r"^Block 0: the inputs of model\.layers\.0\.self_attn\.q_proj, .*NaN or"):
        prune(model, ids, Alps(), _HALF)


def test_activations_that_overflow_half_precision_name_the_block(tiny_model: Callable[..., Any], ids: Tensor) -> None:
    model = tiny_model("gpt2", torch.float16)
    with torch.no_grad():
        model.transformer.h[1].mlp.c_proj.bias.fill_(60_000.0)
        model.transformer.wte.weight.fill_(30_000.0)
    with pytest.raises(SolveFailed, match=r"^Block 2: the inputs of transformer\.h\.2\.attn\.c_attn hold NaN or"):
        prune(model, ids, get_method("magnitude"), _HALF)
