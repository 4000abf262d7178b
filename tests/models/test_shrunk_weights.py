"""Weights of a smaller model: filled block by block, freed again, and written from files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from alps.checkpoints.safetensors_io import TensorToWrite, list_tensors, write_tensors
from alps.checkpoints.weight_files import read_weight_file
from alps.data.loaded_model import LoadedModel, open_model
from alps.models.blocks import find_blocks
from alps.models.shrink_families import family_of
from alps.models.shrink_slices import slice_block
from alps.models.shrunk_model import empty_shrunk_model
from alps.models.shrunk_weights import ShrunkModel, fill_module
from alps.models.structure import Target, read_structure
from helpers.shrinking import random_kept, shrink

Tiny = Callable[..., Any]
_TARGET = Target(mlp_width=40, heads=2, kept_blocks=(0, 2))


def _all_meta(module: nn.Module) -> bool:
    return all(parameter.is_meta for parameter in module.parameters())


def test_blocks_are_filled_in_the_dtype_of_the_model_and_freed(tiny_model: Tiny) -> None:
    model = tiny_model("llama", torch.bfloat16)
    small = ShrunkModel.of(empty_shrunk_model(model, find_blocks(model), Target(kept_blocks=(1, 2))))
    tensors = {name: tensor.float() for name, tensor in find_blocks(model)[1].module.state_dict().items()}
    block = small.blocks[0].module
    fill_module(block, tensors)
    assert not _all_meta(block) and _all_meta(small.blocks[1].module)
    for name, parameter in block.named_parameters():
        assert parameter.dtype == torch.bfloat16 and not parameter.requires_grad
        assert torch.equal(parameter.float(), tensors[name])
    small.release(0)
    assert _all_meta(small.model)
    fill_module(block, tensors)  # and again, as before the writing
    assert torch.equal(block.get_parameter("mlp.up_proj.weight").float(), tensors["mlp.up_proj.weight"])


def test_sizes_are_those_of_the_loaded_model(tiny_model: Tiny) -> None:
    model = tiny_model("llama", torch.bfloat16)
    small = ShrunkModel.of(empty_shrunk_model(model, find_blocks(model), _TARGET))
    kept = [random_kept(read_structure(model, find_blocks(model)), _TARGET, number) for number in range(3)]
    plain = shrink(model, _TARGET, kept)
    assert small.parameters == sum(parameter.numel() for parameter in plain.parameters())
    assert small.nbytes == 2 * small.parameters


def test_persistent_buffers_are_copied() -> None:
    class Scaled(nn.Linear):
        """Linear layer with a buffer that checkpoints hold and one that they do not."""

        def __init__(self) -> None:
            super().__init__(3, 2, bias=False)
            self.register_buffer("scale", torch.ones(2))
            self.register_buffer("table", torch.full((2,), 7.0), persistent=False)

    source, module = Scaled(), Scaled()
    source.scale.fill_(5.0)  # type: ignore[operator]
    module.weight = nn.Parameter(torch.empty(2, 3, device="meta"))
    fill_module(module, source.state_dict())
    assert torch.equal(module.weight, source.weight)
    assert module.get_buffer("scale").tolist() == [5.0, 5.0] and module.get_buffer("table").tolist() == [7.0, 7.0]


def test_tensors_of_other_shapes_or_names_are_not_taken(tiny_model: Tiny) -> None:
    model = tiny_model("llama")
    small = ShrunkModel.of(empty_shrunk_model(model, find_blocks(model), _TARGET))
    state = dict(find_blocks(model)[0].module.state_dict())
    with pytest.raises(AssertionError, match=r"self_attn\.q_proj\.weight: \(32, 32\) for \(16, 32\)"):
        fill_module(small.blocks[0].module, state)
    del state["self_attn.q_proj.weight"]
    with pytest.raises(KeyError):
        fill_module(small.blocks[0].module, state)


def _store(folder: Path, tensors: list[dict[str, Tensor]]) -> list[dict[str, Any]]:
    """Write the tensors of blocks to files, as a journal does."""
    stored = []
    for number, block in enumerate(tensors):
        path = folder / f"block-{number}.safetensors"
        pending = [TensorToWrite(n, t.dtype, tuple(t.shape), lambda t=t: t) for n, t in block.items()]  # type: ignore[misc]
        write_tensors(path, pending)
        stored.append({tensor.name: tensor for tensor in list_tensors(read_weight_file(path))})
    return stored


@pytest.mark.parametrize("kind", ["llama", "gpt2", "stories"])
def test_the_checkpoint_is_that_of_transformers(
    kind: str, tiny_model: Tiny, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Untied and tied heads, weights in memory and in a file; nothing missing, nothing twice."""
    if kind == "stories":
        folder = request.getfixturevalue("stories")
        loaded, whole = open_model(str(folder)), AutoModelForCausalLM.from_pretrained(folder).eval()
    else:
        loaded = LoadedModel(kind, tiny_model(kind), None)
        whole = loaded.model
    target = _TARGET if kind == "llama" else Target(mlp_width=40, kept_blocks=(0, 2))
    structure = read_structure(whole, find_blocks(whole))
    kept = [random_kept(structure, target, number) for number in range(structure.blocks)]
    plain = shrink(whole, target, kept)
    blocks = find_blocks(whole)
    tensors = [
        slice_block(blocks[number].module.state_dict(), family_of(whole), structure, kept[number])
        for number in target.complete(structure).kept_blocks or ()
    ]
    small = ShrunkModel.of(empty_shrunk_model(loaded.model, loaded.blocks(), target))
    stored = _store(tmp_path, tensors)
    small.save(tmp_path / "out", loaded.model, loaded.blocks(), stored)
    plain.save_pretrained(tmp_path / "plain")
    written, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "plain"))
    assert written.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in written.items())
    loaded_again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    ids = torch.arange(2, 30)[None]
    with torch.no_grad():
        assert torch.equal(loaded_again(input_ids=ids).logits, plain(input_ids=ids).logits)
