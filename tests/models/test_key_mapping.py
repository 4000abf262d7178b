"""Names in a checkpoint for the tensors of a model: as they are, renamed, or stacked from those of the experts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from alps.checkpoints.safetensors_io import TensorToWrite, list_tensors, write_tensors
from alps.checkpoints.weight_files import read_weight_file
from alps.models.key_mapping import KeyMapping, find_key_mapping


@pytest.mark.parametrize(
    ("name", "stored", "prefix"),
    [
        ("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight", "model"),
        ("transformer.h.0.attn.c_attn.weight", "h.0.attn.c_attn.weight", "transformer"),
        ("h.0.attn.c_attn.weight", "transformer.h.0.attn.c_attn.weight", "transformer"),
        ("lm_head.weight", "embed_out.weight", "gpt_neox"),
        ("model.layers.1.mlp.gate.weight", "model.layers.1.block_sparse_moe.gate.weight", "model"),
        ("model.layers.1.mlp.gate.moe_statics.bias", "model.layers.1.mlp.moe_statics.bias", "model"),
    ],
)
def test_names_of_plain_tensors(name: str, stored: str, prefix: str) -> None:
    shapes = {stored: (4, 6)}
    assert find_key_mapping(name, torch.Size((4, 6)), shapes, prefix) == KeyMapping(((stored,),))
    assert find_key_mapping(name, torch.Size((6, 4)), shapes, prefix) is None, "the shape is another"


_PARTS = tuple((f"m.0.experts.{e}.gate_proj.weight", f"m.0.experts.{e}.up_proj.weight") for e in range(3))


def test_experts_are_stacked_from_a_matrix_each() -> None:
    shapes = {name: (2, 5) for names in _PARTS for name in names}
    name, shape = "m.0.experts.gate_up_proj", torch.Size((3, 4, 5))
    mapping = find_key_mapping(name, shape, shapes, "m")
    assert mapping == KeyMapping(_PARTS, (2, 2))
    values = {name: torch.full((2, 5), float(i)) for i, name in enumerate(sorted(shapes))}
    stacked = mapping.load(values.__getitem__)
    assert stacked.shape == shape and stacked[:, ::2, 0].tolist() == [[0, 1], [2, 3], [4, 5]]
    assert find_key_mapping(name, shape, {**shapes, _PARTS[2][1]: (2, 4)}, "m") is None
    assert find_key_mapping(name, torch.Size((4, 4, 5)), shapes, "m") is None, "an expert is missing"
    assert find_key_mapping(name, torch.Size((3, 5, 5)), shapes, "m") is None


def test_a_part_of_a_stacked_tensor_is_found_on_disk(tmp_path: Path) -> None:
    mapping = KeyMapping(_PARTS, (2, 3))
    stacked = torch.arange(3 * 5 * 4.0).view(3, 5, 4)
    write_tensors(tmp_path / "t", [TensorToWrite("x", torch.float32, (3, 5, 4), lambda: stacked)])
    (stored,) = list_tensors(read_weight_file(tmp_path / "t"))
    for e, (gate, up) in enumerate(_PARTS):
        assert torch.equal(mapping.slice_for(gate, stored).read(), stacked[e, :2])
        assert torch.equal(mapping.slice_for(up, stored).read(), stacked[e, 2:])
    assert KeyMapping((("x",),)).slice_for("x", stored) is stored
