"""Write a pruned model as an ordinary Hugging Face directory."""

from __future__ import annotations

from pathlib import Path

from torch import nn
from transformers import PreTrainedTokenizerBase

from alps.models.load import quiet


def save_model(model: nn.Module, tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> None:
    """Save weights, configuration, generation settings, tokenizer and chat template into `folder`."""
    with quiet():
        model.save_pretrained(folder)  # type: ignore[operator]
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
