"""Generate text with a model, and measure the speed."""

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
from alps.models.finite_logits import check_logits
from alps.models.positions import check_prompt


@dataclass(frozen=True)
class GenerationResult:
    """Generated text with its speed.

    Attributes:
        text: generated text, without the prompt.
        prompt_tokens: number of tokens of the prompt.
        tokens: number of generated tokens.
        first_seconds: time to the first token, processing of the prompt included.
        tokens_per_second: rate after the first token; None if there is only one token.
        weight_bytes: bytes of all parameters and buffers.
    """

    text: str
    prompt_tokens: int
    tokens: int
    first_seconds: float
    tokens_per_second: float | None
    weight_bytes: int


class _TimedStreamer(TextStreamer):  # type: ignore[misc]
    """Streamer that passes text on word by word, and records the time of every token."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.texts: list[str] = []
        self.times: list[float] = []
        self._on_text = on_text

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:  # noqa: ARG002
        self.texts.append(text)
        self._on_text(text)


def generate_text(
    model: nn.Module,
    tokenizer: Any,
    prompt: str,
    tokens: int,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    chat: bool = False,
    on_text: Callable[[str], None] = lambda _: None,
) -> GenerationResult:
    """Continue a prompt.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer.
        prompt: text to continue; with `chat`, the message of a user.
        tokens: largest number of tokens to generate.
        temperature: sampling temperature; 0 always takes the most likely token.
        seed: seed of the sampling; the state of torch's global generator is restored afterwards.
        chat: apply the tokenizer's chat template to the prompt.
        on_text: called with each piece of text when it is generated.

    Raises:
        ConfigError: if the prompt has no tokens, is too long or not for this model, or the tokenizer has no chat
            template and `chat` is set.
        NotFinite: when logits are NaN or infinite; the text before has been passed on.
    """
    device = next(model.parameters()).device
    ids = _token_ids(tokenizer, prompt, chat).to(device)
    check_prompt(model, ids, tokens)
    streamer = _TimedStreamer(tokenizer, on_text)
    sampling: dict[str, Any] = (
        {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    )
    if not temperature:
        # Without this, transformers warns about sampling settings in the model's configuration.
        sampling |= {"temperature": None, "top_p": None, "top_k": None}
    # Settings of the model's own for beams, several answers or other outputs have no effect.
    sampling |= {"num_beams": 1, "num_return_sequences": 1, "return_dict_in_generate": False, "penalty_alpha": None}
    generate: Any = model.generate
    with torch.inference_mode(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        start = time.perf_counter()
        out = generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            streamer=streamer,
            logits_processor=[finite_logits(model, ids.shape[1])],
            **sampling,
        )
    # The first call of the streamer has the prompt.
    times, count = streamer.times[1:], out.shape[1] - ids.shape[1]
    rate = (count - 1) / (times[-1] - times[0]) if count > 1 else None
    size = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    return GenerationResult("".join(streamer.texts), ids.shape[1], count, times[0] - start, rate, size)


def finite_logits(model: nn.Module, prompt_tokens: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a logits processor that refuses logits which are NaN or infinite, and changes nothing.

    Args:
        model: that generates.
        prompt_tokens: number of tokens of the prompt, for the message.
    """

    def check(ids: Tensor, logits: Tensor) -> Tensor:
        count = ids.shape[1] - prompt_tokens
        where = f"{prompt_tokens} tokens of a prompt" + (f" and {count} generated ones" if count else "")
        check_logits(logits, model, ids, subject=type(model).__name__, where=where)
        return logits

    return check


def summary(model: nn.Module, result: GenerationResult) -> str:
    """Describe in one line the speed, the memory and the kernels of a generation."""
    layers = [layer for _, layer in packed_modules(model)]
    speed = "" if result.tokens_per_second is None else f", then {result.tokens_per_second:.1f} tokens/s"
    kernels = f"{len(layers)} packed layers by {_describe_kernel(layers[0])}" if layers else "no packed layers"
    return (
        f"{result.tokens} tokens after {result.prompt_tokens}: the first in {result.first_seconds:.2f} s{speed}; "
        f"weights {format_gib(result.weight_bytes, 3)}, peak memory {format_gib(peak_host_bytes())}; {kernels}, "
        f"{torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}."
    )


def _describe_kernel(layer: PackedLinear) -> str:
    device = layer.values.device
    return describe_gpu(find_gpu_kernel(device)) if device.type == "cuda" else describe(find_kernel())


def _token_ids(tokenizer: Any, prompt: str, chat: bool) -> Tensor:
    """Return the token ids of a prompt, shape (1, tokens)."""
    if chat:
        if not getattr(tokenizer, "chat_template", None):
            raise ConfigError("The model's tokenizer has no chat template: leave --chat out.")
        message = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    ids: Tensor = tokenizer(prompt, return_tensors="pt", add_special_tokens=not chat)["input_ids"]
    if not ids.numel():
        raise ConfigError("The prompt has no tokens: give --prompt some text.")
    return ids.long()
