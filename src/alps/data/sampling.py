"""Sampling of token windows from a causal language model, for calibration without text.

The temperature schedule is that of self-calibration (Williams, Chrysostomou, Aletras, NAACL 2025, arXiv 2410.17170,
after Carlini et al., arXiv 2012.07805). The first tokens are sampled at a high temperature, so that windows differ in
subject; it then falls linearly to 1, the model's own distribution. There is no top-k or top-p cut.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from alps.core.device import exact_float32
from alps.core.errors import ConfigError, UnsupportedModel
from alps.core.half_precision import half_matmul_in_float32
from alps.core.progress import NoProgress, Progress
from alps.core.seeds import derive_seed
from alps.models.auto_class import text_config
from alps.models.finite_logits import check_logits

# Windows sampled at once. More would gain little speed, and all their logits are copied to the CPU.
_BATCH_WINDOWS = 64
_CACHE_BYTES = 2**31


@dataclass(frozen=True)
class TemperatureSchedule:
    """Temperature that falls linearly from `start` to `end` over the first `tokens` tokens, then stays constant."""

    start: float = 1.5
    end: float = 1.0
    tokens: int = 10

    def at(self, index: int) -> float:
        """Return the temperature of a sampled token by its number, counted from 0."""
        return self.end if index >= self.tokens else self.start + (self.end - self.start) * index / self.tokens


def sample_windows(
    model: nn.Module,
    first: int,
    *,
    samples: int,
    seqlen: int,
    seed: int,
    schedule: TemperatureSchedule | None = None,
    forbidden: Tensor | None = None,
    batch_size: int | None = None,
    device: torch.device | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Sample windows with a key-value cache; an end-of-text token does not end a window.

    Window i has its own stream of random numbers, seeded by `seed` and i, so that it does not depend on the number of
    windows. Tokens are drawn on the CPU in float64 from float32 logits, by inverting the distribution function.

    Args:
        model: a causal language model; its device and train/eval mode are restored afterwards.
        first: token that every window begins with.
        samples: number of windows.
        seqlen: tokens in a window, including the first.
        seed: of all streams.
        schedule: temperatures; None for the default.
        forbidden: ids of tokens that are never drawn.
        batch_size: windows at once; None for as many as keep the cache below 2 GiB, at most 64.
        device: to run on; None for the model's.
        progress: advanced after every token of a batch.

    Returns:
        Token ids, int64, shape (samples, seqlen).

    Raises:
        ConfigError: when memory of the device runs out.
        NotFinite: when logits are NaN or infinite.
        UnsupportedModel: for a model without a key-value cache.
    """
    schedule, progress = schedule or TemperatureSchedule(), progress or NoProgress()
    largest = batch_size or _largest_batch(model, seqlen)
    batches = torch.arange(samples).tensor_split(-(-samples // largest))
    original_device, training = next(model.parameters()).device, model.training
    device = device or original_device
    progress.start("sampling calibration windows", len(batches) * (seqlen - 1))
    try:
        with torch.no_grad(), exact_float32(), half_matmul_in_float32(device, model):
            _move(model, device).eval()
            sampled = []
            for batch in batches:
                uniform = torch.stack([_uniform_stream(seed, int(window), seqlen - 1) for window in batch])
                ids = _sample_batch(model, first, uniform, schedule=schedule, forbidden=forbidden, progress=progress)
                sampled.append(ids)
            return torch.cat(sampled)
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"The model with its key-value cache does not fit into the memory of {device}: "
            "sample with --device cpu once, since the windows are cached, or calibrate with a text."
        ) from error
    finally:
        progress.finish()
        _move(model, original_device).train(training)


def draw_tokens(logits: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    """Draw tokens from softmax(logits / temperature) by inverting its distribution function.

    Args:
        logits: float32 on the CPU, shape (windows, vocabulary); -inf for tokens that must not be drawn.
        uniform: random numbers in [0, 1), float64, shape (windows,).
        temperature: above 0.

    Returns:
        Token ids, int64, shape (windows,).
    """
    cumulative = (logits.double() / temperature).softmax(dim=-1).cumsum(dim=-1)
    # `right` never hits an entry of probability zero. Leaving out the last entry prevents an index past the end.
    ids = torch.searchsorted(cumulative[:, :-1].contiguous(), uniform[:, None] * cumulative[:, -1:], right=True)
    return ids.squeeze(1)


def _sample_batch(
    model: nn.Module,
    first: int,
    uniform: Tensor,
    *,
    schedule: TemperatureSchedule,
    forbidden: Tensor | None,
    progress: Progress,
) -> Tensor:
    """Sample one batch of windows.

    Args:
        model: in evaluation mode.
        first: token that every window begins with.
        uniform: random numbers in [0, 1), float64, shape (windows, seqlen - 1).
        schedule: temperatures.
        forbidden: ids of tokens that are never drawn.
        progress: advanced after every token.

    Returns:
        Token ids, int64, shape (windows, seqlen).
    """
    device = next(model.parameters()).device
    columns = [torch.full((len(uniform),), first)]
    cache, name = None, _cache_name(model)
    for index in range(uniform.shape[1]):
        output = model(input_ids=columns[-1][:, None].to(device), use_cache=True, **{name: cache})
        cache = getattr(output, name, None)
        if cache is None:
            raise UnsupportedModel(
                f"{type(model).__name__} has no key-value cache to sample with: calibrate with a text instead."
            )
        logits = output.logits[:, -1].to("cpu", torch.float32)
        sampled = torch.stack(columns, dim=1).to(device)
        where = f"{index + 1} sampled tokens"
        check_logits(logits, model, sampled, subject=type(model).__name__, where=where)
        if forbidden is not None:
            logits[:, forbidden] = -torch.inf
        columns.append(draw_tokens(logits, uniform[:, index], schedule.at(index)))
        progress.step(f"{len(uniform)} at once")
    return torch.stack(columns, dim=1)


def _cache_name(model: nn.Module) -> str:
    """Return the name of the key-value cache in this transformers: `cache` from 5.24 on, else `past_key_values`."""
    return "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"


def _uniform_stream(seed: int, window: int, count: int) -> Tensor:
    """Return the random numbers of one window, float64, shape (count,)."""
    generator = torch.Generator().manual_seed(derive_seed(seed, f"window {window}"))
    return torch.rand(count, generator=generator, dtype=torch.float64)


def _largest_batch(model: nn.Module, seqlen: int) -> int:
    """Return how many windows' keys and values fit into `_CACHE_BYTES`."""
    config = text_config(model)
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    pairs = config.num_hidden_layers * (getattr(config, "num_key_value_heads", None) or heads) * width
    per_window: int = 2 * pairs * seqlen * next(model.parameters()).element_size()
    return min(max(_CACHE_BYTES // per_window, 1), _BATCH_WINDOWS)


def _move(model: nn.Module, device: torch.device) -> nn.Module:
    return model if next(model.parameters()).device == device else model.to(device)
