"""Self-generated calibration windows, cached on disk so that each set is sampled only once."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from alps.core.cache import cache_folder
from alps.core.errors import ConfigError
from alps.core.json_text import to_json
from alps.core.progress import Progress
from alps.data.sampling import TemperatureSchedule, sample_windows
from alps.data.tensor_cache import read_cached, write_cached
from alps.data.text_sources import SELF
from alps.data.windows import Windows, bos_token, document_separator
from alps.models.auto_class import text_config
from alps.models.fingerprint import model_sha256

_LOG = logging.getLogger("alps")

# To be raised with every change of the sampling that gives other tokens.
_VERSION = 1


def generate_windows(
    model: nn.Module,
    tokenizer: Any,
    *,
    samples: int,
    seqlen: int,
    seed: int,
    bos: bool = False,
    device: torch.device | None = None,
    progress: Progress | None = None,
) -> Windows:
    """Sample windows from a model, or read those of an earlier call with the same model and arguments.

    Args:
        model: a causal language model; unchanged.
        tokenizer: defines the first token of a text and the tokens that are not text; None uses the model's
            configuration, and allows all tokens.
        samples: number of windows.
        seqlen: tokens in a window.
        seed: of the random streams.
        bos: begin every window with the tokenizer's BOS token, and not with the token that `first_token` finds.
        device: to sample on; None for the model's.
        progress: advanced after every token of a batch.

    Raises:
        ConfigError: when no token begins a text, or the model cannot be sampled.
        UnsupportedModel: for a model without a key-value cache.
    """
    size: int = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    first = bos_token(tokenizer) if bos else first_token(model, tokenizer)
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
    name = hashlib.sha256(to_json(key, sort_keys=True).encode()).hexdigest()
    path = cache_folder() / "generated" / f"{name[:32]}.safetensors"
    ids = read_cached(path, (samples, seqlen))
    if ids is None:
        _LOG.info(f"Sampling {samples} windows of {seqlen} tokens from the dense model, once; this may take long ...")
        ids = sample_windows(
            model,
            first,
            samples=samples,
            seqlen=seqlen,
            seed=seed,
            schedule=schedule,
            forbidden=forbidden,
            device=device,
            progress=progress,
        )
        try:
            write_cached(path, ids)
        except OSError as error:
            _LOG.warning(f"The sampled windows cannot be kept in '{path.parent}': {error.strerror or error}.")
    return Windows(ids, SELF, samples, bos=bos)


def first_token(model: nn.Module, tokenizer: Any) -> int:
    """Return the token that a window begins with: `<|endoftext|>`, else the BOS token, else the document separator.

    The BOS token comes second because that of a chat model may begin a turn.

    Raises:
        ConfigError: when there is none of them.
    """
    if tokenizer is None:
        token = getattr(text_config(model), "bos_token_id", None)
    elif (token := tokenizer.get_vocab().get("<|endoftext|>")) is None:
        token = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else document_separator(tokenizer)
    if token is None:
        raise ConfigError(
            "Calibration 'self' needs a token that begins a text, and this model's tokenizer or configuration names "
            "none: calibrate with a text instead."
        )
    return int(token)


def forbidden_tokens(tokenizer: Any, size: int, first: int) -> Tensor:
    """Return the ids of tokens that are not text, ascending: unused by the tokenizer, or special.

    Tokens that begin or separate documents are allowed.

    Args:
        tokenizer: of the model; None forbids nothing.
        size: of the vocabulary.
        first: token that begins a document.
    """
    if tokenizer is None:
        return torch.empty(0, dtype=torch.int64)
    added = tokenizer.added_tokens_decoder
    special = {*tokenizer.all_special_ids, *(token for token, entry in added.items() if entry.special)}
    vocabulary = set(tokenizer.get_vocab().values())
    special -= {first, document_separator(tokenizer)}
    return torch.tensor([i for i in range(size) if i not in vocabulary or i in special], dtype=torch.int64)
