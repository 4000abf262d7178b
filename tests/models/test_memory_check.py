"""Models in memory: wrappers are looked through, and weights that cannot be pruned are named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from transformers import AutoModelForCausalLM

import alps
from alps.core.errors import ConfigError, UnsupportedModel
from alps.data.loaded_model import LoadedModel
from alps.models.memory_check import unwrap
from helpers.packed_models import prune as prune_by_magnitude


def replace(model: Any, part: str, change: Callable[[nn.Linear], nn.Module]) -> Any:
    """Replace the linear layers with a part of a name by others."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and part in name:
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, change(layer))
    return model


class _Int8Linear(nn.Linear):
    """Layer with 8-bit weights, as quantizers make it."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False)
        self.weight = nn.Parameter((100 * layer.weight.data).to(torch.int8), requires_grad=False)


class _Adapted(nn.Module):
    """Layer with an adapter, in a module of the package that makes such."""

    __module__ = "peft.tuners.lora.layer"

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = layer
        self.lora_a = nn.Linear(layer.in_features, 2)

    def forward(self, x: Tensor) -> Any:
        return self.base_layer(x)


def _float8(layer: nn.Linear) -> nn.Linear:
    layer.weight = nn.Parameter(layer.weight.data.to(torch.float8_e4m3fn), requires_grad=False)
    return layer


def _offloaded(model: Any, _folder: Path) -> Any:
    return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


def _on_disk(model: Any, folder: Path) -> Any:
    return accelerate.disk_offload(model, str(folder), execution_device=torch.device("cpu"))


def _device_map(model: Any, folder: Path) -> Any:
    model.save_pretrained(folder / "model")
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder / "model", device_map=places, offload_folder=folder / "offloaded"
    )
    return loaded


def _empty(model: Any, _folder: Path) -> Any:
    return model.to("meta")


_ELSEWHERE = [
    (_offloaded, "are offloaded by accelerate: load it without device_map, or give alps the name of its checkpoint"),
    (_on_disk, "are offloaded by accelerate"),
    (_device_map, "are offloaded by accelerate"),
    (_empty, r"has no weights \(model\.embed_tokens\.weight is on the meta device\): load it"),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("make", "words"), _ELSEWHERE)
def test_weights_that_are_not_in_memory_are_refused(
    make: Callable[[Any, Path], Any], words: str, tiny_model: Any, ids: Tensor, tmp_path: Path
) -> None:
    model = make(tiny_model("llama"), tmp_path)
    with pytest.raises(UnsupportedModel, match=words):
        alps.prune(model, sparsity=0.5, calibration=ids, out=tmp_path / "out")
    with pytest.raises(UnsupportedModel, match=words):
        alps.evaluate(LoadedModel("name", model, None), ["text.txt"])
    assert not (tmp_path / "out").exists()


def _masked(model: Any) -> Any:
    mask: Any = prune.l1_unstructured
    mask(model.model.layers[0].mlp.up_proj, "weight", 0.5)
    return model


def _normed(model: Any) -> Any:
    parametrizations.weight_norm(model.model.layers[0].mlp.up_proj)
    return model


def _packed(model: Any) -> Any:
    prune_by_magnitude(model)
    alps.pack_linears(model)
    return model


def _declared_quantized(model: Any) -> Any:
    model.config.quantization_config = {"quant_method": "fp8"}
    return model


def _compiled_block(model: Any) -> Any:
    model.model.layers[1] = torch.compile(model.model.layers[1], backend="eager")
    return model


_UNUSABLE: list[tuple[Callable[[Any], Any], str]] = [
    (lambda m: replace(m, "_proj", _Int8Linear), r"quantized \(model\.layers\.0\.self_attn\.q_proj\.weight is int8"),
    (lambda m: replace(m, "_proj", _float8), r"quantized \(.*q_proj\.weight is float8_e4m3fn"),
    (_declared_quantized, "is quantized: prune the unquantized checkpoint"),
    (lambda m: replace(m, "q_proj", _Adapted), r"adapters of PEFT \(model\.layers\.0\.self_attn\.q_proj\): merge them"),
    (_masked, r"weight of model\.layers\.0\.mlp\.up_proj is computed from other tensors"),
    (_normed, r"weight of model\.layers\.0\.mlp\.up_proj is computed from other tensors"),
    (_packed, "layers of the model are packed: prune the model before it is packed"),
    (_compiled_block, r"model\.layers\.1 is wrapped by torch\.compile, .* compile it after pruning"),
]


@pytest.mark.parametrize(("make", "words"), _UNUSABLE)
def test_weights_that_are_no_plain_matrices_are_refused(
    make: Callable[[Any], Any], words: str, tiny_model: Any, ids: Tensor
) -> None:
    model = make(tiny_model("llama"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UnsupportedModel, match=words):
        alps.prune(model, sparsity=0.5, calibration=ids)
    assert all(torch.equal(tensor.float(), before[name].float()) for name, tensor in model.state_dict().items())


def test_a_spread_model_is_refused(tiny_model: Any, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    places = iter(["cuda:0", "cpu"] * len(list(model.parameters())))
    monkeypatch.setattr(nn.Parameter, "device", property(lambda _self: torch.device(next(places))), raising=False)
    with pytest.raises(UnsupportedModel, match=r"is spread over cpu and cuda:0: load it without device_map"):
        alps.prune(model, sparsity=0.5, calibration=ids)


def test_other_objects_are_refused(tiny_model: Any, tmp_path: Path) -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = tiny_model("llama")

    with pytest.raises(UnsupportedModel, match=r"^Holder is not a model of transformers: give the model inside it\.$"):
        alps.prune(Holder(), sparsity=0.5)
    loaded: Any = LoadedModel("name", tiny_model("llama"), None)
    with pytest.raises(ConfigError, match=r"^A LoadedModel cannot be pruned: give a model of transformers, such as"):
        alps.prune(loaded, sparsity=0.5)


def _in_training(model: Any) -> Any:
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = True
    return model.train()


def _compiled_in_place(model: Any) -> Any:
    for block in model.model.layers:
        block.compile(backend="eager")
    return model


@pytest.mark.parametrize(
    "wrap",
    [
        lambda m: torch.compile(m, backend="eager"),
        nn.DataParallel,
        _in_training,
        _compiled_in_place,
        lambda m: m.requires_grad_(False),
    ],
)
def test_models_in_other_states_give_the_same_weights(
    wrap: Callable[[Any], Any], tiny_model: Any, ids: Tensor, tmp_path: Path
) -> None:
    plain, other = tiny_model("llama"), tiny_model("llama")
    wrapped = wrap(other)
    training = wrapped.training
    expected = alps.prune(plain, sparsity=0.5, method="wanda", calibration=ids)
    report = alps.prune(wrapped, sparsity=0.5, method="wanda", calibration=ids, out=tmp_path / "out")
    assert [layer.error for layer in report.layers] == [layer.error for layer in expected.layers]
    assert report.architecture == "LlamaForCausalLM" and wrapped.training == training
    saved = alps.load(tmp_path / "out").model.state_dict()
    for name, weight in plain.state_dict().items():
        assert torch.equal(other.state_dict()[name], weight) and torch.equal(saved[name], weight), name


def test_wrappers_inside_wrappers_are_removed(tiny_model: Any) -> None:
    model = tiny_model("llama")
    compiled: Any = torch.compile(nn.DataParallel(model), backend="eager")
    assert unwrap(compiled) is model
    assert unwrap(model) is model
