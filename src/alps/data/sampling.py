"""Windows of tokens that a causal language model samples itself: calibration without any text.

The temperature schedule is that of self-calibration (Williams, Chrysostomou, Aletras, NAACL 2025, arXiv 2410.17170,
after Carlini et al., arXiv 2012.07805): hot for the first tokens, so that windows differ in subject, then linearly down
to where the model's own distribution is sampled. Neither top-k nor top-p cuts that distribution.
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

# Windows sampled at once: more would gain little speed, and their logits are copied to the CPU.
_BATCH_WINDOWS = 64
_CACHE_BYTES = 2**31


@dataclass(frozen=True)
class TemperatureSchedule:
    """Linear from `start` to `end` over the first `tokens` sampled tokens, constant after them."""

    start: float = 1.5
    end: float = 1.0
    tokens: int = 10

    def at(self, index: int) -> float:
        """Temperature of sampled token number `index`, counted from 0."""
        return self.end if index >= self.tokens else self.start + (self.end - self.start) * index / self.tokens


def sample_windows(
    model: nn.Module,
    first: int,
    samples: int,
    seqlen: int,
    seed: int,
    *,
    schedule: TemperatureSchedule | None = None,
    forbidden: Tensor | None = None,
    batch_size: int | None = None,
    device: torch.device | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Sample windows with the key-value cache; a token that ends a text does not end a window.

    Window i has a stream of random numbers of its own, drawn from `seed` and i: it does not depend on how many windows
    there are. Tokens are drawn on the CPU in float64 from float32 logits by inverting the distribution function.

    Args:
        model: a causal language model; back in its mode and on its device afterwards.
        first: the token that every window begins with.
        samples, seqlen: windows, and tokens in each with the first.
        seed: of all streams.
        schedule: temperatures; None for the default one.
        forbidden: ids of tokens that are never drawn.
        batch_size: windows at once; None for as many as keep the cache below 2 GiB, 64 at most.
        device: where to run; None for where the model is.
        watcher: told after every token of a batch.

    Returns:
        Token ids, int64, shape (samples, seqlen).

    Raises:
        ConfigError: when logits are not finite, or memory of the device runs out.
        UnsupportedModel: for a model without a key-value cache.
    """
    schedule, progress = schedule or TemperatureSchedule(), progress or NoProgress()
    largest = batch_size or _largest_batch(model, seqlen)
    batches = torch.arange(samples).tensor_split(-(-samples // largest))
    home, training = next(model.parameters()).device, model.training
    place = device or home
    progress.start("sampling calibration windows", len(batches) * (seqlen - 1))
    try:
        with torch.no_grad(), exact_float32(), half_matmul_in_float32(place, model):
            _move(model, place).eval()
            parts = []
            for batch in batches:
                uniform = torch.stack([_stream(seed, int(window), seqlen - 1) for window in batch])
                parts.append(_sample_batch(model, first, uniform, schedule, forbidden, progress))
            return torch.cat(parts)
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"The model with its key-value cache does not fit into the memory of {place}: "
            "sample with --device cpu once, which is kept, or calibrate with a text."
        ) from error
    finally:
        progress.finish()
        _move(model, home).train(training)


def draw(logits: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    """Tokens drawn from softmax(logits / temperature), by inverting its distribution function.

    Args:
        logits: float32 on the CPU, shape (windows, vocabulary); -inf for what cannot be drawn.
        uniform: float64 in [0, 1), shape (windows,).

    Returns:
        int64, shape (windows,).
    """
    cumulative = (logits.double() / temperature).softmax(dim=-1).cumsum(dim=-1)
    # Strictly beyond: an entry of probability zero is never hit. Without the last entry: no index past the end.
    beyond = torch.searchsorted(cumulative[:, :-1].contiguous(), uniform[:, None] * cumulative[:, -1:], right=True)
    return beyond.squeeze(1)


def _sample_batch(
    model: nn.Module,
    first: int,
    uniform: Tensor,
    schedule: TemperatureSchedule,
    forbidden: Tensor | None,
    progress: Progress,
) -> Tensor:
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
        if bool(torch.isnan(logits).any()) or bool(torch.isposinf(logits).any()):
            raise ConfigError(
                f"The model's logits are NaN or infinite after {index + 1} sampled tokens: "
                "check its weights, or run with --dtype float32."
            )
        if forbidden is not None:
            logits[:, forbidden] = -torch.inf
        columns.append(draw(logits, uniform[:, index], schedule.at(index)))
        progress.step(f"{len(uniform)} at once")
    return torch.stack(columns, dim=1)


def _cache_name(model: nn.Module) -> str:
    """What this transformers calls the key-value cache: `cache` from 5.24 on, `past_key_values` before."""
    return "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"


def _stream(seed: int, window: int, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(derive_seed(seed, f"window {window}"))
    return torch.rand(count, generator=generator, dtype=torch.float64)


def _largest_batch(model: nn.Module, seqlen: int) -> int:
    """Windows whose keys and values fit into `_CACHE_BYTES`."""
    config = text_config(model)
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    pairs = config.num_hidden_layers * (getattr(config, "num_key_value_heads", None) or heads) * width
    per_window: int = 2 * pairs * seqlen * next(model.parameters()).element_size()
    return min(max(_CACHE_BYTES // per_window, 1), _BATCH_WINDOWS)


def _move(model: nn.Module, device: torch.device) -> nn.Module:
    return model if next(model.parameters()).device == device else model.to(device)
