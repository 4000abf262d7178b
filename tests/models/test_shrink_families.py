"""Tests of the table of families: whatever it allows gives plain checkpoints, and everything else is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from alps.core.errors import AlpsError, ConfigError, UnsupportedModel
from alps.models.blocks import find_blocks
from alps.models.shrink_families import FAMILIES, adds_output, family_of
from alps.models.shrink_layout import Family
from alps.models.shrunk_model import check_target
from alps.models.structure import Structure, Target, read_structure
from helpers.allowances import allowance_table
from helpers.decoders import DENSE, HYBRID, MOE, RECENT, STRUCTURED, decoder
from helpers.shrinking import check_plain, distance
from helpers.vision import vision_model

_CUTS = ("width", "heads", "kv_heads", "experts", "expert_width", "blocks", "all")
_QUICK = {
    *(("llama", "all"), ("phi3", "all"), ("gpt2", "width"), ("qwen2", "blocks"), ("mistral", "heads")),
    *(("mixtral", "experts"), ("gpt_oss", "all"), ("deepseek_v3", "expert_width")),
}
_CONFIGS = {**DENSE, **MOE, **STRUCTURED, "hunyuan_v1_moe": RECENT["hunyuan_v1_moe"]}
_KINDS = list(_CONFIGS)
# Products of other shapes are rounded otherwise, which large scores of attention and routers amplify in these two.
_TOLERANCE = {"granitemoe": 2e-6, "hunyuan_v1_moe": 2e-6}


def target_of(cut: str, family: Family, structure: Structure) -> Target:
    """Return a target of one kind for a tiny model; `all` has whatever the family may have."""
    kept = tuple(number for number in range(structure.blocks) if number != 1)
    has_heads, has_experts = family.attention is not None, structure.experts is not None
    return {
        "width": Target(mlp_width=(structure.mlp_width or 32) // 2),
        "heads": Target(heads=(structure.heads or 0) // 2),
        "kv_heads": Target(kv_heads=1),
        "experts": Target(experts=3),
        "expert_width": Target(expert_width=16),
        "blocks": Target(kept_blocks=kept),
        "all": Target(
            mlp_width=None if structure.mlp_width is None else 32,
            heads=2 if has_heads else None,
            experts=3 if has_experts else None,
            expert_width=8 if has_experts else None,
            kept_blocks=kept,
        ),
    }[cut]


def refusal(model: Any, structure: Structure, cut: str) -> AlpsError | None:
    """Return the error with which a cut is refused."""
    try:
        check_target(model, find_blocks(model), target_of(cut, family_of(model), structure))
    except AlpsError as error:
        return error
    return None


def is_refused(family: Family, structure: Structure, cut: str) -> bool:
    """Check if the table refuses a cut, or a model has nothing that it could remove."""
    return {
        "width": bool(family.no_width) or structure.mlp_width is None,
        "heads": bool(family.no_heads),
        "kv_heads": bool(family.no_heads) and structure.kv_heads != 1,
        "experts": structure.experts is None,
        "expert_width": structure.experts is None,
        "blocks": False,
        "all": bool(family.no_width),
    }[cut]


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
    structure, family = read_structure(model, find_blocks(model)), family_of(model)
    if is_refused(family, structure, cut):
        error = refusal(model, structure, cut)
        assert isinstance(error, UnsupportedModel | ConfigError) and str(error).endswith(".")
        assert family.model_type in str(error) or "The model has no" in str(error)
    elif cut == "kv_heads" and structure.kv_heads == 1:
        pytest.skip("has one KV head")
    else:
        check_plain(model, target_of(cut, family_of(model), structure), ids[:3], tmp_path, _TOLERANCE.get(kind, 1e-6))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "mixtral", pytest.param("", marks=pytest.mark.slow)])
def test_outputs_of_an_mlp_are_added_where_the_table_says_so(kind: str, ids: Tensor) -> None:
    for name in [kind] if kind else _KINDS:
        model = decoder(name)
        block, family = find_blocks(model)[-1].module, family_of(model)
        is_sparse = family.experts is not None and hasattr(block.get_submodule(family.experts.mixture), "experts")
        outer = family.mlp.outer if family.mlp is not None else "mlp"
        if family.experts is not None and is_sparse:
            outer = family.experts.mixture
        outputs = list[Tensor]()

        def record(_module: nn.Module, _args: Any, output: Any, results: list[Tensor] = outputs) -> None:
            results.append(output[0] if isinstance(output, tuple) else output)

        def shift(_module: nn.Module, _args: Any, output: Any) -> Any:
            return (output[0] + 0.5, *output[1:]) if isinstance(output, tuple) else output + 0.5

        block.register_forward_hook(record)
        for hook in (record, shift):
            handle = block.get_submodule(outer).register_forward_hook(hook if hook is shift else lambda *_: None)
            with torch.no_grad():
                model(input_ids=ids, use_cache=False)
            handle.remove()
        is_added = distance(outputs[1] - outputs[0], torch.full_like(outputs[0], 0.5)) < 1e-5
        assert is_added == adds_output(model), name


@pytest.mark.parametrize("kind", ["mamba", "gemma3n", pytest.param("", marks=pytest.mark.slow)])
def test_untested_families_are_refused(kind: str) -> None:
    for name in [kind] if kind else [kind for kind in (*HYBRID, *RECENT) if kind not in _KINDS]:
        with pytest.raises(UnsupportedModel, match="have not been tested: use"):
            family_of(decoder(name))


def test_every_tested_decoder_is_in_the_table() -> None:
    assert {config().model_type for config in _CONFIGS.values()} == FAMILIES.keys()


_PAGE = Path(__file__).parent.parent.parent / "docs" / "reference" / "shrinking.md"


def test_the_page_has_the_table() -> None:
    assert allowance_table() in _PAGE.read_text(), "python tests/helpers/allowances.py prints it"


@pytest.mark.parametrize(("unit", "words"), [("head", "not with fewer heads"), ("channel", "not a narrower MLP")])
def test_the_page_says_what_llama_cpp_does_not_load(unit: str, words: str) -> None:
    """A slow test converts and loads tiny models of these families."""
    (row,) = (line for line in _PAGE.read_text().splitlines() if words in line)
    named = {family.model_type for family in FAMILIES.values() if unit in family.unloadable}
    assert set(re.findall("`([a-z0-9_]+)`", row)) == named


def test_models_that_read_images_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match="has other parts than a text model"):
        family_of(vision_model("llava"))
