"""Smaller models for tests, sliced from tiny random ones, and full models with zeros in place of removed units."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from alps.models.blocks import find_blocks
from alps.models.routing_mask import route_among
from alps.models.shrink_config import edit_config_text, shrunk_config
from alps.models.shrink_families import family_of
from alps.models.shrink_slices import Kept, mask_block, slice_block
from alps.models.shrunk_model import check_target, empty_shrunk_model
from alps.models.structure import Structure, Target, read_structure

_PROVENANCE = ("transformers_version", "dtype", "_name_or_path")


def random_kept(structure: Structure, target: Target, seed: int) -> Kept:
    """Return random units of a block that meet a target."""
    generator = torch.Generator().manual_seed(seed)
    complete = target.complete(structure)

    def choose(count: int, kept: int) -> Tensor:
        return torch.randperm(count, generator=generator)[:kept].sort().values

    channels = heads = kv_heads = None
    if structure.mlp_width and complete.mlp_width != structure.mlp_width:
        channels = choose(structure.mlp_width, complete.mlp_width or 0)
    if (complete.heads, complete.kv_heads) != (structure.heads, structure.kv_heads):
        assert structure.kv_heads and complete.heads and complete.kv_heads
        kv_heads = choose(structure.kv_heads, complete.kv_heads)
        share = complete.heads // complete.kv_heads
        heads = torch.cat([head * structure.group + choose(structure.group, share) for head in kv_heads.tolist()])
    kept = Kept(channels, heads, kv_heads)
    experts = list(range(structure.experts or 0))
    if complete.experts != structure.experts:
        assert structure.experts and complete.experts
        size, share = structure.experts // structure.expert_groups, complete.experts // structure.expert_groups
        experts = [start + n for start in range(0, structure.experts, size) for n in choose(size, share).tolist()]
        kept = replace(kept, experts=torch.tensor(experts))
    if complete.expert_width != structure.expert_width:
        assert structure.expert_width and complete.expert_width
        width, count = structure.expert_width, complete.expert_width
        kept = replace(kept, expert_channels=torch.stack([choose(width, count) for _ in experts]))
        if structure.shared_width:
            kept = replace(kept, shared_channels=choose(structure.shared_width, complete.shared_width(structure) or 0))
    return kept


def shrink(model: nn.Module, target: Target, kept: Sequence[Kept]) -> Any:
    """Return the plain smaller model; `kept` is for every block of the source."""
    blocks = find_blocks(model)
    structure, family = read_structure(model, blocks), family_of(model)
    small = empty_shrunk_model(model, blocks, target)
    numbers = target.complete(structure).kept_blocks or ()
    prefix = blocks[0].name.rpartition(".")[0] + "."
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(prefix)}
    for new, number in zip(find_blocks(small), numbers, strict=True):
        sliced = slice_block(blocks[number].module.state_dict(), family, structure, kept[number])
        state |= {f"{new.name}.{name}": tensor.clone() for name, tensor in sliced.items()}
    small.load_state_dict(state, strict=True, assign=True)
    small.tie_weights()  # type: ignore[operator]
    return small


def mask(model: nn.Module, target: Target, kept: Sequence[Kept]) -> Any:
    """Return a copy of a model with zeros in place of removed units; removed blocks hand their inputs on."""
    copied: Any = copy.deepcopy(model)
    copied.routing = ExitStack()  # never left: the copy serves one test
    blocks = find_blocks(copied)
    structure, family = read_structure(copied, blocks), family_of(copied)
    for block, units in zip(blocks, kept, strict=True):
        mask_block(block.module, family, structure, units)
        if units.experts is not None:
            copied.routing.enter_context(route_among(block.module, family, units.experts))
        if block.index not in (target.complete(structure).kept_blocks or ()):
            block.module.register_forward_hook(_hand_on)
    return copied


def check_plain(model: Any, target: Target, ids: Tensor, folder: Path, tolerance: float = 1e-6) -> None:
    """Assert that a smaller model computes the logits of the masked one, and that it is a plain checkpoint.

    Args:
        model: tiny random model, whose configuration is a fresh one.
        target: of the smaller model.
        ids: token ids of some windows.
        folder: for the checkpoint.
        tolerance: of the difference between the two, relative to the logits.
    """
    blocks = find_blocks(model)
    structure = check_target(model, blocks, target)
    kept = [random_kept(structure, target, number) for number in range(structure.blocks)]
    small = shrink(model, target, kept)
    with torch.no_grad():
        logits, masked, full = (
            part(input_ids=ids, use_cache=False).logits for part in (small, mask(model, target, kept), model)
        )
    assert distance(logits, masked) <= tolerance
    assert distance(full, masked) > 1e-2
    small.save_pretrained(folder)
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids, use_cache=False).logits, logits)
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    tokens = [loaded.generate(ids[:2], use_cache=cache, **settings) for cache in (True, False)]
    assert torch.equal(*tokens) and tokens[0].shape[1] == ids.shape[1] + 6
    _check_text(model, structure, target)


def _check_text(model: Any, structure: Structure, target: Target) -> None:
    """Assert that the edited config.json gives the configuration of the smaller model, and that no line is lost."""
    text = model.config.to_json_string()
    edited = edit_config_text(text, model, structure, target)
    fields, before, after = (json.loads(part) for part in (edited, text, edited))
    read = AutoConfig.for_model(**fields)
    new = shrunk_config(model, structure, target)
    assert type(read) is type(new)
    expected = plain_fields(new)
    assert {name: value for name, value in plain_fields(read).items() if name in expected} == expected
    assert before.keys() <= after.keys()
    changed = {name for name, value in after.items() if before.get(name) != value}
    assert 0 < len(changed) <= 10, changed


def plain_fields(config: Any) -> dict[str, Any]:
    """Return the fields of a configuration, without those that depend on who has written it."""
    return {name: value for name, value in config.to_dict().items() if name not in _PROVENANCE}


def distance(first: Tensor, second: Tensor) -> float:
    """Return the norm of a difference, relative to the second tensor."""
    return float((first - second).norm() / second.norm())


def _hand_on(_block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    return (args[0], *output[1:]) if isinstance(output, tuple) else args[0]
