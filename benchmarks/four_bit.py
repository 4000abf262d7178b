r"""Compare packed models with a dense one in 4 bits by llama.cpp: bytes, tokens per second, perplexity.

    pip install llama-cpp-python
    python benchmarks/four_bit.py --dense smollm2-135m --packed packed-70 --gguf SmolLM2-135M-Instruct.Q4_1.gguf \
        --text wikitext2:test.txt --windows 12 --seqlen 1024

All models generate greedily from the same prompt of token ids, and take turns; rates are medians. The dense checkpoint
of the packaged model was converted from this GGUF file, so that both have the same weights.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

import alps
from alps.core.provenance import provenance
from alps.inference.cpu_backend import describe, find_kernel
from alps.models.demo_model import resolve_model_path
from generation import generate
from layers import ended_in_words, markdown
from llama_runtime import generate_llama, load_llama, perplexity_llama

# Seconds until the first token, and tokens per second.
Speed = tuple[float, float]


def main() -> None:
    """Print one table."""
    options = _options()
    folders = [options.dense, *(options.packed.split(",") if options.packed else [])]
    models = {name: alps.load(name).model.requires_grad_(False) for name in folders}
    threads = [int(count) for count in options.threads.split(",")]
    speeds: dict[str, dict[int, Speed]] = {name: {} for name in (*folders, options.gguf)}
    for count in threads:
        torch.set_num_threads(count)
        other = load_llama(options.gguf, count, options.prompt + options.tokens + 1)
        calls: dict[str, Callable[[], Speed]] = {
            name: partial(generate, model, options.prompt, options.tokens) for name, model in models.items()
        }
        calls[options.gguf] = partial(generate_llama, other, options.prompt, options.tokens)
        for name, pairs in measure_in_turn(calls, options.rounds).items():
            speeds[name][count] = (
                statistics.median(first for first, _ in pairs),
                statistics.median(r for _, r in pairs),
            )
    rows = []
    for name in (*folders, options.gguf):
        cells = [f"{speeds[name][count][1]:.1f} ({speeds[name][count][0]:.3f})" for count in threads]
        values = [f"{value:.2f}" for value in perplexities(name, options)]
        rows.append([Path(name).name, f"{size_of(name) / 1e6:.1f}", *cells, *values])
    facts = provenance()
    print(
        f"{facts['machine']}, {describe(find_kernel())}, torch {facts['torch']}, commit {facts['commit']}; "
        f"{options.windows} x {options.seqlen} tokens of each text\n"
    )
    heads = [f"tokens/s (first, s), {count} thread{'s' * (count > 1)}" for count in threads]
    print(markdown(["model", "MB", *heads, *options.text], rows))


def measure_in_turn(calls: dict[str, Callable[[], Speed]], rounds: int) -> dict[str, list[Speed]]:
    """Call all functions in turn, and return the results of all rounds except the first."""
    results: dict[str, list[Speed]] = {name: [] for name in calls}
    for round_ in range(rounds + 1):
        for name, call in calls.items():
            results[name] += [call()] * (round_ > 0)
    return results


def perplexities(name: str, options: argparse.Namespace) -> list[float]:
    """On every text; llama.cpp is given the windows of the dense model's tokenizer."""
    if name != options.gguf:
        return [
            row.perplexity for row in alps.evaluate(name, options.text, seqlen=options.seqlen, windows=options.windows)
        ]
    reader = alps.data.loaded_model.load(options.dense)
    model = load_llama(name, max(map(int, options.threads.split(","))), options.seqlen, all_logits=True)
    cut = [reader.evaluation(text, options.seqlen, options.windows) for text in options.text]
    return [perplexity_llama(model, windows.ids.numpy()) for windows in cut]


def size_of(name: str) -> int:
    """Return the bytes of the weight files."""
    path = Path(resolve_model_path(name))
    return path.stat().st_size if path.is_file() else sum(file.stat().st_size for file in path.glob("*.safetensors"))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dense", required=True)
    parser.add_argument("--packed", default="", help="packed directories, separated by commas")
    parser.add_argument("--gguf", required=True)
    parser.add_argument("--text", action="append", default=[])
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--seqlen", type=int, default=1024)
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=32, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=32, help="tokens to generate")
    return parser.parse_args()


if __name__ == "__main__":
    ended_in_words(main, ImportError)
