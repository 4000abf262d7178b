"""Code that reads the weight of a packed layer gets the packed values, and its changes are kept."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import alps
from alps.checkpoints.bitmask_codec import pack
from alps.checkpoints.pack import pack_directory
from alps.inference.convert import as_out_in, packed_layer, packed_modules
from alps.inference.lazy_weight import LazyWeight
from alps.inference.packed_linear import PackedLinear
from helpers.packed_models import logits, prune
from helpers.packing import pruned


def layers(kind: str, dtype: torch.dtype = torch.float32) -> tuple[Any, PackedLinear]:
    """Return a sparse layer with 24 outputs and 40 inputs, and its packed form."""
    torch.manual_seed(1)
    layer: Any = nn.Linear(40, 24) if kind == "linear" else Conv1D(24, 40)
    layer.weight.data = pruned(torch.randn_like(layer.weight.data), 0.7)
    layer = layer.to(dtype).requires_grad_(False)
    return layer, packed_layer(layer, pack(as_out_in(layer, layer.weight.data)))


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_metadata_are_read_without_unpacking(multiplier: str, kind: str) -> None:
    layer, packed = layers(kind, torch.bfloat16)
    weight, dense = packed.weight, layer.weight
    assert isinstance(weight, LazyWeight) and isinstance(weight, Tensor) and not hasattr(weight, "quant_state")
    assert (weight.shape, weight.dtype, weight.device) == (dense.shape, dense.dtype, dense.device)
    assert (weight.ndim, weight.numel(), weight.size(0), len(weight)) == (2, 960, len(dense), len(dense))
    assert not weight.requires_grad and weight.is_floating_point()
    assert repr(weight) == f"LazyWeight(shape={tuple(dense.shape)}, dtype=torch.bfloat16, device=cpu)"
    assert packed.is_packed and "weight" not in dict(packed.named_parameters())


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize(
    "read",
    [
        lambda w, x: w @ x if w.shape[1] == len(x) else w.T @ x,
        lambda w, x: F.linear(x.T, w if w.shape[1] == len(x) else w.t()),
        lambda w, _: w.data.float().sum(),
        lambda w, _: torch.stack([w, w])[1],
        lambda w, _: torch.linalg.norm(w),
        lambda w, _: w[3:5].clone(),
    ],
)
def test_computing_with_the_weight_gives_what_the_dense_layer_gives(
    multiplier: str, kind: str, read: Callable[..., Tensor]
) -> None:
    layer, packed = layers(kind)
    x = torch.randn(40, 3)
    expected = read(layer.weight, x)
    assert torch.equal(read(packed.weight, x), expected)
    assert not packed.is_packed and list(dict(packed.named_buffers())) == []
    assert torch.equal(packed.weight, layer.weight) and type(packed.weight) is nn.Parameter
    assert torch.equal(packed.to_dense(), as_out_in(layer, layer.weight)) and "dense" in repr(packed)
    packed.check()
    for form in (packed, copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        torch.testing.assert_close(form(x.T), layer(x.T))
    half = packed.to(torch.bfloat16)
    assert half.weight.dtype == half(x.T.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_changes_in_place_are_kept(multiplier: str, kind: str) -> None:
    layer, packed = layers(kind)
    x = torch.randn(5, 40)
    for part in (layer, packed):
        part.weight.div_(4)
        part.weight[2, 3] = 7.0
        part.weight.data.mul_(2)
    assert torch.equal(packed.weight, layer.weight)
    torch.testing.assert_close(packed(x), layer(x))


def test_a_weight_that_was_read_earlier_follows_later_changes(multiplier: str) -> None:
    layer, packed = layers("linear")
    earlier = packed.weight
    packed.weight.mul_(3)
    assert torch.equal(earlier + 0, 3 * layer.weight)
    assert earlier.data_ptr() == packed.weight.data_ptr()


def test_a_weight_unpacked_in_inference_mode_can_take_part_in_gradients(multiplier: str) -> None:
    layer, packed = layers("conv1d")
    with torch.inference_mode():
        packed.weight.sum()
    x = torch.randn(3, 40, requires_grad=True)
    (gradient,) = torch.autograd.grad(packed(x).sum(), x)
    torch.testing.assert_close(gradient, layer.weight.sum(1).expand(3, -1))


_STATES: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "pad_token_id": None}
_RECURRENT: dict[str, dict[str, Any]] = {
    "mamba": {**_STATES, "state_size": 8, "time_step_rank": 16},
    "rwkv": {**_STATES, "attention_hidden_size": 32, "intermediate_size": 48, "rescale_every": 1},
    "jamba": {
        **_STATES,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "attn_layer_period": 3,
        "attn_layer_offset": 1,
        "num_experts": 1,
        "mamba_dt_rank": 16,
        "mamba_d_state": 8,
    },
}


@pytest.mark.parametrize(
    ("kind", "read"), [("mamba", {"dt_proj"}), ("rwkv", {"output", "value"}), ("jamba", {"dt_proj"})]
)
def test_models_that_read_weights_give_the_same_packed(
    multiplier: str, kind: str, read: set[str], ids: Tensor, tmp_path: Path
) -> None:
    torch.manual_seed(2)
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **_RECURRENT[kind]))
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "A_log" not in name:
            parameter.data.normal_(std=0.3)
    prune(model)
    model.save_pretrained(tmp_path / "dense")
    pack_directory(tmp_path / "dense", tmp_path / "packed")
    dense: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    packed: Any = alps.load(tmp_path / "packed").model
    before = {name for name, _ in packed_modules(packed)}
    torch.testing.assert_close(logits(packed, ids), logits(dense, ids), rtol=1e-4, atol=1e-4)
    after = {name for name, _ in packed_modules(packed)}
    assert {name.rpartition(".")[2] for name in before - after} == read and after
    for either in (dense, packed):
        either.generation_config.eos_token_id = None
    outputs = [either.generate(ids[:2], max_new_tokens=12, do_sample=False) for either in (dense, packed)]
    assert torch.equal(*outputs) and outputs[0].shape == (2, 28)
    in_memory: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    assert alps.pack_linears(in_memory) == len(before)
    torch.testing.assert_close(logits(in_memory, ids), logits(dense, ids), rtol=1e-4, atol=1e-4)
