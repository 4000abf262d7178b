"""Check that an architecture can be packed and loaded packed; the table of architectures shows what it returns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

import alps
from alps.checkpoints.bitmask_codec import count_kept, is_worth_packing
from alps.inference.packed_experts import PackedExperts
from alps.inference.packed_linear import PackedLinear
from alps.models.blocks import find_blocks
from alps.models.load import load_model
from alps.models.sites import Site
from helpers.decoders import decoder
from helpers.packing import contents
from helpers.vision import VISION, vision_model

# Kernels add in another order than torch, so float32 logits differ by some units in the last place per layer.
TOLERANCE = 1e-5
# The code of transformers fails with a cache at sizes as small as these, for the dense model as well.
_WITHOUT_CACHE = ("xlstm",)


def packed_result(kind: str, folder: Path) -> str:
    """Prune an architecture by magnitude, pack it, load it, and return which of the pruned layers are packed in memory.

    Asserts that logits and three generated tokens are those of the dense model, and that unpacking restores the bits,
    also those of what the model writes with `save_pretrained`.

    Args:
        kind: of the architecture.
        folder: an empty directory.
    """
    model = vision_model(kind) if kind in VISION else decoder(kind)
    _zero_half(model)
    model.save_pretrained(folder / "dense")
    alps.pack(folder / "dense", folder / "packed")
    alps.unpack(folder / "packed", folder / "unpacked")
    assert contents(folder / "unpacked") == contents(folder / "dense"), kind
    dense, packed = load_model(str(folder / "dense")), alps.load(folder / "packed").model
    packed.save_pretrained(folder / "again")
    alps.unpack(folder / "again", folder / "restored")
    for name, data in contents(folder / "dense").items():
        assert not name.endswith(".safetensors") or (folder / "restored" / name).read_bytes() == data, kind
    ids = torch.randint(2, 60, (2, 16), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected, outputs = (either(input_ids=ids, use_cache=False).logits for either in (dense, packed))
    assert float((outputs - expected).abs().max()) <= TOLERANCE * float(expected.abs().max()), kind
    if kind not in _WITHOUT_CACHE:
        assert torch.equal(*(_generate(either, ids) for either in (dense, packed))), kind
    return _describe(dense, packed)


def _zero_half(model: nn.Module) -> None:
    with torch.no_grad():
        for block in find_blocks(model):
            for site in block.sites:
                weight = site.read()
                site.write(torch.where(weight.abs() <= weight.abs().flatten().median(), 0, weight))


def _generate(model: Any, ids: torch.Tensor) -> torch.Tensor:
    model.generation_config.eos_token_id = None
    tokens: torch.Tensor = model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
    return tokens


def _describe(dense: nn.Module, packed: nn.Module) -> str:
    """Return `all`, or the kinds of layers that are dense in memory though they are smaller when packed."""
    sites = [site for block in find_blocks(dense) for site in block.sites]
    left = dict.fromkeys(site.kind for site in sites if _is_smaller_packed(site) and not _is_packed(packed, site))
    return f"all but {', '.join(f'`{kind}`' for kind in left)}" if left else "all"


def _is_smaller_packed(site: Site) -> bool:
    rows, columns = site.shape
    return is_worth_packing(rows, columns, count_kept(site.read()), site.dtype.itemsize)


def _is_packed(model: nn.Module, site: Site) -> bool:
    if site.expert is None:
        layer = model.get_submodule(site.name)
    else:
        experts = model.get_submodule(site.parameter_name)
        assert isinstance(experts, PackedExperts), site.name
        layer = experts.layers[site.expert]
    return isinstance(layer, PackedLinear) and layer.is_packed
