"""Measured time of a generated token, and its prediction for smaller structures of a model.

Time depends on shapes alone, so that models with random weights are measured: the weights of the model are not read.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from alps.models.structure import Structure, Target

# Generates a number of tokens after the first one, and returns the seconds for each of them.
Generate = Callable[[int], float]
# Context in which a model, given on the meta device, is ready to generate.
Runtime = Callable[[nn.Module], AbstractContextManager[Generate]]

_PROMPT = 8
_TOKENS = 16
_ROUNDS = 5


@dataclass(frozen=True)
class LatencyFit:
    """Time of a generated token as a function of the structure, in units of the dense model's.

    The time is a + blocks (b + c width + d heads), written as what each removed unit saves.

    Attributes:
        structure: of the dense model.
        per_block: time of a dense block.
        per_channel: time of one MLP channel of one block.
        per_head: time of one query head of one block, with its KV head if no other head reads it.
    """

    structure: Structure
    per_block: float = 0.0
    per_channel: float = 0.0
    per_head: float = 0.0

    def speedup(self, *, removed: int, mlp_width: int, heads: int) -> float:
        """Predict how many times as fast as the dense model a smaller one generates.

        Args:
            removed: number of removed blocks.
            mlp_width: MLP channels of the others, 0 for a model without.
            heads: query heads of the others.
        """
        structure = self.structure
        channels, missing = (structure.mlp_width or 0) - mlp_width, (structure.heads or 0) - heads
        saved = (structure.blocks - removed) * (self.per_channel * channels + self.per_head * missing)
        # Noise could make the time of a tiny structure negative.
        return 1 / max(1 - self.per_block * removed - saved, 0.05)


def fit_latency(structure: Structure, targets: Sequence[Target], ratios: Sequence[float]) -> LatencyFit:
    """Fit the savings by least squares, separately for each kind of unit; a saving is never negative.

    Args:
        structure: of the dense model.
        targets: complete smaller structures, each with one kind of unit removed.
        ratios: their times in units of the dense model's.
    """
    blocks = structure.blocks

    def slope(removed: Sequence[int]) -> float:
        products = sum(count * (1 - ratio) for count, ratio in zip(removed, ratios, strict=True))
        return max(products / (sum(count * count for count in removed) or 1), 0.0)

    return LatencyFit(
        structure,
        per_block=slope([blocks - len(target.kept_blocks or ()) for target in targets]),
        per_channel=slope([(structure.mlp_width or 0) - (target.mlp_width or 0) for target in targets]) / blocks,
        per_head=slope([(structure.heads or 0) - (target.heads or 0) for target in targets]) / blocks,
    )


def measure_ratios(
    runtime: Runtime, dense: nn.Module, smaller: Iterator[nn.Module], on_done: Callable[[float], None] = lambda _: None
) -> list[float]:
    """Measure the time of a generated token of smaller models, in units of the dense model's.

    The two models take turns, and a round gives the ratio of two neighbouring times; the median of all rounds counts.
    Two models are in memory at a time.

    Args:
        runtime: to generate with.
        dense: the dense model on the meta device.
        smaller: the others, on the meta device.
        on_done: called with each ratio.
    """
    ratios = list[float]()
    with runtime(dense) as generate_dense:
        generate_dense(2)  # lets libraries choose their kernels
        for model in smaller:
            with runtime(model) as generate:
                generate(2)
                rounds = list[float]()
                for number in range(_ROUNDS):
                    # The order alternates, since a busy machine slows the later one of a pair.
                    order = (generate_dense, generate) if number % 2 else (generate, generate_dense)
                    seconds = {function: function(_TOKENS) for function in order}
                    rounds.append(seconds[generate] / seconds[generate_dense])
            ratios.append(statistics.median(rounds))
            on_done(ratios[-1])
    return ratios


def transformers_runtime(device: torch.device) -> Runtime:
    """Return the runtime of transformers: greedy generation of one sequence, with a key-value cache."""

    @contextmanager
    def run(model: nn.Module) -> Iterator[Generate]:
        fill_randomly(model, device)
        try:
            yield lambda tokens: _generate(model, tokens, device)
        finally:
            model.to("meta")

    return run


def fill_randomly(model: nn.Module, device: torch.device) -> None:
    """Give a model on the meta device random parameters in their dtypes on a device, and greedy decoding; ties stay."""
    filled: dict[int, nn.Parameter] = {}
    generator = torch.Generator(device).manual_seed(0)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if id(parameter) not in filled:
                values = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                filled[id(parameter)] = nn.Parameter(values.normal_(std=0.02, generator=generator), requires_grad=False)
            module.register_parameter(name, filled[id(parameter)])
    model.to(device)
    # The model's own settings might sample, or stop early.
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)


class _Times(BaseStreamer):  # type: ignore[misc]
    """Streamer that records the time of the prompt and of every token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:  # noqa: ARG002
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def _generate(model: Any, tokens: int, device: torch.device) -> float:
    """Return the seconds for each of `tokens` tokens after the first."""
    ids, streamer = torch.arange(2, 2 + _PROMPT, device=device)[None], _Times()
    with torch.inference_mode():
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens + 1, streamer=streamer)
    assert len(streamer.times) == tokens + 2
    return (streamer.times[-1] - streamer.times[1]) / tokens
