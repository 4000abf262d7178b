"""Measure time, flops and memory of layers and of a model with the sizes of large language models, on one GPU.

Weights are random and inputs are synthetic (correlated, with uneven scales), so that nothing has to be downloaded.
Times do not depend on the values; errors are not those of a real model. There are three tables: the measured matrix
rates of the GPU, every layer shape with ALPS and SparseGPT, and some blocks of a random LLaMA-3-8B, scaled to 32
blocks.

    python benchmarks/gpu.py
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from alps.core.device import exact_float32
from alps.core.provenance import provenance
from alps.core.statistics import InputStats, InputSums, relative_error
from alps.models.blocks import find_blocks
from alps.pruning.context import RunContext
from alps.pruning.pipeline import prune_blocks
from alps.pruning.recipe import PruneRecipe
from alps.solvers import Method, get_method
from alps.solvers.base import Solution
from alps.solvers.patterns import parse_pattern

_SHAPES = (
    "4096x4096,14336x4096,4096x14336,"  # LLaMA-3-8B
    "7168x7168,28672x7168,7168x28672,"  # OPT-30B
    "28672x8192,8192x28672"  # LLaMA-3-70B
)


def main() -> None:
    """Print each table as soon as it is measured."""
    options = _options()
    device = torch.device(options.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else provenance()["machine"]
    print(f"{name}, torch {torch.__version__}, commit {provenance()['commit']}, pattern {options.pattern}\n")
    with exact_float32():
        rates = matrix_rates(device, options.rate_size)
        print("| measured | TFLOP/s |\n|---|---:|")
        print("\n".join(f"| {kind} | {rate / 1e12:.1f} |" for kind, rate in rates.items()) + "\n", flush=True)
        print("| site (out x in) | method | s | iterations | fraction of the bound | error | GiB over inputs | bound |")
        print("|---|---|---:|---:|---:|---:|---:|---:|")
        for shape in options.shapes.split(","):
            out_size, in_size = map(int, shape.split("x"))
            weight, stats = problem(out_size, in_size, options.tokens, device)
            for method in options.methods.split(","):
                print(site_row(shape, get_method(method), weight, stats, options.pattern, rates), flush=True)
            del weight, stats
    if options.blocks:
        print("\n" + whole_model(options, device))


def matrix_rates(device: torch.device, size: int) -> dict[str, float]:
    """Measure the flops per second of square products in float32, TF32 (GPUs) and bfloat16."""
    A, B = (torch.randn(size, size, device=device) for _ in range(2))
    rates = {"float32": 2 * size**3 / _seconds(lambda: A @ B, device)}
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        rates["TF32"] = 2 * size**3 / _seconds(lambda: A @ B, device)
        torch.set_float32_matmul_precision("highest")
    C, D = A.bfloat16(), B.bfloat16()
    rates["bfloat16"] = 2 * size**3 / _seconds(lambda: C @ D, device)
    return rates


def problem(out_size: int, in_size: int, tokens: int, device: torch.device) -> tuple[Tensor, InputStats]:
    """Return a random weight (out, in) and the statistics of correlated inputs with uneven scales."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    factors = max(in_size // 8, 1)
    mixing, sizes = normal(factors, in_size) / factors**0.5, torch.exp(0.5 * normal(in_size))
    sums = InputSums.of((normal(1, factors) @ mixing + normal(1, in_size)) * sizes)
    for _ in range(0, tokens, 4096):
        sums.update((normal(4096, factors) @ mixing + 0.5 * normal(4096, in_size)) * sizes)
    return normal(out_size, in_size) / in_size**0.5, sums.into_stats()


def site_row(
    shape: str, method: Method, weight: Tensor, stats: InputStats, pattern: str, rates: dict[str, float]
) -> str:
    """Measure one layer, and format its row."""
    device, target = weight.device, parse_pattern(pattern)
    before = _start_memory(device)
    solutions: list[Solution] = []

    def solve() -> None:
        solutions[:] = [method.solve(weight, method.prepare(stats), target)]

    seconds = _seconds(solve, device, repeats=1)
    peak = torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else 0
    info = solutions[0].info
    out_size, in_size = weight.shape
    error = relative_error(solutions[0].weight, weight, stats)
    share = ""
    if info.iterations:
        product = 2 * out_size * in_size**2
        slow = (info.refit_steps + 2) * product + len(info.trace) * 4 / 3 * in_size**3
        bound = slow / rates["float32"] + info.iterations * product / rates["bfloat16"]
        share = f"{bound / seconds:.2f}"
    limit = (7 * out_size * in_size + 3 * in_size**2) * 4 / 2**30
    cells = [method.name, f"{seconds:.2f}", str(info.iterations), share, f"{error:.4f}", f"{peak / 2**30:.2f}"]
    return f"| {shape} | {' | '.join(cells)} | {limit:.2f} |"


def whole_model(options: argparse.Namespace, device: torch.device) -> str:
    """Prune `--blocks` random blocks of LLaMA-3-8B's shape, and format seconds by phase, scaled to 32 blocks."""
    config = LlamaConfig(
        hidden_size=options.hidden,
        intermediate_size=options.hidden * 7 // 2,
        num_hidden_layers=options.blocks,
        num_attention_heads=options.hidden // 128,
        num_key_value_heads=max(options.hidden // 512, 1),
        vocab_size=32000,
    )
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    ids = torch.randint(32000, (options.samples, options.seqlen), generator=torch.Generator().manual_seed(0))
    lines = [f"{options.blocks} blocks of LLaMA-3-8B's shape, {options.samples} x {options.seqlen} tokens, bfloat16"]
    lines += ["", "| method | forward s | Gram s | prepare s | solve s | errors s | s a block | 32 blocks, min | GiB |"]
    lines += ["|---|" + "---:|" * 8]
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    for name in options.methods.split(","):
        model.load_state_dict(dense)
        before = _start_memory(device)
        recipe = PruneRecipe(method=get_method(name), pattern=parse_pattern(options.pattern))
        start = time.perf_counter()
        results = prune_blocks(model, find_blocks(model), ids, recipe, RunContext(device=device))
        whole = time.perf_counter() - start
        peak = torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else 0
        cells = [f"{results.seconds.get(p, 0.0):.1f}" for p in ("forward", "gram", "prepare", "solve", "measure_error")]
        cells += [f"{whole / options.blocks:.1f}", f"{whole / options.blocks * 32 / 60:.1f}", f"{peak / 2**30:.1f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _start_memory(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _seconds(work: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """Return the seconds of the fastest call, the device's queue included; with one repeat there is no warm-up."""
    if repeats > 1:
        work()
    best = float("inf")
    for _ in range(repeats):
        _wait(device)
        start = time.perf_counter()
        work()
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--pattern", default="0.7")
    parser.add_argument("--methods", default="alps,sparsegpt")
    parser.add_argument("--shapes", default=_SHAPES, help="out x in, separated by commas")
    parser.add_argument("--tokens", type=int, default=32768, help="tokens of the synthetic inputs")
    parser.add_argument("--rate-size", type=int, default=8192, help="of the products that measure the rates")
    parser.add_argument("--blocks", type=int, default=2, help="of the whole model; 0 leaves it out")
    parser.add_argument(
        "--hidden", type=int, default=4096, help="hidden size of the whole model: 128, 256 or a multiple of 512"
    )
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=2048)
    return parser.parse_args()


if __name__ == "__main__":
    main()
