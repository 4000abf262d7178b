"""Tiny random mixtures of experts with any number of experts, and the models that a removal of experts leaves."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from alps.calibration.block_capture import capture_block_inputs
from alps.calibration.block_inputs import BlockInputs
from alps.calibration.masked_router import Mixture, find_mixture
from alps.models.blocks import Block, find_blocks
from helpers.decoders import MOE

EXPERTS = 8
# Mixtures of which experts can be removed.
KINDS = [kind for kind in MOE if kind != "jetmoe"]
# Every form of routing and of weights; the default tests run on these kinds, the slow ones on all.
_FORMS = ("qwen2_moe", "gpt_oss", "deepseek_v3", "llama4")
EACH_KIND = [kind if kind in _FORMS else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
# Routers that choose two of four groups of experts first.
GROUPED = ["deepseek_v2", "deepseek_v3", "glm4_moe"]
_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_SPREAD = ("correction_bias",)


def mixture_model(kind: str, experts: int = EXPERTS, *, grouped: bool = False) -> Any:
    """Return a random model of a kind with so many experts; correction biases are random, too."""
    config = _with_experts(MOE[kind](), experts)
    if grouped:
        config.n_group, config.topk_group = 4, 2
        if kind == "deepseek_v2":
            config.topk_method = "group_limited_greedy"
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(20261130)
        model: nn.Module = AutoModelForCausalLM.from_config(config)
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.ndim > 1 or name.endswith((*_SPREAD, "bias")):
                tensor.copy_(0.2 * torch.randn_like(tensor))
    return model.eval()


def sliced_model(model: Any, kept: Sequence[int]) -> Any:
    """Return the model of the same class that has only the kept experts, with their rows of the routers."""
    experts = find_mixture_blocks(model)[0][1].count
    small = AutoModelForCausalLM.from_config(_with_experts(copy.deepcopy(model.config), len(kept)))
    mixtures = [f"{block.name}.{mixture.name}." for block, mixture in find_mixture_blocks(model)]
    state = {}
    for name, tensor in model.state_dict().items():
        in_mixture = name.startswith(tuple(mixtures)) and "shared" not in name
        axis = next((i for i, size in enumerate(tensor.shape) if size == experts), None) if in_mixture else None
        state[name] = tensor if axis is None else tensor.index_select(axis, torch.tensor(kept))
    small.load_state_dict(state)
    return small.eval()


def find_mixture_blocks(model: Any) -> list[tuple[Block, Mixture]]:
    """Return the blocks of a model that have a mixture, and their mixtures."""
    pairs = [(block, find_mixture(block)) for block in find_blocks(model)]
    return [(block, mixture) for block, mixture in pairs if mixture is not None]


def inputs_of(model: Any, ids: Tensor, index: int, batch_size: int = 2) -> BlockInputs:
    """Return the inputs of block `index` in the dense model."""
    blocks = find_blocks(model)
    inputs = capture_block_inputs(model, blocks, ids, batch_size)
    for block in blocks[:index]:
        inputs.advance(block.index, block.module, torch.device("cpu"))
    return inputs


def _with_experts(config: Any, experts: int) -> Any:
    names = [name for name in _COUNTS if name in config.to_dict()]
    assert names
    for name in names:
        setattr(config, name, experts)
    return config
