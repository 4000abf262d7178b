"""Text from a model as it is generated, and how fast it came."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TextStreamer

from alps.core.errors import ConfigError
from alps.core.memory import peak_host_bytes
from alps.core.text_format import format_gib
from alps.inference.convert import packed_modules
from alps.inference.cpu_backend import describe, find_kernel
from alps.inference.packed_linear import PackedLinear
from alps.inference.triton_backend import describe_gpu, find_gpu_kernel


@dataclass(frozen=True)
class GenerationResult:
    """What was generated.

    Attributes:
        text: without the prompt.
        prompt_tokens, tokens: in the prompt, and generated.
        first_seconds: until the first token, prompt included.
        tokens_per_second: of those after the first; None where there are none.
        weight_bytes: of all parameters and buffers.
    """

    text: str
    prompt_tokens: int
    tokens: int
    first_seconds: float
    tokens_per_second: float | None
    weight_bytes: int


class _Timed(TextStreamer):  # type: ignore[misc]
    """Passes on text word by word, and notes when tokens came."""

    def __init__(self, tokenizer: Any, emit: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.texts: list[str] = []
        self.times: list[float] = []
        self._emit = emit

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:  # noqa: ARG002
        self.texts.append(text)
        self._emit(text)


def write(
    model: nn.Module,
    tokenizer: Any,
    prompt: str,
    tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    chat: bool = False,
    emit: Callable[[str], None] = lambda _: None,
) -> GenerationResult:
    """Continue a prompt.

    Args:
        model, tokenizer: of transformers.
        prompt: text; with `chat`, what a user says.
        tokens: at most so many are generated.
        temperature: 0 for the most likely token each time.
        seed: of the sampling; the global generator is left as it was.
        chat: put the prompt into the tokenizer's chat template.
        emit: is given text as it comes.

    Raises:
        ConfigError: for a prompt without tokens, or `chat` without a template.
    """
    device = next(model.parameters()).device
    ids = _ids(tokenizer, prompt, chat).to(device)
    streamer = _Timed(tokenizer, emit)
    sampling: dict[str, Any] = (
        {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    )
    if not temperature:
        # A model's own sampling settings would be warned of.
        sampling |= {"temperature": None, "top_p": None, "top_k": None}
    generate: Any = model.generate
    with torch.inference_mode(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        start = time.perf_counter()
        out = generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, streamer=streamer, **sampling)
    # The streamer is given the prompt first.
    times, count = streamer.times[1:], out.shape[1] - ids.shape[1]
    rate = (count - 1) / (times[-1] - times[0]) if count > 1 else None
    size = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    return GenerationResult("".join(streamer.texts), ids.shape[1], count, times[0] - start, rate, size)


def summary(model: nn.Module, written: GenerationResult) -> str:
    """How fast text came, in how much memory, and by what."""
    layers = [layer for _, layer in packed_modules(model)]
    speed = "" if written.tokens_per_second is None else f", then {written.tokens_per_second:.1f} tokens/s"
    how = f"{len(layers)} packed layers by {_multiplier(layers[0])}" if layers else "no packed layers"
    return (
        f"{written.tokens} tokens after {written.prompt_tokens}: the first in {written.first_seconds:.2f} s{speed}; "
        f"weights {format_gib(written.weight_bytes, 3)}, peak memory {format_gib(peak_host_bytes())}; {how}, "
        f"{torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}."
    )


def _multiplier(layer: PackedLinear) -> str:
    device = layer.values.device
    return describe_gpu(find_gpu_kernel(device)) if device.type == "cuda" else describe(find_kernel())


def _ids(tokenizer: Any, prompt: str, chat: bool) -> Tensor:
    if chat:
        if not getattr(tokenizer, "chat_template", None):
            raise ConfigError("The model's tokenizer has no chat template: leave --chat out.")
        message = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    ids: Tensor = tokenizer(prompt, return_tensors="pt", add_special_tokens=not chat)["input_ids"]
    if not ids.numel():
        raise ConfigError("The prompt has no tokens: give --prompt some text.")
    return ids.long()
