"""Calibration windows that a model samples itself, kept in the cache: the same ones cost their time once."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from alps.core.cache import cache_folder
from alps.core.errors import ConfigError
from alps.core.progress import Progress
from alps.data.sampling import TemperatureSchedule, sample_windows
from alps.data.text_sources import SELF
from alps.data.windows import Windows, document_separator
from alps.models.auto_class import text_config
from alps.models.fingerprint import model_sha256

_LOG = logging.getLogger("alps")

# Raised with every change of the sampling that gives other tokens.
_VERSION = 1


def generated_windows(
    model: nn.Module,
    tokenizer: Any,
    samples: int,
    seqlen: int,
    seed: int,
    device: torch.device | None = None,
    progress: Progress | None = None,
) -> Windows:
    """Windows sampled from a model, or those of an earlier call with the same model and arguments.

    Args:
        model: a causal language model; unchanged.
        tokenizer: says where a text begins and which tokens are not text; None leaves both to the model's
            configuration.
        samples, seqlen, seed: windows, tokens in each, and their random streams.
        device: where to sample; None for where the model is.
        watcher: told after every token of a batch.

    Raises:
        ConfigError: when there is nothing to begin a text with, or the model cannot be sampled.
        UnsupportedModel: for a model without a key-value cache.
    """
    size: int = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    first = first_token(model, tokenizer)
    if not 0 <= first < size:
        raise ConfigError(
            f"Token {first}, which begins a text, is outside the model's vocabulary of {size}: "
            "the tokenizer does not belong to this model."
        )
    schedule, forbidden = TemperatureSchedule(), forbidden_tokens(tokenizer, size, first)
    key = {
        "version": _VERSION,
        "model": model_sha256(model),
        "samples": samples,
        "seqlen": seqlen,
        "seed": seed,
        "schedule": asdict(schedule),
        "first": first,
        "forbidden": hashlib.sha256(forbidden.numpy().astype("<i8").tobytes()).hexdigest(),
        "device": (device or next(model.parameters()).device).type,
        **{name: version(name) for name in ("torch", "transformers")},
    }
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    path = cache_folder() / "generated" / f"{name[:32]}.safetensors"
    ids = _read(path, samples, seqlen)
    if ids is None:
        _LOG.info(f"Sampling {samples} windows of {seqlen} tokens from the dense model, once; this may take long ...")
        ids = sample_windows(
            model,
            first,
            samples,
            seqlen,
            seed,
            schedule=schedule,
            forbidden=forbidden,
            device=device,
            progress=progress,
        )
        try:
            _write(path, Windows(ids, SELF, samples))
        except OSError as error:
            _LOG.warning(f"The sampled windows cannot be kept in '{path.parent}': {error.strerror or error}.")
    return Windows(ids, SELF, samples)


def first_token(model: nn.Module, tokenizer: Any) -> int:
    """The token that a window begins with: `<|endoftext|>`, else the beginning of a sequence, else its end.

    The beginning of a sequence comes second because that of a chat model may be the beginning of a turn.

    Raises:
        ConfigError: when there is none of them.
    """
    if tokenizer is None:
        known = getattr(text_config(model), "bos_token_id", None)
    elif (known := tokenizer.get_vocab().get("<|endoftext|>")) is None:
        known = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else document_separator(tokenizer)
    if known is None:
        raise ConfigError(
            "Calibration 'self' needs a token that begins a text, and this model's tokenizer or configuration names "
            "none: calibrate with a text instead."
        )
    return int(known)


def forbidden_tokens(tokenizer: Any, size: int, first: int) -> Tensor:
    """Ids below `size` that are not text, ascending: unknown to the tokenizer, or special.

    Those that begin or separate documents may be drawn.
    """
    if tokenizer is None:
        return torch.empty(0, dtype=torch.int64)
    added = tokenizer.added_tokens_decoder
    special = {*tokenizer.all_special_ids, *(token for token, entry in added.items() if entry.special)}
    known = set(tokenizer.get_vocab().values())
    special -= {first, document_separator(tokenizer)}
    return torch.tensor([i for i in range(size) if i not in known or i in special], dtype=torch.int64)


def _read(path: Path, samples: int, seqlen: int) -> Tensor | None:
    """The windows of a cache file; None when it is missing, damaged, or does not hold them."""
    try:
        with safe_open(path, "pt") as file:
            ids, kept = file.get_tensor("ids"), (file.metadata() or {}).get("sha256")
    except (OSError, SafetensorError):
        return None
    right = ids.shape == (samples, seqlen) and ids.dtype == torch.int64
    return ids if right and Windows(ids, SELF, samples).sha256 == kept else None


def _write(path: Path, windows: Windows) -> None:
    """Put the file in place whole, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=".partial-")
    try:
        os.close(handle)
        save_file({"ids": windows.ids}, partial, metadata={"sha256": windows.sha256})
        Path(partial).replace(path)
    except SafetensorError as error:
        raise OSError(str(error)) from error
    finally:
        Path(partial).unlink(missing_ok=True)
