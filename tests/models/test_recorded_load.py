"""Tests of the loader over recorded tensors: it gives the weights that transformers gives, to the bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from alps.core.errors import AlpsError
from alps.models.configuration import load_config
from alps.models.load import load_model
from alps.models.recorded_load import load_recorded, record_checkpoint
from alps.models.recorded_tensor import RecordedTensor
from helpers.decoders import decoder
from helpers.vision import VISION, vision_model


def load_lazily(folder: Path, tensors: dict[str, Tensor], **options: Any) -> Any:
    recorded = {
        name: RecordedTensor.stored(name, list(tensor.shape), tensor.dtype, tensor.clone)
        for name, tensor in tensors.items()
    }
    return load_recorded(load_config(str(folder)), recorded, name=str(folder), **options)


# Fused and renamed tensors; then nested, transposed and tied ones, and buffers that initialisation changes.
_OTHERS = ("gpt_neox", "llava", "zaya", "gpt2", "gemma4")


@pytest.mark.parametrize("kind", ["mixtral", *(pytest.param(kind, marks=pytest.mark.slow) for kind in _OTHERS)])
def test_every_parameter_is_that_of_transformers(kind: str, tmp_path: Path) -> None:
    model = vision_model(kind) if kind in VISION else decoder(kind)
    model.save_pretrained(tmp_path)
    expected, recorded = load_model(str(tmp_path)), load_lazily(tmp_path, load_file(tmp_path / "model.safetensors"))
    assert type(recorded) is type(expected) and not recorded.training
    assert recorded.state_dict().keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        record = recorded.state_dict()[name]
        assert isinstance(record, RecordedTensor) and record.shape == tensor.shape, name
        assert torch.equal(record.compute(), tensor), name


def test_dtypes_are_those_of_transformers(tmp_path: Path) -> None:
    decoder("llama", torch.bfloat16).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in load_lazily(tmp_path, tensors).parameters()} == {torch.bfloat16}
    cast = load_lazily(tmp_path, tensors, dtype=torch.float32)
    assert cast.dtype == torch.float32 and cast.lm_head.weight.source == "lm_head.weight"


def test_tensors_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    decoder("llama").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    fewer = {name: tensor for name, tensor in tensors.items() if "layers.1.mlp.up" not in name}
    with pytest.raises(AlpsError, match=r"lacks 1 tensors of LlamaForCausalLM, first model.layers.1.mlp.up_proj"):
        load_lazily(tmp_path, fewer)
    with pytest.raises(AlpsError, match=r"Tensor model\.norm\.weight .* has shape \[31\].* expects \[32\]"):
        load_lazily(tmp_path, {**tensors, "model.norm.weight": torch.ones(31)})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(AlpsError, match=r"fewer layers or experts"):
        load_lazily(tmp_path, tensors)


def test_a_checkpoint_is_made_of_the_parameters_again(tmp_path: Path) -> None:
    decoder("mixtral").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    model = load_lazily(tmp_path, tensors)
    checkpoint = record_checkpoint(model, dict(model.state_dict()))
    assert checkpoint.keys() == tensors.keys()
    for name in ("model.layers.1.block_sparse_moe.experts.2.w3.weight", "lm_head.weight"):
        assert torch.equal(checkpoint[name].compute(), tensors[name])
