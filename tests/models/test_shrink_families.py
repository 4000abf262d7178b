"""Tests of the table of families: whatever it allows gives plain checkpoints, and everything else is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from alps.core.errors import UnsupportedModel
from alps.models.blocks import find_blocks
from alps.models.shrink_families import FAMILIES, adds_output, family_of
from alps.models.shrunk_model import check_target
from alps.models.structure import Structure, Target, read_structure
from helpers.decoders import DENSE, HYBRID, MOE, RECENT, decoder
from helpers.shrinking import check_plain, distance
from helpers.vision import vision_model

_CUTS = ("width", "heads", "kv_heads", "blocks", "all")
_QUICK = {("llama", "all"), ("phi3", "all"), ("gpt2", "width"), ("qwen2", "blocks"), ("mistral", "heads")}
_KINDS = [kind for kind, config in {**DENSE, **MOE}.items() if config().model_type in FAMILIES]


def target_of(cut: str, structure: Structure) -> Target:
    """Return a target of one kind for a tiny model."""
    kept = tuple(number for number in range(structure.blocks) if number != 1)
    return {
        "width": Target(mlp_width=(structure.mlp_width or 0) // 2),
        "heads": Target(heads=(structure.heads or 0) // 2),
        "kv_heads": Target(kv_heads=1),
        "blocks": Target(kept_blocks=kept),
        "all": Target(mlp_width=32, heads=2, kept_blocks=kept),
    }[cut]


def refusal(model: Any, structure: Structure, cut: str) -> str:
    """Return the message with which a cut is refused; empty if it is allowed."""
    try:
        check_target(model, find_blocks(model), target_of(cut, structure))
    except UnsupportedModel as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("kind", "cut"),
    [
        pytest.param(kind, cut, marks=() if (kind, cut) in _QUICK else pytest.mark.slow)
        for kind in _KINDS
        for cut in _CUTS
    ],
)
def test_smaller_models_are_plain(kind: str, cut: str, ids: Tensor, tmp_path: Path) -> None:
    model = decoder(kind)
    structure = read_structure(model, find_blocks(model))
    family = family_of(model)
    if message := refusal(model, structure, cut):
        assert (family.no_heads and cut in ("heads", "kv_heads", "all")) or (
            family.no_width and cut in ("width", "all")
        )
        assert message.endswith(".") and family.model_type in message
    elif cut == "kv_heads" and structure.kv_heads == 1:
        pytest.skip("has one KV head")
    else:
        check_plain(model, target_of(cut, structure), ids[:3], tmp_path)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", pytest.param("", marks=pytest.mark.slow)])
def test_outputs_of_an_mlp_are_added_where_the_table_says_so(kind: str, ids: Tensor) -> None:
    for name in [kind] if kind else _KINDS:
        model = decoder(name)
        blocks, family = find_blocks(model), family_of(model)
        assert family.mlp is not None
        outputs = list[Tensor]()

        def record(_module: nn.Module, _args: Any, output: Any, results: list[Tensor] = outputs) -> None:
            results.append(output[0] if isinstance(output, tuple) else output)

        for shift in (0.0, 0.5):
            block = blocks[-1].module
            outer = block.get_submodule(family.mlp.outer)
            handles = [
                outer.register_forward_hook(lambda _module, _args, output, by=shift: output + by),
                block.register_forward_hook(record),
            ]
            with torch.no_grad():
                model(input_ids=ids, use_cache=False)
            for handle in handles:
                handle.remove()
        is_added = distance(outputs[1] - outputs[0], torch.full_like(outputs[0], 0.5)) < 1e-5
        assert is_added == adds_output(model), name


@pytest.mark.parametrize("kind", [next(iter(HYBRID)), "gemma3n", pytest.param("", marks=pytest.mark.slow)])
def test_untested_families_are_refused(kind: str) -> None:
    for name in [kind] if kind else [name for name in (*HYBRID, *RECENT, *MOE) if name not in _KINDS]:
        with pytest.raises(UnsupportedModel, match="have not been tested: use"):
            family_of(decoder(name))


def test_models_that_read_images_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match="has other parts than a text model"):
        family_of(vision_model("llava"))
