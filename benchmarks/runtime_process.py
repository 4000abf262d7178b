"""Run one model once, in a process that imports nothing else, and print its speed and memory as JSON.

    python benchmarks/runtime_process.py smollm2 torch --threads 2
    python benchmarks/runtime_process.py smollm2-Q4_K_M.gguf llama.cpp --threads 2

runtimes.py starts it for every cell of its table.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

RUNTIMES = ("torch", "llama.cpp")


def load_runtime(path: str, runtime: str, threads: int, context: int) -> Callable[[int, int], tuple[float, float]]:
    """Load a model, and return the function that generates with it, as `generation.generate`.

    Args:
        path: Hugging Face directory for torch, GGUF file for llama.cpp.
        runtime: one of `RUNTIMES`.
        threads: number of threads.
        context: tokens of prompt and answer.
    """
    if runtime == "llama.cpp":
        from llama_runtime import generate_llama, load_llama

        return partial(generate_llama, load_llama(path, threads, context))
    import torch
    from transformers import AutoModelForCausalLM

    from generation import generate

    torch.set_num_threads(threads)
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    return partial(generate, model.eval().requires_grad_(False))


def resident_bytes() -> int:
    """Return the resident size of this process, with the pages of mapped files that it has read."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


def main() -> None:
    """Print one line: the tokens per second of the prompt and of the answer, and the resident bytes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path")
    parser.add_argument("runtime", choices=RUNTIMES)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to generate")
    options = parser.parse_args()
    generate = load_runtime(options.path, options.runtime, options.threads, options.prompt + options.tokens)
    generate(options.prompt, 2)  # reads the weights, and lets libraries choose their kernels
    first, rate = generate(options.prompt, options.tokens)
    print(json.dumps({"prompt": options.prompt / first, "answer": rate, "resident": resident_bytes()}))


if __name__ == "__main__":
    main()
