"""Comparison of a loaded tokenizer with the files of its checkpoint: classes of their own code, and other ids."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import transformers
from tokenizers import Tokenizer

from alps.core.errors import UnsupportedModel
from alps.models.hub import find_cached

_LOG = logging.getLogger("alps")
_CONFIG, _DATA = "tokenizer_config.json", "tokenizer.json"
# Blanks, line breaks, digits, accents, quotes, other scripts, code: what tokenizers split in different ways.
_PROBE = (
    "Once upon a time, Zoë's 3 cats (and 12,345 dogs)\n\n  ran — “fast”!\tx_y = z; I'LL naïve don't\r\n"
    "你好 世界。 こんにちは Привет مرحبا नमस्ते 한국어 🙂 \n    def f(x):\n\treturn x  # ²³ ½ ﬁ\u00a0end  "
)
# Classes that read tokenizer.json and nothing else.
_PLAIN = ("TokenizersBackend", "PreTrainedTokenizerFast")


def check_own_class(source: str, name: str) -> None:
    """Refuse a tokenizer that only code of the checkpoint could read, or say which class takes its place.

    Args:
        source: directory or hub name of the checkpoint.
        name: of the model, for messages.

    Raises:
        UnsupportedModel: when transformers does not have the tokenizer's class.
    """
    settings = _read_config(source)
    declared = settings.get("tokenizer_class")
    is_known = isinstance(declared, str) and any(
        hasattr(transformers, word) for word in (declared, declared.removesuffix("Fast"), f"{declared}Fast")
    )
    own = _own_code(settings)
    if own is not None and not is_known:
        raise UnsupportedModel(
            f"Model '{name}' has a tokenizer of its own code, {own}, which is never run: if its {_DATA} gives the same "
            f"tokens, remove auto_map and tokenizer_class from {_CONFIG}."
        )
    if own is not None:
        _LOG.warning(
            f"Model '{name}' has a tokenizer of its own code, {own}, which is never run: {declared} of transformers "
            "is used, whose tokens may be others."
        )
    elif declared is not None and not is_known:
        _LOG.warning(
            f"Model '{name}' names the tokenizer class {declared}, which transformers does not have: {_DATA} is used, "
            "whose tokens may be others."
        )


def compare_with_data(tokenizer: Any, source: str, name: str) -> None:
    """Warn if the class of a tokenizer splits a text into other tokens than the checkpoint's `tokenizer.json`.

    Args:
        tokenizer: as loaded.
        source: directory or hub name of the checkpoint.
        name: of the model, for the message.
    """
    kind = type(tokenizer).__name__
    path = None if kind in _PLAIN else _find(source, _DATA)
    if path is None:
        return
    try:
        stored = Tokenizer.from_file(str(path))
        stored.no_truncation()
        stored.no_padding()
        expected = stored.encode(_PROBE, add_special_tokens=False).ids
    except Exception:  # the package raises bare exceptions; a file that transformers does not need may be anything
        return
    ids = tokenizer(_PROBE, add_special_tokens=False, verbose=False).input_ids
    if ids != expected:
        _LOG.warning(
            f"Model '{name}': its tokenizer class {kind} splits a test sentence into {len(ids)} tokens that are not "
            f"the {len(expected)} of its {_DATA}: those of the class are used, as transformers does."
        )


def _read_config(source: str) -> dict[str, Any]:
    path = _find(source, _CONFIG)
    if path is None:
        return {}
    try:
        settings = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return settings if isinstance(settings, dict) else {}


def _own_code(settings: dict[str, Any]) -> str | None:
    """Return the class of the checkpoint's own code; None without one."""
    names = settings.get("auto_map")
    if isinstance(names, dict):
        names = names.get("AutoTokenizer")
    listed = names if isinstance(names, list) else [names]
    return next((str(item) for item in reversed(listed) if item), None)


def _find(source: str, file: str) -> Path | None:
    path = Path(source) / file
    if path.is_file():
        return path
    return None if Path(source).is_dir() else find_cached(source, file)
