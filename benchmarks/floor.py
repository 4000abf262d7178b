"""Compute the minimum time of pruning a model on this machine: flops by phase over measured matrix rates.

With `--report`, the table has the seconds of a run of SmolLM2-135M as well. Example:

    python benchmarks/model.py --calibration c4.jsonl --reports build/reports
    python benchmarks/floor.py --report build/reports/alps.json
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from alps.core.device import exact_float32
from alps.core.provenance import provenance
from alps.solvers.hessian import invert_


@dataclass(frozen=True)
class Shapes:
    """Number of blocks of a model, and for every input of a block its size and the output sizes of its layers."""

    blocks: int
    inputs: tuple[tuple[int, tuple[int, ...]], ...]


MODELS = {
    "SmolLM2-135M": Shapes(30, ((576, (576, 192, 192)), (576, (576,)), (576, (1536, 1536)), (1536, (576,)))),
    "LLaMA-3-8B": Shapes(32, ((4096, (4096, 1024, 1024)), (4096, (4096,)), (4096, (14336, 14336)), (14336, (4096,)))),
    "OPT-30B": Shapes(48, ((7168, (7168,) * 3), (7168, (7168,)), (7168, (28672,)), (28672, (7168,)))),
}

# Dtype of the products of each phase, as a key of the measured rates.
_RATES = {
    "forward": "bfloat16",
    "gram": "float32",
    "inverses": "float32",
    "iterations": "bfloat16",
    "refit": "float32",
    "errors": "float32",
}


def flops(shapes: Shapes, tokens: int, penalties: int, iterations: int, steps: int) -> dict[str, float]:
    """Count the flops of the matrix products of each phase, without attention, norms and elementwise operations.

    Args:
        shapes: the model.
        tokens: number of calibration tokens.
        penalties: number of distinct penalties per input, each of which needs an inverse.
        iterations: ADMM iterations per layer.
        steps: refit steps per layer.
    """
    sums = dict.fromkeys(_RATES, 0.0)
    last = shapes.inputs[-1]
    for n, outputs in shapes.inputs:
        product = 2.0 * sum(outputs) * n**2
        # The pass that collects statistics stops at the input of the last layer.
        sums["forward"] += 2.0 * sum(outputs) * n * tokens * (1 if (n, outputs) == last else 2)
        sums["gram"] += tokens * n**2
        sums["inverses"] += penalties * 4 / 3 * n**3
        sums["iterations"] += iterations * product
        sums["refit"] += (steps + 2) * product
        # Three energies over one triangle: of the dense output, and of the errors of the method and of magnitude.
        sums["errors"] += 1.5 * product
    return {phase: shapes.blocks * count for phase, count in sums.items()}


def rates(size: int) -> dict[str, float]:
    """Measure the flops per second of square products."""
    measured_rates = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        A, B = (torch.randn(size, size).to(dtype) for _ in range(2))
        measured_rates[name] = 2 * size**3 / _best(partial(torch.mm, A, B))
    return measured_rates


def inverse_table(sizes: list[int]) -> str:
    """Format the milliseconds of methods to compute (H + rho I)^{-1}, and the penalties from which eigh is faster."""
    lines = ["| n | Cholesky inverse | by halves | eigh | rebuild, float32 | rebuild, bfloat16 | eigh pays from |"]
    lines.append("|---|" + "---:|" * 6)
    for n in sizes:
        X = torch.randn(2 * n, n)
        H = (X.T @ X / (2 * n)).add_(torch.eye(n), alpha=0.1)
        values, Q = torch.linalg.eigh(H)
        scaled = Q * values.rsqrt()
        halves = _best(partial(_by_halves, H))
        ways = [
            _best(partial(_by_cholesky, H)),
            halves,
            eigen := _best(partial(torch.linalg.eigh, H), 3),
            _best(partial(_rebuilt, scaled, torch.float32)),
            rebuild := _best(partial(_rebuilt, scaled, torch.bfloat16)),
        ]
        pays = f"{eigen / (halves - rebuild):.0f}" if halves > rebuild else "never"
        lines.append(f"| {n} | {' | '.join(f'{1e3 * way:.1f}' for way in ways)} | {pays} |")
    return "\n".join(lines)


def _by_halves(H: torch.Tensor) -> torch.Tensor:
    inverse = H.clone()
    assert invert_(inverse)
    return inverse


def _by_cholesky(H: torch.Tensor) -> torch.Tensor:
    return torch.cholesky_inverse(torch.linalg.cholesky(H))


def _rebuilt(scaled: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    low = scaled.to(dtype)
    return low @ low.T


def _best(work: Callable[[], object], repeats: int = 10) -> float:
    """Return the seconds of the fastest call."""
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best


def measured(report: Path) -> dict[str, float]:
    """Return the seconds of a run by phase; `iterations` is all of a solve except the refit."""
    seconds = json.loads(report.read_text())["seconds"]
    return {
        "forward": seconds["forward"],
        "gram": seconds["gram"],
        "iterations": seconds["prepare"] + seconds["solve"] - seconds["refit"],
        "refit": seconds["refit"],
        "errors": seconds["measure_error"],
    }


def table(counts: dict[str, float], speed: dict[str, float], seconds: dict[str, float]) -> str:
    """Format the flops, minimum seconds and, if given, measured seconds of every phase."""
    lines = ["| phase | TFLOP | rate | floor s | measured s |", "|---|---:|---|---:|---:|"]
    floors = {phase: count / speed[_RATES[phase]] for phase, count in counts.items()}
    for phase, count in counts.items():
        cell = f"{seconds[phase]:.1f}" if phase in seconds else ""
        lines.append(f"| {phase} | {count / 1e12:.2f} | {_RATES[phase]} | {floors[phase]:.1f} | {cell} |")
    whole = f"{sum(seconds.values()):.1f}" if seconds else ""
    lines.append(f"| all | {sum(counts.values()) / 1e12:.2f} | | {sum(floors.values()):.1f} | {whole} |")
    return "\n".join(lines)


def main() -> None:
    """Measure the rates, and print one table per model."""
    options = _options()
    with exact_float32():
        speed = rates(options.rate_size)
    facts = provenance()
    print(
        f"{facts['machine']}, torch {facts['torch']}, commit {facts['commit']}; "
        + ", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in speed.items())
    )
    if options.inverses:
        print(f"\n### Inverses, ms\n\n{inverse_table([int(n) for n in options.inverses.split(',')])}")
    for name, shapes in MODELS.items():
        tokens = options.tokens if name == "SmolLM2-135M" else options.large_tokens
        seconds = measured(Path(options.report)) if options.report and name == "SmolLM2-135M" else {}
        counts = flops(shapes, tokens, options.penalties, options.iterations, options.steps)
        print(f"\n### {name}, {tokens} tokens\n\n{table(counts, speed, seconds)}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", default="", help="report.json of an ALPS run of SmolLM2-135M with --tokens tokens")
    parser.add_argument("--tokens", type=int, default=128 * 512, help="of SmolLM2-135M's calibration")
    parser.add_argument("--large-tokens", type=int, default=128 * 2048, help="of the larger models'")
    parser.add_argument("--penalties", type=int, default=11)
    parser.add_argument("--iterations", type=int, default=33)
    parser.add_argument("--steps", type=int, default=6, help="of the refit")
    parser.add_argument("--inverses", default="576,1536,3072", help="sizes at which to time them")
    parser.add_argument("--rate-size", type=int, default=1536)
    return parser.parse_args()


if __name__ == "__main__":
    main()
