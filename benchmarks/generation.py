"""Time greedy generation of a model of transformers, with its key-value cache."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer


class _Times(BaseStreamer):  # type: ignore[misc]
    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:  # noqa: ARG002
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def generate(model: Any, prompt: int, tokens: int) -> tuple[float, float]:
    """Return the seconds until the first token, and the tokens per second after it."""
    ids, times = torch.arange(1, prompt + 1)[None], _Times()
    start = time.perf_counter()
    settings = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    with torch.inference_mode():
        model.generate(ids, attention_mask=torch.ones_like(ids), streamer=times, **settings)
    return times.times[1] - start, (tokens - 1) / (times.times[-1] - times.times[1])
