"""A tiny checkpoint for the tests of runs by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def checkpoint(tiny_model: Callable[..., Any], word_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaMA with its tokenizer on disk."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model("llama").save_pretrained(folder)
    word_tokenizer.save_pretrained(folder)
    return folder
